"""What a model and a machine are: specs, families, estimates, checked tables."""
