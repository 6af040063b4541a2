"""Laws of made-up routing: each family's meets what others published, and bands hold the rest."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hybrid.ask.asked_model import find_model
from hybrid.ask.names import find_hardware, routing_laws
from planner.decide.policies.lru import LRU
from planner.decide.replay import replay
from planner.describe.routing_law import RECORDED, UNPUBLISHED, RoutingLaw, law_of, read_laws
from planner.errors import SpecError
from planner.foretell.dryrun import dry_run
from planner.foretell.request import Request
from planner.foretell.routing import synthetic
from planner_examples import small_model

PUBLISHED = Path(__file__).parents[3] / "shared" / "traces" / "published_hit_rates.json"
LAYERS = 6
IN_USE = 150
"""Tokens after which a cache is full."""


def rows() -> list[dict[str, Any]]:
    return json.loads(PUBLISHED.read_text())["rows"] if PUBLISHED.is_file() else []


def lru_hit_rates(law: RoutingLaw, row: dict[str, Any], tokens: int) -> np.ndarray:
    """What LRU caches find of routing that is drawn from a law, at each of the row's shares.

    Of so many tokens from an empty cache on; 0 is a cache in use.
    """
    count, top_k = row["experts"], row.get("top_k", 8)
    model = small_model(
        num_hidden_layers=LAYERS, num_local_experts=count, num_experts_per_tok=top_k
    )
    drawn = synthetic(replace(model, routing=law), 1, tokens or 3 * IN_USE, seed=5)
    ids, weights = drawn.decode[:, :, 0], drawn.weights[:, :, 0]
    found = []
    for share in row["fractions"]:
        slots = [round(share * count)] * LAYERS
        whole = replay(LRU(LAYERS, count), ids, weights, slots)
        hits, uses = whole.hits.sum(), whole.activated.sum()
        if not tokens:
            begun = replay(LRU(LAYERS, count), ids[:IN_USE], weights[:IN_USE], slots)
            hits, uses = hits - begun.hits.sum(), uses - begun.activated.sum()
        found.append(hits / uses)
    return np.array(found)


@pytest.mark.parametrize("row", rows(), ids=lambda row: row["model"].rpartition("/")[2])
def test_a_familys_law_meets_its_published_hit_rates(row: dict[str, Any]) -> None:
    """At every share of slots within 4 points; what LFU with decay has more than LRU is known."""
    own = [each for each in routing_laws() if row["family"] in each.families]
    (law,) = [each for each in own if len(own) == 1 or each.model in row["model"]]
    wanted = np.array(row["hit_rates"]) - (0.03 if "LFU" in row["policy"] else 0.0)
    assert np.abs(lru_hit_rates(law.law, row, law.tokens) - wanted).max() < 0.04


def test_the_middle_and_its_band() -> None:
    """Slots for a quarter are hit 3 times in 4, as in the middle of those published, or 1 in 2."""
    row = {"experts": 128, "fractions": [0.25]}
    (middle,) = lru_hit_rates(UNPUBLISHED, row, 0)
    assert middle == pytest.approx(0.74, abs=0.02)
    scattered, concentrated = (lru_hit_rates(law, row, 0)[0] for law in UNPUBLISHED.between)
    assert scattered == pytest.approx(0.49, abs=0.03)
    assert concentrated == pytest.approx(0.84, abs=0.03)
    less, more = (lru_hit_rates(law, row, 0)[0] for law in routing_laws()[1].law.between)
    assert 0.05 < more - less < 0.15


def test_the_law_of_a_family_is_that_of_the_nearest_size() -> None:
    """Of two models that were published, and of none."""
    laws = routing_laws()
    small, large = (law for law in laws if law.families == ("qwen3_moe",))
    assert law_of("qwen3_moe", 2e10, laws) is small.law
    assert law_of("qwen3_moe", 4.8e11, laws) is large.law
    assert law_of("mixtral", 4.7e10, laws) is UNPUBLISHED
    assert find_model("Qwen3-30B-A3B").spec.routing is small.law
    assert find_model("deepseek-v2-lite").spec.routing.skew == RECORDED.skew
    assert find_model("gpt-oss-120b").spec.routing is UNPUBLISHED


def test_an_assumed_law_widens_the_plan() -> None:
    """A token's error holds what the router's habits may change, where a cache profits by them."""
    found = find_model("Qwen3-30B-A3B").spec
    unknown = replace(found, routing=UNPUBLISHED)
    hardware = find_hardware("rtx4060-laptop")
    known, assumed = (
        dry_run(Request(model=model, hardware=hardware)).prediction for model in (found, unknown)
    )
    assert known is not None
    assert assumed is not None
    terms = sum(term.error**2 for term in known.terms.values() if term.error) ** 0.5
    assert known.tpot.error > terms
    assert assumed.tpot.error > known.tpot.error
    assert "like Qwen3-30B-A3B's (bigrig 0.9.1)" in known.routing_origin
    assert "nobody published" in assumed.routing_origin
    alone = replace(hardware, gpu=None, link=None)
    there, gone = (dry_run(Request(model=m, hardware=alone)).prediction for m in (found, unknown))
    assert there.tpot.error == pytest.approx(gone.tpot.error, rel=0.05)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"skew": "much"}, "skew"),
        ({"persistence": 1.5}, "persistence"),
        ({"model": None}, "model"),
        ({"speed": 3.0}, "speed"),
    ],
)
def test_a_law_that_cannot_be_is_refused(change: dict[str, Any], message: str) -> None:
    """With the file, the law and the field."""
    row = {
        "families": ["a"],
        "model": "A",
        "params": 1e9,
        "skew": 1.0,
        "locality": 1.0,
        "persistence": 0.5,
        "tokens": 0,
        "source": "somewhere",
    }
    assert read_laws({"law": [row]}, "laws.toml")[0].law.skew == 1.0
    with pytest.raises(SpecError, match=rf"laws\.toml, law 1.*{message}"):
        read_laws({"law": [{**row, **change}]}, "laws.toml")
