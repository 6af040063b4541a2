"""Measures a server under load: clients that ask, read and pause (``hybrid bench serve``).

A client asks for a completion, reads its stream to the end, and asks again after a pause drawn from
an exponential distribution, so that questions come as a Poisson process as long as nobody waits.
Lengths of prompts and answers are drawn from log-normal ones. Everything goes over this machine's
loopback.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from hybrid.bench.record import Told, provenance, untold
from hybrid.errors import UsageError
from hybrid.machine import host

CLIENTS = (1, 4, 16)
_SIGMA = 0.6
"""Spread of the lengths' logarithms."""
_START_S, _ANSWER_S = 600, 600
"""Seconds in which a server has to be there, and an answer to go on."""
_HERE = ("127.0.0.1", "::1", "localhost")
_TEXT = (
    "the value of a first second result name count file path when then there which other line "
    "model table index reads writes returns between before after every open close short long"
)
"""Words that prompts are drawn from."""

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Question:
    """What is asked: so many words of a prompt, and new tokens at most."""

    text: str
    most: int


@dataclass(frozen=True)
class Answered:
    """How an answer went.

    Attributes
    ----------
    ttft_s
        Seconds until its first piece; None where none came.
    decode_s
        Seconds from that to its end.
    prompt_tokens, reused_tokens, new_tokens
        As the server counts them.
    error
        Why there was no answer; None where there was.
    """

    ttft_s: float | None = None
    decode_s: float = 0.0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    new_tokens: int = 0
    error: str | None = None

    @property
    def tpot_s(self) -> float | None:
        """Seconds per token after the first; None of fewer than two."""
        return self.decode_s / (self.new_tokens - 1) if self.new_tokens > 1 else None


def run_serve_bench(
    model: str | None = None,
    *,
    url: str | None = None,
    options: Sequence[str] = (),
    clients: Sequence[int] = CLIENTS,
    requests: int = 8,
    prompt: int = 100,
    generate: int = 64,
    pause_s: float = 0.2,
    threads: int | None = None,
    progress: Progress = lambda text: None,
    finished: Told = untold,
) -> dict[str, Any]:
    """Ask a server from several clients at once, for every number of ``clients``.

    Parameters
    ----------
    model, options
        What a server is started with, as for ``hybrid serve``.
    url
        A server that runs already, such as ``http://127.0.0.1:8080``; exclusive with ``model``.
    requests
        Questions of each client.
    prompt, generate
        Words of a prompt and new tokens of an answer, the median of each.
    pause_s
        Mean seconds from an answer to the client's next question.

    Returns
    -------
    One record: for every number of clients ``tokens_per_s`` of all together, ``p50`` and ``p95`` of
    ``ttft_s`` and ``tpot_s``, how many questions were answered, how many tokens there were, and
    which errors.

    Raises
    ------
    UsageError
        When the server does not start or cannot be reached.
    """
    threads = host.default_threads() if threads is None else threads
    record = provenance("hybrid bench serve", threads) | {
        "model": model or url or "demo",
        "options": list(options),
        "requests_per_client": requests,
        "prompt_words": prompt,
        "generate": generate,
        "pause_s": pause_s,
        "rows": [],
    }
    if url is not None and model is not None:
        raise UsageError("a model and --url are given", hint="give one of them")
    with _served(model, threads, options, progress) if url is None else _there(url) as address:
        _ask(address, Question("a first question", 4))  # what is compiled late is compiled now
        for count in clients:
            progress(f"{count} {'client' if count == 1 else 'clients'}")
            begun_s = time.perf_counter()
            answers = _load(address, count, requests, prompt, generate, pause_s)
            row = _row(count, answers, time.perf_counter() - begun_s)
            record["rows"].append(row)
            finished(record, serve_line(row))
    return record


def questions(client: int, count: int, prompt: int, generate: int) -> list[Question]:
    """Return what a client asks; the same each time."""
    numbers = random.Random(client)
    found = []
    for _ in range(count):
        words = max(1, round(prompt * numbers.lognormvariate(0, _SIGMA)))
        most = max(2, round(generate * numbers.lognormvariate(0, _SIGMA)))
        found.append(Question(" ".join(numbers.choices(_TEXT.split(), k=words)), most))
    return found


def _load(
    address: str, clients: int, requests: int, prompt: int, generate: int, pause_s: float
) -> list[Answered]:
    answers: list[Answered] = []

    def client(number: int) -> None:
        pauses = random.Random(-1 - number)
        for question in questions(number, requests, prompt, generate):
            time.sleep(pauses.expovariate(1 / pause_s) if pause_s else 0.0)
            answers.append(_ask(address, question))

    asking = [threading.Thread(target=client, args=(at,), daemon=True) for at in range(clients)]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join()
    return answers


