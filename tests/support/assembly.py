"""Compiles all kernels for a processor that need not be here: ``assembly.py CPU FOLDER``.

Writes the assembly of each kernel that Python calls, with everything it calls, to a file. Nothing
that is compiled ever runs.
"""

from __future__ import annotations

import pkgutil
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import numpy as np

#: What a processor with AVX-512 VNNI has as far as levels are concerned; LLVM knows the rest.
_FEATURES = (
    *("avx2", "fma", "f16c", "avx512f", "avx512bw"),
    *("avx512vl", "avx512dq", "avx512cd", "avx512vnni"),
)


#: And one with matrix units besides.
_UNITS = ("avx512bf16", "avx512vbmi", "amx-tile", "amx-bf16")
_WITH_UNITS = ("sapphirerapids",)


def _pretend(cpu: str) -> None:
    """Let everything that asks for this processor see ``cpu``; comes before it asks."""
    there = (*_FEATURES, *_UNITS) if cpu in _WITH_UNITS else _FEATURES
    features = type(llvm.get_host_cpu_features())(dict.fromkeys(there, True))
    llvm.get_host_cpu_name = lambda: cpu
    llvm.get_host_cpu_features = lambda: features


def _kernels(cpu: str) -> Iterator[Any]:
    """All kernels that there are for ``cpu``."""
    import cpu_experts
    from cpu_experts.jit.linking import Kernel
    from cpu_experts.kernels import dots

    yield from dots.MADE
    if cpu in _WITH_UNITS:
        from cpu_experts.kernels import tiles

        yield from tiles.MADE
    for module in pkgutil.walk_packages(cpu_experts.__path__, "cpu_experts."):
        if module.name.startswith("cpu_experts.kernels.tile") and cpu not in _WITH_UNITS:
            continue
        for value in vars(import_module(module.name)).values():
            if isinstance(value, Kernel) and value.py_func.__module__ == module.name:
                yield value


def _call_all() -> None:
    """Call all that is called from Python, with arguments of the right types."""
    from cpu_experts.decoder.decoder import Decoder
    from cpu_experts.ffn import linear, run_experts
    from cpu_experts.kernels.dots import dot_table
    from cpu_experts.kernels.reading import read_words
    from cpu_experts.kernels.widen import widen
    from decoder_layers import DIM, PAIRS, D, make_experts, make_layer, make_matrix, make_norm
    from hybrid.formats.matrix import pack
    from hybrid.formats.registry import FORMATS

    def zeros(*size: int) -> Any:
        return np.zeros(size, np.float32)

    layer = make_layer()
    decoder = Decoder([layer], norm=make_norm(D), lm_head=make_matrix(16, D, "f32"))
    cache = decoder.new_cache()
    cache.store(0, *(zeros(layer.kv_heads, 3, DIM),) * 2)
    angles = zeros(2, PAIRS)
    decoder.begin_run()
    decoder.step(zeros(D), angles[0], angles[0], cache, zeros(decoder.vocabulary))
    kept = np.zeros(1, np.int32)
    decoder.step_tokens(zeros(2, D), angles, angles, cache, zeros(1, decoder.vocabulary), kept=kept)
    sides = [zeros(2, matrix.rows) for matrix in layer.projections]
    decoder.attend(0, *sides, angles, angles, cache)
    experts = make_experts(4, "q4_0")
    x, ids = zeros(3, D), np.zeros((3, 2), np.int64)
    run_experts(x, ids, zeros(3, 2), experts.blocks, experts.shape, zeros(*x.shape))
    packed = pack(zeros(32, 64), "q4_0")
    linear(zeros(2, 64), packed, "q4_0", None, zeros(2, 32))
    widen(packed, 32, 64, "q4_0", zeros(32, 64))
    read_words(np.zeros(1000, np.uint64), 1)
    for fmt in FORMATS:
        dot_table(fmt)


def _call_tiles() -> None:
    """The same of what only a processor with matrix units compiles."""
    from cpu_experts import tiles
    from cpu_experts.kernels.tiles import MADE, filler
    from decoder_layers import D, make_experts
    from hybrid.formats.matrix import pack
    from hybrid.formats.registry import FORMATS

    tiles._granted = lambda: True  # it is not asked for, nor used
    experts = make_experts(4, "q4_0")
    x, ids, out = np.zeros((3, D), np.float32), np.zeros((3, 2), np.int64), np.zeros((3, D))
    weights = np.zeros((3, 2), np.float32)
    tiles.run_experts(x, ids, weights, experts.blocks, experts.shape, out.astype(np.float32))
    packed = pack(np.zeros((32, 64), np.float32), "q4_0")
    tiles.linear(np.zeros((2, 64), np.float32), packed, "q4_0", None, np.zeros((2, 32), np.float32))
    for fmt in FORMATS:
        if fmt != "f32":
            filler(fmt)
    assert MADE


def _gathering(x, at, out):  # numba infers the types
    """What a loop must not look like: its index may be negative."""
    for i in range(out.size):
        out[i] = x[at + i]


def main(cpu: str, folder: Path) -> None:
    """Write the assembly for ``cpu`` into ``folder``."""
    _pretend(cpu)
    from cpu_experts.jit.compiled import kernel
    from cpu_experts.jit.linking import Kernel

    def only_compile(self: Any, *args: Any) -> np.int64:
        self.compile(tuple(map(self.typeof_pyval, args)))
        return np.int64(1)

    Kernel.__call__ = only_compile
    _call_all()
    if cpu in _WITH_UNITS:
        _call_tiles()
    control = kernel()(_gathering)
    control(np.zeros(9, np.float32), 3, np.zeros(3, np.float32))
    for one in (*_kernels(cpu), control):
        name = f"{one.py_func.__module__}.{one.py_func.__qualname__}"
        # What only other kernels call is a part of theirs.
        assert one.signatures or one._part.signatures, f"nothing here calls {name}"
        if one.signatures:
            (folder / f"{name}.s").write_text("\n".join(one.inspect_asm().values()))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
