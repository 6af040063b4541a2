"""``hybrid bench``: measurements, as tables for people or JSON for programs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

bench_app = typer.Typer(
    help="Measure this machine and this runtime.", no_args_is_help=True, add_completion=False
)

_JSON = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
_RECORD = Annotated[
    Path | None, typer.Option(help="Also append the result as a line to this .jsonl file.")
]


def _deliver(result: dict[str, Any], as_json: bool, record: Path | None, text: str) -> None:
    print(json.dumps(result) if as_json else text)
    if record is not None:
        from hybrid.bench.record import append

        append(result, record)
        print(f"appended to {record}", file=sys.stderr)


@bench_app.command()
def kernels(
    formats: Annotated[str, typer.Option(help="Weight formats, comma-separated.")] = "q4_0,q8_0",
    tokens: Annotated[str, typer.Option(help="Token counts, comma-separated.")] = "",
    repeat: Annotated[int, typer.Option(min=3, help="Timed calls a case.")] = 30,
    threads: Annotated[int | None, typer.Option(min=1, help="Default: all cores.")] = None,
    as_json: _JSON = False,
    record: _RECORD = None,
) -> None:
    """Expert kernels at several token counts beside the machine's read bandwidth."""
    from cpu_experts.formats import check_format
    from hybrid.bench import kernels as bench
    from hybrid.bench.record import check_appendable
    from hybrid.errors import UsageError

    try:
        counts = {int(word) for word in tokens.split(",")} if tokens else set(bench.TOKENS)
    except ValueError as error:
        raise UsageError(
            f"--tokens {tokens!r} is not a list of numbers", hint="for example --tokens 1,32"
        ) from error
    wanted = tuple(check_format(word.strip()) for word in formats.split(","))
    chosen = [case for case in bench.cases(wanted) if case.tokens in counts]
    if not chosen:
        raise UsageError(f"--tokens {tokens!r} selects no case", hint=f"choose from {bench.TOKENS}")
    if record is not None:
        check_appendable(record)
    result = bench.run(
        chosen,
        repeat=repeat,
        threads=threads,
        progress=_say,
    )
    _deliver(result, as_json, record, _kernels_table(result))


@bench_app.command()
def planner(
    trace: Annotated[
        list[Path] | None,
        typer.Option(help="Routing trace (.npz) to replay through the cache policies; repeatable."),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Replay only the first tokens of each trace.")
    ] = None,
    repeat: Annotated[int, typer.Option(min=3, help="Timed decisions a case.")] = 200,
    as_json: _JSON = False,
    record: _RECORD = None,
) -> None:
    """Time to decide, distance of plans from their bounds, hit rates of cache policies."""
    from hybrid.bench.planner import planner_table, run_planner_bench

    if not trace:
        print("no --trace given: cache policies are not replayed", file=sys.stderr)
    result = run_planner_bench(trace or (), tokens=tokens, repeat=repeat, progress=_say)
    _deliver(result, as_json, record, planner_table(result))


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _kernels_table(result: dict[str, Any]) -> str:
    head = f"{'format':<7}{'D':>6}{'F':>7}{'E':>5}{'A':>3}{'tokens':>8}"
    lines = [
        f"read bandwidth {result['read_bandwidth_bytes_per_s'] / 1e9:.1f} GB/s,"
        f" {result['threads']} threads, {result['machine']['simd_level']}",
        f"{head}{'ms':>9}{'GB/s':>8}{'of read':>9}{'GFLOP/s':>9}",
    ]
    for row in result["results"]:
        lines.append(
            f"{row['format']:<7}{row['hidden']:>6}{row['intermediate']:>7}{row['experts']:>5}"
            f"{row['top_k']:>3}{row['tokens']:>8}{row['seconds_median'] * 1e3:>9.2f}"
            f"{row['bytes_per_s'] / 1e9:>8.1f}{row['read_fraction']:>9.2f}{row['gflops']:>9.0f}"
        )
    return "\n".join(lines)
