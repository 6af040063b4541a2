"""Puts answers into the forms that OpenAI's clients read: whole, or chunk by chunk."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator
from typing import Any

from hybrid.serve.engine import Piece
from hybrid.session.generation import Generation

_LIMITS = ("max_new_tokens", "context full")
DONE = b"data: [DONE]\n\n"
"""Ends a stream."""


def encoded(value: object) -> bytes:
    """Return a value as JSON, whatever letters are in it."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode("ascii")


def event(value: object) -> bytes:
    """Return a value as an event of a stream."""
    return b"data: " + encoded(value) + b"\n\n"


class Answer:
    """An answer to one request.

    Parameters
    ----------
    model
        What the model is called.
    chat
        Whether it is a chat's, or a completion's.
    include_usage
        Whether a stream ends with how many tokens there were.
    """

    def __init__(self, model: str, *, chat: bool, include_usage: bool = False) -> None:
        self._chat, self._include_usage = chat, include_usage
        prefix, kind = ("chatcmpl", "chat.completion") if chat else ("cmpl", "text_completion")
        self._kind, self._chunk_kind = kind, f"{kind}.chunk" if chat else kind
        self._head = {
            "id": f"{prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }

    def begin(self) -> Iterator[bytes]:
        """Yield what a stream begins with."""
        if self._chat:
            yield self._chunk({"delta": {"role": "assistant", "content": ""}})

    def piece(self, piece: Piece) -> bytes:
        """Return the chunk of a piece of text."""
        if self._chat:
            return self._chunk({"delta": {_field(piece.thought): piece.text}})
        return self._chunk({"text": piece.text})

    def end(self, generation: Generation) -> Iterator[bytes]:
        """Yield what a stream ends with."""
        empty: dict[str, Any] = {"delta": {}} if self._chat else {"text": ""}
        yield self._chunk(empty, finish_reason(generation))
        if self._include_usage:
            body = self._head | {"object": self._chunk_kind, "choices": []}
            yield event(body | {"usage": usage(generation)})
        yield DONE

    def whole(self, pieces: list[Piece], generation: Generation) -> dict[str, Any]:
        """Return the answer of all pieces."""
        text = "".join(piece.text for piece in pieces if not piece.thought)
        thoughts = "".join(piece.text for piece in pieces if piece.thought)
        content: dict[str, Any] = {"text": text}
        if self._chat:
            message = {"role": "assistant", "content": text, "refusal": None}
            content = {"message": message | ({"reasoning_content": thoughts} if thoughts else {})}
        return self._head | {
            "object": self._kind,
            "choices": [_choice(content, finish_reason(generation))],
            "usage": usage(generation),
        }

    def _chunk(self, content: dict[str, Any], reason: str | None = None) -> bytes:
        body = self._head | {"object": self._chunk_kind, "choices": [_choice(content, reason)]}
        return event(body | ({"usage": None} if self._include_usage else {}))


def finish_reason(generation: Generation) -> str:
    """Say why an answer ended, in OpenAI's words."""
    return "length" if generation.ended in _LIMITS else "stop"


def usage(generation: Generation) -> dict[str, Any]:
    """Say how many tokens there were."""
    times = generation.times
    prompt = times.prompt_tokens + times.kept_tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": times.new_tokens,
        "total_tokens": prompt + times.new_tokens,
        "prompt_tokens_details": {"cached_tokens": times.kept_tokens},
    }


def _choice(content: dict[str, Any], reason: str | None) -> dict[str, Any]:
    return {"index": 0, **content, "logprobs": None, "finish_reason": reason}


def _field(thought: bool) -> str:
    return "reasoning_content" if thought else "content"
