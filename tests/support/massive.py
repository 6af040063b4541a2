"""Massive activations: a few hidden values in the thousands, as trained models have them.

Random weights never show them (arXiv 2402.17762), and all that takes hidden states for numbers of
size one fails on the first real checkpoint.
"""

from __future__ import annotations

from typing import Any

import torch

from hybrid.anatomy.experts import find_experts

#: What is massive, and how large: two neighbours, of which one is far from the other.
CHANNEL, SIZE = 3, 3000.0


@torch.no_grad()
def make_massive(model: Any) -> None:
    """Make a channel of the stream massive, in the embedding and in what a layer adds to it.

    Parameters
    ----------
    model
        A model of transformers whose experts are its own.
    """
    embedding = model.get_input_embeddings().weight[:, CHANNEL]
    embedding *= SIZE / embedding.square().mean().sqrt()
    spec = find_experts(model)[0]
    down = spec.module.get_parameter(spec.down)
    rows = down[..., CHANNEL] if spec.transposed_down else down[..., CHANNEL, :]
    rows *= SIZE
