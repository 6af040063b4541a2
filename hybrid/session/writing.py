"""A text that is about to be written: its prompt, its options, and what watches it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hybrid.errors import UsageError
from hybrid.session.answer_stream import AnswerStream
from hybrid.session.chat_template import turn_ends
from hybrid.session.generation_options import (
    check_length,
    check_one_sequence,
    end_tokens,
    text_limit,
    text_options,
    text_settings,
)
from hybrid.session.generation_stream import GenerationStream, OnText
from hybrid.textstream import TextStream


@dataclass(frozen=True, eq=False)
class Writing:
    """A call of :meth:`HybridModel.write` before anything of it is computed.

    Attributes
    ----------
    ids
        The prompt, ``[1, T]``.
    stream
        Makes text of the tokens that come, and knows when it ends.
    settings
        What stands in the place of the model's own settings.
    options
        Of ``generate``, settled.
    """

    ids: Tensor
    stream: GenerationStream
    settings: Any
    options: dict[str, Any]


def make_writing(
    network: Any,
    tokenizer: Any,
    ids: Tensor,
    *,
    on_text: OnText | None,
    on_thought: OnText | None,
    stop_strings: str | Sequence[str] | None,
    streamer: Any,
    marks: Collection[str],
    context: int | None,
    options: dict[str, Any],
) -> Writing:
    """Settle the options of a text after ``ids``, ``[1, T]``, and make its stream.

    Takes what :meth:`HybridModel.write` takes; ``context`` are the tokens that the text may have.

    Raises
    ------
    UsageError
        When the prompt is too long or an option cannot be.
    """
    check_length(ids.shape[-1], context)
    if stop_strings is None:
        stop_strings = network.generation_config.stop_strings
    stops = [stop_strings] if isinstance(stop_strings, str) else list(stop_strings or ())
    if "" in stops:
        raise UsageError("a stop string is empty", hint="leave it out")
    config = text_settings(network.generation_config)
    check_one_sequence(options, prompts=len(ids))
    limit = text_limit(config, options, ids.shape[1], context)
    prompt, ends = ids[0].tolist(), end_tokens(network, tokenizer)
    text: TextStream | AnswerStream = TextStream(tokenizer, prompt, stops)
    if on_thought is not None:  # an answer, whose turn the chat template ends
        text = AnswerStream(tokenizer, prompt, stops, on_thought, marks)
        ends = list(dict.fromkeys((*ends, *turn_ends(tokenizer))))
    stream = GenerationStream(
        streamer=streamer,
        text=text,
        on_text=on_text,
        limit=limit.tokens,
        limit_name=limit.name,
    )
    settled = text_options(config, options, limit.tokens, ends)
    if options.get("generation_config") is not None:
        settled.setdefault("tokenizer", tokenizer)  # it may name stop strings
    return Writing(ids, stream, config, {"attention_mask": torch.ones_like(ids)} | settled)
