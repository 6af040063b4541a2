"""What users give, understood once: names, sizes, counts, formats, the model they mean."""
