"""Says which tensors of a GGUF file make each tensor of a model, and reads them.

Names are transformers' own, of the model's ``state_dict``. Where the file's writer did more to a
tensor than call it otherwise, that is undone: rows in another order, norms with 1 added, keys and
values of a compressed cache apart, ``A`` instead of its logarithm. All experts of a layer are one
tensor a matrix, ``[E, F, D]`` for gate and up and ``[E, D, F]`` for down.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from hybrid.errors import CheckpointError, UnsupportedModelError
from hybrid.gguf.architectures import Architecture
from hybrid.gguf.header import GgufHeader, GgufTensor

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]
I64 = NDArray[np.int64]
Made = Callable[..., NDArray[Any]]

_OUTSIDE = {
    "model.embed_tokens.weight": ("token_embd.weight",),
    "model.norm.weight": ("output_norm.weight",),
    "model.norm.bias": ("output_norm.bias",),
    "lm_head.weight": ("output.weight",),
    "lm_head.bias": ("output.bias",),
}
#: What layers call their parts, and what files do; of several the first that a file has.
_PARTS = {
    "input_layernorm": ("attn_norm",),
    "post_attention_layernorm": ("post_attention_norm", "ffn_norm"),
    "pre_feedforward_layernorm": ("ffn_norm",),
    "post_feedforward_layernorm": ("post_ffw_norm",),
    "self_attn.q_proj": ("attn_q",),
    "self_attn.k_proj": ("attn_k",),
    "self_attn.v_proj": ("attn_v",),
    "self_attn.o_proj": ("attn_output",),
    "self_attn.q_norm": ("attn_q_norm",),
    "self_attn.k_norm": ("attn_k_norm",),
    "self_attn.q_a_proj": ("attn_q_a",),
    "self_attn.q_a_layernorm": ("attn_q_a_norm",),
    "self_attn.q_b_proj": ("attn_q_b",),
    "self_attn.kv_a_proj_with_mqa": ("attn_kv_a_mqa",),
    "self_attn.kv_a_layernorm": ("attn_kv_a_norm",),
    "self_attn.kv_b_proj": ("attn_kv_b",),
    "mlp.gate_proj": ("ffn_gate",),
    "mlp.up_proj": ("ffn_up",),
    "mlp.down_proj": ("ffn_down",),
    "mlp.gate": ("ffn_gate_inp",),
    "mlp.router": ("ffn_gate_inp",),
    "block_sparse_moe.router": ("ffn_gate_inp",),
    "mlp.shared_expert_gate": ("ffn_gate_inp_shexp",),
    **{
        f"mlp.{owner}.{side}_proj": (f"ffn_{side}_shexp",)
        for owner in ("shared_expert", "shared_experts")
        for side in ("gate", "up", "down")
    },
    "shared_mlp.output_linear": ("ffn_down_shexp", "ffn_down"),
    "linear_attn.conv1d": ("ssm_conv1d",),
    "linear_attn.in_proj_ba": ("ssm_ba",),
    "linear_attn.norm": ("ssm_norm",),
    "linear_attn.out_proj": ("ssm_out",),
}
#: The same of tensors that have no ``.weight`` or ``.bias`` of their own in transformers.
_WHOLE = {
    "self_attn.sinks": "attn_sinks.weight",
    "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    "mlp.gate.moe_statics.e_score_correction_bias": "exp_probs_b.bias",
    "linear_attn.dt_bias": "ssm_dt.bias",
    "linear_attn.A_log": "ssm_a",
}
#: What files hold beside weights, and transformers computes of its config.
_COMPUTED = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


@dataclass(frozen=True)
class Weight:
    """A tensor of a model, and what makes it.

    Attributes
    ----------
    name, shape
        The model's.
    sources
        The file's.
    order
        Rows of the sources, counted through all of them, in the order that the model has them;
        None is as they are.
    undo
        Makes the tensor of the values of all sources; None where its rows are rows of theirs.
    """

    name: str
    shape: tuple[int, ...]
    sources: tuple[GgufTensor, ...]
    order: I64 | None = None
    undo: Made | None = None

    @property
    def exact_type(self) -> str | None:
        """The type whose blocks the tensor's rows are; None where they have to be computed."""
        return None if self.undo is not None else self.sources[0].type.name


