"""A conversation: what was said, what of it is sent again, and what is left of the context."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from hybrid.errors import UsageError
from hybrid.session.generation_options import DEFAULT_NEW_TOKENS
from hybrid.session.kept_cache import KeptCache
from hybrid.session.model import HybridModel, Message

LEAST_LEFT = 32
"""Tokens of the context below which an answer is not begun, unless fewer are asked for."""

NEARLY_FULL = 4
"""What part of the context is left when that is told, where an answer may want more."""


class Conversation:
    """Asks a model one message after the other.

    Each turn computes its own tokens only: the cache of the last one is kept. Thoughts are told and
    not sent again.

    Parameters
    ----------
    model
        Who answers.
    system
        The message that it begins with.
    template_args
        Variables of the chat template.
    drop_oldest
        Whether the oldest turns are left out, never the system message, when the model's context
        has no room for the next answer; else that is refused.
    tell
        Called with what happens to the conversation, a line each.

    Attributes
    ----------
    messages
        What is sent with the next message.
    """

    def __init__(
        self,
        model: HybridModel,
        *,
        system: str | None = None,
        template_args: Mapping[str, Any] | None = None,
        drop_oldest: bool = True,
        tell: Callable[[str], object] = lambda line: None,
    ) -> None:
        self._model = model
        self._start: list[Message] = []
        if system is not None:
            self._start.append({"role": "system", "content": system})
        self._template_args = dict(template_args or {})
        self._drop_oldest = drop_oldest
        self._tell = tell
        self._kept = KeptCache()
        self.messages = list(self._start)

    def clear(self) -> None:
        """Forget all but the system message."""
        self.messages = list(self._start)
        self._kept.forget()

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
        pieces: list[str] = []
        thoughts: list[str] = []

        def piece_of_answer(piece: str) -> None:
            pieces.append(piece)
            on_text(piece)

        def piece_of_thought(piece: str) -> None:
            thoughts.append(piece)
            on_thought(piece)

        try:
            self._model.answer(
                ids,
                on_text=piece_of_answer,
                on_thought=piece_of_thought,
                kept=self._kept,
                **options,
            )
        except KeyboardInterrupt:
            if pieces:
                self._add(asked, "".join(pieces))
            raise
        answer = "".join(pieces)
        if thoughts and not answer.strip():
            self._tell(
                "the answer ended within its thoughts, which are not sent again: ask for more "
                "tokens, or for an answer without thinking"
            )
        self._add(asked, answer)
        return answer

    def _add(self, asked: list[Message], answer: str) -> None:
        self.messages = [*asked, {"role": "assistant", "content": answer}]

    def _with_room(
        self, asked: list[Message], options: dict[str, Any]
    ) -> tuple[list[Message], Tensor]:
        """Return the messages to send, without the oldest if need be, and their ids."""
        context, ids = self._model.context, self._encoded(asked)
        if context is None:
            return asked, ids
        wanted = int(options.get("max_new_tokens") or DEFAULT_NEW_TOKENS)
        least = min(wanted, LEAST_LEFT)
        first, dropped = len(self._start), 0
        tokens = ids.shape[1]
        while context - tokens < least and len(asked) - first > 2:
            if not self._drop_oldest:
                raise UsageError(
                    f"the conversation has {tokens} tokens and the model's context is {context}: "
                    "there is no room for an answer",
                    hint="/clear forgets it; or let the oldest turns be left out",
                )
            asked = asked[:first] + asked[first + 2 :]  # a question and its answer
            dropped += 1
            ids = self._encoded(asked)
            tokens = ids.shape[1]
        left = max(0, context - tokens)
        if dropped:
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
