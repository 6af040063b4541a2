"""Answers that are held to a form: JSON of a schema, calls of tools, thoughts of a budget."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from hybrid.serve.call_formats import call_format
from hybrid.session.model import HybridModel

pytest.importorskip("llguidance", reason="forms are kept to by llguidance")

USER = [{"role": "user", "content": "def read(path):"}]
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "kind": {"enum": ["a", "b"]},
        "inner": {"$ref": "#/$defs/flag"},
    },
    "required": ["name", "count", "kind", "inner"],
    "additionalProperties": False,
    "$defs": {"flag": {"type": "boolean"}},
}
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": SCHEMA}} for name in ("f", "g")
]
BAR = "\N{FULLWIDTH VERTICAL LINE}"
TEMPLATES = {
    "hermes": "<tool_call>",
    "qwen3-coder": "<tool_call> <function=",
    "glm": "<tool_call> <arg_key>",
    "deepseek": f"<{BAR}tool▁calls▁begin{BAR}>",
    "deepseek, code": f"<{BAR}tool▁calls▁begin{BAR}> ```json",
    "mistral": "[TOOL_CALLS]",
    "mistral, names": "[TOOL_CALLS] [ARGS]",
}


@contextmanager
def template(model: HybridModel, marks: str) -> Iterator[None]:
    """Give the model a template that speaks of tools and of these marks, and writes neither."""
    before = model.tokenizer.chat_template
    model.tokenizer.chat_template = before + "{# tools reasoning_effort " + marks + " #}"
    try:
        yield
    finally:
        model.tokenizer.chat_template = before


def chat(ask: Any, **fields: Any) -> dict[str, Any]:
    body = {"messages": USER, "temperature": 1.2, "seed": 5, "max_tokens": 400} | fields
    done = ask.post("/v1/chat/completions", json=body)
    assert done.status_code == 200, done.text
    return dict(done.json())


def check(value: Any) -> None:
    """Check a value against SCHEMA, by hand."""
    assert list(value) == ["name", "count", "kind", "inner"]
    assert isinstance(value["name"], str)
    assert len(value["name"]) <= 8
    assert 0 <= value["count"] <= 99
    assert value["kind"] in ("a", "b")
    assert isinstance(value["inner"], bool)


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_a_schema_is_kept_to(ask: Any, temperature: float) -> None:
    """Drawn or the likeliest; the model was never taught to write JSON."""
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA, "strict": True}}
    answer = chat(ask, response_format=form, temperature=temperature, n=2)
    for choice in answer["choices"]:
        assert choice["finish_reason"] == "stop"
        check(json.loads(choice["message"]["content"]))


def test_any_object(ask: Any) -> None:
    """What is cut is still the beginning of an object."""
    answer = chat(ask, response_format={"type": "json_object"}, max_tokens=8)
    assert answer["choices"][0]["message"]["content"].startswith("{")


@pytest.mark.parametrize("case", TEMPLATES)
@pytest.mark.parametrize("choice", ["required", "g"])
def test_calls_that_have_to_be(ask: Any, model: HybridModel, case: str, choice: str) -> None:
    """In each family's own format, with arguments of the schema, also where one is named."""
    wanted: Any = choice
    if choice == "g":
        wanted = {"type": "function", "function": {"name": "g"}}
    with template(model, TEMPLATES[case]):
        assert call_format(model.tokenizer.chat_template).name == case.partition(",")[0]
        answer = chat(ask, tools=TOOLS, tool_choice=wanted, parallel_tool_calls=False)
    (found,) = answer["choices"]
    assert found["finish_reason"] == "tool_calls", found
    assert not found["message"]["content"]
    (call,) = found["message"]["tool_calls"]
    assert call["type"] == "function"
    assert call["function"]["name"] in (("g",) if choice == "g" else ("f", "g"))
    check(json.loads(call["function"]["arguments"]))


def test_tools_and_what_they_returned_reach_the_template(ask: Any, model: HybridModel) -> None:
    """Tools, calls with their arguments as objects, and results with the name of their call."""
    before = model.tokenizer.chat_template
    model.tokenizer.chat_template = (
        "{% for tool in tools %}{{ tool.function.name }}{% endfor %}"
        "{% for m in messages %}|{{ m.role }}:{{ m.content }}"
        "{% for call in m.tool_calls or [] %}{{ call.function.arguments.a }}{% endfor %}"
        "{{ m.name }}{% endfor %}"
    )
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 7}'}}
    messages = [
        *USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "ok"}]},
    ]
    try:
        done = ask.post(
            "/v1/chat/completions",
            json={"messages": messages, "tools": TOOLS, "max_tokens": 1, "temperature": 0},
        )
        wanted = "fg|user:def read(path):|assistant:7|tool:okf"
        tokens = model.tokenizer(wanted, add_special_tokens=False).input_ids
        assert done.json()["usage"]["prompt_tokens"] == len(tokens)
        messages[2]["tool_call_id"] = "2"
        done = ask.post("/v1/chat/completions", json={"messages": messages, "tools": TOOLS})
        assert done.json()["error"]["param"] == "messages[2].tool_call_id"
        assert "'1'" in done.json()["error"]["message"]
    finally:
        model.tokenizer.chat_template = before


@pytest.mark.parametrize("budget", [0, 5])
def test_a_thought_ends_at_its_budget(ask: Any, model: HybridModel, budget: int) -> None:
    """With the template's own closing text, and the answer goes on behind it."""
    before = model.tokenizer.chat_template
    model.tokenizer.chat_template = before + "<think>\n{# '\\n</think>\\n\\n' #}"
    try:
        fields: dict[str, Any] = {"temperature": 0, "max_tokens": 40}
        free = chat(ask, **fields)["choices"][0]["message"]
        assert not free["content"]
        for given in (
            {"thinking_budget": budget},
            {"chat_template_kwargs": {"thinking_budget": budget}},
        ):
            message = chat(ask, **fields, **given)["choices"][0]["message"]
            thought = message.get("reasoning_content", "")
            assert free["reasoning_content"].startswith(thought.removesuffix("\n"))
            assert (
                len(ask.post("/tokenize", json={"content": thought}).json()["tokens"]) <= budget + 3
            )
            assert message["content"]
        form = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
        held = chat(
            ask, **(fields | {"max_tokens": 400}), thinking_budget=budget, response_format=form
        )
        check(json.loads(held["choices"][0]["message"]["content"]))
    finally:
        model.tokenizer.chat_template = before
