"""``hybrid run`` with a device: what it tells and writes, and what sessions leave to the next."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hybrid.cli import main
from hybrid.errors import UsageError
from hybrid.planning.plan import plan
from hybrid.session.model import HybridModel
from planner.decide.popularity import Popularity
from planner.describe.traces import read_trace
from planner.errors import PlannerError
from shared_demo import placed, placement_of


def test_the_command_line_shares_and_writes_a_timeline(tmp_path: Path, capfd: Any) -> None:
    """``hybrid run --vram --perfetto --report``: text on stdout, the rest on stderr, a file."""
    file = tmp_path / "lanes.json"
    words = ["run", "-p", "import os", "-n", "8", "--greedy", "--vram", "1GiB", "--report"]
    assert main([*words, "--perfetto", str(file)]) == 0
    said = capfd.readouterr()
    assert "experts can be resident" in said.err
    assert "slots are shared equally" in said.err
    assert "predicted" in said.err
    assert str(file) in said.err
    events = json.loads(file.read_text())["traceEvents"]
    assert {event["cat"] for event in events if event["ph"] == "X"} >= {"cpu", "gpu"}
    assert main([*words, "--perfetto", str(file)]) == 2
    assert "exists already" in capfd.readouterr().err


def test_the_command_line_tells_what_becomes_of_ram(capfd: Any) -> None:
    """Pinned where there is plenty, file-backed and read from disk where there is not, each time
    in a line of its own and in the report."""
    words = ["run", "-p", "import os", "-n", "2", "--greedy", "--vram", "612MiB", "--report"]
    for ram, told in (("3GiB", "pinned, 100%"), ("2GiB", "file-backed, 0%")):
        assert main([*words, "--ram", ram]) == 0
        said = capfd.readouterr().err
        size = ram.replace("GiB", ".00 GiB")
        assert re.search(rf"^hybrid: RAM, {size}: .*experts are {told} of them", said, re.M)
        assert re.search(rf"^device .*RAM, {size}: .*experts are {told} of them", said, re.M)


def test_a_session_begins_with_what_the_last_one_used(tmp_path: Path, capfd: Any) -> None:
    """``--popularity``: written at the end, added to by the next session, which starts warm."""
    file = tmp_path / "uses.json"
    words = ["run", "-p", "import os", "-n", "8", "--greedy", "--vram", "1GiB"]
    counted = []
    for _ in range(2):
        assert main([*words, "--popularity", str(file)]) == 0
        assert str(file) in capfd.readouterr().err
        counted.append(json.loads(file.read_text())["tokens"])
    assert counted[1] == 2 * counted[0] > 0
    model = placed("demo", 24, popularity=file)
    executor = placement_of(model).executor
    assert executor is not None
    cache = executor.director.cache
    assert sum(len(cache.residency(layer)) for layer in range(6)) == 24
    assert main(["run", "-p", "x", "--popularity", str(file)]) == 2
    assert "on the CPU alone" in capfd.readouterr().err


def test_a_recorded_routing_is_what_the_planner_replays(tmp_path: Path, capfd: Any) -> None:
    """``--routing``: a trace of the session, which a dry run and a warm start both take."""
    file = tmp_path / "mine.npz"
    words = ["run", "-p", "import os", "-n", "8", "--greedy", "--vram", "1GiB"]
    assert main([*words, "--routing", str(file)]) == 0
    assert str(file) in capfd.readouterr().err
    ids, weights = read_trace(file)
    assert ids.shape == weights.shape
    assert ids.shape[1:] == (6, 4)
    assert ids.max() < 16
    model = placed("demo", 24, popularity=file)
    assert placement_of(model).popularity is not None
    dry = plan("demo", vram=placement_of(model).fit.vram_bytes, popularity=file, context=256)
    assert dry.fit == placement_of(model).fit
    assert "how their experts were used before" in placement_of(model).decision[0]
    assert main([*words, "--routing", str(file)]) == 2
    assert "exists already" in capfd.readouterr().err


def test_a_popularity_file_of_another_model_is_refused(tmp_path: Path, tiny_model: Path) -> None:
    """The message gives both shapes; a missing file is named."""
    file = tmp_path / "uses.json"
    file.write_text(Popularity("other", 3, np.ones((2, 3), np.int64)).to_json())
    with pytest.raises(PlannerError, match=r"\[2, 3\].*\[2, 8\]"):
        HybridModel.from_pretrained(tiny_model, vram="1GiB", popularity=file)
    with pytest.raises(UsageError, match="there is no popularity file"):
        HybridModel.from_pretrained(tiny_model, vram="1GiB", popularity=tmp_path / "none.json")


def test_a_timeline_of_the_cpu_alone_is_refused(tmp_path: Path, capfd: Any) -> None:
    """There are no lanes to show; nothing is generated first."""
    words = ["run", "-p", "x", "--perfetto", str(tmp_path / "x.json")]
    assert main(words) == 2
    assert "on the CPU alone" in capfd.readouterr().err
