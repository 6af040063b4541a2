"""Sequences in pages: each as by itself, and every page accounted for."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import decoder_layers
from cpu_experts.decoder.decoder import Decoder
from cpu_experts.decoder.layers import Layer
from cpu_experts.decoder.pages import PAGE, PagedSequence, Pages, PagesFull
from decoder_layers import (
    DIM,
    PAIRS,
    D,
    draw,
    make_latent_layer,
    make_layer,
    make_matrix,
    make_norm,
)
from hybrid.formats.errors import ShapeError

UNCOMPILED = bool(numba.config.DISABLE_JIT)
VOCAB = 50


@pytest.fixture(autouse=True)
def the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever tests ran before."""
    monkeypatch.setattr(decoder_layers, "_rng", np.random.default_rng(1))


def _decoder(*layers: Layer) -> Decoder:
    return Decoder(layers, norm=make_norm(D), lm_head=make_matrix(VOCAB, D, "f32"))


def _tokens(count: int) -> tuple[Any, Any, Any]:
    angles = draw(count, PAIRS, scale=2.0)
    return draw(count, D, scale=1.0), np.cos(angles), np.sin(angles)


def _alone(decoder: Decoder, tokens: tuple[Any, Any, Any]) -> Any:
    """The logits of a sequence's tokens, one after the other through a cache of its own."""
    cache, found = decoder.new_cache(), []
    for index, layer in enumerate(decoder.layers):
        cache.store(index, *(np.zeros((layer.stored[0], 0, layer.stored[1]), np.float32),) * 2)
    for x, cos, sin in zip(*tokens, strict=True):
        logits = np.zeros(VOCAB, np.float32)
        decoder.step(x, cos, sin, cache, logits)
        found.append(logits)
    return np.array(found)


def _step(
    decoder: Decoder, sequences: list[PagedSequence], given: list[tuple[Any, Any, Any]]
) -> Any:
    """The logits of all tokens of one step, ``given`` for each sequence."""
    counts = [len(tokens[0]) for tokens in given]
    sides = [np.concatenate(side) for side in zip(*given, strict=True)]
    logits = np.full((sum(counts), VOCAB), np.nan, np.float32)
    kept = np.arange(sum(counts), dtype=np.int32)
    decoder.step_sequences(*sides, sequences, counts, logits, kept=kept)
    return logits


def _cut(tokens: tuple[Any, Any, Any], first: int, last: int) -> tuple[Any, Any, Any]:
    x, cos, sin = (np.ascontiguousarray(side[first:last]) for side in tokens)
    return x, cos, sin


LAYERS = {
    "full": lambda: [make_layer(), make_layer()],
    "window": lambda: [make_layer(window=70), make_layer()],
    "compressed": lambda: [make_latent_layer(low_rank=True)] * 2,
    "many heads": lambda: [make_layer(heads=80, kv_heads=1)],
}


@pytest.mark.parametrize("name", LAYERS)
def test_sequences_of_one_step_are_as_by_themselves(name: str) -> None:
    """Lengths on both sides of a page's end, several tokens of some, joining and leaving."""
    if UNCOMPILED:
        pytest.skip("minutes in plain Python")
    decoder = _decoder(*LAYERS[name]())
    lengths = (3, 2 * PAGE - 1, PAGE, 150)
    tokens = [_tokens(length + 12) for length in lengths]
    wanted = [_alone(decoder, each) for each in tokens]
    pages = decoder.new_pages(1 << 24, 4)
    sequences, done = [pages.open() for _ in lengths], [0, 0, 0, 0]

    def step(*counts: int) -> None:
        picked = [i for i, count in enumerate(counts) if count]
        given = [_cut(tokens[i], done[i], done[i] + counts[i]) for i in picked]
        found = _step(decoder, [sequences[i] for i in picked], given)
        for i in picked:
            part = wanted[i][done[i] : done[i] + counts[i]]
            mine, found = found[: counts[i]], found[counts[i] :]
            np.testing.assert_allclose(mine, part, atol=2e-4 * np.abs(wanted[i]).max())
            done[i] += counts[i]

    step(*lengths)
    step(1, 1, 1, 1)
    step(0, 2, 5, 1)
    sequences[1].close()
    step(3, 0, 1, 1)
    step(0, 0, 0, 7)
    pages.check_integrity()


