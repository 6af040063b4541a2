"""The executor: whatever is resident, copied, predicted, broken off or failing, the same sums."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_experts.errors import DeviceFailedError, DeviceMemoryError
from hybrid.ledger.residual import DECODE, PREFILL
from hybrid.ledger.timeline import Timeline
from hybrid.machine.devices import open_device
from hybrid.sharing.executor import Executor
from hybrid.sharing.routed import RoutedTokens
from planner.decide.policies import DEFAULT_POLICY, policy
from planner.decide.popularity import Popularity
from shared_layers import (
    EXPERTS,
    HIDDEN,
    LAYERS,
    SHAPE,
    TOP_K,
    Blocks,
    exact,
    on_cpu,
    random_layers,
    random_step,
    shared_executor,
)

#: The two parts of a sum are rounded apart: a few units in the last place of the largest term.
TOLERANCE = 2e-5
ALL = LAYERS * EXPERTS


@pytest.fixture(scope="module")
def layers() -> list[Blocks]:
    return random_layers()


class WrongPredictor:
    """Predicts with confidence, and at random."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)

    def limit(self, layers: int) -> None:
        return

    def scores(self, layer: int, hidden: torch.Tensor) -> torch.Tensor | None:
        return torch.zeros(1) if layer + 1 < LAYERS else None

    def probabilities(self, layer: int, scores: Any) -> list[tuple[int, np.ndarray]]:
        return [(after, self._rng.random(EXPERTS)) for after in range(layer + 1, LAYERS)]

    expected_loads = probabilities

    def learn(self, layer: int, ids: Any) -> None:
        return


def check(executor: Executor, layers: list[Blocks], layer: int, step: tuple[Any, Any, Any]) -> None:
    """Run a layer and compare it with the CPU alone."""
    found = executor.run_layer(layer, *step)
    expected = on_cpu(layers[layer], *step)
    assert found.shape == step[0].shape
    np.testing.assert_allclose(
        found.numpy(), expected, rtol=0, atol=TOLERANCE * abs(expected).max()
    )


@settings(max_examples=25, deadline=None)
@given(
    slots=st.integers(0, ALL),
    seed=st.integers(0, 2**32 - 1),
    tokens=st.lists(st.integers(1, 20), min_size=1, max_size=6),
)
def test_any_placement_computes_the_same(slots: int, seed: int, tokens: list[int]) -> None:
    """From no slot to one for every expert, decode and prefill, with wrong prefetches."""
    layers = random_layers(seed % 7)
    executor = shared_executor(layers, slots, lookahead=WrongPredictor(seed))
    rng = np.random.default_rng(seed)
    for count in tokens:
        for layer in range(LAYERS):
            check(executor, layers, layer, random_step(rng, count))
        executor.residents.settle(5.0)
        executor.residents.check_integrity()


def test_thousands_of_steps_keep_their_books(layers: list[Blocks]) -> None:
    """Few slots, many evictions, wrong prefetches: slots, cache and pins agree when idle."""
    executor = shared_executor(layers, 5, lookahead=WrongPredictor(1))
    rng = np.random.default_rng(1)
    for number in range(1500):
        for layer in range(LAYERS):
            step = random_step(rng, 1 if number % 20 else 9)
            if number % 50 == 0:
                check(executor, layers, layer, step)
            else:
                executor.run_layer(layer, *step)
        if number % 10 == 0:
            executor.residents.settle(5.0)
            executor.residents.check_integrity()
    assert executor.device is not None
    assert not executor.notes
    decode = executor.timeline.phases[DECODE]
    assert 0 < decode.hits < decode.activated


