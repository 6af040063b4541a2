"""Models on the Hugging Face hub: their names, what is needed of them, and how it comes here."""
