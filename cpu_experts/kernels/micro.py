"""The micro-kernels of this process: vector code, or its scalar twins."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cpu_experts.jit.simd_level import SCALAR
from cpu_experts.kernels.scalar import fetch_add, ticks, wait_for

if SCALAR or TYPE_CHECKING:  # both have the same names, and the scalar ones have types
    from cpu_experts.kernels.scalar import (
        READ_WORDS,
        ROW_BLOCKS,
        add_strip,
        copy_strip,
        exp_all,
        largest_of,
        micro_kernel,
        multiply_strip,
        quantize_group,
        silu_strip,
        strip_dot,
        sum_words,
        sums_of,
        to_half,
    )
else:
    from cpu_experts.kernels.simd import micro_kernel, quantize_group, strip_dot
    from cpu_experts.kernels.simd_dense import (
        READ_WORDS,
        add_strip,
        copy_strip,
        exp_all,
        largest_of,
        multiply_strip,
        silu_strip,
        sum_words,
        to_half,
    )
    from cpu_experts.kernels.simd_loops import ROW_BLOCKS, sums_of

__all__ = [
    "READ_WORDS",
    "ROW_BLOCKS",
    "add_strip",
    "copy_strip",
    "exp_all",
    "fetch_add",
    "largest_of",
    "micro_kernel",
    "multiply_strip",
    "quantize_group",
    "silu_strip",
    "strip_dot",
    "sum_words",
    "sums_of",
    "ticks",
    "to_half",
    "wait_for",
]
