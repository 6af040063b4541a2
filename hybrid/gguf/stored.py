"""Says what the weights of a GGUF file are kept as: the formats, and the bytes that they take."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass

from hybrid.formats.registry import weight_bytes
from hybrid.gguf.config import layers_of
from hybrid.gguf.header import GgufHeader, GgufTensor
from hybrid.gguf.types import BlockType

#: Types of single values, which are tensors of torch, and the formats of their experts.
PLAIN = {"f32": "f32", "f16": "f32", "bf16": "bf16"}
#: Formats that kernels compute with.
RUNNING = ("q4_0", "q8_0", "bf16", "f32")
#: Other types of so many bits or more are quantized anew to the larger of these.
_FEW_BITS = 4.5
LARGER, SMALLER = "q8_0", "q4_0"


def stored_as(kind: BlockType) -> str | None:
    """Return the format that a type's weights are kept in; None where they are plain tensors."""
    if kind.name in PLAIN:
        return None
    if kind.name in RUNNING:
        return kind.name
    return LARGER if kind.bits >= _FEW_BITS else SMALLER


@dataclass(frozen=True)
class Stored:
    """What a file's weights are kept as.

    Attributes
    ----------
    experts
        The format that keeps most experts as they are; None where there are none.
    dense
        The format of most other weights.
    expert_bytes
        Of all experts.
    dense_bytes
        Of everything else.
    """

    experts: str | None
    dense: str
    expert_bytes: int
    dense_bytes: int


def stored(header: GgufHeader) -> Stored:
    """Return what a file's weights are kept as, of its header alone."""
    experts: Counter[str] = Counter()
    dense: Counter[str] = Counter()
    for tensor in header.tensors.values():
        fmt = stored_as(tensor.type) or PLAIN[tensor.type.name]
        counted = experts if is_experts(tensor) else dense
        if in_model(header, tensor):
            counted[fmt] += math.prod(tensor.shape)
    kept = experts.most_common(1)[0][0] if experts else None
    return Stored(
        experts=kept,
        dense=dense.most_common(1)[0][0] if dense else "f32",
        expert_bytes=weight_bytes(experts.total(), kept) if kept else 0,
        dense_bytes=sum(weight_bytes(count, fmt) for fmt, count in dense.items()),
    )


def is_experts(tensor: GgufTensor) -> bool:
    """Whether a tensor is a matrix of all experts of a layer."""
    return tensor.name.endswith("_exps.weight")


def in_model(header: GgufHeader, tensor: GgufTensor) -> bool:
    """Whether a tensor is of a layer that writes text, or of none: not of those that foretell."""
    found = re.match(r"blk\.(\d+)\.", tensor.name)
    return found is None or int(found[1]) < layers_of(header)
