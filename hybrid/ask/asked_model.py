"""Which model a calibration or a prediction is about: its settings, its counts, its formats."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybrid.ask.formats import DEFAULT_EXPERTS, QUANT_METHOD, check_formats
from hybrid.ask.names import resolve
from hybrid.demo import demo_path
from hybrid.errors import UsageError
from planner.describe.checked_table import read_table
from planner.describe.families import from_hf_config, settings_of
from planner.describe.model import ModelSpec

_FLOATS = {"bfloat16": "bf16", "float16": "f32", "float32": "f32"}
"""What the kernels keep weights of a checkpoint's type as, which has to hold each of them."""


@dataclass(frozen=True)
class Subject:
    """A model to measure.

    Attributes
    ----------
    model, settings
        Its counts, and the ``config.json`` they were taken from.
    experts, dense
        Weight formats.
    """

    model: ModelSpec
    settings: dict[str, Any]
    experts: str
    dense: str


def subject(name: str | Path, experts: str | None = None, dense: str | None = None) -> Subject:
    """Find a model by a directory, a ``config.json``, a description or a shipped name.

    Parameters
    ----------
    name
        Which; ``"demo"`` is the model that ships.
    experts, dense
        Formats to measure it in. A converted directory has its own.

    Raises
    ------
    UsageError, PlannerError
        When there is no such model, it cannot be read, or a format is unknown or another one.
    """
    check_formats(experts, dense)
    path = demo_path() if name == "demo" else Path(name)
    path = path / "config.json" if path.is_dir() else path
    if path.is_file():
        data = read_table(path, "model description")
        called = path.parent.resolve().name if path.name == "config.json" else path.stem
        called = "demo" if name == "demo" else called
    elif path.suffix in (".json", ".toml"):
        raise UsageError(f"there is no file {path}", hint="check the path")
    else:
        data, called = resolve(str(name), "models"), str(name)
    settings = settings_of(data) if isinstance(data.get("config"), Mapping) else dict(data)
    called = str(data.get("name") or settings.get("_name_or_path") or called)
    stored = settings.get("quantization_config")
    stored = stored if isinstance(stored, Mapping) else {}
    if stored.get("quant_method") == QUANT_METHOD:
        for what, asked in (("experts", experts), ("dense", dense)):
            if asked not in (None, stored.get(what)):
                raise UsageError(
                    f"{name} is converted with {what} {stored.get(what)}, not {asked}",
                    hint="leave the format out, or name the original checkpoint",
                )
        experts, dense = stored.get("experts"), stored.get("dense")
    return Subject(
        model=from_hf_config(settings, called),
        settings=settings,
        experts=experts or DEFAULT_EXPERTS,
        dense=dense or float_format(settings.get("dtype") or settings.get("torch_dtype")),
    )


def float_format(dtype: Any) -> str:
    """Return the planner's name of a checkpoint's weight type; bfloat16 when it has none."""
    return _FLOATS.get(str(dtype).removeprefix("torch."), "bf16")
