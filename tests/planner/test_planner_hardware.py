"""Hardware specs: the shipped files, what a bad one says, and what overrides do."""

from __future__ import annotations

import copy
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from planner.describe.checked_table import read_table
from planner.describe.estimate import Source
from planner.describe.hardware import HardwareSpec, Point, Quantity, TermPoint, to_toml
from planner.describe.terms import DECIDING, DENSE, HEAD, MIXER
from planner.errors import SpecError
from planner_examples import bare_machine, machine

HARDWARE = Path(__file__).parents[2] / "configs" / "hardware"
LAPTOP: dict[str, Any] = read_table(HARDWARE / "rtx4060-laptop-8gb.toml")
SHIPPED = {
    "a6000-xeon5220r-10core",
    "cpu-only-laptop",
    "orin-32gb",
    "rtx3050-laptop-4gb",
    "rtx3060-desktop-12gb",
    "rtx4060-laptop-8gb",
    "rtx4090-desktop",
    "t4-cloud",
}


def test_shipped_machines_state_a_source_for_every_number() -> None:
    """All eight machines parse; every number says where it comes from, and lies in its range."""
    assert {path.stem for path in HARDWARE.glob("*.toml")} == SHIPPED
    for name in SHIPPED:
        spec = HardwareSpec.from_table(read_table(HARDWARE / f"{name}.toml"), name)
        assert spec.name == name
        for part in (spec.gpu, spec.cpu, spec.link, spec.disk):
            for value in vars(part).values() if part else ():
                if isinstance(value, Quantity):
                    assert value.origin
                    assert value.value >= 0
        # No file claims what nobody measured.
        text = (HARDWARE / f"{name}.toml").read_text()
        assert '"measured"' not in text
    assert HardwareSpec.from_table(read_table(HARDWARE / "cpu-only-laptop.toml"), "x").gpu is None


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("gpu", "vram_bytes"), 8e9, "without a source"),
        (("gpu", "vram_bytes", "value"), "8 GiB", "vram_bytes: value is '8 GiB'"),
        (("gpu", "vram_bytes", "value"), 0, "vram_bytes is 0"),
        (("gpu", "vram_bytes", "value"), -1.0, "outside"),
        (("gpu", "vram_bytes", "source"), "guessed", "source is 'guessed'"),
        (("gpu", "vram_bytes", "from"), None, "lacks from"),
        (("gpu", "vram_gib"), {"value": 8}, "unknown field 'vram_gib'"),
        (("link", "gb_per_s"), {"value": 13}, "unknown field 'gb_per_s'"),
        (("cpu", "memory_efficiency", "value"), 75.0, "outside [0.001, 1]"),
        (("gpu", "memory_bytes_per_s", "value"), 256, "outside [1e+06, 1e+18]"),
        (("cpu", "flop_per_s", "value"), 1e-30, "outside [1e+06, 1e+18]"),
        (("disk", "latency_s", "value"), 100.0, "outside [0, 60]"),
        (("link", "cpu_slowdown", "value"), 0.5, "outside [1"),
        (("cpu", "start_s"), None, "lacks start_s"),
        (("link",), None, "only one of [gpu] and [link]"),
        (("disk",), None, "lacks disk"),
        (("cpu",), [1], "not a table"),
        (("points",), [{"lane": "tpu"}], "lane is 'tpu'"),
        (("points",), 3, "points is not a list of tables"),
        (("terms",), [1], "terms is not a list of tables"),
        (("terms",), [{"term": "lunch"}], "term is 'lunch'"),
        (("terms",), [{"term": HEAD, "lane": "link"}], "lane is 'link'"),
        (("terms",), [{"term": HEAD, "seconds": 1}], "terms[0] lacks family"),
    ],
)
def test_bad_machines_are_refused(path: tuple[str, ...], value: Any, words: str) -> None:
    """A wrong unit, type, source or missing part names itself, its value and a remedy."""
    data = copy.deepcopy(LAPTOP)
    inner = data
    for key in path[:-1]:
        inner = inner[key]
    if value is None:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    with pytest.raises(SpecError) as caught:
        HardwareSpec.from_table(data, "laptop.toml")
    assert words in caught.value.message
    assert caught.value.hint


def test_a_calibrations_old_names_are_told_to_be_measured_again() -> None:
    """A file from before reports and calibrations had one list of terms names the remedy."""
    data = {**LAPTOP, "terms": [{"term": "feed_forward"}]}
    with pytest.raises(SpecError) as caught:
        HardwareSpec.from_table(data, "old.toml")
    assert DENSE in str(caught.value.hint)
    assert "measure again with 'hybrid calibrate'" in str(caught.value.hint)


