"""Models on the Hugging Face hub: their names, what is needed of them, and how it comes here.

Everything goes through ``huggingface_hub``: its cache, its token, proxies, ``HF_ENDPOINT`` and
``HF_HUB_OFFLINE``. It is imported when a name of the hub is used.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hybrid.errors import CheckpointError, UsageError, first_line
from hybrid.gguf.header import ENDING, GgufHeader, joined, read_head
from hybrid.paths import require_room

CONFIG = "config.json"
_INDEX = "model.safetensors.index.json"
_BESIDE = (".json", ".jinja", ".txt", ".model", ".tiktoken")
"""How the names of files end that a model needs beside its weights."""
_OTHER_WEIGHTS = (".gguf", ".bin", ".pth", ".pt", ".h5", ".msgpack", ".onnx", ".ckpt")
_NAME = re.compile(
    r"""(?:(?:https?:/+)?(?P<host>[\w.-]+\.[a-z]+|127\.0\.0\.1|localhost)(?::\d+)?/)?
    (?P<repo>\w[\w.-]*/\w[\w.-]*)
    (?:/tree/(?P<tree>[^@\s]+)|@(?P<revision>[^:\s]+))?
    (?::(?P<quant>\w+))?/?""",
    re.VERBOSE,
)
#: What GGUF files of the same repository are that are no model of text.
_BESIDE_GGUF = re.compile(r"(?i)mmproj|imatrix|^mtp-")
_PART = re.compile(r"-\d{5}-of-(\d{5})$")
_QUANT = re.compile(r"(?i)(?:^|[-._])((?:UD-)?I?Q\d\w*|TQ\d\w*|BF16|FP?16|FP?32|MXFP4\w*|NVFP4)")
_USUAL = "Q4_K_M"
"""Of several files the one that is taken unless another is asked for, as llama.cpp does."""
_HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")


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


@dataclass(frozen=True)
class Manifest:
    """What of a repository a model needs.

    Attributes
    ----------
    name
        Which.
    commit
        The state that its newest, or its revision, stands for now.
    files
        Sizes in bytes by name.
    missing_bytes
        What of it is not on this machine yet.
    """

    name: HubName
    commit: str
    files: dict[str, int]
    missing_bytes: int

    @property
    def nbytes(self) -> int:
        return sum(self.files.values())


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


def config_of(name: HubName) -> dict[str, Any]:
    """Fetch a repository's ``config.json`` and nothing else.

    Where the hub cannot be reached, that of an earlier download.

    Raises
    ------
    CheckpointError
        When there is no such repository or file, nobody may read it, or it is no JSON object.
    """
    import huggingface_hub

    try:
        with _in_our_words(name, CONFIG):
            _state(name)
            path = huggingface_hub.hf_hub_download(
                name.repo, CONFIG, revision=name.revision, endpoint=_endpoint()
            )
    except UnreachableError:
        kept = kept_copy(name)
        if kept is None:
            raise
        path = str(kept / CONFIG)
    return _table(Path(path), name)


def manifest(name: HubName) -> Manifest:
    """Ask the hub what of a repository a model needs: one set of weights and what is beside it.

    Raises
    ------
    CheckpointError
        When there is no such repository, nobody may read it, it cannot be reached, or it has no
        safetensors weights.
    """
    with _in_our_words(name, CONFIG):
        import huggingface_hub

        info = _state(name, files_metadata=True)
        commit = str(info.sha)
        there = {file.rfilename: int(file.size or 0) for file in info.siblings or ()}
        name, gguf = _chosen(name, there)
        if gguf:
            wanted = gguf
        else:
            wanted = [file for file in there if "/" not in file and file.endswith(_BESIDE)]
            wanted += [file for file in there if file.startswith("additional_chat_templates/")]
            wanted += _weights(name, commit, there)
        have = [
            file
            for file in wanted
            if isinstance(
                huggingface_hub.try_to_load_from_cache(name.repo, file, revision=commit), str
            )
        ]
    files = {file: there[file] for file in (wanted if gguf else sorted(wanted))}
    return Manifest(name, commit, files, sum(files.values()) - sum(there[file] for file in have))


def download(wanted: Manifest) -> Path:
    """Bring what a model needs into the hub's cache; goes on where an earlier download stopped.

    Raises
    ------
    DiskSpaceError
        Before anything is fetched, when it has too little room.
    CheckpointError
        When the connection ends, or the repository may not be read.
    """
    from huggingface_hub import constants

    require_room(
        Path(constants.HF_HUB_CACHE),
        wanted.missing_bytes,
        f"the download of {wanted.name} takes {{}}",
        hint="free some space, or set HF_HOME to a folder on another disk",
    )
    with _in_our_words(wanted.name, "its files"):
        import huggingface_hub

        folder = Path(
            huggingface_hub.snapshot_download(
                wanted.name.repo,
                revision=wanted.name.revision,  # by its name, which is found offline, too
                allow_patterns=list(wanted.files),
                endpoint=_endpoint(),
            )
        )
        return folder if wanted.name.quant is None else folder / next(iter(wanted.files))


def header_of(name: HubName) -> GgufHeader:
    """Fetch the beginnings of a repository's GGUF files, as far as their headers reach.

    Raises
    ------
    CheckpointError, UnsupportedModelError
        When there is no such repository or file, nobody may read it, or it is damaged.
    """
    with _in_our_words(name, "its files"):
        info = _state(name, files_metadata=True)
        there = {file.rfilename: int(file.size or 0) for file in info.siblings or ()}
        name, files = _chosen(name, there)
        if not files:
            raise CheckpointError(
                f"{name} has no GGUF files", hint="name the repository without what follows :"
            )
        parts = []
        for file in files:
            fetch = functools.partial(_first_bytes, name, str(info.sha), file)
            parts.append(read_head(Path(name.repo) / file, there[file], fetch))
    return parts[0] if len(parts) == 1 else joined(parts)


def _first_bytes(name: HubName, commit: str, file: str, size: int) -> bytes:
    """Fetch so many first bytes of a file."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        build_hf_headers,
        get_session,
        hf_raise_for_status,
    )

    url = hf_hub_url(name.repo, file, revision=commit, endpoint=_endpoint())
    asked = {**build_hf_headers(), "Range": f"bytes=0-{size - 1}"}
    answer = get_session().get(url, headers=asked, follow_redirects=True)
    hf_raise_for_status(answer)
    return bytes(answer.content[:size])


