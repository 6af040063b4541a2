"""Every layer's experts on the CPU and on a device at once, and what came of it."""