@dataclass(frozen=True)
class ExpertTensors:
    """The experts of one layer as a file has them, and their biases where they have any."""

    gate: GgufTensor | None
    up: GgufTensor
    down: GgufTensor
    biases: tuple[GgufTensor, ...] = ()


class WeightFile:
    """The weights of a model's files; what is read is read when it is asked for, nothing mapped.

    Parameters
    ----------
    header
        Of the files.
    architecture
        Theirs.
    config
        The ``config.json`` that they stand for.
    """

    def __init__(
        self, header: GgufHeader, architecture: Architecture, config: dict[str, Any]
    ) -> None:
        self.header = header
        self._architecture = architecture
        self._config = config
        self._taken: set[str] = set(_COMPUTED)
        self._open: dict[Path, IO[bytes]] = {}

    def close(self) -> None:
        """Close the files."""
        for file in self._open.values():
            file.close()
        self._open.clear()

    # -- which tensors make what ------------------------------------------------------------

    def find(self, name: str, shape: Sequence[int]) -> Weight | None:
        """Return what makes a tensor of the model; None where the file has nothing for it.

        Raises
        ------
        CheckpointError
            When what it has is of another size.
        """
        weight = self._found(name, tuple(shape))
        if weight is None:
            return None
        self._taken.update(source.name for source in weight.sources)
        values = sum(source.rows * source.shape[-1] for source in weight.sources)
        if values != int(np.prod(shape)):
            listed = ", ".join(f"{one.name} {list(one.shape)}" for one in weight.sources)
            raise CheckpointError(
                f"{self.header.path}: {listed} is to be {name}, which is {list(shape)}",
                hint="the file's metadata are of another model: download it again",
            )
        return weight

    def experts(self, layer: int, *, gated: bool, bias: bool) -> ExpertTensors:
        """Return a layer's experts.

        Raises
        ------
        CheckpointError
            When some of them are missing.
        UnsupportedModelError
            When gate and up are one tensor, or every expert one of its own.
        """
        names = (("ffn_gate_exps",) if gated else ()) + ("ffn_up_exps", "ffn_down_exps")
        endings = ("weight", "bias") if bias else ("weight",)
        wanted = [f"blk.{layer}.{name}.{ending}" for ending in endings for name in names]
        tensors = self.header.tensors
        missing = [name for name in wanted if name not in tensors]
        if missing and {f"blk.{layer}.ffn_gate_up_exps.weight", f"blk.{layer}.ffn_up.0.weight"} & {
            *tensors
        }:
            raise UnsupportedModelError(
                f"{self.header.path} has experts in a form that is not read: no {missing[0]}",
                hint="make the file anew with a newer llama.cpp, without fused gate and up",
            )
        if missing:
            raise self._missing(missing[0])
        self._taken.update(wanted)
        found = [tensors[name] for name in wanted]
        gate, (up, down) = (found[0] if gated else None), found[gated : gated + 2]
        return ExpertTensors(gate, up, down, tuple(found[gated + 2 :]))

    def left_out(self) -> list[GgufTensor]:
        """Return the tensors that nothing was made of so far."""
        return [one for name, one in self.header.tensors.items() if name not in self._taken]

    def _missing(self, name: str) -> CheckpointError:
        return CheckpointError(
            f"{self.header.path} has no tensor {name}",
            hint="download the file again, or one that another publisher made",
        )

    def check_scales(self) -> None:
        """Refuse files whose weights have scales of their own beside them.

        Raises
        ------
        UnsupportedModelError
            Naming one.
        """
        tensors = self.header.tensors
        for name in tensors:
            if name.endswith(".scale") and f"{name.removesuffix('.scale')}.weight" in tensors:
                raise UnsupportedModelError(
                    f"{self.header.path} has {name}, a scale of a whole matrix, which is not read",
                    hint="download the model in another type, such as Q4_K_M",
                )

    def _found(self, name: str, shape: tuple[int, ...]) -> Weight | None:
        if name in _OUTSIDE:
            return self._plain(name, shape, _OUTSIDE[name])
        match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
        if match is None:
            return None
        block, part = f"blk.{match[1]}.", match[2]
        if part in _WHOLE:
            return self._plain(name, shape, (block + _WHOLE[part],))
        owner, _, ending = part.rpartition(".")
        if owner == "self_attn.kv_b_proj" and f"{block}attn_k_b.weight" in self.header.tensors:
            sources = self._sources(block, ("attn_k_b", "attn_v_b"))
            return Weight(name, shape, sources, undo=_join_kv)
        if owner == "shared_mlp.input_linear":
            sources = self._sources(block, ("ffn_gate_shexp", "ffn_up_shexp"))
            return _stacked(name, shape, sources, np.arange(shape[0]))
        if owner == "linear_attn.in_proj_qkvz":
            sources = self._sources(block, ("attn_qkv", "attn_gate"))
            return _stacked(name, shape, sources, self._by_head(shape[0]))
        known = tuple(f"{block}{each}.{ending}" for each in _PARTS.get(owner, ()))
        return self._plain(name, shape, known)

    def _plain(self, name: str, shape: tuple[int, ...], known: tuple[str, ...]) -> Weight | None:
        """A tensor that one of the file's makes."""
        there = next((one for one in known if one in self.header.tensors), None)
        if there is None:
            return None
        source = self.header.tensors[there]
        order, undo = None, None
        if self._architecture.permuted and there.endswith(("attn_q.weight", "attn_k.weight")):
            key = "num_attention_heads" if "attn_q" in there else "num_key_value_heads"
            order = _halves_first(shape[0], int(self._config[key]))
        elif there.endswith(".ssm_a"):
            undo = _log_of_negative
        elif self._shifted(name):
            undo = _without_one
        return Weight(name, shape, (source,), order, undo)

    def _shifted(self, name: str) -> bool:
        known = self._architecture
        return (
            known.shifted_norms
            and name.endswith("norm.weight")
            and not (known.unshifted and name.endswith(known.unshifted))
        )

    def _sources(self, block: str, parts: Sequence[str]) -> tuple[GgufTensor, ...]:
        """Return several tensors of a layer."""
        names = [f"{block}{part}.weight" for part in parts]
        missing = next((one for one in names if one not in self.header.tensors), None)
        if missing is not None:
            raise self._missing(missing)
        return tuple(self.header.tensors[one] for one in names)

    def _by_head(self, rows: int) -> I64:
        """Return where queries, keys, values and gates of every head of keys lie.

        The file has queries of all heads, keys of all heads, and so on.
        """
        heads = int(self._config["linear_num_key_heads"])
        keys = heads * int(self._config["linear_key_head_dim"])
        values = (rows - 2 * keys) // 2
        parts = np.split(np.arange(rows), np.cumsum((keys, keys, values)))
        return np.concatenate([part.reshape(heads, -1) for part in parts], axis=1).reshape(-1)

    # -- reading ----------------------------------------------------------------------------

    def rows(self, weight: Weight, start: int, stop: int) -> NDArray[Any]:
        """Return rows ``start:stop`` of a tensor seen as a matrix of its last dimension.

        float32, or what the file has where that is float16; bfloat16 as its bits, in int16.
        """
        if weight.undo is not None:
            return self.whole(weight).reshape(-1, weight.shape[-1])[start:stop]
        blocks = self.blocks(weight, start, stop)
        return decoded(weight.sources[0], blocks).reshape(stop - start, -1)

    def blocks(self, weight: Weight, start: int, stop: int) -> U8:
        """Return the same rows as the blocks of the file, ``[rows, bytes]``."""
        source = weight.sources[0]
        if weight.order is not None:
            return self._gathered(weight.sources, weight.order[start:stop])
        if source.shape[-1] != weight.shape[-1]:  # such as a vector that the model has as a row
            return self._read(source).reshape(int(np.prod(weight.shape[:-1])), -1)[start:stop]
        return self._read(source, start, stop)

    def _gathered(self, sources: Sequence[GgufTensor], order: I64) -> U8:
        """Read single rows of several tensors of one type, counted through all of them."""
        found = np.empty((len(order), sources[0].row_bytes), np.uint8)
        before = 0
        for source in sources:
            here = (order >= before) & (order < before + source.rows)
            if here.any():
                rows = order[here] - before
                first = int(rows.min())
                found[here] = self._read(source, first, int(rows.max()) + 1)[rows - first]
            before += source.rows
        return found

    def whole(self, weight: Weight) -> F32:
        """Return a tensor that has to be computed."""
        assert weight.undo is not None
        sources = [
            widened(source, self._read(source)).reshape(source.shape) for source in weight.sources
        ]
        made: F32 = np.ascontiguousarray(weight.undo(*sources), np.float32)
        return made.reshape(weight.shape)

    def expert_blocks(self, tensor: GgufTensor, expert: int, start: int, stop: int) -> U8:
        """Return rows of one expert's matrix, of a tensor ``[E, rows, cols]``, as blocks."""
        first = expert * tensor.shape[-2]
        return self._read(tensor, first + start, first + stop)

    def expert_bias(self, tensor: GgufTensor, expert: int) -> F32:
        """Return one expert's bias, of a tensor ``[E, rows]``."""
        values: F32 = widened(tensor, self._read(tensor, expert, expert + 1))[0]
        return values

    def _read(self, tensor: GgufTensor, start: int = 0, stop: int | None = None) -> U8:
        """Read rows ``start:stop`` of a tensor's blocks, ``[rows, bytes]``; all by default."""
        stop = tensor.rows if stop is None else stop
        size = (stop - start) * tensor.row_bytes
        try:
            if tensor.path not in self._open:
                self._open[tensor.path] = tensor.path.open("rb", buffering=0)
            file = self._open[tensor.path]
            file.seek(tensor.offset + start * tensor.row_bytes)
            data = np.fromfile(file, np.uint8, size)
        except OSError as error:
            raise CheckpointError(
                f"cannot read {tensor.path}: {error.strerror or error}",
                hint="check that it exists and that you may read it",
            ) from error
        if data.size != size:
            raise CheckpointError(
                f"{tensor.path} is cut short: {size} bytes of {tensor.name} are wanted, "
                f"{data.size} are there",
                hint="download the file again, or copy it again from where it came",
            )
        return data.reshape(stop - start, tensor.row_bytes)


