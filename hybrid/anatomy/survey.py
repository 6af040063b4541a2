"""Finds what surrounds each layer's experts by one dummy forward, whatever a family calls it.

The experts' place is taken by a stand-in, so that no expert is read. Around each call of it the
modules that ran are compared by what they were given and what they returned: the one whose matrix
orders the experts as they were chosen is the router, the one that made the router's input is its
norm, and one that got what the experts get and returned as much is a shared expert. Nothing is
believed by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hybrid.anatomy.experts import ExpertsSpec
from hybrid.anatomy.norms import Scaling, probe, same_numbers
from hybrid.anatomy.routers import F32, Ids, Selection, find_selection
from hybrid.grafts import hook_after, hook_before, replaced_runners, runner_of

#: Tokens of the dummy forward: enough to tell ways of choosing experts apart.
TOKENS = 32
#: Share of the choices that a router's scores must explain; ties and rounding take the rest.
_AGREEMENT = 0.9
#: The stand-in's output is this part of its input: the size of a real output, and not the input,
#: which would be taken for the next module's.
_STAND_IN = 0.37

#: Called with a layer's index, its real experts and what they are called with.
Experts = Callable[[int, Callable[..., Tensor], Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class RouterView:
    """A router as one matrix on a scaled stream.

    Parameters
    ----------
    module
        The module that is given the router's input.
    weight
        ``[N, D]`` float32 on the CPU; N exceeds E where ids beyond the experts stand for no
        computation.
    bias
        ``[N]``, added to the logits.
    selection
        What else decides the order of the experts.
    scaling
        What made the router's input of the layer's stream.
    entry
        What made the experts' input of the same stream; None when that cannot be traced.
    """

    module: nn.Module
    weight: Tensor
    bias: F32 | None
    selection: Selection
    scaling: Scaling
    entry: Scaling | None


@dataclass(frozen=True, eq=False)
class SharedView:
    """A module that is given what the experts are given.

    Parameters
    ----------
    after
        Whether the family calls it after the routed experts.
    dims
        Dimensions of the tensor that it is given.
    """

    path: str
    module: nn.Module
    after: bool
    dims: int


@dataclass(eq=False)
class LayerView:
    """What was found around one layer's experts.

    Attributes
    ----------
    top_k
        Experts chosen for a token.
    why
        What is missing when ``router`` is None.
    """

    spec: ExpertsSpec
    top_k: int = 0
    router: RouterView | None = None
    shared: SharedView | None = None
    why: str = "its experts did not run in the dummy forward"


@dataclass(frozen=True, eq=False)
class _Call:
    """One call of a module: its first tensor, and whether that was all it was given."""

    path: str
    module: nn.Module
    given: Tensor
    result: Tensor | None
    alone: bool


@contextmanager
def replaced_experts(specs: Sequence[ExpertsSpec], experts: Experts) -> Iterator[None]:
    """Let ``experts`` run in place of every layer's, which it is given to call or not."""
    real = [runner_of(spec.module) for spec in specs]

    def stand_in(layer: int) -> Callable[..., Tensor]:
        return lambda hidden, ids, weights: experts(layer, real[layer], hidden, ids, weights)

    stand_ins = [stand_in(layer) for layer in range(len(specs))]
    with replaced_runners([spec.module for spec in specs], stand_ins):
        yield


@torch.no_grad()
def survey(model: Any, specs: Sequence[ExpertsSpec]) -> list[LayerView]:
    """Find what surrounds the experts of each layer of ``model``, by one dummy forward.

    Parameters
    ----------
    model
        A transformers model whose experts run from the store.
    specs
        Its layers with experts (:func:`hybrid.anatomy.experts.find_experts`).
    """
    views = [LayerView(spec) for spec in specs]
    calls: list[_Call] = []
    last: list[tuple[LayerView, Tensor]] = []

    def finish_last() -> None:
        """Look for the last layer's shared expert among the calls since."""
        for view, hidden in last:
            view.shared = view.shared or _find_shared(calls, hidden, view.spec, after=True)
        last.clear()

    def experts(layer: int, _: Any, hidden: Tensor, ids: Tensor, __: Tensor) -> Tensor:
        finish_last()
        if not views[layer].top_k:
            _describe(views[layer], model, calls, hidden, ids)
            last.append((views[layer], hidden))
        calls.clear()
        return hidden * _STAND_IN

    inside = tuple(f"{spec.path}." for spec in specs)
    hooks = [
        hook_after(module, _noting(path, calls), "its calls are noted", with_kwargs=True)
        for path, module in model.named_modules()
        if path and not f"{path}.".startswith(inside)
    ]
    vocabulary = model.config.get_text_config().vocab_size
    seeded = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (1, TOKENS), generator=seeded).to(model.device)
    try:
        with replaced_experts(specs, experts):
            model(input_ids=ids, use_cache=False)
        finish_last()
    finally:
        for hook in hooks:
            hook.undo()
    return views


def _noting(path: str, calls: list[_Call]) -> Callable[..., None]:
    def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        given = [value for value in (*args, *kwargs.values()) if value is not None]
        if given and isinstance(given[0], Tensor) and given[0].is_floating_point():
            result = output if isinstance(output, Tensor) else None
            calls.append(_Call(path, module, given[0], result, len(given) == 1))

    return note


