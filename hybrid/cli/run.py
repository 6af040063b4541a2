"""``hybrid run``: continue a prompt on stdout; everything else goes to stderr."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hybrid.ask.options import Options
from hybrid.cli import generation as cli
from hybrid.cli.options import (
    MaxNewTokens,
    Model,
    Sampling,
    Stop,
    Yes,
    sampling_options,
    session_options,
    with_options,
)
from hybrid.cli.text import end_line, write
from hybrid.errors import UsageError

if TYPE_CHECKING:
    from hybrid.session.model import HybridModel


@with_options(sampling=sampling_options, options=session_options)
def run(
    *,
    model: Model = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="The text to continue.")
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option("--file", "-f", help="A file with the text to continue; - is stdin."),
    ] = None,
    max_new_tokens: MaxNewTokens = None,
    sampling: Sampling,
    stop: Stop = None,
    echo: Annotated[bool, typer.Option("--echo", help="Write the prompt first.")] = False,
    options: Options,
    yes: Yes = False,
    popularity: Annotated[
        Path | None,
        typer.Option(
            help="Begin with the experts that were used most in this file (if it is there), and "
            "add this session's uses to it at the end.",
        ),
    ] = None,
    routing: Annotated[
        Path | None,
        typer.Option(
            help="Write which experts every token used to this .npz file, for 'hybrid plan "
            "--trace'.",
        ),
    ] = None,
    perfetto: Annotated[
        Path | None,
        typer.Option(
            help="Write what CPU, GPU and link did when to this file, for ui.perfetto.dev."
        ),
    ] = None,
    report: Annotated[
        bool, typer.Option("--report", help="End with the whole report instead of one line.")
    ] = False,
) -> None:
    """Write text from a prompt.

    The prompt is -p, a file, or stdin. The text goes to stdout as it is generated; messages
    and figures go to stderr.
    """
    text, stop = read_prompt(prompt, file), cli.given_texts(stop, "--stop")
    files = {"perfetto": perfetto, "routing": routing, "popularity": popularity}
    cli.check_files(**files)
    cli.require_device(options, **files)
    options = replace(
        options,
        popularity=cli.known(popularity),
        keep_timeline=perfetto is not None,
        record_routing=routing is not None,
    )
    loaded = cli.load(model, options, yes=yes)
    cli.require_sharing(loaded, **files)
    cli.set_seed(sampling.seed)
    if echo:
        write(text)
    try:
        with cli.prompt_progress(loaded):
            loaded.generate(
                text,
                on_text=write,
                stop_strings=stop,
                max_new_tokens=max_new_tokens,
                **sampling.options,
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
        cli.Summary(loaded).tell(whole=report)


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
        return cli.given_text(prompt, "the prompt")
    if file is None and sys.stdin.isatty():
        raise UsageError(
            "there is no prompt", hint="give -p TEXT or -f FILE, or pipe the text into stdin"
        )
    if file is None or str(file) == "-":
        text = cli.decode_utf8(sys.stdin.buffer.read(), "stdin")
    else:
        text = cli.read_text(file)
    return text.removesuffix("\n").removesuffix("\r")
