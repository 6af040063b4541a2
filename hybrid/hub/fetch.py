"""What of a repository a model needs, and how it comes here.

Everything goes through ``huggingface_hub``: its cache, its token, proxies, ``HF_ENDPOINT`` and
``HF_HUB_OFFLINE``. It is imported when a name of the hub is used.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybrid.errors import CheckpointError, first_line
from hybrid.gguf.header import GgufHeader, joined, read_head
from hybrid.hub.gguf_files import chosen
from hybrid.hub.kept import kept_copy
from hybrid.hub.names import HubName, endpoint
from hybrid.hub.refusals import UnreachableError, in_our_words
from hybrid.paths import require_room

CONFIG = "config.json"
_INDEX = "model.safetensors.index.json"
_BESIDE = (".json", ".jinja", ".txt", ".model", ".tiktoken")
"""How the names of files end that a model needs beside its weights."""
_OTHER_WEIGHTS = (".gguf", ".bin", ".pth", ".pt", ".h5", ".msgpack", ".onnx", ".ckpt")


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
        with in_our_words(name, CONFIG):
            _state(name)
            path = huggingface_hub.hf_hub_download(
                name.repo, CONFIG, revision=name.revision, endpoint=endpoint()
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
    with in_our_words(name, CONFIG):
        import huggingface_hub

        info = _state(name, files_metadata=True)
        commit = str(info.sha)
        there = {file.rfilename: int(file.size or 0) for file in info.siblings or ()}
        name, gguf = chosen(name, there)
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
    with in_our_words(wanted.name, "its files"):
        import huggingface_hub

        folder = Path(
            huggingface_hub.snapshot_download(
                wanted.name.repo,
                revision=wanted.name.revision,  # by its name, which is found offline, too
                allow_patterns=list(wanted.files),
                endpoint=endpoint(),
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
    with in_our_words(name, "its files"):
        info = _state(name, files_metadata=True)
        there = {file.rfilename: int(file.size or 0) for file in info.siblings or ()}
        name, files = chosen(name, there)
        if not files:
            raise CheckpointError(
                f"{name} has no GGUF files", hint="name the repository without what follows :"
            )
        parts = []
        for file in files:
            fetch = functools.partial(first_bytes, name, str(info.sha), file)
            parts.append(read_head(Path(name.repo) / file, there[file], fetch))
    return parts[0] if len(parts) == 1 else joined(parts)


def first_bytes(name: HubName, commit: str, file: str, size: int) -> bytes:
    """Fetch so many first bytes of a file.

    Raises
    ------
    CheckpointError
        When there is no such file, nobody may read it, or the hub cannot be reached.
    """
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        build_hf_headers,
        get_session,
        hf_raise_for_status,
    )

    with in_our_words(name, file):
        url = hf_hub_url(name.repo, file, revision=commit, endpoint=endpoint())
        asked = {**build_hf_headers(), "Range": f"bytes=0-{size - 1}"}
        answer = get_session().get(url, headers=asked, follow_redirects=True)
        hf_raise_for_status(answer)
    return bytes(answer.content[:size])


def fetch_file(name: HubName, commit: str, file: str, folder: Path) -> Path:
    """Bring one file into a folder of its own, not the cache; goes on where it stopped.

    Raises
    ------
    CheckpointError
        When the connection ends, or the file may not be read.
    """
    with in_our_words(name, file):
        import huggingface_hub

        return Path(
            huggingface_hub.hf_hub_download(
                name.repo, file, revision=commit, local_dir=folder, endpoint=endpoint()
            )
        )


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


def _state(name: HubName, **asked: Any) -> Any:
    """Ask what a name stands for now: the first question, which fails quickly."""
    from huggingface_hub import HfApi

    return HfApi(endpoint=endpoint()).model_info(name.repo, revision=name.revision, **asked)


def _weights(name: HubName, commit: str, there: dict[str, int]) -> list[str]:
    """Return the weight files of one model: what the index names, or the only file."""
    import huggingface_hub

    if _INDEX in there:
        path = huggingface_hub.hf_hub_download(
            name.repo, _INDEX, revision=commit, endpoint=endpoint()
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
