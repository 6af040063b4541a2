"""Reads messages of OpenAI's form into those that chat templates take."""

from __future__ import annotations

import json
from typing import Any

from hybrid.serve.call_formats import DEEPSEEK, call_format
from hybrid.serve.fields import Fields
from hybrid.serve.refusals import Refusal, not_taken, wrong_value
from hybrid.serve.served import Served

_ROLES = ("system", "developer", "user", "assistant", "tool")
_NO_TOOLS = "the model's chat template knows no tools; leave it out"
Message = dict[str, Any]


def read_messages(given: object, served: Served) -> list[Message]:
    """Return the messages as a chat template takes them: each content is one text.

    Raises
    ------
    Refusal
        Naming the field.
    """
    if not isinstance(given, list) or not given:
        raise wrong_value("messages", given, "a list with at least one message")
    names: dict[str, str] = {}
    return [
        _message(Fields(each, f"messages[{at}]."), served, names) for at, each in enumerate(given)
    ]


def system_role(role: str, served: Served) -> str:
    """Return the role as the template knows it: developer is what most call system."""
    known = role != "developer" or "developer" in served.template
    return role if known else "system"


def call_message(id_: str, name: str, arguments: str, served: Served, field: str) -> Message:
    """Return a call that was made as the template takes it.

    Raises
    ------
    Refusal
        When the arguments are no object of JSON.
    """
    try:
        value = json.loads(arguments or "{}")
    except (ValueError, RecursionError) as error:
        raise wrong_value(field, arguments, "an object of JSON") from error
    if not isinstance(value, dict):
        raise wrong_value(field, arguments, "an object of JSON")
    template = served.template
    dumps = "arguments'] | tojson" in template or "arguments']|tojson" in template
    if call_format(template) is DEEPSEEK and not dumps:
        value = arguments or "{}"  # it puts texts together
    return {"id": id_, "type": "function", "function": {"name": name, "arguments": value}}


def check_tools_known(served: Served, field: str) -> None:
    """Refuse what only a template of tools takes.

    Raises
    ------
    Refusal
        Naming the field.
    """
    if "tool" not in served.template:
        raise not_taken(field, _NO_TOOLS)


def result_message(id_: str | None, text: str, names: dict[str, str], field: str) -> Message:
    """Return the message of what a call returned.

    Raises
    ------
    Refusal
        When no message before it has the call.
    """
    if id_ not in names:
        known = ", ".join(map(repr, names)) or "none"
        raise wrong_value(field, id_, f"the id of a call of a message before it: {known:.200}")
    return {"role": "tool", "tool_call_id": id_, "name": names[id_], "content": text}


def read_content(fields: Fields, kinds: tuple[str, ...] = ("text",)) -> str:
    """Return a message's text; parts of it are lines of their own.

    Raises
    ------
    Refusal
        When there is more than text in it.
    """
    content, name = fields.any("content"), fields.name("content")
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise wrong_value(name, content, "a string or a list of parts of text")
    texts = []
    for at, each in enumerate(content):
        part = Fields(each, f"{name}[{at}].")
        kind = part.text("type")
        if kind not in kinds:
            raise no_text(f"{name}[{at}].type", kind)
        text = part.text("text")
        if text is None:
            raise wrong_value(part.name("text"), None, "a string")
        part.finish(frozenset(("cache_control", "annotations", "citations", "logprobs")))
        texts.append(text)
    return "\n".join(texts)


def no_text(param: str, kind: object) -> Refusal:
    """Return the refusal of what is no text."""
    return Refusal(
        f"{param} is {kind!r:.60}: this server reads text alone, no images, sounds or files",
        param=param,
        code="unsupported_content",
    )


def _message(fields: Fields, served: Served, names: dict[str, str]) -> Message:
    role = fields.text("role")
    if role not in _ROLES:
        raise wrong_value(fields.name("role"), role, f"one of {', '.join(_ROLES)}")
    fields.refuse(
        {
            "function_call": ("give tool_calls instead", ()),
            "audio": ("this server reads text alone", ()),
        }
    )
    if role == "tool":
        check_tools_known(served, fields.name("role"))
        id_ = fields.text("tool_call_id")
        fields.text("name")
        text = read_content(fields)
        fields.finish()
        return result_message(id_, text, names, fields.name("tool_call_id"))
    calls = _calls(fields, served, names) if role == "assistant" else []
    empty = calls and fields.any("content") in (None, "", [])
    content = "" if empty else read_content(fields)
    message: Message = {"role": system_role(role, served), "content": content}
    if calls:
        message["tool_calls"] = calls
    for other in ("name", "reasoning_content"):
        value = fields.text(other)
        if value is not None:
            message[other] = value
    fields.finish(frozenset(("refusal", "annotations")))
    return message


def _calls(fields: Fields, served: Served, names: dict[str, str]) -> list[Message]:
    given = fields.any("tool_calls")
    if given is None or given == []:
        return []
    within = fields.name("tool_calls")
    check_tools_known(served, within)
    if not isinstance(given, list):
        raise wrong_value(within, given, "a list of calls")
    calls = []
    for at, each in enumerate(given):
        call = Fields(each, f"{within}[{at}].")
        id_, kind = call.text("id"), call.text("type")
        if id_ is None or kind not in (None, "function"):
            wrong = ("id", None, "a string") if id_ is None else ("type", kind, "function")
            raise wrong_value(call.name(wrong[0]), wrong[1], wrong[2])
        function = Fields(call.any("function"), f"{within}[{at}].function.")
        name = function.text("name")
        if not name:
            raise wrong_value(function.name("name"), name, "a name")
        arguments = function.text("arguments") or "{}"
        calls.append(call_message(id_, name, arguments, served, function.name("arguments")))
        names[id_] = name
        function.finish()
        call.finish(frozenset(("index",)))
    return calls
