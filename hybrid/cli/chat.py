"""``hybrid chat``: talk with a model; Ctrl-C stops an answer, not the program."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

import typer

from hybrid.ask.options import Options
from hybrid.cli import generation as cli
from hybrid.cli.chat_commands import Commands
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
    from hybrid.session.conversation import Conversation

_WELCOME = "/help lists what there is beside messages, Ctrl-C stops an answer, Ctrl-D ends it all"
_CUT = {
    "max_new_tokens": "the answer has as many tokens as --max-new-tokens allows",
    "context full": "the answer reached the end of the model's context",
}
"""Why an answer is not whole."""
_WHEN_FULL = ("ask", "drop", "stop")


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
    think: Annotated[
        bool | None,
        typer.Option(
            "--think/--no-think",
            help="Have the model think before it answers, or not; as its template has it unless "
            "given.",
            show_default=False,
        ),
    ] = None,
    reasoning_effort: Annotated[
        str | None,
        typer.Option(help="How much to think: a word that the chat template knows, such as low."),
    ] = None,
    template_arg: Annotated[
        list[str] | None,
        typer.Option(help="NAME=VALUE for the chat template; can be given several times."),
    ] = None,
    when_full: Annotated[
        str | None,
        typer.Option(
            help="When the context has no room for the next answer: ask whether to drop the oldest "
            "turns (at a terminal), drop them (elsewhere), or stop.",
            show_default=False,
        ),
    ] = None,
    max_new_tokens: MaxNewTokens = None,
    sampling: Sampling,
    stop: Stop = None,
    options: Options,
    yes: Yes = False,
) -> None:
    """Talk with a model.

    A line is a message; one that ends in a backslash goes on in the next line. Lines that begin
    with a slash are commands, which /help lists.
    """
    interactive = sys.stdin.isatty()
    when_full = _when_full(when_full, interactive)
    stop, template_arg = (
        cli.given_texts(given, option)
        for given, option in ((stop, "--stop"), (template_arg, "--template-arg"))
    )
    system = None if system is None else cli.given_text(system, "--system")
    if reasoning_effort is not None:
        reasoning_effort = cli.given_text(reasoning_effort, "--reasoning-effort")
    template = None if chat_template is None else cli.read_text(chat_template)
    loaded = cli.load(model, options, yes=yes)
    if template is not None:
        loaded.tokenizer.chat_template = template
    loaded.require_chat_template()
    variables = template_variables(
        template_arg or [],
        think=think,
        effort=reasoning_effort,
        template=str(loaded.tokenizer.chat_template),
    )
    cli.set_seed(sampling.seed)
    if interactive:
        print(_WELCOME, file=sys.stderr)
    from hybrid.session.conversation import Conversation

    conversation = Conversation(
        loaded,
        system=system,
        template_args=variables,
        may_drop=_ask_to_drop if when_full == "ask" else lambda _: when_full == "drop",
        tell=lambda line: print(f"hybrid: {line}", file=sys.stderr),
    )
    with cli.prompt_progress(loaded):
        talk(
            conversation,
            _ask_terminal if interactive else _read_stdin,
            cli.Summary(loaded),
            patient=interactive,
            stop_strings=stop,
            max_new_tokens=max_new_tokens,
            **sampling.options,
        )


def _when_full(given: str | None, interactive: bool) -> str:
    """Return what to do when the context is full."""
    if given is None:
        return "ask" if interactive else "drop"
    if given not in _WHEN_FULL:
        raise UsageError(f"--when-full is {given!r}", hint=f"choose one of {', '.join(_WHEN_FULL)}")
    if given == "ask" and not interactive:
        raise UsageError(
            "--when-full ask: messages come from a pipe, there is nobody to ask",
            hint="choose drop or stop",
        )
    return given


def _ask_to_drop(question: str) -> bool:
    """Ask at the terminal; only a clear yes, or Return, is one."""
    try:
        return _ask_terminal(f"{question} [Y/n] ").strip().lower() in ("", "y", "yes")
    except EOFError:
        return False


def template_variables(
    given: list[str], *, think: bool | None, effort: str | None = None, template: str
) -> dict[str, Any]:
    """Return the variables of a chat template that were given as ``NAME=VALUE`` and otherwise.

    A value that is JSON is what that says, any other is a text.

    Raises
    ------
    UsageError
        When one has no name, or the template has no switch for thinking, or for how much of it,
        and is to have one.
    """
    from hybrid.session.chat_template import takes_variable, thinking_switches

    variables: dict[str, Any] = {}
    for pair in given:
        name, equals, value = pair.partition("=")
        if not equals or not name.isidentifier():
            raise UsageError(
                f"--template-arg {pair!r} is not NAME=VALUE",
                hint="for example --template-arg enable_thinking=false",
            )
        try:
            variables[name] = json.loads(value)
        except (ValueError, RecursionError):
            variables[name] = value
    if think is not None:
        option = "--think" if think else "--no-think"
        switches = thinking_switches(template, on=think)
        if not switches:
            raise UsageError(
                f"{option}: the chat template has no switch for thinking",
                hint=f"leave {option} out, or give the template's own with --template-arg",
            )
        variables = switches | variables
    if effort is not None:
        if not takes_variable(template, "reasoning_effort"):
            raise UsageError(
                f"--reasoning-effort {effort!r}: the chat template does not ask for it",
                hint="leave it out, or give the template's own with --template-arg",
            )
        variables = {"reasoning_effort": effort} | variables
    return variables


def talk(
    conversation: Conversation,
    read_line: Callable[[str], str],
    summary: cli.Summary,
    *,
    patient: bool = True,
    **options: Any,
) -> None:
    """Answer messages until there are no more.

    Parameters
    ----------
    read_line
        Given a prompt, returns the next line; raises EOFError at the end.
    summary
        Told of every answer.
    patient
        Whether to go on after a message that cannot be answered, as a person would want.
    options
        For ``Conversation.ask``.
    """

    def answer(text: str) -> None:
        _answer(conversation, text, options)
        summary.tell()

    commands = Commands(conversation, answer, summary)
    while not commands.over:
        try:
            text = _read_message(read_line)
            if text.lstrip().startswith("/") and not text.lstrip().startswith("//"):
                commands.run(text.strip())
            elif text.strip():
                answer(text.replace("//", "/", 1) if text.lstrip().startswith("//") else text)
        except EOFError:
            return
        except KeyboardInterrupt:
            end_line(interrupted=True)
            print("/exit or Ctrl-D ends the conversation", file=sys.stderr)
        except UsageError as error:
            if not patient:
                raise
            print(f"error: {error}", file=sys.stderr)


def _answer(conversation: Conversation, text: str, options: dict[str, Any]) -> None:
    """Write the answer to ``text``: the answer on stdout, what the model thinks on stderr."""
    try:
        with Thoughts() as thoughts:
            conversation.ask(text, on_text=thoughts.answer, on_thought=thoughts.think, **options)
    except KeyboardInterrupt:
        end_line(interrupted=True)
        print("[stopped]", file=sys.stderr)
    ended = conversation.last.ended if conversation.last else ""
    if ended in _CUT:
        end_line()
        print(f"[cut: {_CUT[ended]}]", file=sys.stderr)


class Thoughts:
    """Writes thoughts to stderr, dim where that is a terminal, and the answer to stdout."""

    def __init__(self) -> None:
        self._dim, self._plain = ("\33[2m", "\33[0m") if sys.stderr.isatty() else ("", "")
        self._thinking = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def think(self, piece: str) -> None:
        """Write a piece of a thought."""
        if not self._thinking:
            self._thinking = True
            piece = f"{self._dim}[thinking] {piece.lstrip()}"
        sys.stderr.write(piece)
        sys.stderr.flush()

    def answer(self, piece: str) -> None:
        """Write a piece of the answer."""
        self._end()
        write(piece)

    def _end(self) -> None:
        if self._thinking:
            self._thinking = False
            print(self._plain, file=sys.stderr)


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
