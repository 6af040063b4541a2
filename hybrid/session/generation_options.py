"""Settles how long a text may be, and the other options of a call of ``generate``.

``config`` is the model's own generation config and ``options`` are the keyword arguments of the
call, which come first.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from hybrid.errors import UsageError
from hybrid.formats.notes import Note
from hybrid.session.generation import DRAWN
from hybrid.session.generation_stream import GenerationStream

#: New tokens when text is asked for and neither the caller nor the model gives a limit.
DEFAULT_NEW_TOKENS = 256

_LENGTHS = ("max_length", "max_new_tokens")
#: What only drawing takes, and what any choice does, with the values that change nothing.
_DRAWING = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0}
_PENALTIES = {
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "no_repeat_ngram_size": 0,
}

_ONE = "it is one sequence, shown as it comes"
_CACHE = "its cache is the one that a conversation goes on from"
_CODE = "transformers takes it from code on the hub, which is not run"
_UNSEEN = "nobody sees it there"
_HELPED = "the model writes alone"
_LEFT_OUT: dict[str, tuple[str, tuple[Any, ...]]] = {
    **dict.fromkeys(("num_beams", "num_return_sequences", "num_beam_groups"), (_ONE, (1,))),
    "use_cache": (_CACHE, (True,)),
    **dict.fromkeys(("cache_implementation", "cache_config", "compile_config"), (_CACHE, ())),
    **dict.fromkeys(("penalty_alpha",), (_CODE, (0,))),
    **dict.fromkeys(("constraints", "force_words_ids", "dola_layers"), (_CODE, ([],))),
    **dict.fromkeys(
        (
            *("return_dict_in_generate", "output_scores", "output_logits"),
            *("output_attentions", "output_hidden_states"),
        ),
        (_UNSEEN, (False,)),
    ),
    **dict.fromkeys(("is_assistant", "use_mtp", "token_healing"), (_HELPED, (False,))),
    "assistant_early_exit": (_HELPED, ()),
}
"""What a text cannot have of a model's own settings: why, and the values that ask for nothing."""


class Limit(NamedTuple):
    """How many new tokens a text may have at most, and why."""

    tokens: int
    name: str


def setting(config: Any, name: str, options: dict[str, Any]) -> Any:
    """Return a generation setting as transformers resolves it."""
    if options.get(name) is not None:
        return options[name]
    given = getattr(options.get("generation_config"), name, None)
    return getattr(config, name, None) if given is None else given


def check_length(tokens: int, context: int | None) -> None:
    """Raise UsageError when a prompt is empty or leaves the context no room for an answer."""
    if tokens == 0:
        raise UsageError("the prompt has 0 tokens", hint="give it at least one character")
    if context is not None and tokens >= context:
        raise UsageError(
            f"the prompt has {tokens} tokens and the model's context is {context}, which "
            "must also hold the answer",
            hint=f"shorten the prompt to {context - 1} tokens or fewer",
        )


def check_one_sequence(options: dict[str, Any], prompts: int) -> None:
    """Raise UsageError when more sequences than one are asked for."""
    sequences = prompts * (setting(None, "num_return_sequences", options) or 1)
    if sequences != 1:
        raise UsageError(
            f"a text result is one sequence, {sequences} are asked for",
            hint="generate() with token ids as the prompt returns several sequences of ids",
        )


def text_limit(
    config: Any, options: dict[str, Any], prompt_tokens: int, context: int | None
) -> Limit:
    """Return where a text ends at the latest: at what is asked for, or at the context's end.

    Raises
    ------
    UsageError
        When the options leave no new token to write.
    """
    asked = _new_tokens(config, options, prompt_tokens)
    if asked < 1:
        raise UsageError(
            f"{asked} new tokens are asked for after a prompt of {prompt_tokens}",
            hint="give max_new_tokens of at least 1, or a max_length beyond the prompt",
        )
    if context is None or asked <= context - prompt_tokens:
        return Limit(asked, "max_new_tokens")
    return Limit(context - prompt_tokens, "context full")


