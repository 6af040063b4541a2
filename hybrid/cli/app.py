"""The root of the command line: which commands there are, and how errors leave the program.

A command's module is imported when that command is run or asked for its own help, so
``hybrid --help`` costs no more than typer itself.
"""

from __future__ import annotations

import errno
import io
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from typing import Annotated, Any, NamedTuple

import typer
from typer.core import TyperCommand, TyperGroup

from hybrid import __version__
from hybrid.cli.exit_codes import ERROR, INTERRUPTED
from hybrid.cli.text import apart
from hybrid.formats.errors import HybridError


class _Mount(NamedTuple):
    """Where a command lives; ``target`` is a function or a ``typer.Typer`` in ``module``."""

    module: str
    target: str
    summary: str


COMMANDS = {
    "run": _Mount("hybrid.cli.run", "run", "Write text from a prompt."),
    "chat": _Mount("hybrid.cli.chat", "chat", "Talk with a model."),
    "serve": _Mount("hybrid.cli.serve", "serve", "Answer OpenAI's clients."),
    "convert": _Mount(
        "hybrid.cli.convert", "convert", "Convert a Hugging Face MoE model to an expert store."
    ),
    "plan": _Mount("hybrid.cli.plan", "plan", "Tell beforehand how fast a machine runs a model."),
    "calibrate": _Mount(
        "hybrid.cli.calibrate", "calibrate", "Measure this machine, for plans about it."
    ),
    "bench": _Mount("hybrid.cli.bench", "bench_app", "Measure this machine."),
    "list": _Mount("hybrid.cli.list", "list_models", "List the models that were converted."),
    "remove": _Mount("hybrid.cli.remove", "remove", "Remove converted copies of models."),
    "env": _Mount("hybrid.cli.env", "env", "Show what this machine and installation offer."),
}


class _LazyGroup(TyperGroup):
    """A group that lists commands by name and summary and imports only the one that runs."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        for name, mount in COMMANDS.items():
            self.add_command(TyperCommand(name=name, help=mount.summary))

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, _, rest = super().resolve_command(ctx, args)
        return name, None if name is None else _load_command(name), rest


def _load_command(name: str) -> Any:
    """Import the module that holds command ``name`` and build the command from it."""
    mount = COMMANDS[name]
    target = getattr(import_module(mount.module), mount.target)
    if isinstance(target, typer.Typer):
        target.rich_markup_mode = None
        command: Any = typer.main.get_group(target)
        command.no_args_is_help = False  # a missing command is an error like any other
    else:
        single = typer.Typer(add_completion=False, rich_markup_mode=None)
        single.command(name)(target)
        command = typer.main.get_command(single)
    command.name = name
    return command


app = typer.Typer(
    cls=_LazyGroup,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EPIPE, errno.EIO, errno.EBADF)
"""What the system says of a stream that takes no more."""

_LONG_NAME = 200
"""Letters of a file's name that are shown."""

#: typer exports one of click's usage errors; this is their common base.
_UsageError: type[Exception] = typer.BadParameter.__bases__[0]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"hybrid {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Run Mixture-of-Experts language models on machines whose GPU cannot hold them."""


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    0 is success, 1 a plan of a model that does not fit, 2 an error the user can act on (one line
    and a hint on stderr), 130 an interruption with Ctrl-C. Anything unexpected keeps its
    traceback.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a model may write what a terminal cannot show
            stream.reconfigure(errors="replace")
    words = list(sys.argv[1:] if args is None else args) or ["--help"]
    try:
        with apart(), _engine_notices():
            command = typer.main.get_command(app)
            code = command.main(words, prog_name="hybrid", standalone_mode=False)
            sys.stdout.flush()  # what a full disk refuses is refused here, not on Python's way out
    except typer.Abort:
        code = INTERRUPTED
    except _UsageError as error:
        code = _report(_describe_usage_error(error))
    except HybridError as error:
        code = _report(str(error))
    except OSError as error:
        if error.filename is not None:
            code = _report(f"{_named(error.filename)}: {error.strerror}\nhint: check the path")
        elif error.errno in _UNWRITABLE:
            code = _stream_ended(error)
        else:
            raise
    return code if isinstance(code, int) else 0


@contextmanager
def _engine_notices() -> Iterator[None]:
    """Let the engines' notices, such as that kernels are being compiled, through to stderr."""
    loggers = [logging.getLogger(name) for name in ("cpu_experts", "gpu_experts")]
    handler = logging.StreamHandler()
    for logger in loggers:
        logger.setLevel(logging.INFO)
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)


def _describe_usage_error(error: Any) -> str:
    command = error.ctx.command_path if error.ctx else "hybrid"
    return f"{error.format_message()}\nhint: '{command} --help' lists what can be given"


def _named(file: object) -> str:
    """Return a file's name, or its beginning where it is endless."""
    name = os.fsdecode(file) if isinstance(file, str | bytes) else str(file)
    return name if len(name) < _LONG_NAME else f"{name[:_LONG_NAME]}..."


def _report(text: str) -> int:
    with suppress(OSError):  # stderr may be what cannot be written; the exit code says it, then
        print(f"error: {text}", file=sys.stderr)
    return ERROR


def _stream_ended(error: OSError) -> int:
    """Say what an output refused; nothing where the reader of a pipe has seen enough."""
    with suppress(OSError, ValueError):  # or Python would try again on its way out
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
    if error.errno == errno.EPIPE:
        return 1
    return _report(
        f"the output cannot be written: {error.strerror}\n"
        "hint: free some space where it goes, or write it elsewhere"
    )