def test_single_tokens_and_prompts_take_pages() -> None:
    """The kernel of one token, and attention of a prompt's layer, over a cache in pages."""
    decoder = _decoder(*LAYERS["window"]())
    length = 20 if UNCOMPILED else 3 * PAGE + 9
    tokens = _tokens(length)
    wanted = _alone(decoder, tokens)
    pages = decoder.new_pages(1 << 24, 2)
    sequence, logits = pages.open(), np.zeros(VOCAB, np.float32)
    for at, (x, cos, sin) in enumerate(zip(*tokens, strict=True)):
        decoder.step(x, cos, sin, sequence, logits)
        np.testing.assert_allclose(logits, wanted[at], atol=2e-4 * np.abs(wanted).max())
    own, other, layer = decoder.new_cache(), pages.open(), decoder.layers[0]
    own.store(0, *(np.zeros((layer.kv_heads, 0, DIM), np.float32),) * 2)
    other.make_room(length)
    for first, last in ((0, length // 2), (length // 2, length)):
        sides = [draw(last - first, matrix.rows) for matrix in layer.projections]
        _, cos, sin = _cut(tokens, first, last)
        expected = decoder.attend(0, *sides, cos, sin, own)
        found = decoder.attend(0, *sides, cos, sin, other)
        np.testing.assert_allclose(found, expected, atol=1e-5)
    for mine, theirs in zip(other.read(0), own.read(0), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_a_fork_goes_its_own_way() -> None:
    """Both go on from shared pages as if each had computed them; a cut goes back."""
    decoder = _decoder(make_layer())
    length = 5 if UNCOMPILED else PAGE + 5
    tokens, others = _tokens(length + 3), _tokens(3)
    pages = decoder.new_pages(1 << 24, 3)
    sequence = pages.open()
    _step(decoder, [sequence], [_cut(tokens, 0, length)])
    fork = sequence.fork()
    assert fork.pages == sequence.pages
    used = pages.used_bytes
    _step(decoder, [sequence, fork], [_cut(tokens, length, length + 3), others])
    assert pages.used_bytes == used + pages.page_bytes  # the one that both write into
    assert fork.pages[:-1] == sequence.pages[:-1]
    pages.check_integrity()
    fork.cut(length - 2)
    again = _step(decoder, [fork], [_cut(tokens, length - 2, length + 3)])
    wanted = _alone(decoder, tokens)
    np.testing.assert_allclose(again, wanted[length - 2 :], atol=2e-4 * np.abs(wanted).max())


def test_what_is_no_number_stays_in_its_sequence() -> None:
    """NaN in one: the others' logits are the same bits as without, and so are who follows it."""
    decoder = _decoder(make_layer(), make_layer())
    tokens, found = [_tokens(4) for _ in range(3)], []
    for spoilt in (False, True):
        pages = decoder.new_pages(8 * decoder.new_pages(1 << 24, 1).page_bytes, 3)
        given = [tuple(side.copy() for side in each) for each in tokens]
        if spoilt:
            given[1][0][:] = np.nan
        sequences = [pages.open() for _ in tokens]
        first = _step(decoder, sequences, given)  # type: ignore[arg-type]
        assert np.isnan(first[4:8]).all() == spoilt
        sequences[1].close()
        sequences[1] = pages.open()  # in the pages that have it still
        second = _step(decoder, sequences, tokens)
        found.append(np.concatenate([first[:4], first[8:], second]))
    np.testing.assert_array_equal(*found)


def test_numbers_beyond_half_precision_are_one_sequence_s() -> None:
    """Who wrote them is told, and nobody else."""
    decoder = _decoder(make_layer())
    pages = decoder.new_pages(1 << 24, 2)
    sequences = [pages.open(), pages.open()]
    layer = decoder.layers[0]
    sides = [draw(2, matrix.rows) for matrix in layer.projections]
    sides[2] *= 1e6
    for sequence in sequences:
        sequence.make_room(2)
    angles = np.ones((2, PAIRS), np.float32)
    decoder.attend(0, *sides, angles, angles, sequences[1])
    assert [sequence.beyond for sequence in sequences] == [False, True]


def test_what_does_not_fit_is_refused() -> None:
    """With numbers; a step without room computes nothing and changes nothing."""
    decoder = _decoder(make_layer())
    with pytest.raises(ShapeError, match="10 bytes of cache hold no page of 64 tokens"):
        decoder.new_pages(10, 1)
    size = decoder.new_pages(1 << 24, 1).page_bytes
    pages = decoder.new_pages(2 * size, 2)
    sequence = pages.open()
    sequence.make_room(PAGE)
    with pytest.raises(PagesFull, match="1 more pages of 64 tokens of cache are needed, all 2"):
        sequence.make_room(2 * PAGE + 1)
    assert len(sequence.pages) == 1
    other = pages.open()
    with pytest.raises(ShapeError, match="2 sequences are open, as many as may be"):
        pages.open()
    other.close()
    with pytest.raises(ShapeError, match="1 pages of 64 are given for 0 positions"):
        pages.open([0], 0)
    x, cos, sin = _tokens(2)
    kept, logits = np.zeros(1, np.int32), np.zeros((1, VOCAB), np.float32)
    with pytest.raises(ShapeError, match=r"rows \[.*\] have \[1, 1\] tokens; each comes once"):
        decoder.step_sequences(x, cos, sin, [sequence] * 2, [1, 1], logits, kept=kept)
    with pytest.raises(ShapeError, match=r"2 tokens are given, sequences get \[1\]"):
        decoder.step_sequences(x, cos, sin, [sequence], [1], logits, kept=kept)


def test_less_than_a_tenth_is_not_filled() -> None:
    """Of the memory of sequences of very different lengths; nothing is moved when one joins."""
    pages = Pages([(2, 32)] * 3, 1 << 26, 16)
    lengths = np.random.default_rng(0).integers(200, 4000, 16)
    sequences = [pages.open() for _ in lengths]
    for sequence, length in zip(sequences, lengths, strict=True):
        before = [list(each.pages) for each in sequences if each is not sequence]
        sequence.make_room(int(length))
        sequence.advance(int(length))
        assert [each.pages for each in sequences if each is not sequence] == before
    filled = sum(lengths) / PAGE * pages.page_bytes
    assert pages.used_bytes <= 1.1 * filled


class PagesMachine(RuleBasedStateMachine):
    """Sequences of numbers in pages, beside lists; nothing that one does is seen by another."""

    def __init__(self) -> None:
        super().__init__()
        self.pages = Pages([(1, 2)], 12 * Pages([(1, 2)], 1 << 16, 1).page_bytes, 4)
        self.known: list[tuple[PagedSequence, list[int]]] = []
        self.next = 0

    def _write(self, sequence: PagedSequence, count: int) -> list[int]:
        """Write numbers where a kernel would write keys."""
        new = []
        for at in range(sequence.length(), sequence.length() + count):
            self.next = self.next % 2000 + 1
            page = sequence.pages[at // PAGE] * self.pages.page_bytes
            halves = self.pages._memory[page : page + self.pages.page_bytes].view(np.float16)
            place = at % PAGE
            halves[place // 16 * 32 + place % 16] = self.next
            new.append(self.next)
        sequence.advance(count)
        return new

    @precondition(lambda self: len(self.known) < 4)
    @rule()
    def open(self) -> None:
        self.known.append((self.pages.open(), []))

    @precondition(lambda self: self.known)
    @rule(which=st.integers(0, 3), count=st.integers(1, 150))
    def grow(self, which: int, count: int) -> None:
        sequence, numbers = self.known[which % len(self.known)]
        try:
            sequence.make_room(count)
        except PagesFull:
            return
        numbers += self._write(sequence, count)

    @precondition(lambda self: 0 < len(self.known) < 4)
    @rule(which=st.integers(0, 3))
    def fork(self, which: int) -> None:
        sequence, numbers = self.known[which % len(self.known)]
        self.known.append((sequence.fork(), list(numbers)))

    @precondition(lambda self: self.known)
    @rule(which=st.integers(0, 3), part=st.floats(0, 1))
    def cut(self, which: int, part: float) -> None:
        sequence, numbers = self.known[which % len(self.known)]
        del numbers[int(part * len(numbers)) :]
        sequence.cut(len(numbers))

    @precondition(lambda self: self.known)
    @rule(which=st.integers(0, 3))
    def close(self, which: int) -> None:
        self.known.pop(which % len(self.known))[0].close()

    @invariant()
    def holds(self) -> None:
        self.pages.check_integrity()
        for sequence, numbers in self.known:
            assert sequence.length() == len(numbers)
            if numbers:
                assert sequence.read(0)[0][0, :, 0].tolist() == numbers


PagesMachine.TestCase.settings = settings(deadline=None, max_examples=40)
TestPages = PagesMachine.TestCase
