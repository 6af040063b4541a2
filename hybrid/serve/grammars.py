"""Grammars of answers, in llguidance's Lark: values of a schema, calls as a family writes them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hybrid.serve.call_formats import (
    CALL,
    CHANNEL,
    CODER,
    DEEPSEEK,
    GLM,
    HARMONY,
    MESSAGE,
    MISTRAL,
    MISTRAL_ARGS,
    MISTRAL_FORMAT,
    SEEK_CALL,
    SEEK_CALL_END,
    SEEK_CALLS,
    SEEK_CALLS_END,
    SEEK_SEP,
    CallFormat,
)

Tool = Mapping[str, Any]
_SPACE = {"whitespace_pattern": r"[ \n\r\t]{0,32}"}
"""Some models would go on with white space for ever."""
_DEFINITIONS = ("$defs", "definitions")
_ANY: dict[str, Any] = {"type": "object"}


class Grammar:
    """A grammar that grows by rules.

    Parameters
    ----------
    special
        Ids of the tokenizer's special tokens by their texts, which no text can spell.
    template
        The chat template's text.
    """

    def __init__(self, special: Mapping[str, int], template: str) -> None:
        self._special, self._template = special, template
        self._rules: list[str] = []

    def of(self, start: str) -> str:
        """Return all of it; ``start`` is what an answer is."""
        return "\n".join([f"start: {start}", *self._rules])

    def value(self, schema: Any) -> str:
        """Return the rule of a schema's values."""
        if isinstance(schema, Mapping):
            schema = {**schema, "x-guidance": _SPACE}
        return self._rule(f"%json {json.dumps(schema)}")

    def answer(self, body: str, form: CallFormat) -> str:
        """Return the rule of an answer whose text is ``body``, in its channel where there are."""
        if form is not HARMONY:
            return body
        head = self.text(f"{CHANNEL}final{MESSAGE}")
        return self._rule(f"{self._thoughts()} {head} {body}")

    def calls(self, form: CallFormat, tools: Sequence[Tool], several: bool) -> str:
        """Return the rule of calls of one of ``tools``, or of ``several`` calls."""
        if form is HARMONY:
            return self._rule(f"{self._thoughts()} ({self._each(tools, self._channel_call)})")
        if form is DEEPSEEK:
            each = self._each(tools, self._seek_call)
            begin, end = self.text(SEEK_CALLS), self.text(SEEK_CALLS_END)
            more = self._more(f"{self.text(chr(10))} ({each})", several)
            return self._rule(f"{begin} ({each}) {more} {end}")
        if form is MISTRAL_FORMAT and MISTRAL_ARGS in self._template:
            each = self._each(tools, self._mistral_call)
            return self._rule(f"({each}) {self._more(each, several)}")
        if form is MISTRAL_FORMAT:
            each = self._each(tools, self._object_call)
            begin = self.text(f"{MISTRAL}[")
            more = self._more(f'", " ({each})', several)
            return self._rule(f'{begin} ({each}) {more} "]"')
        writers = {CODER.name: self._coder_call, GLM.name: self._glm_call}
        each = self._each(tools, writers.get(form.name, self._tagged_call))
        return self._rule(f"({each}) {self._more(f'{self.text(chr(10))} ({each})', several)}")

    @staticmethod
    def _more(each: str, several: bool) -> str:
        """What may follow a first call."""
        return f"({each})*" if several else ""

    def text(self, text: str) -> str:
        """Return a text as it stands in a rule, special tokens of it by their ids."""
        parts, rest = [], text
        while rest:
            found = [(at, each) for each in self._special if each and (at := rest.find(each)) >= 0]
            at, mark = min(
                found, key=lambda pair: (pair[0], -len(pair[1])), default=(len(rest), "")
            )
            if at:
                parts.append(json.dumps(rest[:at], ensure_ascii=False))
            if mark:
                parts.append(f"<[{self._special[mark]}]>")
            rest = rest[at + len(mark) :]
        return " ".join(parts) or '""'

    def _rule(self, body: str, options: str = "") -> str:
        name = f"rule{len(self._rules)}"
        self._rules.append(f"{name}{options}: {body}")
        return name

    def _each(self, tools: Sequence[Tool], write: Callable[[str, Any], str]) -> str:
        found = (
            write(tool["function"]["name"], tool["function"].get("parameters") or _ANY)
            for tool in tools
        )
        return " | ".join(found)

    def _object_call(self, name: str, schema: Any) -> str:
        begin = self.text(f'{{"name": {json.dumps(name)}, "arguments": ')
        return self._rule(f'{begin} {self.value(schema)} "}}"')

    def _tagged_call(self, name: str, schema: Any) -> str:
        inner = self._object_call(name, schema)
        return self._rule(f"{self.text('<tool_call>' + chr(10))} {inner} {self.text(_END)}")

    def _seek_call(self, name: str, schema: Any) -> str:
        if "```json" in self._template:
            begin = self.text(f"{SEEK_CALL}function{SEEK_SEP}{name}\n```json\n")
            end = self.text(f"\n```{SEEK_CALL_END}")
        else:
            begin, end = self.text(f"{SEEK_CALL}{name}{SEEK_SEP}"), self.text(SEEK_CALL_END)
        return self._rule(f"{begin} {self.value(schema)} {end}")

    def _mistral_call(self, name: str, schema: Any) -> str:
        return self._rule(f"{self.text(f'{MISTRAL}{name}{MISTRAL_ARGS}')} {self.value(schema)}")

    def _channel_call(self, name: str, schema: Any) -> str:
        begin = self.text(f"{CHANNEL}commentary to=functions.{name} <|constrain|>json{MESSAGE}")
        return self._rule(f"{begin} {self.value(schema)} {self.text(CALL)}")

    def _thoughts(self) -> str:
        """Return the rule of what may be thought in a channel before an answer."""
        begin = self.text(f"{CHANNEL}analysis{MESSAGE}")
        end = self.text("<|end|><|start|>assistant")
        any_text = self._rule(r"/(.|\n)*/")
        return f"({self._rule(f'{begin} {any_text} {end}')})?"

    def _coder_call(self, name: str, schema: Any) -> str:
        begin = self.text(f"<tool_call>\n<function={name}>\n")
        parameters = self._parameters(schema, "<parameter={}>\n", "\n</parameter>\n")
        return self._rule(f"{begin} {parameters} {self.text('</function>' + _END)}")

    def _glm_call(self, name: str, schema: Any) -> str:
        begin = self.text(f"<tool_call>{name}\n")
        parameters = self._parameters(
            schema, "<arg_key>{}</arg_key>\n<arg_value>", "</arg_value>\n"
        )
        return self._rule(f"{begin} {parameters} {self.text('</tool_call>')}")

    def _parameters(self, schema: Any, begin: str, end: str) -> str:
        """Return the rules of parameters that stand between tags, in their schema's order."""
        given = schema if isinstance(schema, Mapping) else _ANY
        properties, needed = given.get("properties"), given.get("required")
        around = {name: given[name] for name in _DEFINITIONS if name in given}
        rules = []
        for name, each in (properties if isinstance(properties, Mapping) else {}).items():
            head = self.text(begin.format(name))
            kind = each.get("type") if isinstance(each, Mapping) else None
            if kind == "string" and "enum" in each:
                texts = " | ".join(self.text(str(value)) for value in each["enum"])
                body = f"({texts}) {self.text(end)}"
            elif kind == "string":
                most = each.get("maxLength")
                times = f"{{0,{most}}}" if type(most) is int and most > 0 else "*"
                body = self._rule(rf"/(.|\n){times}/", f"[suffix={json.dumps(end)}]")
            else:
                inner = {**each, **around} if isinstance(each, Mapping) else each
                body = f"{self.value(inner)} {self.text(end)}"
            rule = self._rule(f"{head} {body}")
            optional = not isinstance(needed, list) or name not in needed
            rules.append(f"{rule}?" if optional else rule)
        return " ".join(rules) or '""'


_END = "\n</tool_call>"
