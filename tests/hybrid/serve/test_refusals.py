"""What is refused: in OpenAI's form, by the field's name, and never as an error of ours."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from hybrid.serve.engine import Engine
from hybrid.serve.served import Served
from hybrid.session.model import HybridModel

KEY = "a kéy"
USER = [{"role": "user", "content": "a"}]
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}


def tool(name: str, parameters: Any = None) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


TOOL = tool("f")

CHATS: dict[str, tuple[dict[str, Any], str | None]] = {
    "no messages": ({}, "messages"),
    "null": ({"messages": None}, "messages"),
    "empty": ({"messages": []}, "messages"),
    "text": ({"messages": "hello"}, "messages"),
    "object": ({"messages": {"role": "user"}}, "messages"),
    "no message": ({"messages": [7]}, "messages[0]"),
    "no role": ({"messages": [{"content": "a"}]}, "messages[0].role"),
    "odd role": ({"messages": [*USER, {"role": "king", "content": "a"}]}, "messages[1].role"),
    "tool": ({"messages": [*USER, {"role": "tool", "content": "a"}]}, "messages[1].role"),
    "no content": ({"messages": [{"role": "user"}]}, "messages[0].content"),
    "number": ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    "no parts": ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
    "part": ({"messages": [{"role": "user", "content": ["a"]}]}, "messages[0].content[0]"),
    "image": ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages[0].content[0].type"),
    "calls": (
        {"messages": [{"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}]},
        "messages[0].tool_calls",
    ),
    "message field": ({"messages": [USER[0] | {"weight": 1}]}, "messages[0].weight"),
    "surrogate": ({"messages": [{"role": "user", "content": "a\ud800"}]}, "messages"),
    "n": ({"n": 17}, "n"),
    "n of none": ({"n": 0}, "n"),
    "n true": ({"n": True}, "n"),
    "tools": ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    "clashing tools": ({"tools": [TOOL, TOOL]}, "tools[1]"),
    "tools as an object": ({"tools": TOOL}, "tools"),
    "many tools": ({"tools": [TOOL] * 129}, "tools"),
    "no function": ({"tools": [{"type": "function"}]}, "tools[0].function"),
    "odd tool": ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    "nameless tool": ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
    "odd name": ({"tools": [tool("a b")]}, "tools[0].function.name"),
    "no object": ({"tools": [tool("a", {"type": "array"})]}, "tools[0].function.parameters.type"),
    "no schema": ({"tools": [tool("a", [])]}, "tools[0].function.parameters"),
    "odd choice": ({"tools": [TOOL], "tool_choice": 5}, "tool_choice"),
    "choice of another": (
        {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}},
        "tool_choice.function.name",
    ),
    "budget": ({"thinking_budget": 5}, "thinking_budget"),
    "negative budget": ({"thinking_budget": -1}, "thinking_budget"),
    "tool choice": ({"tool_choice": "required"}, "tool_choice"),
    "functions": ({"functions": [{"name": "f"}]}, "functions"),
    "logprobs": ({"logprobs": 1}, "logprobs"),
    "top_logprobs": ({"top_logprobs": 3}, "top_logprobs"),
    "many logprobs": ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    "logit_bias": ({"logit_bias": {"5": 1}}, "logit_bias"),
    "form": ({"response_format": {"type": "xml"}}, "response_format.type"),
    "formless": ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    "no form": ({"response_format": "json"}, "response_format"),
    "audio": ({"modalities": ["text", "audio"]}, "modalities"),
    "effort": ({"reasoning_effort": "high"}, "reasoning_effort"),
    "unknown": ({"temprature": 1}, "temprature"),
    "unknown surrogate": ({"\ud800": 1}, "\ud800"),
    "template": ({"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, None),
    "tokenize": ({"chat_template_kwargs": {"tokenize": True}}, None),
    "messages again": ({"chat_template_kwargs": {"messages": []}}, None),
    "variables": ({"chat_template_kwargs": "a"}, "chat_template_kwargs"),
    "usage without a stream": ({"stream_options": {"include_usage": True}}, "stream_options"),
    "stream options": ({"stream": True, "stream_options": 1}, "stream_options"),
    "their field": ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x"),
    "stream": ({"stream": "yes"}, "stream"),
}

BOTH: dict[str, tuple[dict[str, Any], str | None]] = {
    "model": ({"model": 5}, "model"),
    "temperature": ({"temperature": "hot"}, "temperature"),
    "temperature true": ({"temperature": True}, "temperature"),
    "temperature list": ({"temperature": [1]}, "temperature"),
    "cold": ({"temperature": -1}, "temperature"),
    "hot": ({"temperature": 10**400}, "temperature"),
    "top_p": ({"top_p": 1.5}, "top_p"),
    "top_k": ({"top_k": -2}, "top_k"),
    "half a top_k": ({"top_k": 1.5}, "top_k"),
    "min_p": ({"min_p": -0.5}, "min_p"),
    "seed": ({"seed": 2**63}, "seed"),
    "seed text": ({"seed": "1"}, "seed"),
    "presence": ({"presence_penalty": 3}, "presence_penalty"),
    "frequency": ({"frequency_penalty": -3}, "frequency_penalty"),
    "repetition": ({"repetition_penalty": 0}, "repetition_penalty"),
    "no tokens": ({"max_tokens": 0}, "max_tokens"),
    "negative": ({"max_tokens": -1}, "max_tokens"),
    "huge": ({"max_tokens": 10**30}, "max_tokens"),
    "half": ({"max_tokens": 1.5}, "max_tokens"),
    "tokens": ({"max_tokens": "5"}, "max_tokens"),
    "empty stop": ({"stop": ""}, "stop"),
    "an empty stop": ({"stop": ["a", ""]}, "stop"),
    "five stops": ({"stop": ["a"] * 5}, "stop"),
    "long stop": ({"stop": "a" * 2000}, "stop"),
    "number to stop": ({"stop": [1]}, "stop"),
    "stop object": ({"stop": {}}, "stop"),
}

COMPLETIONS: dict[str, tuple[dict[str, Any], str | None]] = {
    "no prompt": ({"prompt": None}, "prompt"),
    "empty list": ({"prompt": []}, "prompt"),
    "number": ({"prompt": 5}, "prompt"),
    "several": ({"prompt": ["a", "b"]}, "prompt"),
    "mixed": ({"prompt": [1, "a"]}, "prompt"),
    "flags": ({"prompt": [True]}, "prompt"),
    "no such token": ({"prompt": [10**9]}, "prompt"),
    "negative token": ({"prompt": [-1]}, "prompt"),
    "endless token": ({"prompt": [10**400]}, "prompt"),
    "surrogate": ({"prompt": "a\udcff"}, "prompt"),
    "echo": ({"echo": True}, "echo"),
    "suffix": ({"suffix": "b"}, "suffix"),
    "best_of": ({"best_of": 2}, "best_of"),
    "logprobs": ({"logprobs": 6}, "logprobs"),
    "n": ({"n": 0}, "n"),
    "unknown": ({"messages": USER}, "messages"),
}


def refused(done: Any, status: int, param: str | None) -> str:
    """Check an error's form, and return its message."""
    assert done.status_code == status, done.text
    error = done.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param
    assert error["type"]
    assert error["code"]
    return str(error["message"])


