"""Run Mixture-of-Experts language models on machines whose GPU cannot hold them.

Everything is imported on first use, so that ``import hybrid`` and ``hybrid --help`` start at
once and load neither torch nor numba. Not even of the standard library anything is imported that
Python has not: until :mod:`hybrid.cli` has taken over, Ctrl-C would show where it was.
"""

import cpu_experts  # noqa: F401  (tells OpenMP how to wait, before torch loads it)
from hybrid import registration

__version__ = "0.1.0"

TYPE_CHECKING = False  # importing typing, only to know this, takes milliseconds
if TYPE_CHECKING:
    from hybrid.planning.plan import plan
    from hybrid.session.model import HybridModel
    from hybrid.weights.config import HybridConfig

_HOME = {
    "HybridConfig": "hybrid.weights.config",
    "HybridModel": "hybrid.session.model",
    "plan": "hybrid.planning.plan",
}

__all__ = ["HybridConfig", "HybridModel", "__version__", "plan"]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'hybrid' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)


registration.register()
