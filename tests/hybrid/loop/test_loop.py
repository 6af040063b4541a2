"""The loop around the steps beside transformers' own: token for token, option by option."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    MaxTimeCriteria,
    StoppingCriteria,
)

from drafts import Foretold, text_of
from fast_models import converted, open_model
from hybrid.ask.speculate import Speculate
from hybrid.loop.loop import Loop
from hybrid.loop.penalties import OccurrencePenalties
from hybrid.loop.speculation import Speculation
from hybrid.session.generation_stream import GenerationStream
from hybrid.session.own_loop import with_own_loop, with_penalties
from hybrid.transformers_api import cache_argument
from tiny_model import byte_tokenizer

PROMPT = [5, 9, 33, 21, 7, 80, 2, 9, 33]
IDS = torch.tensor([PROMPT])
NEW = 24


class _Even(LogitsProcessor):
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, 1::2] = -torch.inf
        return scores


class _Third(StoppingCriteria):
    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.tensor([input_ids.shape[1] >= len(PROMPT) + 3])


DRAWN = {"do_sample": True}
FILTERS = {"temperature": 0.8, "top_k": 30, "top_p": 0.8, "min_p": 0.02}
#: Calls that our loop takes.
OURS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "drawn": DRAWN,
    "temperature": DRAWN | {"temperature": 0.6},
    "top-k": DRAWN | {"top_k": 5},
    "top-k, all": DRAWN | {"top_k": 0},
    "top-k, more than there are": DRAWN | {"top_k": 1000},
    "top-p": DRAWN | {"top_p": 0.7, "top_k": 0},
    "top-p, one": DRAWN | {"top_p": 0.001},
    "min-p": DRAWN | {"min_p": 0.2},
    "min-p, one": DRAWN | {"min_p": 1.0},
    "all filters": DRAWN | FILTERS,
    "repetition": {"repetition_penalty": 1.4},
    "repetition, drawn": DRAWN | FILTERS | {"repetition_penalty": 0.7},
    "several ends": {"eos_token_id": [3, 7, 11, 20, 30, 40, 50, 60]},
    "an end that is late": {"eos_token_id": [*range(0, 96, 3)], "min_new_tokens": 8},
    "an end by the whole length": {"eos_token_id": [*range(0, 96, 3)], "min_length": 15},
    "a length": {"max_new_tokens": None, "max_length": len(PROMPT) + 5},
    "one token": {"max_new_tokens": 1},
    "a long time": {"max_time": 100.0},
    "no time": {"max_time": 0.0},
    "time that is up": {"stopping_criteria": [MaxTimeCriteria(1.0, time.time() - 2)]},
    "a prompt in chunks": {"prefill_chunk_size": 4},
    "settings": {"generation_config": GenerationConfig(repetition_penalty=1.3)},
    "a padded end": {"eos_token_id": 3, "pad_token_id": 3},
    "a mask of ones": {"attention_mask": torch.ones_like(IDS)},
    "scores that nobody sees": {"output_scores": True},
}
#: Calls that it leaves to transformers' loop.
LEFT: dict[str, dict[str, Any]] = {
    "typical": DRAWN | {"typical_p": 0.9},
    "no repeated words": {"no_repeat_ngram_size": 2},
    "a processor of the caller's": {"logits_processor": [_Even()]},
    "a criterion of the caller's": {"stopping_criteria": [_Third()]},
    "no cache": {"use_cache": False},
    "a static cache": {"cache_implementation": "static"},
    "a hole in the prompt": {"attention_mask": torch.tensor([[1, 0, 0, 1, 1, 1, 1, 1, 1]])},
}
#: Calls that are none of a token after the other in one sequence.
OTHER: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 2},
    "several": DRAWN | {"num_return_sequences": 2},
    "looked up": {"prompt_lookup_num_tokens": 3},
    "a whole result": {"return_dict_in_generate": True},
}


def _options(options: dict[str, Any]) -> dict[str, Any]:
    if "generation_config" in options:
        return options | {"max_new_tokens": NEW}
    return {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0} | options


def _texts(network: Any, options: dict[str, Any], drafts: Any = None) -> tuple[Any, Any, Loop]:
    """What our loop and transformers' give, and the loop; the random numbers end alike."""
    given, loop = _options(options), Loop(GenerationStream(), drafts)
    loop._streamer.start(IDS)
    torch.manual_seed(7)
    wanted = network.generate(IDS, **given)
    state = torch.get_rng_state()
    torch.manual_seed(7)
    found = network.generate(IDS, custom_generate=loop, streamer=loop._streamer, **given)
    assert torch.equal(torch.get_rng_state(), state)
    return found, wanted, loop


