"""Reads how the tokens of an answer are chosen, when it ends, and how it is sent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hybrid.serve.fields import Fields
from hybrid.serve.refusals import Refusal, not_taken, wrong_value
from hybrid.serve.served import Served
from hybrid.serve.wanted import MOST_ANSWERS, Settings

MOST = 2**31 - 1
_LONGEST_STOP = 1024
_MOST_STOPS = 4


def read_settings(
    fields: Fields, limits: tuple[str, ...], likeliest: int | None = None, stop: str = "stop"
) -> Settings:
    """Read all but what is asked; ``limits`` are the fields that say how long an answer may be.

    Raises
    ------
    Refusal
        Naming the field.
    """
    given = [fields.whole(name, 1, MOST) for name in limits]
    most = next((limit for limit in given if limit is not None), None)
    options, seed = _sampling(fields)
    answers = fields.whole("n", 1, MOST_ANSWERS) or 1
    return Settings(options, seed, _stop(fields, stop), most, answers, likeliest)


def _sampling(fields: Fields) -> tuple[dict[str, Any], int | None]:
    """Return how tokens are chosen, and the seed.

    As in ``hybrid run``: any of these asks for drawing, none leaves it to the model's own settings,
    a temperature of 0 takes the likeliest whatever else is asked for.
    """
    temperature = fields.number("temperature", 0, 2)
    drawing = {
        "temperature": temperature,
        "top_p": fields.number("top_p", 0, 1),
        "top_k": fields.whole("top_k", -1, MOST),
        "min_p": fields.number("min_p", 0, 1),
    }
    penalties = {
        "presence_penalty": fields.number("presence_penalty", -2, 2),
        "frequency_penalty": fields.number("frequency_penalty", -2, 2),
        "repetition_penalty": fields.number("repetition_penalty", 0.01, 100),
    }
    seed = fields.whole("seed", -(2**63), 2**63 - 1)
    options: dict[str, Any] = {name: each for name, each in penalties.items() if each is not None}
    given = {name: each for name, each in drawing.items() if each is not None}
    if temperature == 0:
        options["do_sample"] = False
    elif given or seed is not None:
        options |= {"do_sample": True} | given
        if given.get("top_k") == -1:  # as vLLM spells all of them
            options["top_k"] = 0
    return options, seed


def _stop(fields: Fields, name: str) -> list[str] | None:
    given = fields.any(name)
    stops = [given] if isinstance(given, str) else given
    if stops is None or stops == []:
        return None
    wanted = f"a string, or 1 to {_MOST_STOPS} of them"
    if not isinstance(stops, list) or len(stops) > _MOST_STOPS:
        raise wrong_value(name, given, wanted)
    for text in stops:
        if not isinstance(text, str):
            raise wrong_value(name, given, wanted)
        if not 1 <= len(text) <= _LONGEST_STOP:
            raise Refusal(
                f"{name}: a string of {len(text)} letters is given, it may have 1 to "
                f"{_LONGEST_STOP}",
                param=name,
                code="invalid_value",
            )
    return stops


def read_streamed(fields: Fields) -> tuple[bool, bool]:
    """Return whether the answer is sent as it comes, and whether usage is sent with it."""
    stream = fields.flag("stream")
    given = fields.any("stream_options")
    if given is None:
        return stream, False
    if not stream:
        raise not_taken("stream_options", "it is for answers that are streamed; add stream: true")
    options = Fields(given, "stream_options.")
    usage = options.flag("include_usage")
    options.finish(frozenset(("include_obfuscation",)))
    return stream, usage


def read_variables(fields: Fields, served: Served) -> tuple[dict[str, Any], int | None]:
    """Return the variables of the chat template, and how many tokens may be thought.

    Raises
    ------
    Refusal
        Naming the field.
    """
    variables = effort_variables(fields.text("reasoning_effort"), served, "reasoning_effort")
    budget = fields.whole("thinking_budget", 0, MOST)
    given = fields.any("chat_template_kwargs")
    if given is None:
        return variables, budget
    if not isinstance(given, Mapping):
        raise wrong_value("chat_template_kwargs", given, "a JSON object")
    reserved = served.reserved()
    for name in given:
        if not name.isidentifier() or name in reserved:
            param = f"chat_template_kwargs.{name:.60}"
            raise not_taken(param, "it is no variable that a chat template can be given")
    rest = dict(given)
    if "thinking_budget" in rest and "thinking_budget" not in served.template:
        inner = Fields({"thinking_budget": rest.pop("thinking_budget")}, "chat_template_kwargs.")
        budget = inner.whole("thinking_budget", 0, MOST)
    return variables | rest, budget


def effort_variables(effort: str | None, served: Served, field: str) -> dict[str, Any]:
    """Return the template's variable of an effort; none without.

    Raises
    ------
    Refusal
        When the template has no such variable.
    """
    if effort is None:
        return {}
    if "reasoning_effort" not in served.template:
        raise not_taken(field, "the model's chat template takes none")
    return {"reasoning_effort": effort}
