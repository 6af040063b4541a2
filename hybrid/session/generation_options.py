"""Settles how long a text may be, and the other options of a call of ``generate``.

``config`` is the model's own generation config and ``options`` are the keyword arguments of the
call, which come first.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch

from hybrid.errors import UsageError
from hybrid.session.generation_stream import GenerationStream

#: New tokens when text is asked for and neither the caller nor the model gives a limit.
DEFAULT_NEW_TOKENS = 256

_LENGTHS = ("max_length", "max_new_tokens")


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


def check_one_sequence(config: Any, options: dict[str, Any], prompts: int) -> None:
    """Raise UsageError when more sequences than one are asked for."""
    sequences = prompts * (setting(config, "num_return_sequences", options) or 1)
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


def text_options(config: Any, options: dict[str, Any], new_tokens: int) -> dict[str, Any]:
    """Return ``options`` with the number of new tokens and a padding id settled."""
    settled = {"max_new_tokens": new_tokens}
    if setting(config, "pad_token_id", options) is None:
        end = setting(config, "eos_token_id", options)
        settled["pad_token_id"] = end[0] if isinstance(end, list) else end
    rest = {name: value for name, value in options.items() if name not in _LENGTHS}
    if options.get("generation_config") is None:
        return rest | settled
    changed = copy.deepcopy(options["generation_config"])
    changed.update(max_length=None, **settled)
    return rest | {"generation_config": changed}


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
