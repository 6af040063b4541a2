"""Describes models and machines: specs, families, estimates, checked tables."""
