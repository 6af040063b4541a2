"""Reads a config.json with transformers, the kinds of layers as its publisher listed them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from hybrid.errors import CheckpointError
from planner.describe.layer_kinds import kinds_only_numbered


def read_config(directory: Path, raw: Mapping[str, Any]) -> Any:
    """Return transformers' config of a directory whose config.json holds ``raw``.

    Raises
    ------
    SpecError
        When a list of the layers' kinds is damaged.
    Exception
        Whatever settings of any kind make of transformers' code.
    """
    config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    kinds = kinds_only_numbered(raw)
    if kinds is not None:
        config.layer_types = kinds
    return config


def with_kinds(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a converted directory's config.json says, so that transformers alone reads it."""
    kinds = kinds_only_numbered(raw)
    return dict(raw) if kinds is None else {**raw, "layer_types": kinds}


def check_kinds(config: Any, raw: Mapping[str, Any]) -> None:
    """Refuse a config that transformers read by itself where that makes another model of it.

    Raises
    ------
    CheckpointError
        Naming what it did not read.
    """
    kinds = kinds_only_numbered(raw)
    if kinds is not None and kinds != config.layer_types:
        raise CheckpointError(
            "config.json tells the kinds of layers by attn_type_list, which transformers does not "
            "read: it makes another model of it",
            hint="convert it with 'hybrid convert', and load what that makes",
        )
