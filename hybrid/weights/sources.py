"""What differs between the kinds of checkpoints that are converted: their weights, and formats."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from hybrid.anatomy.experts import ExpertsSpec
from hybrid.ask.formats import DEFAULT_EXPERTS
from hybrid.ask.published import convention
from hybrid.errors import UnsupportedModelError, UsageError
from hybrid.gguf.tensors import WeightFile
from hybrid.weights import published_formats
from hybrid.weights.checks import Checkpoint
from hybrid.weights.declared_formats import settings_of
from hybrid.weights.gguf_checkpoint import GgufCheckpoint
from hybrid.weights.gguf_weights import (
    GgufWeights,
    dense_formats,
    most_common,
    requantized,
)
from hybrid.weights.published_reader import PublishedReader
from hybrid.weights.source_formats import source_quantizer
from hybrid.weights.tensor_files import TensorReader
from hybrid.weights.weight_map import WeightMap, Weights


@contextmanager
def opened_weights(
    checkpoint: Checkpoint, config: Any, model: Any, specs: list[ExpertsSpec]
) -> Iterator[Weights]:
    """Open a checkpoint's weights as those of ``model``, which is on the meta device."""
    if isinstance(checkpoint, GgufCheckpoint):
        file = WeightFile(checkpoint.header, checkpoint.architecture, checkpoint.config)
        try:
            yield GgufWeights(file, model, specs)
        finally:
            file.close()
        return
    with TensorReader(checkpoint.tensors, checkpoint.place) as reader:
        quantizer = source_quantizer(config)
        said = convention(settings_of(checkpoint.path, checkpoint.config))
        dtype = getattr(config.get_text_config(decoder=True), "dtype", None) or torch.bfloat16
        published = PublishedReader(reader, said, dtype, coded=quantizer is None)
        yield WeightMap(model, published, specs, quantizer)


@dataclass(frozen=True)
class Formats:
    """What a checkpoint's weights are converted to.

    Attributes
    ----------
    experts
        Format of all experts that have none of their own.
    layers
        Formats of the experts of the layers, gate's and down's; empty where all have the one.
    dense
        Formats of the other matrices that do not stay as they are, by their modules' paths.
    notes
        What is odd about that.
    """

    experts: str
    layers: tuple[tuple[str, str], ...] = ()
    dense: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def chosen_formats(
    checkpoint: Checkpoint,
    weights: Weights,
    matrices: Mapping[str, tuple[int, int]],
    experts: str | None,
    dense: str | None,
) -> Formats:
    """Return the formats that are asked for, and where none is, those that the checkpoint has.

    Where the tally of ``weights`` is to be exact, nothing may become anything else.

    Parameters
    ----------
    matrices
        The modules outside the experts that may have a format.

    Raises
    ------
    UsageError, UnsupportedModelError
        When weights are to be exactly what they were, and cannot be.
    """
    exact = weights.tally.exact
    if exact and (experts or dense):
        raise UsageError(
            f"--exact keeps what was published, {experts or dense} was asked for",
            hint="leave out one of them",
        )
    asked = {} if dense is None else dict.fromkeys(matrices, dense)
    if isinstance(weights, WeightMap):
        own = asked or published_formats.dense_formats(weights, matrices)
        layers = () if experts else published_formats.expert_formats(weights)
        weights.tally.watched |= {fmt for layer in layers for fmt in layer}
        weights.tally.watched |= set() if asked else set(own.values())
        notes = published_formats.kept(layers, {} if asked else own)
        if exact and weights.specs and not layers:
            raise UsageError(
                f"--exact keeps what was published, and experts that nobody quantized become "
                f"{DEFAULT_EXPERTS}",
                hint="leave out --exact, and choose a format with --experts, such as bf16",
            )
        format_ = experts or (most_common(layers) if layers else DEFAULT_EXPERTS)
        return Formats(format_, layers, own, tuple(notes))
    assert isinstance(weights, GgufWeights)
    own = asked or dense_formats(weights, matrices)
    layers = () if experts else weights.expert_formats
    kept = experts or (most_common(layers) if layers else DEFAULT_EXPERTS)
    changed = requantized(weights, layers, {} if asked else own)
    if not changed:
        return Formats(kept, layers, own)
    weights.tally.watched |= {new for _, new in changed}
    listed = ", ".join(f"{old} to {new}" for old, new in changed)
    if weights.tally.exact:
        raise UnsupportedModelError(
            f"{checkpoint.path} has weights that no kernels take as they are, and --exact keeps "
            f"them so: {listed}",
            hint="leave out --exact: the error is said when it is done",
        )
    note = f"quantized anew, for no kernels take what the file has: {listed}"
    return Formats(kept, layers, own, (note,))
