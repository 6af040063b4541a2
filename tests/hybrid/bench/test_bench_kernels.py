"""``hybrid bench kernels``: what it reports and records, on a case that takes no time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hybrid.bench import kernels
from hybrid.cli import main
from hybrid.formats.block import Block
from hybrid.measure import reads

CASE = kernels.Case("q4_0", 64, 32, 8, 2, 1)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Little memory, and one case for each token count."""
    monkeypatch.setattr(reads, "ROTATION_BYTES", 1 << 20)
    monkeypatch.setattr(
        kernels, "cases", lambda formats: [CASE._replace(format=f, tokens=1) for f in formats]
    )


def test_the_record_has_every_key_and_adds_up(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Rates follow from samples and sizes; --json prints what --record appends."""
    file = tmp_path / "results.jsonl"
    args = ["bench", "kernels", "--formats", "q4_0,q8_0", "--repeat", "4", "--threads", "1"]
    assert main([*args, "--json", "--record", str(file)]) == 0
    printed: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert main([*args, "--record", str(file)]) == 0
    assert "read bandwidth" in capsys.readouterr().out
    first, second = map(json.loads, file.read_text().splitlines())
    assert first == printed
    assert second.keys() == first.keys()
    assert first["read_bandwidth_bytes_per_s"] > 0
    assert first["threads"] == 1
    for fmt, row in zip(("q4_0", "q8_0"), first["results"], strict=True):
        shape = Block(hidden=64, intermediate=32, format=fmt)
        assert {name: row[name] for name in CASE._fields} == CASE._replace(format=fmt)._asdict()
        assert len(row["samples_s"]) == 4
        fastest, slowest = min(row["samples_s"]), max(row["samples_s"])
        assert fastest <= row["seconds_median"] <= slowest
        read = 2 * shape.block_bytes  # two experts
        assert read / slowest <= row["bytes_per_s"] <= read / fastest
        flops = 2 * 2 * 3 * 64 * 32
        assert row["gflops"] == pytest.approx(flops / row["seconds_median"] / 1e9)
        assert len(row["reads_bytes_per_s"]) == 1
        assert 0 < row["read_fraction"] <= 1


def test_shares_are_of_the_read_beside() -> None:
    """Noise between neighbours is no more than all of the bandwidth, and raises nothing."""
    assert kernels.shares_of_bandwidth([20e9, 8e9], [40e9, 10e9]) == ([0.5, 0.8], None)
    assert kernels.shares_of_bandwidth([40.7e9, 8e9], [40e9, 10e9]) == ([1.0, 0.8], None)


def test_nothing_is_faster_than_the_bandwidth() -> None:
    """Where plain reads are slower than a kernel, all shares are of the fastest rate there is."""
    shares, reached = kernels.shares_of_bandwidth([32e9, 40e9, 8e9], [10e9, 11e9, 10e9])
    assert (shares, reached) == ([0.8, 1.0, 0.2], 40e9)
    # A single read that something disturbed: the others' is still the fastest.
    shares, reached = kernels.shares_of_bandwidth([30e9, 20e9], [10e9, 40e9])
    assert (shares, reached) == ([0.75, 0.5], 40e9)


def test_kernels_that_read_faster_raise_the_bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    """With reads that take a second the experts' own rate is the bandwidth, and it is said."""
    monkeypatch.setattr(kernels, "read_seconds", lambda words, threads: 1.0)
    lines: list[str] = []
    two = [CASE, CASE._replace(tokens=2)]
    result = kernels.run(two, repeat=3, threads=1, progress=lines.append)
    rates = [row["bytes_per_s"] for row in result["results"]]
    assert result["read_bandwidth_bytes_per_s"] == max(rates)
    assert [row["read_fraction"] for row in result["results"]] == [r / max(rates) for r in rates]
    assert "faster than plain reads" in lines[-1]


def test_calls_take_turns_over_all_experts() -> None:
    """Few experts a call: each comes once before any comes again, from ever other layers."""
    shape = Block(hidden=64, intermediate=32, format="q4_0")
    blocks = kernels.fill(shape, 8)
    assert blocks.nbytes >= reads.ROTATION_BYTES
    calls = kernels._calls(CASE, blocks, shape)
    taken = [next(calls) for _ in range(4)]
    assert [active for _, active in taken] == [2] * 4
    ids = sorted(int(i) for call, _ in taken for i in call.args[1].reshape(-1))
    assert ids == list(range(8))
    assert len({call.args[3].ctypes.data for call, _ in taken}) == 4
