"""How kernels are compiled: one decorator, one disk cache that notices every change.

numba's cache looks only at the file a function lives in. What we compile also depends on the
other files of this package, on the SIMD level and on the libraries that translate it, so a
hash of all of these is part of the key.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import llvmlite
import numba
from numba.core.caching import FunctionCache

from cpu_experts.hostcpu import host_level


@cache
def _salt() -> str:
    parts = [numba.__version__, llvmlite.__version__, host_level()]
    digest = hashlib.sha256("\n".join(parts).encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


@cache
def _announce() -> None:
    """Say once that this start takes longer than the next one."""
    logging.getLogger("cpu_experts").info(
        "compiling the kernels for this processor (%s); later starts reuse them", host_level()
    )


class _SaltedCache(FunctionCache):  # type: ignore[misc]
    def load_overload(self, sig: Any, target_context: Any) -> Any:
        found = super().load_overload(sig, target_context)
        if found is None:
            _announce()
        return found

    def _index_key(self, sig: Any, codegen: Any) -> Any:
        return (*super()._index_key(sig, codegen), _salt())


def kernel(*, parallel: bool = False) -> Callable[[Callable[..., Any]], Any]:
    """Compile a function without bounds checks, free of the GIL, cached on disk."""

    def decorate(function: Callable[..., Any]) -> Any:
        compiled = numba.njit(nogil=True, parallel=parallel, error_model="numpy")(function)
        if not numba.config.DISABLE_JIT:
            compiled._cache = _SaltedCache(function)
        return compiled

    return decorate
