"""What an error of each input of a matrix counts for: the mean squares of the inputs, of a file.

The file is llama.cpp's importance matrix in GGUF: for every matrix, under its name in GGUF, the
sums of squares of each input (``.in_sum2``, for experts a row each) and how many inputs were seen
(``.counts``). Matrices that llama.cpp has no name for stand under their own.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np

from hybrid.anatomy.experts import ExpertsSpec
from hybrid.errors import CheckpointError
from hybrid.formats.strips import F32
from hybrid.gguf.header import read_gguf
from hybrid.weights.source_files import few

_SUMS, _COUNTS = ".in_sum2", ".counts"
_AGAIN = "make it again: 'hybrid convert MODEL --collect-importance TEXT --imatrix FILE'"
#: What llama.cpp calls the matrices outside the experts, by the end of a module's path.
_IN_GGUF = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
}


@dataclass(frozen=True)
class Entry:
    """Of one matrix, or of all of a layer's experts.

    Attributes
    ----------
    sums
        Sums of squares of each input, ``[E, K]`` float32; E is 1 outside the experts.
    counts
        Inputs that were seen, ``[E]``.
    """

    sums: F32
    counts: F32

    def means(self, expert: int = 0) -> F32 | None:
        """Mean squares ``[K]``; None where nothing was seen."""
        seen = float(self.counts[expert])
        return self.sums[expert] / np.float32(seen) if seen > 0 else None


class Importance:
    """An importance matrix.

    Parameters
    ----------
    entries
        By the names that they have in a file.
    path
        Of the file.
    digest
        What tells it from others.
    """

    def __init__(self, entries: Mapping[str, Entry], path: Path, digest: str) -> None:
        self.entries, self.path, self.digest = entries, path, digest

    @classmethod
    def read(cls, path: Path) -> Importance:
        """Read a file.

        Raises
        ------
        CheckpointError
            When it is missing, damaged, or something else.
        """
        header = read_gguf(path)
        kind = header.metadata.get("general.type")
        if kind != "imatrix":
            raise CheckpointError(
                f"{path} is no importance matrix: its general.type is {kind!r}, not 'imatrix'",
                hint=_AGAIN,
            )
        entries = {}
        for name in header.tensors:
            if not name.endswith(_SUMS):
                continue
            stem = name.removesuffix(_SUMS)
            if f"{stem}{_COUNTS}" not in header.tensors:
                raise CheckpointError(f"{path} has {name} without its counts", hint=_AGAIN)
            sums = header.read_floats(name)
            sums = sums.reshape(-1, sums.shape[-1])
            counts = header.read_floats(f"{stem}{_COUNTS}").reshape(-1)
            if len(counts) != len(sums) or not (np.isfinite(sums).all() and (sums >= 0).all()):
                raise CheckpointError(
                    f"{path}: {stem} has {len(sums)} rows of sums and {len(counts)} counts, or a "
                    "sum that cannot be",
                    hint=_AGAIN,
                )
            entries[stem] = Entry(sums, counts)
        return cls(entries, path, hashlib.sha256(path.read_bytes()).hexdigest()[:16])

    def of_expert(self, spec: ExpertsSpec, part: str, expert: int) -> F32 | None:
        """Return the importances of the inputs of an expert's ``gate``, ``up`` or ``down``."""
        name = name_of_experts(spec.path, part)
        cols = spec.intermediate if part == "down" else spec.hidden
        return self._found(name, expert, spec.experts, cols)

    def of_matrix(self, path: str, cols: int) -> F32 | None:
        """Return the importances of the inputs of a matrix outside the experts."""
        return self._found(name_of(path), 0, 1, cols)

    def _found(self, name: str, row: int, rows: int, cols: int) -> F32 | None:
        entry = self.entries.get(name)
        if entry is None:
            return None
        if entry.sums.shape != (rows, cols):
            raise CheckpointError(
                f"{self.path}: {name} is {list(entry.sums.shape)}, the model takes {[rows, cols]}",
                hint="it was made of another model",
            )
        return entry.means(row)

    def missing(self, specs: Iterable[ExpertsSpec], matrices: Iterable[str]) -> Iterator[str]:
        """Say in one line which of the matrices that are quantized it has nothing of."""
        parts = ("gate", "up", "down")
        wanted = [name_of_experts(spec.path, p) for spec in specs for p in parts[not spec.gated :]]
        wanted += [name_of(path) for path in matrices]
        without = [name for name in wanted if name not in self.entries]
        if without:
            yield f"{self.path} has nothing of {len(without)} matrices: {few(without)}"


def name_of(path: str) -> str:
    """Return what a matrix outside the experts is called in a file, by its module's path."""
    if path == "lm_head":
        return "output.weight"
    found = re.fullmatch(r"(?:model\.)?(?:\w+\.)?layers\.(\d+)\.(.+)", path)
    if found is not None and found[2] in _IN_GGUF:
        return f"blk.{found[1]}.{_IN_GGUF[found[2]]}.weight"
    return f"{path}.weight"


def name_of_experts(path: str, part: str) -> str:
    """Return what all experts' ``gate``, ``up`` or ``down`` of a layer are called in a file."""
    layer = next(part for part in path.split(".") if part.isdigit())
    return f"blk.{layer}.ffn_{part}_exps.weight"


def write_importance(
    path: Path, entries: Mapping[str, Entry], *, text: str, chunks: int, chunk: int
) -> None:
    """Write a file as llama.cpp has it.

    Parameters
    ----------
    text
        What the inputs were of.
    chunks, chunk
        How many pieces of text there were, and tokens of each.
    """
    writer = gguf.GGUFWriter(path, "imatrix")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", [text])
    writer.add_uint32("imatrix.chunk_count", chunks)
    writer.add_uint32("imatrix.chunk_size", chunk)
    for name, entry in sorted(entries.items()):
        writer.add_tensor(f"{name}{_SUMS}", np.ascontiguousarray(entry.sums, np.float32))
        counts = np.ascontiguousarray(entry.counts, np.float32)[:, None]
        writer.add_tensor(f"{name}{_COUNTS}", counts)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
