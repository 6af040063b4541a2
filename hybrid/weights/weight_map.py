"""Finds the checkpoint tensors that make each tensor of the model, by transformers' own mapping.

The mapping (renamings, and converters that merge, split, transpose or dequantize) is asked per
model tensor, and converters run on the pieces that are wanted: one expert, or some rows of it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from hybrid.anatomy.experts import ExpertsSpec
from hybrid.errors import CheckpointError, UnsupportedModelError
from hybrid.weights.blocks import Blocks, Coded, Rows
from hybrid.weights.published_reader import PublishedReader
from hybrid.weights.source_files import few
from hybrid.weights.source_formats import BlockDequantize
from hybrid.weights.tally import Tally
from planner.describe.words import enough_in_words

#: An expert's matrices are read in pieces when they are larger than this.
PIECE_BYTES = 16 << 20
#: Pieces start at multiples of this many rows: whole strips of the kernels' layout.
PIECE_ROWS = 32

#: How much larger elements are than the numbers of 16 bits that they are said to be.
_ELEMENT = 4

_CHECK = "check that the download is complete and that config.json belongs to these weights"

Sources = dict[str, list[Tensor]]


@dataclass
class Target:
    """One or more model tensors and the checkpoint tensors that make them.

    Parameters
    ----------
    name
        The first model tensor that results.
    converter
        What to do with the sources; None when they are only renamed.
    sources
        Checkpoint keys by the converter's pattern, in the order the converter takes them.
    makes
        Every model tensor that results, as the model declares it; of dense targets only.
    """

    name: str
    converter: WeightConverter | None
    sources: dict[str, list[str]] = field(default_factory=dict)
    makes: dict[str, Tensor] = field(default_factory=dict)

    @property
    def keys(self) -> list[str]:
        return [key for keys in self.sources.values() for key in keys]

    @property
    def operations(self) -> list[Any]:
        return [] if self.converter is None else list(self.converter.operations)

    def one_key_each(self, keys: list[str]) -> bool:
        """Whether each of ``keys`` is one expert's (rather than one key all experts')."""
        return len(keys) > 1 or any(isinstance(op, MergeModulelist) for op in self.operations)

    def run(self, tensors: Sources, model: Any) -> dict[str, Tensor]:
        """Return the model tensors made from ``tensors``, given like :attr:`sources`."""
        if self.converter is None:
            ((tensor,),) = tensors.values()
            return {self.name: tensor}
        collected: Any = self.converter.collected_tensors
        collected.update(tensors)
        with torch.no_grad():
            made = self.converter.convert(self.name, model=model, config=model.config)
        return {
            name: (value[0] if isinstance(value, list) else value).detach()
            for name, value in made.items()
        }


class Weights(Protocol):
    """A checkpoint's weights as the model takes them.

    Attributes
    ----------
    dense
        The targets that are not experts', by name.
    reader
        Of their sources.
    left_out
        What the model does not take: ``key`` and ``nbytes`` of each.
    tally
        What becomes of weights that were quantized before.
    """

    dense: dict[str, Target]
    left_out: list[Any]
    tally: Tally

    @property
    def reader(self) -> Reader:
        """Reads the sources of dense targets."""

    def names(self) -> Iterable[str]:
        """Return the names of all tensors that the checkpoint has."""

    def read_dense(self, target: Target) -> dict[str, Tensor]:
        """Return the model tensors that a dense target makes."""

    def read_coded(self, target: Target, name: str) -> Coded | None:
        """Return a tensor that a dense target makes as elements; None where it is of numbers."""

    def read_biases(self, spec: ExpertsSpec, expert: int) -> tuple[list[Tensor], Tensor]:
        """Return one expert's biases: those of gate (if gated) and up, and that of down."""

    def read_up(self, spec: ExpertsSpec, expert: int) -> Iterator[Sequence[Rows]]:
        """Yield one expert's gate (if gated) and up, ``[n, D]`` each, some rows at a time."""

    def read_down(self, spec: ExpertsSpec, expert: int) -> Iterator[Rows]:
        """Yield one expert's down, ``[n, F]``, some rows at a time."""


