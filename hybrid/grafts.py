"""Alters transformers' objects: every change is made here, has an undo and a line that says what.

transformers makes a model, and users copy, pickle and move it; so what we add to it stays on its
own objects, and each object keeps the list of what was changed about it. Nobody else names the
attributes that are added: who has the whole model reads them through :class:`hybrid.model.Model`.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

#: Attribute of a changed object: its changes, oldest first.
_CHANGES = "_hybrid_changes"
#: Attribute of a packed module: the ordinary one that it stands for, its weights emptied.
_REPLACED = "_hybrid_replaced"
#: And, where embedding and lm_head were tied, the model's own note of it.
_TIED = "_hybrid_tied"


class Graft(NamedTuple):
    """One change of a transformers object.

    Attributes
    ----------
    what
        A line that says what it is.
    undo
        Takes it back. Of several changes of one thing the last is to be undone first.
    """

    what: str
    undo: Callable[[], None]


class _Change(NamedTuple):
    """A change as the changed object keeps it, which it must not refer to itself."""

    what: str
    undo: Callable[[Any], None]


def grafts_of(network: nn.Module) -> list[Graft]:
    """Return what is changed about a network and its modules, in the order to undo it."""
    found = [*_replacements(network)]
    for module in reversed(list(network.modules())):
        changes: list[_Change] = vars(module).get(_CHANGES, [])
        found += [Graft(at.what, functools.partial(_undo, module, at)) for at in changes[::-1]]
        if _asks_first(type(module)):
            what = "its class asks for the fast path before transformers' forward"
            found.append(Graft(what, functools.partial(_give_class_back, module)))
    return found


def describe(network: nn.Module) -> str:
    """Say what is changed about a network: a line for each kind of change, how often it is made."""
    counts = Counter(graft.what for graft in grafts_of(network))
    return "\n".join(what if n == 1 else f"{what} ({n} times)" for what, n in counts.items())


def _note(owner: Any, what: str, undo: Callable[[Any], None]) -> Graft:
    change = _Change(what, undo)
    vars(owner).setdefault(_CHANGES, []).append(change)
    return Graft(what, functools.partial(_undo, owner, change))


def _undo(owner: Any, change: _Change) -> None:
    change.undo(owner)
    left = [kept for kept in vars(owner).get(_CHANGES, ()) if kept is not change]
    vars(owner)[_CHANGES] = left
    if not left:
        del vars(owner)[_CHANGES]


def _set(owner: Any, name: str, value: Any, what: str) -> Graft:
    """Set an attribute of an object."""
    before = vars(owner).get(name)
    setattr(owner, name, value)
    return _note(owner, what, functools.partial(_set_back, name=name, before=before))


def _set_back(owner: Any, *, name: str, before: Any) -> None:
    if before is None:
        del vars(owner)[name]
    else:
        setattr(owner, name, before)


# What a network of ours carries.


def set_store(network: Any, store: Any) -> Graft:
    """Give a network the store that its experts run from."""
    return _set(network, "hybrid_store", store, "the store of its experts is with it")


def store_of(network: Any) -> Any:
    """Return the store that a network's experts run from; None where it has none."""
    return getattr(network, "hybrid_store", None)


def set_fast_path(network: Any, path: Any) -> Graft:
    """Give a network what computes the calls that take the fast path, or another one."""
    return _set(network, "hybrid_fast", path, "its fast path is with it")


def fast_path_of(network: Any) -> Any:
    """Return a network's fast path; None where it has none."""
    return getattr(network, "hybrid_fast", None)


def ask_fast_path_first(network: Any) -> None:
    """Let a network's ``forward`` ask its fast path first, under ``generate()`` and pipelines.

    The network becomes an instance of a subclass of its own class, of the same name.
    """
    kind: Any = type(network)
    network.__class__ = _asking_first(kind)


def forward_without_fast_path(network: Any) -> Callable[..., Any]:
    """Return a network's ``forward`` as it was before it asked its fast path first."""
    kind = type(network)
    bare: Any = kind.__bases__[0] if _asks_first(kind) else kind
    return functools.partial(bare.forward, network)


