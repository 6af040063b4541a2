"""What ``hybrid chat`` takes beside messages: commands, files, thinking; what ends an answer."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from hybrid.cli import main
from hybrid.cli.chat import _ask_to_drop, talk, template_variables
from hybrid.errors import UsageError
from hybrid.session.conversation import UNBOUNDED, Conversation
from hybrid.session.saved_chat import SCHEMA, load_chat
from tiny_model import CONTEXT, TEMPLATE


class Listener:
    """Stands where the model stands: answers ``<thought|answer`` and keeps what it was asked."""

    def __init__(self, *answers: str, template: str = "", context: int | None = None) -> None:
        self.answers, self.context, self.ended = list(answers), context, "end token"
        self.asked: list[list[dict[str, str]]] = []
        self.options: list[dict[str, Any]] = []
        self.tokenizer = SimpleNamespace(chat_template=template)

    def encode_chat(self, messages: list[dict[str, str]]) -> torch.Tensor:
        self.asked.append([dict(message) for message in messages])
        return torch.zeros(1, sum(len(message["content"]) for message in messages))

    def write(self, ids: torch.Tensor, *, on_text: Any, on_thought: Any, **options: Any) -> Any:
        self.options.append(options)
        answer = self.answers.pop(0)
        if answer == "^C":
            raise KeyboardInterrupt
        thought, bar, answer = answer.rpartition("|")
        if bar:
            on_thought(thought)
        on_text(answer)
        return SimpleNamespace(ended=self.ended)


def say(model: Listener, *lines: str, patient: bool = True, **options: Any) -> Conversation:
    """Hold a conversation of ``lines``; options are a conversation's."""
    left = iter(lines)

    def read_line(prompt: str) -> str:
        line = next(left, None)
        if line is None:
            raise EOFError
        return line

    conversation = Conversation(model, **options)
    talk(conversation, read_line, Mock(), patient=patient)
    return conversation


def contents(messages: list[dict[str, str]]) -> list[str]:
    return [message["content"] for message in messages]


def test_undo_and_retry(capsys: pytest.CaptureFixture[str]) -> None:
    """A turn is taken back with its question; one asked again has the same one."""
    model = Listener("1", "2", "3", "4")
    say(model, "a", "b", "/retry", "/undo", "c")
    assert [contents(each) for each in model.asked] == [
        ["a"],
        ["a", "1", "b"],
        ["a", "1", "b"],
        ["a", "1", "c"],
    ]
    assert "taken back: b" in capsys.readouterr().err


def test_a_retry_that_brings_nothing_changes_nothing() -> None:
    """Stopped before the first word, the old answer is still there."""
    conversation = say(Listener("1", "^C"), "a", "/retry")
    assert contents(conversation.messages) == ["a", "1"]


def test_the_system_message(capsys: pytest.CaptureFixture[str]) -> None:
    """It is shown, replaced without losing what was said, kept by /clear, and removed."""
    model = Listener("1", "2", "3")
    say(model, "/system", "a", "/system be brief", "b", "/clear", "/system", "/system -", "c")
    assert [contents(each) for each in model.asked] == [
        ["a"],
        ["be brief", "a", "1", "b"],
        ["c"],
    ]
    assert model.asked[1][0]["role"] == "system"
    assert capsys.readouterr().err.splitlines() == [
        "there is no system message",
        "the system message: be brief",
        "the conversation is forgotten",
        "the system message: be brief",
        "there is no system message",
    ]


def test_a_conversation_is_saved_and_goes_on(tmp_path: Path) -> None:
    """With its system message and in whole turns; a file of before is replaced whole."""
    file = tmp_path / "a talk.json"
    say(Listener("1"), "é", f"/save {file}", system="s")
    assert load_chat(file)[1] == {"role": "user", "content": "é"}
    model = Listener("2", "3")
    say(model, f"/load {file}", "b", f"/save {file}", "/clear", f"/load {file}", "c")
    assert contents(model.asked[0]) == ["s", "é", "1", "b"]
    assert contents(model.asked[1]) == ["s", "é", "1", "b", "2", "c"]
    assert [each.name for each in tmp_path.iterdir()] == ["a talk.json"]


def saved(*messages: Any, **parts: Any) -> bytes:
    return json.dumps({"schema": SCHEMA, "messages": list(messages)} | parts).encode()


