"""Runs matrices outside the experts in packed form: linear layers, embeddings, gated MLPs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cpu_experts.ffn import linear
from gpu_experts.reference import gated
from hybrid.anatomy.experts import ExpertsSpec, recognise_gating
from hybrid.anatomy.names import MLP_PROJECTIONS
from hybrid.errors import UnsupportedModelError, UsageError
from hybrid.formats.block import Block, unpack_expert
from hybrid.formats.matrix import packed_bytes, unpack, unpack_rows
from hybrid.formats.registry import packs_dense
from hybrid.formats.strips import GROUP, TILE
from hybrid.grafts import (
    bring_back,
    put_module,
    set_tied_weights,
    stood_for,
    tie_again,
    untie,
)
from hybrid.packed.bf16_products import multiply
from hybrid.packed.experts import BareLayer, add_on_cpu
from hybrid.packed.first_measure import least_tokens
from hybrid.packed.gradients import in_torch, product, run_expert
from hybrid.weights.huge_pages import PAGE_BYTES, large_pages

#: Memory that is taken at a time for dense weights, and what each of them starts on.
_CHUNK_BYTES = 32 * PAGE_BYTES
_LINE_BYTES = 64
#: Rows of an embedding that are kept as numbers: unpacking one takes longer than a small layer.
_RECENT = 1024


class Arena:
    """Memory in large pages for tensors that live as long as their model."""

    def __init__(self) -> None:
        self._chunk = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def move(self, tensor: Tensor) -> None:
        """Move the content of a CPU tensor here; the tensor object stays the same."""
        size = tensor.numel() * tensor.element_size()
        if size == 0:
            return
        if self._used + size > self._chunk.numel():
            memory = large_pages(max(size, _CHUNK_BYTES))
            self._chunk = torch.frombuffer(memory, dtype=torch.uint8)
            self._used = 0
        place = self._chunk[self._used : self._used + size].view(tensor.dtype).view(tensor.shape)
        self._used += -(-size // _LINE_BYTES) * _LINE_BYTES
        with torch.no_grad():
            tensor.data = place.copy_(tensor)


class _Packed(nn.Module):
    """A matrix ``[rows, cols]`` in a quantized format, as one uint8 parameter."""

    def __init__(self, rows: int, cols: int, fmt: str) -> None:
        super().__init__()
        self.rows, self.cols, self.weight_format = rows, cols, fmt
        self.packed = nn.Parameter(
            torch.empty(packed_bytes(rows, cols, fmt), dtype=torch.uint8), requires_grad=False
        )
        self._is_hf_initialized = True

    def give_back(self) -> None:
        """Give the weights back to the module that this one stands for."""
        weight = stood_for(self).weight
        if weight.numel() == 0:  # a tied one has them by now
            weight.data = self.weight.to(weight.dtype)

    @property
    def weight(self) -> Tensor:
        """The matrix in float32, for the rare code that reaches for it; made anew each time."""
        return torch.from_numpy(unpack(self._bytes(), self.rows, self.cols, self.weight_format))

    def _bytes(self) -> Any:
        if self.packed.device.type != "cpu":
            raise UnsupportedModelError(
                f"dense weights in {self.weight_format} run on the CPU, they were moved to "
                f"{self.packed.device}",
                hint="convert with --dense bf16 to place dense weights on a GPU",
            )
        return self.packed.numpy()

    def extra_repr(self) -> str:
        return f"{self.rows} x {self.cols}, {self.weight_format}"


class QuantizedLinear(_Packed):
    """``nn.Linear`` on quantized weights, run by the experts' kernels."""

    bias: nn.Parameter | None

    def __init__(self, rows: int, cols: int, fmt: str, bias: nn.Parameter | None) -> None:
        super().__init__(rows, cols, fmt)
        self.in_features, self.out_features = cols, rows
        self.register_parameter("bias", bias)

    def ordinary(self, weight: nn.Parameter) -> nn.Linear:
        """Return a layer of torch's own with this one's weights, widened."""
        new = nn.Linear(self.cols, self.rows, bias=self.bias is not None, device="meta")
        new.weight = weight
        if self.bias is not None:
            new.bias = self.bias
        return new

    def forward(self, x: Tensor) -> Tensor:
        _check_no_gradients(self, x)
        if in_torch(self.training, x, self.bias):
            with torch.autocast("cpu", enabled=False):
                rows = x.reshape(-1, self.cols).float()
                y = product(rows, self._bytes(), self.rows, self.weight_format)
                y = y if self.bias is None else y + self.bias.float()
            return y.view(*x.shape[:-1], self.rows).to(x.dtype)
        flat = x.detach().reshape(-1, self.cols).float().contiguous()
        if _in_bf16(x, len(flat), self.weight_format):
            out = multiply(flat, self._bytes(), self.rows, self.weight_format)
            out = out if self.bias is None else out + self.bias.detach().float()
            return out.view(*x.shape[:-1], self.rows).to(x.dtype)
        out = torch.empty(flat.shape[0], self.rows)
        bias = None if self.bias is None else self.bias.detach().float().numpy()
        linear(flat.numpy(), self._bytes(), self.weight_format, bias, out.numpy())
        return out.view(*x.shape[:-1], self.rows).to(x.dtype)


