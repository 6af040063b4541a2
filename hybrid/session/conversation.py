"""A conversation: what was said, what of it is sent again, and what is left of the context."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from hybrid.errors import UsageError
from hybrid.session.chat_template import thought_field
from hybrid.session.generation import Generation
from hybrid.session.kept_cache import KeptCache
from hybrid.session.model import HybridModel, Message

LEAST_LEFT = 32
"""Tokens of the context below which an answer is not begun, unless fewer are asked for."""

NEARLY_FULL = 4
"""What part of the context is left when that is told, where an answer may want more."""

UNBOUNDED = 1 << 20
"""New tokens of an answer at most, where the model says nothing of its context."""


class Conversation:
    """Asks a model one message after the other.

    Each turn computes its own tokens only: the cache of the last one is kept. Thoughts are told and
    sent again only in the part of a message where the chat template looks for them. An answer may
    be as long as the context has room, unless fewer tokens are asked for.

    Parameters
    ----------
    model
        Who answers.
    system
        The message that it begins with.
    template_args
        Variables of the chat template.
    may_drop
        Asked with a question in words whether the oldest turns may be left out, never the system
        message, when the model's context has no room for the next answer; else that is refused.
    tell
        Called with what happens to the conversation, a line each.

    Attributes
    ----------
    messages
        What is sent with the next message.
    last
        How the last answer came about; None where there is none, or it was interrupted.
    """

    def __init__(
        self,
        model: HybridModel,
        *,
        system: str | None = None,
        template_args: Mapping[str, Any] | None = None,
        may_drop: Callable[[str], bool] = lambda question: True,
        tell: Callable[[str], object] = lambda line: None,
    ) -> None:
        self._model = model
        self._template_args = dict(template_args or {})
        self._may_drop = may_drop
        self._tell = tell
        self._kept = KeptCache()
        self.messages: list[Message] = []
        self.last: Generation | None = None
        self.set_system(system)

    @property
    def system(self) -> str | None:
        """The system message; None without."""
        return self.messages[0]["content"] if self._first else None

    @property
    def turns(self) -> int:
        """Questions that were answered and are sent with the next one."""
        return (len(self.messages) - self._first) // 2

    @property
    def context(self) -> int | None:
        """The most tokens that the model takes; None when it does not say."""
        return self._model.context

    def clear(self) -> None:
        """Forget all but the system message."""
        self.messages = self.messages[: self._first]
        self._kept.forget()

    def set_system(self, text: str | None) -> None:
        """Begin with another system message from now on, or with none."""
        begin: list[Message] = [] if text is None else [{"role": "system", "content": text}]
        self.messages = begin + self.messages[self._first :]

    def go_on_from(self, messages: Sequence[Message]) -> None:
        """Forget what was said, and go on from a conversation whose ``messages`` were kept."""
        self.messages = list(messages)
        self._kept.forget()

    def undo(self) -> str:
        """Take the last question and its answer back; returns the question.

        Raises
        ------
        UsageError
            When there is none.
        """
        if not self.turns:
            raise UsageError("nothing was said yet that could be taken back", hint="ask something")
        self.messages, (asked, _) = self.messages[:-2], self.messages[-2:]
        question: str = asked["content"]
        return question

    def tokens(self) -> int:
        """Return how many tokens of the context a next, empty message would take."""
        return int(self._encoded([*self.messages, {"role": "user", "content": ""}]).shape[1])

    def ask(
        self,
        text: str,
        *,
        on_text: Callable[[str], None] = lambda piece: None,
        on_thought: Callable[[str], None] = lambda piece: None,
        **options: Any,
    ) -> str:
        """Return the answer to ``text``; both are part of the conversation then.

        An answer that is interrupted is part of it as far as it came; without any, neither is.

        Raises
        ------
        UsageError
            When the context has no room for it.
        """
        asked, ids = self._with_room([*self.messages, {"role": "user", "content": text}], options)
        if options.get("max_new_tokens") is None:  # more than there is room for: to its end
            options["max_new_tokens"] = self._model.context or UNBOUNDED
        self.last = None
        pieces: list[str] = []
        thoughts: list[str] = []

        def piece_of_answer(piece: str) -> None:
            pieces.append(piece)
            on_text(piece)

        def piece_of_thought(piece: str) -> None:
            thoughts.append(piece)
            on_thought(piece)

        try:
            self.last = self._model.write(
                ids,
                on_text=piece_of_answer,
                on_thought=piece_of_thought,
                kept=self._kept,
                **options,
            )
        except KeyboardInterrupt:
            if pieces:
                self._add(asked, pieces, thoughts)
            raise
        if thoughts and not "".join(pieces).strip():
            self._tell(
                "the answer ended within its thoughts, which are not sent again: ask for more "
                "tokens, or for an answer without thinking"
            )
        self._add(asked, pieces, thoughts)
        return "".join(pieces)

    @property
    def _first(self) -> int:
        """Messages before the first turn."""
        return int(bool(self.messages) and self.messages[0]["role"] == "system")

    def _add(self, asked: list[Message], pieces: list[str], thoughts: list[str]) -> None:
        answer = {"role": "assistant", "content": "".join(pieces)}
        tokenizer = getattr(self._model, "tokenizer", None)
        field = thought_field(str(getattr(tokenizer, "chat_template", None) or ""))
        if field is not None and thoughts and answer["content"].strip():
            answer[field] = "".join(thoughts).strip()
        self.messages = [*asked, answer]

    def _with_room(
        self, asked: list[Message], options: dict[str, Any]
    ) -> tuple[list[Message], Tensor]:
        """Return the messages to send, without the oldest if need be, and their ids."""
        context, ids = self._model.context, self._encoded(asked)
        if context is None:
            return asked, ids
        wanted = int(options.get("max_new_tokens") or context)
        least = min(wanted, LEAST_LEFT)
        first, dropped = self._first, 0
        full = tokens = ids.shape[1]
        while context - tokens < least and len(asked) - first > 2:
            asked = asked[:first] + asked[first + 2 :]  # a question and its answer
            dropped += 1
            ids = self._encoded(asked)
            tokens = ids.shape[1]
        left = max(0, context - tokens)
        if dropped:
            told = f"the conversation has {full} tokens and the model's context is {context}"
            turns = f"the oldest {dropped} turns" if dropped > 1 else "the oldest turn"
            if not self._may_drop(f"{told}: drop {turns}?"):
                raise UsageError(
                    f"{told}: there is no room for an answer",
                    hint="/clear forgets it; or let the oldest turns be left out",
                )
            self._tell(
                f"context full: the oldest turns ({dropped}) were dropped, {left} of {context} "
                "tokens are left for the answer; /clear forgets all"
            )
        elif left < min(wanted, context // NEARLY_FULL):
            self._tell(
                f"the context is nearly full: {left} of {context} tokens are left for the answer; "
                "/clear forgets what was said"
            )
        return asked, ids

    def _encoded(self, messages: list[Message]) -> Tensor:
        return self._model.encode_chat(messages, **self._template_args)
