"""How families of models write calls of tools, and how such text is read as it comes.

After the families' public chat templates: each format is a generator that reads what stands behind
the mark with which calls begin.
"""

from __future__ import annotations

import json
import re
import secrets
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hybrid.serve.call_source import CallSource, Reading

TOOL_CALL = "<tool_call>"
_TOOL_CALL_END = "</tool_call>"
_FUNCTION, _FUNCTION_END = "<function=", "</function>"
_PARAMETER, _PARAMETER_END = "<parameter=", "</parameter>"
_KEY, _KEY_END = "<arg_key>", "</arg_key>"
_VALUE, _VALUE_END = "<arg_value>", "</arg_value>"
_BAR = "\N{FULLWIDTH VERTICAL LINE}"
SEEK_CALLS, SEEK_CALLS_END = f"<{_BAR}tool▁calls▁begin{_BAR}>", f"<{_BAR}tool▁calls▁end{_BAR}>"
SEEK_CALL, SEEK_CALL_END = f"<{_BAR}tool▁call▁begin{_BAR}>", f"<{_BAR}tool▁call▁end{_BAR}>"
SEEK_SEP = f"<{_BAR}tool▁sep{_BAR}>"
MISTRAL, MISTRAL_ARGS, _MISTRAL_ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"
CHANNEL, MESSAGE, CALL = "<|channel|>", "<|message|>", "<|call|>"
_ARGUMENTS = ("arguments", "parameters")
_LETTERS = string.ascii_letters + string.digits

Types = Callable[[str, str], Any]
"""Returns the schema of a parameter of a tool."""
_Reader = Callable[[CallSource, str, Types], Reading[None]]


@dataclass(frozen=True)
class CallFormat:
    """How a family writes calls.

    Attributes
    ----------
    name
        What it is called in messages.
    begins
        The marks with which calls begin.
    marks
        All that may be special tokens of it, which are then told as text.
    read
        Reads what stands behind such a mark.
    id_letters
        Of a call's id; None for OpenAI's form.
    """

    name: str
    begins: tuple[str, ...]
    marks: frozenset[str]
    read: _Reader
    id_letters: int | None = None

    def new_id(self) -> str:
        """Return the id of another call."""
        letters = self.id_letters or 24
        made = "".join(secrets.choice(_LETTERS) for _ in range(letters))
        return made if self.id_letters else f"call_{made}"


def call_format(template: str) -> CallFormat:
    """Return the format that a chat template's text speaks of; Hermes' where it names none."""
    found = (each for mark, each in _KNOWN if mark in template)
    return next(found, HERMES)


def types_of(tools: list[dict[str, Any]]) -> Types:
    """Return what finds the schema of a tool's parameter."""
    known = {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in tools}

    def of(tool: str, parameter: str) -> Any:
        properties = known.get(tool, {}).get("properties")
        return properties.get(parameter) if isinstance(properties, Mapping) else None

    return of


def read_calls(source: CallSource, form: CallFormat, types: Types) -> Reading[None]:
    """Tell a source's text from its calls; white space around calls is no text."""
    waiting = ""  # white space after which no text has come yet

    def tell(piece: str) -> None:
        nonlocal waiting
        text = waiting + piece
        kept = len(text.rstrip())
        source.tell(text[:kept])
        waiting = text[kept:]

    while True:
        _, mark = yield from source.until(form.begins, tell)
        if not mark:
            source.tell("" if source.calls else waiting)
            return
        waiting = ""
        yield from form.read(source, mark, types)
        yield from source.space()


def _tagged(source: CallSource, mark: str, types: Types) -> Reading[None]:
    """Read a call between tags: an object of JSON, or parameters in tags of their own."""
    if mark == _FUNCTION:
        yield from _function(source, types)
        return
    yield from source.space()
    if source.rest.startswith("{"):
        yield from _object(source)
    elif (yield from source.begins(_FUNCTION)):
        yield from _function(source, types)
    else:
        yield from _keyed(source, types)
        return
    yield from source.until((_TOOL_CALL_END,))


def _object(source: CallSource) -> Reading[None]:
    """Read ``{"name": ..., "arguments": ...}``; what is none of a call is told as text."""
    source.rest = source.rest[1:]
    name, waiting, argued = None, None, False
    while True:
        yield from source.space()
        if not source.rest or (yield from source.begins("}")):
            break
        if (yield from source.begins(",")):
            continue
        if not source.rest.startswith('"'):
            source.tell(source.rest)
            source.rest = ""
            break
        key = yield from source.collected()
        yield from source.space()
        yield from source.begins(":")
        yield from source.space()
        if key == "name":
            name = yield from source.collected()
            if isinstance(name, str):
                source.begin(name)
        elif key in _ARGUMENTS and isinstance(name, str):
            argued = yield from _arguments(source)
        else:
            value = yield from source.collected()
            waiting = value if key in _ARGUMENTS else waiting
    if isinstance(name, str) and not argued:
        text = waiting if isinstance(waiting, str) else json.dumps(waiting or {})
        source.argue(text)


def _arguments(source: CallSource) -> Reading[bool]:
    """Read arguments: an object, or the text of one as a string."""
    if source.rest.startswith('"'):
        value = yield from source.collected()
        source.argue(value if isinstance(value, str) else "{}")
    else:
        yield from source.value(source.argue)
    return True


