"""Opens the address, answers on it until told to end, and ends in order."""

from __future__ import annotations

import errno
import ipaddress
import logging
import math
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from hybrid.errors import UsageError
from hybrid.serve.engine import Engine

_PACKAGES = ("fastapi", "uvicorn")
_BACKLOG = 128
_SPARE_S = 5
"""Seconds after those that a running answer has, in which all connections are closed."""


def check_installed() -> None:
    """Raise UsageError when a package that only a server needs is missing."""
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if missing:
        raise UsageError(
            f"hybrid serve needs {' and '.join(missing)}, not installed here",
            hint="pip install 'hybrid-moe[serve]'",
        )


def open_address(host: str, port: int) -> socket.socket:
    """Return a socket bound to an address, on which nobody is listened to yet.

    Raises
    ------
    UsageError
        When there is no such address here, or another program has it.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise UsageError(
            f"--host {host}: {getattr(error, 'strerror', None) or error}",
            hint="give an address of this machine, such as 127.0.0.1",
        ) from error
    family, kind, protocol, _, address = found[0]
    opened = socket.socket(family, kind, protocol)
    try:
        if sys.platform != "win32":  # there it would share an address that is in use
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind(address)
    except OSError as error:
        opened.close()
        raise _unusable(host, port, error) from error
    return opened


def listen(opened: socket.socket) -> str:
    """Let clients connect, and return the address that they connect to, as a URL.

    Raises
    ------
    UsageError
        When another program has begun to listen there meanwhile.
    """
    host, port = opened.getsockname()[:2]
    try:
        opened.listen(_BACKLOG)
    except OSError as error:
        opened.close()
        raise _unusable(host, port, error) from error
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return False


def serve(app: Any, opened: socket.socket, engine: Engine, grace_s: float) -> None:
    """Answer on a socket that listens until SIGTERM or Ctrl-C.

    The running answer then has ``grace_s`` seconds to finish; those that wait are refused. A second
    Ctrl-C ends it at once.
    """
    import uvicorn

    config = uvicorn.Config(
        app,
        lifespan="off",
        ws="none",
        proxy_headers=False,
        access_log=False,
        log_level="error",
        server_header=False,
        timeout_graceful_shutdown=math.ceil(grace_s) + _SPARE_S,
    )
    server = uvicorn.Server(config)
    logging.getLogger("asyncio").setLevel(logging.ERROR)  # it warns of readers who have gone
    ending = threading.Thread(target=engine.end, args=(grace_s,), daemon=True)
    told = server.handle_exit

    def end(number: int, frame: Any) -> None:
        if not server.should_exit:
            ending.start()
        told(number, frame)

    server.handle_exit = end
    with _signals_seen():
        server.run(sockets=[opened])
    engine.end(0)  # nothing is left to do but where all connections were closed early


@contextmanager
def _signals_seen() -> Iterator[None]:
    """Take the signals that uvicorn raises again when it has ended as what they were: told."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda *_: None) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _unusable(host: str, port: int, error: OSError) -> UsageError:
    if error.errno == errno.EADDRINUSE:
        return UsageError(
            f"port {port} of {host} is in use by another program",
            hint="end that program, or give another --port",
        )
    return UsageError(
        f"{host}:{port} cannot be opened: {error.strerror}",
        hint="give another --host or --port; ports below 1024 are the system's",
    )
