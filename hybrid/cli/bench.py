"""``hybrid bench``: measurements, as tables for people or JSON for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from hybrid.cli.options import Dtype

bench_app = typer.Typer(
    help="Measure this machine and this runtime.", no_args_is_help=True, add_completion=False
)

_MOST_REPEATS = 100_000
"""More would not end."""
_JSON = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
_RECORD = Annotated[
    Path | None,
    typer.Option(
        help="Also keep the result as a line of this .jsonl file, row by row as it comes."
    ),
]


class _Rows:
    """What is measured: a line to stderr for every row that is finished, and all into the record.

    Attributes
    ----------
    count
        Rows of a run under way that are finished, and kept if there is a record.
    """

    def __init__(self, record: Path | None) -> None:
        from hybrid.bench.record import Line

        self.count = 0
        self._record = record
        self._line = None if record is None else Line(record)

    def finished(self, so_far: dict[str, Any], *lines: str) -> None:
        """Keep the record so far, as one that is not complete, and say what is new in it."""
        if self._line is not None:
            self._line.put(so_far | {"complete": False})
        self.count += len(lines)
        for line in lines:
            _say(line)

    def deliver(self, result: dict[str, Any], as_json: bool, table: Callable[..., str]) -> None:
        """Keep the whole record and print it."""
        if self._line is not None:
            self._line.put(result)
            _say(f"appended to {self._record}")
        self.count = 0  # nothing is left behind
        print(json.dumps(result) if as_json else table(result))

    def cut(self, why: str) -> None:
        """Say what there is of a run that has no end."""
        if self.count == 0:
            return
        rows = f"{self.count} finished {'row' if self.count == 1 else 'rows'}"
        if self._record is None:
            _say(f"{why} after {rows}, see above; --record FILE keeps them in a file")
        else:
            _say(f'{why} after {rows}, kept in {self._record} as a line with "complete": false')


@contextmanager
def _measuring(record: Path | None) -> Iterator[_Rows]:
    """Refuse a file that nothing can be put into, before anything is measured; keep what was."""
    from hybrid.bench.record import check_recordable
    from hybrid.paths import check_temporary_folder

    check_temporary_folder()  # without which torch cannot be imported
    if record is not None:
        check_recordable(record)
    rows = _Rows(record)
    try:
        yield rows
    except BaseException as error:
        rows.cut("interrupted" if isinstance(error, KeyboardInterrupt) else "ended by an error")
        raise


@bench_app.command()
def kernels(
    formats: Annotated[str, typer.Option(help="Weight formats, comma-separated.")] = "q4_0,q8_0",
    tokens: Annotated[str, typer.Option(help="Token counts, comma-separated.")] = "",
    repeat: Annotated[int, typer.Option(min=3, max=_MOST_REPEATS, help="Timed calls a case.")] = 30,
    threads: Annotated[int | None, typer.Option(min=1, help="Default: all cores.")] = None,
    as_json: _JSON = False,
    record: _RECORD = None,
) -> None:
    """Expert kernels at several token counts beside the machine's read bandwidth."""
    with _measuring(record) as rows:
        from hybrid.bench import kernels as bench
        from hybrid.errors import UsageError
        from hybrid.formats.registry import format_of

        counts = set(_numbers(tokens, "--tokens", int)) if tokens else set(bench.TOKENS)
        known = tuple(format_of(word.strip()).name for word in formats.split(","))
        chosen = [case for case in bench.cases(known) if case.tokens in counts]
        if not chosen:
            raise UsageError(
                f"--tokens {tokens!r} selects no case", hint=f"choose from {bench.TOKENS}"
            )
        result = bench.run(
            chosen,
            repeat=repeat,
            threads=threads,
            progress=_say,
            finished=rows.finished,
        )
        rows.deliver(result, as_json, bench.kernels_table)


