"""Names of the hub as users write them, and how its cache on this machine writes them.

Loads no client.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

_NAME = re.compile(
    r"""(?:(?:https?:/+)?(?P<host>[\w.-]+\.[a-z]+|127\.0\.0\.1|localhost)(?::\d+)?/)?
    (?P<repo>\w[\w.-]*/\w[\w.-]*)
    (?:/tree/(?P<tree>[^@\s]+)|@(?P<revision>[^:\s]+))?
    (?::(?P<quant>\w+))?/?""",
    re.VERBOSE,
)
_HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")
#: How the cache calls the folder of a repository of models.
_FOLDER = "models--"


@dataclass(frozen=True)
class HubName:
    """A repository of the hub, and which state of it; None is its newest."""

    repo: str
    revision: str | None = None
    quant: str | None = None
    """Which of its GGUF files, as in ``Q4_K_M``; None is safetensors, or the one that suits."""

    def __str__(self) -> str:
        at = "" if self.revision is None else f"@{self.revision}"
        return f"{self.repo}{at}" + ("" if self.quant is None else f":{self.quant}")


def hub_name(text: str | os.PathLike[str]) -> HubName | None:
    """Read ``ORG/NAME``, ``ORG/NAME@revision``, ``ORG/NAME:Q4_K_M`` or an address of the hub.

    None where it is a place on this machine, or no such name.
    """
    text = os.fspath(text)
    if text.startswith((".", "~", os.sep)) or _exists(Path(text)):
        return None
    found = _NAME.fullmatch(text)
    if found is None or (found["host"] is not None and found["host"] not in _hosts()):
        return None
    return HubName(found["repo"], found["revision"] or found["tree"], found["quant"])


def cache_folder(repo: str) -> str:
    """Return what the hub's cache calls the folder of a repository."""
    return _FOLDER + repo.replace("/", "--")


def repo_of(path: Path) -> str | None:
    """Return the repository that a path into the hub's cache belongs to; None of any other."""
    stored = [part for part in path.parts if part.startswith(_FOLDER)]
    return "/".join(stored[-1].split("--")[1:]) if stored else None


def endpoint() -> str | None:
    """Return the address of the hub where the environment names one."""
    return os.environ.get("HF_ENDPOINT") or None


def _hosts() -> tuple[str, ...]:
    own = re.sub(r"^https?://|[:/].*$", "", (endpoint() or "").rstrip("/"))
    return (*_HOSTS, own) if own else _HOSTS


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # such as a name that is too long
        return False
