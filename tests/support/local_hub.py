"""A hub of models on this machine, for the real client: what it serves, and how it may fail."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest.mock import Mock
from urllib.parse import unquote, urlsplit

import pytest

COMMIT = hashlib.sha1(b"newest").hexdigest()


@dataclass
class Hub:
    """Repositories by name, each with files by name, in one state.

    Attributes
    ----------
    files
        Content by repository and file.
    refusals
        Status and error code (``GatedRepo`` ...) by repository.
    broken
        Files whose connection ends in the middle, once.
    sent
        Names of the files whose content was asked for.
    url
        Its address.
    """

    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refusals: dict[str, tuple[int, str]] = field(default_factory=dict)
    broken: set[str] = field(default_factory=set)
    sent: list[str] = field(default_factory=list)
    url: str = ""

    def publish(self, name: str, directory: Path) -> None:
        """Serve the files of a directory."""
        self.files[name] = {
            path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()
        }


@contextmanager
def serving(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[Hub]:
    """Run a hub that this process, with an empty ``cache``, takes for the only one."""
    hub = Hub()

    class Handler(_Handler):
        served = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    # The client waits longer and longer before it asks again.
    monkeypatch.setattr("huggingface_hub.utils._http.time", Mock(wraps=time, sleep=Mock()))
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    served: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            self._tell("/".join(parts[2:4]), parts[4:])
        elif parts[0] == "cdn":
            self._send("/".join(parts[1:3]), "/".join(parts[3:]))
        else:
            self._locate("/".join(parts[:2]), parts[3], "/".join(parts[4:]))

    def _tell(self, repo: str, rest: list[str]) -> None:
        if self._refused(repo, rest[1] if len(rest) > 1 else "main"):
            return
        files = self.served.files[repo]
        if rest[:1] == ["tree"]:
            answer: Any = [
                {"type": "file", "path": name, "size": len(data), "oid": _digest(data)}
                for name, data in files.items()
            ]
        else:
            siblings = [{"rfilename": name, "size": len(data)} for name, data in files.items()]
            answer = {"id": repo, "modelId": repo, "sha": COMMIT, "siblings": siblings}
        self._reply(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _locate(self, repo: str, revision: str, name: str) -> None:
        if self._refused(repo, revision):
            return
        data = self.served.files[repo].get(name)
        if data is None:
            self._reply(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        if not name.endswith(".safetensors"):
            self._send(repo, name)
            return
        elsewhere = self.served.url.replace("127.0.0.1", "localhost")
        headers = {
            "Location": f"{elsewhere}/cdn/{repo}/{name}",
            "X-Repo-Commit": COMMIT,
            "X-Linked-Etag": f'"{_digest(data)}"',
            "X-Linked-Size": str(len(data)),
        }
        self._reply(302, b"", headers)

    def _send(self, repo: str, name: str) -> None:
        data = self.served.files[repo][name]
        if self.command == "GET":
            self.served.sent.append(name)
        asked = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")
        begin, end = int(asked[0]), int(asked[1]) + 1 if asked[1] else len(data)
        part = data[begin:end]
        headers = {
            "X-Repo-Commit": COMMIT,
            "ETag": f'"{_digest(data)}"',
            "Content-Length": str(len(part)),
        }
        if begin:
            headers["Content-Range"] = f"bytes {begin}-{len(data) - 1}/{len(data)}"
        if name in self.served.broken:
            self.served.broken.discard(name)
            part = part[: len(part) // 2]
            self.close_connection = True
        self._reply(206 if begin else 200, part, headers)

    def _refused(self, repo: str, revision: str) -> bool:
        status, code = self.served.refusals.get(repo, (0, ""))
        if not status and repo not in self.served.files:
            status, code = 404, "RepoNotFound"
        if not status and revision not in ("main", COMMIT):
            status, code = 404, "RevisionNotFound"
        if status:
            self._reply(status, b"", {"X-Error-Code": code} if code else {})
        return bool(status)

    def _reply(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