@bench_app.command()
def model(
    directory: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]", help="A model directory; the demo model without it or --spec."
        ),
    ] = None,
    spec: Annotated[
        str | None,
        typer.Option(help="Random weights of this shape: a name as for 'hybrid plan', or a file."),
    ] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="Layers, with --spec.")] = None,
    vocabulary: Annotated[int | None, typer.Option(min=32, help="Tokens, with --spec.")] = None,
    experts: Annotated[str, typer.Option(help="Format of experts, with --spec.")] = "q4_0",
    dense: Annotated[str, typer.Option(help="Format of dense layers, with --spec.")] = "q4_0",
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 512,
    generate: Annotated[int, typer.Option(min=2, help="Tokens generated after it.")] = 64,
    repeat: Annotated[int, typer.Option(min=1, max=_MOST_REPEATS, help="Timed runs.")] = 5,
    threads: Annotated[int | None, typer.Option(min=1, help="Default: all cores.")] = None,
    calibrate: Annotated[
        bool,
        typer.Option(
            "--calibrate/--no-calibrate",
            help="First measure this machine with the model's shape and formats, unless it was.",
        ),
    ] = True,
    dtype: Dtype = "auto",
    as_json: _JSON = False,
    record: _RECORD = None,
) -> None:
    """A whole model: load, prefill and decode, beside what was predicted and the bandwidth."""
    with _measuring(record) as rows:
        from hybrid.ask.formats import check_formats
        from hybrid.bench import model as bench
        from hybrid.bench.model_table import model_table

        check_formats(experts, dense)
        result = bench.run(
            directory,
            spec=spec,
            layers=layers,
            vocabulary=vocabulary,
            experts=experts,
            dense=dense,
            prompt=prompt,
            generate=generate,
            repeat=repeat,
            threads=threads,
            calibrate=calibrate,
            dtype=dtype,
            progress=_say,
            finished=rows.finished,
        )
        rows.deliver(result, as_json, model_table)


@bench_app.command()
def peers(
    directory: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]",
            help="A checkpoint to run beside transformers alone, or 'demo'; without, a shape.",
        ),
    ] = None,
    spec: Annotated[
        str | None,
        typer.Option(
            help="Shape of a Qwen3-MoE: a name as for 'hybrid plan', or a file.",
            show_default="qwen3-30b-a3b",
        ),
    ] = None,
    layers: Annotated[
        int | None,
        typer.Option(min=1, help="Layers instead of the shape's own.", show_default="12"),
    ] = None,
    vocabulary: Annotated[
        int | None, typer.Option(min=32, help="Tokens, likewise.", show_default="32000")
    ] = None,
    context: Annotated[
        int | None, typer.Option(min=1, help="Also decode with this many tokens in the cache.")
    ] = None,
    peer: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=PROGRAM",
            help="Also compare with this llama-bench, such as ik_llama.cpp's; options after its "
            "path belong to it. May be given several times.",
        ),
    ] = None,
    repeat: Annotated[int, typer.Option(min=1, max=_MOST_REPEATS, help="Pairs a case.")] = 5,
    threads: Annotated[int | None, typer.Option(min=1, help="Default: all cores.")] = None,
    dtype: Dtype = "auto",
    as_json: _JSON = False,
    record: _RECORD = None,
) -> None:
    """A shape through llama.cpp and transformers, or a checkpoint through the latter, in turns."""
    with _measuring(record) as rows:
        from hybrid.bench import peers as bench

        result = bench.run(
            directory,
            spec=spec,
            layers=layers,
            vocabulary=vocabulary,
            context=context,
            programs=peer or (),
            repeat=repeat,
            threads=threads,
            dtype=dtype,
            progress=_say,
            finished=rows.finished,
        )
        rows.deliver(result, as_json, bench.peers_table)


