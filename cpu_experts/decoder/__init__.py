"""One token through all of a model's layers in a single compiled call."""
