"""The SIMD level that this process compiles its kernels for, settled once."""

from __future__ import annotations

from numba import config

from cpu_experts.jit import hostcpu

LEVEL, EMULATED = hostcpu.processor().level, hostcpu.processor().emulated
#: Whether the micro-kernels are the scalar ones: there are no vectors, or nothing is compiled.
SCALAR = LEVEL == "portable" or bool(config.DISABLE_JIT)
