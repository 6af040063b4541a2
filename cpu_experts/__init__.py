"""Quantized experts on the CPU: SIMD kernels, the expert feed-forward network, a decoder.

Everything that compiles imports numba when it is imported itself.
"""

import os

# A thread that waits for its team spins before it sleeps. On a machine that is also doing
# something else, long spinning keeps the late thread from the core it needs and makes a call
# ten times slower; GNU's OpenMP reads this when it is loaded, which numba and torch do later.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
