"""Keeps a conversation's messages in a file, and reads them back."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hybrid.errors import UsageError
from hybrid.paths import write_whole

SCHEMA = "hybrid.chat/1"
"""How such a file says what it is."""
_MOST_BYTES = 64 << 20
_FIELDS = ("role", "content", "reasoning_content", "thinking", "reasoning")


def save_chat(file: Path, messages: Sequence[dict[str, Any]]) -> None:
    """Write messages whole or not at all; takes the place of a saved conversation only.

    Raises
    ------
    UsageError
        When ``file`` cannot be written, or is something else.
    """
    try:
        there = file.exists()
    except OSError as error:  # a name too long, a folder that is closed
        raise UsageError(
            f"cannot write {str(file)!r:.300}: {error.strerror}", hint="choose another name"
        ) from error
    if there:
        try:
            load_chat(file)
        except UsageError as error:
            raise UsageError(
                f"{file} exists and is no saved conversation, it stays as it is",
                hint="choose another name, or remove it first",
            ) from error
    saved = {"schema": SCHEMA, "messages": list(messages)}
    write_whole(file, json.dumps(saved, ensure_ascii=False, indent=1) + "\n")


def load_chat(file: Path) -> list[dict[str, Any]]:
    """Return the messages of a saved conversation: a system message or none, then whole turns.

    Raises
    ------
    UsageError
        When it cannot be read, or is none.
    """
    try:
        if file.exists() and not file.is_file():
            raise UsageError(f"{file} is no file", hint="give the file that /save wrote")
        if (size := file.stat().st_size) > _MOST_BYTES:
            raise UsageError(
                f"{file} has {size} bytes, a saved conversation at most {_MOST_BYTES}",
                hint="give the file that /save wrote",
            )
        data = file.read_bytes()
    except OSError as error:
        raise UsageError(
            f"cannot read {str(file)!r:.300}: {error.strerror}",
            hint="check the path and its permissions",
        ) from error
    try:
        saved = json.loads(data.decode())
    except (ValueError, RecursionError) as error:
        words = "it nests too deeply" if isinstance(error, RecursionError) else str(error)
        raise UsageError(
            f"{file} is damaged: {words:.200}", hint="give the file that /save wrote"
        ) from error
    return _checked(file, saved)


def _checked(file: Path, saved: Any) -> list[dict[str, Any]]:
    """Return the messages of what a file holds, if that is a conversation."""
    hint = "give the file that /save wrote"
    if not isinstance(saved, dict) or saved.get("schema") != SCHEMA:
        schema = saved.get("schema") if isinstance(saved, dict) else None
        raise UsageError(
            f"{file} is no saved conversation: its schema is {schema!r:.60}, not {SCHEMA!r}",
            hint=hint,
        )
    messages = saved.get("messages")
    if not isinstance(messages, list):
        raise UsageError(f"{file}: messages is {messages!r:.60}, no list", hint=hint)
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not {"role", "content"} <= set(message):
            raise UsageError(f"{file}: message {number} has no role and content", hint=hint)
        if odd := next((name for name in message if name not in _FIELDS), None):
            raise UsageError(f"{file}: message {number} has a part {odd!r:.60}", hint=hint)
        if odd := next((name for name in message if not _is_text(message[name])), None):
            raise UsageError(
                f"{file}: {odd} of message {number} is {message[odd]!a:.60}, no text", hint=hint
            )
    roles = [message["role"] for message in messages]
    first = int(roles[:1] == ["system"])
    for number, role in enumerate(roles[first:]):
        if role != ("user", "assistant")[number % 2]:
            raise UsageError(
                f"{file}: message {first + number + 1} is of {role!r:.60}, where "
                f"{('user', 'assistant')[number % 2]!r} follows",
                hint=hint,
            )
    if (len(roles) - first) % 2:
        raise UsageError(f"{file}: the last question has no answer", hint=hint)
    return messages


def _is_text(value: Any) -> bool:
    """Whether it is a text that can be written as UTF-8."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False
