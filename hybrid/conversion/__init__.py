"""From a Hugging Face checkpoint to a directory with an expert store."""
