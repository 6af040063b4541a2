"""What this machine does in a second, measured, and what follows for a model."""