@pytest.mark.parametrize("name", OURS)
def test_a_call_gives_what_transformers_loop_gives(network: Any, name: str) -> None:
    """The same tokens and random numbers, streamed one by one."""
    found, wanted, loop = _texts(network, OURS[name])
    assert not loop.left
    assert torch.equal(found, wanted)
    assert torch.equal(loop._streamer.generation().ids, wanted[:, len(PROMPT) :])


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("count", [1, 3])
def test_drafts_change_nothing(network: Any, name: str, count: int) -> None:
    """Right drafts and wrong ones: the same tokens, and the same random numbers after them."""
    torch.manual_seed(7)
    known = network.generate(IDS, **_options(OURS[name]))[0].tolist()
    wrong = range(len(PROMPT) + 4, len(known) + NEW, 5)
    drafts = Foretold([*known, *[1] * NEW], count, wrong).begin_after(PROMPT)
    found, wanted, loop = _texts(network, OURS[name], drafts)
    assert not loop.left
    assert torch.equal(found, wanted)
    if len(known) > len(PROMPT) + 2:
        assert max(drafts.sizes) == count


@pytest.mark.parametrize("name", LEFT)
def test_what_the_loop_does_not_know_is_left(network: Any, name: str) -> None:
    """To transformers' loop, which gives what it always gave."""
    found, wanted, loop = _texts(network, LEFT[name])
    assert loop.left
    assert torch.equal(found, wanted)