def _function(source: CallSource, types: Types) -> Reading[None]:
    """Read Qwen3-Coder's ``NAME>`` and its parameters, each between tags."""
    name, mark = yield from source.until((">",))
    if not mark:
        return
    name = name.strip()
    source.begin(name)
    given: dict[str, Any] = {}
    while True:
        _, mark = yield from source.until((_PARAMETER, _FUNCTION_END, _TOOL_CALL_END))
        if mark != _PARAMETER:
            break
        key, _ = yield from source.until((">",))
        value, mark = yield from source.until((_PARAMETER_END, _FUNCTION_END))
        value = value.removeprefix("\n").removesuffix("\n")
        given[key.strip()] = _typed(value, types(name, key.strip()))
        if mark != _PARAMETER_END:
            break
    source.argue(json.dumps(given, ensure_ascii=False))
    if mark == _TOOL_CALL_END:  # whoever reads on waits for it
        source.rest = mark + source.rest


def _keyed(source: CallSource, types: Types) -> Reading[None]:
    """Read GLM's name, and keys and values between tags."""
    name, mark = yield from source.until((_KEY, _TOOL_CALL_END))
    name = name.strip()
    if not name or not mark:
        source.tell(name)
        return
    source.begin(name)
    given: dict[str, Any] = {}
    while mark == _KEY:
        key, _ = yield from source.until((_KEY_END,))
        _, begun = yield from source.until((_VALUE, _TOOL_CALL_END))
        if begun != _VALUE:
            break
        value, _ = yield from source.until((_VALUE_END,))
        given[key.strip()] = _typed(value, types(name, key.strip()))
        _, mark = yield from source.until((_KEY, _TOOL_CALL_END))
    source.argue(json.dumps(given, ensure_ascii=False))


def _deepseek(source: CallSource, mark: str, types: Types) -> Reading[None]:
    """Read DeepSeek's calls: a name and an object, in version 3 within a block of code."""
    if mark == SEEK_CALLS:
        _, mark = yield from source.until((SEEK_CALL, SEEK_CALLS_END))
    while mark == SEEK_CALL:
        name, found = yield from source.until((SEEK_SEP, SEEK_CALL_END))
        if found == SEEK_SEP and name.strip() == "function":
            name, _ = yield from source.until(("\n",))
            yield from source.until(("```json",))
        if found:
            source.begin(name.strip())
            yield from source.value(source.argue)
            yield from source.until((SEEK_CALL_END,))
        _, mark = yield from source.until((SEEK_CALL, SEEK_CALLS_END))


def _mistral(source: CallSource, mark: str, types: Types) -> Reading[None]:
    """Read Mistral's calls: a list of objects, or a name and an object behind it."""
    yield from source.space()
    if (yield from source.begins("[")):
        while True:
            yield from source.space()
            if source.rest.startswith("{"):
                yield from _object(source)
            elif not (yield from source.begins(",")):
                yield from source.begins("]")
                return
    name, found = yield from source.until((MISTRAL_ARGS, _MISTRAL_ID, "{"))
    if found == _MISTRAL_ID:
        _, found = yield from source.until((MISTRAL_ARGS, "{"))
    if not found:
        source.tell(name)
        return
    if found == "{":
        source.rest = f"{{{source.rest}"
    source.begin(name.strip())
    yield from source.value(source.argue)


def _harmony(source: CallSource, mark: str, types: Types) -> Reading[None]:
    """Read a message to a tool behind its header, as AnswerStream tells it."""
    header, _ = yield from source.until((MESSAGE,))
    to = re.search(r"to=(?:functions\.)?([^\s<]+)", header)
    if to is None:
        source.tell(header)
        return
    source.begin(to[1])
    yield from source.until((CALL,), source.argue)


def _typed(text: str, schema: Any) -> Any:
    """Return a parameter that was written as text as what its schema wants."""
    wanted = schema.get("type") if isinstance(schema, Mapping) else None
    if wanted == "string":
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


HERMES = CallFormat("hermes", (TOOL_CALL,), frozenset((TOOL_CALL, _TOOL_CALL_END)), _tagged)
CODER = CallFormat("qwen3-coder", (TOOL_CALL, _FUNCTION), HERMES.marks, _tagged)
GLM = CallFormat(
    "glm",
    (TOOL_CALL,),
    HERMES.marks | {_KEY, _KEY_END, _VALUE, _VALUE_END},
    _tagged,
)
DEEPSEEK = CallFormat(
    "deepseek",
    (SEEK_CALLS, SEEK_CALL),
    frozenset((SEEK_CALLS, SEEK_CALLS_END, SEEK_CALL, SEEK_CALL_END, SEEK_SEP)),
    _deepseek,
)
MISTRAL_FORMAT = CallFormat(
    "mistral", (MISTRAL,), frozenset((MISTRAL, MISTRAL_ARGS, _MISTRAL_ID)), _mistral, id_letters=9
)
HARMONY = CallFormat("harmony", (CHANNEL,), frozenset((CHANNEL,)), _harmony)

_KNOWN = (
    ("<|channel|>", HARMONY),
    ("tool▁calls▁begin", DEEPSEEK),
    (MISTRAL, MISTRAL_FORMAT),
    (_KEY, GLM),
    (_FUNCTION, CODER),
    (TOOL_CALL, HERMES),
)
"""What a template speaks of, and the format that it says."""
