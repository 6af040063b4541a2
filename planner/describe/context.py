"""How many tokens of context a model was made for, its rotary embedding's scaling included."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from planner.describe.checked_table import Fields

CONTEXT_NAMES = ("max_position_embeddings", "model_max_length", "max_seq_len", "n_positions")
_SCALED = ("linear", "dynamic", "yarn", "deepseek_yarn")
"""Kinds of rotary embedding that stretch to ``factor`` times what the model was trained with.

Others (longrope, llama3) come with a ``max_position_embeddings`` that is stretched already.
"""


def longest_context(text: Mapping[str, Any], where: str) -> int | None:
    """Return the most tokens of context; None when the model states no limit.

    Parameters
    ----------
    text
        What a ``config.json`` says of the language model.
    where
        How messages name it.

    Raises
    ------
    SpecError
        When a number cannot be.
    """
    fields = Fields(text, where)
    if not fields.has(*CONTEXT_NAMES):
        return None
    stated = fields.count(*CONTEXT_NAMES)
    return max([stated, *(_stretched(fields, stated, scaling) for scaling in _scalings(fields))])


def _scalings(fields: Fields) -> Iterator[Fields]:
    """The tables that say how positions are scaled: one, or one for every kind of layer."""
    for name in ("rope_scaling", "rope_parameters"):
        if isinstance(fields.get(name), Mapping) and fields.get(name):
            table = fields.table(name)
            inner = [key for key, value in table.data.items() if isinstance(value, Mapping)]
            yield from map(table.table, inner) if inner else (table,)
            return


def _stretched(fields: Fields, stated: int, scaling: Fields) -> int:
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind not in _SCALED:
        return stated
    trained = "original_max_position_embeddings"
    base = stated
    if "yarn" in kind and (fields.has(trained) or scaling.has(trained)):
        base = (fields if fields.has(trained) else scaling).count(trained)
    return int(base * scaling.number("factor", least=1.0, most=1e6))