class Reader(Protocol):
    """Reads tensors piece by piece."""

    @property
    def tensors(self) -> Mapping[str, Any]:
        """What is known of each: ``key``, ``path``, ``dtype``, ``shape``, ``nbytes``."""

    def read(self, key: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Read ``start:stop`` of a tensor's first dimension (all by default)."""

    def read_matrix_rows(self, key: str, start: int, stop: int) -> Tensor:
        """Read rows ``start:stop`` of a tensor seen as a matrix of its last dimension."""

    def read_blocks(self, key: str, start: int, stop: int) -> Blocks | Coded | None:
        """Read the same as they are packed; None where they are not."""


class WeightMap:
    """The mapping from a checkpoint to a model.

    Parameters
    ----------
    model
        The model on the meta device, its experts' parameters in place. It is changed to declare
        one expert a layer, which is what converters are given.
    reader
        The checkpoint.
    specs
        The model's experts.
    quantizer
        transformers' quantizer that dequantizes the checkpoint, if it has to be.

    Attributes
    ----------
    dense
        The targets that are not experts', by name.
    left_out
        The checkpoint's tensors that the model does not take.
    specs
        The model's experts.
    tally
        What becomes of weights that were quantized before.

    Raises
    ------
    CheckpointError
        When a tensor is missing or has a shape that the model does not take.
    """

    def __init__(
        self, model: Any, reader: PublishedReader, specs: list[ExpertsSpec], quantizer: Any = None
    ) -> None:
        self.model = model
        self.reader = reader
        self.tally = reader.tally
        self.specs = specs
        self._owner = {f"{spec.path}.{name}": spec for spec in specs for name in spec.parameters}
        self._declared = {name: tuple(model.get_parameter(name).shape) for name in self._owner}
        wanted = model.state_dict()
        self._targets = self._assign(wanted, quantizer)
        #: Targets whose sources are all elements: those go the way of numbers.
        self._coded = {
            name
            for name, target in self._targets.items()
            if all(reader.coded(key) for key in target.keys)
        }
        taken = {key for target in self._targets.values() for key in target.keys}
        self.left_out = [info for key, info in reader.tensors.items() if key not in taken]
        self.dense = {
            name: target for name, target in self._targets.items() if name not in self._owner
        }
        self._declare_one_expert()
        for name in self._owner:
            self._check_experts(name)
        self._check_dense(wanted)

    def _assign(self, wanted: dict[str, Tensor], quantizer: Any) -> dict[str, Target]:
        """Sort the checkpoint's keys by the model tensor they go to, as transformers does."""
        mapping = get_model_conversion_mapping(self.model, None, quantizer)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        for entry in converters:
            entry.operations = [
                BlockDequantize(op.hf_quantizer)  # type: ignore[no-untyped-call]
                if type(op) is Fp8Dequantize
                else op
                for op in entry.operations
            ]
        by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
        prefix = self.model.base_model_prefix
        targets: dict[str, Target] = {}
        for key in sorted(self.reader.tensors, key=dot_natural_key):
            name, pattern = rename_source_key(key, renamings, converters, prefix, wanted)
            if name not in wanted and key in wanted:
                name, pattern = rename_source_key(key, [], [], prefix, wanted)
            if name in wanted:
                converter = None if pattern is None else by_pattern[pattern]
                target = targets.setdefault(name, Target(name, converter))
                target.sources.setdefault(key if pattern is None else pattern, []).append(key)
        return targets

    def _declare_one_expert(self) -> None:
        for name, spec in self._owner.items():
            owner_path, _, leaf = name.rpartition(".")
            owner = self.model.get_submodule(owner_path)
            shape = (spec.intermediate if spec.stacked else 1, *self._declared[name][1:])
            one = getattr(owner, leaf).new_empty(shape)
            setattr(owner, leaf, nn.Parameter(one, requires_grad=False))

    # -- checks: nothing is read but headers ------------------------------------------------

    def _check_dense(self, wanted: dict[str, Tensor]) -> None:
        made: set[str] = set()
        for target in self.dense.values():
            sources = {p: [self._meta(key) for key in keys] for p, keys in target.sources.items()}
            for name, tensor in self._dry_run(target, sources).items():
                if name in wanted:
                    self._check_made(name, tensor, wanted[name])
                    target.makes[name] = wanted[name]
            made |= target.makes.keys()
        optional = [*(self.model._keys_to_ignore_on_load_missing or []), "_extra_state$"]
        for name in wanted.keys() - made - self._owner.keys():
            if name not in self.model.all_tied_weights_keys and not any(
                re.search(pattern, name) for pattern in optional
            ):
                raise _missing(name, wanted[name].shape)

    def _check_experts(self, name: str) -> None:
        spec, declared = self._owner[name], self._declared[name]
        target = self._targets.get(name)
        if target is None:
            raise _missing(name, declared)
        if target.converter is not None and len(target.converter.target_patterns) > 1:
            raise UnsupportedModelError(
                f"the checkpoint mixes the experts of {name} with other weights",
                hint="save the model again with transformers' save_pretrained",
            )
        for keys in target.sources.values():
            if target.one_key_each(keys):
                self._check_one_each(keys, spec.experts)
            else:
                shape = self.reader.tensors[keys[0]].shape
                self._check_shape(keys[0], shape, (declared[0], *shape[1:]))
        expected = self.model.get_parameter(name)
        seen = set()
        for expert in range(spec.experts):
            sources = self._expert_sources(target, expert, meta=True)
            signature = str([(t.shape, t.dtype) for tensors in sources.values() for t in tensors])
            if signature not in seen:
                made = self._dry_run(target, sources)[name]
                self._check_made(f"expert {expert} of {name}", made, expected)
                seen.add(signature)

    @staticmethod
    def _check_one_each(keys: list[str], experts: int) -> None:
        first = keys[0].split(".")
        for expert in range(experts):
            parts = keys[expert].split(".") if expert < len(keys) else []
            differing = [b for a, b in zip(first, parts, strict=False) if a != b]
            if len(parts) != len(first) or differing != [str(expert)] * (expert > 0):
                raise CheckpointError(
                    f"the checkpoint has {len(keys)} of {experts} tensors like {keys[0]}: "
                    f"expert {expert}'s is missing",
                    hint=_CHECK,
                )

    @staticmethod
    def _check_shape(name: str, got: Any, expected: Any) -> None:
        if tuple(got) != tuple(expected):
            raise CheckpointError(
                f"{name} is {list(got)} in the checkpoint, the model takes {list(expected)}",
                hint=_CHECK,
            )

    def _check_made(self, name: str, made: Tensor, wanted: Tensor) -> None:
        self._check_shape(name, made.shape, wanted.shape)
        if wanted.is_floating_point() and (
            not made.is_floating_point() or made.dtype.itemsize == 1
        ):
            raise CheckpointError(
                f"{name} is {made.dtype} in the checkpoint, without scales that make it "
                f"{wanted.dtype}",
                hint=_CHECK,
            )

    def _dry_run(self, target: Target, sources: Sources) -> dict[str, Tensor]:
        try:
            return target.run(sources, self.model)
        except (RuntimeError, ValueError, IndexError) as error:
            shapes = {key: list(self.reader.tensors[key].shape) for key in target.keys[:4]}
            raise CheckpointError(
                f"the checkpoint's tensors do not make {target.name}: {error} (from {shapes})",
                hint=_CHECK,
            ) from error

    def _meta(self, key: str) -> Tensor:
        info = self.reader.tensors[key]
        return torch.empty(info.shape, dtype=info.dtype, device="meta")

    # -- reading ----------------------------------------------------------------------------

    def names(self) -> Iterable[str]:
        """Return the names of all tensors that the checkpoint has."""
        return self.reader.tensors.keys()

    def sources_of(self, name: str) -> list[str]:
        """Return the keys that make a tensor of the model; none where another is tied to it."""
        target = self._targets.get(name)
        return [] if target is None else target.keys

    def read_dense(self, target: Target) -> dict[str, Tensor]:
        """Return the model tensors that a dense target makes."""
        sources = {
            pattern: [self.reader.read(key) for key in keys]
            for pattern, keys in target.sources.items()
        }
        return target.run(sources, self.model)

    def read_coded(self, target: Target, name: str) -> Coded | None:
        """Return a tensor that a dense target makes as elements; None where it is of numbers."""
        if target.name not in self._coded:
            return None
        sources = {
            pattern: [self.reader.read_elements(key) for key in keys]
            for pattern, keys in target.sources.items()
        }
        return Coded.of(target.run(sources, self.model)[name], self.tally)

    def read_biases(self, spec: ExpertsSpec, expert: int) -> tuple[list[Tensor], Tensor]:
        """Return one expert's biases: those of gate (if gated) and up, and that of down."""
        *up, down = (self._read_whole(f"{spec.path}.{n}_bias", expert) for n in spec.matrices)
        return spec.split_up(up), down

    def read_up(self, spec: ExpertsSpec, expert: int) -> Iterator[list[Rows]]:
        """Yield one expert's gate (if gated) and up, ``[n, D]`` each, some rows at a time."""
        names = [f"{spec.path}.{name}" for name in spec.up]
        for start, stop in self._pieces(names, spec.intermediate):
            sides = spec.split_up([self._read_rows(name, expert, start, stop) for name in names])
            yield [self._rows(side) for side in sides]

    def read_down(self, spec: ExpertsSpec, expert: int) -> Iterator[Rows]:
        """Yield one expert's down, ``[n, F]``, some rows at a time."""
        name = f"{spec.path}.{spec.down}"
        for start, stop in self._pieces([name], spec.hidden):
            rows = self._read_rows(name, expert, start, stop)
            yield self._rows(rows.T if spec.transposed_down else rows)

    def _rows(self, rows: Tensor) -> Rows:
        """Return what was read as elements as those."""
        return Coded.of(rows, self.tally) if rows.dtype == torch.int64 else rows

    def _pieces(self, names: list[str], rows: int) -> list[tuple[int, int]]:
        """Split ``rows`` so that a piece takes about :data:`PIECE_BYTES`, where that can be."""
        size = sum(
            tensor.nbytes * (_ELEMENT if name in self._coded else 1)
            for name in names
            for tensors in self._expert_sources(self._targets[name], 0, meta=True).values()
            for tensor in tensors
        )
        if size <= PIECE_BYTES or not all(self._reads_by_rows(name, rows) for name in names):
            return [(0, rows)]
        step = max(PIECE_ROWS, rows * PIECE_BYTES // size // PIECE_ROWS * PIECE_ROWS)
        return [(start, min(rows, start + step)) for start in range(0, rows, step)]

    def _reads_by_rows(self, name: str, rows: int) -> bool:
        """Whether an expert's output rows are rows of the sources, in the same order.

        Merging experts and concatenating gate and up keep rows whole; of a stored fused matrix
        only one with all of gate before all of up is taken apart.
        """
        spec, target = self._owner[name], self._targets[name]
        down = name.endswith(f".{spec.down}")
        if spec.transposed_down if down else (spec.transposed_up or spec.interleaved):
            return False
        if not all(isinstance(op, (MergeModulelist, Concatenate)) for op in target.operations):
            return False
        sources = self._expert_sources(target, 0, meta=True)
        heights = {tensor.shape[-2] for tensors in sources.values() for tensor in tensors}
        return heights == {rows} or (target.converter is None and heights == {2 * rows})

    def _read_rows(self, name: str, expert: int, start: int, stop: int) -> Tensor:
        """Return rows ``start:stop`` of one expert's matrix; of gate and up if it has both."""
        spec, target = self._owner[name], self._targets[name]
        rows = spec.hidden if name.endswith(f".{spec.down}") else spec.intermediate
        if (start, stop) == (0, rows):
            return self._read_whole(name, expert)
        sources: Sources = {}
        for pattern, keys in target.sources.items():
            each = target.one_key_each(keys)
            key = keys[expert] if each else keys[0]
            shape = self.reader.tensors[key].shape
            height = rows if spec.stacked else shape[-2]
            first = 0 if each else expert * height
            read = (
                self.reader.read_elements if name in self._coded else self.reader.read_matrix_rows
            )
            halves = [
                read(key, first + at + start, first + at + stop) for at in range(0, height, rows)
            ]
            piece = torch.cat(halves) if len(halves) > 1 else halves[0]
            sources[pattern] = [piece if each or spec.stacked else piece[None]]
        return self._without_expert_dimension(name, target.run(sources, self.model)[name])

    def _read_whole(self, name: str, expert: int) -> Tensor:
        target = self._targets[name]
        made = target.run(self._expert_sources(target, expert), self.model)[name]
        return self._without_expert_dimension(name, made)

    def _without_expert_dimension(self, name: str, made: Tensor) -> Tensor:
        return made if self._owner[name].stacked else made[0]

    def _expert_sources(self, target: Target, expert: int, *, meta: bool = False) -> Sources:
        """Read (or describe, on the meta device) what makes one expert's part of a target."""
        spec = self._owner[target.name]
        sources = {}
        for pattern, keys in target.sources.items():
            if target.one_key_each(keys):
                key = keys[expert]
                coded = target.name in self._coded
                read = self.reader.read_elements if coded else self.reader.read
                sources[pattern] = [self._meta(key) if meta else read(key)]
                continue
            info = self.reader.tensors[keys[0]]
            n = spec.intermediate if spec.stacked else 1
            if meta:
                tensor = torch.empty((n, *info.shape[1:]), dtype=info.dtype, device="meta")
            else:
                coded = target.name in self._coded
                read = self.reader.read_elements if coded else self.reader.read
                tensor = read(keys[0], expert * n, (expert + 1) * n)
            sources[pattern] = [tensor]
        return sources


def left_out(weights: Weights) -> Iterator[str]:
    """Say in one line which tensors of a checkpoint its model does not take, and their size.

    Each stands under the first part of its name that nothing which is taken begins with, such as
    a vision tower's. Frequencies of rotary embeddings are computed anew and not worth a word.
    """
    infos = [info for info in weights.left_out if not info.key.endswith("inv_freq")]
    if not infos:
        return
    left = {info.key for info in weights.left_out}
    known = {p for key in weights.names() if key not in left for p in _prefixes(key)}
    first = [next(p for p in _prefixes(info.key) if p not in known) for info in infos]
    alike = Counter(re.sub(r"\d+", "*", name) for name in dict.fromkeys(first))
    starred = [re.sub(r"\d+", "*", name) for name in first]
    names = Counter(
        many if alike[many] > 1 else name for name, many in zip(first, starred, strict=True)
    )
    listed = [f"{name} ({count})" if count > 1 else name for name, count in names.items()]
    size = enough_in_words(sum(info.nbytes for info in infos))
    many = "tensors" if len(infos) > 1 else "tensor"
    yield f"not used: {len(infos)} {many}, {size}, which the model does not take: {few(listed)}"


def _prefixes(key: str) -> Iterator[str]:
    """Yield a name's first part, its first two parts, ..., and the name."""
    yield from (key[:at] for at, letter in enumerate(key) if letter == ".")
    yield key


def _missing(name: str, shape: Any) -> CheckpointError:
    return CheckpointError(f"the checkpoint has no tensor for {name} {list(shape)}", hint=_CHECK)
