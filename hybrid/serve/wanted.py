"""What a request wants, whatever its protocol: jobs for the engine, and how to read what comes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from hybrid.errors import UsageError
from hybrid.loop.guided import Guide, GuidedLogits
from hybrid.serve.answer_parts import AnswerParts
from hybrid.serve.call_formats import CallFormat, call_format
from hybrid.serve.engine import Asked
from hybrid.serve.grammars import Grammar
from hybrid.serve.guides import Budget, Chances, Kept
from hybrid.serve.refusals import not_taken, of_error
from hybrid.serve.served import Served
from hybrid.serve.thinking import marks_of, thoughts_of
from hybrid.serve.tools import Tools

MOST_ANSWERS = 16
"""Answers to one request."""
MOST_LIKELIEST = 20
"""Tokens beside each whose probability is told."""


@dataclass(frozen=True)
class Settings:
    """How the tokens of an answer are chosen, and when it ends.

    Attributes
    ----------
    options
        What :meth:`HybridModel.write` takes.
    seed, stop
        As of :class:`Asked`.
    most
        New tokens at most; None for all that fit.
    answers
        How many there are to be.
    likeliest
        Tokens beside each whose probability is told; None where none is told at all.
    """

    options: dict[str, Any]
    seed: int | None = None
    stop: list[str] | None = None
    most: int | None = None
    answers: int = 1
    likeliest: int | None = None


@dataclass(frozen=True)
class Form:
    """A form that the answer has to have: the values of a schema.

    Attributes
    ----------
    schema
        What JSON has to satisfy.
    field
        The request's field that asks for it.
    """

    schema: Any
    field: str


@dataclass(frozen=True)
class Turn:
    """A turn of a chat that is asked for.

    Attributes
    ----------
    messages, variables
        What the chat template is given.
    settings
        How the answer is chosen.
    tools
        What may be called.
    form
        The form of the answer; None for any text.
    budget
        Tokens that the model may think; None for as many as it likes.
    """

    messages: list[dict[str, Any]]
    settings: Settings
    variables: Mapping[str, Any] = field(default_factory=dict)
    tools: Tools = field(default_factory=Tools)
    form: Form | None = None
    budget: int | None = None


@dataclass(frozen=True, eq=False)
class Single:
    """One answer that is wanted.

    Attributes
    ----------
    asked
        What the engine is asked.
    parts
        Makes parts of what it writes.
    chances
        Knows how probable its tokens were; None where nobody asks.
    """

    asked: Asked
    parts: AnswerParts
    chances: Chances | None


@dataclass(frozen=True, eq=False)
class Wanted:
    """All that a request wants.

    Attributes
    ----------
    answers
        One or more.
    stream
        Whether they are sent as they come.
    include_usage
        Whether a stream ends with how many tokens there were.
    """

    answers: list[Single]
    stream: bool = False
    include_usage: bool = False

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return int(self.answers[0].asked.ids.shape[1])


def turn_wanted(
    turn: Turn, served: Served, *, stream: bool = False, include_usage: bool = False
) -> Wanted:
    """Return what a turn wants.

    Raises
    ------
    Refusal
        When the template refuses the messages, or no text can have the form.
    """
    ids = turn_ids(turn, served)
    settings, offered = turn.settings, turn.tools.offered
    form = call_format(served.template) if offered else None
    matcher = _matcher(turn, form or call_format(served.template), served)
    options = dict(settings.options)
    if form is not None:
        options["marks"] = form.marks
    most = served.room(ids, settings.most, None, "messages")
    answers = []
    for at in range(settings.answers):
        guides: list[Guide] = []
        if matcher is not None:
            marks, told = marks_of(served), _form_field(turn)
            channels = call_format(served.template).name == "harmony"
            thoughts = None if marks is None or channels else thoughts_of(served, marks, ids)
            guides.append(Kept(matcher.deep_copy(), thoughts, told))
        if turn.budget is not None:
            guides.append(_budget(turn.budget, matcher is not None, served, ids))
        answers.append(
            _single(
                *(served, ids, settings, at, guides, most, options),
                parts=AnswerParts(form, offered),
                apart=True,
                field="messages",
            )
        )
    return Wanted(answers, stream, include_usage)


def text_wanted(
    ids: Tensor, settings: Settings, most: int, served: Served, stream: bool, include_usage: bool
) -> Wanted:
    """Return what a completion of a prompt ``[1, T]`` wants."""
    answers = [
        _single(
            *(served, ids, settings, at, [], most, settings.options),
            parts=AnswerParts(None, []),
            apart=False,
            field="prompt",
        )
        for at in range(settings.answers)
    ]
    return Wanted(answers, stream, include_usage)


def turn_ids(turn: Turn, served: Served) -> Tensor:
    """Return the ids ``[1, T]`` that ask for a turn.

    Raises
    ------
    Refusal
        When the template refuses the messages, or takes no tools.
    """
    variables = dict(turn.variables)
    if turn.tools.offered:
        if "tools" not in served.template:
            raise not_taken("tools", "the model's chat template takes none; leave them out")
        variables["tools"] = turn.tools.offered
    try:
        return served.encode_chat(turn.messages, variables)
    except UsageError as error:
        raise of_error(error, "messages") from error


def _single(
    served: Served,
    ids: Tensor,
    settings: Settings,
    at: int,
    guides: list[Guide],
    most: int,
    options: Mapping[str, Any],
    *,
    parts: AnswerParts,
    apart: bool,
    field: str,
) -> Single:
    chances = None
    if settings.likeliest is not None:
        chances = Chances(served.text_of, settings.likeliest)
        guides = [chances, *guides]
    options = dict(options)
    if guides:
        options["logits_processor"] = [GuidedLogits(ids.shape[1], guides)]
    seed = None if settings.seed is None else settings.seed + at
    asked = Asked(ids, most, options, apart=apart, stop=settings.stop, seed=seed, field=field)
    return Single(asked, parts, chances)


def _form_field(turn: Turn) -> str:
    return turn.tools.field if turn.tools.needed else turn.form.field if turn.form else ""


def _matcher(turn: Turn, form: CallFormat, served: Served) -> Any:
    """Return what the answer is held to; None where it is free."""
    tools = turn.tools
    if not tools.needed and turn.form is None:
        return None
    grammar = Grammar(served.constraints.special, served.template)
    if tools.needed:
        start = grammar.calls(form, tools.needed, tools.several)
    else:
        assert turn.form is not None
        start = grammar.answer(grammar.value(turn.form.schema), form)
        if tools.offered:
            start = f"{start} | {grammar.calls(form, tools.offered, tools.several)}"
    return served.constraints.matcher(grammar.of(start), _form_field(turn))


def _budget(tokens: int, held: bool, served: Served, ids: Tensor) -> Budget:
    marks = marks_of(served)
    if marks is None:
        raise not_taken("thinking_budget", "the model marks no thoughts; leave it out")
    closing = marks.closing
    if held:  # white space behind the tag would not have the form
        closing = closing[: closing.index(marks.end) + len(marks.end)]
    return Budget(tokens, served.ids_of(closing), thoughts_of(served, marks, ids))
