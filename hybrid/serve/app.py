"""The addresses of the server, as an ASGI application; needs fastapi."""

from __future__ import annotations

import asyncio
import sys
import time
import traceback
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import Response, StreamingResponse
from starlette.requests import ClientDisconnect

from hybrid.serve.answering import Answering, collected, streamed
from hybrid.serve.bodies import check_key, parse_json, read_body
from hybrid.serve.chat_page import add_chat_page
from hybrid.serve.engine import Done, Engine, Failed, Job
from hybrid.serve.events import Answer, encoded
from hybrid.serve.lanes import Lanes
from hybrid.serve.openai_answers import ChatAnswer, TextAnswer
from hybrid.serve.openai_requests import read_chat, read_completion, read_ids, read_text
from hybrid.serve.refusals import OURS, Refusal
from hybrid.serve.served import Served
from hybrid.serve.wanted import Wanted
from hybrid.session.generation import Generation

_JSON = "application/json"
Tell = Callable[[str], None]
_Handler = Callable[[Any], Awaitable[Any]]
_Read = Callable[[object, Served], Wanted]


def make_app(
    served: Served,
    engine: Engine,
    *,
    key: str | None = None,
    origins: Sequence[str] = (),
    tell: Tell | None = None,
) -> Any:
    """Return the application that answers for a model.

    Parameters
    ----------
    served, engine
        The model, and who answers with it.
    key
        What clients have to send; None: nothing.
    origins
        Of web pages that may ask; ``*`` are all.
    tell
        Called with a line a request; unless given, that goes to stderr.
    """
    app = FastAPI(title="hybrid", docs_url=None, redoc_url=None, openapi_url=None)
    if origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
        )
    desk = _Desk(served, engine, key, tell or _tell)
    for path, method, handler in desk.addresses():
        app.add_api_route(path, desk.guarded(handler), methods=[method], response_model=None)
    add_chat_page(app)
    for status in (404, 405):
        app.add_exception_handler(status, desk.no_such_address)
    return app