@pytest.mark.parametrize("case", [*CHATS, *BOTH])
def test_chats_that_are_refused(ask: Any, case: str) -> None:
    """The field is named, in the answer's ``param`` and in its message."""
    fields, param = (CHATS | BOTH)[case]
    if param is None:
        param = f"chat_template_kwargs.{next(iter(fields['chat_template_kwargs']))}"
    body = {} if case == "no messages" else {"messages": USER} | fields
    done = ask.post(
        "/v1/chat/completions",
        content=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    message = refused(done, 400, param)
    assert case == "surrogate" or param in message


@pytest.mark.parametrize("case", [*COMPLETIONS, *BOTH])
def test_completions_that_are_refused(ask: Any, case: str) -> None:
    """As of chats."""
    fields, param = (COMPLETIONS | BOTH)[case]
    done = ask.post(
        "/v1/completions",
        content=json.dumps({"prompt": "a"} | fields).encode(),
        headers={"Content-Type": "application/json"},
    )
    message = refused(done, 400, param)
    assert case == "surrogate" or param in message


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [], "tool_choice": "auto", "functions": None},
        {"n": 1, "logprobs": False, "logit_bias": {}, "response_format": {"type": "text"}},
        {"user": "me", "metadata": {"a": "b"}, "store": False, "service_tier": "auto"},
        {"stop": [], "temperature": None, "max_tokens": None, "stream": None, "model": None},
        {"model": "demo", "max_completion_tokens": 2.0, "seed": -5, "temperature": 2},
        {"messages": [USER[0] | {"name": "me"}, {"role": "assistant", "content": "b"}]},
        {"messages": [*USER, {"role": "assistant", "content": "b", "reasoning_content": "c"}]},
    ],
)
def test_what_asks_for_nothing_is_taken(ask: Any, fields: dict[str, Any]) -> None:
    """Clients send values that change nothing."""
    body = {"messages": USER, "max_completion_tokens": 2} | fields
    assert ask.post("/v1/chat/completions", json=body).status_code == 200


