"""What a conversation is told beside messages: lines of ``hybrid chat`` that begin with a slash."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from hybrid.errors import UsageError
from hybrid.paths import expanded

if TYPE_CHECKING:
    from hybrid.cli.generation import Summary
    from hybrid.session.conversation import Conversation

_EXITS = {"/exit", "/quit", "/bye"}
_HELP = {
    "/help": "list these commands",
    "/system [TEXT]": "show the system message, or begin with another one; a dash removes it",
    "/clear": "forget the conversation, not the system message",
    "/undo": "take the last question and its answer back",
    "/retry": "ask the last question again",
    "/save FILE": "write the conversation to a file",
    "/load FILE": "go on with a conversation from such a file",
    "/stats": "how much of the context is used, and how fast the last answer was",
    "/exit": "end; so does Ctrl-D",
}
_FOOT = (
    "Ctrl-C stops an answer. A line that ends in a backslash goes on in the next one; a message "
    "that begins with a slash is written with two."
)


class Commands:
    """Carries out commands on a conversation; all that they say goes to stderr.

    Parameters
    ----------
    answer
        Asks a question and shows the answer.
    summary
        Told of every answer.

    Attributes
    ----------
    over
        Whether the conversation was ended.
    """

    def __init__(
        self, conversation: Conversation, answer: Callable[[str], None], summary: Summary
    ) -> None:
        self._conversation, self._answer, self._summary = conversation, answer, summary
        self.over = False
        self._plain = {
            "/help": self._help,
            "/clear": self._clear,
            "/undo": self._undo,
            "/retry": self._retry,
            "/stats": self._stats,
            **dict.fromkeys(_EXITS, self._exit),
        }
        self._given = {"/save": self._save, "/load": self._load}

    def run(self, line: str) -> None:
        """Carry out a ``line`` that begins with a slash.

        Raises
        ------
        UsageError
            When there is no such command, or it cannot be done.
        """
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        if name == "/system":
            self._system(rest)
        elif name in self._given:
            if not rest:
                raise UsageError(f"{name} has no file", hint=f"for example {name} talk.json")
            self._given[name](rest)
        elif name in self._plain:
            if rest:
                raise UsageError(f"{name} takes nothing, it was given {rest!r:.60}", hint=name)
            self._plain[name]()
        else:
            raise UsageError(
                f"there is no command {name!r:.60}",
                hint="/help lists them; a message that begins with a slash is written with two",
            )

    def _help(self) -> None:
        for name, what in _HELP.items():
            _say(f"  {name:<15} {what}")
        _say(_FOOT)

    def _system(self, text: str) -> None:
        if text:
            self._conversation.set_system(None if text == "-" else text)
        system = self._conversation.system
        _say("there is no system message" if system is None else f"the system message: {system}")

    def _clear(self) -> None:
        self._conversation.clear()
        _say("the conversation is forgotten")

    def _undo(self) -> None:
        _say(f"taken back: {self._conversation.undo()}")

    def _retry(self) -> None:
        before = list(self._conversation.messages)
        text = self._conversation.undo()
        undone = list(self._conversation.messages)
        try:
            self._answer(text)
        finally:
            if self._conversation.messages == undone:  # no answer came
                self._conversation.messages = before

    def _save(self, name: str) -> None:
        from hybrid.session.saved_chat import save_chat

        file = _file(name)
        save_chat(file, self._conversation.messages)
        _say(f"wrote {file}: {self._turns()}")

    def _load(self, name: str) -> None:
        from hybrid.session.saved_chat import load_chat

        file = _file(name)
        self._conversation.go_on_from(load_chat(file))
        _say(f"read {file}: {self._turns()}")

    def _stats(self) -> None:
        tokens, context = self._conversation.tokens(), self._conversation.context
        of = "" if context is None else f" of the context's {context}"
        _say(f"{self._turns()}, {tokens} tokens{of}")
        if self._conversation.last is not None:
            self._summary.tell()

    def _exit(self) -> None:
        self.over = True

    def _turns(self) -> str:
        turns = self._conversation.turns
        return f"{turns} turn{'' if turns == 1 else 's'}"


def _file(name: str) -> Path:
    """Return the file of this name, as it was typed."""
    if "\0" in name:
        raise UsageError(f"no file can be called {name!r:.60}", hint="choose another name")
    return expanded(name)


def _say(line: str) -> None:
    print(line, file=sys.stderr)