class QuantizedEmbedding(_Packed):
    """``nn.Embedding`` whose rows are dequantized when they are looked up.

    Parameters
    ----------
    scale
        Multiplies every row; families that have one round it to ``dtype``, as is done here.
    """

    def __init__(
        self, rows: int, cols: int, fmt: str, dtype: torch.dtype, scale: float = 1.0
    ) -> None:
        super().__init__(rows, cols, fmt)
        self.num_embeddings, self.embedding_dim, self.dtype = rows, cols, dtype
        self.scale = scale
        self._recent: dict[int, Tensor] = {}
        self._read_from: tuple[Any, ...] = ()

    def ordinary(self, weight: nn.Parameter) -> nn.Embedding:
        """Return an embedding of torch's own with this one's weights, widened."""
        new = nn.Embedding(self.rows, self.cols, device="meta")
        new.weight = weight
        return new

    def forward(self, ids: Tensor) -> Tensor:
        return self._single(ids) if ids.numel() == 1 else self._rows(ids)

    def _single(self, ids: Tensor) -> Tensor:
        """A token's row: most of a text's tokens have been in it before, and are kept."""
        packed = self.packed
        version = 0 if packed.is_inference() else packed._version
        read_from = packed.data_ptr(), version, self.dtype, self.scale
        if read_from != self._read_from:
            self._recent, self._read_from = {}, read_from
        token = int(ids)
        found = self._recent.get(token)
        if found is None:
            found = self._rows(ids.reshape(-1))
            if len(self._recent) >= _RECENT:
                self._recent.pop(next(iter(self._recent)), None)
            self._recent[token] = found
        return found.clone().view(*ids.shape, self.cols)

    def _rows(self, ids: Tensor) -> Tensor:
        wanted = ids.reshape(-1).numpy()
        if wanted.size and not 0 <= wanted.min() <= wanted.max() < self.rows:
            raise IndexError(f"token ids must be in [0, {self.rows}), got {wanted.tolist()}")
        chosen = unpack_rows(self._bytes(), self.cols, self.weight_format, wanted)
        found = torch.from_numpy(chosen).to(self.dtype).view(*ids.shape, self.cols)
        return found if self.scale == 1.0 else found * torch.tensor(self.scale).to(self.dtype)