@bench_app.command()
def hybrid(
    models: Annotated[
        str, typer.Option("--model", help="Models or their files, comma-separated.")
    ] = "Qwen3-30B-A3B,DeepSeek-V2-Lite",
    device: Annotated[
        str,
        typer.Option(
            help="cuda or cuda:N for this machine's GPU, or the machine whose GPU is emulated."
        ),
    ] = "rtx4060-laptop-8gb",
    resident: Annotated[
        str, typer.Option(help="Shares of the experts that have slots, comma-separated.")
    ] = "0.25,0.5,0.75",
    prompts: Annotated[
        str, typer.Option(help="Tokens of the prompts, comma-separated.")
    ] = "128,512",
    generate: Annotated[int, typer.Option(min=2, help="Tokens decoded after each.")] = 32,
    layers: Annotated[
        int | None, typer.Option(min=1, help="MoE layers.", show_default="what memory holds")
    ] = None,
    trace: Annotated[
        Path | None, typer.Option(help="Routing trace (.npz) for the models that it fits.")
    ] = None,
    repeat: Annotated[int, typer.Option(min=1, max=_MOST_REPEATS, help="Rounds of all rules.")] = 3,
    threads: Annotated[int | None, typer.Option(min=1, help="Default: all cores.")] = None,
    as_json: _JSON = False,
    record: _RECORD = None,
) -> None:
    """Sharing experts with a GPU, an emulated one by default: ours beside other systems' rules."""
    with _measuring(record) as rows:
        from hybrid.bench import hybrid as bench

        result = bench.run(
            [name.strip() for name in models.split(",")],
            device=device,
            shares=_numbers(resident, "--resident", float),
            prompts=_numbers(prompts, "--prompts", int),
            tokens=generate,
            layers=layers,
            trace=trace,
            repeat=repeat,
            threads=threads,
            progress=_say,
            finished=rows.finished,
        )
        rows.deliver(result, as_json, bench.hybrid_table)


def _numbers(text: str, option: str, kind: type[Any]) -> list[Any]:
    from hybrid.errors import UsageError

    try:
        return [kind(word) for word in text.split(",")]
    except (ValueError, OverflowError) as error:
        raise UsageError(
            f"{option} {text!r} is not a list of numbers", hint=f"for example {option} 1,2"
        ) from error


@bench_app.command()
def lookahead(
    directory: Annotated[
        str | None,
        typer.Argument(metavar="[MODEL]", help="A model directory; the demo model without."),
    ] = None,
    file: Annotated[
        list[Path] | None,
        typer.Option("--file", "-f", help="Text it was not trained on; can be repeated."),
    ] = None,
    tokens: Annotated[int, typer.Option(min=2, help="How many are read.")] = 16_384,
    threads: Annotated[int | None, typer.Option(min=1, help="Default: all cores.")] = None,
    as_json: _JSON = False,
    record: _RECORD = None,
) -> None:
    """How many of a layer's experts are known 1, 2 and 3 layers early."""
    with _measuring(record) as rows:
        from hybrid.bench import lookahead as bench
        from hybrid.cli.generation import read_text

        texts = [read_text(path) for path in file] if file else None
        result = bench.run(
            directory,
            texts=texts,
            tokens=tokens,
            threads=threads,
            progress=_say,
            finished=rows.finished,
        )
        rows.deliver(result, as_json, bench.lookahead_table)


