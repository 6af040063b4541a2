"""The model that a user means: what its config.json says, its counts, its formats."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any

from hybrid.ask.config_classes import as_read
from hybrid.ask.formats import DEFAULT_EXPERTS, QUANT_METHOD, check_formats
from hybrid.ask.names import directory_name, resolve, routing_laws
from hybrid.ask.published import kept_as, method_of, tables_in
from hybrid.demo import demo_path
from hybrid.errors import UsageError
from hybrid.formats.errors import FormatError
from hybrid.formats.registry import weight_bytes
from hybrid.gguf.config import config_of as config_of_gguf
from hybrid.gguf.header import is_gguf, models_in, read_gguf
from hybrid.gguf.stored import Stored
from hybrid.gguf.stored import stored as stored_weights
from hybrid.hub.fetch import config_of, header_of
from hybrid.hub.names import HubName, hub_name
from planner.describe.checked_table import read_table
from planner.describe.families import from_hf_config, from_table, settings_of
from planner.describe.model import ModelSpec
from planner.describe.routing_law import law_of
from planner.errors import SpecError

#: Modules by which the lists of a checkpoint's settings are asked about all like them.
_EXPERT, _OTHER = "model.layers.9.mlp.experts.0.up_proj", "model.layers.9.self_attn.q_proj"
_FLOATS = {"bfloat16": "bf16", "float16": "f32", "float32": "f32"}
"""What the kernels keep weights of a checkpoint's type as, which has to hold each of them."""


@dataclass(frozen=True)
class AskedModel:
    """A model that was asked for; its weights need not be there.

    Attributes
    ----------
    spec, config
        Its counts, and the ``config.json`` they were taken from.
    experts, dense
        Weight formats.
    directory
        Where it lies; None where it was named otherwise.
    dense_bytes
        Of its dense weights, where several formats make them up.
    """

    spec: ModelSpec
    config: dict[str, Any] = field(default_factory=dict)
    experts: str = DEFAULT_EXPERTS
    dense: str = "bf16"
    directory: Path | None = None
    dense_bytes: int | None = None

    def in_formats(self, experts: str | None, dense: str | None) -> AskedModel:
        """Return it with its own formats, but for those that are given."""
        own_bytes = None if dense else self.dense_bytes
        return replace(
            self,
            experts=self.experts if experts is None else experts,
            dense=self.dense if dense is None else dense,
            dense_bytes=own_bytes,
        )

    def weights(self) -> str | None:
        """Return the digest of the checkpoint a converted directory was made from; None without.

        Raises
        ------
        SpecError
            When the directory's index is damaged.
        """
        index = None if self.directory is None else self.directory / "experts.json"
        if index is None or not index.is_file():
            return None
        source = read_table(index).get("source")
        return source.get("identity") if isinstance(source, dict) else None


def find_model(
    model: str | Path | HubName | ModelSpec, experts: str | None = None, dense: str | None = None
) -> AskedModel:
    """Find a model by a directory, a ``config.json``, a description, a shipped name or the hub's.

    Of a name that does not ship, such as ``ORG/NAME``, the hub is asked for the ``config.json``.

    Parameters
    ----------
    model
        Which; ``"demo"`` is the model that ships. Or its counts.
    experts, dense
        Formats to have it in. A converted directory has its own.

    Raises
    ------
    UsageError, PlannerError, CheckpointError
        When there is no such model, it cannot be read, or a format is unknown or another one.
    """
    check_formats(experts, dense)
    if isinstance(model, ModelSpec):
        return AskedModel(model).in_formats(experts, dense)
    if not isinstance(model, str | PathLike | HubName):
        raise UsageError(
            f"model is {model!r}, neither a name nor a file nor a description",
            hint='give a name such as Qwen3-30B-A3B, a directory, or "demo"',
        )
    data, called, file = _description(model)
    described = isinstance(data.get("config"), Mapping)
    config = settings_of(data) if described else dict(data)
    called = str(data.get("name") or config.get("_name_or_path") or called)
    spec = (
        from_table({**data, "name": called, "config": as_read(config), "null": ()}, str(model))
        if described
        else spec_of(config, called)
    )
    spec = replace(spec, routing=law_of(spec.family, spec.total_params, routing_laws()))
    stored = _stored_formats(config)
    for what, asked in (("experts", experts), ("dense", dense)):
        if stored is not None and asked not in (None, stored.get(what)):
            raise UsageError(
                f"{model} is converted with {what} {stored.get(what)}, not {asked}",
                hint="leave the format out, or name the original checkpoint",
            )
    own, directory = stored or {}, _directory(model)
    plain = float_format(config.get("dtype") or config.get("torch_dtype"))
    mixed = None if file is None else (file.dense, file.dense_bytes)
    published = {} if stored is not None else _published(config, directory)
    coded = kept_as(published, _EXPERT)
    if (others := kept_as(published, _OTHER)) is not None:
        mixed = _coded(spec, config, others, plain)
    if stored is not None and directory is not None and own.get("dense") is None:
        mixed = _mixed(directory / "experts.json", spec.dense_params, plain)
    packed, nbytes = mixed or (None, None)
    found = AskedModel(
        spec=spec,
        config=config,
        experts=own.get("experts") or (file and file.experts) or coded or DEFAULT_EXPERTS,
        dense=packed or own.get("dense") or plain,
        directory=directory,
        dense_bytes=nbytes,
    )
    return found if stored is not None else found.in_formats(experts, dense)


