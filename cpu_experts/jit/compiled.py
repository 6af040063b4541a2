"""How kernels are compiled: one decorator, one disk cache that notices every change.

numba's cache looks only at the file a function lives in. What we compile also depends on the
other files of this package, on the weight formats, on the processor, on the SIMD level and on the
libraries that translate it, so a hash of all of these is part of the files' names. It is not
enough as part of the key: numba writes its index before the code that the index names, so two
processes with different keys, or one that is killed in between, could leave one's code under the
other's key.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import llvmlite
import numba
from llvmlite.binding import get_host_cpu_name
from numba.core.caching import CompileResultCacheImpl, FunctionCache
from numba.core.cpu_options import ParallelOptions

from cpu_experts.jit.hostcpu import host_features
from cpu_experts.jit.linking import Kernel
from cpu_experts.jit.simd_level import EMULATED, LEVEL
from cpu_experts.jit.threading_layer import check_threading_layer
from hybrid.formats import registry

_log = logging.getLogger("cpu_experts")
_NOT_KEPT = (
    "the compiled kernels are not kept, every start compiles them anew: %s "
    "(set NUMBA_CACHE_DIR to a folder that can be written)"
)
_DAMAGED = "files of compiled kernels are damaged, they are made anew: %r"
_warned: set[str] = set()

check_threading_layer(str(numba.config.THREADING_LAYER))

#: Of numba's automatic parallelism only prange: it would make a region of ``a[:] = 0``.
_PRANGE_ONLY = dict.fromkeys(
    ("comprehension", "reduction", "inplace_binop", "setitem", "numpy", "stencil", "fusion"), False
)


#: Folders of what kernels are made of: this package, and the formats, whose sizes are constants
#: in machine code.
_SOURCES = (Path(__file__).parents[1], Path(registry.__file__).parent)


@cache
def _salt() -> str:
    parts = [numba.__version__, llvmlite.__version__, LEVEL, str(EMULATED)]
    parts += [get_host_cpu_name(), *sorted(host_features())]
    parts += list(registry.FORMATS)
    digest = hashlib.sha256("\n".join(parts).encode())
    for folder in _SOURCES:
        for source in sorted(folder.rglob("*.py")):
            digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


@cache
def _announce() -> None:
    """Say once that this start takes longer than the next one."""
    _log.info("compiling the kernels for this processor (%s); later starts reuse them", LEVEL)


def _warn_once(text: str, error: Exception) -> None:
    """Warn of what befalls all kernels alike, with the error of the first."""
    if text not in _warned:
        _warned.add(text)
        _log.warning(text, error)


class _SaltedFiles(CompileResultCacheImpl):  # type: ignore[misc]
    def get_filename_base(self, fullname: str, abiflags: str) -> str:
        return f"{super().get_filename_base(fullname, abiflags)}-{_salt()}"


class _SaltedCache(FunctionCache):  # type: ignore[misc]
    """A cache that no state of the disk turns into an error: at worst it is of no use."""

    _impl_class = _SaltedFiles

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        found = None
        try:
            found = super().load_overload(sig, target_context)
        except Exception as error:  # what a damaged pickle raises can be anything
            _warn_once(_DAMAGED, error)
            with contextlib.suppress(OSError):
                self.flush()
        if found is None:
            _announce()
        return found

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)
        except OSError as error:
            _warn_once(_NOT_KEPT, error)


def kernel(
    *, parallel: bool = False, reassociate: bool = False
) -> Callable[[Callable[..., Any]], Any]:
    """Compile a function without bounds checks, free of the GIL, cached on disk.

    ``reassociate`` lets sums be added up in vector lanes; infinities and NaN keep their meaning.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        if numba.config.DISABLE_JIT:
            return function
        options = {
            "nopython": True,
            "nogil": True,
            "parallel": ParallelOptions(dict(_PRANGE_ONLY)) if parallel else False,
            "error_model": "numpy",
            "fastmath": {"reassoc", "contract", "nsz"} if reassociate else False,
        }
        compiled = Kernel(function, options)
        try:
            compiled._cache = _SaltedCache(function)
        except RuntimeError as error:  # numba found no folder that it can write
            _warn_once(_NOT_KEPT, error)
        return compiled

    return decorate