@functools.cache
def _asking_first(kind: Any) -> Any:
    """Return the subclass of a model's class that asks for the fast path."""

    class Model(kind):  # type: ignore[misc]
        _hybrid_asks_first = True

        @functools.wraps(kind.forward)
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.hybrid_fast(self, super().forward, args, kwargs)

        def _apply(self, *args: Any, **kwargs: Any) -> Any:  # to(), half(), cuda() ...
            self.hybrid_fast.release(self)
            with _kept_corrections(self):
                return super()._apply(*args, **kwargs)

        def __reduce_ex__(self, protocol: Any) -> Any:
            _, _, *rest = super().__reduce_ex__(protocol)
            return (_bare, (kind,), *rest)

    Model.__name__, Model.__qualname__ = kind.__name__, kind.__qualname__
    Model.__module__, Model.__doc__ = kind.__module__, kind.__doc__
    return Model


CORRECTIONS = ("e_score_correction_bias", "expert_bias")
"""What routers add to their scores before they choose experts.

Experts differ by less than 16 bits tell, so these are float32 whatever the rest is cast to.
"""


@contextmanager
def _kept_corrections(network: nn.Module) -> Iterator[None]:
    """Let what casts a network leave the routers' corrections in float32."""
    before = [
        (module, name, found)
        for module in network.modules()
        for name in CORRECTIONS
        if isinstance(found := getattr(module, name, None), Tensor) and found.dtype == torch.float32
    ]
    values = [found.detach() for _, _, found in before]
    yield
    for (module, name, _), value in zip(before, values, strict=True):
        now = getattr(module, name)
        if now.dtype in (torch.bfloat16, torch.float16) and not now.is_meta:
            now.data = value.to(now.device)


def _bare(kind: Any) -> Any:
    """Return a model without content, for who unpickles one."""
    grafted = _asking_first(kind)
    return grafted.__new__(grafted)


def _asks_first(kind: type) -> bool:
    return "_hybrid_asks_first" in vars(kind)


def _give_class_back(network: Any) -> None:
    (network.__class__,) = type(network).__bases__


# What runs the experts of a layer.


def set_runner(module: Any, runner: Any) -> Graft:
    """Let ``runner`` compute an experts module's experts."""
    what = f"experts run by {type(runner).__name__}"
    return _set(module, "hybrid_experts", runner, what)


def runner_of(module: nn.Module) -> Any:
    """Return what computes an experts module's experts; None of any other module."""
    return getattr(module, "hybrid_experts", None)


def expert_modules(network: nn.Module) -> list[Any]:
    """Return the modules whose experts a runner computes, in the layers' order."""
    return [module for module in network.modules() if hasattr(module, "hybrid_experts")]


def remove_parameters(network: Any, path: str, names: Sequence[str]) -> None:
    """Take the parameters out of an experts module that has no weights yet: a store has them."""
    for name in names:
        owner_path, _, leaf = f"{path}.{name}".rpartition(".")
        owner = network.get_submodule(owner_path)
        old = owner._parameters[leaf]
        owner.register_parameter(leaf, None)
        owner._is_hf_initialized = True
        undo = functools.partial(_register_again, name=leaf, shape=old.shape, dtype=old.dtype)
        _note(owner, "the experts' parameters are in the store", undo)
    network.get_submodule(path)._is_hf_initialized = True


def _register_again(owner: nn.Module, *, name: str, shape: torch.Size, dtype: torch.dtype) -> None:
    """Give a module a parameter back as it was: without memory."""
    empty = torch.empty(shape, dtype=dtype, device="meta")
    owner.register_parameter(name, nn.Parameter(empty, requires_grad=False))


