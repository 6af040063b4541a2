"""Tells a model's thoughts from its answer as its tokens come.

Two ways of marking them are known: tags around a thought (``<think>`` ... ``</think>``), which are
tokens of their own or plain text at the beginning, and channels (gpt-oss), where every message has
a header that names its channel, and ``final`` is the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

from hybrid.session.chat_template import CHANNEL_TOKENS
from hybrid.textstream import TextStream, UntilStop, overlap

TAGS = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
)
"""How a thought begins and ends."""
_CHANNELS = {
    "<|channel|>": "channel",
    "<|start|>": "role",
    "<|message|>": "message",
    "<|end|>": "over",
    "<|return|>": "over",
    "<|call|>": "over",
}
"""What the special tokens of channels begin."""
CHANNEL, MESSAGE, CALL = "<|channel|>", "<|message|>", "<|call|>"
"""How a message to a tool is told where messages have channels: header, arguments, end."""
_TO = "to="
_ANSWER, _THOUGHT, _HEADER = "answer", "thought", "header"
_PROMPT_END = 16
"""Ids of the prompt in which a thought may have been begun."""


class AnswerStream:
    """The answer in a growing id sequence, piece by piece; thoughts go elsewhere.

    Takes the place of a :class:`~hybrid.textstream.TextStream`; stop strings count in the answer.

    Parameters
    ----------
    tokenizer, prompt_ids, stop_strings
        As of a TextStream.
    on_thought
        Called with each piece of a thought.
    marks
        Special tokens that are told as text: what calls of tools are marked with. With channels
        these tell a message that is to a tool whole, its header before it.

    Attributes
    ----------
    stopped
        Whether a stop string was met.
    """

    def __init__(
        self,
        tokenizer: Any,
        prompt_ids: Sequence[int] = (),
        stop_strings: Sequence[str] = (),
        on_thought: Callable[[str], None] | None = None,
        marks: Collection[str] = (),
    ) -> None:
        self._tokenizer = tokenizer
        self._on_thought = on_thought or (lambda piece: None)
        self._cut = UntilStop(stop_strings)
        self._text = TextStream(tokenizer, prompt_ids)
        self._marks = _marks(tokenizer)
        self._shown = {} if not marks else _ids_of(tokenizer, marks)
        self._calls = CHANNEL in marks
        self._calling = False  # this message is to a tool
        self._state, self._header, self._channel = _ANSWER, "", ""
        self._blank = True  # nothing of the answer has come yet
        self._thought = False  # a thought came before it
        self._held = ""
        self._ends = {close for _, close in TAGS}
        end = tokenizer.decode(list(prompt_ids[-_PROMPT_END:]), skip_special_tokens=False)
        if any(end.rstrip().endswith(begin) for begin, _ in TAGS):
            self._state = _THOUGHT

    @property
    def stopped(self) -> bool:
        return self._cut.stopped

    @property
    def thinking(self) -> bool:
        """Whether what came last belongs to a thought, so that a limit cut it."""
        return self._state != _ANSWER

    def put(self, ids: Sequence[int]) -> str:
        """Take the next ids and return what of the answer is certain by now."""
        answer = ""
        for token in ids:
            mark = self._marks.get(token)
            if mark is None:
                shown = self._shown.get(token)
                if shown is None:
                    answer += self._take(self._text.put([token]))
                    continue
                answer += self._take(self._text.finish() + shown)
                self._text = TextStream(self._tokenizer)
            else:
                answer += self._take(self._text.finish(), whole=True)
                answer += self._turn(mark)
                self._text = TextStream(self._tokenizer)
        return answer

    def finish(self) -> str:
        """Return what was held back, once no more ids will come."""
        return self._take(self._text.finish(), whole=True) + self._cut.rest()

    def _turn(self, mark: str) -> str:
        """Go on to what a special token begins; returns what it tells."""
        if mark in ("channel", "role"):
            kept = self._header if self._calls and mark == "channel" and _TO in self._header else ""
            self._channel = mark
            self._state, self._header = _HEADER, f"{kept} " if kept else ""
        elif mark == "message":
            header = self._header.split()
            final = self._channel != "channel" or header[:1] == ["final"]
            self._calling = self._calls and _TO in self._header
            self._state = _ANSWER if final or self._calling else _THOUGHT
            if self._calling:
                return self._tell(f"{CHANNEL}{self._header}{MESSAGE}")
        elif mark == "over":
            self._channel = ""
            if self._calling:
                self._calling = False
                return self._tell(CALL)
        else:
            self._state = _ANSWER if mark in self._ends else _THOUGHT
            self._blank = True
        return ""

    def _take(self, piece: str, *, whole: bool = False) -> str:
        """Hand a piece on to where it belongs; hold back an end that may become a tag."""
        if self._state == _HEADER:
            self._header += piece
            return ""
        text, self._held = self._held + piece, ""
        answer = ""
        while text:
            if self._state == _THOUGHT:
                at, tag = _first(text, [close for _, close in TAGS])
            elif self._blank:
                at, tag = _first(text, [begin for begin, _ in TAGS])
                if at >= 0 and text[:at].strip():
                    at = -1  # a tag that an answer speaks of
            else:
                at, tag = -1, ""
            if at < 0:
                keep = 0 if whole else self._unsure(text)
                self._held, text = text[len(text) - keep :], text[: len(text) - keep]
                return answer + self._tell(text)
            answer += self._tell(text[:at])
            self._state = _ANSWER if self._state == _THOUGHT else _THOUGHT
            self._blank = True
            text = text[at + len(tag) :]
        return answer

    def _unsure(self, text: str) -> int:
        """Return how many last letters may be the beginning of a tag."""
        if self._state == _THOUGHT:
            return max(overlap(text, close) for _, close in TAGS)
        return max(overlap(text, begin) for begin, _ in TAGS) if self._blank else 0

    def _tell(self, text: str) -> str:
        if self._state == _THOUGHT:
            self._thought = True
            if text:
                self._on_thought(text)
            return ""
        if self._blank:
            text = text.lstrip("\n") if self._thought else text
            self._blank = not text.strip()
        return self._cut.put(text)


def _marks(tokenizer: Any) -> dict[int, str]:
    """Return what the ids of a tokenizer's own marks begin or end."""
    added = tokenizer.get_added_vocab() if hasattr(tokenizer, "get_added_vocab") else {}
    marks = {added[tag]: tag for pair in TAGS for tag in pair if tag in added}
    if set(added) >= CHANNEL_TOKENS:
        marks |= {added[token]: what for token, what in _CHANNELS.items() if token in added}
    return marks


def _ids_of(tokenizer: Any, marks: Collection[str]) -> dict[int, str]:
    """Return the texts of those special tokens that a tokenizer has, by their ids."""
    added = tokenizer.added_tokens_decoder if hasattr(tokenizer, "added_tokens_decoder") else {}
    found = ((token, each) for token, each in added.items() if each.special)
    return {token: each.content for token, each in found if each.content in marks}


def _first(text: str, tags: Sequence[str]) -> tuple[int, str]:
    """Return where the first of ``tags`` begins, and which it is; -1 without."""
    found = [(at, tag) for tag in tags if (at := text.find(tag)) >= 0]
    return min(found, default=(-1, ""))
