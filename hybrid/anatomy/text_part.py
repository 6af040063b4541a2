"""Tells a composite model's language model from its towers for images, sound and the like."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from hybrid.errors import UnsupportedModelError
from hybrid.grafts import put_module


class LeftOut(nn.Module):
    """Stands where a tower was."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self._path = path

    def forward(self, *_: Any, **__: Any) -> Any:
        """Refuse what only the tower could compute."""
        raise UnsupportedModelError(
            f"{self._path} was left out: models run with their text only",
            hint="give text, or load the original checkpoint with transformers for the rest",
        )


def leave_towers_out(model: Any) -> list[str]:
    """Take everything but the language model out of a composite model; return what that was."""
    paths = list(_towers(model))
    for path in paths:
        parent, _, name = path.rpartition(".")
        put_module(model.get_submodule(parent), name, LeftOut(path))
    return paths


def _towers(model: Any) -> Iterator[str]:
    """The outermost modules that are neither of the language model nor around it."""
    if model.config.get_text_config() is model.config:
        return
    text = [model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings()]
    inside = {id(part) for module in text if module is not None for part in module.modules()}
    found: list[str] = []
    for path, module in model.named_modules():
        around = any(id(part) in inside for part in module.modules())
        if path and not around and not path.startswith(tuple(f"{tower}." for tower in found)):
            if any(True for _ in module.parameters()):
                found.append(path)
    yield from found
