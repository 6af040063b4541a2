"""What several test files share: which copy is tested, an offline Hugging Face, a cache of our own,
what the processor is taken for, Ctrl-C, a tiny model, little to measure."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from importlib import invalidate_caches
from importlib.util import find_spec
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"


def _tested_copy() -> str:
    """The folder that ``hybrid`` is imported from; where nothing is installed, this checkout.

    From within this folder Python takes ``tests/hybrid`` for a package without an ``__init__``.
    """
    found = find_spec("hybrid")
    if found is None or found.origin is None:
        sys.path.insert(0, str(Path(__file__).parents[1]))
        invalidate_caches()
        found = find_spec("hybrid")
    assert found is not None
    assert found.origin is not None
    return str(Path(found.origin).parents[1])


# Programs that tests start import that copy, too, whatever folder they start in.
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, (_tested_copy(), os.environ.get("PYTHONPATH")))
)
os.environ["PYTHONSAFEPATH"] = "1"

from cpu_experts.jit import hostcpu  # noqa: E402


@pytest.fixture(scope="session", autouse=True)
def hybrid_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keep converted copies out of the user's cache folder."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HYBRID_CACHE", str(folder))
        yield folder


@pytest.fixture
def bf16_units(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Call it with the units for bfloat16 that this processor is to have for the test, or none.

    The level of the kernels stays, as it is chosen once per process.
    """

    def have(*units: str) -> None:
        kernels = hostcpu.processor().kernels
        monkeypatch.setenv(hostcpu.ENVIRONMENT_VARIABLE, "+".join((kernels, *units)))

    return have


@pytest.fixture(params=[(), ("bf16",)], ids=["without bfloat16 units", "with bfloat16 units"])
def either_processor(request: pytest.FixtureRequest, bf16_units: Callable[..., None]) -> bool:
    """Run a test as a processor without bfloat16 units would, and as one with; whether with."""
    bf16_units(*request.param)
    return bool(request.param)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Let Ctrl-C reach this process and those that it starts, also where its parent ignores it.

    A shell has background jobs of scripts ignore it, and programs inherit that.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of an ordinary (not converted) tiny model (``support/tiny_model.py``)."""
    from tiny_model import save_tiny_model

    directory = tmp_path_factory.mktemp("models") / "tiny"
    save_tiny_model(directory)
    return directory


@pytest.fixture(scope="session")
def demo_text(hybrid_cache: Path) -> str:
    """What the shipped model writes on the CPU alone; see ``tests/support/shared_demo.py``."""
    from hybrid.session.model import HybridModel
    from shared_demo import GREEDY, PROMPT

    return HybridModel.from_pretrained(threads=1).generate(PROMPT, **GREEDY)


@pytest.fixture
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Little memory, a short file, short prompts, a cache folder of its own, nobody else."""
    from fake_machine import calm
    from hybrid.measure import calibrate, experts

    monkeypatch.setenv("HYBRID_CACHE", str(tmp_path))
    monkeypatch.setattr(experts, "_READ_BYTES", 1 << 20)
    monkeypatch.setattr(experts, "_DISK_BYTES", 1 << 22)
    monkeypatch.setattr("hybrid.measure.interference.system_times", calm)
    monkeypatch.setattr(experts, "LOADS", (1, 2, 4))
    monkeypatch.setattr(calibrate, "PROMPTS", (2, 8))
    monkeypatch.setattr(calibrate, "DECODED_AFTER", (8,))
    monkeypatch.setattr(calibrate, "DECODED", 12)
    monkeypatch.setattr(calibrate, "TURNS", (2, 2))
    return tmp_path
