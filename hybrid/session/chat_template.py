"""Applies a model's chat template; what it refuses is said in its words."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError, UndefinedError
from jinja2.exceptions import SecurityError

from hybrid.errors import UsageError, first_line

CHANNEL_TOKENS = {"<|channel|>", "<|message|>"}
"""The special tokens that a tokenizer of channels (gpt-oss) has."""
_ANSWER = "answered-so"
"""What stands where an answer would, to see what a template puts behind it."""


def templated(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]
) -> str:
    """Return the text that asks for the answer to ``messages``.

    Raises
    ------
    UsageError
        When these are no messages, the template refuses them, is damaged, or makes nothing of them.
    """
    _check(messages)
    try:
        text: str = tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, tokenize=False, **variables
        )
    except TemplateSyntaxError as error:
        raise UsageError(
            f"the chat template is damaged in line {error.lineno}: {error.message}",
            hint="give another one with --chat-template",
        ) from error
    except UndefinedError as error:
        raise UsageError(
            f"the chat template wants what it was not given: {first_line(error)}",
            hint=_wants(str(error)),
        ) from error
    except SecurityError as error:
        raise UsageError(
            f"the chat template does what no template may: {first_line(error)}",
            hint="give another one with --chat-template",
        ) from error
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError, LookupError) as error:
        raise UsageError(
            f"the chat template refuses these messages: {first_line(error)}",
            hint="give other messages (without --system, say), or another --chat-template",
        ) from error
    if not text:
        raise UsageError(
            "the chat template makes an empty prompt of these messages",
            hint="give another one with --chat-template",
        )
    return text


def thinking_switches(template: str, *, on: bool = False) -> dict[str, bool]:
    """Return the variables by which a template switches thinking off, or on."""
    names = ("enable_thinking", "thinking", "think")
    return {name: on for name in names if takes_variable(template, name)}


def takes_variable(template: str, name: str) -> bool:
    """Whether a template speaks of a variable of this name, and not of a part of another."""
    return re.search(rf"(?<![\w.'\"]){name}\b", template) is not None


def thought_field(template: str) -> str | None:
    """Return the part of a message in which a template wants thoughts back; None: it does not."""
    fields = ("reasoning_content", "thinking", "reasoning")
    read = (rf"""\w\s*(?:\.\s*|\[\s*['"]|\.get\(\s*['"]){name}\b""" for name in fields)
    return next(
        (name for name, text in zip(fields, read, strict=True) if re.search(text, template)), None
    )


def turn_ends(tokenizer: Any) -> list[int]:
    """Return the id of the special token that a chat template ends an answer with, if it has one.

    A template of channels ends each of their messages so, not only the answer: of that there is
    none.
    """
    added = tokenizer.get_added_vocab() if hasattr(tokenizer, "get_added_vocab") else {}
    if not added or set(added) >= CHANNEL_TOKENS:
        return []
    said = (("user", "?"), ("assistant", _ANSWER), ("user", "?"))
    messages = [{"role": role, "content": content} for role, content in said]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception:  # whatever a template dislikes about these is told of messages that are sent
        return []
    rest = text.partition(_ANSWER)[2].lstrip()
    begun = [token for token in added if token and rest.startswith(token)]
    return [added[max(begun, key=len)]] if begun else []


def _wants(text: str) -> str:
    name = re.search(r"'(\w+)' is undefined", text)
    if name is None:
        return "give another one with --chat-template"
    return f"give it with --template-arg {name[1]}=..., or another --chat-template"


def _check(messages: Any) -> None:
    """Refuse what is no list of messages with a role and a content."""
    if isinstance(messages, str) or not isinstance(messages, Sequence) or not messages:
        raise UsageError(
            f"messages are {messages!r:.60}, not a list with at least one message",
            hint='give [{"role": "user", "content": "..."}]',
        )
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise UsageError(
                f"message {number} is {message!r:.60}, without a role",
                hint='give {"role": "user", "content": "..."}',
            )
        content = message.get("content")
        if not isinstance(content, str | list) and "tool_calls" not in message:
            raise UsageError(
                f"the content of message {number} is {content!r}, neither a text nor parts of one",
                hint='give {"role": "user", "content": "..."}',
            )
