"""Reads a family's router: finds the parameters with which the kernels choose as its code does."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear

from cpu_experts.decoder import ops as kernels
from cpu_experts.decoder import records
from cpu_experts.decoder.layers import Router
from cpu_experts.kernels.records import fill_record
from hybrid.anatomy.routers import group_limits
from hybrid.anatomy.samples import UnfitError, floats, sample
from hybrid.anatomy.widened import widened
from hybrid.fast.packed_rows import packed_rows
from hybrid.packed.dense import Arena

#: Tokens whose experts tell ways of choosing apart; few do not where there are groups of experts.
_FEW, _ROUTED = 24, 200
#: How far weights may be apart, relative to a token's largest.
_NEAR = 1e-4


def read_router(module: Any, shared_gate: Tensor | None, arena: Arena) -> Router:
    """Return a router: the parameters that choose as the family's own code does."""
    weight = module.weight.detach()
    bias = getattr(module, "bias", None)
    rows = weight if shared_gate is None else torch.cat((weight, shared_gate.detach().to(weight)))
    if shared_gate is not None and bias is not None:
        bias = torch.cat((bias, torch.zeros(1).to(bias)))
    matrix = packed_rows(rows, bias, arena)
    x = sample(_ROUTED, weight.shape[1])
    outputs = widened(module)(x)
    if not isinstance(outputs, tuple) or len(outputs) != 3:
        raise UnfitError(f"{type(module).__name__} returns something else than three tensors")
    _, weights, ids = outputs
    own = getattr(module, "bias", None)
    logits = linear(x, weight.float(), None if own is None else own.float())
    expected = _as_rows(ids, weights, weight.shape[0])
    base = Router(
        matrix=matrix,
        experts=weight.shape[0],
        top_k=ids.shape[-1],
        gated_shared=shared_gate is not None,
    )
    for candidate in _router_candidates(module, base):
        some, more = slice(_FEW), slice(_FEW, None if candidate.groups > 1 else _FEW)
        if all(_agrees(candidate, logits[part], expected[part]) for part in (some, more)):
            return candidate
    raise UnfitError(f"{type(module).__name__} chooses in another way")


def _agrees(candidate: Router, logits: Tensor, expected: Tensor) -> bool:
    """Whether a router chooses and weighs for every token as the family's code does."""
    if not len(logits):
        return True
    distances = (_choices(candidate, logits) - expected).abs().amax(dim=1)
    return bool((distances <= _NEAR * expected.abs().amax(dim=1)).all())


def _as_rows(ids: Tensor, weights: Tensor, experts: int) -> Tensor:
    return torch.zeros(ids.shape[0], experts).scatter_(1, ids, weights.float())


def _choices(router: Router, logits: Tensor) -> Tensor:
    record = np.zeros(1, records.ROUTER)
    fill_record(record[0], router.record(threads=1))
    rows = []
    for row in logits.detach().float().numpy():
        ids = np.zeros(max(router.top_k, router.groups), np.int64)
        weights = np.zeros(ids.size, np.float32)
        scratch = np.zeros((2, router.experts), np.float32)
        kernels.route(record[0], np.ascontiguousarray(row), ids, weights, scratch[0], scratch[1])
        k = router.top_k
        rows.append(
            _as_rows(torch.from_numpy(ids[None, :k]), torch.from_numpy(weights[None, :k]), len(row))
        )
    return torch.cat(rows)


def _router_candidates(module: Any, base: Router) -> Iterator[Router]:
    statics = getattr(module, "moe_statics", module)
    correction = floats(getattr(statics, "e_score_correction_bias", None))
    scales = {1.0, float(getattr(module, "routed_scaling_factor", None) or 1.0)}
    groups, top_groups = group_limits([module])
    floor = float(getattr(module, "norm_min", 1e-20))
    scorings = (records.SOFTMAX, records.SOFTMAX_OF_CHOSEN, records.SIGMOID)
    of_groups = (2, 1) if groups > 1 else (2,)
    for scoring, normalize, scale, of_group in product(
        scorings, (True, False), sorted(scales), of_groups
    ):
        yield replace(
            base,
            scoring=scoring,
            normalize=normalize,
            scale=scale,
            floor=floor,
            correction=correction,
            groups=groups,
            top_groups=top_groups,
            of_group=of_group,
        )
    jitter = getattr(module, "router_jitter_noise", None)
    if jitter is not None and base.top_k == 2:
        yield replace(base, scoring=records.SPARSEMIXER, jitter=float(jitter))
