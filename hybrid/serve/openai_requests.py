"""Reads OpenAI's requests for text: chats and completions.

What is asked for and not there is refused by its name, and so are fields that OpenAI does not know,
but for those that say how to draw tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hybrid.errors import UsageError
from hybrid.serve.engine import Asked
from hybrid.serve.fields import Fields
from hybrid.serve.refusals import Refusal, not_taken, of_error, wrong_value
from hybrid.serve.served import Served

USUAL_NEW_TOKENS = 16
"""New tokens of a completion where nobody says, as OpenAI has it."""

_MOST = 2**31 - 1
_LONGEST_STOP = 1024
_MOST_STOPS = 4
_ROLES = ("system", "developer", "user", "assistant")
_OF_TOOLS = "this server calls no tools; leave it out"
_ONE = "this server writes one answer to a request; ask several times"
_NO_PROBABILITIES = "this server tells no probabilities; leave it out"
_NO_BIAS = "this server takes no biases of single tokens; leave it out"
_BOTH: dict[str, tuple[str, tuple[Any, ...]]] = {
    "n": (_ONE, (1,)),
    "logprobs": (_NO_PROBABILITIES, (False,)),
    "logit_bias": (_NO_BIAS, ({},)),
}
_CHAT: dict[str, tuple[str, tuple[Any, ...]]] = _BOTH | {
    "top_logprobs": (_NO_PROBABILITIES, (0,)),
    "tools": (_OF_TOOLS, ([],)),
    "functions": (_OF_TOOLS, ([],)),
    "tool_choice": (_OF_TOOLS, ("none", "auto")),
    "function_call": (_OF_TOOLS, ("none", "auto")),
    "response_format": (
        "this server enforces no form of an answer; ask for it in words",
        ({"type": "text"},),
    ),
    "modalities": ("this server answers in text alone", (["text"],)),
    "audio": ("this server answers in text alone", ()),
    "web_search_options": ("this server searches nothing; leave it out", ()),
}
_COMPLETION: dict[str, tuple[str, tuple[Any, ...]]] = _BOTH | {
    "best_of": (_ONE, (1,)),
    "echo": ("the prompt is not repeated here; leave it out", (False,)),
    "suffix": ("this server writes what follows a text, nothing in between", ("",)),
}
_IGNORED = frozenset(
    (
        *("user", "metadata", "store", "service_tier", "safety_identifier", "prediction"),
        *("prompt_cache_key", "prompt_cache_retention", "parallel_tool_calls"),
    )
)
"""Fields of OpenAI's that change no answer."""


@dataclass(frozen=True, eq=False)
class TextRequest:
    """A request for text: what is asked of the model, and how the answer is sent."""

    asked: Asked
    stream: bool
    include_usage: bool


def read_chat(given: object, served: Served) -> TextRequest:
    """Read the body of a request to ``/v1/chat/completions``.

    Raises
    ------
    Refusal
        Naming the field.
    """
    fields = Fields(given)
    served.check_name(fields.text("model"))
    fields.refuse(_CHAT)
    messages = _messages(fields.any("messages"), served)
    variables = _variables(fields, served)
    limits = [fields.whole(name, 1, _MOST) for name in ("max_completion_tokens", "max_tokens")]
    most = next((limit for limit in limits if limit is not None), None)
    options, seed = _sampling(fields)
    stop, stream = _stop(fields), _streamed(fields)
    fields.finish(_IGNORED)
    try:
        ids = served.encode_chat(messages, variables)
    except UsageError as error:
        raise of_error(error, "messages") from error
    most = served.room(ids, most, None, "messages")
    asked = Asked(ids, most, options, apart=True, stop=stop, seed=seed, field="messages")
    return TextRequest(asked, *stream)


def read_completion(given: object, served: Served) -> TextRequest:
    """Read the body of a request to ``/v1/completions``.

    Raises
    ------
    Refusal
        Naming the field.
    """
    fields = Fields(given)
    served.check_name(fields.text("model"))
    fields.refuse(_COMPLETION)
    prompt = fields.any("prompt")
    most = fields.whole("max_tokens", 1, _MOST)
    options, seed = _sampling(fields)
    stop, stream = _stop(fields), _streamed(fields)
    fields.finish(_IGNORED)
    most = served.room(ids := _prompt(prompt, served), most, USUAL_NEW_TOKENS, "prompt")
    return TextRequest(Asked(ids, most, options, stop=stop, seed=seed), *stream)


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


