"""What users give, in whatever words: names, sizes, counts and formats, understood or refused."""
