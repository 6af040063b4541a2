"""Decides which calls of a model take the fast path, for every model that is loaded with us.

A loaded model becomes an instance of a subclass of its own class, of the same name, whose
``forward`` asks a :class:`FastPath` first (:func:`hybrid.grafts.ask_fast_path_first`). So the path
sits under ``generate()`` and pipelines, is copied and pickled with its model, and goes away with
it. Whether a decoder has a fast path
is decided when the first call comes that could take it, by computing a few tokens both ways;
what the path does not compute goes to transformers' code, and both write the same cache.

The model's modules and parameters stay as they are, and training, editing, saving and wrapping
them is transformers' business: the kernels have copies of their own, made in that first call.
Before every long prompt, and before tokens after what others computed, modules and weights are
looked at; if somebody has changed them, copies are made and tested again. What is written in
place through ``tensor.data`` leaves no sign: call :meth:`FastPath.release` after it. Who owns a
model alone can let packed modules replace its own, see :attr:`FastPath.replace`.
"""

from __future__ import annotations

import operator
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules import module as every_module
from transformers import DynamicCache

from cpu_experts.jit.turns import Turn
from cpu_experts.jit.workers import kernels_run
from hybrid.anatomy.samples import UnfitError
from hybrid.errors import first_line
from hybrid.fast.decode import GROWING, FastDecoder, is_prompt
from hybrid.fast.kv_cache import can_share, goes_on
from hybrid.fast.prompt import OnPrompt
from hybrid.fast.selftest import build_decoder
from hybrid.formats.notes import Note
from hybrid.grafts import ask_fast_path_first, own_forward, set_fast_path
from hybrid.machine.versions import untested
from hybrid.packed.dense import restore_dense
from hybrid.transformers_api import CACHE_NAMES, given_cache

#: Arguments of ``forward`` that the fast path understands or that change nothing for it.
_KNOWN = {
    *("input_ids", "attention_mask", "position_ids", *CACHE_NAMES, "use_cache"),
    *("return_dict", "logits_to_keep", "cache_position"),
}
#: Settings of a model that ask for more than logits and the cache.
_INNER_STATES = ("output_attentions", "output_hidden_states", "output_router_logits")


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
    remedy
        What helps where it is not fast.
    chosen
        Whether it is what the user chose, and so nothing to be told of.
    """

    fast: bool
    reason: str
    remedy: str = "none yet: the one-token kernels do not compute this decoder"
    chosen: bool = False

    def __str__(self) -> str:
        return f"{'one-token kernels' if self.fast else 'transformers'} ({self.reason})"


LOST = "single tokens in transformers' code"
"""What is slow where the path is not taken."""
UNTESTED = DecodePath(False, "not tested before the first text", chosen=True)
SWITCHED_OFF = DecodePath(False, "switched off: fast=False", "leave out fast=False", chosen=True)


def _unfit(error: Exception) -> DecodePath:
    """Return why there is no fast path: what it cannot compute, or what its test ended in."""
    if isinstance(error, MemoryError):
        return DecodePath(False, "memory ran out in its test", "free memory")
    if not isinstance(error, UnfitError):
        what = f"its test ended in {type(error).__name__}: {first_line(error)}"
        return DecodePath(False, what, "report it, with the model's config.json")
    if error.hint is not None:
        return DecodePath(False, str(error), error.hint)
    return DecodePath(False, str(error))


class _Snapshot:
    """What a decoder was read from, to notice that it is another by now."""

    def __init__(self, model: nn.Module) -> None:
        _, *parts = model.modules()  # without the model itself, which would never be freed
        self._parts = [(part, type(part)) for part in parts]
        self._forwards = [(vars(part), own_forward(vars(part))) for part in parts]
        self._hooks = _hooks_of(model)
        every = [model, *parts]
        self._children = [(part._modules, dict(part._modules)) for part in every]
        tables: list[dict[str, Any]] = [part._parameters for part in every]
        # Some rotary embeddings replace their own buffers as a sequence grows.
        tables += [
            part._buffers for part in every if getattr(part, "rope_type", None) not in GROWING
        ]
        self._tables = [(table, dict(table)) for table in tables if table]
        self._tensors = [
            (tensor, _state(tensor))
            for _, table in self._tables
            for tensor in table.values()
            if tensor is not None
        ]

    def has_its_parts(self) -> bool:
        """Whether the modules are those of then."""
        same = all(_same(now, then) for now, then in self._children)
        return same and all(type(part) is kind for part, kind in self._parts)

    def holds(self) -> bool:
        """Whether modules and weights are those of then."""
        return (
            self.has_its_parts()
            and all(_same(now, then) for now, then in self._tables)
            and all(_state(tensor) == then for tensor, then in self._tensors)
        )

    def overridden(self) -> bool:
        """Whether somebody has put a function in the place of a part's forward."""
        return any(
            now.get("forward") is not then and own_forward(now) is not then
            for now, then in self._forwards
        )

    def hooked(self) -> bool:
        """Whether somebody's code waits for the forward of a part by now."""
        return _hooked(self._hooks)


