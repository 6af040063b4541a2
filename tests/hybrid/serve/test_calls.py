"""Calls of tools in every family's format, however the text is cut into pieces."""

from __future__ import annotations

import json
from typing import Any

import pytest

from hybrid.serve.answer_parts import AnswerParts
from hybrid.serve.call_formats import (
    CODER,
    DEEPSEEK,
    GLM,
    HARMONY,
    HERMES,
    MISTRAL_FORMAT,
    CallFormat,
    call_format,
)
from hybrid.serve.parts import Arguments, Whole

BAR = "\N{FULLWIDTH VERTICAL LINE}"
PARIS = {"city": 'Par\u00efs {"[]}" \\', "days": 3, "exact": True}
TEXT = json.dumps(PARIS)
PRETTY = json.dumps(PARIS, indent=2, ensure_ascii=False)
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            },
        },
    }
    for name in ("weather", "time")
]


def seek(text: str) -> str:
    """DeepSeek's marks are bars that are no ASCII ones."""
    return text.replace("|", BAR).replace(" ", "▁")


SEEK = [seek(f"<|tool {name}|>") for name in ("calls begin", "calls end", "call begin", "call end")]
SEP = seek("<|tool sep|>")
CODED = (
    "<tool_call>\n<function=weather>\n"
    f"<parameter=city>\n{PARIS['city']}\n</parameter>\n<parameter=days>\n3\n</parameter>\n"
    "<parameter=exact>\ntrue\n</parameter>\n</function>\n</tool_call>"
)
KEYED = (
    f"<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>{PARIS['city']}</arg_value>\n"
    "<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n<arg_key>exact</arg_key>\n"
    "<arg_value>true</arg_value>\n</tool_call>"
)
TIME = '{"name": "time", "arguments": {}}'

CASES: dict[str, tuple[CallFormat, str, list[tuple[str, Any]]]] = {
    "hermes": (
        HERMES,
        f'<tool_call>\n{{"name": "weather", "arguments": {TEXT}}}\n</tool_call>',
        [("weather", PARIS)],
    ),
    "hermes, two": (
        HERMES,
        f'<tool_call>\n{{"name": "weather", "arguments": {PRETTY}}}\n</tool_call>\n'
        f"<tool_call>\n{TIME}\n</tool_call>",
        [("weather", PARIS), ("time", {})],
    ),
    "hermes, arguments first": (
        HERMES,
        f'<tool_call>{{"arguments": {TEXT}, "name": "weather"}}</tool_call>',
        [("weather", PARIS)],
    ),
    "hermes, arguments as text": (
        HERMES,
        f'<tool_call>{{"name": "weather", "arguments": {json.dumps(TEXT)}}}</tool_call>',
        [("weather", PARIS)],
    ),
    "hermes, no arguments": (HERMES, '<tool_call>{"name": "time"}</tool_call>', [("time", {})]),
    "hermes, not closed": (
        HERMES,
        f'<tool_call>\n{{"name": "weather", "arguments": {TEXT}}}',
        [("weather", PARIS)],
    ),
    "coder": (CODER, CODED, [("weather", PARIS)]),
    "coder, two": (CODER, f"{CODED}\n{CODED}", [("weather", PARIS)] * 2),
    "coder, without the outer tags": (CODER, CODED[12:-13], [("weather", PARIS)]),
    "coder, nothing given": (
        CODER,
        "<tool_call>\n<function=time>\n</function>\n</tool_call>",
        [("time", {})],
    ),
    "glm": (GLM, KEYED, [("weather", PARIS)]),
    "glm, two": (GLM, f"{KEYED}\n{KEYED}", [("weather", PARIS)] * 2),
    "glm, nothing given": (GLM, "<tool_call>time\n</tool_call>", [("time", {})]),
    "deepseek v3": (
        DEEPSEEK,
        f"{SEEK[0]}{SEEK[2]}function{SEP}weather\n```json\n{TEXT}\n```{SEEK[3]}\n"
        f"{SEEK[2]}function{SEP}time\n```json\n{{}}\n```{SEEK[3]}{SEEK[1]}",
        [("weather", PARIS), ("time", {})],
    ),
    "deepseek v3.1": (
        DEEPSEEK,
        f"{SEEK[0]}{SEEK[2]}weather{SEP}{TEXT}{SEEK[3]}{SEEK[2]}time{SEP}{{}}{SEEK[3]}{SEEK[1]}",
        [("weather", PARIS), ("time", {})],
    ),
    "mistral, a list": (
        MISTRAL_FORMAT,
        f'[TOOL_CALLS] [{{"name": "weather", "arguments": {TEXT}}}, {TIME}]',
        [("weather", PARIS), ("time", {})],
    ),
    "mistral, names": (
        MISTRAL_FORMAT,
        f"[TOOL_CALLS]weather[ARGS]{TEXT}[TOOL_CALLS]time[CALL_ID]abcdefghi[ARGS]{{}}",
        [("weather", PARIS), ("time", {})],
    ),
    "harmony": (
        HARMONY,
        f"<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{TEXT}<|call|>",
        [("weather", PARIS)],
    ),
    "harmony, role first": (
        HARMONY,
        f"<|channel|> assistant to=functions.weather commentary json<|message|>{TEXT}<|call|>",
        [("weather", PARIS)],
    ),
}


