"""The weights of a GGUF file as :class:`hybrid.weights.weight_map.Weights`.

What a format of ours holds exactly is copied block by block; other types are quantized anew.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hybrid.anatomy.experts import ExpertsSpec
from hybrid.errors import CheckpointError
from hybrid.gguf.header import GgufHeader, GgufTensor
from hybrid.gguf.stored import LARGER, PLAIN, experts_of, stored_as
from hybrid.gguf.tensors import ExpertTensors, Weight, WeightFile
from hybrid.weights.blocks import Blocks, Rows
from hybrid.weights.tally import Tally
from hybrid.weights.weight_map import PIECE_BYTES, PIECE_ROWS, Target

#: Types of single values, as torch has them.
_DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class GgufInfo:
    """What is known of a tensor of the model before it is read."""

    key: str
    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int


class GgufReader:
    """The tensors of a model, by the model's names, read of a GGUF file."""

    def __init__(self, file: WeightFile, weights: Mapping[str, Weight], tally: Tally) -> None:
        self._file, self._weights, self._tally = file, weights, tally
        self.tensors = {name: _info(weight) for name, weight in weights.items()}

    def read(self, key: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Read ``start:stop`` of a tensor's first dimension (all by default)."""
        weight = self._weights[key]
        stop = weight.shape[0] if stop is None else stop
        inner = int(torch.Size(weight.shape[1:-1]).numel()) if len(weight.shape) > 1 else 1
        if len(weight.shape) == 1:
            return self.read_matrix_rows(key, 0, 1).reshape(-1)[start:stop]
        rows = self.read_matrix_rows(key, start * inner, stop * inner)
        return rows.reshape(stop - start, *weight.shape[1:])

    def read_matrix_rows(self, key: str, start: int, stop: int) -> Tensor:
        """Read rows ``start:stop`` of a tensor seen as a matrix of its last dimension."""
        values = torch.from_numpy(self._file.rows(self._weights[key], start, stop))
        return values.view(self.tensors[key].dtype)

    def read_blocks(self, key: str, start: int, stop: int) -> Blocks | None:
        """Return the same as blocks of the file; None where they have to be computed."""
        weight = self._weights[key]
        if weight.undo is not None:
            return None
        return Blocks(weight.sources[0], self._file.blocks(weight, start, stop), self._tally)


class GgufWeights:
    """The weights of a model, of a GGUF file.

    Parameters
    ----------
    file
        Read here, and closed by whoever opened it.
    model
        The model on the meta device.
    specs
        Its experts.

    Attributes
    ----------
    dense
        What is not experts', by name.
    shared
        Tensors that are others' under a second name, and those.
    expert_formats
        What the experts of each layer with some are kept in, gate and up and down.
    left_out
        Tensors of the file that the model does not take.
    tally
        What becomes of weights that no format holds as they are.

    Raises
    ------
    CheckpointError
        When a tensor is missing or of another size.
    """

    def __init__(self, file: WeightFile, model: Any, specs: list[ExpertsSpec]) -> None:
        self.file = file
        self.tally = Tally()
        file.check_scales()
        owned = tuple(f"{spec.path}." for spec in specs)
        wanted = {
            name: tensor
            for name, tensor in model.state_dict().items()
            if not name.startswith(owned)
        }
        found = {name: file.find(name, tensor.shape) for name, tensor in wanted.items()}
        self.shared: dict[str, str] = model.all_tied_weights_keys
        optional = [*(model._keys_to_ignore_on_load_missing or []), "_extra_state$"]
        for name, weight in found.items():
            left = weight is None and name not in self.shared
            if left and not any(re.search(pattern, name) for pattern in optional):
                raise _missing(file.header, name, wanted[name].shape)
        weights = {name: weight for name, weight in found.items() if weight is not None}
        self.weights = weights
        self.reader = GgufReader(file, weights, self.tally)
        self.dense = {
            name: Target(name, None, {name: [name]}, {name: wanted[name]}) for name in weights
        }
        self.experts = {
            spec.path: file.experts(_layer(spec.path), gated=spec.gated, bias=spec.bias)
            for spec in specs
        }
        for spec in specs:
            _check_experts(self.experts[spec.path], spec, file.header)
        formats = (experts_of(file.header, _layer(spec.path)) for spec in specs)
        self.expert_formats = tuple(each for each in formats if each is not None)
        self.left_out = file.left_out()

    def names(self) -> Iterable[str]:
        """Return the names of all tensors that the file has."""
        return self.file.header.tensors.keys()

    def read_dense(self, target: Target) -> dict[str, Tensor]:
        """Return the model tensor that a dense target makes."""
        return {target.name: self.reader.read(target.name)}

    def read_coded(self, target: Target, name: str) -> None:
        """Return nothing: files hold blocks, not elements."""

    def read_biases(self, spec: ExpertsSpec, expert: int) -> tuple[list[Tensor], Tensor]:
        """Return one expert's biases: those of gate (if gated) and up, and that of down."""
        *up, down = (
            torch.from_numpy(self.file.expert_bias(tensor, expert))
            for tensor in self.experts[spec.path].biases
        )
        return up, down

    def read_up(self, spec: ExpertsSpec, expert: int) -> Iterator[list[Rows]]:
        """Yield one expert's gate (if gated) and up, some rows at a time."""
        tensors = self.experts[spec.path]
        sides = [side for side in (tensors.gate, tensors.up) if side is not None]
        for start, stop in _pieces(sides, spec.intermediate):
            yield [self._rows(side, expert, start, stop) for side in sides]

    def read_down(self, spec: ExpertsSpec, expert: int) -> Iterator[Rows]:
        """Yield one expert's down, some rows at a time."""
        down = self.experts[spec.path].down
        for start, stop in _pieces([down], spec.hidden):
            yield self._rows(down, expert, start, stop)

    def _rows(self, tensor: GgufTensor, expert: int, start: int, stop: int) -> Rows:
        raw = self.file.expert_blocks(tensor, expert, start, stop)
        return Blocks(tensor, raw, self.tally)


def dense_formats(weights: GgufWeights, matrices: Mapping[str, tuple[int, int]]) -> dict[str, str]:
    """Return the format of each of a model's matrices that has blocks in the file."""
    found = {}
    for path in matrices:
        weight = weights.weights.get(weights.shared.get(f"{path}.weight", f"{path}.weight"))
        if weight is not None and (fmt := stored_as(weight.sources[0].type)) is not None:
            found[path] = fmt if weight.exact_type else LARGER
    return found


def most_common(layers: Iterable[tuple[str, str]]) -> str:
    """Return the format that most layers' gate and up have."""
    return Counter(up for up, _ in layers).most_common(1)[0][0]


def requantized(
    weights: GgufWeights, layers: Iterable[tuple[str, str]], dense: Mapping[str, str]
) -> dict[tuple[str, str], None]:
    """Return types of a file that are not kept as they are, and their formats, where nobody asked.

    Parameters
    ----------
    layers, dense
        Formats that were chosen; none where a user chose.
    """
    changed: dict[tuple[str, str], None] = {}
    for tensors, (above, below) in zip(weights.experts.values(), layers, strict=False):
        for tensor, fmt in ((tensors.gate, above), (tensors.up, above), (tensors.down, below)):
            if tensor is not None and tensor.type.name not in (fmt, *PLAIN):
                changed[tensor.type.name, fmt] = None
    for path, fmt in dense.items():
        weight = weights.weights.get(f"{path}.weight")
        if weight is not None and weight.exact_type != fmt:
            old = weight.sources[0].type.name + ("" if weight.exact_type else ", transposed,")
            changed[old, fmt] = None
    return changed


def _info(weight: Weight) -> GgufInfo:
    plain = _DTYPES.get(weight.exact_type or "", torch.float32)
    nbytes = sum(source.nbytes for source in weight.sources)
    return GgufInfo(weight.name, weight.sources[0].path, plain, weight.shape, nbytes)


def _layer(path: str) -> int:
    """Return the number of the layer that a module lies in."""
    return int(next(part for part in path.split(".") if part.isdigit()))


def _pieces(tensors: list[GgufTensor], rows: int) -> list[tuple[int, int]]:
    """Split one expert's rows so that a piece takes about ``PIECE_BYTES``."""
    size = sum(tensor.row_bytes for tensor in tensors) * rows
    if size <= PIECE_BYTES:
        return [(0, rows)]
    step = max(PIECE_ROWS, rows * PIECE_BYTES // size // PIECE_ROWS * PIECE_ROWS)
    return [(start, min(rows, start + step)) for start in range(0, rows, step)]


def _check_experts(found: ExpertTensors, spec: ExpertsSpec, header: GgufHeader) -> None:
    up, down = (spec.experts, spec.intermediate, spec.hidden), (spec.experts, spec.hidden)
    wanted = [(found.gate, up), (found.up, up), (found.down, (*down, spec.intermediate))]
    for tensor, shape in wanted:
        if tensor is not None and tensor.shape != shape:
            raise CheckpointError(
                f"{header.path}: {tensor.name} is {list(tensor.shape)}, its metadata say "
                f"{list(shape)}",
                hint="download the file again",
            )


def _missing(header: GgufHeader, name: str, shape: Any) -> CheckpointError:
    return CheckpointError(
        f"{header.path} has no tensor for {name} {list(shape)}",
        hint="download the file again, or one that another publisher made",
    )
