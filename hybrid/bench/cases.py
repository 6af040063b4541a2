"""What ``hybrid bench peers`` measures, whoever runs it."""

from __future__ import annotations

from typing import NamedTuple, Protocol


class Case(NamedTuple):
    """One comparison: what is timed is the prompt, or the tokens after it.

    With ``again`` the prompt stays in the cache from one turn to the next.
    """

    name: str
    prompt: int
    generate: int
    decode: bool
    again: bool = False


CASES = (
    Case("decode", 32, 64, True),
    Case("prefill of 512", 512, 1, False),
    Case("prefill of 32", 32, 1, False),
)


def long_case(context: int) -> Case:
    """Decoding with ``context`` tokens in the cache."""
    return Case(f"decode after {context}", context, 32, True, again=True)


class Peer(Protocol):
    """What is compared with, and which version of it that is."""

    name: str
    about: str

    def measure(self, case: Case) -> float:
        """Return the seconds of the prompt, or of one token after it."""
        ...
