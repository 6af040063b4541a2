"""``hybrid chat``: talk with a model; Ctrl-C stops an answer, not the program."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
    from hybrid.session.model import HybridModel, Message

_WELCOME = "/clear forgets the conversation, /exit or Ctrl-D ends it, Ctrl-C stops an answer"
_EXITS = {"/exit", "/quit", "/bye"}


@with_options(sampling=sampling_options, options=session_options)
def chat(
    *,
    model: Model = None,
    system: Annotated[
        str | None, typer.Option("--system", "-s", help="The system message.")
    ] = None,
    chat_template: Annotated[
        Path | None,
        typer.Option(help="A Jinja file to use instead of the model's own chat template."),
    ] = None,
    max_new_tokens: MaxNewTokens = None,
    sampling: Sampling,
    stop: Stop = None,
    options: Options,
    yes: Yes = False,
) -> None:
    """Talk with a model.

    A line is a message; one that ends in a backslash goes on in the next line.
    """
    template = None if chat_template is None else cli.read_text(chat_template)
    loaded = cli.load(model, options, yes=yes)
    if template is not None:
        loaded.tokenizer.chat_template = template
    loaded.require_chat_template()
    cli.set_seed(sampling.seed)
    interactive = sys.stdin.isatty()
    if interactive:
        print(_WELCOME, file=sys.stderr)
    with cli.prompt_progress(loaded):
        talk(
            loaded,
            _ask_terminal if interactive else _read_stdin,
            system=system,
            patient=interactive,
            stop_strings=stop,
            max_new_tokens=max_new_tokens,
            **sampling.options,
        )


def talk(
    model: HybridModel,
    read_line: Callable[[str], str],
    *,
    system: str | None = None,
    patient: bool = True,
    **options: Any,
) -> None:
    """Answer messages until there are no more.

    Parameters
    ----------
    read_line
        Given a prompt, returns the next line; raises EOFError at the end.
    system
        The message that every conversation starts with.
    patient
        Whether to go on after a message that cannot be answered, as a person would want.
    options
        For ``HybridModel.chat``.
    """
    start: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    history, summary = list(start), cli.Summary(model)
    while True:
        try:
            text = _read_message(read_line)
            if text.strip() in _EXITS:
                return
            if text.strip() == "/clear":
                history = list(start)
                print("the conversation is forgotten", file=sys.stderr)
            elif text.strip():
                history = _answer(model, history, text, summary, options)
        except EOFError:
            return
        except KeyboardInterrupt:
            end_line(interrupted=True)
            print("/exit or Ctrl-D ends the conversation", file=sys.stderr)
        except UsageError as error:
            if not patient:
                raise
            print(f"error: {error}", file=sys.stderr)


def _answer(
    model: HybridModel,
    history: list[Message],
    text: str,
    summary: cli.Summary,
    options: dict[str, Any],
) -> list[Message]:
    """Write the answer to ``text`` and return the history with what was said.

    A message that Ctrl-C left without any answer is not part of the history.
    """
    asked: list[Message] = [*history, {"role": "user", "content": text}]
    pieces: list[str] = []

    def on_text(piece: str) -> None:
        pieces.append(piece)
        write(piece)

    try:
        model.chat(asked, on_text=on_text, **options)
    except KeyboardInterrupt:
        end_line(interrupted=True)
        print("[stopped]", file=sys.stderr)
        if not pieces:
            return history
    summary.tell()
    return [*asked, {"role": "assistant", "content": "".join(pieces)}]


def _read_message(read_line: Callable[[str], str]) -> str:
    """Read one message: a line, and the lines after it while they end in a backslash."""
    line = read_line("> ")
    lines = [line]
    while line.endswith("\\"):
        lines[-1] = line[:-1]
        try:
            line = read_line(". ")
        except EOFError:  # the message ends here; the next read ends the conversation
            break
        lines.append(line)
    return "\n".join(lines)


def _ask_terminal(prompt: str) -> str:
    """Read a line with the terminal's line editing, where Python has it."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (gives input() editing and history)
    try:
        return input(prompt)
    except UnicodeDecodeError as error:
        raise UsageError(
            f"the line is not valid UTF-8: {error}", hint="set the terminal to UTF-8"
        ) from error


def _read_stdin(_: str) -> str:
    """Read a line that is piped in."""
    line = sys.stdin.buffer.readline()
    if not line:
        raise EOFError
    return cli.decode_utf8(line, "a line of stdin").rstrip("\r\n")
