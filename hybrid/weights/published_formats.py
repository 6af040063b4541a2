"""The formats that a checkpoint's own quantization asks for, of every layer and matrix."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

import torch

from hybrid.anatomy.experts import ExpertsSpec
from hybrid.ask.published import LARGER
from hybrid.formats.registry import bits_per_weight
from hybrid.weights.weight_map import WeightMap

_PLAIN = {torch.bfloat16: "bf16"}


def expert_formats(weights: WeightMap) -> tuple[tuple[str, str], ...]:
    """Return what the experts of each layer are kept in, gate's and down's; empty for the default.

    Layers of which some matrices are quantized in one way and some in another take the larger
    format; where none is quantized into codes, there is nothing to keep.
    """
    kinds = [
        (_formats(weights, spec, spec.up), _formats(weights, spec, (spec.down,)))
        for spec in weights.specs
    ]
    if not any(fmt for kind in kinds for formats in kind for fmt in formats.values()):
        return ()
    return tuple((_largest(weights, up), _largest(weights, down)) for up, down in kinds)


def _formats(weights: WeightMap, spec: ExpertsSpec, names: Iterable[str]) -> dict[str, str | None]:
    keys = [key for name in names for key in weights.sources_of(f"{spec.path}.{name}")]
    return {key: weights.reader.format(key) for key in keys}


def _largest(weights: WeightMap, formats: Mapping[str, str | None]) -> str:
    """Return the largest of formats, those of plain tensors among them."""
    found = set()
    for key, fmt in formats.items():
        info = weights.reader.tensors[key]
        plain = LARGER if key in weights.reader.matrices else _PLAIN.get(info.dtype, "f32")
        found.add(fmt or plain)
    return max(found, key=bits_per_weight)


def dense_formats(weights: WeightMap, matrices: Iterable[str]) -> dict[str, str]:
    """Return the format of each of a model's matrices that is quantized into codes."""
    found = {}
    for path in matrices:
        keys = weights.sources_of(f"{path}.weight")
        formats = {weights.reader.format(key) for key in keys}
        known = [fmt for fmt in formats if fmt is not None]
        if known and len(known) == len(formats):
            found[path] = max(known, key=bits_per_weight)
    return found


def kept(layers: Iterable[tuple[str, str]], dense: Mapping[str, str]) -> Iterator[str]:
    """Say in one line which formats quantized weights are kept in."""
    parts = []
    experts = Counter("+".join(dict.fromkeys(layer)) for layer in layers)
    if experts:
        listed = ", ".join(f"{fmt} ({n} layers)" for fmt, n in experts.most_common())
        parts.append(f"experts in {listed}")
    others = Counter(dense.values())
    if others:
        listed = ", ".join(f"{fmt} ({n} matrices)" for fmt, n in others.most_common())
        parts.append(f"other weights in {listed}")
    if parts:
        yield f"kept as published: {'; '.join(parts)}"