@dataclass(frozen=True)
class Downloaded:
    """A repository of models in the hub's cache, whoever downloaded it."""

    repo: str
    path: Path
    nbytes: int
    used_s: float


def downloaded() -> list[Downloaded]:
    """Return the repositories in the hub's cache that have weights, last used first."""
    import huggingface_hub

    try:
        info = huggingface_hub.scan_cache_dir()
    except huggingface_hub.CacheNotFound:
        return []
    found = [
        Downloaded(repo.repo_id, repo.repo_path, repo.size_on_disk, repo.last_accessed)
        for repo in info.repos
        if repo.repo_type == "model"
        and any(
            file.file_name.endswith((".safetensors", ENDING))
            for revision in repo.revisions
            for file in revision.files
        )
    ]
    return sorted(found, key=lambda each: -each.used_s)


def remove_download(wanted: Downloaded) -> None:
    """Remove a repository from the hub's cache.

    Raises
    ------
    UsageError
        When it cannot be removed.
    """
    import huggingface_hub

    info = huggingface_hub.scan_cache_dir()
    commits = [
        revision.commit_hash
        for repo in info.repos
        if repo.repo_path == wanted.path
        for revision in repo.revisions
    ]
    try:
        info.delete_revisions(*commits).execute()
    except OSError as error:
        raise UsageError(
            f"{wanted.path} cannot be removed: {error.strerror or error}",
            hint="check who may write in that folder",
        ) from error


