"""Converts a Hugging Face checkpoint to a directory with an expert store, piece by piece.

:func:`convert` writes an ordinary Hugging Face directory (config, tokenizer, dense weights)
plus the packed experts. It works in a ``.partial`` directory beside the destination that is
renamed when everything is on disk; what an interrupted run completed is kept and checked.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hybrid.anatomy.dense import dense_matrices, is_lookup
from hybrid.anatomy.experts import ExpertsSpec, find_experts
from hybrid.anatomy.text_part import leave_towers_out
from hybrid.ask.formats import check_formats
from hybrid.formats.block import PAGE_BYTES
from hybrid.formats.errors import HybridError
from hybrid.formats.registry import format_of, packs_dense
from hybrid.paths import expanded, require_room
from hybrid.weights.arriving import ArrivingCheckpoint
from hybrid.weights.checks import Checkpoint, check_files, findings
from hybrid.weights.config import HybridConfig
from hybrid.weights.dense_writer import DensePlan
from hybrid.weights.expert_writer import check_finite, write_experts
from hybrid.weights.gguf_checkpoint import checkpoint_at
from hybrid.weights.importance import Importance
from hybrid.weights.partial import Partial, destination, reporting_full_disk
from hybrid.weights.side_files import write_side_files
from hybrid.weights.source import Source
from hybrid.weights.source_config import with_kinds
from hybrid.weights.sources import chosen_formats, opened_weights
from hybrid.weights.store import INDEX_NAME, ExpertStore, LayerRecord, StoreIndex
from hybrid.weights.tensor_files import check_digests
from hybrid.weights.tokenizer import check_tokenizer
from hybrid.weights.weight_map import WeightMap, Weights, left_out
from planner.describe.words import in_words

#: Called with bytes written so far, bytes in all, and what is being written.
Progress = Callable[[int, int, str], None]


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
    format
        Of most experts.
    expert_bytes, dense_bytes
        Sizes of the files that hold the two kinds of weights.
    resumed_layers
        Layers taken over from an interrupted run.
    elapsed_s
        Wall time.
    """

    path: Path
    store: str
    layers: int
    experts: int
    format: str
    expert_bytes: int
    dense_bytes: int
    resumed_layers: int
    elapsed_s: float


