"""A server in this process that answers with the shipped model, and one on a free port."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from hybrid.engine.together import Together
from hybrid.serve.engine import Engine
from hybrid.serve.served import Served
from hybrid.session.model import HybridModel


@pytest.fixture(scope="session")
def model(hybrid_cache: Any) -> HybridModel:
    return HybridModel.from_pretrained(threads=1)


@pytest.fixture
def told() -> list[str]:
    """The lines about requests."""
    return []


@pytest.fixture(params=["alone", "together"])
def engine(model: HybridModel, request: pytest.FixtureRequest) -> Iterator[Engine]:
    """One that answers one after the other, and one that answers several at once."""
    together = Together(model, 3, 1 << 26) if request.param == "together" else None
    made = Engine(model, waiting=8, together=together)
    yield made
    made.end(0)


@pytest.fixture
def ask(model: HybridModel, engine: Engine, told: list[str]) -> Iterator[Any]:
    """A client in this process: ``ask.post(path, json=...)``."""
    pytest.importorskip("fastapi", reason="the server needs fastapi")
    pytest.importorskip("httpx", reason="asking it in this process needs httpx")
    from fastapi.testclient import TestClient

    from hybrid.serve.app import make_app

    with TestClient(make_app(Served(model, "demo"), engine, tell=told.append)) as client:
        yield client


@pytest.fixture
def listening() -> Callable[..., Any]:
    """Call it with an application; while it is open that answers on the URL that it gives."""
    uvicorn = pytest.importorskip("uvicorn", reason="the server needs uvicorn")
    from hybrid.serve.server import listen, open_address

    @contextmanager
    def answer(app: Any) -> Iterator[str]:
        opened = open_address("127.0.0.1", 0)
        url = listen(opened)
        server = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_level="error"))
        thread = threading.Thread(target=server.run, args=([opened],), daemon=True)
        thread.start()
        try:
            yield url
        finally:
            server.should_exit = server.force_exit = True
            thread.join(10)

    return answer
