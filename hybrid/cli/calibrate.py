"""``hybrid calibrate``: measure this machine, once, so that plans are about it."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gpu_experts.backends import choices, emulation

if TYPE_CHECKING:
    from gpu_experts.device import Device


def calibrate(
    model: Annotated[
        str | None,
        typer.Argument(
            show_default=False,
            metavar="[MODEL]",
            help="Measure this model's shape: a directory, a config.json, or a name such as "
            "Qwen3-30B-A3B. No weights are needed. A standard shape unless given.",
        ),
    ] = None,
    experts: Annotated[
        str | None, typer.Option(help="Weight format of the experts.", show_default="q4_0")
    ] = None,
    dense: Annotated[
        str | None,
        typer.Option(
            help="Weight format of everything else.", show_default="as the checkpoint has it"
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            help=f"Measure it, too: {choices()}; {emulation().name} is what stands in for a GPU "
            "where there is none. cpu is the CPU alone.",
            show_default="the GPU if there is one",
        ),
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Default: all cores.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="Also write the hardware file (TOML) here.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Measure again; overwrite the file.")
    ] = False,
) -> None:
    """Measure how fast this machine runs experts, attention and all the rest.

    Takes about a minute. The result is kept for this machine, and 'hybrid plan' uses it when no
    --hardware is given; measuring another model's shape adds to it. What other programs disturbed
    is said, and measured again by the next calibration.
    """
    from hybrid.cli.plan import OR_FORCE, write_file
    from hybrid.paths import check_temporary_folder, check_writable

    check_temporary_folder()
    check_writable("--out", out, replaced=force, remedy=OR_FORCE)
    from hybrid.machine.calibrations import Identity, main_numbers
    from hybrid.measure.calibrate import LIMIT_S, hardware_for
    from planner.describe.hardware import to_toml

    gpu = _gpu(device, threads)
    identity = Identity.of_this_machine(threads, gpu.name if gpu else "")
    with _Progress(LIMIT_S) as progress:
        spec = hardware_for(
            model,
            force=force,
            experts=experts,
            dense=dense,
            device=gpu,
            threads=threads,
            progress=progress,
        )
    known = "" if progress.used else ", measured before; --force measures again"
    print(f"in force: {identity.path}{known}", file=sys.stderr)
    if out is not None:
        write_file(out, identity.comment() + to_toml(spec))
    if as_json:
        print(json.dumps({"path": str(identity.path), **asdict(spec)}))
        return
    rows: list[tuple[str, str]] = [("machine", spec.summary), *main_numbers(spec)]
    print("\n".join(f"{name:<15} {text}" for name, text in rows))


class _Progress:
    """Shows what is being measured and how much of the time is used, on stderr.

    The bar stands at its beginning until the replica is made, which takes as long as it takes.
    """

    def __init__(self, limit_s: float) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
        self._task = self._bar.add_task("", total=limit_s, visible=False)
        self._begun_s: float | None = None
        self.used = False

    def __enter__(self) -> _Progress:
        self._bar.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._bar.__exit__(*error)

    def __call__(self, what: str) -> None:
        now_s = time.monotonic()
        if self.used and self._begun_s is None:
            self._begun_s = now_s
        done_s = now_s - (now_s if self._begun_s is None else self._begun_s)
        self._bar.update(self._task, description=what, completed=done_s, visible=True)
        self.used = True


def _gpu(name: str | None, threads: int | None) -> Device | None:
    """Return the GPU to measure, or what stands in for it; None for the CPU alone."""
    from hybrid.machine.devices import choose_device, open_device
    from hybrid.machine.host import default_threads

    chosen = choose_device(name, None)
    return None if chosen is None else open_device(chosen, None, threads or default_threads())