def _describe(
    view: LayerView, model: nn.Module, calls: list[_Call], hidden: Tensor, ids: Tensor
) -> None:
    """Fill in what the calls before an experts' call show of its router and shared expert."""
    chosen = ids.reshape(TOKENS, -1).cpu().numpy()
    view.top_k = chosen.shape[1]
    view.shared = _find_shared(calls, hidden, view.spec, after=False)
    block = view.spec.path.rpartition(".")[0]
    near = [call for call in calls if call.path.startswith(f"{block}.")]
    found = _find_matrix(near, model.get_submodule(block), view.spec, chosen)
    if found is None:
        view.why = "its experts are not chosen by the scores of one matrix"
        return
    call, weight, bias, selection = found
    one_input = same_numbers(call.given, hidden)
    scaling, source = _trace(calls, call.given)
    if scaling is None:
        scaling, source = _trace_inside(near, call)
    if scaling is None and one_input:  # no norm, or one that is more than a scaling
        scaling = Scaling.direct(weight.shape[1])
    if scaling is None:
        view.why = "its router's input is neither the experts' own nor made by a norm"
        return
    entry: Scaling | None = scaling
    if not one_input:
        entry, entry_source = _trace(calls, hidden)
        if entry and (entry.kind != scaling.kind or not same_numbers(source, entry_source)):
            entry = None
    view.why = ""
    view.router = RouterView(call.module, weight, bias, selection, scaling, entry)


def _find_matrix(
    near: list[_Call], block: nn.Module, spec: ExpertsSpec, chosen: Ids
) -> tuple[_Call, Tensor, F32 | None, Selection] | None:
    """Find the matrix whose products with a call's input order the experts as ``chosen``.

    A matrix of the called module itself comes before one of its children, and one with a row
    for every choice before one of which only the experts' rows count.
    """
    best, found = 0.0, None
    owners = [block, *(call.module for call in near)]
    for deep, call in ((deep, call) for deep in (False, True) for call in near):
        z = call.given.detach().float().flatten(0, -2)
        for weight in _matrices(call.module, deep) if len(z) == TOKENS else ():
            if not spec.experts <= len(weight) <= 4 * spec.experts or weight[0].shape != z[0].shape:
                continue
            for rows in sorted({len(weight), spec.experts}, reverse=True):
                logits = (z @ weight[:rows].T.to(z.device)).cpu().numpy()
                vectors = list(_vectors(block, spec, rows))
                bias, selection, agreed = find_selection(logits, chosen, vectors, owners)
                if agreed > best:
                    best, found = agreed, (call, weight[:rows].cpu(), bias, selection)
                if best == 1.0:
                    return found
    return found if best >= _AGREEMENT else None


def _matrices(module: nn.Module, deep: bool) -> Iterator[Tensor]:
    """The matrices of a module, or of its children, as float32."""
    for owner in module.children() if deep else (module,):
        values = [*owner.parameters(recurse=False), getattr(owner, "weight", None)]
        for value in values:
            if isinstance(value, Tensor) and value.ndim == 2 and value.is_floating_point():
                yield value.detach().float()


def _vectors(block: nn.Module, spec: ExpertsSpec, rows: int) -> Iterator[F32]:
    """What a block holds beside its experts that may bias or correct the scores."""
    for owner in block.modules():
        if owner is spec.module:
            continue
        for value in (*owner.parameters(recurse=False), *owner.buffers(recurse=False)):
            if value.numel() == rows and value.is_floating_point():
                vector = value.detach().float().cpu().reshape(-1).numpy()
                if np.ptp(vector) > 0:
                    yield vector


def _trace(calls: list[_Call], z: Tensor) -> tuple[Scaling | None, Tensor | None]:
    """Find the norm that made ``z``, and what it was given."""
    for call in calls:
        if call.alone and same_numbers(call.result, z):
            scaling = probe(call.module, call.given)
            if scaling is not None and scaling.kind != "direct":
                return scaling, call.given
    return None, None


def _trace_inside(near: list[_Call], router: _Call) -> tuple[Scaling | None, Tensor | None]:
    """Find what a router does to its own input before its matrix: a norm and a scale."""
    seen: list[Tensor] = []
    for call in near:
        if not call.alone or not router.path.startswith(f"{call.path}."):
            continue

        def through(x: Tensor, outer: nn.Module = call.module) -> Tensor:
            outer(x)
            return seen.pop()

        hook = hook_before(router.module, lambda _, args: seen.append(args[0]), "its input is kept")
        try:
            scaling = probe(through, call.given)
        finally:
            hook.undo()
        if scaling is not None and scaling.kind != "direct":
            return scaling, call.given
    return None, None


def _find_shared(
    calls: list[_Call], hidden: Tensor, spec: ExpertsSpec, *, after: bool
) -> SharedView | None:
    """Find the outermost module that is given ``hidden`` alone and returns as much.

    It must give the same again, bit by bit, when it is asked with all tokens in one row.
    """
    alike = [
        call
        for call in calls
        if not f"{spec.path}.".startswith(f"{call.path}.") and same_numbers(call.given, hidden)
    ]
    paths = [call.path for call in alike]
    for call in alike:
        inner = any(call.path.startswith(f"{path}.") for path in paths)
        if inner or not call.alone or call.result is None or call.result.shape != call.given.shape:
            continue
        if not any(True for _ in call.module.parameters()):
            continue
        dims = call.given.ndim
        again = call.module(call.given.reshape((1,) * (dims - 2) + (-1, call.given.shape[-1])))
        if torch.equal(again.reshape(-1), call.result.reshape(-1)):
            return SharedView(call.path, call.module, after, dims)
    return None
