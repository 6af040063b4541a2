"""Reads GGUF files: what their headers say, their models in transformers' terms, their weights."""
