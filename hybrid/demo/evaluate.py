"""Measures how well a model predicts held-out text, and how evenly it uses its experts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

_WINDOWS_AT_ONCE = 4


@dataclass(frozen=True)
class Evaluation:
    """What :func:`evaluate` measured.

    Attributes
    ----------
    perplexity
        ``exp`` of the mean negative log-likelihood per predicted token.
    tokens
        Tokens predicted.
    expert_shares
        ``[L][E]``: the share of a layer's routed (token, expert) pairs that each expert got; a
        row sums to 1.
    """

    perplexity: float
    tokens: int
    expert_shares: tuple[tuple[float, ...], ...]

    @property
    def expert_share_range(self) -> tuple[float, float]:
        """The least and the greatest share of any expert in any layer."""
        shares = [share for layer in self.expert_shares for share in layer]
        return min(shares), max(shares)


def windows(
    tokenizer: Any, texts: Sequence[str], context: int, max_tokens: int | None = None
) -> torch.Tensor:
    """Token ids ``[N, context]``: the texts one after another, each closed by an end token.

    A tokenizer without an end token closes none. The last, incomplete window is dropped. With
    ``max_tokens`` the windows are spread evenly over the texts and hold at most that many tokens,
    but at least one window.

    Raises
    ------
    ValueError
        When the texts are shorter than one window.
    """
    ids: list[int] = []
    for text in texts:
        ids += tokenizer.encode(text, add_special_tokens=False, verbose=False)
        ids += [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    count = len(ids) // context
    if count == 0:
        raise ValueError(f"the texts have {len(ids)} tokens, fewer than one window of {context}")
    rows = torch.tensor(ids[: count * context]).view(count, context)
    if max_tokens is not None and max_tokens < rows.numel():
        kept = max(1, max_tokens // context)
        rows = rows[torch.arange(kept) * count // kept]
    return rows


def token_losses(predicted: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihoods ``[..., T - 1]`` of the tokens after the first.

    ``predicted`` are log-probabilities ``[..., T, V]`` of what follows each of ``ids``
    ``[..., T]``.
    """
    return -predicted[..., :-1, :].gather(-1, ids[..., 1:, None])[..., 0]


@torch.inference_mode()
def evaluate(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    context: int | None = None,
    max_tokens: int | None = None,
) -> Evaluation:
    """Measure a mixture-of-experts model's perplexity on texts, and the use of its experts.

    Parameters
    ----------
    model
        A causal language model with transformers' interface that reports its router's logits.
    tokenizer
        Its tokenizer.
    texts
        Documents.
    context
        Window length in tokens; the model's own context when None. Each window is predicted
        alone, so its first tokens are predicted from little.
    max_tokens
        Upper bound on the tokens evaluated, spread evenly over the texts; all when None.

    Raises
    ------
    ValueError
        When the texts are shorter than one window.
    """
    config = model.config
    rows = windows(tokenizer, texts, context or config.max_position_embeddings, max_tokens)
    was_training = model.training
    model.eval()
    loss = 0.0
    loads = torch.zeros(config.num_hidden_layers, config.num_experts)
    for first in range(0, len(rows), _WINDOWS_AT_ONCE):
        batch = rows[first : first + _WINDOWS_AT_ONCE]
        output = model(input_ids=batch, use_cache=False, output_router_logits=True)
        loss += token_losses(output.logits.float().log_softmax(-1), batch).sum().item()
        for load, router_logits in zip(loads, output.router_logits, strict=True):
            chosen = router_logits.topk(config.num_experts_per_tok).indices.flatten()
            load += torch.bincount(chosen, minlength=config.num_experts)
    model.train(was_training)
    tokens = len(rows) * (rows.shape[1] - 1)
    shares = loads / loads.sum(dim=1, keepdim=True)
    return Evaluation(math.exp(loss / tokens), tokens, tuple(map(tuple, shares.tolist())))
