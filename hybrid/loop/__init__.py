"""Generates tokens one after the other, in place of transformers' own loop."""
