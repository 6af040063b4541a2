"""Shipped model descriptions: transformers builds the shape that the planner counts."""

from __future__ import annotations

import pytest
from transformers import AutoConfig

from hybrid.ask.asked_model import find_model
from hybrid.ask.names import shipped_names
from planner.describe.families import from_hf_config, settings_of


@pytest.mark.parametrize("name", shipped_names("models"))
def test_transformers_fills_gaps_as_the_planner_does(name: str) -> None:
    """A field that is left out means the same to both; one that is null is said to be null."""
    wanted = find_model(name)
    config = AutoConfig.for_model(**wanted.config)
    found = from_hf_config(config.to_dict(), wanted.spec.name)
    assert found.layers == wanted.spec.layers
    assert found.experts == wanted.spec.experts
    assert (found.hidden, found.vocab, found.tied) == (
        *(wanted.spec.hidden, wanted.spec.vocab, wanted.spec.tied),
    )


def test_null_is_not_absent() -> None:
    """The settings that are listed as null are there, without a value."""
    data = {"config": {"a": 1}, "null": ["b"]}
    assert settings_of(data) == {"a": 1, "b": None}
    assert settings_of({"config": {"a": 1}}) == {"a": 1}