ASKED, ANSWERED = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
DAMAGED = {
    "junk": (b"\x93\x00\xff", "is damaged"),
    "empty": (b"", "is damaged"),
    "deep": (b"[" * 100_000, "nests too deeply|is damaged"),
    "digits": (b'{"a": ' + b"9" * 6000 + b"}", "is damaged"),
    "list": (b"[1]", "no saved conversation"),
    "schema": (saved(schema="hybrid.plan/1"), "'hybrid.plan/1', not"),
    "messages": (saved(messages=3), "messages is 3"),
    "message": (saved(7), "message 1 has no role"),
    "part": (saved(ASKED | {"tool_calls": "x"}), "'tool_calls'"),
    "number": (saved(ASKED, ANSWERED | {"content": 5}), "content of message 2 is 5"),
    "half a letter": (saved(ASKED | {"content": "\ud800"}), "content of message 1"),
    "order": (saved(ASKED, ASKED), "message 2 is of 'user', where 'assistant' follows"),
    "late system": (saved(ASKED, {"role": "system", "content": "x"}), "'system'"),
    "half a turn": (saved(ASKED), "last question has no answer"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_file_is_refused(case: str, tmp_path: Path) -> None:
    """In words; what was said before stays, and such a file is never written over."""
    data, message = DAMAGED[case]
    file = tmp_path / "file"
    file.write_bytes(data)
    with pytest.raises(UsageError, match=message) as caught:
        say(Listener(), f"/load {file}", patient=False)
    assert caught.value.hint
    with pytest.raises(UsageError, match="stays as it is"):
        say(Listener(), f"/save {file}", patient=False)
    assert file.read_bytes() == data
    assert contents(say(Listener("1"), "a", f"/load {file}").messages) == ["a", "1"]


@pytest.mark.parametrize("name", ["none/x", "", "/", "x" * 5000, "~nobody-here/x", "a\0b"])
@pytest.mark.parametrize("command", ["/save", "/load"])
def test_files_that_cannot_be(
    command: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Missing folders, folders, names that no file system takes."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as caught:
        say(Listener("1"), "a", f"{command} {name}", patient=False)
    assert caught.value.hint
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("line", ["/nothing", "/undo", "/retry", "/clear all", "/save", "/", "/é"])
def test_a_command_that_cannot_be_done(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    """At a terminal it is told and the conversation goes on; a pipe ends."""
    model = Listener("1")
    say(model, line, "a")
    assert contents(model.asked[0]) == ["a"]
    error, hint = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ")
    assert hint.startswith("hint: ")
    with pytest.raises(UsageError):
        say(Listener(), line, patient=False)


def test_a_message_that_begins_with_a_slash() -> None:
    """Is written with two."""
    model = Listener("1")
    say(model, "//etc/passwd is //")
    assert contents(model.asked[0]) == ["/etc/passwd is //"]


def test_help_and_stats(capsys: pytest.CaptureFixture[str]) -> None:
    """Every command is listed; how much is said comes with the context that it is of."""
    say(Listener("four", context=1000), "/help", "a", "/stats")
    err = capsys.readouterr().err
    for name in ("/system", "/clear", "/undo", "/retry", "/save", "/load", "/stats", "/exit"):
        assert name in err
    assert "1 turn, 5 tokens of the context's 1000" in err


def test_an_answer_has_the_whole_context(capsys: pytest.CaptureFixture[str]) -> None:
    """No other limit, unless one is asked for; an answer that is cut is marked, a whole one not."""
    model = Listener("1", context=CONTEXT)
    say(model, "a")
    assert model.options[0]["max_new_tokens"] == CONTEXT
    assert "[cut" not in capsys.readouterr().err
    for ended, words in (
        ("context full", "the end of the model's context"),
        ("max_new_tokens", "as many tokens as --max-new-tokens"),
    ):
        model = Listener("1")
        model.ended = ended
        say(model, "a")
        assert model.options[0]["max_new_tokens"] == UNBOUNDED
        err = capsys.readouterr().err
        assert f"[cut: the answer {'reached' if 'end' in words else 'has'} {words}" in err


@pytest.mark.parametrize(
    ("template", "field"),
    [
        ("{% if message.reasoning_content is string %}", "reasoning_content"),
        ("{{ message['thinking'] }}", "thinking"),
        ("{{ m.get('reasoning') }}", "reasoning"),
        ("{% if thinking %}{{ message.content }}", None),
    ],
)
def test_thoughts_go_where_the_template_wants_them(template: str, field: str | None) -> None:
    """And nowhere else: the template decides which of them it sends."""
    model = Listener("hm|yes", "no", template=template)
    say(model, "a", "b")
    assert model.asked[1][1] == {"role": "assistant", "content": "yes"} | (
        {field: "hm"} if field else {}
    )


def test_the_oldest_turns_are_dropped_when_asked() -> None:
    """With both numbers in the question; after a no, the turn is refused and nothing is lost."""
    asked: list[str] = []
    model = Listener("b" * 60, "c", context=100)
    conversation = say(
        model,
        "a" * 10,
        "x" * 10,
        may_drop=lambda question: bool(asked.append(question)),
        system="s",
    )
    assert asked == [
        "the conversation has 81 tokens and the model's context is 100: drop the oldest turn?"
    ]
    assert len(conversation.messages) == 3
    model = Listener("b" * 60, "c", context=100)
    say(model, "a" * 10, "x" * 10, may_drop=lambda _: True, system="s")
    assert contents(model.asked[-1]) == ["s", "x" * 10]


@pytest.mark.parametrize(
    ("typed", "meant"), [("", True), ("Y ", True), ("yes", True), ("n", False), (None, False)]
)
def test_the_question_at_a_terminal(
    typed: str | None, meant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Return is a yes, the end of input a no; both numbers stand in the question."""
    asked: list[str] = []

    def ask(prompt: str) -> str:
        asked.append(prompt)
        if typed is None:
            raise EOFError
        return typed

    monkeypatch.setattr("hybrid.cli.chat._ask_terminal", ask)
    assert _ask_to_drop("81 of 100: drop the oldest turn?") is meant
    assert asked == ["81 of 100: drop the oldest turn? [Y/n] "]


def test_switches_of_thinking() -> None:
    """On, off, and how much; what the template does not know is refused by name."""
    template = "{% if enable_thinking %}{% endif %}{{ reasoning_effort }}"

    def found(text: str = template, **given: Any) -> dict[str, Any]:
        return template_variables([], template=text, **given)

    assert found(think=None) == {}
    assert found(think=True) == {"enable_thinking": True}
    assert found(think=False, effort="low") == {"enable_thinking": False, "reasoning_effort": "low"}
    for given, option in (
        ({"think": True}, "--think"),
        ({"think": False}, "--no-think"),
        ({"think": None, "effort": "low"}, "--reasoning-effort 'low'"),
    ):
        with pytest.raises(UsageError, match=option):
            found("{{ messages }}", **given)


def piped(
    monkeypatch: pytest.MonkeyPatch, tiny_model: Path, lines: str, template: str, *words: str
) -> int:
    """The command over ``lines``, the model's template replaced."""
    file = tiny_model.parent / "chat.jinja"
    file.write_text(template)
    stdin = io.TextIOWrapper(io.BytesIO(lines.encode()), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", stdin)
    args = ["chat", str(tiny_model), "--chat-template", str(file), "--greedy", "-t", "1"]
    return main([*args, *words])


def test_commands_in_a_pipe(
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A real model: asked again it writes the same, a loaded talk goes on as the first one did."""
    file = tmp_path / "talk.json"
    lines = f"hé\n/retry\n/save {file}\n/stats\nho\n"
    assert piped(monkeypatch, tiny_model, lines, TEMPLATE, "-n", "6") == 0
    out, err = capsys.readouterr()
    one = load_chat(file)[1]["content"]
    assert out.startswith(one + one)
    assert "[cut: the answer has as many tokens as --max-new-tokens allows]" in err
    assert f"of the context's {CONTEXT}" in err
    assert piped(monkeypatch, tiny_model, f"/load {file}\nho\n", TEMPLATE, "-n", "6") == 0
    assert capsys.readouterr().out == out[len(one + one) :]


@pytest.mark.parametrize(
    ("template", "words", "message"),
    [
        ("{{ raise_exception('only user here') }}", (), "only user here"),
        ("{{ level.name }}", (), "--template-arg level=..."),
        (TEMPLATE, ("--template-arg", "level"), "'level' is not NAME=VALUE"),
        (TEMPLATE, ("--reasoning-effort", "high"), "--reasoning-effort 'high'"),
        (TEMPLATE, ("--think",), "--think: the chat template"),
        (TEMPLATE, ("--when-full", "ask"), "nobody to ask"),
    ],
)
def test_what_a_template_refuses(
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    template: str,
    words: tuple[str, ...],
    message: str,
) -> None:
    """Its own words, exit code 2, no traceback."""
    assert piped(monkeypatch, tiny_model, "a\n", template, *words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert "Traceback" not in err
