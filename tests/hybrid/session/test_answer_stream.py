"""Thoughts and answers are told apart: tags that are tokens or text, channels, begun before."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerFast

from hybrid.session.answer_stream import AnswerStream
from hybrid.session.chat_template import thinking_switches, turn_ends
from tiny_model import byte_tokenizer

HARMONY = ["<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>"]


def tokenizer(*special: str) -> PreTrainedTokenizerFast:
    found = byte_tokenizer()
    found.add_special_tokens({"additional_special_tokens": list(special)})
    return found


def split(
    words: PreTrainedTokenizerFast,
    text: str,
    prompt: str = "",
    stops: tuple[str, ...] = (),
    marks: tuple[str, ...] = (),
) -> tuple[str, str, bool]:
    """Answer, thoughts, and whether it ended within one; one id at a time."""
    thoughts: list[str] = []
    stream = AnswerStream(words, words.encode(prompt), stops, thoughts.append, marks)
    answer = "".join(stream.put([token]) for token in words.encode(text)) + stream.finish()
    return answer, "".join(thoughts), stream.thinking


CASES = {
    "plain": ("\nhello <b>", ("\nhello <b>", "", False)),
    "thought": ("<think>é hm</think>\n\nyes", ("yes", "é hm", False)),
    "cut": ("<think>hm </thi", ("", "hm </thi", True)),
    "spoken of": ("the tag <think> is", ("the tag <think> is", "", False)),
    "two": ("<think>a</think><think>b</think>c", ("c", "ab", False)),
}


@pytest.mark.parametrize("special", [(), ("<think>", "</think>")], ids=["text", "tokens"])
@pytest.mark.parametrize("case", CASES)
def test_tags(case: str, special: tuple[str, ...]) -> None:
    """Plain text or tokens of their own; a tag that an answer speaks of is the answer's."""
    text, wanted = CASES[case]
    if case in ("spoken of", "cut") and special:
        pytest.skip("a token is always a tag, and never half of one")
    assert split(tokenizer(*special), text) == wanted


def test_a_thought_that_the_template_began() -> None:
    """The prompt ends with the tag, so the first text is a thought."""
    assert split(tokenizer(), "hm</think>ok", "[assistant]<think>\n") == ("ok", "hm", False)
    assert split(tokenizer(), "ok", "<think></think>") == ("ok", "", False)


def test_tags_that_are_special_tokens_of_others() -> None:
    """They leave no text, so only their ids tell."""
    assert split(tokenizer("[THINK]", "[/THINK]"), "[THINK]a[/THINK]b") == ("b", "a", False)


def test_channels() -> None:
    """Only the final one is the answer; commentary and analysis are thoughts."""
    words = tokenizer(*HARMONY)
    analysis = "<|channel|>analysis<|message|>We think<|end|>"
    final = "<|start|>assistant<|channel|>final<|message|>Hi<|return|>"
    assert split(words, analysis + final) == ("Hi", "We think", False)
    assert split(words, analysis[:-10]) == ("", "We th", True)
    assert split(words, "<|channel|>commentary to=f<|message|>{}<|end|>" + final)[:2] == (
        "Hi",
        "{}",
    )
    assert split(words, "Hi")[0] == "Hi"


def test_marks_of_calls_are_told() -> None:
    """Special tokens that leave no text do where they are asked for, others still do not."""
    words = tokenizer("[TOOL_CALLS]", "[ARGS]", "</s>")
    text = "[TOOL_CALLS]f[ARGS]{}</s>"
    assert split(words, text)[0] == "f{}"
    assert split(words, text, marks=("[TOOL_CALLS]", "[ARGS]"))[0] == "[TOOL_CALLS]f[ARGS]{}"


@pytest.mark.parametrize(
    "header",
    [
        "<|channel|>commentary to=functions.f <|constrain|>json",
        "<|start|>assistant to=functions.f<|channel|>commentary <|constrain|>json",
    ],
)
def test_messages_to_tools(header: str) -> None:
    """A channel's message to a tool is told whole where calls are asked for."""
    words = tokenizer(*HARMONY, "<|constrain|>", "<|call|>")
    text = f"<|channel|>analysis<|message|>We<|end|>{header}<|message|>{{}}<|call|>"
    answer, thoughts, _ = split(words, text, marks=("<|channel|>",))
    assert thoughts == "We"
    head, _, rest = answer.partition("<|message|>")
    assert head.startswith("<|channel|>")
    assert "to=functions.f" in head
    assert rest == "{}<|call|>"


def test_stop_strings_count_in_the_answer() -> None:
    """One within a thought stops nothing."""
    thoughts: list[str] = []
    words = tokenizer()
    stream = AnswerStream(words, [], ["END"], thoughts.append)
    text = "<think>the END</think>so END more"
    assert "".join(stream.put([token]) for token in words.encode(text)) == "so "
    assert stream.stopped
    assert "".join(thoughts) == "the END"


def test_switches_of_templates() -> None:
    """A variable is one, a word of a text or a field is none."""
    assert thinking_switches("{% if enable_thinking is defined %}") == {"enable_thinking": False}
    assert thinking_switches("{% if not thinking %}") == {"thinking": False}
    assert thinking_switches("{{ message.thinking }} {{ 'thinking' }} enable_thinkings") == {}


ENDS = {
    "chatml": ("<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n", "<|im_end|>"),
    "blank before": ("[INST]{{ m.content }} </s>", "</s>"),
    "next role": ("<|{{ m.role }}|>{{ m.content }}", "<|user|>"),
    "plain": ("{{ m.role }}: {{ m.content }}\n", None),
    "refused": ("{{ raise_exception('no') }}", None),
}


@pytest.mark.parametrize("case", ENDS)
def test_the_token_that_ends_a_turn(case: str) -> None:
    """It is read off the template: what it puts behind an answer, if that is a token of its own."""
    part, wanted = ENDS[case]
    words = tokenizer("<|im_end|>", "<|im_start|>", "</s>", "<|user|>")
    words.chat_template = f"{{% for m in messages %}}{part}{{% endfor %}}"
    ids = [] if wanted is None else [words.convert_tokens_to_ids(wanted)]
    assert turn_ends(words) == ids


def test_channels_end_no_turn() -> None:
    """Each of their messages ends so, and the first is a thought."""
    words = tokenizer(*HARMONY)
    words.chat_template = "{% for m in messages %}{{ m.content }}<|end|>{% endfor %}"
    assert turn_ends(words) == []
