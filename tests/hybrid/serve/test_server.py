"""The server itself: OpenAI's own client, several at once, readers who go, ports, the end."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from hybrid.cli import main
from hybrid.cli.serve import model_name
from hybrid.errors import UsageError
from hybrid.serve import server
from hybrid.serve.engine import Engine
from hybrid.serve.served import Served
from hybrid.session.model import HybridModel

PROMPTS = ["def main(argv):\n    ", "import os\n", "class Reader:\n", "x = [1, 2, "]
LONG_S = 60
posix = pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")


@pytest.fixture
def client(model: HybridModel, engine: Engine, listening: Any) -> Iterator[Any]:
    """OpenAI's own client, of a server on a free port."""
    pytest.importorskip("fastapi", reason="the server needs fastapi")
    openai = pytest.importorskip("openai", reason="OpenAI's own client is not installed")
    from hybrid.serve.app import make_app

    app = make_app(Served(model, "demo"), engine, key="key", tell=lambda line: None)
    with (
        listening(app) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="key", max_retries=0) as made,
    ):
        yield made


def test_openai_s_client(client: Any, model: HybridModel) -> None:
    """Models, both kinds of answers, streams and errors come as its own types."""
    import openai

    assert [card.id for card in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo").id == "demo"
    greedy: dict[str, Any] = {"model": "demo", "temperature": 0, "max_tokens": 12}
    wanted = model.generate(PROMPTS[0], do_sample=False, max_new_tokens=12)
    done = client.completions.create(prompt=PROMPTS[0], **greedy)
    assert done.choices[0].text == wanted
    assert done.usage.prompt_tokens_details.cached_tokens == 0
    pieces = client.completions.create(prompt=PROMPTS[0], stream=True, **greedy)
    assert "".join(chunk.choices[0].text for chunk in pieces) == wanted

    messages = [{"role": "user", "content": "def read(path):"}]
    wanted = model.chat(messages, do_sample=False, max_new_tokens=12)
    answer = client.chat.completions.create(messages=messages, **greedy)
    assert answer.choices[0].message.content == wanted
    usage = {"include_usage": True}
    *chunks, last = client.chat.completions.create(
        messages=messages, stream=True, stream_options=usage, **greedy
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == wanted
    assert last.usage.completion_tokens == answer.usage.completion_tokens

    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(messages=messages, n=0, **greedy)
    assert caught.value.param == "n"
    with pytest.raises(openai.NotFoundError):
        client.completions.create(prompt="a", model="gpt-4")
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="other").models.list()
    with pytest.raises(openai.APIStatusError) as large:
        client.completions.create(prompt="a" * 10_000_000, **greedy)
    assert large.value.status_code == 413


def test_several_at_once_are_answered_as_alone(client: Any) -> None:
    """Whoever asks beside them, and whatever was kept."""

    def ask(prompt: str) -> str:
        done = client.completions.create(model="demo", prompt=prompt, temperature=0, max_tokens=40)
        return str(done.choices[0].text)

    alone = [ask(prompt) for prompt in PROMPTS]
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(ask, PROMPTS * 2)) == alone * 2


class Endless:
    """Stands where the model stands: writes until its reader has gone."""

    def __init__(self, model: HybridModel) -> None:
        self._model = model
        self.begun, self.ended = threading.Event(), threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def write(self, ids: Any, *, on_text: Any, streamer: Any, **_: Any) -> None:
        self.begun.set()
        try:
            while True:
                on_text("x")
                streamer.put(None)
                time.sleep(0.005)
        finally:
            self.ended.set()


@pytest.mark.parametrize("stream", ["true", "false"])
@pytest.mark.parametrize("waits", [False, True])
def test_a_disconnect_frees_the_engine(
    model: HybridModel, listening: Any, stream: str, waits: bool
) -> None:
    """Of a reader of a stream, of one who waits for all of it, and of one in the queue."""
    pytest.importorskip("fastapi", reason="the server needs fastapi")
    from hybrid.serve.app import make_app

    endless = Endless(model)
    engine = Engine(endless, waiting=4)  # type: ignore[arg-type]
    told: list[str] = []
    app = make_app(Served(endless, "demo"), engine, tell=told.append)  # type: ignore[arg-type]
    with listening(app) as url:
        running = _ask(url, stream)
        assert endless.begun.wait(LONG_S)
        if waits:
            second = _ask(url, stream)
            _until(lambda: engine.jobs == 2)
            second.close()
            _until(lambda: engine.jobs == 1)
            assert not endless.ended.is_set()
        running.close()
        assert endless.ended.wait(LONG_S)
        _until(lambda: engine.jobs == 0)
        _until(lambda: len(told) == 1 + waits)
    engine.end(0)


