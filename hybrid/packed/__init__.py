"""Modules that stand in a model and compute with packed weights."""