def spec_of(config: Mapping[str, Any], called: str | None = None) -> ModelSpec:
    """Return the counts of the model of a config.json, as transformers reads it.

    Raises
    ------
    SpecError
        When it is no model of routed experts, lacks a field, or a value cannot be.
    """
    return from_hf_config(as_read(config), called)


def _mixed(index: Path, params: int, plain: str) -> tuple[str, int] | None:
    """Return the format of most dense weights of a store, and their bytes; None if all are plain.

    Raises SpecError when its index is damaged.

    Parameters
    ----------
    params
        Of all dense weights.
    plain
        The format of those that are not packed.
    """
    if not index.is_file():
        return None
    table = read_table(index)
    formats, shapes = table.get("dense_formats"), table.get("dense")
    if not isinstance(formats, dict) or not formats or not isinstance(shapes, dict):
        return None
    counts: Counter[str] = Counter()
    try:
        for path, fmt in formats.items():
            counts[fmt] += math.prod(shapes[path])
        counts[plain] += max(0, params - counts.total())
        return counts.most_common(1)[0][0], sum(weight_bytes(n, fmt) for fmt, n in counts.items())
    except (KeyError, TypeError, ValueError, FormatError) as error:
        raise SpecError(
            f"{index} is damaged ({type(error).__name__}: {error})",
            hint="convert the model again with 'hybrid convert'",
        ) from error


def _published(config: Mapping[str, Any], directory: Path | None) -> Mapping[str, Any]:
    """Return how a checkpoint's weights were quantized, as its settings say; empty where not."""
    found = [table for _, table in tables_in(config)]
    if directory is not None and (file := directory / "hf_quant_config.json").is_file():
        found.append(read_table(file).get("quantization") or {})
    return next((table for table in found if isinstance(table, Mapping) and method_of(table)), {})


def _coded(
    spec: ModelSpec, config: Mapping[str, Any], fmt: str, plain: str
) -> tuple[str, int] | None:
    """Return the format of dense weights that are quantized but for embedding and head."""
    sizes = [config.get(name) for name in ("vocab_size", "hidden_size")]
    count = 1 if config.get("tie_word_embeddings") else 2
    rest = count * math.prod(size if isinstance(size, int) else 0 for size in sizes)
    if not 0 < rest < spec.dense_params:
        return None
    return fmt, weight_bytes(spec.dense_params - rest, fmt) + weight_bytes(rest, plain)


def _directory(model: str | Path | HubName) -> Path | None:
    if isinstance(model, HubName) or model == "demo" or not Path(model).is_dir():
        return None
    return Path(model)


def _description(model: str | Path | HubName) -> tuple[Mapping[str, Any], str, Stored | None]:
    """Read the file that describes a model; also return what it is called unless it says so.

    The third is what a GGUF file's weights are kept as.
    """
    if isinstance(model, HubName):
        if model.quant is None:
            return config_of(model), model.repo.rpartition("/")[2], None
        header = header_of(model)
        return config_of_gguf(header), header.name, stored_weights(header)
    path = demo_path() if model == "demo" else Path(model)
    if path.is_dir() and not (path / "config.json").exists() and len(models_in(path)) == 1:
        (path,) = models_in(path)
    path = path / "config.json" if path.is_dir() else path
    if is_gguf(path):
        header = read_gguf(path)
        return config_of_gguf(header), header.name, stored_weights(header)
    if path.is_file():
        called = directory_name(path.parent) if path.name == "config.json" else path.stem
        data = read_table(path, "model description")
        return data, "demo" if model == "demo" else called, None
    if path.suffix in (".json", ".toml") or str(model).startswith(("/", "~", ".")):
        raise UsageError(f"there is no file {path}", hint="check the path")
    try:
        return resolve(str(model), "models"), str(model), None
    except UsageError:
        published = hub_name(model)
        if published is None:
            raise
    return _description(published)


def _stored_formats(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the formats of a converted directory; None when it is none."""
    stored = config.get("quantization_config")
    if not isinstance(stored, Mapping) or stored.get("quant_method") != QUANT_METHOD:
        return None
    return stored


def float_format(dtype: Any) -> str:
    """Return the planner's name of a checkpoint's weight type; bfloat16 when it has none."""
    return _FLOATS.get(str(dtype).removeprefix("torch."), "bf16")
