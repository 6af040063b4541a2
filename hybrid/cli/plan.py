"""``hybrid plan``: what a model will do on a machine, before it is downloaded.

This module and all it imports load neither torch nor numba.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from io import StringIO
from pathlib import Path
from shutil import get_terminal_size
from typing import Annotated, Any, NoReturn

import typer

from hybrid.ask.asked_model import find_model
from hybrid.ask.names import find_hardware, resolve, shipped_names
from hybrid.ask.options import Options
from hybrid.cli.options import Policy
from hybrid.errors import UsageError
from hybrid.machine import calibrations
from hybrid.paths import check_writable, write_whole
from hybrid.planning.files import files_of, with_files
from hybrid.planning.plan import checked_counts, machine_for, plan_on
from planner.decide.policies import DEFAULT_POLICY
from planner.describe.checked_table import read_table
from planner.foretell.dryrun import PlanResult
from planner.foretell.report import Table, tables, to_json, to_markdown

DOES_NOT_FIT = 1
"""Exit code, so that scripts need not read the report."""
OR_FORCE = "choose another name, or add --force"
"""What helps against a file that exists."""
_WIDTH = 110
"""Columns when the output is no terminal."""


def plan(
    given: typer.Context,
    model: Annotated[
        str,
        typer.Argument(
            show_default=False,
            metavar="MODEL | diff",
            help="A name such as Qwen3-30B-A3B, a config.json or the directory that holds one; "
            "demo is the model that ships. Or: diff A.json B.json, to compare two plans written "
            "with --json.",
        ),
    ] = "",
    others: Annotated[list[Path] | None, typer.Argument(metavar="A B", hidden=True)] = None,
    hardware: Annotated[
        str | None,
        typer.Option(
            "--hardware",
            "-H",
            help="A name such as rtx4060-laptop, or a hardware TOML file.",
            show_default="this machine, once it is calibrated",
        ),
    ] = None,
    vram: Annotated[
        str | None,
        typer.Option(
            help="Use this much VRAM, such as 6GiB; 0 is the CPU alone. This machine emulates a "
            "GPU if it has none.",
            show_default="what there is",
        ),
    ] = None,
    ram: Annotated[
        str | None,
        typer.Option(help="Use this much RAM, such as 16GiB.", show_default="what there is"),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            "--threads",
            "-t",
            min=1,
            help="Of this machine's CPU; what --hardware describes has the rates of all its cores.",
            show_default="OMP_NUM_THREADS or all cores",
        ),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            "--context",
            "-c",
            help="Tokens of cache to reserve per sequence.",
            show_default="4096, or the model's own if less",
        ),
    ] = None,
    prompt: Annotated[
        int | None,
        typer.Option(
            help="Tokens of the prompt that is timed.", show_default="512, or the context if less"
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens to decode in the simulation.")] = 16,
    batch: Annotated[int, typer.Option(help="Sequences at once.")] = 1,
    experts: Annotated[
        str | None,
        typer.Option(help="Weight format of the experts.", show_default="q4_0, or the directory's"),
    ] = None,
    dense: Annotated[
        str | None,
        typer.Option(
            help="Weight format of everything else; a GPU has it in bf16.",
            show_default="the directory's or checkpoint's",
        ),
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(help="Replay this recorded routing (.npz) instead of a made-up one."),
    ] = None,
    popularity: Annotated[
        Path | None,
        typer.Option(
            help="Start with what earlier sessions used: a popularity file, or a trace (.npz)."
        ),
    ] = None,
    policy: Policy = DEFAULT_POLICY,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the made-up routing.")] = 0,
    experiment: Annotated[
        Path | None, typer.Option(help="Run an experiment file and print it beside its reference.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
    html: Annotated[Path | None, typer.Option(help="Also write one self-contained page.")] = None,
    perfetto: Annotated[
        Path | None, typer.Option(help="Also write a trace for ui.perfetto.dev.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite existing files.")] = False,
) -> None:
    """Say whether a model fits a machine, how fast it will be, why, and what would help.

    Needs the model's config.json only. Every time says where it comes from: measured, fitted,
    analytic or assumed. What lies where is what 'hybrid run' decides for the same model, vram,
    ram, context and threads.

    The exit code is 0 for a model that fits, 1 for one that does not, and 2 for an error.
    """
    if as_json and markdown:
        raise UsageError("--json and --markdown were both given", hint="choose one")
    if model == "diff":
        _take_only(given, "diff", {"model", "others", "markdown"})
        _deliver(_diff(others or []), markdown=markdown)
        return
    if experiment is not None:
        _take_only(given, "--experiment", {"experiment", "as_json", "markdown"})
        _experiment(experiment, as_json=as_json, markdown=markdown)
        return
    if others:
        raise UsageError(
            f"unexpected {str(others[0])!r} after the model", hint="plan one model at a time"
        )
    check_writable("--html", html, replaced=force, remedy=OR_FORCE)
    check_writable("--perfetto", perfetto, replaced=force, remedy=OR_FORCE)
    options = Options.of(
        vram=vram,
        ram=ram,
        context=context,
        threads=threads,
        experts=experts,
        dense=dense,
        popularity=popularity,
        policy=policy,
        prefix="--",
    )
    simulated = checked_counts(prompt=prompt, tokens=tokens, batch=batch, trace=trace, seed=seed)
    result = _planned(model, hardware, options, simulated)
    if as_json:
        print(to_json(result))
    else:
        _deliver(tables(result), markdown=markdown)
    if html is not None:
        from hybrid.planning.html import to_html

        write_file(html, to_html(result))
    if perfetto is not None:
        from planner.foretell.perfetto import to_perfetto

        write_file(perfetto, to_perfetto(result))
    if not result.fit.fits:
        raise typer.Exit(DOES_NOT_FIT)


def _planned(
    model: str, hardware: str | None, options: Options, simulated: dict[str, Any]
) -> PlanResult:
    """Plan, and say on stderr what was taken for granted."""
    if not model:
        _missing(model)
    asked = find_model(model).in_formats(options.experts, options.dense)
    machine = machine_for(asked, hardware, options)
    if machine is None:
        _missing(model)
    if machine.origin:
        print(f"no --hardware given: {machine.origin}", file=sys.stderr)
    result = plan_on(machine, asked, options, **simulated)
    files = files_of(asked, options.dense)  # last: it may load torch
    result = with_files(result, files)
    for note in files.notes:
        print(f"{model}: {note}", file=sys.stderr)
    for error in files.errors:
        print(f"{model} cannot be run as it is: {error}", file=sys.stderr)
    if options.popularity is not None and asked.weights() is None:
        print(
            f"{options.popularity}: only its shape was compared, {model} does not tell its weights",
            file=sys.stderr,
        )
    return result


def _take_only(given: typer.Context, what: str, names: set[str]) -> None:
    """Refuse what was given besides ``names``, which is all that ``what`` takes."""
    for option in given.command.params:
        source = given.get_parameter_source(str(option.name))
        if option.name not in names and source is not None and source.name == "COMMANDLINE":
            word = "MODEL" if option.name == "model" else max(option.opts, key=len)
            raise UsageError(f"{word} changes nothing of {what}", hint=f"leave {word} out")


def _deliver(report: list[Table], *, markdown: bool) -> None:
    if markdown:
        print(to_markdown(report))
    else:
        width = get_terminal_size().columns if sys.stdout.isatty() else _WIDTH
        print(to_text(report, width))


def _experiment(path: Path, *, as_json: bool, markdown: bool) -> None:
    from planner.foretell.experiment import (
        experiment_dict,
        experiment_tables,
        read_experiment,
        run_experiment,
    )

    own = path.is_file()
    data = read_table(path, "experiment") if own else resolve(path.name, "experiments")
    experiment = read_experiment(data, path.name, lambda name: find_model(name).spec, find_hardware)
    outcomes = run_experiment(experiment)
    other = run_experiment(experiment, experiment.what_if[1]) if experiment.what_if else []
    if as_json:
        print(json.dumps(experiment_dict(experiment, outcomes, other), indent=2))
    else:
        _deliver(experiment_tables(experiment, outcomes, other), markdown=markdown)


def _missing(model: str) -> NoReturn:
    """Say which of model and hardware was left out, and what there is to choose from."""
    kind, word = ("hardware", "--hardware") if model else ("models", "MODEL")
    measure = f"; or {calibrations.REMEDY}" if model else ""
    raise UsageError(
        f"{word} is missing",
        hint=f"one of {', '.join(shipped_names(kind))}; or a file that describes another{measure}",
    )


def _diff(paths: list[Path]) -> list[Table]:
    from planner.foretell.compare import compare, read_plan

    if len(paths) != 2:
        raise UsageError(
            f"diff needs two plans, got {len(paths)}", hint="hybrid plan diff A.json B.json"
        )
    return compare(read_plan(paths[0]), read_plan(paths[1]))


def to_text(report: Iterable[Table], width: int) -> str:
    """Return tables as text of at most ``width`` columns that needs no colour."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.padding import Padding
    from rich.table import Table as RichTable
    from rich.text import Text

    written = StringIO()
    console = Console(file=written, width=width, color_system=None, legacy_windows=False)
    for table in report:
        console.print(Text(table.title))
        shown = RichTable(
            box=None if table.prose else SIMPLE_HEAD,
            show_header=any(table.columns),
            pad_edge=False,
            show_edge=False,
        )
        for number, heading in enumerate(table.columns):
            if table.prose or number == 0:
                shown.add_column(
                    Text(heading), no_wrap=table.prose and len(table.columns) > 1 > number
                )
            else:
                shown.add_column(Text(heading), justify="right", no_wrap=True)
        for row in table.rows:
            shown.add_row(*map(Text, row if len(row) > 1 else (f"- {row[0]}",)))
        console.print(Padding(shown, (0, 0, 1, 2)))
    return "\n".join(line.rstrip() for line in written.getvalue().splitlines())


def write_file(path: Path, text: str) -> None:
    """Write a file that was asked for, whole or not at all, and say so."""
    write_whole(path, text)
    print(f"wrote {path}", file=sys.stderr)
