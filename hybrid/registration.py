"""Makes transformers know us, without importing it.

``import hybrid`` must cost nothing, so the quantizer is registered when transformers' own
registry is imported: at once if it already is, else by a finder that watches for that one
import. What types and loading it need is imported then.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False  # as in hybrid/__init__.py
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.abc import Loader
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

_REGISTRY = "transformers.quantizers.auto"


def register() -> None:
    """Register with transformers now, or as soon as it is imported."""
    loaded = sys.modules.get(_REGISTRY)
    if loaded is not None and hasattr(loaded, "register_quantizer"):
        _register(loaded)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register(registry: Any) -> None:
    from hybrid.ask.formats import QUANT_METHOD
    from hybrid.grafts import set_on_class
    from hybrid.quantizer import HybridQuantizer, merge_configs
    from hybrid.weights.config import HybridConfig

    if QUANT_METHOD in registry.AUTO_QUANTIZER_MAPPING:
        return
    registry.register_quantization_config(QUANT_METHOD)(HybridConfig)
    registry.register_quantizer(QUANT_METHOD)(HybridQuantizer)
    merge = registry.AutoHfQuantizer.merge_quantization_configs

    # Without this, a HybridConfig for a checkpoint that is quantized in another way is refused.
    def merge_with_ours(cls: Any, of_model: Any, from_args: Any) -> Any:
        if isinstance(from_args, HybridConfig):
            return merge_configs(from_args, of_model)
        return merge(of_model, from_args)

    set_on_class(
        registry.AutoHfQuantizer,
        "merge_quantization_configs",
        classmethod(merge_with_ours),
        "a HybridConfig may be asked for with a checkpoint that is quantized in another way",
    )


class _Finder:
    """Steps aside for every import but one, whose loader it wraps."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _REGISTRY:
            return None
        from importlib.util import find_spec

        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            # All that Python asks of a loader; its base class is left where it is.
            spec.loader = _Registering(spec.loader)  # type: ignore[assignment]
        return spec


class _Registering:
    """Runs the wrapped loader, then registers with the module it made."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _register(module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)
