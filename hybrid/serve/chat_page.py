"""The chat page at ``/``: its files, which need no key and ask nobody but this server."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from fastapi import FastAPI
from fastapi.responses import Response

_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
}
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
_FIRST = "index.html"


def add_chat_page(app: FastAPI) -> None:
    """Have ``app`` answer ``GET /`` with the page, and what belongs to it under ``/page/``."""
    for each in files("hybrid.serve").joinpath("page").iterdir():
        kind = _TYPES.get(each.name.rpartition(".")[2])
        if kind is not None:
            path = "/" if each.name == _FIRST else f"/page/{each.name}"
            _add(app, path, each.read_bytes(), kind)


def _add(app: FastAPI, path: str, content: bytes, kind: str) -> None:
    async def send() -> Any:
        return Response(content, headers=_HEADERS, media_type=kind)

    app.add_api_route(path, send, methods=["GET"], response_model=None)
