"""Popularity files, caches that start from them, and caches that change their size."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from hybrid.ask.sizes import parse_bytes
from planner.cost.cost import CostModel
from planner.decide.cache import ExpertCache
from planner.decide.policies import DEFAULT_POLICY, policy
from planner.decide.popularity import Popularity, read_popularity
from planner.describe.words import enough_in_words
from planner.errors import SpecError, TraceError
from planner.foretell.memory import STAGING, HostMemory, fit
from planner.foretell.request import Request
from planner_examples import bare_machine, hybrid_plan, machine, save_config, small_model

LAYERS, EXPERTS = 6, 16
USES = np.arange(LAYERS * EXPERTS).reshape(LAYERS, EXPERTS)


def test_a_file_comes_back_as_it_was(tmp_path):
    """Write, read, the same."""
    path = tmp_path / "uses.json"
    path.write_text(Popularity("small", 96, USES).to_json())
    found = read_popularity(path)
    assert (found.model, found.tokens) == ("small", 96)
    assert (found.uses == USES).all()


@pytest.mark.parametrize(
    "change",
    [
        {"schema": "other"},
        {"uses": [[1, 2], [3]]},
        {"uses": [[1, -2]]},
        {"uses": []},
        {"uses": [["a"]]},
        {"tokens": None},
        {"tokens": -1},
    ],
)
def test_a_damaged_file_is_named(tmp_path, change):
    """Another schema, ragged, negative or missing counts: the path and what to do."""
    path = tmp_path / "uses.json"
    path.write_text(json.dumps({**json.loads(Popularity("m", 1, USES).to_json()), **change}))
    with pytest.raises(TraceError, match=r"uses\.json") as caught:
        read_popularity(path)
    assert caught.value.hint


def test_a_cut_file_is_named(tmp_path):
    """Half a file is not JSON."""
    path = tmp_path / "cut.json"
    path.write_text(Popularity("m", 1, USES).to_json()[:40])
    with pytest.raises(SpecError, match=r"cut\.json"):
        read_popularity(path)


def test_a_trace_is_counted(tmp_path):
    """Each layer's uses are the trace's; an expert that the model lacks is named."""
    ids = np.array([[[0, 1], [2, 1]], [[0, 3], [2, 0]]], np.uint8)
    path = tmp_path / "trace.npz"
    np.savez(path, expert_ids=ids, routing_weights=np.ones(ids.shape, np.float16))
    found = Popularity.of_trace(path, "m", 4)
    assert found.uses.tolist() == [[2, 1, 0, 1], [1, 1, 2, 0]]
    assert found.tokens == 2
    with pytest.raises(TraceError, match="names expert 3, m has experts 0 to 2"):
        Popularity.of_trace(path, "m", 3)


def test_a_cache_starts_with_the_favourites():
    """The policy that was told values the most used most; without counts all are alike."""
    cache = ExpertCache(
        policy(DEFAULT_POLICY, LAYERS, EXPERTS, Popularity("m", 50, USES)), [3] * LAYERS
    )
    assert cache.favourites(2) == [15, 14, 13]
    cold = ExpertCache(policy(DEFAULT_POLICY, LAYERS, EXPERTS), [3] * LAYERS)
    assert cold.favourites(2) == [0, 1, 2]
    with pytest.raises(TraceError, match=r"\[6, 16\] experts of m, the model has \[6, 8\]"):
        policy(DEFAULT_POLICY, LAYERS, 8, Popularity("m", 50, USES))


def test_slots_go_where_uses_are_spread():
    """A layer that uses few experts needs fewer slots than one that uses all alike."""
    uses = np.ones((2, 8), dtype=np.int64) * 10
    uses[0] = [70, 10, 0, 0, 0, 0, 0, 0]
    few, many = Popularity("m", 40, uses).capacities(8)
    assert few + many == 8
    assert few < many


def test_fit_sets_slots_aside_and_uses_no_byte_twice():
    """Everything in VRAM adds up to at most what is there; staging comes out of the slots."""
    cost = CostModel(small_model(), machine().with_values("gpu", vram_bytes=780 * 2**20), "q4_0")
    slot = cost.model.experts.block("q4_0").stride
    sizes = {"context": 256, "batch": 1, "slot_bytes": slot}
    bare, staged = fit(cost, **sizes), fit(cost, **sizes, staging=STAGING)
    assert sum(bare.slots) - sum(staged.slots) == STAGING
    for placed in (bare, staged):
        assert placed.vram_bytes - slot < placed.used("vram") <= placed.vram_bytes
        assert placed.slot_bytes == slot
    assert slot % 4096 == 0


def test_host_memory_is_pinned_while_there_is_plenty():
    """Half of RAM may be pinned for a GPU; the rest stays a mapped file."""

    def kind(hardware, ram):
        cost = CostModel(small_model(), hardware.with_values("cpu", ram_bytes=ram), "q4_0")
        return fit(cost, context=256, batch=1).host

    gib = 2**30
    assert kind(machine(), 16 * gib) is HostMemory.PINNED
    assert kind(bare_machine(), 16 * gib) is HostMemory.FILE
    assert kind(machine(), int(2.04 * gib)) is HostMemory.FILE


def test_a_placement_tells_slots_and_host_memory():
    """Who shares the slots how, how the experts lie in RAM, and which part of them stays there."""
    cost = CostModel(small_model(), machine().with_values("gpu", vram_bytes=780 * 2**20), "q4_0")
    sizes = {"context": 256, "batch": 1}
    told = fit(cost, **sizes).slots_told(24)
    assert told == (
        "24 of 96 experts can be resident (25%), slots are shared equally over the layers, as no "
        "popularity is known"
    )
    known = fit(cost, popularity=Popularity("small", 96, USES), **sizes)
    assert "shared over the layers by how their experts were used before" in known.slots_told(24)
    assert known.host_told() == "experts are pinned, 100% of them stay in RAM"
    short = CostModel(small_model(), machine().with_values("cpu", ram_bytes=2**31 + 2**20), "q4_0")
    assert fit(short, **sizes).host_told() == (
        "experts are file-backed, 1% of them stay in RAM, the others are read from disk when they "
        "are needed"
    )


def test_a_shortage_says_what_is_needed():
    """VRAM too small for the dense part: by how much, and how much it takes."""
    cost = CostModel(small_model(), machine().with_values("gpu", vram_bytes=256 * 2**20), "q4_0")
    placed = fit(cost, context=256, batch=1)
    assert placed.shortage is not None
    needed = re.search(r"([\d.]+) MiB are needed, 256\.0 MiB are there", placed.shortage)
    assert needed
    assert placed.used("vram") <= float(needed[1]) * 2**20 < placed.used("vram") + 2**20
    assert placed.short_of == ("vram",)


def test_ram_too_small_is_no_shortage_of_vram():
    """Each place is named with what it lacks, and only those that lack something."""
    small = machine().with_values("cpu", ram_bytes=2**30)
    placed = fit(CostModel(small_model(), small, "q4_0"), context=256, batch=1)
    assert placed.short_of == ("ram",)
    assert placed.shortage == (
        "RAM is short by 1024.0 MiB before any expert: 2.00 GiB are needed, 1024.0 MiB are there"
    )
    tiny = small.with_values("gpu", vram_bytes=2**20)
    placed = fit(CostModel(small_model(), tiny, "q4_0"), context=256, batch=1)
    assert placed.short_of == ("vram", "ram")
    assert not placed.fits


def test_what_is_said_to_be_enough_is_enough():
    """Sizes to give are rounded up, in the words that the sizes of options are read in."""
    for size in (1, 641_843_201, 2**31 - 1, 2**31, 5_000_000_001):
        assert size <= parse_bytes(enough_in_words(size), "--vram") <= size * 1.01 + 2**20


def test_plan_takes_a_popularity_file(tmp_path, capsys):
    """The dry run's slots follow the file, and another model's is refused with exit code 2."""
    uses = USES.copy()
    uses[0] = [1000, 900, *[0] * 14]
    path = tmp_path / "uses.json"
    path.write_text(Popularity("small", 1000, uses).to_json())
    hardware = machine().with_values("gpu", vram_bytes=800 * 2**20)
    sizes = {"context": 256, "prompt": 64, "tokens": 4}
    placed = Request(model=small_model(), hardware=hardware, popularity=path, **sizes).fit()
    assert placed.slots[0] < max(placed.slots)
    path.write_text(Popularity("other", 1000, uses[:, :8]).to_json())
    words = (str(save_config(tmp_path / "m")), "--hardware", "rtx4060-laptop")
    code, _, err = hybrid_plan(*words, "--popularity", str(path), capsys=capsys)
    assert code == 2
    assert "experts of other" in err
