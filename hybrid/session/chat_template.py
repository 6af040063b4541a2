"""Applies a model's chat template; what it refuses is said in its words."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError, UndefinedError
from jinja2.exceptions import SecurityError

from hybrid.errors import UsageError, first_line


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


def thinking_switches(template: str) -> dict[str, bool]:
    """Return the variables by which a template switches thinking off."""
    names = ("enable_thinking", "thinking", "think")
    return {name: False for name in names if re.search(rf"(?<![\w.'\"]){name}\b", template)}


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
