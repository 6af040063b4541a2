"""Shipped model descriptions: transformers builds the shape that the planner counts."""

from __future__ import annotations

import pytest
from transformers import AutoConfig

from hybrid.ask.asked_model import subject
from hybrid.ask.names import find_model, shipped_names
from planner.describe.families import from_hf_config, settings_of


@pytest.mark.parametrize("name", shipped_names("models"))
def test_transformers_fills_gaps_as_the_planner_does(name: str) -> None:
    """A field that is left out means the same to both; one that is null is said to be null."""
    wanted = subject(name)
    config = AutoConfig.for_model(**wanted.settings)
    found = from_hf_config(config.to_dict(), wanted.model.name)
    assert found.layers == wanted.model.layers == find_model(name).layers
    assert found.experts == wanted.model.experts
    assert (found.hidden, found.vocab, found.tied) == (
        *(wanted.model.hidden, wanted.model.vocab, wanted.model.tied),
    )


def test_null_is_not_absent() -> None:
    """The settings that are listed as null are there, without a value."""
    data = {"config": {"a": 1}, "null": ["b"]}
    assert settings_of(data) == {"a": 1, "b": None}
    assert settings_of({"config": {"a": 1}}) == {"a": 1}
