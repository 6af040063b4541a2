"""A GGUF file as a checkpoint to convert, beside directories of safetensors.

Loads neither torch nor transformers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from hybrid.errors import CheckpointError
from hybrid.gguf.architectures import Architecture
from hybrid.gguf.config import check_kind, config_of
from hybrid.gguf.header import GgufHeader, is_gguf, models_in, read_gguf
from hybrid.weights.checks import Check, Checkpoint
from hybrid.weights.source_files import TensorInfo, few

#: Pages that tell one set of weights from another.
_SAMPLES = 64
_PAGE_BYTES = 4096


class GgufCheckpoint(Checkpoint):
    """The files of a GGUF model, of which each part is read when it is first asked for."""

    @cached_property
    def header(self) -> GgufHeader:
        """What its files say of themselves."""
        return read_gguf(self.path)

    @property
    def architecture(self) -> Architecture:
        """What it is of transformers'."""
        return check_kind(self.header)

    @cached_property
    def config(self) -> dict[str, Any]:
        """The ``config.json`` that its metadata stand for."""
        return config_of(self.header)

    @cached_property
    def files(self) -> list[Path]:
        """Its files, in order."""
        return list(self.header.files)

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """None: what a GGUF file holds is no tensor of safetensors."""
        return {}

    @property
    def name(self) -> str:
        """What it is called: the file, without the number of the part."""
        return self.header.name

    @property
    def has_weights(self) -> bool:
        """Whether there is any file of weights, whole or not."""
        return True

    @property
    def has_tokenizer(self) -> bool:
        """Whether it has a vocabulary."""
        return "tokenizer.ggml.tokens" in self.header.metadata

    @property
    def checks(self) -> tuple[Check, ...]:
        """What can be known of it before work starts."""
        return (_check_header,)

    def identity(self) -> str:
        """Return a digest of the headers, and of pages spread over each file."""
        digest = hashlib.sha256()
        for path, start in zip(self.header.files, self.header.header_bytes, strict=True):
            with path.open("rb") as file:
                size = file.seek(0, 2)
                digest.update(f"{path.name}:{size}:".encode())
                file.seek(0)
                digest.update(file.read(start))
                for at in range(start, size, max(_PAGE_BYTES, (size - start) // _SAMPLES)):
                    file.seek(at)
                    digest.update(file.read(_PAGE_BYTES))
        return digest.hexdigest()


def _check_header(checkpoint: Checkpoint) -> Iterator[str]:
    """The header is whole, and of a model that is read."""
    checkpoint.config  # noqa: B018
    yield from ()


def checkpoint_at(path: Path) -> Checkpoint:
    """Return the checkpoint that lies at a place: a GGUF file, a folder of one, or a directory.

    Raises
    ------
    CheckpointError
        When a folder holds several GGUF models and nothing else.
    """
    if is_gguf(path):
        return GgufCheckpoint(path)
    if path.is_dir() and not (path / "config.json").exists():
        models = models_in(path)
        if len(models) > 1:
            raise CheckpointError(
                f"{path} holds {len(models)} GGUF models: {few(one.name for one in models)}",
                hint="name the file of one of them",
            )
        if models:
            return GgufCheckpoint(models[0])
    return Checkpoint(path)
