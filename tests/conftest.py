"""What several test files share: an offline Hugging Face, a cache of our own, a tiny model."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="session", autouse=True)
def hybrid_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keep converted copies out of the user's cache folder."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HYBRID_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of an ordinary (not converted) tiny model; see ``tests/tiny_model.py``."""
    from tiny_model import save_tiny_model

    directory = tmp_path_factory.mktemp("models") / "tiny"
    save_tiny_model(directory)
    return directory


@pytest.fixture(scope="session")
def demo_text(hybrid_cache: Path) -> str:
    """What the shipped model writes on the CPU alone; see ``tests/shared_demo.py``."""
    from hybrid.model import HybridModel
    from shared_demo import GREEDY, PROMPT

    return HybridModel.from_pretrained(threads=1).generate(PROMPT, **GREEDY)
