"""Reports as exact text, the page in a real browser, and the sentences that explain."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from hybrid.cli.plan import to_text
from hybrid.planning.html import to_html
from planner.describe.hardware import HardwareSpec
from planner.errors import SpecError
from planner.foretell.advice import variants
from planner.foretell.dryrun import PlanResult, dry_run
from planner.foretell.report import Table, tables, to_markdown
from planner.foretell.request import Request
from planner_examples import bare_machine, machine, small_model

CASES = Path(__file__).parents[1] / "cases"


def answer(hardware: HardwareSpec | None = None, **options: int) -> PlanResult:
    """The small model on the round machine, with room for a few experts only."""
    tight = machine().with_values("gpu", vram_bytes=791 * 2**20)
    sizes = {"context": 256, "prompt": 64, "tokens": 8, **options}
    return dry_run(Request(model=small_model(), hardware=hardware or tight, **sizes))


def test_text_report_is_exactly_this() -> None:
    """The whole report of a fixed request, character by character; a change of it is reviewed."""
    text = to_text(tables(answer()), 100)
    assert text == (CASES / "plan_report.txt").read_text()


def test_markdown_is_exactly_this() -> None:
    """Numbers stand right, sentences are lists."""
    found = to_markdown(
        [
            Table("Times", ("", "ms"), (("token", "1.50"),)),
            Table("Plan", ("", ""), (("model", "x"),), prose=True),
            Table("Why", ("",), (("because",),), prose=True),
        ]
    )
    assert found == (
        "## Times\n\n|  | ms |\n| --- | ---: |\n| token | 1.50 |\n\n"
        "## Plan\n\n|  |  |\n| --- | --- |\n| model | x |\n\n"
        "## Why\n\n- because\n"
    )


def test_why_lines_compare_the_costs_they_name() -> None:
    """Each reason gives both times, and the smaller one won."""
    result = answer()
    assert result.prediction is not None
    why = result.prediction.why
    kept = [re.search(r"resident, ([\d.]+) ms against ([\d.]+) ms", line) for line in why]
    compared = [match for match in kept if match]
    assert compared
    for match in compared:
        assert float(match[1]) < float(match[2])
    assert any("no placement can be faster" in line for line in why)
    bare = answer(bare_machine())
    assert bare.prediction is not None
    assert bare.prediction.why == ("every expert on the CPU: this machine has no GPU",)


def test_changes_are_predicted_by_asking_for_them() -> None:
    """A named change, asked for, is about as fast as it was promised to be."""
    result = answer(bare_machine())
    assert result.prediction is not None
    for change in result.prediction.changes:
        assert change.tpot_s < result.prediction.tpot.value
    promised = {change.what: change.tpot_s for change in result.prediction.changes}
    asked = dry_run(replace(result.request, dense="q8_0"))
    assert asked.prediction is not None
    assert asked.prediction.tpot.value == pytest.approx(promised["dense weights in q8_0"], rel=0.05)


def test_dense_formats_are_named_where_they_change_something() -> None:
    """On the CPU and beside an emulated GPU, whose dense weights are the CPU's; a real GPU has
    them widened, and takes the same time and memory whatever they are stored as."""
    offered = {}
    for where, asked in (
        ("cpu", answer(bare_machine()).request),
        ("emulated", replace(answer().request, emulated=True)),
        ("gpu", answer().request),
    ):
        offered[where] = {what for what, *_ in variants(asked) if what.startswith("dense")}
        smaller = replace(asked, dense="q4_0")
        assert (smaller.cost.head(1) == asked.cost.head(1)) == (where == "gpu")
        taken = [{p: fit.used(p) for p in ("vram", "ram")} for fit in (smaller.fit(), asked.fit())]
        assert (taken[0] == taken[1]) == (where == "gpu")
    both = {"dense weights in q8_0", "dense weights in q4_0"}
    assert offered == {"cpu": both, "emulated": both, "gpu": set()}


def test_remedies_fit_when_taken() -> None:
    """What is offered when a model does not fit does fit."""
    tight = machine().with_values("gpu", vram_bytes=820 * 2**20)
    result = answer(tight, context=8192)
    assert not result.fit.fits
    assert result.prediction is None
    assert result.remedies
    context = re.search(r"--context (\d+)", result.remedies[0])
    assert context
    assert dry_run(replace(result.request, context=int(context[1]))).fit.fits
    small = machine().with_values("gpu", vram_bytes=2**20)
    alone = answer(small)
    assert alone.remedies == ("--vram 0 (the CPU alone)",)
    assert dry_run(replace(alone.request, hardware=bare_machine())).fit.fits
    hopeless = answer(small.with_values("cpu", ram_bytes=2**20))
    assert hopeless.remedies[0].startswith("more memory")


def test_memory_adds_up() -> None:
    """Used VRAM never exceeds what there is when it fits; less VRAM means fewer slots."""
    slots = []
    for mib in (780, 791, 810, 4000):
        fit = answer(machine().with_values("gpu", vram_bytes=mib * 2**20)).fit
        assert fit.fits
        assert fit.used("vram") <= fit.vram_bytes
        slots.append(sum(fit.slots))
    assert slots == sorted(slots)
    assert slots[-1] == 6 * 16


def test_requests_check_their_numbers() -> None:
    """Context beyond the model's, a prompt beyond the context, counts below one."""
    for options, words in (
        ({"context": 9000}, "exceeds the 8192 tokens"),
        ({"prompt": 300}, "--prompt 300 exceeds --context 256"),
        ({"tokens": 0}, "--tokens is 0"),
    ):
        with pytest.raises(SpecError) as caught:
            answer(**options)
        assert words in caught.value.message
        assert caught.value.hint


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium on this machine")
def test_the_page_draws_itself_in_a_browser(tmp_path: Path) -> None:
    """A real browser runs the script without errors and draws the timeline's spans and ticks."""
    page = tmp_path / "page.html"
    page.write_text(to_html(answer()))
    done = subprocess.run(
        [
            "chromium",
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--window-size=1000,800",
            "--enable-logging=stderr",
            "--dump-dom",
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    svg = re.search(r"<svg.*?</svg>", done.stdout, re.DOTALL)
    assert svg
    assert svg.group().count("<rect") > 10
    assert svg.group().count(" ms</text>") >= 2
    assert "Uncaught" not in done.stderr
