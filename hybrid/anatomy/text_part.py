"""Tells a composite model's language model from its towers for images, sound and the like."""

from __future__ import annotations

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


def leave_towers_out(model: Any) -> None:
    """Take everything but the language model out of a composite model."""
    for path in _towers(model):
        parent, _, name = path.rpartition(".")
        put_module(model.get_submodule(parent), name, LeftOut(path))


def _towers(model: Any) -> list[str]:
    """The outermost modules that are neither of the language model nor around it."""
    if model.config.get_text_config() is model.config:
        return []
    text = [model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings()]
    inside = {id(part) for module in text if module is not None for part in module.modules()}
    found: list[str] = []
    for path, module in model.named_modules():
        around = any(id(part) in inside for part in module.modules())
        within = path.startswith(tuple(f"{tower}." for tower in found))
        if path and not around and not within and any(True for _ in module.parameters()):
            found.append(path)
    return found
