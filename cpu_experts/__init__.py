"""Quantized experts on the CPU: formats, SIMD kernels and the expert feed-forward network.

``cpu_experts.formats`` needs only numpy; everything that compiles imports numba when it is
imported itself.
"""
