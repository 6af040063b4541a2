"""Puts answers into the forms that OpenAI's clients read: whole, or chunk by chunk."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from hybrid.serve.events import data, usage_counts
from hybrid.serve.parts import Arguments, CallBegun, Chance, Part, Text, Thought, Whole
from hybrid.serve.refusals import Refusal
from hybrid.session.generation import Generation

LIMITS = ("max_new_tokens", "context full")
DONE = b"data: [DONE]\n\n"
"""Ends a stream."""


class ChatAnswer:
    """The answers to a request for a chat's turn.

    Parameters
    ----------
    model
        What the model is called.
    include_usage
        Whether a stream ends with how many tokens there were.
    chances
        Whether the probabilities of tokens are told.
    """

    _prefix, _kind, _chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, model: str, *, include_usage: bool = False, chances: bool = False) -> None:
        self._include_usage, self._chances = include_usage, chances
        self._head = {
            "id": f"{self._prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }
        self._called: set[int] = set()

    def begin(self, answers: int) -> Iterator[bytes]:
        """Yield what a stream of so many answers begins with."""
        for at in range(answers):
            yield self._chunk(at, {"delta": {"role": "assistant", "content": ""}})

    def part(self, at: int, part: Part) -> Iterator[bytes]:
        """Yield what is sent of a part of the ``at``-th answer."""
        chances: Sequence[Chance] = ()
        if isinstance(part, Text):
            delta: dict[str, Any] = {"content": part.text}
            chances = part.chances
        elif isinstance(part, Thought):
            delta = {"reasoning_content": part.text}
        else:
            delta = {"tool_calls": [_call_delta(part)]}
            self._called.add(at)
        yield self._chunk(at, {"delta": delta}, None, chances)

    def end(self, at: int, generation: Generation) -> Iterator[bytes]:
        """Yield what the ``at``-th answer ends with."""
        yield self._chunk(at, {"delta": {}}, finish_reason(generation, at in self._called))

    def close(self, generations: Sequence[Generation]) -> Iterator[bytes]:
        """Yield what a stream ends with."""
        if self._include_usage:
            body = self._head | {"object": self._chunk_kind, "choices": []}
            yield data(body | {"usage": usage(generations)})
        yield DONE

    def failed(self, refusal: Refusal) -> Iterator[bytes]:
        """Yield what ends a stream before its time."""
        yield data(refusal.body)

    def whole(self, answers: Sequence[tuple[list[Part], Generation]]) -> dict[str, Any]:
        """Return all answers, of all of their parts."""
        choices = []
        for at, (parts, generation) in enumerate(answers):
            found = Whole.of(parts)
            reason = finish_reason(generation, bool(found.calls))
            choices.append(self._choice(at, self._content(found), reason, found.chances))
        return self._head | {
            "object": self._kind,
            "choices": choices,
            "usage": usage([generation for _, generation in answers]),
        }

    def _content(self, found: Whole) -> dict[str, Any]:
        content = found.text or (None if found.calls else "")
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if found.thoughts:
            message["reasoning_content"] = found.thoughts
        if found.calls:
            message["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for call in found.calls
            ]
        return {"message": message}

    def _choice(
        self, at: int, content: dict[str, Any], reason: str | None, chances: Sequence[Chance]
    ) -> dict[str, Any]:
        told = self._told(at, chances) if self._chances else None
        return {"index": at, **content, "logprobs": told, "finish_reason": reason}

    def _told(self, at: int, chances: Sequence[Chance]) -> dict[str, Any] | None:
        if not chances:
            return None
        return {"content": [_chance(each) for each in chances], "refusal": None}

    def _chunk(
        self,
        at: int,
        content: dict[str, Any],
        reason: str | None = None,
        chances: Sequence[Chance] = (),
    ) -> bytes:
        choice = self._choice(at, content, reason, chances)
        body = self._head | {"object": self._chunk_kind, "choices": [choice]}
        return data(body | ({"usage": None} if self._include_usage else {}))


class TextAnswer(ChatAnswer):
    """The answers to a request for a completion."""

    _prefix, _kind, _chunk_kind = "cmpl", "text_completion", "text_completion"

    def __init__(self, model: str, *, include_usage: bool = False, chances: bool = False) -> None:
        super().__init__(model, include_usage=include_usage, chances=chances)
        self._lengths: dict[int, int] = {}

    def begin(self, answers: int) -> Iterator[bytes]:
        """Yield nothing."""
        return iter(())

    def part(self, at: int, part: Part) -> Iterator[bytes]:
        """Yield what is sent of a part of the ``at``-th answer."""
        assert isinstance(part, Text)
        yield self._chunk(at, {"text": part.text}, None, part.chances)

    def end(self, at: int, generation: Generation) -> Iterator[bytes]:
        """Yield what the ``at``-th answer ends with."""
        yield self._chunk(at, {"text": ""}, finish_reason(generation))

    def _content(self, found: Whole) -> dict[str, Any]:
        return {"text": found.text}

    def _told(self, at: int, chances: Sequence[Chance]) -> dict[str, Any] | None:
        if not chances:
            return None
        offsets = []
        for each in chances:
            offsets.append(self._lengths.get(at, 0))
            self._lengths[at] = offsets[-1] + len(each.token)
        return {
            "tokens": [each.token for each in chances],
            "token_logprobs": [each.log for each in chances],
            "top_logprobs": [dict(each.likeliest) for each in chances],
            "text_offset": offsets,
        }


def finish_reason(generation: Generation, called: bool = False) -> str:
    """Say why an answer ended, in OpenAI's words."""
    if generation.ended in LIMITS:
        return "length"
    return "tool_calls" if called else "stop"


def usage(generations: Sequence[Generation]) -> dict[str, Any]:
    """Say how many tokens there were."""
    counts = usage_counts(generations)
    return {
        "prompt_tokens": counts.prompt,
        "completion_tokens": counts.new,
        "total_tokens": counts.prompt + counts.new,
        "prompt_tokens_details": {"cached_tokens": counts.reused},
    }


def _call_delta(part: CallBegun | Arguments) -> dict[str, Any]:
    if isinstance(part, Arguments):
        return {"index": part.at, "function": {"arguments": part.text}}
    function = {"name": part.name, "arguments": ""}
    return {"index": part.at, "id": part.id, "type": "function", "function": function}


def _chance(each: Chance) -> dict[str, Any]:
    return _token(each.token, each.log) | {
        "top_logprobs": [_token(token, log) for token, log in each.likeliest]
    }


def _token(token: str, log: float) -> dict[str, Any]:
    spelled = "\N{REPLACEMENT CHARACTER}" not in token  # else a part of a character
    return {"token": token, "logprob": log, "bytes": list(token.encode()) if spelled else None}
