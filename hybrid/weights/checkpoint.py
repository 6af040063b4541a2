"""Converts a Hugging Face checkpoint to a directory with an expert store, piece by piece.

:func:`convert` writes an ordinary Hugging Face directory (config, tokenizer, dense weights)
plus the packed experts. It works in a ``.partial`` directory beside the destination that is
renamed when everything is on disk; what an interrupted run completed is kept and checked.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from hybrid.anatomy.dense import dense_matrices
from hybrid.anatomy.experts import ExpertsSpec, find_experts
from hybrid.ask.formats import DEFAULT_EXPERTS, QUANT_METHOD, check_formats
from hybrid.errors import CheckpointError, DiskSpaceError, UnsupportedModelError, UsageError
from hybrid.formats.registry import format_of, packs_dense
from hybrid.weights.config import HybridConfig
from hybrid.weights.dense_writer import DensePlan
from hybrid.weights.expert_writer import write_experts
from hybrid.weights.partial import Partial
from hybrid.weights.source_formats import source_quantizer
from hybrid.weights.store import INDEX_NAME, PAGE_BYTES, ExpertStore, LayerRecord, StoreIndex
from hybrid.weights.tensor_files import (
    TensorReader,
    check_digests,
    identity,
    read_json,
    unreadable,
    weight_files,
)
from hybrid.weights.weight_map import WeightMap
from planner.describe.words import in_words

#: Called with bytes written so far, bytes in all, and what is being written.
Progress = Callable[[int, int, str], None]

#: Files that are weights in some other form, or that a converted directory writes itself.
_NOT_COPIED = (
    *(".safetensors", ".index.json", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"),
    *(".ot", ".lock", ".incomplete"),
)


@dataclass(frozen=True)
class ConvertResult:
    """What a conversion made.

    Attributes
    ----------
    path
        The converted directory.
    store
        Id of its expert store.
    layers, experts
        Layers that have experts, and experts in all.
    expert_bytes, dense_bytes
        Sizes of the two kinds of weights.
    resumed_layers
        Layers taken over from an interrupted run.
    elapsed_s
        Wall time.
    """

    path: Path
    store: str
    layers: int
    experts: int
    expert_bytes: int
    dense_bytes: int
    resumed_layers: int
    elapsed_s: float


def convert(
    src: Path | str,
    dst: Path | str,
    *,
    experts: str = DEFAULT_EXPERTS,
    dense: str | None = None,
    verify: bool = False,
    progress: Progress | None = None,
) -> ConvertResult:
    """Convert a Mixture-of-Experts checkpoint directory.

    Parameters
    ----------
    src
        A Hugging Face directory with safetensors weights.
    dst
        The directory to make; must not exist (an empty one will do).
    experts, dense
        Formats as in :class:`hybrid.weights.config.HybridConfig`.
    verify
        Compare the source files with the digests that ``hf download`` leaves beside them,
        where it did, and every written expert with its checksum.
    progress
        Told about every piece that is written.

    Raises
    ------
    UsageError
        On an unknown format, or when ``dst`` exists.
    CheckpointError
        When ``src`` is missing, unreadable, damaged, incomplete or has no experts.
    UnsupportedModelError
        When its experts cannot run from a store.
    DiskSpaceError
        When ``dst`` has too little room; what was written is kept for the next run.

    Notes
    -----
    Holds a piece of one expert at a time: the extra memory does not grow with the model.
    """
    start = time.perf_counter()
    src, dst = Path(src).expanduser(), Path(dst).expanduser()
    check_formats(experts, dense)
    _check_destination(dst)
    source = Source.open(src)
    if verify:
        check_digests(source.files)
    with TensorReader(source.files) as reader, Partial(dst) as partial, _one_thread():
        _check_destination(dst)
        model = source.empty_model()
        specs = find_experts(model)
        matrices = dense_matrices(model, specs)
        weights = WeightMap(model, reader, specs, source_quantizer(source.config))
        index = StoreIndex(
            source={"name": source.name, "identity": source.identity()},
            format=experts,
            layers=layout(specs, experts),
            dense_format=dense,
            dense=matrices if packs_dense(dense) else {},
        )
        plan = DensePlan(weights, matrices, dense)
        partial.begin(index.id)
        _check_room(partial, index.nbytes + plan.nbytes)
        told = _Told(progress, index.nbytes - PAGE_BYTES + plan.nbytes)
        with partial.reporting_full_disk():
            index, resumed = write_experts(partial, weights, specs, index, told.advance)
            plan.write(partial, told.advance)
            _copy_other_files(src, partial.path)
            (partial.path / INDEX_NAME).write_text(index.to_json())
            config = converted_config(source.raw_config, index, experts, dense)
            (partial.path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
            if verify:
                ExpertStore.open(partial.path, verify=True)
            partial.finish()
    return ConvertResult(
        path=dst,
        store=index.id,
        layers=len(index.layers),
        experts=sum(layer.experts for layer in index.layers),
        expert_bytes=index.nbytes,
        dense_bytes=plan.nbytes,
        resumed_layers=resumed,
        elapsed_s=time.perf_counter() - start,
    )


@dataclass(frozen=True)
class Source:
    """A checkpoint directory whose config could be read."""

    path: Path
    raw_config: dict[str, Any]
    config: Any
    files: list[Path]

    @classmethod
    def open(cls, path: Path) -> Source:
        """Read a directory's config and list its weights.

        Raises
        ------
        CheckpointError
            When it is missing, empty, unreadable, of an unknown kind, or converted already.
        """
        if not path.is_dir():
            raise CheckpointError(
                f"there is no model directory {str(path)!r}",
                hint="give a directory with a config.json, or ORG/NAME of the hub",
            )
        raw = read_json(path / "config.json")
        if not isinstance(raw, dict):
            raise CheckpointError(
                f"{path / 'config.json'} is not a model's config",
                hint="it must be a JSON object, as save_pretrained writes it",
            )
        if is_converted(raw):
            raise CheckpointError(
                f"{path} is converted already: its experts are in "
                f"{raw['quantization_config'].get('experts')}",
                hint="name the original checkpoint instead",
            )
        files = weight_files(path)
        try:
            config = AutoConfig.from_pretrained(path, local_files_only=True)
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            raise CheckpointError(
                f"transformers {transformers.__version__} cannot use {path / 'config.json'}: "
                f"{str(error).splitlines()[0]}",
                hint="a newer transformers may know this model",
            ) from error
        return cls(path, raw, config, files)

    @property
    def name(self) -> str:
        return self.path.resolve().name

    def identity(self) -> str:
        return identity(self.path / "config.json", self.files)

    def empty_model(self) -> Any:
        """Build the model without memory for its weights."""
        names = getattr(self.config, "architectures", None) or []
        kind: Any = getattr(transformers, names[0], None) if names else None
        if kind is None:
            kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(self.config), None)
        if kind is None:
            raise UnsupportedModelError(
                f"transformers {transformers.__version__} has no model class for "
                f"{', '.join(names) or self.config.model_type}",
                hint="models with code of their own cannot be converted",
            )
        with torch.device("meta"):
            return kind._from_config(self.config)


def is_converted(raw_config: dict[str, Any]) -> bool:
    """Whether a directory with this ``config.json`` has an expert store."""
    settings = raw_config.get("quantization_config")
    return isinstance(settings, dict) and settings.get("quant_method") == QUANT_METHOD


class _Told:
    """Adds up bytes for the progress callback."""

    def __init__(self, progress: Progress | None, total_bytes: int) -> None:
        self._progress = progress
        self._total = total_bytes
        self._done = 0

    def advance(self, n_bytes: int, what: str) -> None:
        self._done += n_bytes
        if self._progress is not None:
            self._progress(self._done, self._total, what)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Keep torch on this thread: its pieces are too small to be worth waking others for."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _check_destination(dst: Path) -> None:
    if dst.exists() and not (dst.is_dir() and not any(dst.iterdir())):
        raise UsageError(
            f"{dst} exists",
            hint="choose another destination, or remove it first",
        )


def layout(specs: list[ExpertsSpec], fmt: str) -> tuple[LayerRecord, ...]:
    """Place the layers one after the other behind the header page."""
    records: list[LayerRecord] = []
    offset = PAGE_BYTES
    for spec in specs:
        record = LayerRecord(
            module=spec.path,
            experts=spec.experts,
            hidden=spec.hidden,
            intermediate=spec.intermediate,
            gated=spec.gated,
            bias=spec.bias,
            offset=offset,
        )
        records.append(record)
        offset += record.nbytes(fmt)
    return tuple(records)


def _check_room(partial: Partial, wanted: int) -> None:
    wanted -= partial.nbytes
    free = shutil.disk_usage(partial.path).free
    if wanted > free:
        raise DiskSpaceError(
            f"{partial.path.parent} has {in_words(free)} free, "
            f"the conversion writes {in_words(wanted)} more",
            hint="free some space or choose a destination on another disk",
        )


def _copy_other_files(src: Path, dst: Path) -> None:
    """Copy the tokenizer, templates, licence ...: all top-level files that are not weights."""
    for path in sorted(src.iterdir()):
        if path.name == "additional_chat_templates" and path.is_dir():
            shutil.copytree(path, dst / path.name, dirs_exist_ok=True)
        elif path.is_file() and not path.name.endswith(_NOT_COPIED) and path.name[0] != ".":
            try:
                shutil.copyfile(path, dst / path.name)
            except PermissionError as error:
                raise unreadable(path, error) from error


def converted_config(
    raw: dict[str, Any], index: StoreIndex, experts: str, dense: str | None
) -> dict[str, Any]:
    """The source's config with our quantization in place of its own."""
    config = dict(raw)
    for key, value in raw.items():
        if isinstance(value, dict) and "quantization_config" in value:
            config[key] = {k: v for k, v in value.items() if k != "quantization_config"}
    if dense is not None and not packs_dense(dense):
        config.pop("torch_dtype", None)
        config["dtype"] = format_of(dense).tensor
    settings = HybridConfig(experts, dense, store=index.id)
    config["quantization_config"] = settings.to_dict()
    return config
