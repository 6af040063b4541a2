"""Answers in OpenAI's forms: their text, thoughts, ends, counts and streams."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from hybrid.cli import main
from hybrid.serve.engine import Engine
from hybrid.serve.served import Served
from hybrid.session.model import HybridModel

PROMPT = "def main(argv):\n    "
GREEDY = {"temperature": 0, "max_tokens": 24}
MESSAGES = [{"role": "user", "content": "def read(path):"}]


@contextmanager
def template(model: HybridModel, text: str) -> Iterator[None]:
    """Give the model another chat template meanwhile."""
    before = model.tokenizer.chat_template
    model.tokenizer.chat_template = text
    try:
        yield
    finally:
        model.tokenizer.chat_template = before


def complete(ask: Any, prompt: Any = PROMPT, **fields: Any) -> dict[str, Any]:
    """Ask for a completion, the likeliest tokens unless ``fields`` say otherwise."""
    done = ask.post("/v1/completions", json={"prompt": prompt} | GREEDY | fields)
    assert done.status_code == 200, done.text
    return dict(done.json())


def chat(ask: Any, messages: Any = MESSAGES, **fields: Any) -> dict[str, Any]:
    done = ask.post("/v1/chat/completions", json={"messages": messages} | GREEDY | fields)
    assert done.status_code == 200, done.text
    return dict(done.json())


def events(ask: Any, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the events of a stream, which ends as it must."""
    done = ask.post(path, json=body | {"stream": True})
    assert done.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in done.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines.pop() == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def test_a_completion_is_what_run_writes(ask: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """The same prompt, the likeliest tokens: the same text, however the prompt is given."""
    assert main(["run", "-p", PROMPT, "-n", "24", "--greedy", "-t", "1"]) == 0
    text = capsys.readouterr().out
    answer = complete(ask)
    assert answer["object"] == "text_completion"
    assert answer["model"] == "demo"
    (choice,) = answer["choices"]
    assert choice == {"index": 0, "text": text, "logprobs": None, "finish_reason": "length"}
    ids = ask.post("/tokenize", json={"content": PROMPT}).json()["tokens"]
    for prompt in ([PROMPT], ids, [ids]):
        assert complete(ask, prompt)["choices"][0]["text"] == text


def test_a_chat_is_what_chat_answers(ask: Any, model: HybridModel) -> None:
    """Parts of a content are its lines, and a developer speaks as the system does."""
    system = {"role": "system", "content": "a\nb"}
    wanted = model.chat([system, *MESSAGES], do_sample=False, max_new_tokens=24)
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    for first in (system, {"role": "developer", "content": parts}):
        answer = chat(ask, [first, *MESSAGES])
        assert answer["object"] == "chat.completion"
        (choice,) = answer["choices"]
        assert choice["message"] == {"role": "assistant", "content": wanted, "refusal": None}
        assert choice["finish_reason"] == "length"


@pytest.mark.parametrize("is_chat", [False, True])
def test_a_stream_has_the_same_text(ask: Any, is_chat: bool) -> None:
    """Role first, then pieces, the reason, the usage where that is asked for, and the end."""
    path = "/v1/chat/completions" if is_chat else "/v1/completions"
    body = GREEDY | ({"messages": MESSAGES} if is_chat else {"prompt": PROMPT})
    whole = chat(ask) if is_chat else complete(ask)
    plain = events(ask, path, body)
    assert all("usage" not in event for event in plain)
    found = events(ask, path, body | {"stream_options": {"include_usage": True}})
    usage = found.pop()
    assert usage["choices"] == []
    counts = ("prompt_tokens", "completion_tokens", "total_tokens")
    assert [usage["usage"][name] for name in counts] == [whole["usage"][name] for name in counts]
    assert {event["usage"] for event in found} == {None}
    assert len({event["id"] for event in [*found, usage]}) == 1
    reasons = [event["choices"][0]["finish_reason"] for event in found]
    assert reasons == [None] * (len(found) - 1) + ["length"]
    if is_chat:
        deltas = [event["choices"][0]["delta"] for event in found]
        assert deltas[0] == {"role": "assistant", "content": ""}
        assert deltas[-1] == {}
        pieces = [delta["content"] for delta in deltas[1:-1]]
        text = whole["choices"][0]["message"]["content"]
    else:
        pieces = [event["choices"][0]["text"] for event in found]
        text = whole["choices"][0]["text"]
    assert len(pieces) > 5
    assert "".join(pieces) == text


@pytest.mark.parametrize("count", [1, 4])
def test_stop_strings_are_never_shown(ask: Any, count: int) -> None:
    """Neither at once nor in a stream; the reason is told."""
    text = complete(ask)["choices"][0]["text"]
    stop = text[9:14]
    assert stop in text
    given: Any = stop if count == 1 else [stop, "no", "such", "text"]
    answer = complete(ask, stop=given)["choices"][0]
    assert answer["text"] == text[: text.index(stop)]
    assert answer["finish_reason"] == "stop"
    body = {"prompt": PROMPT, "stop": given} | GREEDY
    found = [event["choices"][0] for event in events(ask, "/v1/completions", body)]
    assert "".join(choice["text"] for choice in found) == answer["text"]
    assert found[-1]["finish_reason"] == "stop"


def test_the_kept_cache_changes_no_text(ask: Any, model: HybridModel) -> None:
    """A prompt that begins as the last request goes on from there, and that is counted."""
    text = PROMPT
    for turn in range(3):
        wanted = model.generate(text, do_sample=False, max_new_tokens=24)
        answer = complete(ask, text)
        assert answer["choices"][0]["text"] == wanted
        usage = answer["usage"]
        tokens = model.encode(text).shape[1]
        reused = usage["prompt_tokens_details"]["cached_tokens"]
        assert (usage["prompt_tokens"], usage["completion_tokens"]) == (tokens, 24)
        assert usage["total_tokens"] == tokens + 24
        assert reused == 0 if turn == 0 else tokens // 2 < reused < tokens
        text += wanted + "\n"
    other = complete(ask, "import os")
    assert other["choices"][0]["text"] == model.generate(
        "import os", do_sample=False, max_new_tokens=24
    )


def test_thoughts_are_apart(ask: Any, model: HybridModel) -> None:
    """Where the prompt begins a thought that does not end, all of the answer is one."""
    with template(model, "x<think>"):
        ids = model.encode_chat(MESSAGES)
        wanted = model.write(ids, do_sample=False, max_new_tokens=24).text
        message = chat(ask)["choices"][0]["message"]
        body = {"messages": MESSAGES} | GREEDY
        found = events(ask, "/v1/chat/completions", body)
    assert message["content"] == ""
    assert message["reasoning_content"].strip() == wanted.strip()
    deltas = [event["choices"][0]["delta"] for event in found[1:-1]]
    assert {name for delta in deltas for name in delta} == {"reasoning_content"}
    assert "".join(d["reasoning_content"] for d in deltas) == message["reasoning_content"]


def test_an_answer_ends_with_the_context(ask: Any, model: HybridModel, engine: Engine) -> None:
    """However much is asked for, and in a chat also where nothing is."""
    from fastapi.testclient import TestClient

    from hybrid.serve.app import make_app

    served = Served(model, "demo", context=40)
    with TestClient(make_app(served, engine, tell=lambda line: None)) as short:
        for fields in ({"max_tokens": 2**31 - 1}, {"max_completion_tokens": 10**9}, {}):
            body = {"messages": MESSAGES, "logit_bias": {}, "seed": 1, "stop": ["\0"]} | fields
            answer = short.post("/v1/chat/completions", json=body).json()
            if answer["choices"][0]["finish_reason"] == "length":
                assert answer["usage"]["total_tokens"] == 40
            else:
                assert answer["usage"]["total_tokens"] < 40
        body = {"prompt": "x = 1\n" * 40}
        refused = short.post("/v1/completions", json=body)
        assert refused.status_code == 400
        error = refused.json()["error"]
        tokens = model.encode("x = 1\n" * 40).shape[1]
        assert error["code"] == "context_length_exceeded"
        assert f"{tokens} tokens" in error["message"]
        assert "40 tokens" in error["message"]
        assert short.get("/v1/models").json()["data"][0]["context_length"] == 40


def test_a_completion_has_16_tokens_where_nobody_says(ask: Any) -> None:
    answer = ask.post("/v1/completions", json={"prompt": PROMPT, "temperature": 0}).json()
    assert answer["usage"]["completion_tokens"] == 16


def test_a_seed_repeats_what_is_drawn(ask: Any, model: HybridModel) -> None:
    """As the same settings draw without a server; another request's seed is not gone on with."""
    settings = {"temperature": 1.5, "top_p": 0.9, "top_k": 40, "min_p": 0.01}
    torch.manual_seed(7)
    wanted = model.generate(PROMPT, do_sample=True, max_new_tokens=24, **settings)
    free = set()
    for _ in range(2):
        assert complete(ask, seed=7, **settings)["choices"][0]["text"] == wanted
        free.add(complete(ask, **settings)["choices"][0]["text"])
    assert len(free | {wanted}) == 3


@pytest.mark.parametrize(
    "penalty", [{"frequency_penalty": 2}, {"presence_penalty": 2}, {"repetition_penalty": 1.5}]
)
def test_penalties_reach_the_model(ask: Any, model: HybridModel, penalty: dict[str, Any]) -> None:
    wanted = model.generate(PROMPT, do_sample=False, max_new_tokens=24, **penalty)
    assert complete(ask, **penalty)["choices"][0]["text"] == wanted
    assert wanted != model.generate(PROMPT, do_sample=False, max_new_tokens=24)


def test_the_likeliest_whatever_else_is_asked(ask: Any) -> None:
    """Clients send the settings of drawing along with a temperature of 0."""
    plain = complete(ask)["choices"][0]["text"]
    drawn = {"top_p": 0.5, "seed": 3, "top_k": -1, "min_p": 0.2}
    assert complete(ask, **drawn)["choices"][0]["text"] == plain


def test_variables_reach_the_template(ask: Any, model: HybridModel) -> None:
    """By their names, and the effort where the template speaks of it."""
    with template(model, "{{ messages[0].content }}{{ mark }}{{ reasoning_effort }}"):
        usage = [
            chat(ask, **fields)["usage"]["prompt_tokens"]
            for fields in (
                {},
                {"chat_template_kwargs": {"mark": "one two three"}},
                {"reasoning_effort": "one two three"},
            )
        ]
    assert usage[0] < usage[1] == usage[2]


def test_models_and_health(ask: Any, model: HybridModel) -> None:
    """What the model is called, how long its texts are, and how it draws by itself."""
    (card,) = ask.get("/v1/models").json()["data"]
    assert (card["id"], card["object"]) == ("demo", "model")
    assert card["context_length"] == model.context
    assert card["sampling"]["temperature"] == model.model.generation_config.temperature
    assert ask.get("/v1/models/demo").json() == card
    assert ask.get("/health").json() == {"status": "ok", "model": "demo", "requests": 0}


def test_one_line_a_request(ask: Any, told: list[str]) -> None:
    """Tokens, what was reused, times, and why it ended; of a refused one why."""
    complete(ask)
    ask.post("/v1/completions", json={"prompt": 5})
    answered, refused = told
    assert answered.startswith("POST /v1/completions: 8 prompt tokens (0 reused), 24 new, TTFT ")
    assert answered.endswith(" tokens/s, ended: max_new_tokens")
    assert refused.startswith("POST /v1/completions: 400 prompt is 5, it must be ")
