"""Compares the sizes that a config.json states with each other and with what the files hold.

Without this, a number that is too large has transformers build a model without end, and one that
cannot be ends somewhere within it. Loads neither torch nor transformers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hybrid.ask.asked_model import spec_of
from hybrid.ask.config_classes import as_read, config_class
from hybrid.errors import CheckpointError, UnsupportedModelError
from hybrid.weights.source_files import TensorInfo, few
from planner.describe.families import stated_sizes
from planner.errors import PlannerError

_LAYER = re.compile(r"\.(\d+)\.")
_EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings)\.weight")
_EXPERT = re.compile(r"\.experts\.(\d+)\.")
_EXPERTS = re.compile(r"\.experts\.\w+")
_BY_LAYER = ("experts", "top_k")
"""Sizes of which a file may have a list."""
_EXACT = ("vocabulary", "hidden")
"""Sizes that an embedding has, no more and no less; of all others files may hold more."""
_OF_EXPERTS = {
    "numbers of experts": "count",
    "expert sizes": "intermediate",
    "numbers of chosen experts": "top_k",
}
_LISTED = {("hunyuan_v1_moe", "top_k")}
"""What transformers builds layer by layer from a list."""
_OF_ANOTHER = "config.json and the weights are not of one model: download both again"
_COMPARE = "compare with the publisher's own, complete config.json"


def check_stated_sizes(
    file: Path, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]
) -> None:
    """Refuse sizes that cannot be, contradict each other, or are beyond what the files hold.

    Parameters
    ----------
    file, config
        A config.json and what it holds.
    tensors
        What the weight files hold, by key.

    Raises
    ------
    CheckpointError
        Naming the field, with both numbers.
    """
    stated = stated_sizes(as_read(config))
    for size, (name, value) in stated.items():
        for number in _numbers(value) if size in _BY_LAYER else [value]:
            least = 0 if size in ("experts", "identity") else 1
            if isinstance(number, bool) or not isinstance(number, int) or number < least:
                raise CheckpointError(
                    f"{file}: {name} is {value!r}, not a whole number of at least {least}",
                    hint=_COMPARE,
                )
    for size, held in _held(tensors).items():
        name, value = stated.get(size, ("", min(held)))
        most = max(_numbers(value))
        if most > max(held) or (size in _EXACT and most not in held):
            raise CheckpointError(
                f"{file}: {name} is {most}, the weight files hold {max(held)}", hint=_OF_ANOTHER
            )
    _check_top_k(file, stated)


def _check_top_k(file: Path, stated: Mapping[str, tuple[str, Any]]) -> None:
    if not {"top_k", "experts"} <= stated.keys():
        return
    (name, top_k), (others, experts) = stated["top_k"], stated["experts"]
    identity = max(_numbers(stated.get("identity", ("", 0))[1]))
    most = min(_numbers(experts)) + identity
    if most > 1 and max(_numbers(top_k)) > most:
        raise CheckpointError(
            f"{file}: {name} is {max(_numbers(top_k))}, more than the {most} experts of {others}",
            hint=_COMPARE,
        )


def check_layers_alike(directory: Path, config: Mapping[str, Any]) -> None:
    """Refuse layers of different experts where transformers has no class that builds them.

    Its classes take one size for all layers, but for the number of chosen experts of one family.
    What it does not know may be registered with it, and is not looked at.

    Raises
    ------
    UnsupportedModelError
        Naming what differs.
    """
    with suppress(PlannerError):  # what the planner does not read may run
        found = spec_of(config)
        if config_class(found.family) is None:
            return
        for what, name in _OF_EXPERTS.items():
            sizes = list(dict.fromkeys(getattr(kind, name) for kind in found.kinds_of_experts))
            listed = (found.family, name) in _LISTED and "per_layer_config" not in config
            if len(sizes) > 1 and not listed:
                raise UnsupportedModelError(
                    f"{directory}: its layers have {what} of {few(map(str, sizes))}, and "
                    f"transformers {version('transformers')} builds all layers of {found.family} "
                    "alike",
                    hint="a newer transformers may build it; 'hybrid plan' tells how it would run",
                )


def _numbers(value: Any) -> list[Any]:
    return value if isinstance(value, list) and value else [value]


def _held(tensors: Mapping[str, TensorInfo]) -> dict[str, set[int]]:
    """Return the sizes that tensors show, those of towers among them."""
    found: dict[str, set[int]] = {}
    for size, number in _shown(tensors):
        found.setdefault(size, set()).add(number)
    return found


def _shown(tensors: Mapping[str, TensorInfo]) -> Iterator[tuple[str, int]]:
    for key, info in tensors.items():
        if layer := _LAYER.search(key):
            yield "layers", int(layer[1]) + 1
        if _EMBEDDING.search(key) and len(info.shape) == 2:
            yield "vocabulary", info.shape[0]
            yield "hidden", info.shape[1]
        if expert := _EXPERT.search(key):
            yield "experts", int(expert[1]) + 1
        elif _EXPERTS.search(key) and len(info.shape) == 3:
            yield "experts", info.shape[0]
