"""What a request is refused with, in the form that OpenAI's clients read."""

from __future__ import annotations

from typing import Any

from hybrid.formats.errors import HybridError

INVALID, UNKNOWN_KEY = "invalid_request_error", "authentication_error"
BUSY, OURS = "rate_limit_error", "server_error"


class Refusal(Exception):  # noqa: N818 (what it is, to whoever asked)
    """A request is not answered.

    Parameters
    ----------
    message
        What is wrong, both values, and what to do about it.
    status
        The HTTP status.
    param
        The field of the request that it is about.
    code
        A name for the reason that programs compare.
    kind
        The kind of error, in OpenAI's words.
    retry_after_s
        Seconds after which it may be asked again.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        kind: str = INVALID,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.status, self.param = message, status, param
        self.code, self.kind, self.retry_after_s = code, kind, retry_after_s

    @property
    def body(self) -> dict[str, Any]:
        """What is sent."""
        told = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": told}

    @property
    def headers(self) -> dict[str, str]:
        """What is sent beside it."""
        found = {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}
        return found | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})


def not_taken(param: str, why: str) -> Refusal:
    """Return the refusal of a field that this server does not act on."""
    return Refusal(f"{param}: {why}", param=param, code="unsupported_parameter")


def wrong_value(param: str, value: object, wanted: str) -> Refusal:
    """Return the refusal of a field's value."""
    return Refusal(
        f"{param} is {shown(value)}, it must be {wanted}", param=param, code="invalid_value"
    )


def of_error(error: HybridError, param: str) -> Refusal:
    """Return the refusal that an error stands for; hints about the command line are left out."""
    hint = "" if error.hint is None or "--" in error.hint else f" ({error.hint})"
    return Refusal(f"{error.message}{hint}", param=param, code="invalid_value")


def too_long(tokens: int, context: int, param: str) -> Refusal:
    """Return the refusal of a prompt that leaves the context no room for an answer."""
    return Refusal(
        f"{param}: the prompt has {tokens} tokens and the context is {context} tokens, which must "
        f"also hold the answer: shorten it to {context - 1} tokens or fewer",
        param=param,
        code="context_length_exceeded",
    )


def shown(value: object) -> str:
    """Return the beginning of what was sent."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of more digits than Python writes
        return f"a value of type {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."