def decoded(tensor: GgufTensor, blocks: U8) -> NDArray[Any]:
    """Return the values of rows of blocks; what has 16 bits a value keeps them."""
    flat = np.ascontiguousarray(blocks)
    if tensor.type.name == "f16":
        return flat.view(np.float16)
    if tensor.type.name == "bf16":
        return flat.view(np.int16)
    return widened(tensor, flat)


def widened(tensor: GgufTensor, blocks: U8) -> F32:
    """Return the values of rows of blocks in float32, by the ``gguf`` package's own arithmetic.

    Raises
    ------
    UnsupportedModelError
        When the installed ``gguf`` package has none for this type.
    """
    import gguf

    flat = np.ascontiguousarray(blocks)
    if tensor.type.name == "f32":
        return flat.view(np.float32)
    try:
        kind = gguf.GGMLQuantizationType[tensor.type.name.upper()]
        values: F32 = gguf.dequantize(flat, kind)
    except (KeyError, NotImplementedError) as error:
        raise UnsupportedModelError(
            f"{tensor.path}: {tensor.name} is {tensor.type.name}, which cannot be dequantized",
            hint="upgrade the gguf package, or download the file in another format",
        ) from error
    return values


def _stacked(
    name: str, shape: tuple[int, ...], sources: tuple[GgufTensor, ...], order: I64
) -> Weight:
    """A tensor of rows of several: rows as they are, where all are of one type."""
    if len({source.type for source in sources}) == 1:
        return Weight(name, shape, sources, order)
    return Weight(name, shape, sources, undo=lambda *values: np.concatenate(values)[order])


def _join_kv(keys: F32, values: F32) -> F32:
    """Join ``[heads, rank, nope]`` and ``[heads, value, rank]`` to rows of ``rank`` inputs."""
    joined = np.concatenate((keys.swapaxes(1, 2), values), axis=1)
    return joined.reshape(-1, joined.shape[-1])


def _halves_first(rows: int, heads: int) -> I64:
    """Return where the rows lie that turn with each other, of rows that are stored in pairs.

    llama.cpp turns neighbours of a head; transformers turns its first half with its second.
    """
    pairs = np.arange(rows).reshape(heads, -1, 2)
    return pairs.swapaxes(1, 2).reshape(-1)


def _without_one(values: F32) -> F32:
    return values - np.float32(1)


def _log_of_negative(values: F32) -> F32:
    return np.log(-values)
