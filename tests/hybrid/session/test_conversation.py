"""Conversations: kept caches, room in the context, thoughts that are not sent again, templates."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import DynamicCache, Qwen3NextConfig

from hybrid.errors import UsageError
from hybrid.session.chat_template import templated
from hybrid.session.conversation import Conversation
from hybrid.session.kept_cache import KeptCache
from hybrid.session.model import HybridModel
from hybrid.transformers_api import cache_argument
from tiny_model import CONTEXT, TEMPLATE, byte_tokenizer


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> HybridModel:
    found = HybridModel.from_pretrained(tiny_model, threads=1)
    found.tokenizer.chat_template = TEMPLATE
    return found


class Thinker:
    """Stands where the model stands: a token a letter, thoughts before a bar."""

    def __init__(self, context: int | None, *answers: str) -> None:
        self.context = context
        self.answers = list(answers)
        self.asked: list[list[str]] = []
        self.encoded: list[list[str]] = []

    def encode_chat(self, messages: list[dict[str, str]], **_: Any) -> torch.Tensor:
        self.encoded.append([message["content"] for message in messages])
        return torch.zeros(1, sum(len(message["content"]) for message in messages))

    def write(self, ids: torch.Tensor, *, on_text: Any, on_thought: Any, **_: Any) -> Any:
        self.asked.append(self.encoded[-1])
        assert ids.shape[1] == len("".join(self.encoded[-1]))
        thought, _bar, answer = self.answers.pop(0).rpartition("|")
        if thought:
            on_thought(thought)
        if answer:
            on_text(answer)


def test_each_turn_computes_its_own_tokens(model: HybridModel) -> None:
    """The text is that of a prompt from scratch, the tokens that are computed are the new ones."""
    conversation = Conversation(model)
    said, asked = "", 0
    for text in ("one", "two", "three"):
        said += f"[user]{text}\n[assistant]"
        wanted = model.generate(said, max_new_tokens=6, do_sample=False)
        computed = len(said.encode())
        assert conversation.ask(text, max_new_tokens=6, do_sample=False) == wanted
        times = model._last.times
        assert times.kept_tokens + times.prompt_tokens == computed
        assert times.kept_tokens >= asked  # and what of the answer is bytes that make characters
        asked = computed
        said += wanted + "\n"
    assert "before them were kept" in str(model.report())
    conversation.clear()
    assert conversation.messages == []
    assert conversation.ask("one", max_new_tokens=6, do_sample=False)
    assert model._last.times.kept_tokens == 0


def test_a_kept_cache_is_cut_where_prompts_part(model: HybridModel) -> None:
    """Logits after a common beginning are those from scratch to rounding; then all is anew."""
    kept = KeptCache()
    ids = torch.arange(40, 90)[None]
    other = torch.cat((ids[:, :30], torch.arange(100, 120)[None]), dim=1)
    with torch.no_grad():
        wanted = model.model(other).logits[0, -1]
        for prompt in (ids, other):
            cache = kept.begin(model.model, prompt)
            new = prompt[:, kept.reused :]
            found = model.model(new, **cache_argument(cache), use_cache=True).logits[0, -1]
            kept.end(cache, prompt[0].tolist())
        assert kept.reused == 30
        assert found == pytest.approx(wanted, abs=0.02 * float(wanted.abs().max()))
        assert kept.begin(model.model, torch.tensor([[7, 8]])).get_seq_length() == 0


def test_a_cache_that_cannot_be_cut_is_only_gone_on_from(model: HybridModel) -> None:
    """One with a window keeps no earlier positions; one whose layers disagree is not kept."""
    kept = KeptCache()
    ids = torch.arange(20)[None]
    cache = kept.begin(model.model, ids)
    with torch.no_grad():
        model.model(ids, **cache_argument(cache), use_cache=True)
    kept.end(cache, ids[0].tolist())
    for layer in cache.layers:
        layer.is_sliding, layer.sliding_window = True, 8
    assert kept.begin(model.model, torch.tensor([[0, 1, 9]])) is not cache
    kept.end(cache, ids[0].tolist()[:10])  # fewer tokens than it holds
    assert kept.begin(model.model, ids).get_seq_length() == 0


def test_layers_with_a_state_are_computed_anew() -> None:
    """Their length is not known, so neither begins a cache nor is one kept."""
    config = Qwen3NextConfig(num_hidden_layers=2, layer_types=["linear_attention"] * 2)
    network = SimpleNamespace(config=config, _supports_default_dynamic_cache=lambda: True)
    kept = KeptCache()
    ids = torch.arange(5)[None]
    assert kept.begin(network, ids) is None
    kept.end(DynamicCache(config=config), ids[0].tolist())
    assert kept.begin(network, ids) is None


def test_thoughts_are_not_sent_again_and_a_cut_one_is_told() -> None:
    """Nor is a thought that a limit cut part of what was said."""
    told: list[str] = []
    thinker = Thinker(None, "hm|yes", "hm|", "ok")
    conversation = Conversation(thinker, tell=told.append)
    thoughts: list[str] = []
    for text in "abc":
        conversation.ask(text, on_thought=thoughts.append)
    assert thinker.asked == [["a"], ["a", "yes", "b"], ["a", "yes", "b", "", "c"]]
    assert thoughts == ["hm", "hm"]
    assert thinker.encoded == thinker.asked  # a turn is cut into tokens once
    assert len(told) == 1
    assert "ended within its thoughts" in told[0]


def test_the_oldest_turns_make_room() -> None:
    """Never the system message; what is left is said before it is full, and what was dropped."""
    told: list[str] = []
    thinker = Thinker(100, *("a" * 20 for _ in range(4)))
    conversation = Conversation(thinker, system="s" * 5, tell=told.append)
    for letter in "wxyz":
        conversation.ask(letter * 10, max_new_tokens=30)
    system, *rest = thinker.asked[2]
    assert (system, rest) == ("sssss", ["x" * 10, "a" * 20, "y" * 10])
    assert [line.partition(":")[0] for line in told] == ["context full", "context full"]
    assert "turns (1) were dropped, 55 of 100" in told[0]
    near = Thinker(100, "b")
    Conversation(near, tell=told.append).ask("q" * 80, max_new_tokens=50)
    assert "nearly full: 20 of 100 tokens are left" in told[-1]


def test_a_full_context_is_refused_on_request() -> None:
    """With both numbers and the way out; the conversation stays."""
    thinker = Thinker(60, "a" * 20, "never")
    conversation = Conversation(thinker, may_drop=lambda _: False)
    conversation.ask("x" * 10, max_new_tokens=30)
    with pytest.raises(UsageError, match=r"has 50 tokens .* context is 60") as caught:
        conversation.ask("y" * 20, max_new_tokens=30)
    assert "/clear" in str(caught.value)
    assert len(conversation.messages) == 2


def test_a_first_message_that_never_fits(model: HybridModel) -> None:
    """Both numbers, as for any prompt."""
    with pytest.raises(UsageError, match=rf"has \d+ tokens and the model's context is {CONTEXT}"):
        Conversation(model).ask("x" * CONTEXT)


LOOP = "{% for m in messages %}{{ m.content }}{% endfor %}"
REFUSED = {
    "system": (LOOP + "{{ raise_exception('System role not supported') }}", "System role not supp"),
    "syntax": ("{% for m in messages %}", "damaged in line 1"),
    "undefined": ("{{ messages[0].nothing.more }}", "was not given"),
    "variable": ("{{ level.name }}", r"--template-arg level="),
    "type": ("{{ 'x' + 1 }}", "refuses these messages"),
    "unsafe": ("{{ ''.__class__.__mro__ }}", "no template may"),
    "empty": ("{% if false %}x{% endif %}", "an empty prompt"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_template_refuses_is_said_in_its_words(case: str) -> None:
    """One line and what helps."""
    words = byte_tokenizer()
    words.chat_template, message = REFUSED[case]
    with pytest.raises(UsageError, match=message) as caught:
        templated(words, [{"role": "user", "content": "a"}], {})
    assert caught.value.hint


@pytest.mark.parametrize(
    "messages",
    ["hello", [], [{"role": "user"}], [{"content": "a"}], [{"role": "user", "content": 5}], [7]],
)
def test_what_is_no_message_is_refused(model: HybridModel, messages: Any) -> None:
    """Before the template sees it."""
    with pytest.raises(UsageError):
        model.chat(messages)


def test_variables_reach_the_template(model: HybridModel) -> None:
    """As --template-arg and --no-think give them."""
    before = model.tokenizer.chat_template
    model.tokenizer.chat_template = LOOP + "{% if not enable_thinking %}<think></think>{% endif %}"
    try:
        ids = model.encode_chat([{"role": "user", "content": "a"}], enable_thinking=False)
        assert model.tokenizer.decode(ids[0]) == "a<think></think>"
    finally:
        model.tokenizer.chat_template = before


def test_the_template_s_end_ends_an_answer(
    model: HybridModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the end tokens of settings, config and tokenizer; a text has those alone."""
    words = byte_tokenizer()
    words.add_special_tokens({"additional_special_tokens": ["<|over|>", "<|other|>"]})
    words.chat_template = "{% for m in messages %}{{ m.content }}<|over|>{% endfor %}"
    monkeypatch.setattr(model, "tokenizer", words)
    monkeypatch.setattr(model.model.generation_config, "eos_token_id", [7])
    ids = torch.arange(4)[None]
    over = words.convert_tokens_to_ids("<|over|>")
    answer = model.writing(ids, on_thought=lambda piece: None, max_new_tokens=3)
    assert answer.options["eos_token_id"] == [7, over]
    assert model.writing(ids, max_new_tokens=3).options["eos_token_id"] == [7]


def test_a_text_that_is_none_is_refused(model: HybridModel) -> None:
    """Bytes that a terminal handed on although they are not UTF-8, and letters without end."""
    with pytest.raises(UsageError, match=r"not UTF-8 at letter 2"):
        model.generate("ab\udcff")
    with pytest.raises(UsageError, match=r"not UTF-8 at letter"):
        Conversation(model).ask("ab\udcff")
    whole = model.tokenizer
    model.tokenizer = SimpleNamespace(
        get_vocab=lambda: {"abcd": 0},
        chat_template=TEMPLATE,
        apply_chat_template=lambda messages, **_: messages[0]["content"],
    )
    try:
        with pytest.raises(UsageError, match=r"4000000 letters, 1000000 tokens or more"):
            model.chat([{"role": "user", "content": "x" * 4_000_000}])
    finally:
        model.tokenizer = whole
