"""What all answers are sent with: JSON, events of streams, counts of tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

from hybrid.serve.parts import Part
from hybrid.serve.refusals import Refusal
from hybrid.session.generation import Generation


class Answer(Protocol):
    """Puts the answers to one request into the form of a protocol."""

    def begin(self, answers: int) -> Iterator[bytes]:
        """Yield what a stream of so many answers begins with."""

    def part(self, at: int, part: Part) -> Iterator[bytes]:
        """Yield what is sent of a part of the ``at``-th answer."""

    def end(self, at: int, generation: Generation) -> Iterator[bytes]:
        """Yield what the ``at``-th answer ends with."""

    def close(self, generations: Sequence[Generation]) -> Iterator[bytes]:
        """Yield what a stream ends with."""

    def failed(self, refusal: Refusal) -> Iterator[bytes]:
        """Yield what ends a stream before its time."""

    def whole(self, answers: Sequence[tuple[list[Part], Generation]]) -> dict[str, Any]:
        """Return all answers, of all of their parts."""


class Counts(NamedTuple):
    """Tokens of the prompt, those of them that were there before, and new ones."""

    prompt: int
    reused: int
    new: int


def usage_counts(generations: Sequence[Generation]) -> Counts:
    """Count the tokens of the answers to one prompt."""
    times = [generation.times for generation in generations]
    return Counts(
        times[0].prompt_tokens + times[0].kept_tokens,
        times[0].kept_tokens,
        sum(each.new_tokens for each in times),
    )


def encoded(value: object) -> bytes:
    """Return a value as JSON, whatever letters are in it."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode("ascii")


def data(value: object) -> bytes:
    """Return a value as an event of a stream."""
    return b"data: " + encoded(value) + b"\n\n"


def named(name: str, value: object) -> bytes:
    """Return a value as an event with a name."""
    return b"event: " + name.encode() + b"\n" + data(value)
