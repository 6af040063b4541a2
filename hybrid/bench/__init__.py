"""Measures what ``hybrid bench`` reports."""