def test_a_sender_who_goes_is_no_error(
    model: HybridModel, engine: Engine, listening: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the middle of a body."""
    pytest.importorskip("fastapi", reason="the server needs fastapi")
    from hybrid.serve.app import make_app

    told: list[str] = []
    with listening(make_app(Served(model, "demo"), engine, tell=told.append)) as url:
        _ask(url, "true", missing=10).close()
        _until(lambda: bool(told))
    assert told == ["POST /v1/completions: 499 the sender has gone"]
    assert "Traceback" not in capsys.readouterr().err


def _ask(url: str, stream: str, missing: int = 0) -> socket.socket:
    """Send a request, and return the connection without having read anything.

    ``missing`` bytes of its body are yet to come.
    """
    host, port = url.removeprefix("http://").split(":")
    body = f'{{"prompt": "a", "stream": {stream}}}'
    connection = socket.create_connection((host, int(port)))
    connection.sendall(
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        + f"Content-Length: {len(body) + missing}\r\n\r\n{body}".encode()
    )
    return connection


def _until(true: Callable[[], bool]) -> None:
    end_s = time.monotonic() + LONG_S
    while not true():
        assert time.monotonic() < end_s
        time.sleep(0.01)


def test_a_port_in_use(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    """Is said before a model is loaded, with what helps; so is a host of others."""
    monkeypatch.setattr("hybrid.serve.server.check_installed", lambda: None)
    monkeypatch.setattr("hybrid.cli.generation.load", lambda *_, **__: pytest.fail("it was loaded"))
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", "--port", str(port)]) == 2
        error, hint = capsys.readouterr().err.splitlines()
    assert error == f"error: port {port} of 127.0.0.1 is in use by another program"
    assert "--port" in hint
    assert main(["serve", "--host", "192.0.2.1"]) == 2
    assert "192.0.2.1" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="others refuse the second one earlier")
def test_two_that_start_at_once() -> None:
    """The second is refused when the first has begun to listen, at the latest."""
    with server.open_address("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with server.open_address("127.0.0.1", port) as second:
            server.listen(first)
            with pytest.raises(UsageError, match=rf"port {port} of 127.0.0.1 is in use"):
                server.listen(second)


def test_a_missing_package_is_named(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a model is loaded, with what installs it."""
    monkeypatch.setattr(server, "find_spec", lambda name: None)
    monkeypatch.setattr("hybrid.cli.generation.load", lambda *_, **__: pytest.fail("it was loaded"))
    assert main(["serve"]) == 2
    error, hint = capsys.readouterr().err.splitlines()
    assert error == "error: hybrid serve needs fastapi and uvicorn, not installed here"
    assert "hybrid-moe[serve]" in hint


def test_an_empty_key_is_refused(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As from a variable that was not set: it would let everybody in."""
    monkeypatch.setattr("hybrid.serve.server.check_installed", lambda: None)
    assert main(["serve", "--api-key", ""]) == 2
    assert "--api-key is empty" in capsys.readouterr().err


def test_what_a_model_is_called(tmp_path: Any) -> None:
    """A folder by its name, others as they are given."""
    (tmp_path / "qwen3-q4").mkdir()
    assert model_name(None) == "demo"
    assert model_name(str(tmp_path / "qwen3-q4")) == "qwen3-q4"
    assert model_name("Qwen/Qwen3-30B-A3B") == "Qwen/Qwen3-30B-A3B"


def test_which_addresses_are_this_machine_s_alone() -> None:
    """So that it is said where others reach the server."""
    assert [server.is_loopback(host) for host in ("127.0.0.1", "127.1.2.3", "::1")] == [True] * 3
    assert [server.is_loopback(host) for host in ("0.0.0.0", "::", "192.168.0.2")] == [False] * 3


@posix
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_program_ends_in_order(number: signal.Signals, interruptible: None) -> None:
    """The answer that runs is finished, the exit code is 0, and a line tells of the request."""
    pytest.importorskip("fastapi", reason="the server needs fastapi")
    pytest.importorskip("uvicorn", reason="the server needs uvicorn")
    command = [sys.executable, "-m", "hybrid", "serve", "--port", "0", "--threads", "1"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as program:
        assert program.stderr is not None
        url = None
        for line in program.stderr:
            if url := re.search(r"answers on (http://[\d.:]+)/v1", line):
                break
        assert url is not None
        host, port = url[1].removeprefix("http://").split(":")
        body = '{"prompt": "a", "stream": true, "max_tokens": 900, "stop": ["\\u0000"]}'
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
                + f"Content-Length: {len(body)}\r\n\r\n{body}".encode()
            )
            received = connection.recv(1 << 16)
            program.send_signal(number)
            while more := connection.recv(1 << 16):
                received += more
        told = program.stderr.read()
        assert program.wait(LONG_S) == 0
    assert received.startswith(b"HTTP/1.1 200")
    assert b"data: [DONE]" in received
    assert "Traceback" not in told
    assert re.search(r"POST /v1/completions: \d+ prompt tokens .* ended: ", told)