@contextmanager
def _transformers_loops(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Notes which of transformers' loops run."""
    ran: list[str] = []
    with monkeypatch.context() as patch:
        for name in ("_sample", "_beam_search", "_assisted_decoding"):
            real = getattr(GenerationMixin, name)

            def loop(*args: Any, real: Any = real, name: str = name, **options: Any) -> Any:
                ran.append(name)
                return real(*args, **options)

            patch.setattr(GenerationMixin, name, loop)
        yield ran


@pytest.mark.parametrize("name", [*OTHER, "a batch"])
def test_other_ways_of_generating(network: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beams, batches, helped decoding and whole results go through transformers' loops."""
    ids = IDS.repeat(2, 1) if name == "a batch" else IDS
    given = _options(OTHER.get(name, {}))
    with _transformers_loops(monkeypatch) as ran:
        settled = with_own_loop(network, given, Loop(GenerationStream()))
        network.generate(ids, **settled)
    assert len(ran) == 1
    with _transformers_loops(monkeypatch) as ran:
        network.generate(IDS, **with_own_loop(network, _options({}), Loop(_started())))
    assert ran == []


def _started() -> GenerationStream:
    stream = GenerationStream()
    stream.start(IDS)
    return stream


def test_stop_strings_of_ids(network: Any) -> None:
    """They end a sequence where transformers ends it, also within a draft."""
    tokenizer = byte_tokenizer()
    known = text_of(network, PROMPT, **_options({}))
    stop = tokenizer.decode(known[len(PROMPT) + 6 : len(PROMPT) + 8])
    given = _options({"stop_strings": [stop], "tokenizer": tokenizer})
    wanted = network.generate(IDS, **given)
    assert len(PROMPT) < wanted.shape[1] < len(known)
    for count in (1, 4):
        drafts = Foretold(known, count).begin_after(PROMPT)
        settled = with_own_loop(network, given, Loop(_started(), drafts))
        assert isinstance(settled["custom_generate"], Loop)
        assert torch.equal(network.generate(IDS, **settled), wanted)
    alone = {name: value for name, value in given.items() if name != "tokenizer"}
    with pytest.raises(ValueError, match="tokenizer"):
        network.generate(IDS, **with_own_loop(network, alone, Loop(_started())))


def test_penalties_of_what_was_generated(network: Any) -> None:
    """What transformers' loop gives with a processor that is written down plainly."""

    class Plain(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            new = input_ids[0, len(PROMPT) :].tolist()
            for token in set(new):
                scores[0, token] -= 0.75 + 0.5 * new.count(token)
            return scores

    texts = {}
    for drawn in ({}, DRAWN | FILTERS):
        given = _options(drawn)
        torch.manual_seed(7)
        wanted = network.generate(IDS, **given, logits_processor=[Plain()])
        asked = given | {"presence_penalty": 0.75, "frequency_penalty": 0.5}
        settled = with_penalties(asked, len(PROMPT))
        for way in (settled, with_own_loop(network, settled, Loop(_started()))):
            torch.manual_seed(7)
            assert torch.equal(network.generate(IDS, **way), wanted)
        texts[len(drawn)] = wanted.tolist()
        assert wanted.tolist() != network.generate(IDS, **given).tolist()
    assert with_penalties({"presence_penalty": 0.0, "top_k": 3}, 4) == {"top_k": 3}
    assert isinstance(settled["logits_processor"][0], OccurrencePenalties)


def _cached(network: Any) -> DynamicCache:
    return DynamicCache(config=network.config.get_text_config(decoder=True))


@pytest.mark.parametrize("count", [0, 1, 4])
def test_a_callers_cache(network: Any, count: int) -> None:
    """It holds all tokens but the last afterwards, and the text goes on from it."""
    given = _options({})
    known = text_of(network, PROMPT, **given | {"max_new_tokens": 2 * NEW})
    cache = _cached(network)
    drafts = Foretold(known, count).begin_after(PROMPT) if count else None
    loop = Loop(_started(), drafts)
    first = network.generate(IDS, custom_generate=loop, **given, **cache_argument(cache))
    assert cache.get_seq_length() == len(PROMPT) + NEW - 1
    assert first[0].tolist() == known[: len(PROMPT) + NEW]
    again = Loop(_started())
    given["attention_mask"] = torch.ones_like(first)  # of text that has the token for padding
    second = network.generate(first, custom_generate=again, **given, **cache_argument(cache))
    assert not again.left
    assert second[0].tolist() == known


@pytest.mark.parametrize("left_at", [2, 3, 4, 5, 6])
def test_an_interrupt_leaves_a_cache_of_what_was_seen(network: Any, left_at: int) -> None:
    """Within a draft, after it and where it was wrong: all seen tokens but the last are there."""
    given = _options({})
    known = text_of(network, PROMPT, **given)
    wrong = {len(PROMPT) + 5}
    seen: list[int] = []

    class Leaving(GenerationStream):
        def put(self, value: torch.Tensor) -> None:
            seen.extend(value.flatten().tolist())
            if len(seen) - len(PROMPT) == left_at:
                raise KeyboardInterrupt

    cache, stream = _cached(network), Leaving()
    loop = Loop(stream, Foretold(known, 3, wrong).begin_after(PROMPT))
    with pytest.raises(KeyboardInterrupt):
        network.generate(
            IDS, custom_generate=loop, streamer=stream, **given, **cache_argument(cache)
        )
    assert seen == known[: len(PROMPT) + left_at]
    assert cache.get_seq_length() == len(seen) - 1
    rest = network.generate(torch.tensor([seen]), **given, **cache_argument(cache))
    assert rest[0].tolist()[: len(known)] == known


def test_drafts_end_where_the_text_may(network: Any) -> None:
    """None goes beyond the last token that is asked for."""
    given = _options({"max_new_tokens": 6})
    known = text_of(network, PROMPT, **_options({}))
    drafts = Foretold(known, 15).begin_after(PROMPT)
    loop = Loop(_started(), drafts)
    found = network.generate(IDS, custom_generate=loop, **given)
    assert found[0].tolist() == known[: len(PROMPT) + 6]
    assert drafts.sizes == [4]


FAMILIES = {
    "olmoe": None,
    "mixtral": "layer 0 keeps a window, from which no token can be taken back",
    "deepseek_v3": None,
    "gpt_oss": "layer 0 keeps a window, from which no token can be taken back",
    "qwen3_next": "layer 0 keeps a state, from which no token can be taken back",
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("fast", [True, False], ids=["fast", "slow"])
def test_families(family: str, fast: bool, tmp_path: Path) -> None:
    """Compressed caches, windows and states: the same texts; who cannot take back drafts nothing.

    A cache that can be cut back is, whoever computes.
    """
    network = open_model(converted(family, tmp_path), fast=fast)
    for options in ({}, DRAWN | FILTERS):
        torch.manual_seed(7)
        known = network.generate(IDS, **_options(options))[0].tolist()
        wrong = range(len(PROMPT) + 4, len(known), 5)
        drafts = Foretold(known, 3, wrong).begin_after(PROMPT)
        found, wanted, loop = _texts(network, options, drafts)
        assert not loop.left
        assert torch.equal(found, wanted)
        assert drafts.refused == FAMILIES[family]
        assert drafts.sizes == [] or FAMILIES[family] is None


def test_tokens_are_drawn_as_often_with_drafts(network: Any) -> None:
    """Of two tokens from the two likeliest each, all pairs come as often as their chances say."""
    prompt = torch.tensor([PROMPT[:3]])
    options = {"do_sample": True, "top_k": 2, "max_new_tokens": 3, "pad_token_id": 0}
    likeliest = text_of(network, PROMPT[:3], max_new_tokens=3, do_sample=False, pad_token_id=0)

    def chances(ids: list[int]) -> dict[int, float]:
        with torch.no_grad():
            top = network(torch.tensor([ids])).logits[0, -1].float().topk(2)
        return dict(zip(top.indices.tolist(), top.values.softmax(-1).tolist(), strict=True))

    wanted = {
        (one, two): chance * then
        for one, chance in chances(likeliest[:3]).items()
        for two, then in chances([*likeliest[:3], one]).items()
    }
    counts = dict.fromkeys(wanted, 0)
    runs = 400
    torch.manual_seed(11)
    for _ in range(runs):
        drafts = Foretold(likeliest, 2).begin_after(PROMPT[:3])
        found = network.generate(prompt, custom_generate=Loop(_started(), drafts), **options)
        counts[tuple(found[0, 3:5].tolist())] += 1
    for pair, chance in wanted.items():
        spread = (chance * (1 - chance) * runs) ** 0.5
        assert abs(counts[pair] - chance * runs) <= 4 * spread + 1, (pair, chance, counts)


def test_lookup_drafts_in_a_text_that_repeats_itself(network: Any) -> None:
    """What was written before is drafted and accepted; the text stays."""
    known = text_of(network, PROMPT * 4, **_options({"max_new_tokens": 60}))
    speculation = Speculation(Speculate.of(4))
    drafts = speculation.begin(PROMPT * 4)
    stream = GenerationStream()
    stream.start(torch.tensor([PROMPT * 4]))
    found = network.generate(
        torch.tensor([PROMPT * 4]),
        custom_generate=Loop(stream, drafts),
        **_options({"max_new_tokens": 60}),
    )
    assert found[0].tolist() == known
    assert drafts is not None
    summary = drafts.summary()
    assert summary.steps > 0
    assert summary.drafted >= summary.accepted
