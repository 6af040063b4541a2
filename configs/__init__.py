"""The model, hardware and experiment files that ship with the package, as ``hybrid.configs``."""
