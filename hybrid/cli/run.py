"""``hybrid run``: continue a prompt on stdout; everything else goes to stderr."""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hybrid.cli import generation as cli
from hybrid.cli.text import end_line, write
from hybrid.errors import UsageError

if TYPE_CHECKING:
    from hybrid.session.model import HybridModel


def run(
    model: cli.Model = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="The text to continue.")
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option("--file", "-f", help="A file with the text to continue; - is stdin."),
    ] = None,
    max_new_tokens: cli.MaxNewTokens = None,
    temperature: cli.Temperature = None,
    top_p: cli.TopP = None,
    top_k: cli.TopK = None,
    min_p: cli.MinP = None,
    repeat_penalty: cli.RepeatPenalty = None,
    seed: cli.Seed = None,
    greedy: cli.Greedy = False,
    stop: cli.Stop = None,
    echo: Annotated[bool, typer.Option("--echo", help="Write the prompt first.")] = False,
    experts: cli.Experts = None,
    dense: cli.Dense = None,
    dtype: cli.Dtype = "auto",
    threads: cli.Threads = None,
    verify: cli.Verify = False,
    device: cli.Device = None,
    vram: cli.Vram = None,
    ram: cli.Ram = None,
    context: cli.Context = None,
    popularity: cli.PopularityFile = None,
    routing: cli.RoutingFile = None,
    perfetto: cli.Perfetto = None,
    report: Annotated[
        bool, typer.Option("--report", help="End with the whole report instead of one line.")
    ] = False,
) -> None:
    """Write text from a prompt.

    The prompt is -p, a file, or stdin. The text goes to stdout as it is generated; messages
    and figures go to stderr.
    """
    options = cli.sampling_options(
        greedy=greedy,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repeat_penalty=repeat_penalty,
        seed=seed,
    )
    text = read_prompt(prompt, file)
    files = {"perfetto": perfetto, "routing": routing, "popularity": popularity}
    cli.check_files(**files)
    cli.require_device(device, vram, **files)
    loaded = cli.load(
        model,
        experts=experts,
        dense=dense,
        dtype=dtype,
        threads=threads,
        verify=verify,
        device=device,
        vram=vram,
        ram=ram,
        context=context,
        popularity=cli.known(popularity),
        keep_timeline=perfetto is not None,
        record_routing=routing is not None,
    )
    cli.require_sharing(loaded, **files)
    cli.set_seed(seed)
    if echo:
        write(text)
    try:
        with cli.prompt_progress(loaded):
            loaded.generate(
                text,
                on_text=write,
                stop_strings=stop,
                max_new_tokens=max_new_tokens,
                **options,
            )
    except KeyboardInterrupt:
        end_line(interrupted=True)
        _leave(loaded, report, perfetto, popularity, routing)
        raise
    _leave(loaded, report, perfetto, popularity, routing)


def _leave(
    loaded: HybridModel,
    report: bool,
    perfetto: Path | None,
    popularity: Path | None,
    routing: Path | None,
) -> None:
    """Tell how it went, and write what was asked for: each file, whatever becomes of the others."""
    with ExitStack() as rest:
        rest.callback(cli.write_popularity, loaded, popularity)
        rest.callback(cli.write_routing, loaded, routing)
        rest.callback(cli.write_timeline, loaded, perfetto)
        cli.summarise(loaded, whole=report)


def read_prompt(prompt: str | None, file: Path | None) -> str:
    """Return the text to continue: ``prompt``, or the content of ``file`` or of stdin.

    One newline at the end of a file or of stdin is not part of the prompt, as in llama.cpp.

    Raises
    ------
    UsageError
        When there is no prompt or more than one, when the file cannot be read, or when the
        text is not UTF-8; the message gives the first wrong byte's offset.
    """
    if prompt is not None and file is not None:
        raise UsageError("both --prompt and --file are given", hint="give one of them")
    if prompt is not None:
        return cli.decode_utf8(os.fsencode(prompt), "the prompt")
    if file is None and sys.stdin.isatty():
        raise UsageError(
            "there is no prompt", hint="give -p TEXT or -f FILE, or pipe the text into stdin"
        )
    if file is None or str(file) == "-":
        text = cli.decode_utf8(sys.stdin.buffer.read(), "stdin")
    else:
        text = cli.read_text(file)
    return text.removesuffix("\n").removesuffix("\r")
