"""Writes many texts at once: their steps are computed together, and what they share once."""