def read(form: CallFormat, text: str, size: int) -> Whole:
    """Read a text that comes in pieces of so many letters."""
    parts = AnswerParts(form, TOOLS)
    found = []
    for at in range(0, len(text), size):
        found += parts.put(text[at : at + size], False, ())
    return Whole.of([*found, *parts.finish()])


@pytest.mark.parametrize("size", [1, 7, 10_000])
@pytest.mark.parametrize("case", CASES)
def test_formats(case: str, size: int) -> None:
    """Names, arguments and the text before them; every call has an id of its own."""
    form, text, wanted = CASES[case]
    for before in ("", "I look it up."):
        found = read(form, f"{before}\n\n{text}\n" if before else text, size)
        assert [(call.name, json.loads(call.arguments)) for call in found.calls] == wanted
        assert found.text == before
        assert len({call.id for call in found.calls}) == len(wanted)
        letters = 9 if form is MISTRAL_FORMAT else len("call_") + 24
        assert {len(call.id) for call in found.calls} == {letters}


@pytest.mark.parametrize("size", [1, 7, 10_000])
@pytest.mark.parametrize(
    "text",
    [
        "no call at all ",
        "a < b and <tool_cal",
        "  leading and trailing  ",
        "\n\n",
        "",
        "[1, 2] {}",
    ],
)
def test_text_stays_as_it_is(text: str, size: int) -> None:
    """Also what begins like a mark, and all white space."""
    for form in (HERMES, CODER, GLM, DEEPSEEK, MISTRAL_FORMAT, HARMONY):
        assert read(form, text, size) == Whole(text)


@pytest.mark.parametrize("size", [1, 10_000])
def test_damaged_calls_end(size: int) -> None:
    """Whatever a model writes, reading it comes to its end, and nothing is raised."""
    for form, text, _ in CASES.values():
        for at in range(len(text)):
            read(form, text[:at], size)
            read(form, text[:at] + "]}>" + text[at + 1 :], size)


def test_arguments_come_as_they_are_written() -> None:
    """Of formats that write them as JSON: not only when the call is complete."""
    for case in ("hermes", "deepseek v3.1", "mistral, names", "harmony"):
        form, text, _ = CASES[case]
        parts = AnswerParts(form, TOOLS)
        middle = text.index("days")
        found = parts.put(text[:middle], False, ())
        begun = "".join(part.text for part in found if isinstance(part, Arguments))
        assert TEXT.startswith(begun)
        assert len(begun) > 10


def test_the_template_says_which_format() -> None:
    """By the marks that it writes itself."""
    templates = {
        "<tool_call>\\n": HERMES,
        "<tool_call>\\n<function=example>": CODER,
        "<tool_call>{function-name}\\n<arg_key>": GLM,
        f"<{BAR}tool▁calls▁begin{BAR}>": DEEPSEEK,
        "[TOOL_CALLS] [": MISTRAL_FORMAT,
        "<|channel|>analysis": HARMONY,
        "plain": HERMES,
    }
    for template, form in templates.items():
        assert call_format(template) is form
