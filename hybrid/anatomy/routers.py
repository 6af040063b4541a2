"""Describes routers: from the logits to the order in which experts are taken.

The lookahead needs no more of it than most of the order; the fast path's own reader
(:mod:`hybrid.fast.router_parts`) tells weights, too, equal to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
Ids = NDArray[np.integer[Any]]

#: What families call how many groups of experts there are, and how many of them a token may use.
_GROUPS = ("n_group", "num_group", "num_expert_group", "n_groups")
_TOP_GROUPS = ("topk_group", "topk_groups", "limited_groups")
_SCORINGS = ("logits", "sigmoid", "softmax", "sqrtsoftplus")


@dataclass(frozen=True, eq=False)
class Selection:
    """What lies between a router's logits and its choice, as far as it changes the order.

    Parameters
    ----------
    scoring
        The function applied before ``correction`` is added.
    correction
        ``[..., N]``, added for the choice only (``e_score_correction_bias``); None leaves the
        order to the logits.
    groups, top_groups
        The experts lie in ``groups`` equal groups, of which a token uses ``top_groups``.
    group_best
        How many of a group's best scores are summed to rank it.
    """

    scoring: str = "logits"
    correction: F32 | None = None
    groups: int = 1
    top_groups: int = 1
    group_best: int = 1

    @property
    def plain(self) -> bool:
        """Whether the logits alone give the order."""
        return self.correction is None and self.groups == 1

    @property
    def kind(self) -> tuple[object, ...]:
        """What two selections have in common that differ in the values of their corrections."""
        limits = (self.groups, self.top_groups, self.group_best)
        return (self.scoring, self.correction is not None, *limits)

    def scores(self, logits: F32) -> F32:
        """Return what the top k is taken of, ``[..., N]``, higher first."""
        if self.plain:
            return logits
        scores = _score(self.scoring, logits)
        if self.correction is not None:
            scores = scores + self.correction
        return scores if self.groups == 1 else self._limited(scores)

    def _limited(self, scores: F32) -> F32:
        """Put the experts of all but the best groups behind every other."""
        grouped = scores.reshape(*scores.shape[:-1], self.groups, -1)
        best = np.partition(grouped, -self.group_best)[..., -self.group_best :].sum(-1)
        worst = np.argpartition(-best, self.top_groups - 1)[..., self.top_groups :]
        # Below every score, whatever their size, and still in order among themselves.
        shift, span = np.zeros_like(best), np.ptp(scores, axis=-1, keepdims=True) * 2 + 1
        np.put_along_axis(shift, worst, span, axis=-1)
        limited: F32 = (grouped - shift[..., None]).reshape(scores.shape)
        return limited


def _score(scoring: str, logits: F32) -> F32:
    if scoring == "sigmoid":
        small: F32 = np.exp(-np.abs(logits))  # an exponent that cannot overflow
        above: F32 = np.float32(1) / (np.float32(1) + small)
        return above * np.where(logits < 0, small, np.float32(1))
    if scoring == "softmax":
        raised = np.exp(logits - logits.max(-1, keepdims=True))
        normalised: F32 = raised / raised.sum(-1, keepdims=True)
        return normalised
    if scoring == "sqrtsoftplus":
        return np.sqrt(np.logaddexp(np.float32(0), logits))
    return logits


def ranking(scores: F32) -> Ids:
    """Return experts from the highest score to the lowest, ``[..., N]``."""
    return np.argsort(-scores, axis=-1)


def agreement(scores: F32, chosen: Ids) -> float:
    """Return the share of ``chosen``, ``[T, A]``, among the A highest of ``scores``, ``[T, N]``."""
    top = ranking(scores)[:, : chosen.shape[1]]
    return float((chosen[:, :, None] == top[:, None, :]).any(-1).mean())


def find_selection(
    logits: F32, chosen: Ids, vectors: Sequence[F32], owners: Sequence[Any]
) -> tuple[F32 | None, Selection, float]:
    """Find what turns ``logits``, ``[T, N]``, into the order that explains ``chosen``.

    Parameters
    ----------
    vectors
        ``[N]`` each: whatever might be a bias of the logits or a correction of the scores.
    owners
        Modules whose attributes may name groups.

    Returns
    -------
    The bias of the logits if there is one, the selection, and its :func:`agreement`; the simplest
    of those that explain most.
    """
    best: tuple[F32 | None, Selection, float] = (None, Selection(), agreement(logits, chosen))
    for bias, selection in _candidates(logits.shape[-1], vectors, owners):
        if best[2] == 1.0:
            break
        biased = logits if bias is None else logits + bias
        agreed = agreement(selection.scores(biased), chosen)
        if agreed > best[2]:
            best = bias, selection, agreed
    return best


def _candidates(
    experts: int, vectors: Sequence[F32], owners: Sequence[Any]
) -> Iterator[tuple[F32 | None, Selection]]:
    groups, top_groups = group_limits(owners)
    limits: list[tuple[int, int, int]] = [(1, 1, 1)]
    if 1 <= top_groups < groups and experts % groups == 0:
        limits += [(groups, top_groups, best) for best in (1, 2) if best * groups <= experts]
    for bias in vectors:
        yield bias, Selection()
    for limit, correction, scoring in product(limits, (None, *vectors), _SCORINGS):
        yield None, Selection(scoring, correction, *limit)


def group_limits(owners: Sequence[Any]) -> tuple[int, int]:
    """Return how many groups of experts modules name, and how many of them a token may use."""
    return _attribute(owners, _GROUPS), _attribute(owners, _TOP_GROUPS)


def _attribute(owners: Sequence[Any], names: Sequence[str]) -> int:
    """Return the first whole number above zero that an owner has under one of ``names``, or 1."""
    values = (vars(owner).get(name) for owner in owners for name in names)
    return next((value for value in values if type(value) is int and value > 0), 1)