class PackedMlp(nn.Module):
    """A gated MLP as one expert's block, run by the experts' kernels."""

    def __init__(self, block: Tensor, shape: Block) -> None:
        super().__init__()
        self.shape = shape
        self.block = nn.Parameter(block, requires_grad=False)

    def give_back(self) -> None:
        """Give the weights back to the MLP that this one stands for."""
        parts = unpack_expert(self.shape, self.block.numpy())
        for name in ("gate", "up", "down"):
            weight = getattr(stood_for(self), f"{name}_proj").weight
            weight.data = torch.from_numpy(getattr(parts, name)).to(weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        _check_no_gradients(self, x)
        if in_torch(self.training, x):
            with torch.autocast("cpu", enabled=False):
                rows = x.reshape(-1, self.shape.hidden).float()
                y = run_expert(self.block.numpy(), rows, self.shape, partial(gated, self.shape))
            return y.view(x.shape).to(x.dtype)
        flat = x.detach().reshape(-1, self.shape.hidden).float().contiguous()
        ids = torch.zeros(len(flat), 1, dtype=torch.int64)
        out = torch.zeros_like(flat)
        layer = BareLayer(self.block.numpy()[None], self.shape)
        if _in_bf16(x, len(flat), *self.shape.formats):
            layer = replace(layer, panels_from=1)
        add_on_cpu(flat.numpy(), ids.numpy(), torch.ones(ids.shape).numpy(), layer, out.numpy())
        return out.view(x.shape).to(x.dtype)


def _in_bf16(x: Tensor, tokens: int, *formats: str) -> bool:
    """Whether products in bfloat16 are right and the faster ones for so many tokens."""
    if tokens < 2 or x.dtype != torch.bfloat16:
        return False
    least = least_tokens(*formats)
    return least is not None and tokens >= least


def _check_no_gradients(module: nn.Module, x: Tensor) -> None:
    """Refuse to cut the gradients off where an ordinary module would have passed them on."""
    old = stood_for(module)
    if old is not None and torch.is_grad_enabled() and x.requires_grad:
        raise UsageError(
            f"gradients cannot pass through {type(module).__name__}, which stands for a "
            f"{type(old).__name__} as long as the fast path is in use",
            hint="call the whole model, which brings the ordinary modules back, or "
            "model.hybrid_fast.release(model) first; texts need torch.no_grad()",
        )


def replace_modules(places: Iterable[tuple[Any, str, nn.Module]]) -> None:
    """Put packed modules in the places of others, until :func:`restore_dense`.

    An ordinary module stays the same object, parameters included, but its weights hold nothing
    meanwhile. One that is quantized has nothing to come back for. Weights are emptied when
    every new module stands, so that :func:`restore_dense` finds all of them after Ctrl-C, too.

    Parameters
    ----------
    places
        Owners, names and new modules; those that share weights belong in one call.
    """
    emptied: list[Any] = []
    for owner, name, new in places:
        old: nn.Module = getattr(owner, name)
        new.train(old.training)
        ordinary = [m for m in old.modules() if type(m) in (nn.Linear, nn.Embedding)]
        put_module(owner, name, new, back=bool(ordinary))
        emptied += ordinary
    for module in emptied:
        module.weight.data = torch.empty(0, dtype=module.weight.dtype)


def restore_dense(model: nn.Module) -> None:
    """Put the ordinary modules back that packed ones stand for; where none does, do nothing."""
    with torch.inference_mode(False), torch.no_grad():
        for owner in list(model.modules()):
            for name, child in list(owner.named_children()):
                if bring_back(owner, name):
                    tie_again(model, child)


def packed_size(linear: nn.Linear) -> int:
    """Return about how many bytes :func:`pack_linear` needs; a row speaks for the others."""
    row = linear.weight[:1].detach()
    short = torch.equal(row.bfloat16().to(row.dtype), row)
    return linear.weight.numel() * (2 if short else 4)


def pack_linear(linear: nn.Linear) -> QuantizedLinear:
    """Lay an ordinary linear layer's weights out for the kernels, without rounding them.

    As bfloat16 where that holds every one of them (they were stored so), as float32 elsewhere.
    """
    weight = linear.weight.detach()
    short = weight.bfloat16()
    exact = weight.dtype == torch.bfloat16 or torch.equal(short.to(weight.dtype), weight)
    values = short if exact else weight.float()
    rows, cols = weight.shape
    strips = nn.functional.pad(values, (0, 0, 0, -rows % TILE)).view(-1, TILE, cols)
    packed = strips.transpose(1, 2).contiguous().view(torch.uint8).reshape(-1)
    new = QuantizedLinear(rows, cols, "bf16" if exact else "f32", linear.bias)
    new.packed = nn.Parameter(packed, requires_grad=False)
    return new


def pack_tied(model: Any) -> None:
    """Pack an lm_head that shares its weights with the input embedding, for both."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if type(head) is not nn.Linear or type(embedding) is not nn.Embedding:
        return
    if head.weight.data_ptr() == embedding.weight.data_ptr():
        packed = pack_linear(head)
        new = QuantizedEmbedding(
            packed.rows, packed.cols, packed.weight_format, embedding.weight.dtype
        )
        new.packed = packed.packed
        places = []
        for old, module in ((head, packed), (embedding, new)):
            path = next(path for path, found in model.named_modules() if found is old)
            owner, _, name = path.rpartition(".")
            places.append((model.get_submodule(owner), name, module))
        replace_modules(places)
        untie(model, new)


def pack_mlp(mlp: Any) -> PackedMlp | None:
    """Return a gated MLP as one expert; None when the kernels have no such expert."""
    parts: list[Any] = []
    for name in MLP_PROJECTIONS:
        module = getattr(mlp, name, None)
        module = pack_linear(module) if type(module) is nn.Linear else module
        if type(module) is not QuantizedLinear:
            return None
        parts.append(module)
    gate, up, down = parts
    biases = [part.bias is not None for part in parts]
    if gate.weight_format != up.weight_format or any(biases) != all(biases):
        return None
    shape = Block(
        hidden=up.cols,
        intermediate=up.rows,
        format=up.weight_format,
        down_format=down.weight_format,
        bias=all(biases),
    )
    spec = ExpertsSpec(
        path="",
        module=mlp,
        experts=1,
        hidden=shape.hidden,
        intermediate=shape.intermediate,
        gated=True,
        bias=shape.bias,
        up=("gate_proj", "up_proj"),
        down="down_proj",
    )
    known = recognise_gating(spec, shape)
    if known is None:
        return None
    block = torch.zeros(known.block_bytes, dtype=torch.uint8)
    strips = [side.packed.view(-1, known.up_strip_bytes) for side in (gate, up)]
    sides = block[: known.up_bytes]
    for at, side in enumerate(strips):
        sides.view(-1, 2, known.up_strip_bytes)[: len(side), at] = side
    block[known.down_offset : known.down_offset + down.packed.numel()] = down.packed
    if known.bias:
        floats = block[known.bias_offset :].view(torch.float32)
        for at, part in enumerate((gate, up)):
            bias = nn.functional.pad(part.bias.float(), (0, -part.rows % GROUP))
            floats[: known.up_rows].view(-1, 2, TILE)[:, at] = bias.view(-1, TILE)
        floats[known.up_rows : known.up_rows + down.rows] = down.bias.float()
    return PackedMlp(block, known)


def install_dense(
    model: Any, matrices: Mapping[str, tuple[int, int]], formats: Mapping[str, str | None]
) -> None:
    """Replace the modules that a store's index lists by quantized ones, each of its format."""
    packed = {path: fmt for path, fmt in formats.items() if fmt is not None and packs_dense(fmt)}
    if not packed:
        return
    for path, fmt in packed.items():
        rows, cols = matrices[path]
        parent_path, _, name = path.rpartition(".")
        parent = model.get_submodule(parent_path)
        old = getattr(parent, name)
        new: nn.Module
        if isinstance(old, nn.Embedding):
            scale = float(getattr(old, "scalar_embed_scale", 1.0))
            new = QuantizedEmbedding(rows, cols, fmt, old.weight.dtype, scale)
        else:
            new = QuantizedLinear(rows, cols, fmt, old.bias)
        put_module(parent, name, new)
    tied = {
        _packed_name(target, packed): _packed_name(source, packed)
        for target, source in model.all_tied_weights_keys.items()
    }
    set_tied_weights(model, tied)


def _packed_name(name: str, packed: Mapping[str, str]) -> str:
    path = name.removesuffix(".weight")
    return f"{path}.packed" if path in packed else name