def directory_of(name: HubName) -> Path:
    """Return a repository's files on this machine, downloaded if need be.

    Where the hub cannot be reached, those of an earlier download.

    Raises
    ------
    CheckpointError, DiskSpaceError
        As :func:`manifest` and :func:`download`.
    """
    try:
        return download(manifest(name))
    except UnreachableError:
        kept = kept_copy(name)
        if kept is None:
            raise
        return kept


def kept_copy(name: HubName) -> Path | None:
    """Return what an earlier download left of a repository; None where there is nothing."""
    import huggingface_hub

    found = huggingface_hub.try_to_load_from_cache(name.repo, CONFIG, revision=name.revision)
    if name.quant is None and isinstance(found, str):
        return Path(found).parent
    return _kept_gguf(name)


def _kept_gguf(name: HubName) -> Path | None:
    """Return the first GGUF file that an earlier download left of a name, if all are there."""
    from huggingface_hub import constants

    home = Path(constants.HF_HUB_CACHE) / f"models--{name.repo.replace('/', '--')}"
    reference = home / "refs" / (name.revision or "main")
    commit = reference.read_text().strip() if reference.is_file() else str(name.revision)
    folder = home / "snapshots" / commit
    there = {path.relative_to(folder).as_posix(): 0 for path in folder.rglob(f"*{ENDING}")}
    try:
        _, files = _chosen(name, there)
    except CheckpointError:
        return None
    return folder / files[0] if files else None


def _chosen(name: HubName, there: dict[str, int]) -> tuple[HubName, list[str]]:
    """Return the GGUF files that a name means, and the name that says so; none for safetensors.

    Raises
    ------
    CheckpointError
        When it could be none or several.
    """
    models: dict[str, list[str]] = {}
    for file in sorted(there):
        stem = Path(file).name.removesuffix(ENDING)
        if file.endswith(ENDING) and not _BESIDE_GGUF.search(stem):
            models.setdefault(_PART.sub("", stem), []).append(file)
    safetensors = any(file.endswith(".safetensors") for file in there)
    if name.quant is None and (safetensors or not models):
        return name, []
    quants = {_quant(stem): files for stem, files in models.items()}
    if name.quant is not None:
        wanted = name.quant
    else:
        wanted = _USUAL if _USUAL in quants else next(iter(quants)) if len(quants) == 1 else ""
    files = next((files for quant, files in quants.items() if quant == wanted.upper()), [])
    count = _PART.search(Path(files[0]).stem) if files else None
    if count is not None and len(files) != int(count[1]):
        raise CheckpointError(
            f"{name} has {len(files)} of the {int(count[1])} files of {wanted}",
            hint="ask its publisher, or choose another",
        )
    if not files:
        raise CheckpointError(
            f"{name} has no GGUF file of " + (wanted or "a usual size"),
            hint=f"choose one of: {', '.join(f'{name.repo}:{quant}' for quant in sorted(quants))}"
            if quants
            else "name a repository of GGUF files, or leave out what follows :",
        )
    return replace(name, quant=wanted.upper()), files


def _quant(stem: str) -> str:
    """Return what a file's name says its weights are: the last part that looks like a type."""
    found: list[str] = _QUANT.findall(stem)
    return found[-1].upper() if found else stem


class UnreachableError(CheckpointError):
    """The hub does not answer, or may not be asked."""


def _state(name: HubName, **asked: Any) -> Any:
    """Ask what a name stands for now: the first question, which fails quickly."""
    from huggingface_hub import HfApi

    return HfApi(endpoint=_endpoint()).model_info(name.repo, revision=name.revision, **asked)