def test_a_wrong_unit_is_told_the_right_name() -> None:
    """The hint names the field with its SI unit that was probably meant."""
    data = copy.deepcopy(LAPTOP)
    data["gpu"]["memory_gb_per_s"] = data["gpu"].pop("memory_bytes_per_s")
    with pytest.raises(SpecError) as caught:
        HardwareSpec.from_table(data, "laptop.toml")
    assert "memory_bytes_per_s" in str(caught.value.hint)


def test_overrides_are_marked_as_assumed() -> None:
    """What the user sets replaces the number and its source; zero and missing parts are refused."""
    spec = HardwareSpec.from_table(LAPTOP, "laptop.toml")
    changed = spec.with_values("gpu", vram_bytes=6 * 2**30)
    assert changed.gpu is not None
    assert changed.gpu.vram_bytes == Quantity(6 * 2**30, Source.ASSUMED, "set by the user")
    assert changed.cpu == spec.cpu
    with pytest.raises(SpecError, match="not above 0"):
        spec.with_values("gpu", vram_bytes=0)
    bare = HardwareSpec.from_table(read_table(HARDWARE / "cpu-only-laptop.toml"), "bare.toml")
    with pytest.raises(SpecError, match="has no gpu"):
        bare.with_values("gpu", vram_bytes=1e9)


def test_what_is_written_reads_back_as_an_equal() -> None:
    """Every shipped machine, and one with all that only a calibration knows, survives TOML."""
    specs = [
        HardwareSpec.from_table(read_table(HARDWARE / f"{name}.toml"), name)
        for name in sorted(SHIPPED)
    ]
    shape = {"hidden": 8, "intermediate": 4, "format": "q4_0"}
    measured = Quantity(1.25e-4, Source.MEASURED, 'a "quoted"\nline', 0.1)
    term = {"family": "qwen3_moe", "params": 7, "format": "bf16", "tokens": 1, "context": 9}
    specs.append(
        replace(
            specs[0],
            summary="",
            cpu=replace(specs[0].cpu, token_start_s=measured, prompt_layer_overhead_s=measured),
            points=(
                Point(lane="cpu", load=1, seconds=1e-5, error=1e-7, **shape),
                Point(lane="copy", load=0, seconds=2.0, **shape),
            ),
            terms=(
                TermPoint(term=MIXER, kind="full", piece=512, seconds=0.1, error=0.01, **term),
                TermPoint(term=DENSE, seconds=0.0, **term),
                TermPoint(term=DECIDING, seconds=1e-4, lane="gpu", **term),
            ),
        )
    )
    for spec in specs:
        assert HardwareSpec.from_table(tomllib.loads(to_toml(spec)), "written") == spec


def test_what_only_a_calibration_knows_may_be_absent() -> None:
    """A data sheet says nothing of the runtime's own costs, and a misspelt one is still refused."""
    spec = HardwareSpec.from_table(LAPTOP, "laptop.toml")
    assert (spec.cpu.token_start_s, spec.points, spec.terms) == (None, (), ())
    data = copy.deepcopy(LAPTOP)
    data["cpu"]["token_start"] = data["cpu"]["start_s"]
    with pytest.raises(SpecError, match="unknown field 'token_start'"):
        HardwareSpec.from_table(data, "laptop.toml")


def test_a_calibration_of_old_says_nothing_of_the_device() -> None:
    """Terms without a lane are the CPU's: that is all that was measured once."""
    term = {"term": HEAD, "family": "x", "params": 7, "format": "bf16", "tokens": 1, "context": 1}
    data = {**LAPTOP, "terms": [{**term, "seconds": 0.5}]}
    (found,) = HardwareSpec.from_table(data, "laptop.toml").terms
    assert found.lane == "cpu"


def test_an_emulated_gpu_reserves_nothing() -> None:
    """A described GPU keeps memory for its driver unless its file says less; emulated, none."""
    real = machine()
    assert real.gpu is not None
    assert real.gpu.reserve_bytes.value == 600 * 2**20
    found = real.emulated()
    assert found.gpu is not None
    assert found.gpu.reserve_bytes.value == 0
    assert found.emulated() == found
    assert HardwareSpec.from_table(tomllib.loads(to_toml(found)), "x.toml") == found
    assert bare_machine().emulated() == bare_machine()