def _hooks_of(model: nn.Module) -> list[dict[int, Any]]:
    """Return the tables of hooks of a model's parts; its own are called in any case."""
    _, *parts = model.modules()
    return [hooks for part in parts for hooks in (part._forward_hooks, part._forward_pre_hooks)]


def _hooked(tables: list[dict[int, Any]]) -> bool:
    return any(
        getattr(hook, "__module__", None) != _CAPTURING
        for hooks in tables
        if hooks
        for hook in hooks.values()
    )


def _same(now: dict[str, Any], then: dict[str, Any]) -> bool:
    return len(now) == len(then) and all(map(operator.is_, now.values(), then.values()))


def _state(tensor: Tensor) -> tuple[int, int]:
    """Return what changes when a tensor is written or given other memory."""
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version


class FastPath:
    """The fast path of one model; a copy of the model tests its own.

    Any number of threads may call the model. What the kernels compute is computed one call at a
    time; transformers' code runs beside that, but where modules are replaced it waits, too.

    Parameters
    ----------
    path
        What is known of it without a test.
    replace
        See the attribute.

    Attributes
    ----------
    path
        What is known of it.
    decoder
        What computes it; None as long as it is not tested, and where there is none.
    replace
        Whether packed modules take the places of the model's dense ones while the path is in
        use, instead of lying beside them: a copy of the weights less, and faster prompts. A call
        with gradients, a move or a cast brings the model's own back; until then parameters and
        modules that others hold are empty or out of use. For models that have one owner.
    on_prompt
        Called after every piece of a prompt.
    refused
        Why calls of ``forward`` went to transformers although there is a fast path, and how
        many did.
    past_hooks
        Take the fast path although hooks are registered, which do not see single tokens.
    """

    def __init__(self, path: DecodePath = UNTESTED, replace: bool = False) -> None:
        self.path = self._untested = path
        self.decoder: FastDecoder | None = None
        self.replace = replace
        self.on_prompt: OnPrompt | None = None
        self.refused: Counter[str] = Counter()
        self.past_hooks = False
        self._snapshot: _Snapshot | None = None
        self._said: list[Note] = []
        self._lock = Turn(reentrant=True)

    def __reduce__(self) -> Any:
        """Kernels hold addresses: only the decisions of the user are copied."""
        return FastPath, (self._untested, self.replace)

    def settle(self, model: Any, *, tell: bool = True) -> FastDecoder | None:
        """Read and test the model's decoder, if that is still to be done, and return it.

        Unless the caller does, says on stderr what is lost (:meth:`notes`).
        """
        with self._lock:
            if self.path == UNTESTED:
                self.path = DecodePath(False, "being tested")
                try:
                    with torch.inference_mode(False), torch.no_grad():
                        self._test(model)
                except BaseException:
                    self.release(model)
                    raise
                for note in [note for note in self.notes() if note not in self._said]:
                    self._said.append(note)
                    if tell:
                        print(f"hybrid: {note}", file=sys.stderr)
            return self.decoder

    def _test(self, model: Any) -> None:
        try:
            decoder, distance = build_decoder(model, replace=self.replace)
        except Exception as error:  # a library that is not the one we know may raise anything
            restore_dense(model)
            self.path = _unfit(error)
        else:
            found = f"tested: every part within {distance:.1g} of transformers'"
            self.path, self.decoder = DecodePath(True, found), decoder
        self._snapshot = _Snapshot(model)

    def notes(self) -> Iterator[Note]:
        """Name the libraries of versions that nobody tested, and the path, if it is lost."""
        path = self.path
        lost = Note(LOST, path.reason, path.remedy)
        news = tuple(untested())
        for library in news:
            here = "the fast path passes its own test" if path.fast else f"{LOST}: {path.reason}"
            yield Note(str(library), here, library.remedy)
        if not (path.fast or path.chosen or news):
            yield lost

    def release(self, model: Any) -> None:
        """Forget the kernels' copies, and put the model's own modules back if they are replaced.

        The next call that can take the fast path reads the model and tests it anew.
        """
        with self._lock:
            self.path, self.decoder, self._snapshot = self._untested, None, None
            restore_dense(model)

    def next_token(self, ids: Tensor, position: int, cache: Any, logits: Tensor) -> Tensor | None:
        """Compute the token that follows what the path has computed, without what that asked.

        Parameters
        ----------
        ids, position
            The token, ``[1, 1]``, and its position.
        cache
            Of the tokens before it.
        logits
            ``[V]`` float32, written.

        Returns
        -------
        ``logits`` in the model's type, in memory that the next call writes again; None where
        ``forward`` has to be called, which asks anew.
        """
        with self._lock:
            decoder, snapshot = self.decoder, self._snapshot
            if decoder is None or snapshot is None or not goes_on(cache, decoder.form):
                return None
            if not can_share(cache, decoder.form) or logits.numel() != decoder.decoder.vocabulary:
                return None
            if not self.past_hooks and (_hooked_everywhere() or snapshot.hooked()):
                return None
            if not decoder.next_token(ids, position, cache, logits):
                return None
            return decoder.rounded.copy_(logits)

    @property
    def turn(self) -> Turn:
        """Whoever computes with the decoder without ``forward`` holds it meanwhile."""
        return self._lock

    def ready(self, model: Any) -> tuple[FastDecoder | None, str]:
        """Return the decoder of the model as it is by now, or None and why there is none."""
        with self._lock:
            snapshot = self._snapshot
            if _hooked_everywhere() or (snapshot is not None and snapshot.hooked()):
                return None, "hooks"
            if snapshot is not None and snapshot.overridden():
                return None, "a part's forward that was replaced"
            if snapshot is not None and not snapshot.holds():
                self.release(model)
            return self.settle(model), self.path.reason

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # kernels are not torch's
    def __call__(self, model: Any, slow: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Compute a call of the model's ``forward``; ``slow`` is transformers'."""
        refusal = "arguments without names" if args else self._refusal(model, kwargs)
        if refusal is None:
            with self._lock:
                decoder, refusal = self._current(model, kwargs)
                if decoder is not None and refusal is None:
                    output, refusal = self._compute(decoder, slow, kwargs)
                    if output is not None:
                        return output
        if self.decoder is not None and refusal is not None:
            self.refused[refusal] += 1
        if not self.replace:
            return slow(*args, **kwargs)
        with self._lock:  # others must not change the modules that this runs through
            if torch.is_grad_enabled():  # packed weights have no gradients
                self.release(model)
            return slow(*args, **kwargs)

    def _compute(
        self, decoder: FastDecoder, slow: Any, arguments: dict[str, Any]
    ) -> tuple[Any, str | None]:
        """Return what the decoder makes of a call, or why it makes nothing of it."""
        cache, (texts, tokens) = given_cache(arguments), arguments["input_ids"].shape
        if not can_share(cache, decoder.form, texts):
            return None, "a cache that the kernels cannot take over"
        begins = None
        if _masked(arguments):
            begins = _begins(arguments["attention_mask"], cache.get_seq_length(), tokens)
            if begins is None:
                return None, "masked positions"
        if begins is not None and decoder.decoder.keeps_states and int(begins.max()) > 0:
            return None, "a prompt of masked positions"
        if is_prompt(texts, tokens):
            if texts > 1:
                return None, f"prompts of {texts} sequences at once"
            if begins is not None:
                return None, "a prompt of masked positions"
            return decoder.prompt(arguments, slow, self.on_prompt), None
        if texts * tokens == 1 and begins is None:
            output = decoder.forward(arguments)
        else:
            output = decoder.step(arguments, begins, self.on_prompt)
        return output, "keys or values beyond half precision"

    def _current(
        self, model: Any, arguments: dict[str, Any]
    ) -> tuple[FastDecoder | None, str | None]:
        """Return the decoder, read anew if the model is another by now, or why it is not used.

        Looked at before prompts and before the first tokens that follow what others computed.
        """
        decoder, snapshot = self.decoder, self._snapshot
        texts, tokens = arguments["input_ids"].shape
        if decoder is None:
            # What did not fit may fit by now, with other parts.
            if snapshot is not None and tokens > 1 and not snapshot.has_its_parts():
                self.release(model)
            if self.path == UNTESTED and _hooked(_hooks_of(model)) and not self.past_hooks:
                return None, "hooks"
        elif snapshot is not None:
            if snapshot.hooked() and not self.past_hooks:
                return decoder, "hooks"
            if is_prompt(texts, tokens) or not goes_on(given_cache(arguments), decoder.form):
                if snapshot.overridden():
                    return decoder, "a part's forward that was replaced"
                if not snapshot.holds():
                    self.release(model)
        return self.settle(model), None

    def _refusal(self, model: Any, arguments: dict[str, Any]) -> str | None:
        """Why a call is not new tokens and nothing special; None if it is."""
        ids, cache = arguments.get("input_ids"), given_cache(arguments)
        if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.numel() == 0:
            return "no token ids"
        if ids.device.type != "cpu":
            return f"token ids on {ids.device}"
        for name, value in arguments.items():
            if name not in _KNOWN and value is not None and value is not False:
                return name
        if torch.is_grad_enabled():
            return "gradients"
        if not kernels_run():
            return "a child of a process that had used the kernels"
        if model.training:
            return "training"
        if type(cache) is not DynamicCache or arguments.get("use_cache") is False:
            return "no cache" if cache is None else f"a cache of {type(cache).__name__}"
        for name in _INNER_STATES:
            if getattr(model.config, name, False):
                return name
        if False in (arguments.get("return_dict"), getattr(model.config, "return_dict", None)):
            return "return_dict"
        positions = arguments.get("position_ids")
        if isinstance(positions, Tensor) and positions.ndim != 2:
            return "positions along several axes"
        mask = arguments.get("attention_mask")
        if mask is not None and not isinstance(mask, Tensor):
            return f"a mask of {type(mask).__name__}"
        if mask is not None and mask.ndim != 2:
            return f"a mask of {mask.ndim} dimensions"
        return "hooks" if _hooked_everywhere() and not self.past_hooks else None


def _hooked_everywhere() -> bool:
    """Whether somebody's code waits for the forward of every module."""
    return bool(every_module._global_forward_hooks or every_module._global_forward_pre_hooks)


def _masked(arguments: dict[str, Any]) -> bool:
    mask = arguments.get("attention_mask")
    return mask is not None and not bool(mask.all())


def _begins(mask: Tensor, past: int, tokens: int) -> NDArray[np.int64] | None:
    """Return where texts begin that a mask leaves something out in front of, and nothing else.

    Relative to the position behind ``past`` others, where the first of the ``tokens`` is.
    """
    seen = mask != 0
    if mask.shape[1] != past + tokens or not bool((seen[:, 1:] >= seen[:, :-1]).all()):
        return None
    if not bool(seen[:, -1].all()):
        return None
    begins: NDArray[np.int64] = (~seen).sum(dim=1).numpy() - past
    return begins


def attach_fast_path(model: Any, *, fast: bool = True, replace: bool = False) -> None:
    """Give a model that transformers has loaded its fast path.

    ``replace`` is for who owns the model alone, see :attr:`FastPath.replace`.
    """
    if not fast:
        set_fast_path(model, FastPath(SWITCHED_OFF))
    elif not model.can_generate():
        why = "the model does not generate text"
        set_fast_path(model, FastPath(DecodePath(False, why, "load it with its language head")))
    else:
        set_fast_path(model, FastPath(replace=replace))
        ask_fast_path_first(model)
