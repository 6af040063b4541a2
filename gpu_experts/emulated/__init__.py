"""A device that keeps every rule of the protocol and computes on the CPU."""
