"""What earlier downloads left in the hub's cache."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hybrid.errors import CheckpointError, UsageError
from hybrid.gguf.header import ENDING
from hybrid.hub.gguf_files import chosen
from hybrid.hub.names import HubName, cache_folder

_CONFIG = "config.json"


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


def kept_copy(name: HubName) -> Path | None:
    """Return what an earlier download left of a repository; None where there is nothing."""
    import huggingface_hub

    found = huggingface_hub.try_to_load_from_cache(name.repo, _CONFIG, revision=name.revision)
    if name.quant is None and isinstance(found, str):
        return Path(found).parent
    return _kept_gguf(name)


def _kept_gguf(name: HubName) -> Path | None:
    """Return the first GGUF file that an earlier download left of a name, if all are there."""
    from huggingface_hub import constants

    home = Path(constants.HF_HUB_CACHE) / cache_folder(name.repo)
    reference = home / "refs" / (name.revision or "main")
    commit = reference.read_text().strip() if reference.is_file() else str(name.revision)
    folder = home / "snapshots" / commit
    there = {path.relative_to(folder).as_posix(): 0 for path in folder.rglob(f"*{ENDING}")}
    try:
        _, files = chosen(name, there)
    except CheckpointError:
        return None
    return folder / files[0] if files else None
