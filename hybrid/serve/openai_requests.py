"""Reads OpenAI's requests for text: chats and completions.

What is asked for and not there is refused by its name, and so are fields that OpenAI does not know,
but for those that say how to draw tokens.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hybrid.errors import UsageError
from hybrid.serve.constraints import check_schema
from hybrid.serve.fields import Fields
from hybrid.serve.messages import read_messages
from hybrid.serve.openai_settings import read_settings, read_streamed, read_variables
from hybrid.serve.refusals import not_taken, of_error, wrong_value
from hybrid.serve.served import Served
from hybrid.serve.tools import chosen, read_tools
from hybrid.serve.wanted import MOST_LIKELIEST, Form, Turn, Wanted, text_wanted, turn_wanted

USUAL_NEW_TOKENS = 16
"""New tokens of a completion where nobody says, as OpenAI has it."""

_MOST_LIKELIEST_OF_TEXT = 5
_NO_FUNCTIONS = "this is what OpenAI had before tools; give tools instead"
_ONE = "this server writes what follows one prompt; ask several times"
_BIAS: dict[str, tuple[str, tuple[Any, ...]]] = {
    "logit_bias": ("this server takes no biases of single tokens; leave it out", ({},))
}
_CHAT: dict[str, tuple[str, tuple[Any, ...]]] = _BIAS | {
    "functions": (_NO_FUNCTIONS, ([],)),
    "function_call": (_NO_FUNCTIONS, ("none", "auto")),
    "modalities": ("this server answers in text alone", (["text"],)),
    "audio": ("this server answers in text alone", ()),
    "web_search_options": ("this server searches nothing; leave it out", ()),
}
_COMPLETION: dict[str, tuple[str, tuple[Any, ...]]] = _BIAS | {
    "best_of": ("this server writes no answers that it then leaves out", (1,)),
    "echo": ("the prompt is not repeated here; leave it out", (False,)),
    "suffix": ("this server writes what follows a text, nothing in between", ("",)),
}
IGNORED = frozenset(
    (
        *("user", "metadata", "store", "service_tier", "safety_identifier", "prediction"),
        *("prompt_cache_key", "prompt_cache_retention", "verbosity"),
    )
)
"""Fields of OpenAI's that change no answer."""


def read_chat(given: object, served: Served) -> Wanted:
    """Read the body of a request to ``/v1/chat/completions``.

    Raises
    ------
    Refusal
        Naming the field.
    """
    fields = _opened(given, served, _CHAT)
    messages = read_messages(fields.any("messages"), served)
    variables, budget = read_variables(fields, served)
    settings = read_settings(fields, ("max_completion_tokens", "max_tokens"), _likeliest(fields))
    several = fields.any("parallel_tool_calls") is None or fields.flag("parallel_tool_calls")
    tools = chosen(read_tools(fields, flat=False), fields.any("tool_choice"), several)
    form = read_form(fields.any("response_format"), "response_format")
    stream, usage = read_streamed(fields)
    fields.finish(IGNORED)
    turn = Turn(messages, settings, variables, tools, form, budget)
    return turn_wanted(turn, served, stream=stream, include_usage=usage)


def read_completion(given: object, served: Served) -> Wanted:
    """Read the body of a request to ``/v1/completions``.

    Raises
    ------
    Refusal
        Naming the field.
    """
    fields = _opened(given, served, _COMPLETION)
    prompt = fields.any("prompt")
    likeliest = fields.whole("logprobs", 0, _MOST_LIKELIEST_OF_TEXT)
    settings = read_settings(fields, ("max_tokens",), likeliest)
    stream, usage = read_streamed(fields)
    fields.finish(IGNORED)
    most = served.room(ids := _prompt(prompt, served), settings.most, USUAL_NEW_TOKENS, "prompt")
    return text_wanted(ids, settings, most, served, stream, usage)


def read_text(given: object, served: Served) -> Tensor:
    """Read the body of a request to ``/tokenize`` and return the ids ``[1, T]``.

    Raises
    ------
    Refusal
        Naming the field.
    """
    fields = Fields(given)
    content = fields.text("content")
    if content is None:
        raise wrong_value("content", None, "a string")
    fields.finish()
    return _encoded(content, served, "content")


def read_ids(given: object, served: Served) -> list[int]:
    """Read the body of a request to ``/detokenize`` and return the ids.

    Raises
    ------
    Refusal
        Naming the field.
    """
    fields = Fields(given)
    numbers = fields.any("tokens")
    if not isinstance(numbers, list) or not all(type(number) is int for number in numbers):
        raise wrong_value("tokens", numbers, "a list of token ids")
    fields.finish()
    served.prompt_ids(numbers, "tokens")
    return numbers


def read_form(given: Any, field: str) -> Form | None:
    """Read the form that an answer has to have; None for any text.

    Raises
    ------
    Refusal
        Naming the field.
    """
    if given is None:
        return None
    fields = Fields(given, f"{field}.")
    kind = fields.text("type")
    if kind == "json_schema":
        inner = fields
        if field == "response_format":
            inner = Fields(fields.any("json_schema"), f"{field}.json_schema.")
        schema = inner.any("schema")
        inner.text("name"), inner.text("description"), inner.flag("strict")
        check_schema(schema, inner.name("schema"))
        inner.finish()
        fields.finish()
        return Form(schema, field)
    fields.finish()
    if kind == "json_object":
        return Form({"type": "object"}, field)
    if kind != "text":
        raise wrong_value(f"{field}.type", kind, "text, json_object or json_schema")
    return None


def _opened(
    given: object, served: Served, refused: dict[str, tuple[str, tuple[Any, ...]]]
) -> Fields:
    """Return the fields of a request for this model, once what there is not is refused."""
    fields = Fields(given)
    served.check_name(fields.text("model"))
    fields.refuse(refused)
    return fields


def _likeliest(fields: Fields) -> int | None:
    """Return how many likeliest tokens a chat tells beside each; None where it tells none."""
    told = fields.flag("logprobs")
    likeliest = fields.whole("top_logprobs", 0, MOST_LIKELIEST)
    if likeliest and not told:
        raise not_taken("top_logprobs", "it is for answers with logprobs; add logprobs: true")
    return likeliest or 0 if told else None


def _encoded(text: str, served: Served, field: str) -> Tensor:
    try:
        return served.encode(text)
    except UsageError as error:
        raise of_error(error, field) from error


def _prompt(given: object, served: Served) -> Tensor:
    """Return the ids of a prompt: a text, ids, or a list of one of them."""
    if isinstance(given, list) and given and isinstance(given[0], str | list):
        if len(given) > 1:
            raise not_taken("prompt", f"{len(given)} prompts are given; {_ONE}")
        given = given[0]
    if isinstance(given, str):
        return _encoded(given, served, "prompt")
    if isinstance(given, list) and all(type(number) is int for number in given):
        return served.prompt_ids(given)
    raise wrong_value("prompt", given, "a string or a list of token ids")