@bench_app.command()
def perplexity(
    directory: Annotated[
        str | None,
        typer.Argument(metavar="[MODEL]", help="A checkpoint; the demo model without."),
    ] = None,
    file: Annotated[
        list[Path] | None,
        typer.Option("--file", "-f", help="Text it was not trained on; can be repeated."),
    ] = None,
    formats: Annotated[
        str, typer.Option(help="Formats of experts, comma-separated; compared with the first.")
    ] = "f32,bf16,q8_0,q4_0",
    dense: Annotated[
        str,
        typer.Option(
            help="Formats of dense layers, comma-separated, to be measured after them as they are."
        ),
    ] = "",
    imatrix: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="An importance matrix that weights are quantized with."),
    ] = None,
    tokens: Annotated[int, typer.Option(min=2, help="How many are read.")] = 8192,
    decode: Annotated[
        int, typer.Option(min=0, help="How many of them also one at a time, as text is written.")
    ] = 1024,
    threads: Annotated[int | None, typer.Option(min=1, help="Default: all cores.")] = None,
    dtype: Dtype = "auto",
    as_json: _JSON = False,
    record: _RECORD = None,
) -> None:
    """What weight formats cost in perplexity, for prompts and for single tokens."""
    with _measuring(record) as rows:
        from hybrid.bench import perplexity as bench
        from hybrid.cli.generation import read_text

        texts = {str(path): read_text(path) for path in file} if file else None
        result = bench.run(
            directory,
            texts=texts,
            formats=[word.strip() for word in formats.split(",")],
            dense=[word.strip() for word in dense.split(",")] if dense else (),
            imatrix=imatrix,
            tokens=tokens,
            decode=decode,
            threads=threads,
            dtype=dtype,
            progress=_say,
            finished=rows.finished,
        )
        rows.deliver(result, as_json, bench.perplexity_table)


@bench_app.command()
def planner(
    trace: Annotated[
        list[Path] | None,
        typer.Option(help="Routing trace (.npz) to replay through the cache policies; repeatable."),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Replay only the first tokens of each trace.")
    ] = None,
    repeat: Annotated[
        int, typer.Option(min=3, max=_MOST_REPEATS, help="Timed decisions a case.")
    ] = 200,
    as_json: _JSON = False,
    record: _RECORD = None,
) -> None:
    """Time to decide, distance of plans from their bounds, hit rates of cache policies."""
    with _measuring(record) as rows:
        from hybrid.bench.planner import planner_table, run_planner_bench

        if not trace:
            print("no --trace given: cache policies are not replayed", file=sys.stderr)
        result = run_planner_bench(
            trace or (), tokens=tokens, repeat=repeat, progress=_say, finished=rows.finished
        )
        rows.deliver(result, as_json, planner_table)


@bench_app.command()
def serve(
    model: Annotated[
        str | None,
        typer.Argument(help="As for 'hybrid serve', which is started with it."),
    ] = None,
    url: Annotated[
        str | None, typer.Option(help="A server that runs already, such as http://127.0.0.1:8080.")
    ] = None,
    clients: Annotated[
        list[int] | None, typer.Option(min=1, max=256, help="Clients at once; repeatable.")
    ] = None,
    requests: Annotated[
        int, typer.Option(min=1, max=_MOST_REPEATS, help="Questions of each client.")
    ] = 8,
    prompt: Annotated[int, typer.Option(min=1, help="Words of a prompt, the median.")] = 100,
    generate: Annotated[int, typer.Option(min=2, help="New tokens, the median.")] = 64,
    pause: Annotated[
        float, typer.Option(min=0, max=3600, help="Mean seconds from an answer to a question.")
    ] = 0.2,
    parallel: Annotated[
        int, typer.Option(min=1, max=64, help="Answers at once of the server that is started.")
    ] = 4,
    threads: Annotated[int | None, typer.Option(min=1, help="Default: all cores.")] = None,
    as_json: _JSON = False,
    record: _RECORD = None,
) -> None:
    """A server under load: tokens/s, time to the first token and per token of 1, 4, 16 clients."""
    with _measuring(record) as rows:
        from hybrid.bench.serving import CLIENTS, run_serve_bench, serve_table

        result = run_serve_bench(
            model,
            url=url,
            options=["--parallel", str(parallel), "--max-queue", "256"],
            clients=clients or CLIENTS,
            requests=requests,
            prompt=prompt,
            generate=generate,
            pause_s=pause,
            threads=threads,
            progress=_say,
            finished=rows.finished,
        )
        rows.deliver(result, as_json, serve_table)


def _say(text: str) -> None:
    print(text, file=sys.stderr)
