"""``hybrid plan diff``: what differs between two plans, and files that are no plans."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from planner_examples import LAPTOP, QUICK, hybrid_plan


def test_diff(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two plans: what was asked differently, what follows, where memory differs."""
    paths = []
    for name, extra in (("a", ()), ("b", ("--context", "4096", "--vram", "1GiB"))):
        _, out, _ = hybrid_plan(str(small), *LAPTOP, *QUICK, *extra, "--json", capsys=capsys)
        paths.append(tmp_path / f"{name}.json")
        paths[-1].write_text(out)
    code, out, _ = hybrid_plan("diff", *map(str, paths), capsys=capsys)
    assert code == 0
    for words in ("What differs", "context", "64", "4096", "Prediction", "A ms", "B ms", "Memory"):
        assert words in out
    assert "experts  " not in out.split("Prediction")[0]
    code, out, _ = hybrid_plan("diff", str(paths[0]), str(paths[0]), capsys=capsys)
    assert "What differs" not in out
    assert "+0.0%" in out
    for words, problem in (
        ((str(paths[0]),), "needs two plans"),
        ((str(paths[0]), str(small / "config.json")), "schema None"),
        ((str(paths[0]), "none.json"), "cannot read"),
    ):
        code, _, err = hybrid_plan("diff", *words, capsys=capsys)
        assert code == 2
        assert problem in err
    paths[1].write_text(paths[1].read_text()[:200])
    code, _, err = hybrid_plan("diff", *map(str, paths), capsys=capsys)
    assert code == 2
    assert "cut short" in err


def test_plans_of_two_policies_are_told_apart(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Text and JSON name a policy that was asked for, and what differs between two plans does."""
    words = (str(small), *LAPTOP, *QUICK)
    assert "policy" not in hybrid_plan(*words, capsys=capsys)[1].split("verdict")[0]
    assert "with the policy lru" in hybrid_plan(*words, "--policy", "lru", capsys=capsys)[1]
    files = []
    for name in ("blend", "lru", "earlier"):
        options = ("--policy", name) if name == "lru" else ()
        data = json.loads(hybrid_plan(*words, *options, "--json", capsys=capsys)[1])
        if name == "earlier":
            del data["request"]["policy"]
        else:
            assert data["request"]["policy"] == name
        files.append(tmp_path / f"{name}.json")
        files[-1].write_text(json.dumps(data))
    for first, second, differs in ((0, 1, True), (1, 2, True), (0, 2, False)):
        out = hybrid_plan("diff", str(files[first]), str(files[second]), capsys=capsys)[1]
        assert ("policy" in out) == differs
