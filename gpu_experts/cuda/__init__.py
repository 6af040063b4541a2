"""The CUDA device: slots in VRAM, copy streams, events, kernels."""