def _sampling(fields: Fields) -> tuple[dict[str, Any], int | None]:
    """Return how tokens are chosen, and the seed.

    As in ``hybrid run``: any of these asks for drawing, none leaves it to the model's own settings,
    a temperature of 0 takes the likeliest whatever else is asked for.
    """
    temperature = fields.number("temperature", 0, 2)
    drawing = {
        "temperature": temperature,
        "top_p": fields.number("top_p", 0, 1),
        "top_k": fields.whole("top_k", -1, _MOST),
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


def _stop(fields: Fields) -> list[str] | None:
    given = fields.any("stop")
    stops = [given] if isinstance(given, str) else given
    if stops is None or stops == []:
        return None
    wanted = f"a string, or 1 to {_MOST_STOPS} of them"
    if not isinstance(stops, list) or len(stops) > _MOST_STOPS:
        raise wrong_value("stop", given, wanted)
    for text in stops:
        if not isinstance(text, str):
            raise wrong_value("stop", given, wanted)
        if not 1 <= len(text) <= _LONGEST_STOP:
            raise Refusal(
                f"stop: a string of {len(text)} letters is given, it may have 1 to {_LONGEST_STOP}",
                param="stop",
                code="invalid_value",
            )
    return stops


def _streamed(fields: Fields) -> tuple[bool, bool]:
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


def _variables(fields: Fields, served: Served) -> dict[str, Any]:
    """Return the variables of the chat template."""
    variables: dict[str, Any] = {}
    effort = fields.text("reasoning_effort")
    if effort is not None:
        if "reasoning_effort" not in served.template:
            raise not_taken("reasoning_effort", "the model's chat template takes none")
        variables["reasoning_effort"] = effort
    given = fields.any("chat_template_kwargs")
    if given is None:
        return variables
    if not isinstance(given, Mapping):
        raise wrong_value("chat_template_kwargs", given, "a JSON object")
    reserved = served.reserved()
    for name in given:
        if not name.isidentifier() or name in reserved:
            param = f"chat_template_kwargs.{name:.60}"
            raise not_taken(param, "it is no variable that a chat template can be given")
    return variables | dict(given)


def _messages(given: object, served: Served) -> list[dict[str, Any]]:
    """Return the messages as a chat template takes them: each content is one text."""
    if not isinstance(given, list) or not given:
        raise wrong_value("messages", given, "a list with at least one message")
    return [_message(Fields(each, f"messages[{at}]."), served) for at, each in enumerate(given)]


def _message(fields: Fields, served: Served) -> dict[str, Any]:
    role = fields.text("role")
    if role in ("tool", "function"):
        raise not_taken(fields.name("role"), _OF_TOOLS)
    if role not in _ROLES:
        raise wrong_value(fields.name("role"), role, f"one of {', '.join(_ROLES)}")
    if role == "developer" and "developer" not in served.template:
        role = "system"  # what OpenAI called it before, and most templates still do
    fields.refuse(
        {
            "tool_calls": (_OF_TOOLS, ([],)),
            "function_call": (_OF_TOOLS, ()),
            "audio": ("this server reads text alone", ()),
        }
    )
    message: dict[str, Any] = {"role": role, "content": _content(fields)}
    for name in ("name", "reasoning_content"):
        value = fields.text(name)
        if value is not None:
            message[name] = value
    fields.finish(frozenset(("refusal", "annotations")))
    return message


def _content(fields: Fields) -> str:
    """Return a message's text; parts of it are lines of their own."""
    content, name = fields.any("content"), fields.name("content")
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise wrong_value(name, content, "a string or a list of parts of text")
    texts = []
    for at, each in enumerate(content):
        part = Fields(each, f"{name}[{at}].")
        kind = part.text("type")
        if kind != "text":
            raise Refusal(
                f"{name}[{at}].type is {kind!r:.60}: this server reads text alone, no images, "
                "sounds or files",
                param=f"{name}[{at}].type",
                code="unsupported_content",
            )
        text = part.text("text")
        if text is None:
            raise wrong_value(part.name("text"), None, "a string")
        part.finish(frozenset(("cache_control", "annotations")))
        texts.append(text)
    return "\n".join(texts)
