"""Copies what lies beside the weights: tokenizer, templates, generation settings, licence."""

from __future__ import annotations

import filecmp
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from hybrid.errors import UsageError
from hybrid.gguf.tokenizer import generation_settings, tokenizer_files
from hybrid.weights.checks import Checkpoint
from hybrid.weights.gguf_checkpoint import GgufCheckpoint
from hybrid.weights.source_files import unreadable

#: Files that are weights in some other form, or that a converted directory writes itself.
_NOT_COPIED = (
    *(".safetensors", ".index.json", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"),
    *(".ot", ".lock", ".incomplete", ".part"),
)
#: What a converted directory has of its own under the name of a side file.
_OWN = ("config.json", "experts.json", "conversion.jsonl")
_TEMPLATES = "additional_chat_templates"


def write_side_files(checkpoint: Checkpoint, dst: Path) -> None:
    """Write all that a converted directory has beside weights: copies, or what metadata say.

    Raises
    ------
    CheckpointError, UnsupportedModelError
        When something cannot be read.
    """
    if not isinstance(checkpoint, GgufCheckpoint):
        copy_side_files(checkpoint.path, dst)
        return
    files = dict(tokenizer_files(checkpoint.header)) if checkpoint.has_tokenizer else {}
    files["generation_config.json"] = generation_settings(checkpoint.header)
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
        (dst / name).write_text(text, encoding="utf-8", errors="surrogateescape")


def copy_side_files(src: Path, dst: Path) -> None:
    """Copy all files of a checkpoint that are not weights.

    Raises
    ------
    CheckpointError
        When one cannot be read.
    """
    for name in _side_files(src):
        _copy(src / name, dst / name)


def refresh_side_files(src: Path, copy: Path) -> None:
    """Bring the side files of a converted copy up to those that its checkpoint has now.

    Raises
    ------
    CheckpointError
        When one cannot be read.
    UsageError
        When they differ and the copy cannot be written.
    """
    wanted, there = list(_side_files(src)), list(_side_files(copy))
    stale = [n for n in wanted if n not in there or not filecmp.cmp(src / n, copy / n, False)]
    gone = [name for name in there if name not in wanted]
    try:
        for name in stale:
            aside = copy / f"{name}.{os.getpid()}.part"
            _copy(src / name, aside)
            aside.replace(copy / name)
        for name in gone:
            (copy / name).unlink(missing_ok=True)
    except OSError as error:
        raise UsageError(
            f"{src / (stale + gone)[0]} has changed, and its copy in {copy} cannot be: "
            f"{error.strerror or error}",
            hint="set HYBRID_CACHE to a folder that can be written",
        ) from error


def _side_files(folder: Path) -> Iterator[str]:
    """Yield the files that are not weights, by their path in the folder."""
    for path in sorted(folder.iterdir()):
        if path.name == _TEMPLATES and path.is_dir():
            yield from (f"{_TEMPLATES}/{inner.name}" for inner in sorted(path.iterdir()))
        elif path.is_file() and not _left(path.name):
            yield path.name


def _left(name: str) -> bool:
    return name.startswith(".") or name.endswith(_NOT_COPIED) or name in _OWN


def _copy(src: Path, dst: Path) -> None:
    dst.parent.mkdir(exist_ok=True)
    try:
        shutil.copyfile(src, dst)
    except PermissionError as error:
        raise unreadable(src, error) from error
