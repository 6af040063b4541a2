"""Which calls of a model take the fast path: for every model that transformers loads with us.

A loaded model becomes an instance of a subclass of its own class, of the same name, whose
``forward`` asks a :class:`FastPath` first. So the path sits under ``generate()`` and pipelines,
is copied and pickled with its model, and goes away with it. Whether a decoder has a fast path
is decided when the first call comes that could take it, by computing a few tokens both ways;
what the path does not compute goes to transformers' code, and both write the same cache.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from hybrid.dense import restore_dense
from hybrid.fast.decode import FastDecoder, WrongError, build_decoder
from hybrid.fast.kv_cache import can_share, goes_on
from hybrid.fast.prompt import OnPrompt
from hybrid.fast.samples import UnfitError

#: Arguments of ``forward`` that the fast path understands or that change nothing for it.
_KNOWN = {
    *("input_ids", "attention_mask", "position_ids", "past_key_values", "use_cache"),
    *("return_dict", "logits_to_keep", "cache_position"),
}
#: Settings of a model that ask for more than logits and the cache.
_WANTED = ("output_attentions", "output_hidden_states", "output_router_logits")


#: Whose hooks stay where inner states were asked for once, and do nothing until they are again.
_CAPTURING = "transformers.utils.output_capturing"


@dataclass(frozen=True)
class DecodePath:
    """Which path single tokens take, and why.

    Attributes
    ----------
    fast
        Whether it is the one-token kernels.
    reason
        What was found when the decoder was tested.
    """

    fast: bool
    reason: str

    def __str__(self) -> str:
        return f"{'one-token kernels' if self.fast else 'transformers'} ({self.reason})"


UNTESTED = DecodePath(False, "not tested before the first text")
SWITCHED_OFF = DecodePath(False, "switched off: fast=False")


class _Snapshot:
    """What a decoder was read from, to notice that it is another by now."""

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        self._children = [(m._modules, dict(m._modules)) for m in modules if m._modules]
        self._hooks = [
            hooks for m in modules[1:] for hooks in (m._forward_hooks, m._forward_pre_hooks)
        ]
        self._forwards = [(vars(m), vars(m).get("forward")) for m in modules[1:]]
        self._tensors = [
            tensor
            for tensor in (*model.parameters(), *model.buffers())
            if not tensor.is_inference()
        ]
        self._versions = self._count()

    def _count(self) -> int:
        return sum(tensor._version for tensor in self._tensors)

    def holds(self) -> bool:
        """Whether modules and weights are those of then."""
        same = all(now == then for now, then in self._children)
        return same and self._count() == self._versions

    def overridden(self) -> bool:
        """Whether somebody has put a function in the place of a part's forward."""
        return any(now.get("forward") is not then for now, then in self._forwards)

    def hooked(self) -> bool:
        """Whether somebody's code waits for the forward of a part."""
        return any(
            getattr(hook, "__module__", None) != _CAPTURING
            for hooks in self._hooks
            if hooks
            for hook in hooks.values()
        )


