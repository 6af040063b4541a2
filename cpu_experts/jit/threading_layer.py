"""What numba runs the kernels' threads on, checked before anything is compiled for it."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module

from cpu_experts.errors import BackendError

ENVIRONMENT_VARIABLE = "NUMBA_THREADING_LAYER"
#: The modules of which numba takes one, by what it can be asked for. Its own work queue is always
#: there: whatever it serves needs no check.
_WANTED = {"tbb": ("tbb",), "omp": ("omp",), "safe": ("tbb",), "threadsafe": ("tbb", "omp")}
_HOW = {"tbb": "TBB (pip install tbb)", "omp": "OpenMP (on Debian libgomp1)"}
_ALWAYS = ("workqueue", "forksafe", "default")


def check_threading_layer(asked: str) -> None:
    """Refuse a threading layer that numba cannot load; starts no thread.

    Raises
    ------
    BackendError
        When there is no such layer, or it is not installed.
    """
    layer = asked.lower()
    if layer in _ALWAYS or any(name in _WANTED.get(layer, ()) for name in _installed()):
        return
    found = ", ".join([*_installed(), "workqueue"])
    install = " or ".join(_HOW[name] for name in _WANTED.get(layer, ()))
    raise BackendError(
        f"{ENVIRONMENT_VARIABLE} is {asked!r}, numba finds {found} here",
        hint=f"unset {ENVIRONMENT_VARIABLE} or choose one of those"
        + (f", or install {install}" if install else ""),
    )


def _installed() -> Iterator[str]:
    for name in ("tbb", "omp"):
        try:
            import_module(f"numba.np.ufunc.{name}pool")
        except ImportError:
            continue
        yield name
