"""Reads what HTTP requests carry: their JSON, within limits, and their key."""

from __future__ import annotations

import hmac
import json
from collections.abc import AsyncIterator
from typing import Any

from hybrid.serve.refusals import UNKNOWN_KEY, Refusal

MOST_BYTES = 8 << 20
"""Bytes of a body; more are refused."""
_MOST_SKIPPED = 8 * MOST_BYTES
"""Bytes of a body that are read away, so that its sender comes to read why it is refused."""


async def read_body(chunks: AsyncIterator[bytes], kind: str | None) -> bytes:
    """Return the bytes of a request's body.

    Parameters
    ----------
    chunks
        As they arrive.
    kind
        What the request's Content-Type says.

    Raises
    ------
    Refusal
        When they are too many, or are not said to be JSON.
    """
    parts, size = [], 0
    async for chunk in chunks:
        size += len(chunk)
        if size <= MOST_BYTES:
            parts.append(chunk)
        elif size > _MOST_SKIPPED:
            break
    if size > MOST_BYTES:
        raise Refusal(
            f"the body has more than {MOST_BYTES} bytes, which is the most that is read: send less",
            status=413,
            code="body_too_large",
        )
    # A page of another origin can send anything else without asking.
    if (kind or "").partition(";")[0].strip().lower() != "application/json":
        raise Refusal(
            f"the body is {kind or 'of no stated type'}, it must be JSON: send the header "
            "Content-Type: application/json",
            status=415,
            code="unsupported_content_type",
        )
    return b"".join(parts)


def parse_json(body: bytes) -> Any:
    """Return the value that a body holds.

    Raises
    ------
    Refusal
        When it is no JSON, or too deep.
    """
    try:
        return json.loads(body.decode("utf-8"), parse_constant=_no_number)
    except UnicodeDecodeError as error:
        wrong = f"byte 0x{body[error.start]:02x} at offset {error.start}"
        raise Refusal(f"the body is not UTF-8: {wrong}", code="invalid_json") from error
    except RecursionError as error:
        raise Refusal("the body's JSON is nested too deeply", code="invalid_json") from error
    except ValueError as error:
        raise Refusal(f"the body is no JSON: {error}", code="invalid_json") from error


def check_key(header: str | None, key: str | None) -> None:
    """Refuse a request whose Authorization has another key than the server's.

    Raises
    ------
    Refusal
        Which tells neither key.
    """
    if key is None:
        return
    scheme, _, given = (header or "").partition(" ")
    right = hmac.compare_digest(given.strip().encode("latin-1"), key.encode())
    if scheme.lower() != "bearer" or not right:
        what = "a wrong key is given" if given else "no key is given"
        raise Refusal(
            f"{what}: send the header Authorization: Bearer KEY, with the server's --api-key",
            status=401,
            kind=UNKNOWN_KEY,
            code="invalid_api_key",
        )


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")