class FastPath:
    """The fast path of one model; a copy of the model tests its own.

    Attributes
    ----------
    path
        What is known of it.
    decoder
        What computes it; None as long as it is not tested, and where there is none.
    on_prompt
        Called after every piece of a prompt.
    refused
        Why calls of ``forward`` went to transformers although there is a fast path, and how
        many did.
    past_hooks
        Take the fast path although hooks are registered, which do not see single tokens.
    """

    def __init__(self, path: DecodePath = UNTESTED) -> None:
        self.path = path
        self.decoder: FastDecoder | None = None
        self.on_prompt: OnPrompt | None = None
        self.refused: Counter[str] = Counter()
        self.past_hooks = False
        self._snapshot: _Snapshot | None = None
        self._lock = threading.RLock()

    def __reduce__(self) -> Any:
        """Kernels hold addresses: only the decision of the user is copied."""
        return FastPath, () if self.decoder is not None else (self.path,)

    def settle(self, model: Any) -> FastDecoder | None:
        """Read and test the model's decoder, if that is still to be done, and return it.

        A decoder that should be computed and fails its test says so on stderr.
        """
        with self._lock:
            if self.path != UNTESTED:
                return self.decoder
            self.path = DecodePath(False, "being tested")
            try:
                with torch.no_grad():
                    decoder, distance = build_decoder(model)
            except UnfitError as unfit:
                self.path = DecodePath(False, str(unfit))
                restore_dense(model)
                if isinstance(unfit, WrongError):
                    print(f"hybrid: single tokens take the slow path: {unfit}", file=sys.stderr)
                return None
            except BaseException:
                self.path = UNTESTED
                restore_dense(model)
                raise
            found = f"tested: every layer within {distance:.1g} of transformers'"
            self.path, self.decoder = DecodePath(True, found), decoder
            self._snapshot = _Snapshot(model)
            return decoder

    def release(self, model: Any) -> None:
        """Give the weights back to transformers' modules; the next fast call tests anew."""
        with self._lock:
            if self.decoder is not None:
                self.path, self.decoder, self._snapshot = UNTESTED, None, None
                restore_dense(model)

    def __call__(self, model: Any, slow: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Compute a call of the model's ``forward``; ``slow`` is transformers'."""
        refusal = "arguments without names" if args else self._refusal(model, kwargs)
        if refusal is None:
            with self._lock:
                decoder, refusal = self._current(model, kwargs)
                if decoder is not None and refusal is None:
                    if can_share(kwargs["past_key_values"], decoder.form):
                        if kwargs["input_ids"].shape[1] == 1:
                            return decoder.forward(kwargs)
                        return decoder.prompt(kwargs, slow, self.on_prompt)
                    refusal = "a cache that the kernels cannot take over"
        if self.decoder is not None and refusal is not None:
            self.refused[refusal] += 1
            if torch.is_grad_enabled():  # packed weights have no gradients
                self.release(model)
        return slow(*args, **kwargs)

    def _current(
        self, model: Any, arguments: dict[str, Any]
    ) -> tuple[FastDecoder | None, str | None]:
        """Return the decoder, read anew if the model is another by now, or why it is not used.

        Looked at before prompts and before the first token that follows what others computed.
        """
        snapshot, decoder = self._snapshot, self.decoder
        known = decoder is not None and goes_on(arguments["past_key_values"], decoder.form)
        if snapshot is not None and (arguments["input_ids"].shape[1] > 1 or not known):
            if snapshot.overridden():
                return self.decoder, "a part's forward that was replaced"
            if not snapshot.holds():
                self.release(model)
        return self.settle(model), None

    def _refusal(self, model: Any, arguments: dict[str, Any]) -> str | None:
        """Why a call is not new tokens of one sequence and nothing special; None if it is."""
        ids, cache = arguments.get("input_ids"), arguments.get("past_key_values")
        if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.shape[1] == 0:
            return "no token ids"
        if ids.shape[0] != 1:
            return f"{ids.shape[0]} sequences at once"
        if ids.device.type != "cpu":
            return f"token ids on {ids.device}"
        for name, value in arguments.items():
            if name not in _KNOWN and value is not None and value is not False:
                return name
        if torch.is_grad_enabled():
            return "gradients"
        if model.training:
            return "training"
        if type(cache) is not DynamicCache or arguments.get("use_cache") is False:
            return "no cache" if cache is None else f"a cache of {type(cache).__name__}"
        wanted = [name for name in _WANTED if getattr(model.config, name, False)]
        if wanted or arguments.get("return_dict") is False:
            return wanted[0] if wanted else "return_dict"
        mask = arguments.get("attention_mask")
        if mask is not None and not (mask.ndim == 2 and bool(mask.all())):
            return "masked positions"
        hooked = self._snapshot is not None and self._snapshot.hooked()
        return "hooks" if hooked and not self.past_hooks else None


def attach_fast_path(model: Any, *, fast: bool = True) -> None:
    """Give a model that transformers has loaded its fast path, as ``model.hybrid_fast``."""
    if not fast:
        model.hybrid_fast = FastPath(SWITCHED_OFF)
    elif not model.can_generate():
        model.hybrid_fast = FastPath(DecodePath(False, "the model does not generate text"))
    else:
        model.hybrid_fast = FastPath()
        kind: Any = type(model)
        model.__class__ = _with_path(kind)


@functools.cache
def _with_path(kind: Any) -> Any:
    """Return the subclass of a model's class that asks for the fast path."""

    class Model(kind):  # type: ignore[misc]
        @functools.wraps(kind.forward)
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.hybrid_fast(self, super().forward, args, kwargs)

        def _apply(self, *args: Any, **kwargs: Any) -> Any:  # to(), half(), cuda() ...
            self.hybrid_fast.release(self)
            return super()._apply(*args, **kwargs)

        def __reduce_ex__(self, protocol: Any) -> Any:
            _, _, *rest = super().__reduce_ex__(protocol)
            return (_bare, (kind,), *rest)

    Model.__name__, Model.__qualname__ = kind.__name__, kind.__qualname__
    Model.__module__, Model.__doc__ = kind.__module__, kind.__doc__
    return Model


def _bare(kind: Any) -> Any:
    """Return a model without content, for who unpickles one."""
    fast = _with_path(kind)
    return fast.__new__(fast)