def convert(
    src: Path | str | Checkpoint,
    dst: Path | str,
    *,
    experts: str | None = None,
    dense: str | None = None,
    importance: Importance | None = None,
    exact: bool = False,
    verify: bool = False,
    progress: Progress | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> ConvertResult:
    """Convert a checkpoint.

    Parameters
    ----------
    src
        A Hugging Face directory with safetensors weights, a GGUF file, or a checkpoint that comes
        from the hub meanwhile, which is gone afterwards.
    dst
        The directory to make; must not exist (an empty one will do).
    experts, dense
        Formats as in :class:`hybrid.weights.config.HybridConfig`.
    importance
        What errors of the matrices' inputs count for where something is quantized.
    exact
        Refuse weights that cannot stay exactly what they are.
    verify
        Compare the source files with the digests that ``hf download`` leaves beside them,
        where it did, and every written expert with its checksum.
    progress
        Told about every piece that is written.
    tell
        Told, before anything is written, what is odd about ``src`` or not taken from it; and
        afterwards which of its quantized weights could not be kept exactly.

    Raises
    ------
    UsageError
        On an unknown format, or when ``dst`` exists or cannot be made.
    CheckpointError
        When ``src`` is missing, unreadable, damaged or incomplete, or its tokenizer cannot be
        loaded.
    UnsupportedModelError
        When it writes no text, its experts cannot run from a store, or its weights cannot stay what
        they are and have to.
    DiskSpaceError
        When ``dst`` has too little room; what was written is kept for the next run.

    Notes
    -----
    Holds a piece of one expert at a time: the extra memory does not grow with the model.
    """
    start = time.perf_counter()
    dst = expanded(dst)
    check_formats(experts, dense)
    src = src if isinstance(src, Checkpoint) else expanded(src)
    place = destination(src.path if isinstance(src, Checkpoint) else src, dst)
    with (
        _ready(src, experts, dense, importance, exact=exact, verify=verify) as ready,
        Partial(place) as partial,
        _one_thread(),
    ):
        index, plan = ready.index, ready.plan
        for note in ready.notes:
            tell(note)
        partial.begin(index.id)
        done, takes, has = _let_go(ready, tell)
        require_room(
            partial.path.parent,
            takes - partial.nbytes - has,
            "the conversion writes {} more",
            hint="free some space or choose a destination on another disk",
        )
        told = _Told(progress, index.nbytes - PAGE_BYTES + plan.nbytes)
        with reporting_full_disk(partial.path):
            index, resumed = write_experts(
                partial, ready.weights, ready.specs, index, told.advance, importance, done
            )
            plan.write(partial, told.advance)
            write_side_files(ready.source.checkpoint, partial.path)
            (partial.path / INDEX_NAME).write_text(index.to_json())
            config = converted_config(ready.source.raw_config, index, dense)
            (partial.path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
            if verify:
                ExpertStore.open(partial.path, verify=True)
            if isinstance(ready.source.checkpoint, ArrivingCheckpoint):
                ready.source.checkpoint.remove()  # before the name that nobody starts again with
            partial.finish()
        for note in ready.weights.tally.notes():
            tell(note)
    return ConvertResult(
        path=dst,
        store=index.id,
        layers=len(index.layers),
        experts=sum(layer.experts for layer in index.layers),
        format=index.experts_format,
        expert_bytes=index.nbytes,
        dense_bytes=plan.file_bytes,
        resumed_layers=resumed,
        elapsed_s=time.perf_counter() - start,
    )


@dataclass(frozen=True)
class _Ready:
    """A checkpoint that can be converted, and all that is known of what will be written."""

    source: Source
    specs: list[ExpertsSpec]
    weights: Weights
    index: StoreIndex
    plan: DensePlan
    notes: list[str]


def _let_go(ready: _Ready, tell: Callable[[str], None]) -> tuple[Callable[[int], None], int, int]:
    """Return what to do after every layer, the most that a conversion takes, and has of its source.

    Only a checkpoint that comes meanwhile is let go, layer by layer.
    """
    index, plan, weights = ready.index, ready.plan, ready.weights
    packed, checkpoint = index.nbytes + plan.file_bytes, ready.source.checkpoint
    if not (isinstance(checkpoint, ArrivingCheckpoint) and isinstance(weights, WeightMap)):
        return lambda layer: None, packed, 0
    layers = [
        [key for name in spec.parameters for key in weights.sources_of(f"{spec.path}.{name}")]
        for spec in ready.specs
    ]
    checkpoint.expect(layers, (key for one in weights.dense.values() for key in one.keys))
    sizes = [layer.nbytes(index.format) for layer in index.layers]
    most = checkpoint.peak_bytes(sizes, plan.file_bytes + PAGE_BYTES)
    tell(
        f"takes {in_words(most)} on disk at most, {in_words(packed)} in the end; "
        f"each weight file goes when it is packed"
    )

    def done(layer: int) -> None:
        weights.reader.close()
        checkpoint.layer_done(layer)

    return done, most, checkpoint.nbytes


@contextmanager
def _ready(
    src: Path | Checkpoint,
    experts: str | None,
    dense: str | None,
    importance: Importance | None = None,
    *,
    exact: bool,
    verify: bool,
) -> Iterator[_Ready]:
    """Check all that can be known before work starts, cheapest first; nothing is written."""
    checkpoint = src if isinstance(src, Checkpoint) else checkpoint_at(src)
    notes = check_files(checkpoint)
    source = Source.of(checkpoint)
    rows = getattr(source.config.get_text_config(), "vocab_size", None)
    notes += check_tokenizer(checkpoint, rows)
    if verify:
        check_digests(source.files)
    model = source.empty_model()
    leave_towers_out(model)
    if source.config.get_text_config() is not source.config:
        kind = source.config.model_type
        notes.append(f"{source.name} ({kind}) is for more than text: its text is converted")
    specs = find_experts(model)
    matrices = dense_matrices(model, specs)
    with opened_weights(checkpoint, source.config, model, specs) as weights:
        weights.tally.exact = exact
        chosen = chosen_formats(checkpoint, weights, matrices, experts, dense)
        notes += chosen.notes
        packed = {path: fmt for path, fmt in chosen.dense.items() if packs_dense(fmt)}
        made_with = {} if importance is None else {"importance": importance.digest}
        if importance is not None:
            multiplied = (p for p in packed if not is_lookup(model.get_submodule(p)))
            notes += importance.missing(specs, multiplied)
        index = StoreIndex(
            source={"name": source.name, "identity": source.identity()} | made_with,
            format=chosen.experts,
            layers=layout(specs, chosen.experts, chosen.layers),
            dense_format=dense,
            dense={path: matrices[path] for path in packed},
            dense_formats={path: fmt for path, fmt in packed.items() if fmt != dense},
        )
        notes += left_out(weights)
        plan = DensePlan(weights, matrices, chosen.dense, importance)
        yield _Ready(source, specs, weights, index, plan, notes)


@dataclass(frozen=True)
class CheckResult:
    """What :func:`check` found.

    Attributes
    ----------
    errors
        What hinders a conversion; empty where nothing does.
    notes
        What is odd, or not taken.
    layers, experts, format, expert_bytes, dense_bytes
        As in :class:`ConvertResult`, of what a conversion would make; 0 where it cannot.
    """

    errors: list[HybridError]
    notes: list[str]
    layers: int = 0
    experts: int = 0
    format: str = ""
    expert_bytes: int = 0
    dense_bytes: int = 0


def check(
    src: Path | str,
    *,
    experts: str | None = None,
    dense: str | None = None,
    exact: bool = False,
    verify: bool = False,
    progress: Progress | None = None,
) -> CheckResult:
    """Find what would hinder a conversion, all at once, and write nothing.

    Takes what :func:`convert` takes. ``verify`` also reads every weight, to find those that are
    damaged or not finite.

    Raises
    ------
    UsageError
        On an unknown format.
    """
    src = expanded(src)
    check_formats(experts, dense)
    try:
        checkpoint = checkpoint_at(src)
        errors, notes = findings(checkpoint, checkpoint.checks)
    except HybridError as error:
        return CheckResult([error], [])
    if errors:
        return CheckResult(errors, notes)
    try:
        with _ready(src, experts, dense, exact=exact, verify=verify) as ready, _one_thread():
            index, plan = ready.index, ready.plan
            if verify:
                told = _Told(progress, index.nbytes - PAGE_BYTES + plan.nbytes)
                check_finite(ready.weights, ready.specs, index, told.advance)
                plan.check(told.advance)
    except HybridError as error:
        return CheckResult([error], notes)
    layers = index.layers
    return CheckResult(
        errors=[],
        notes=ready.notes,
        layers=len(layers),
        experts=sum(layer.experts for layer in layers),
        format=index.experts_format,
        expert_bytes=index.nbytes,
        dense_bytes=plan.file_bytes,
    )


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


def layout(
    specs: list[ExpertsSpec], fmt: str, formats: Sequence[tuple[str, str]] = ()
) -> tuple[LayerRecord, ...]:
    """Place the layers one after the other behind the header page.

    Parameters
    ----------
    formats
        Of each layer, where they differ from ``fmt``: of gate and up, and of down.
    """
    records: list[LayerRecord] = []
    offset = PAGE_BYTES
    for spec, (above, below) in zip(specs, formats or [(fmt, fmt)] * len(specs), strict=True):
        record = LayerRecord(
            module=spec.path,
            experts=spec.experts,
            hidden=spec.hidden,
            intermediate=spec.intermediate,
            gated=spec.gated,
            bias=spec.bias,
            offset=offset,
            format="" if above == fmt else above,
            down_format="" if below == above else below,
        )
        records.append(record)
        offset += record.nbytes(fmt)
    return tuple(records)


def converted_config(raw: dict[str, Any], index: StoreIndex, dense: str | None) -> dict[str, Any]:
    """The source's config with our quantization in place of its own."""
    config = with_kinds(raw)
    for key, value in raw.items():
        if isinstance(value, dict) and "quantization_config" in value:
            config[key] = {k: v for k, v in value.items() if k != "quantization_config"}
    if dense is not None and not packs_dense(dense):
        config.pop("torch_dtype", None)
        config["dtype"] = format_of(dense).tensor
    settings = HybridConfig(index.format, dense, store=index.id)
    config["quantization_config"] = settings.to_dict()
    return config
