"""The loop around the model's steps: chooses tokens, ends, and computes the next step.

transformers' ``generate`` prepares a call and hands it to :class:`Loop`, which takes the place of
its own loop where it knows everything that is asked for, and leaves it to that one where it does
not. Nothing that the steps themselves do not need is done for a token.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationMixin
from transformers.generation.configuration_utils import GenerationMode

from hybrid.ask.speculate import MOST_DRAFTED
from hybrid.grafts import fast_path_of
from hybrid.loop.choice import Choice, knows
from hybrid.loop.ends import Ends
from hybrid.loop.rollback import not_cut, take_back
from hybrid.loop.speculation import Drafts
from hybrid.transformers_api import CACHE_NAMES, cache_argument, given_cache, returned_cache

#: What a step may be given; of others it is not known what they become from step to step.
_KNOWN = {*CACHE_NAMES, "attention_mask", "position_ids", "use_cache", "logits_to_keep"}
#: Methods of transformers that say what a step is given.
_PREPARING = ("prepare_inputs_for_generation", "_update_model_kwargs_for_generation")
#: What a result would have to hold beside the tokens.
_MORE = ("return_dict_in_generate", "is_assistant", "token_healing")
#: Tokens by which a sequence's memory grows at least.
_GROWTH = 1024


class Loop:
    """Generates the tokens of one call, as ``custom_generate`` of transformers' ``generate``.

    Parameters
    ----------
    streamer
        Given the prompt, each new token and the end, as transformers does it.
    drafts
        Drafts tokens; None where every step is to be of one token.

    Attributes
    ----------
    left
        Whether the call was left to transformers' loop.
    """

    def __init__(self, streamer: Any, drafts: Drafts | None = None) -> None:
        self._streamer, self._drafts = streamer, drafts
        self.left = False

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Iterable[Any],
        stopping_criteria: Iterable[Any],
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Any:
        """Return the sequence ``[1, T]``, or what transformers' loop returns."""
        ends = ends_of_ours(
            model, input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs
        )
        if ends is None:
            self.left = True
            if self._drafts is not None:
                self._drafts.refused = "the call goes through transformers' loop"
            return type(model)._sample(
                model,
                input_ids,
                logits_processor=logits_processor,
                stopping_criteria=stopping_criteria,
                generation_config=generation_config,
                streamer=self._streamer,
                **model_kwargs,
            )
        outputs = model._prefill(input_ids, generation_config, model_kwargs)
        logits: Tensor = outputs.logits[0, -1:]
        ids: list[int] = input_ids[0].tolist()
        choice = Choice(logits_processor, bool(generation_config.do_sample), ids, logits.shape[-1])
        sequence = _Sequence(
            model, input_ids, model_kwargs, returned_cache(outputs), logits.shape[-1]
        )
        del outputs
        if self._drafts is not None:
            self._drafts.refused = not_cut(sequence.cache)
        self._run(sequence, logits, choice, ends)
        self._streamer.end()
        return sequence.ids

    def _run(self, sequence: _Sequence, logits: Tensor, choice: Choice, ends: Ends) -> None:
        """Choose tokens by ``logits`` ``[T, V]`` and compute what follows, until the end."""
        drafts, seconds = self._drafts, 0.0
        draft: Sequence[int] = ()
        while True:
            new, ended = self._accept(sequence, logits, draft, choice, ends)
            if drafts is not None and seconds:
                drafts.took(1 + len(draft), new, seconds)
            if ended:
                return
            draft = () if drafts is None else drafts.propose(_room(sequence, ends))
            begun_s = time.perf_counter()
            logits = sequence.step(draft)
            seconds = time.perf_counter() - begun_s

    def _accept(
        self,
        sequence: _Sequence,
        logits: Tensor,
        draft: Sequence[int],
        choice: Choice,
        ends: Ends,
    ) -> tuple[int, bool]:
        """Take the tokens that follow, as long as they are drafted; return how many, and if all.

        Each is chosen as if it had come alone, so drafts change no text and no random number. The
        cache holds what was drafted: the rest is cut off before anybody sees another token, or
        where somebody leaves.
        """
        drafts, place = self._drafts, 0
        while True:
            token = choice.choose(logits[place])
            sequence.add(token)
            ended = ends.met(token, sequence.length, sequence.buffer)
            left = len(draft) - place
            last = ended or not left or token != draft[place]
            if last:
                take_back(sequence.cache, left)
            try:
                self._streamer.put(sequence.last)
            except BaseException:
                if not last:
                    take_back(sequence.cache, left)
                raise
            if drafts is not None:
                drafts.add(token)
            place += 1
            if last:
                return place, ended