class _Desk:
    """Takes requests, and sends what comes of them."""

    def __init__(self, served: Served, engine: Engine, key: str | None, tell: Tell) -> None:
        self._served, self._engine, self._key, self._tell = served, engine, key, tell
        self._lanes = Lanes(served)
        self._watching: set[asyncio.Task[None]] = set()

    def addresses(self) -> list[tuple[str, str, _Handler]]:
        """Return paths, methods and who handles them."""
        return [
            ("/health", "GET", self._health),
            ("/v1/models", "GET", self._models),
            ("/v1/models/{name:path}", "GET", self._model),
            ("/v1/chat/completions", "POST", self._chat),
            ("/v1/completions", "POST", self._completion),
            ("/tokenize", "POST", self._tokenize),
            ("/detokenize", "POST", self._detokenize),
            ("/lanes", "GET", self._lanes_told),
        ]

    def guarded(self, handler: _Handler) -> Callable[[Any], Awaitable[Any]]:
        """Return a handler whose refusals are sent, and told with one line."""

        async def handle(request: Request) -> Any:
            try:
                if request.url.path != "/health":
                    check_key(request.headers.get("authorization"), self._key)
                return await handler(request)
            except Refusal as refusal:
                return self._refuse(request, refusal)
            except ClientDisconnect:
                return self._refuse(request, Refusal("the sender has gone", status=499))
            except Exception as error:
                traceback.print_exc()
                told = f"an error of ours ({type(error).__name__}), which the server has shown"
                return self._refuse(request, Refusal(told, status=500, kind=OURS))

        return handle

    async def no_such_address(self, request: Any, error: Any) -> Any:
        """Send the refusal of a path that there is not, or not with this method."""
        what = f"{request.method} {request.url.path!r:.100}"
        there = ", ".join(f"{method} {path}" for path, method, _ in self.addresses())
        told = f"there is no {what} here, but {there.replace('{name:path}', 'NAME')}"
        refusal = Refusal(told, status=error.status_code, code="unknown_url")
        return self._refuse(request, refusal)

    async def _health(self, request: Any) -> Any:
        return _json({"status": "ok", "model": self._served.name, "requests": self._engine.jobs})

    async def _models(self, request: Any) -> Any:
        return _json({"object": "list", "data": [self._served.card()]})

    async def _model(self, request: Any) -> Any:
        self._served.check_name(request.path_params["name"])
        return _json(self._served.card())

    async def _lanes_told(self, request: Any) -> Any:
        given = request.query_params.get("context")
        return _json(await asyncio.to_thread(self._lanes.answer, given))

    async def _tokenize(self, request: Any) -> Any:
        given = await self._given(request)
        ids = await asyncio.to_thread(lambda: read_text(given(), self._served))
        return _json({"tokens": ids[0].tolist()})

    async def _detokenize(self, request: Any) -> Any:
        given = await self._given(request)
        served = self._served
        text = await asyncio.to_thread(lambda: served.decode(read_ids(given(), served)))
        return _json({"content": text})

    async def _chat(self, request: Any) -> Any:
        return await self._answer(request, read_chat, ChatAnswer)

    async def _completion(self, request: Any) -> Any:
        return await self._answer(request, read_completion, TextAnswer)

    async def _answer(self, request: Any, read: _Read, form: Any) -> Any:
        given = await self._given(request)
        wanted = await asyncio.to_thread(lambda: read(given(), self._served))
        chances = wanted.answers[0].chances is not None
        usage = wanted.include_usage
        answer = form(self._served.name, include_usage=usage, chances=chances)
        return await self._sent(request, wanted, answer)

    async def _given(self, request: Any) -> Callable[[], Any]:
        """Return what reads the JSON that a request carries."""
        body = await read_body(request.stream(), request.headers.get("content-type"))
        return lambda: parse_json(body)

    async def _sent(self, request: Any, wanted: Wanted, answer: Answer) -> Any:
        """Have a request answered while its reader is there, and send what comes of it."""

        def on_end(job: Job, event: Done | Failed) -> None:
            if isinstance(event, Done):
                self._lanes.note(event.generation)
                self._tell(f"{_named(request)}: {_figures(event.generation, job.waited_s)}")
            else:
                self._tell(f"{_named(request)}: {_refused(event.refusal)}")

        answering = Answering(self._engine, wanted, on_end)
        watching = asyncio.create_task(self._watch(request, answering))
        self._watching.add(watching)
        watching.add_done_callback(self._watching.discard)
        answers = len(wanted.answers)
        if wanted.stream:
            return StreamingResponse(
                streamed(answering, answer, answers),
                media_type="text/event-stream",
                headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
            )
        try:
            return _json(answer.whole(await collected(answering, answers)))
        except Refusal as refusal:  # which was told
            return self._refusal(request, refusal)

    async def _watch(self, request: Any, answering: Answering) -> None:
        """Wait until the reader of an answer has it, or has gone."""
        while (await request.receive())["type"] != "http.disconnect":
            pass
        answering.leave()

    def _refuse(self, request: Any, refusal: Refusal) -> Any:
        self._tell(f"{_named(request)}: {_refused(refusal)}")
        return self._refusal(request, refusal)

    def _refusal(self, request: Any, refusal: Refusal) -> Any:
        return _json(refusal.body, refusal.status, refusal.headers)


def _json(value: object, status: int = 200, headers: dict[str, str] | None = None) -> Any:
    return Response(encoded(value), status, headers, _JSON)


def _named(request: Any) -> str:
    """Return what a request is called in a line of its own."""
    return f"{request.method} {request.url.path:.100}"


def _refused(refusal: Refusal) -> str:
    return f"{refusal.status} {refusal.message}"


def _figures(generation: Generation, waited_s: float) -> str:
    """Say how an answer went."""
    times = generation.times
    prompt = times.prompt_tokens + times.kept_tokens
    words = [f"{prompt} prompt tokens ({times.kept_tokens} reused)", f"{times.new_tokens} new"]
    if waited_s >= 0.1:
        words.append(f"waited {waited_s:.1f} s")
    if times.ttft_s is not None:
        words.append(f"TTFT {times.ttft_s:.3f} s")
    if times.new_tokens > 1 and times.decode_s > 0:
        words.append(f"{(times.new_tokens - 1) / times.decode_s:.1f} tokens/s")
    return ", ".join([*words, f"ended: {generation.ended}"])


def _tell(line: str) -> None:
    """Tell a line on stderr, in which nothing that was sent can begin another."""
    told = "".join(letter if letter.isprintable() else "?" for letter in line)
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {told}\n")  # in one piece: threads tell, too
    sys.stderr.flush()
