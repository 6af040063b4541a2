"""Lists the matrices outside a model's experts that may be quantized."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from hybrid.anatomy.experts import ExpertsSpec
from hybrid.anatomy.names import is_router
from hybrid.formats.strips import GROUP


def dense_matrices(model: Any, specs: Iterable[ExpertsSpec]) -> dict[str, tuple[int, int]]:
    """List the modules that ``--dense`` quantizes: path to ``[rows, cols]``.

    Linear layers and the embeddings of the text model. Routers keep their precision, as in
    llama.cpp, and so do matrices smaller than a group and matrices that are tied to one that
    cannot be quantized.
    """
    kept = tuple(prefix for spec in specs for prefix in _router_prefixes(model, spec))
    embeddings = [model.get_input_embeddings(), model.get_output_embeddings()]
    text = {id(module) for module in (*embeddings, *model.get_decoder().modules())}
    found = {
        path: (module.weight.shape[0], module.weight.shape[1])
        for path, module in model.named_modules()
        if (type(module) is nn.Linear or (is_lookup(module) and module in embeddings))
        and id(module) in text
        and min(module.weight.shape) >= GROUP
        and not f"{path}.".startswith(kept)
    }
    for names in model.all_tied_weights_keys.items():
        paths = [name.removesuffix(".weight") for name in names]
        if not all(path in found for path in paths):
            for path in paths:
                found.pop(path, None)
    return found


def is_lookup(module: nn.Module) -> bool:
    """Whether a module looks rows up, and at most scales all of them by the same number."""
    return type(module) is nn.Embedding or (
        isinstance(module, nn.Embedding) and hasattr(module, "scalar_embed_scale")
    )


def _router_prefixes(model: nn.Module, spec: ExpertsSpec) -> list[str]:
    """Paths of the experts themselves and of the routers beside them."""
    block = spec.path.rpartition(".")[0]
    routers = [
        name for name, child in model.get_submodule(block).named_children() if is_router(name)
    ]
    return [f"{spec.path}.", *(f"{block}.{name}." for name in routers)]