def _weights(name: HubName, commit: str, there: dict[str, int]) -> list[str]:
    """Return the weight files of one model: what the index names, or the only file."""
    import huggingface_hub

    if _INDEX in there:
        path = huggingface_hub.hf_hub_download(
            name.repo, _INDEX, revision=commit, endpoint=_endpoint()
        )
        parts = _table(Path(path), name).get("weight_map")
        named = sorted(set(map(str, parts.values()))) if isinstance(parts, dict) else []
        lost = [file for file in named if file not in there]
        if lost or not named:
            raise CheckpointError(
                f"{name} lacks {len(lost)} of the {len(named)} weight files that {_INDEX} names"
                + (f": {', '.join(lost[:3])}" if lost else ""),
                hint="ask its publisher, or choose another revision with ORG/NAME@REVISION",
            )
        return named
    if "model.safetensors" in there:
        return ["model.safetensors"]
    found = [file for file in there if "/" not in file and file.endswith(".safetensors")]
    if found:
        return found
    other = sorted({Path(file).suffix for file in there if file.endswith(_OTHER_WEIGHTS)})
    raise CheckpointError(
        f"{name} has no safetensors weights"
        + (f", it has {', '.join(other)} files" if other else ""),
        hint="name the repository that these were made from",
    )


def _table(path: Path, name: HubName) -> dict[str, Any]:
    try:
        data = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path.name} of {name} is no JSON: {first_line(error)}",
            hint="choose another revision with ORG/NAME@REVISION",
        ) from error
    if not isinstance(data, dict):
        raise CheckpointError(
            f"{path.name} of {name} is no JSON object",
            hint="choose another revision with ORG/NAME@REVISION",
        )
    return data


def _endpoint() -> str | None:
    return os.environ.get("HF_ENDPOINT") or None


def _hosts() -> tuple[str, ...]:
    own = re.sub(r"^https?://|[:/].*$", "", (_endpoint() or "").rstrip("/"))
    return (*_HOSTS, own) if own else _HOSTS


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # such as a name that is too long
        return False


@contextmanager
def _in_our_words(name: HubName, what: str) -> Iterator[None]:
    """Say in one line what the hub, or the way to it, refuses."""
    from huggingface_hub.errors import (  # type: ignore[attr-defined]
        EntryNotFoundError,
        HfHubHTTPError,
        HTTPError,
    )

    try:
        yield
    except (EntryNotFoundError, HfHubHTTPError, HTTPError, ConnectionError) as error:
        cause = error.__cause__  # a file that is not here hides why it could not be fetched
        raise _told(name, what, cause if isinstance(cause, HfHubHTTPError) else error) from error


def _told(name: HubName, what: str, error: BaseException) -> CheckpointError:
    from huggingface_hub import constants, errors

    if isinstance(error, errors.GatedRepoError):
        return CheckpointError(
            f"{name} is gated: its publisher asks for an agreement first",
            hint=f"accept it at https://huggingface.co/{name.repo}, then 'hf auth login'",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return CheckpointError(
            f"{name.repo} has no revision {name.revision!r}",
            hint="leave @REVISION out for the newest",
        )
    here = f"there is no directory {name.repo!r} here"
    if isinstance(error, errors.RepositoryNotFoundError):
        return CheckpointError(
            f"{here} and no such repository on the hub, or it is private",
            hint="check the name; 'hf auth login' for one that is private",
        )
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        if status == 404:
            return CheckpointError(
                f"{name} has no {what}", hint="name a repository of a Hugging Face model"
            )
        if status in (401, 403):
            return CheckpointError(
                f"{name} may not be read ({status})", hint="'hf auth login' with a token that may"
            )
        return UnreachableError(
            f"the hub answers {status} when asked for {name}",
            hint="try again later; what was downloaded is kept",
        )
    if constants.HF_HUB_OFFLINE:
        return UnreachableError(
            f"{here}, and HF_HUB_OFFLINE forbids to look for it on the hub",
            hint="unset HF_HUB_OFFLINE, or give the path of a model's directory",
        )
    return UnreachableError(
        f"{here}, and the hub cannot be reached: {first_line(error)}",
        hint="check the connection, or give the path of a model's directory",
    )
