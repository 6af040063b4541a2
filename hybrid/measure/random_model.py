"""Converted directories of any published shape, filled with random weights piece by piece."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from hybrid.anatomy.dense import dense_matrices
from hybrid.anatomy.experts import find_experts
from hybrid.formats.block import Block, pack_expert
from hybrid.formats.matrix import pack, packed_bytes
from hybrid.formats.registry import packs_dense
from hybrid.paths import require_room
from hybrid.weights.checkpoint import converted_config, layout
from hybrid.weights.huge_pages import AlignedWriter
from hybrid.weights.source_files import INDEX_NAME
from hybrid.weights.store import DATA_NAME, StoreIndex, header_page
from hybrid.weights.store import INDEX_NAME as STORE_INDEX

_DEPTHS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")
_FOREIGN = ("quantization_config", "architectures", "transformers_version", "_name_or_path")


def write_random_model(
    settings: dict[str, Any], directory: Path, *, experts: str, dense: str | None
) -> None:
    """Write a converted directory of the shape that ``settings`` (a ``config.json``) describe.

    ``dense`` may also be ``"f32"``, for what is made of a checkpoint in float32 or float16.
    Matrices of one shape hold the same numbers, and so do all experts: what is measured is how
    they are read. Routers differ, so that tokens spread over the experts.
    """
    config, model = _empty_model(settings)
    specs = find_experts(model)
    matrices = dense_matrices(model, specs)
    packed = packs_dense(dense)
    dtype = torch.float32 if dense == "f32" else torch.bfloat16
    stored = None if dense == "f32" else dense  # no format of ours: as the checkpoint has them
    index = StoreIndex(
        source={"name": config.model_type, "identity": "random"},
        format=experts,
        layers=layout(specs, experts),
        dense_format=stored,
        dense=matrices if packed else {},
    )
    with (directory / DATA_NAME).open("wb", buffering=0) as raw:
        file = AlignedWriter(raw)
        file.write(header_page(index))
        layers = []
        for record in index.layers:
            shape = record.shape(experts)
            block = _random_expert(shape).ljust(shape.stride, b"\0")
            for _ in range(record.experts):
                file.write(block)
            sums = (zlib.crc32(block),) * record.experts
            layers.append(replace(record, checksums=sums))
        file.flush()
    index = replace(index, layers=tuple(layers))
    (directory / STORE_INDEX).write_text(index.to_json())
    moved = {f"{spec.path}.{name}" for spec in specs for name in spec.parameters}
    tied = {name for name in model.all_tied_weights_keys if name != "lm_head.packed"}
    shapes = {
        name: tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
        if name not in moved and name not in tied
    }
    where = {}
    for part, names in enumerate(_by_layer(shapes)):
        file_name = f"model-{part:05d}.safetensors"
        tensors = {}
        for name in names:
            path = name.removesuffix(".weight")
            if packed and path in matrices:
                tensors[f"{path}.packed"] = _random_packed(matrices[path], str(dense)).clone()
            else:
                tensors[name] = _random_tensor(name, shapes[name], dtype)
        where.update(dict.fromkeys(tensors, file_name))
        save_file(tensors, directory / file_name, {"format": "pt"})
    (directory / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    raw = json.loads(config.to_json_string(use_diff=False))
    raw["dtype"] = str(dtype).removeprefix("torch.")
    converted = converted_config(raw, index, stored)
    (directory / "config.json").write_text(json.dumps(converted, indent=2))


def first_layers(settings: Mapping[str, Any], depth: int, kept: int) -> dict[str, Any]:
    """Return the ``config.json`` of a model's first ``kept`` layers of ``depth``.

    Special tokens are left out with what belongs to the checkpoint and not to the shape.
    """
    short = {name: value for name, value in settings.items() if name not in _FOREIGN}
    for name, value in short.items():
        if name in _DEPTHS:
            short[name] = kept
        elif isinstance(value, list) and len(value) == depth:
            short[name] = value[:kept]
        elif name.endswith("token_id"):
            short[name] = None
    return short


def _empty_model(settings: dict[str, Any]) -> tuple[Any, Any]:
    config = AutoConfig.for_model(**settings)
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    config.architectures = [kind.__name__]
    with torch.device("meta"):
        return config, kind._from_config(config)


def random_bytes(settings: dict[str, Any], experts: str, dense: str | None) -> int:
    """Return about how many bytes :func:`write_random_model` writes."""
    _, model = _empty_model(settings)
    specs = find_experts(model)
    matrices = dense_matrices(model, specs)
    fmt = dense if dense is not None else "bf16"
    stored = sum(record.nbytes(experts) for record in layout(specs, experts))
    return stored + sum(packed_bytes(rows, cols, fmt) for rows, cols in matrices.values())


def check_room(settings: dict[str, Any], folder: Path, experts: str, dense: str | None) -> int:
    """Return about how many bytes :func:`write_random_model` writes, if ``folder`` has room.

    Raises
    ------
    DiskSpaceError
        When it has not.
    """
    needed = random_bytes(settings, experts, dense)
    hint = "set TMPDIR to a larger disk, or measure fewer layers"
    require_room(folder, needed, "the model takes {}", hint=hint)
    return needed


def _by_layer(names: dict[str, Any]) -> Iterator[list[str]]:
    """Group tensor names: those of one numbered layer together, what is in none by itself."""
    groups: dict[str, list[str]] = {}
    for name in names:
        numbers = [part for part in name.split(".") if part.isdigit()]
        groups.setdefault(numbers[0] if numbers else name, []).append(name)
    yield from groups.values()


def _draw(*shape: int) -> Any:
    rng = np.random.default_rng(shape)
    return rng.standard_normal(shape, dtype=np.float32) * np.float32(0.02)


@cache
def _random_expert(shape: Block) -> bytes:
    d, f = shape.hidden, shape.intermediate
    bias = shape.bias
    block = pack_expert(
        shape,
        gate=_draw(f, d) if shape.gated else None,
        up=_draw(f, d),
        down=_draw(d, f),
        gate_bias=_draw(f) if bias and shape.gated else None,
        up_bias=_draw(f) if bias else None,
        down_bias=_draw(d) if bias else None,
    )
    return block.tobytes()


@cache
def _random_packed(shape: tuple[int, int], fmt: str) -> Tensor:
    return torch.from_numpy(pack(_draw(*shape), fmt))


def _random_tensor(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    if len(shape) < 2:
        plain = torch.zeros if "bias" in name else torch.ones
        return plain(shape, dtype=dtype)
    seeded = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    values = torch.randn(shape, generator=seeded) * float(shape[-1] ** -0.5)
    return values.to(dtype)
