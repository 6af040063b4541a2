"""A server under load: what is asked, what is counted, and what goes wrong."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from hybrid.bench.serving import quantiles, questions, run_serve_bench, serve_table
from hybrid.cli import main
from hybrid.errors import UsageError


class Answers(BaseHTTPRequestHandler):
    """Streams three pieces of an answer, or refuses."""

    refused = False
    asked: list[dict[str, Any]]

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(body)
        self.send_response(429 if self.refused else 200)
        self.end_headers()
        if self.refused:
            self.wfile.write(json.dumps({"error": {"message": "too many"}}).encode())
            return
        for text in "abc":
            self._send({"choices": [{"text": text}]})
        details = {"cached_tokens": 2}
        usage = {"prompt_tokens": 5, "completion_tokens": 3, "prompt_tokens_details": details}
        self._send({"choices": [], "usage": usage})
        self.wfile.write(b"data: [DONE]\n\n")

    def _send(self, event: dict[str, Any]) -> None:
        self.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture
def server() -> Iterator[tuple[str, type[Answers]]]:
    kind = type("Own", (Answers,), {"asked": [], "refused": False})
    with ThreadingHTTPServer(("127.0.0.1", 0), kind) as listening:
        thread = threading.Thread(target=listening.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{listening.server_port}", kind
        listening.shutdown()
        thread.join()


def test_every_client_asks_and_all_is_counted(server: tuple[str, type[Answers]]) -> None:
    """Tokens as the server counts them; the questions are the same each time."""
    url, kind = server
    record = run_serve_bench(url=url, clients=(1, 3), requests=2, pause_s=0.0, threads=1)
    one, three = record["rows"]
    assert (one["clients"], one["answered"], one["new_tokens"]) == (1, 2, 6)
    assert (three["clients"], three["answered"], three["failed"]) == (3, 6, 0)
    assert (three["prompt_tokens"], three["reused_tokens"]) == (30, 12)
    assert three["tokens_per_s"] == pytest.approx(18 / three["seconds"])
    for name in ("ttft_s", "tpot_s"):
        assert 0 <= three[name]["p50"] <= three[name]["p95"]
    wanted = [question for client in range(3) for question in questions(client, 2, 100, 64)]
    found = sorted((body["prompt"], body["max_tokens"]) for body in kind.asked[3:])
    assert found == sorted((question.text, question.most) for question in wanted)
    assert "  3 clients: " in serve_table(record)
    assert "6 answered" in serve_table(record)


def test_what_is_refused_is_told(server: tuple[str, type[Answers]]) -> None:
    """As failed, with the server's words."""
    url, kind = server
    kind.refused = True
    record = run_serve_bench(url=url, clients=(2,), requests=1, pause_s=0.0, threads=1)
    (row,) = record["rows"]
    assert (row["answered"], row["failed"], row["errors"]) == (0, 2, ["429 too many"])
    assert row["ttft_s"] == {"p50": None, "p95": None}
    assert "2 failed (429 too many)" in serve_table(record)


@pytest.mark.parametrize(
    ("samples", "p50", "p95"),
    [([1.0], 1.0, 1.0), ([3.0, 1.0, 2.0], 2.0, 3.0), ([float(n) for n in range(1, 101)], 50, 95)],
)
def test_quantiles(samples: list[float], p50: float, p95: float) -> None:
    """Samples themselves, none made up between two."""
    assert quantiles(samples) == {"p50": p50, "p95": p95}


def test_lengths_are_about_what_is_asked_for() -> None:
    """Their median, over many questions."""
    words = sorted(len(each.text.split()) for each in questions(0, 999, 100, 64))
    assert 90 < words[499] < 110
    assert words[0] < 50
    assert words[-1] > 200


def test_no_server_is_one_error() -> None:
    """One that is not there, one elsewhere, and one beside a model."""
    with pytest.raises(UsageError, match=r"nobody answers at http://127\.0\.0\.1:9"):
        run_serve_bench(url="http://127.0.0.1:9", threads=1)
    with pytest.raises(UsageError, match="no http:// address of this machine's loopback"):
        run_serve_bench(url="http://192.0.2.1:80", threads=1)
    with pytest.raises(UsageError, match="a model and --url are given"):
        run_serve_bench("demo", url="http://127.0.0.1:9", threads=1)


def test_the_command_measures_the_demo(
    hybrid_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A server of its own, from start to end, and a line in a file."""
    pytest.importorskip("uvicorn", reason="the server needs uvicorn")
    file = tmp_path / "serving.jsonl"
    words = ["--clients", "2", "--requests", "2", "--prompt", "8", "--generate", "6"]
    assert main(["bench", "serve", *words, "--threads", "1", "--json", "--record", str(file)]) == 0
    printed = json.loads(capsys.readouterr().out)
    (row,) = printed["rows"]
    assert row["answered"] == 4
    assert row["new_tokens"] > 4
    assert json.loads(file.read_text())["rows"] == [row]


def test_a_server_that_does_not_start_is_one_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With what it said."""
    pytest.importorskip("uvicorn", reason="the server needs uvicorn")
    assert main(["bench", "serve", str(tmp_path / "nothing"), "--threads", "1"]) == 2
    error = capsys.readouterr().err
    assert "the server did not start" in error
    assert "nothing" in error