@contextmanager
def replaced_runners(modules: Sequence[Any], runners: Sequence[Any]) -> Iterator[None]:
    """Let other runners compute the experts of modules meanwhile."""
    before = [module.hybrid_experts for module in modules]
    try:
        for module, runner in zip(modules, runners, strict=True):
            module.hybrid_experts = runner
        yield
    finally:
        for module, runner in zip(modules, before, strict=True):
            module.hybrid_experts = runner


@contextmanager
def replaced_settings(network: Any, settings: Any) -> Iterator[None]:
    """Let a generation config stand in a network's own place meanwhile."""
    before, network.generation_config = network.generation_config, settings
    try:
        yield
    finally:
        network.generation_config = before


def call_experts_function(module: Any, name: str) -> Graft:
    """Let transformers' experts interface call the function of that name for a module."""
    config = module.config
    before, config._experts_implementation = getattr(config, "_experts_implementation", None), name
    return _note(
        module,
        f"its experts interface calls the function {name!r}",
        functools.partial(_call_again, before=before),
    )


def _call_again(module: Any, *, before: str | None) -> None:
    module.config._experts_implementation = before


def experts_forward(
    self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Run an experts module: tokens, expert ids and routing weights go to its runner."""
    return self.hybrid_experts(hidden_states, top_k_index, top_k_weights)  # type: ignore[no-any-return]


def experts_forward_with_identity(
    self: Any, hidden: Tensor, top_k_index: Tensor, top_k: Tensor
) -> Tensor:
    """Run experts past whose ids there are others, which return the token unchanged."""
    routed = self.hybrid_experts(hidden, top_k_index, top_k)
    unchanged = (top_k * (top_k_index >= self.num_routed_experts)).sum(-1, keepdim=True)
    return (routed + hidden * unchanged).to(hidden.dtype)  # type: ignore[no-any-return]


def llama4_block_forward(self: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """Run each chosen expert on the token times its score; add the shared expert."""
    tokens = hidden_states.reshape(-1, self.hidden_dim)
    scores, router_logits = self.router(tokens)
    weights, ids = torch.topk(scores, self.top_k, dim=-1)
    scaled = (tokens[:, None, :] * weights[..., None]).reshape(-1, self.hidden_dim)
    routed = self.experts.hybrid_experts(scaled, ids.reshape(-1, 1), torch.ones_like(scaled[:, :1]))
    out = self.shared_expert(tokens)
    return out + routed.view(*ids.shape, -1).sum(dim=1), router_logits


# Forwards and hooks.


def replace_forward(module: Any, forward: Callable[..., Any], what: str) -> Graft:
    """Call ``forward`` in the place of a module's own."""
    return _set(module, "forward", forward, what)


def replace_method(module: Any, forward: Callable[..., Any]) -> Graft:
    """Call ``forward``, which takes the module first, in the place of its own."""
    what = f"{type(module).__name__}.forward is {forward.__name__}"
    return replace_forward(module, MethodType(forward, module), what)


def redirect_forward(module: Any, forward: Callable[..., Any]) -> None:
    """Call ``forward`` in the place of a module's own, until :func:`restore_forward`.

    It knows what it stands for, so that what an interrupt left redirected can still be restored.
    """
    forward.hybrid_own = own_forward(vars(module))  # type: ignore[attr-defined]
    module.forward = forward


def own_forward(attributes: Mapping[str, Any]) -> Any:
    """Return what was set as a module's ``forward``, wherever we redirect it; None if nothing."""
    forward = attributes.get("forward")
    return getattr(forward, "hybrid_own", forward)


def restore_forward(module: Any) -> None:
    """Give a module its own forward back, if it is redirected."""
    own, forward = own_forward(vars(module)), vars(module).get("forward")
    if own is not forward:
        if own is None:
            del module.forward
        else:
            module.forward = own


def hook_before(module: nn.Module, hook: Callable[..., Any], what: str) -> Graft:
    """Call ``hook`` with what a module is given, before its forward."""
    return _hooked(module, module.register_forward_pre_hook(hook), what)


def hook_after(module: nn.Module, hook: Callable[..., Any], what: str, **options: Any) -> Graft:
    """Call ``hook`` with what a module was given and returns; ``options`` as torch takes them."""
    return _hooked(module, module.register_forward_hook(hook, **options), what)


def _hooked(module: nn.Module, handle: Any, what: str) -> Graft:
    return _note(module, what, functools.partial(_unhook, handle=handle))


def _unhook(_: nn.Module, *, handle: Any) -> None:
    handle.remove()


# Modules in the places of others.


def put_module(owner: Any, name: str, new: nn.Module, *, back: bool = False) -> None:
    """Put a module in the place of another.

    Parameters
    ----------
    back
        Whether it keeps the other one, for :func:`bring_back`; it then has ``give_back()``, which
        returns the weights to the module that :func:`stood_for` tells. One that keeps none and is
        not torch's own has ``ordinary()``, which makes one that is.
    """
    if back:
        vars(new)[_REPLACED] = getattr(owner, name)  # not a submodule
    setattr(owner, name, new)


def stood_for(module: nn.Module) -> Any:
    """Return the module in whose place one was put; None where none comes back."""
    return vars(module).get(_REPLACED)


def bring_back(owner: Any, name: str) -> bool:
    """Put the module back that the one called ``name`` stands for; whether there was one."""
    child = getattr(owner, name)
    old = stood_for(child)
    if old is None:
        return False
    child.give_back()
    setattr(owner, name, old)
    return True


def untie(network: Any, module: nn.Module) -> None:
    """Take back a model's own note that weights are tied, as long as ``module`` is in it."""
    vars(module)[_TIED] = network.all_tied_weights_keys
    network.all_tied_weights_keys = {}


def tie_again(network: Any, module: nn.Module) -> None:
    """Give a model its note back that :func:`untie` took."""
    if _TIED in vars(module):
        network.all_tied_weights_keys = vars(module)[_TIED]


def set_tied_weights(network: Any, names: dict[str, str]) -> Graft:
    """Let a model note that weights are tied by other names."""
    return _set(network, "all_tied_weights_keys", names, "tied weights are noted by packed names")


def _replacements(network: Any) -> Iterator[Graft]:
    """Find the packed modules of a network, which say themselves what they stand for."""
    for owner in network.modules():
        for name, child in owner.named_children():
            kind = type(child).__name__
            if (old := stood_for(child)) is not None:
                what = f"{kind} in the place of {type(old).__name__}"
                yield Graft(what, functools.partial(_bring_back, network, owner, name))
            elif hasattr(child, "ordinary"):
                what = f"{kind} in the place of a layer that is not quantized"
                yield Graft(what, functools.partial(_widen, owner, name, network.dtype))


def _bring_back(network: Any, owner: Any, name: str) -> None:
    child = getattr(owner, name)
    with torch.inference_mode(False), torch.no_grad():
        bring_back(owner, name)
    tie_again(network, child)


def _widen(owner: Any, name: str, dtype: torch.dtype) -> None:
    child = getattr(owner, name)
    weight = nn.Parameter(child.weight.to(dtype), requires_grad=False)
    setattr(owner, name, child.ordinary(weight))


# Classes of transformers, for every network of this process.

_EVERYWHERE: list[Graft] = []
_ABSENT = object()


def set_on_class(kind: type, name: str, value: Any, what: str) -> Graft:
    """Set an attribute of a class of transformers."""
    before = vars(kind).get(name, _ABSENT)
    setattr(kind, name, value)
    graft = Graft(what, functools.partial(_set_back_on_class, kind, name, before, what))
    _EVERYWHERE.append(graft)
    return graft


def grafts_everywhere() -> list[Graft]:
    """Return what is changed about transformers' own classes."""
    return list(_EVERYWHERE)


def _set_back_on_class(kind: type, name: str, before: Any, what: str) -> None:
    _EVERYWHERE[:] = [graft for graft in _EVERYWHERE if graft.what != what]
    if before is _ABSENT:
        delattr(kind, name)
    else:
        setattr(kind, name, before)