def text_options(
    config: Any, options: dict[str, Any], new_tokens: int, ends: Sequence[int] = ()
) -> dict[str, Any]:
    """Return ``options`` with what a text of one sequence needs settled.

    That is the number of new tokens, the tokens that end it (``ends``, unless asked for others) and
    a padding id. Stop strings are found in the text, not by transformers, and drawing leaves no
    tokens out that nobody asked to leave out.
    """
    settled: dict[str, Any] = {"max_new_tokens": new_tokens}
    if setting(None, "eos_token_id", options) is None and ends:
        settled["eos_token_id"] = list(ends)
    if setting(config, "pad_token_id", options) is None and ends:
        settled["pad_token_id"] = ends[0]
    if not ends:  # of which it would raise the odds
        settled["exponential_decay_length_penalty"] = None
    if setting(config, "do_sample", options) and setting(config, "top_k", options) is None:
        settled["top_k"] = 0
    rest = {name: value for name, value in options.items() if name not in _LENGTHS}
    if options.get("generation_config") is None:
        return rest | settled | {"stop_strings": None}
    changed = copy.deepcopy(options["generation_config"])
    changed.update(max_length=None, **settled)
    return rest | {"generation_config": changed}


def left_out(config: Any) -> Iterator[Note]:
    """Name what a model's own settings ask for and a text cannot have."""
    for name, value in _not_for_text(config):
        yield Note(
            f"{name} {value!r} of the model's own settings",
            f"left out where text is written: {_LEFT_OUT[name][0]}",
            "none needed; generate() with token ids hands it to transformers",
        )


def text_settings(config: Any) -> Any:
    """Return a model's own settings without what :func:`left_out` names."""
    changed = copy.deepcopy(config)
    for name, _ in _not_for_text(config):
        setattr(changed, name, None)
    return changed


def _not_for_text(config: Any) -> Iterator[tuple[str, Any]]:
    for name, (_, nothing) in _LEFT_OUT.items():
        value = getattr(config, name, None)
        if value is not None and value not in nothing:
            yield name, value


def end_tokens(network: Any, tokenizer: Any) -> list[int]:
    """Return the ids that end a text: all that settings, config and tokenizer name, each once."""
    text_config = network.config.get_text_config()
    named = (network.generation_config, network.config, text_config, tokenizer)
    ids: list[int] = []
    for holder in named:
        value = getattr(holder, "eos_token_id", None)
        ids += value if isinstance(value, list | tuple) else [] if value is None else [value]
    return list(dict.fromkeys(int(token) for token in ids))


def sampling_told(config: Any, options: dict[str, Any]) -> str:
    """Say how the tokens of a call are chosen, and which of it is the model's own wish."""
    sampled = setting(config, "do_sample", options)
    told, own = [DRAWN if sampled else "the likeliest"], False
    for name, nothing in (_DRAWING | _PENALTIES if sampled else _PENALTIES).items():
        value = setting(config, name, options)
        if value is None or value == nothing:
            continue
        wished = setting(None, name, options) is None
        told.append(f"{name} {value}{'*' if wished else ''}")
        own |= wished
    return ", ".join(told) + (" (* as the model's own settings ask)" if own else "")


def loop_options(network: Any, options: dict[str, Any], stream: GenerationStream) -> dict[str, Any]:
    """Return ``options`` for transformers' loop over ``network``, watched by a ``stream``.

    Raises
    ------
    UsageError
        When somebody waits for tokens of a search that shows none before its end.
    """
    # Masks and the like belong where the ids are.
    settled = {
        name: value.to(network.device) if isinstance(value, torch.Tensor) else value
        for name, value in options.items()
    }
    if (setting(network.generation_config, "num_beams", options) or 1) == 1:
        settled["streamer"] = stream
    elif stream.shows_tokens:
        raise UsageError(
            "beam search (num_beams > 1) knows no text before it ends, so it cannot stream",
            hint="leave out num_beams, or the streamer",
        )
    return settled


def _new_tokens(config: Any, options: dict[str, Any], prompt_tokens: int) -> int:
    asked = setting(config, "max_new_tokens", options)
    if asked is not None:
        return int(asked)
    length = setting(config, "max_length", options)
    return DEFAULT_NEW_TOKENS if length is None else int(length) - prompt_tokens