def ends_of_ours(
    model: Any, ids: Tensor, processors: Any, criteria: Any, config: Any, model_kwargs: Any
) -> Ends | None:
    """Return what ends a call that :class:`Loop` takes; None for one that it leaves."""
    known = _takes(model, ids, config, model_kwargs) and knows(processors)
    return Ends.of(criteria) if known else None


def _takes(model: Any, ids: Tensor, config: Any, model_kwargs: dict[str, Any]) -> bool:
    """Whether the steps of a call are known: one sequence on the CPU, all of its positions seen."""
    cache = given_cache(model_kwargs)
    return (
        ids.shape[0] == 1
        and ids.device.type == model.device.type == "cpu"
        and config.get_generation_mode() in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
        and config.use_cache
        and type(cache) is DynamicCache
        and not any(getattr(config, name, None) for name in _MORE)
        and all(value is None or name in _KNOWN for name, value in model_kwargs.items())
        and model_kwargs.get("attention_mask") is None
        and not model.config.is_encoder_decoder
        and not model.is_remote_code()
        and all(getattr(type(model), name) is getattr(GenerationMixin, name) for name in _PREPARING)
    )


def _room(sequence: _Sequence, ends: Ends) -> int:
    """Return how many tokens can be drafted: one comes in any case."""
    return MOST_DRAFTED if ends.longest is None else ends.longest - sequence.length - 1


class _Sequence:
    """Tokens and cache of one sequence, and the model that goes on with it.

    Parameters
    ----------
    model
        Computes the steps.
    ids
        The prompt, ``[1, T]``.
    model_kwargs
        What transformers gave the prompt's step.
    cache
        Holds the prompt.
    vocabulary
        How many logits a token has.

    Attributes
    ----------
    length
        Tokens that there are.
    buffer
        Begins with them, ``[1, capacity]``.
    """

    def __init__(
        self,
        model: Any,
        ids: Tensor,
        model_kwargs: dict[str, Any],
        cache: Any,
        vocabulary: int,
    ) -> None:
        self.cache = cache
        self.length = self._prompt = ids.shape[1]
        self._model = model
        self._inputs = {"use_cache": True, "return_dict": True, **cache_argument(cache)}
        self._keeps = "logits_to_keep" in model_kwargs
        places = model_kwargs.get("position_ids")
        self._next_place: Tensor | None = None if places is None else places[..., -1:] + 1
        self._first_position: int | None = 0
        if places is not None:  # of several axes the fast path takes none
            self._first_position = (
                int(places[0, -1]) + 1 - self.length if places.ndim == 2 else None
            )
        self._fast = fast_path_of(model)
        self._row = torch.empty(vocabulary)
        self.buffer = ids
        self._grow()

    @property
    def ids(self) -> Tensor:
        """A copy of all tokens, ``[1, T]``."""
        return self.buffer[:, : self.length].clone()

    @property
    def last(self) -> Tensor:
        """The last token, ``[1]``."""
        return self.buffer[0, self.length - 1 : self.length]

    def add(self, token: int) -> None:
        """Take the next token."""
        if self.length == self._capacity:
            self._grow()
        self._numbers[self.length] = token
        self.length += 1

    def step(self, draft: Sequence[int]) -> Tensor:
        """Compute the last token and a ``draft`` after it, and return their logits ``[T, V]``."""
        begin, end = self.length - 1, self.length + len(draft)
        if end > self._capacity:
            self._grow()
        if draft:
            self._numbers[self.length : end] = draft
        if not draft:
            logits = self._next_logits(begin)
            if logits is not None:
                return logits
        inputs = self._inputs
        inputs["input_ids"] = self.buffer[:, begin:end]
        if self._places is not None:
            inputs["position_ids"] = self._places[..., begin - self._prompt : end - self._prompt]
        if self._keeps:
            inputs["logits_to_keep"] = end - begin
        computed: Tensor = self._model(**inputs).logits
        return computed[0, begin - end :]

    def _next_logits(self, place: int) -> Tensor | None:
        """Return the logits ``[1, V]`` of the token at a place; None where others compute it."""
        model = self._model
        if self._fast is None or self._first_position is None:
            return None
        if model._forward_hooks or model._forward_pre_hooks or "forward" in vars(model):
            return None
        ids, position = self.buffer[:, place : place + 1], self._first_position + place
        logits: Tensor | None = self._fast.next_token(ids, position, self.cache, self._row)
        return None if logits is None else logits[None]

    def _grow(self) -> None:
        """Make room for as many tokens again."""
        more = max(_GROWTH, self.length)
        self._capacity = self.length + more
        self.buffer = torch.nn.functional.pad(self.buffer[:, : self.length], (0, more))
        self._numbers = self.buffer.numpy()[0]
        self._places = None
        if self._next_place is not None:
            self._places = self._next_place + torch.arange(self._capacity - self._prompt)
