"""Converts checkpoints to packed stores on disk, and opens the stores."""
