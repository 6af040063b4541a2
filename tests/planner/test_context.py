"""The context that a config.json allows, with its positions scaled in any spelling."""

from __future__ import annotations

from typing import Any

import pytest

from planner.describe.context import longest_context
from planner.errors import SpecError

YARN = {"factor": 4.0, "original_max_position_embeddings": 256}


@pytest.mark.parametrize(
    ("said", "allowed"),
    [
        ({}, 256),
        ({"rope_scaling": None, "rope_parameters": None}, 256),
        ({"rope_scaling": {}}, 256),
        ({"rope_scaling": {"rope_type": "yarn"} | YARN}, 1024),
        ({"rope_scaling": {"type": "yarn"} | YARN}, 1024),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4} | YARN}, 1024),
        ({"rope_scaling": None, "rope_parameters": {"rope_type": "yarn"} | YARN}, 1024),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, 1024),
        ({"rope_scaling": {"rope_type": "yarn"} | YARN, "max_position_embeddings": 1024}, 1024),
        ({"rope_scaling": {"type": "deepseek_yarn", "factor": 40}, **YARN}, 10240),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, 512),
        ({"rope_scaling": {"type": "dynamic", "factor": 3}}, 768),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, 256),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, 256),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}, 256),
        ({"rope_parameters": {"rope_type": "default", "factor": None}}, 256),
        (
            {
                "rope_parameters": {
                    "sliding_attention": {"rope_type": "default"},
                    "full_attention": {"rope_type": "yarn"} | YARN,
                }
            },
            1024,
        ),
    ],
)
def test_scaled_positions(said: dict[str, Any], allowed: int) -> None:
    """What YaRN and its relatives stretch counts, wherever and however a file says it."""
    assert longest_context({"max_position_embeddings": 256} | said, "x") == allowed


def test_no_limit() -> None:
    """Who has no positions states no limit."""
    assert longest_context({}, "x") is None


@pytest.mark.parametrize(
    ("scaling", "words"),
    [
        ({"rope_type": "yarn"}, "lacks factor"),
        ({"rope_type": "yarn", "factor": "4"}, "factor is '4'"),
        ({"rope_type": "linear", "factor": 0}, "factor is 0"),
        ({"rope_type": "yarn", "factor": 2, "original_max_position_embeddings": 1.5}, "1.5"),
    ],
)
def test_bad_scalings_are_named(scaling: dict[str, Any], words: str) -> None:
    """A factor that is none is refused by name, not passed over."""
    with pytest.raises(SpecError, match=words):
        longest_context({"max_position_embeddings": 256, "rope_scaling": scaling}, "x")