def _ask(address: str, question: Question) -> Answered:
    """Ask for a completion and read its stream."""
    body = {
        "prompt": question.text,
        "max_tokens": question.most,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    parts = urlsplit(address)
    connection = http.client.HTTPConnection(
        parts.hostname or "", parts.port or 80, timeout=_ANSWER_S
    )
    begun_s = time.perf_counter()
    first_s = last_s = None
    usage: dict[str, Any] = {}
    try:
        sent = json.dumps(body).encode()
        connection.request(
            "POST", "/v1/completions", sent, {"Content-Type": "application/json"} | _key()
        )
        answer = connection.getresponse()
        if answer.status != 200:
            return Answered(error=f"{answer.status} {_told(json.loads(answer.read()))}")
        for line in answer:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[len(b"data: ") :])
            if "error" in event:
                return Answered(error=_told(event))
            usage = event.get("usage") or usage
            if any(choice.get("text") for choice in event.get("choices", ())):
                last_s = time.perf_counter()
                first_s = last_s if first_s is None else first_s
    except (OSError, http.client.HTTPException, ValueError) as error:
        return Answered(error=f"{type(error).__name__}: {error}")
    finally:
        connection.close()
    return Answered(
        ttft_s=None if first_s is None else first_s - begun_s,
        decode_s=0.0 if first_s is None or last_s is None else last_s - first_s,
        prompt_tokens=usage.get("prompt_tokens", 0),
        reused_tokens=(usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0),
        new_tokens=usage.get("completion_tokens", 0),
    )


def _told(event: dict[str, Any]) -> str:
    return str(event.get("error", {}).get("message", event))


def _key() -> dict[str, str]:
    key = os.environ.get("HYBRID_API_KEY")
    return {} if key is None else {"Authorization": f"Bearer {key}"}


def _row(clients: int, answers: Sequence[Answered], seconds: float) -> dict[str, Any]:
    fine = [answer for answer in answers if answer.error is None]
    new = sum(answer.new_tokens for answer in fine)
    return {
        "clients": clients,
        "answered": len(fine),
        "errors": sorted({answer.error for answer in answers if answer.error is not None}),
        "failed": len(answers) - len(fine),
        "seconds": seconds,
        "prompt_tokens": sum(answer.prompt_tokens for answer in fine),
        "reused_tokens": sum(answer.reused_tokens for answer in fine),
        "new_tokens": new,
        "tokens_per_s": new / seconds if seconds > 0 else 0.0,
        "ttft_s": quantiles([a.ttft_s for a in fine if a.ttft_s is not None]),
        "tpot_s": quantiles([a.tpot_s for a in fine if a.tpot_s is not None]),
    }


def quantiles(samples: Sequence[float]) -> dict[str, float | None]:
    """Return ``p50`` and ``p95``: the samples that half and 95 % of them are not above."""
    ordered = sorted(samples)
    return {
        name: ordered[-(-len(ordered) * share // 100) - 1] if ordered else None
        for name, share in (("p50", 50), ("p95", 95))
    }


@contextmanager
def _there(url: str) -> Iterator[str]:
    """Yield the address of a server that runs; UsageError where it does not answer."""
    parts = urlsplit(url if "//" in url else f"http://{url}")
    try:
        if parts.scheme != "http" or parts.hostname not in _HERE:
            raise ValueError("it is no http:// address of this machine's loopback")
        connection = http.client.HTTPConnection(parts.hostname, parts.port or 80, timeout=10)
        connection.request("GET", "/health")
        connection.getresponse().read()
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise UsageError(
            f"nobody answers at {url}: {error}", hint="start one with 'hybrid serve'"
        ) from error
    yield f"http://{parts.netloc}"


@contextmanager
def _served(
    model: str | None, threads: int, options: Sequence[str], progress: Progress
) -> Iterator[str]:
    """Start a server, yield its address, and end it."""
    given = [] if model is None else [model]
    command = [sys.executable, "-m", "hybrid", "serve", *given, "--port", "0"]
    command += ["--threads", str(threads), *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        lines: list[str] = []
        late = threading.Timer(_START_S, server.kill)
        late.start()
        try:
            url = None
            for line in server.stderr:
                lines.append(line.rstrip())
                if " answers on http://" in line:
                    url = line.split(" answers on ")[1].split("/v1")[0]
                    break
                progress(lines[-1])
            late.cancel()
            if url is None:
                raise UsageError(
                    f"the server did not start: {lines[-1] if lines else 'it said nothing'}",
                    hint=f"try it by itself: {' '.join(['hybrid', *command[3:]])}",
                )
            threading.Thread(target=server.stderr.read, daemon=True).start()
            yield url
        finally:
            late.cancel()
            server.terminate()
            try:
                server.wait(60)
            except subprocess.TimeoutExpired:
                server.kill()


def serve_line(row: dict[str, Any]) -> str:
    """Return a row of :func:`run_serve_bench` in words."""

    def ms(name: str) -> str:
        both = (row[name]["p50"], row[name]["p95"])
        return " / ".join("-" if each is None else f"{each * 1e3:.1f}" for each in both)

    failed = f", {row['failed']} failed ({'; '.join(row['errors'])})" if row["failed"] else ""
    return (
        f"{row['clients']:>3} clients: {row['tokens_per_s']:.1f} tokens/s, TTFT {ms('ttft_s')} ms, "
        f"TPOT {ms('tpot_s')} ms (p50 / p95), {row['answered']} answered{failed}"
    )


def serve_table(record: dict[str, Any]) -> str:
    """Return the record as lines of text."""
    return "\n".join([f"{record['model']}:", *map(serve_line, record["rows"])])
