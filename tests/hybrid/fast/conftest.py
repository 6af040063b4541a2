"""Caches as exact as the kernels' own, and a family's model in both its ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from fast_models import converted, open_model


@pytest.fixture
def half_precision_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let transformers' caches round keys and values to half precision, as ours keeps them."""
    for kind in (DynamicLayer, DynamicSlidingWindowLayer):
        real = kind.update

        def update(self: Any, *states: Any, real: Any = real, **options: Any) -> Any:
            keys, values = (side.half().to(side.dtype) for side in states[:2])
            return real(self, keys, values, *states[2:], **options)

        monkeypatch.setattr(kind, "update", update)


@pytest.fixture(scope="module")
def qwen_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted model of a family that has the fast path."""
    return converted("qwen3_moe", tmp_path_factory.mktemp("qwen"))


@pytest.fixture
def pair(qwen_folder: Path) -> tuple[Any, Any]:
    """One model with the fast path, one without."""
    return open_model(qwen_folder), open_model(qwen_folder, fast=False)
