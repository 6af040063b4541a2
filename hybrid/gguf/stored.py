"""Says what the weights of a GGUF file are kept as: the formats, and the bytes that they take."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass

from hybrid.formats.registry import FORMATS, weight_bytes
from hybrid.gguf.config import layers_of
from hybrid.gguf.header import GgufHeader, GgufTensor
from hybrid.gguf.types import BlockType

#: Types of single values, which are tensors of torch, and the formats of their experts.
PLAIN = {"f32": "f32", "f16": "f32", "bf16": "bf16"}
#: What matrices are quantized anew to that have to be computed, and types without kernels.
LARGER, SMALLER = "q8_0", "q4_k"


def stored_as(kind: BlockType) -> str | None:
    """Return the format that a type's weights are kept in; None where they are plain tensors."""
    if kind.name in PLAIN:
        return None
    return kind.name if kind.name in FORMATS else SMALLER


@dataclass(frozen=True)
class Stored:
    """What a file's weights are kept as.

    Attributes
    ----------
    experts
        The formats of most layers' experts, as one word (``Block.format_name``); None without.
    dense
        The format of most other weights.
    dense_bytes
        Of all of those.
    """

    experts: str | None
    dense: str
    dense_bytes: int


def stored(header: GgufHeader) -> Stored:
    """Return what a file's weights are kept as, of its header alone."""
    dense: Counter[str] = Counter()
    experts: Counter[str] = Counter()
    for tensor in header.tensors.values():
        if in_model(header, tensor) and not is_experts(tensor):
            dense[stored_as(tensor.type) or PLAIN[tensor.type.name]] += math.prod(tensor.shape)
    for layer in range(layers_of(header)):
        found = experts_of(header, layer)
        if found is not None:
            experts["+".join(dict.fromkeys(found))] += 1
    return Stored(
        experts=experts.most_common(1)[0][0] if experts else None,
        dense=dense.most_common(1)[0][0] if dense else "f32",
        dense_bytes=sum(weight_bytes(count, fmt) for fmt, count in dense.items()),
    )


def experts_of(header: GgufHeader, layer: int) -> tuple[str, str] | None:
    """Return the formats of a layer's experts, of gate and up and of down; None without experts.

    Gate and up share one.
    """
    names = (f"blk.{layer}.ffn_{part}_exps.weight" for part in ("gate", "up", "down"))
    gate, up, down = (header.tensors.get(name) for name in names)
    if up is None or down is None:
        return None
    above = (_as_experts(up), _as_experts(gate or up))
    return above[0] if above[0] == above[1] else LARGER, _as_experts(down)


def _as_experts(tensor: GgufTensor) -> str:
    return stored_as(tensor.type) or PLAIN[tensor.type.name]


def is_experts(tensor: GgufTensor) -> bool:
    """Whether a tensor is a matrix of all experts of a layer."""
    return tensor.name.endswith("_exps.weight")


def in_model(header: GgufHeader, tensor: GgufTensor) -> bool:
    """Whether a tensor is of a layer that writes text, or of none: not of those that foretell."""
    found = re.match(r"blk\.(\d+)\.", tensor.name)
    return found is None or int(found[1]) < layers_of(header)