def test_a_predictor_that_is_right_raises_the_hits(layers: list[Blocks]) -> None:
    """Experts copied ahead of their router count as hits."""
    rng = np.random.default_rng(2)
    routing = [[random_step(rng, 1) for _ in range(LAYERS)] for _ in range(150)]

    class RightPredictor(WrongPredictor):
        step = 0

        def probabilities(self, layer: int, scores: Any) -> list[tuple[int, np.ndarray]]:
            chance = np.zeros(EXPERTS)
            ids = routing[self.step][layer + 1][1].numpy().ravel()
            chance[ids[ids < EXPERTS]] = 1.0
            return [(layer + 1, chance)]

    hits = []
    for predictor in (None, RightPredictor(0)):
        executor = shared_executor(layers, 9, lookahead=predictor)
        for number, step in enumerate(routing):
            if predictor is not None:
                predictor.step = number
            for layer in range(LAYERS):
                executor.run_layer(layer, *step[layer])
        hits.append(executor.timeline.phases[DECODE].hits)
    assert hits[1] > hits[0]
    assert executor.director.prefetcher.prefetch_precision == 1.0


def test_every_layers_idle_link_is_used_before_the_next_is_planned(
    layers: list[Blocks], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copies beyond the plan are decided once a layer, for all the time until the next one."""
    executor, calls = shared_executor(layers, 5), []
    monkeypatch.setattr(executor._seconds, "mixer", lambda layer, tokens: 1.0)
    director, rng = executor.director, np.random.default_rng(15)
    place, fill = director.place, director.fill

    def placed(layer: int, *args: Any, **times: Any) -> Any:
        calls.append(("place", layer))
        return place(layer, *args, **times)

    def filled(decision: Any, ahead: Any, idle_s: list[float]) -> Any:
        calls.append(("fill", decision.plan.layer))
        assert idle_s[0] > 0.9
        return fill(decision, ahead, idle_s)

    monkeypatch.setattr(director, "place", placed)
    monkeypatch.setattr(director, "fill", filled)
    for tokens in (1, 30, 1, 1):
        for layer in range(LAYERS):
            executor.run_layer(layer, *random_step(rng, tokens))
        executor.end_step(0.0)
    wanted = [
        (name, layer) for _ in range(4) for layer in range(LAYERS) for name in ("place", "fill")
    ]
    assert calls == wanted


def test_warming_fills_the_slots_with_the_most_used(layers: list[Blocks]) -> None:
    """What is known of the experts' use decides what is resident before the first token."""
    uses = np.tile(np.arange(EXPERTS), (LAYERS, 1))
    known = Popularity("small", 100, uses)
    executor = shared_executor(
        layers, 2 * LAYERS, policy=lambda *shape: policy(DEFAULT_POLICY, *shape, known)
    )
    executor.guard.warm()
    executor.residents.check_integrity()
    for layer in range(LAYERS):
        assert executor.director.cache.residency(layer) == {EXPERTS - 1, EXPERTS - 2}
    rng = np.random.default_rng(11)
    executor.run_layer(0, *random_step(rng, 40))
    executor.end_step(0.0)
    assert executor.usage.tokens == 40
    assert 0 < executor.usage.uses[0].sum() <= 40 * TOP_K
    assert not executor.usage.uses[1:].any()


FAULTS = ("copy", "compute", "memory", "stall")


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("after", [0, 3])
def test_a_fault_changes_no_result(layers: list[Blocks], fault: Any, after: int) -> None:
    """A failing copy, kernel or allocation, or one that never ends, costs the device at most."""
    executor = shared_executor(layers, 6, timeout_s=0.3)
    rng = np.random.default_rng(3)
    exact(executor).fail(fault, after)
    for _ in range(30):
        for layer in range(LAYERS):
            check(executor, layers, layer, random_step(rng, 1))
    assert len(executor.notes) == 1
    note = executor.notes[0]
    if fault == "memory":
        assert executor.slot_count == 4
        assert "4 expert slots instead of 6" in note.what
        executor.residents.settle(5.0)
        executor.residents.check_integrity()
    else:
        assert executor.device is None
        assert "all experts on the CPU" in note.what


def test_memory_that_never_comes_back_costs_the_device(layers: list[Blocks]) -> None:
    """Slots shrink down to none, then the CPU goes on alone."""
    executor = shared_executor(layers, 6)
    device = exact(executor)
    rng = np.random.default_rng(4)
    for layer in range(LAYERS):
        check(executor, layers, layer, random_step(rng, 1))
    refused = []

    def refuse(*arguments: Any) -> None:
        refused.append(arguments)
        device.fail("memory")

    original = device.open
    device.open = lambda *a: (refuse(*a), original(*a))[1]  # type: ignore[method-assign]
    device.fail("memory")
    for layer in range(LAYERS):
        check(executor, layers, layer, random_step(rng, 1))
    assert executor.device is None
    assert len(refused) > 1


def test_slots_shrink_after_the_failed_call_let_go(
    layers: list[Blocks], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the call that ran out of memory held is free when the smaller slots are allocated."""

    class Large:
        pass

    held: list[weakref.ref[Large]] = []
    executor = shared_executor(layers, 6)
    device = exact(executor)
    reopen = device.open

    def compute(*_: Any) -> Any:
        large = Large()
        held.append(weakref.ref(large))
        raise DeviceMemoryError("full", asked_bytes=1, free_bytes=0)

    def check_free(*arguments: Any) -> None:
        assert held[0]() is None
        reopen(*arguments)

    rng = np.random.default_rng(12)
    with monkeypatch.context() as patch:
        patch.setattr(device, "compute", compute)
        patch.setattr(device, "open", check_free)
        while not held:
            check(executor, layers, 0, random_step(rng, 9))
    assert executor.slot_count == 4


def test_memory_that_is_short_from_the_start_costs_slots(layers: list[Blocks]) -> None:
    """Slots that cannot be allocated when a model is loaded become fewer, and it is said."""
    layout = SHAPE.with_stride(layers[0].blocks.shape[1])
    device = open_device("emulated", 100 * layout.stride, 1)
    device.fail("memory")
    executor = shared_executor(layers, 8, device=device)
    assert executor.slot_count == 6
    assert "6 expert slots instead of 8" in executor.notes[0].what
    check(executor, layers, 0, random_step(np.random.default_rng(13), 3))


def test_a_dropped_device_is_still_counted_and_recorded(layers: list[Blocks]) -> None:
    """Uses and traces go on when everything runs on the CPU."""
    executor = shared_executor(layers, 6, record_routing=True)
    rng = np.random.default_rng(14)
    for fault in (False, True):
        if fault:
            exact(executor).fail("compute")
        for _ in range(4):
            for layer in range(LAYERS):
                executor.run_layer(layer, *random_step(rng, 2))
        executor.end_step(0.0)
    assert executor.device is None
    assert executor.usage.tokens == 16
    assert executor.usage.recorder is not None
    assert executor.usage.recorder.tokens == 16
    executor.forget_counts()
    assert (executor.usage.tokens, executor.usage.uses.sum(), executor.usage.recorder.tokens) == (
        0,
        0,
        0,
    )


def test_an_expert_chosen_twice_has_two_loads() -> None:
    """Routers by token id may name an expert twice for one token."""
    factors = np.array([[0.5, 0.3, 0.2]], np.float32)
    choice = RoutedTokens(np.array([[3, 1, 3]]), factors, 4)
    assert choice.loads == ((1, 1), (3, 2))
    assert choice.weights == pytest.approx([0.3, 0.7])


def interruptions(executor: Executor) -> Iterator[tuple[Any, str]]:
    """Every place where a step can be broken off between two of its halves."""
    device, director, residents = exact(executor), executor.director, executor.residents
    yield device, "copy"
    yield device, "compute"
    yield device, "join"
    yield device, "to_host"
    yield director, "place"
    yield director, "fill"
    yield residents, "admit"
    yield director.cache, "offer"
    yield director.cache, "pin"


@pytest.mark.parametrize("place", range(9))
@pytest.mark.parametrize("late", [False, True])
def test_an_interruption_leaves_everything_usable(
    layers: list[Blocks], monkeypatch: pytest.MonkeyPatch, place: int, late: bool
) -> None:
    """Ctrl-C before or after any part of a step: books agree, and the next step is right."""
    executor = shared_executor(layers, 5, lookahead=WrongPredictor(5))
    rng = np.random.default_rng(5)
    struck = 0
    for number in range(40):
        target, name = list(interruptions(executor))[place]
        original = getattr(target, name)
        left = [number % 3]

        def strike(
            *args: Any, original: Any = original, left: list[int] = left, **kwargs: Any
        ) -> Any:
            left[0] -= 1
            if left[0] >= 0:
                return original(*args, **kwargs)
            if late:
                original(*args, **kwargs)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(target, name, strike, raising=True)
            try:
                for layer in range(LAYERS):
                    executor.run_layer(layer, *random_step(rng, 1))
            except KeyboardInterrupt:
                struck += 1
        assert executor.device is not None
        executor.residents.check_integrity()
        for layer in range(LAYERS):
            check(executor, layers, layer, random_step(rng, 1))
    assert struck > 10


def test_an_error_of_our_own_is_not_taken_for_the_device(
    layers: list[Blocks], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the device's errors are answered by going on without it."""
    executor = shared_executor(layers, 5)
    monkeypatch.setattr(executor.director, "fill", lambda *_: 1 / 0)

    def step() -> None:  # what can wait happens in the next layer
        for layer in range(LAYERS):
            executor.run_layer(layer, *random_step(np.random.default_rng(6), 1))

    with pytest.raises(ZeroDivisionError):
        step()


def test_two_threads_never_mix_their_results(layers: list[Blocks]) -> None:
    """Layers of two generations at once run one after the other."""
    import threading

    executor = shared_executor(layers, 6)
    failures: list[BaseException] = []

    def generate(seed: int) -> None:
        rng = np.random.default_rng(seed)
        try:
            for _ in range(40):
                for layer in range(LAYERS):
                    check(executor, layers, layer, random_step(rng, 1))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=generate, args=(seed,)) for seed in (7, 8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_the_timeline_adds_up(layers: list[Blocks]) -> None:
    """Terms add up to the step; lanes hold what was done; events are kept."""
    executor = shared_executor(layers, 6, timeline=Timeline(keep=True))
    rng = np.random.default_rng(9)
    for tokens in (12, 1, 1):
        executor.begin_step(prompt=tokens > 1, context=tokens)
        for layer in range(LAYERS):
            executor.run_layer(layer, *random_step(rng, tokens))
        executor.end_step(1e-3)
    executor.residents.settle(5.0)
    timeline = executor.timeline
    timeline.finish()
    prefill, decode = timeline.phases[PREFILL], timeline.phases[DECODE]
    assert (prefill.steps, decode.steps) == (1, 2)
    assert decode.predicted.terms["output head"] == pytest.approx(1e-3)
    for phase in (prefill, decode):
        assert phase.measured.duration_s == pytest.approx(sum(phase.measured.terms.values()))
        assert all(value >= 0 for value in phase.measured.terms.values())
    assert prefill.activated <= LAYERS * EXPERTS
    assert decode.activated <= 2 * LAYERS * TOP_K
    lanes = {event.lane for event in timeline.events}
    assert lanes == {"cpu", "gpu", "link"}
    assert all(event.end_s >= event.start_s >= 0 for event in timeline.events)


def test_a_failed_close_is_told(layers: list[Blocks], monkeypatch: pytest.MonkeyPatch) -> None:
    """Even a device that cannot be closed does not stop generation."""
    executor = shared_executor(layers, 6)
    device = exact(executor)

    def fail() -> None:
        raise DeviceFailedError("the driver is gone")

    monkeypatch.setattr(device, "close", fail)
    device.fail("compute")
    rng = np.random.default_rng(10)
    for layer in range(LAYERS):
        check(executor, layers, layer, random_step(rng, 9))
    assert [note.reason for note in executor.notes][1:] == ["the driver is gone"]
    assert layers[0].shape.hidden == HIDDEN