BODIES: dict[str, tuple[bytes, int, str]] = {
    "nothing": (b"", 400, "no JSON"),
    "text": (b"hello", 400, "no JSON"),
    "cut": (b'{"prompt": "a', 400, "no JSON"),
    "bytes": (b'{"prompt": "\xff\xfe"}', 400, "not UTF-8: byte 0xff at offset 12"),
    "utf-16": ('{"prompt": "a"}'.encode("utf-16"), 400, "not UTF-8"),
    "not a number": (b'{"prompt": "a", "top_p": NaN}', 400, "NaN"),
    "infinity": (b'{"prompt": "a", "top_p": -Infinity}', 400, "-Infinity"),
    "many digits": (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", 400, "no JSON"),
    "large number": (b'{"prompt": "a", "top_p": 1e999}', 400, "top_p"),
    "deep lists": (b"[" * 200_000, 400, "nested too deeply"),
    "deep objects": (b'{"a":' * 200_000, 400, "nested too deeply"),
    "list": (b"[]", 400, "must be a JSON object"),
    "null": (b"null", 400, "must be a JSON object"),
    "large": (b'{"prompt": "' + b"a" * 10_000_000 + b'"}', 413, f"more than {8 << 20} bytes"),
}


@pytest.mark.parametrize("case", BODIES)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize"])
def test_bodies_that_are_refused(ask: Any, case: str, path: str) -> None:
    """Whatever is sent, what is wrong with it is said."""
    body, status, words = BODIES[case]
    done = ask.post(path, content=body, headers={"Content-Type": "application/json"})
    error = done.json()["error"]
    assert done.status_code == status
    if case != "large number" or path == "/v1/completions":
        assert words in error["message"]


SCHEMAS: dict[str, Any] = {
    "false": {"not": {}},
    "contradiction": {"type": "string", "minLength": 5, "maxLength": 2},
    "no values": {"enum": []},
    "impossible property": {"type": "object", "properties": {"a": False}, "required": ["a"]},
    "of two types": {"allOf": [{"type": "string"}, {"type": "number"}]},
    "endless reference": {"$ref": "#"},
    "reference to nothing": {"$ref": "#/nothing"},
    "reference elsewhere": {"$ref": "http://example.org/schema"},
    "damaged pattern": {"type": "string", "pattern": "("},
    "no type": {"type": "stringy"},
    "not known": {"if": {"type": "string"}, "then": {"type": "string"}},
    "large": {"enum": ["a" * 70_000]},
    "list": [],
    "text": "object",
}
BOMBS = ["(a+)+$", "(a|a)*b", "^((((a{1,100}){1,100}){1,100}){1,100})$", ".*a.{500}$", "(.*)*x" * 9]


def formed(ask: Any, schema: Any) -> Any:
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    body = {"messages": USER, "max_tokens": 4, "temperature": 0, "response_format": form}
    return ask.post("/v1/chat/completions", json=body)


@pytest.mark.parametrize("case", SCHEMAS)
def test_schemas_that_are_refused(ask: Any, case: str) -> None:
    """Those that no text satisfies, that are damaged, or larger than may be."""
    pytest.importorskip("llguidance", reason="schemas are kept to by llguidance")
    done = formed(ask, SCHEMAS[case])
    assert done.status_code == 400, done.text
    assert done.json()["error"]["code"] == "invalid_schema"
    assert "response_format" in done.json()["error"]["message"]


@pytest.mark.parametrize("bomb", BOMBS)
def test_patterns_that_explode_elsewhere(ask: Any, bomb: str) -> None:
    """They are kept to or refused, and hold nobody up for ever."""
    pytest.importorskip("llguidance", reason="schemas are kept to by llguidance")
    done = formed(ask, {"type": "string", "pattern": bomb})
    assert done.status_code in (200, 400)
    if done.status_code == 400:
        assert "response_format" in done.json()["error"]["message"]


def test_a_deep_schema_is_refused(ask: Any) -> None:
    """Deeper than llguidance reads, shallower than JSON may be."""
    pytest.importorskip("llguidance", reason="schemas are kept to by llguidance")
    deep: dict[str, Any] = {"type": "string"}
    for _ in range(200):
        deep = {"type": "array", "items": deep}
    done = formed(ask, deep)
    assert done.status_code == 400
    assert done.json()["error"]["code"] == "invalid_schema"


def test_a_deep_value_is_refused(ask: Any) -> None:
    """Also one that JSON can hold and Python cannot show."""
    deep = b"[" * 900 + b"]" * 900
    done = ask.post(
        "/v1/completions",
        content=b'{"prompt": ' + deep + b"}",
        headers={"Content-Type": "application/json"},
    )
    refused(done, 400, "prompt")


def test_a_body_of_another_type_is_refused(ask: Any) -> None:
    """Pages of other origins can send those without asking."""
    done = ask.post("/v1/completions", content=b'{"prompt": "a"}')
    assert "Content-Type: application/json" in refused(done, 415, None)


def test_what_the_template_refuses_is_said_in_its_words(ask: Any, model: HybridModel) -> None:
    """Roles out of order are the template's affair."""
    before = model.tokenizer.chat_template
    try:
        for text, words in (
            ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
            ("{{ messages[0].nothing.more }}", "was not given"),
            ("{% for m in messages %}", "damaged in line 1"),
        ):
            model.tokenizer.chat_template = text
            done = ask.post("/v1/chat/completions", json={"messages": USER * 2})
            assert words in refused(done, 400, "messages")
        model.tokenizer.chat_template = None
        done = ask.post("/v1/chat/completions", json={"messages": USER})
        assert "has no chat template" in refused(done, 400, "messages")
    finally:
        model.tokenizer.chat_template = before


def test_other_models_and_addresses(ask: Any) -> None:
    """Both names of a model are told, and what there is instead of a path."""
    for done in (
        ask.post("/v1/completions", json={"prompt": "a", "model": "gpt-4"}),
        ask.get("/v1/models/gpt-4"),
    ):
        message = refused(done, 404, "model")
        assert "'gpt-4'" in message
        assert "'demo'" in message
    assert "/v1/chat/completions" in refused(ask.post("/v1/nothing"), 404, None)
    assert "POST /v1/completions" in refused(ask.get("/v1/completions"), 405, None)
    refused(ask.post("/tokenize", json={"content": 5}), 400, "content")
    refused(ask.post("/tokenize", json={"content": "a", "x": 5}), 400, "x")


def test_a_key_is_asked_for(model: HybridModel, engine: Engine, ask: Any) -> None:
    """Everywhere but at /health; neither key is told."""
    from fastapi.testclient import TestClient

    from hybrid.serve.app import make_app

    told: list[str] = []
    app = make_app(Served(model, "demo"), engine, key=KEY, tell=told.append)
    with TestClient(app) as client:
        assert client.get("/health").status_code == 200
        for header in ("Bearer wrong", "Bearer", KEY.encode(), b"Basic " + KEY.encode(), "Bearer "):
            done = client.get("/v1/models", headers={"Authorization": header})
            message = refused(done, 401, None)
            assert "wrong" not in message.replace("a wrong key", "")
            assert done.headers["www-authenticate"] == "Bearer"
        refused(client.post("/v1/completions", content=b"[" * 10**6), 401, None)
        right = {"Authorization": b"Bearer " + KEY.encode()}
        assert client.get("/v1/models", headers=right).status_code == 200
    assert KEY not in "".join(told)


def test_pages_of_other_origins(model: HybridModel, engine: Engine, ask: Any) -> None:
    """None may read answers, unless its origin is named."""
    from fastapi.testclient import TestClient

    from hybrid.serve.app import make_app

    page, name = {"Origin": "http://page"}, "access-control-allow-origin"
    assert name not in ask.get("/v1/models", headers=page).headers
    app = make_app(Served(model, "demo"), engine, origins=["http://page"], tell=print)
    with TestClient(app) as client:
        assert client.get("/v1/models", headers=page).headers[name] == "http://page"
        other = {"Origin": "http://other"}
        assert name not in client.get("/v1/models", headers=other).headers


def test_lines_are_whole(ask: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was sent begins no line of its own, and what threads tell does not mix."""
    from hybrid.serve import app

    written: list[str] = []
    stream = SimpleNamespace(write=written.append, flush=lambda: None)
    monkeypatch.setattr(app.sys, "stderr", stream)
    app._tell("POST /a\n12:00:00 POST /b\33[2J")
    (line,) = written
    assert line.endswith(" POST /a?12:00:00 POST /b?[2J\n")
