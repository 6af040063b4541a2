"""What an answer consists of, whatever the protocol: text, thoughts, calls of tools."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Chance(NamedTuple):
    """A token's text and the logarithm of its probability, and those of the likeliest ones."""

    token: str
    log: float
    likeliest: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Text:
    """A piece of the text; with what is known of its tokens, where that was asked for."""

    text: str
    chances: tuple[Chance, ...] = ()


@dataclass(frozen=True)
class Thought:
    """A piece of what the model thinks before it answers."""

    text: str


@dataclass(frozen=True)
class CallBegun:
    """A call of a tool, the ``at``-th of the answer, begins."""

    at: int
    id: str
    name: str


@dataclass(frozen=True)
class Arguments:
    """A piece of a call's arguments, which are JSON when they are complete."""

    at: int
    text: str


Part = Text | Thought | CallBegun | Arguments


@dataclass
class Call:
    """A call of a tool, whole."""

    id: str
    name: str
    arguments: str = ""

    @property
    def value(self) -> dict[str, Any]:
        """The arguments as an object; empty where the model wrote none."""
        try:
            found = json.loads(self.arguments)
        except (ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}


@dataclass
class Whole:
    """All parts of an answer, put together."""

    text: str = ""
    thoughts: str = ""
    calls: list[Call] = field(default_factory=list)
    chances: list[Chance] = field(default_factory=list)

    @classmethod
    def of(cls, parts: Iterable[Part]) -> Whole:
        """Put parts together."""
        whole = cls()
        texts, thoughts = [], []
        for part in parts:
            if isinstance(part, Text):
                texts.append(part.text)
                whole.chances += part.chances
            elif isinstance(part, Thought):
                thoughts.append(part.text)
            elif isinstance(part, CallBegun):
                whole.calls.append(Call(part.id, part.name))
            else:
                whole.calls[part.at].arguments += part.text
        whole.text, whole.thoughts = "".join(texts), "".join(thoughts)
        return whole
