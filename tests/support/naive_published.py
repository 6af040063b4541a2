"""Quantizes and packs matrices as publishers do, and says what their tensors stand for.

Written after the packing (not the reading) side of each publisher's code: compressed-tensors
``pack_to_int32`` and ``pack_fp4_to_uint8``, AutoAWQ's ``WQLinear_GEMM.from_linear``, AutoGPTQ's
``QuantLinear.pack``, ModelOpt's ``NVFP4QTensor``, bitsandbytes' ``quantize_4bit``.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch

Parts = dict[str, torch.Tensor]
FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
NF4 = np.array(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
     -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
     0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
     0.7229568362236023, 1.0], np.float32,
)  # fmt: skip


def grouped(
    w: np.ndarray, size: int, bits: int, symmetric: bool, dtype: torch.dtype, order: Any = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Codes from 0 on ``[N, K]``, scales and zeros ``[N, G]``, and what these stand for."""
    rows, cols = w.shape
    size = cols if size == -1 else size
    order = np.arange(cols) // size if order is None else order
    top, groups = 2**bits - 1, cols // size
    scales = np.zeros((rows, groups), np.float32)
    zeros = np.full((rows, groups), 2 ** (bits - 1))
    for g in range(groups):
        part = w[:, order == g]
        low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
        if symmetric:
            scales[:, g] = 2 * np.maximum(-low, high) / top
        else:
            scales[:, g] = (high - low) / top
        scales[:, g] = torch.from_numpy(scales[:, g]).to(dtype).float().numpy()
        if not symmetric:
            zeros[:, g] = np.clip(np.rint(-low / scales[:, g]), 0, top)
    codes = np.clip(np.rint(w / scales[:, order]) + zeros[:, order], 0, top).astype(np.int64)
    meant = scales[:, order] * (codes - zeros[:, order]).astype(np.float32)
    return codes, scales, zeros, meant


def words(codes: np.ndarray, bits: int) -> torch.Tensor:
    """Neighbouring codes of a row in a word, the first in its lowest bits."""
    per = 32 // bits
    padded = np.pad(codes, ((0, 0), (0, -codes.shape[1] % per))).astype(np.uint32)
    out = np.zeros((len(codes), padded.shape[1] // per), np.uint32)
    for i in range(per):
        out |= padded[:, i::per] << np.uint32(bits * i)
    return torch.from_numpy(out.view(np.int32))


def compressed(
    w: np.ndarray, size: int, *, bits: int = 4, symmetric: bool = True, order: Any = None,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[Parts, np.ndarray]:  # fmt: skip
    """compressed-tensors' pack-quantized."""
    codes, scales, zeros, meant = grouped(w, size, bits, symmetric, dtype, order)
    parts = {
        "weight_packed": words(codes, bits),
        "weight_scale": torch.from_numpy(scales).to(dtype),
        "weight_shape": torch.tensor(w.shape),
    }
    if not symmetric:
        parts["weight_zero_point"] = words(zeros.T, bits).T.contiguous()
    if order is not None:
        parts["weight_g_idx"] = torch.from_numpy(order.astype(np.int32))
    return parts, meant


def compressed_bytes(w: np.ndarray) -> tuple[Parts, np.ndarray]:
    """compressed-tensors' int-quantized: a scale of every row."""
    codes, scales, _, meant = grouped(w, -1, 8, True, torch.bfloat16)
    weight = torch.from_numpy((codes - 128).astype(np.int8))
    return {"weight": weight, "weight_scale": torch.from_numpy(scales).bfloat16()}, meant


def awq(w: np.ndarray, size: int) -> tuple[Parts, np.ndarray]:
    """AutoAWQ's gemm layout."""
    codes, scales, zeros, meant = grouped(w, size, 4, False, torch.float16)
    out = []
    for matrix in (codes.T, zeros.T):
        packed = np.zeros((len(matrix), matrix.shape[1] // 8), np.uint32)
        for i, column in enumerate(AWQ_ORDER):
            packed |= matrix[:, column::8].astype(np.uint32) << np.uint32(4 * i)
        out.append(torch.from_numpy(packed.view(np.int32)))
    half = torch.from_numpy(np.ascontiguousarray(scales.T)).half()
    return {"qweight": out[0], "qzeros": out[1], "scales": half}, meant


def gptq(
    w: np.ndarray, size: int, *, bits: int = 4, symmetric: bool = True, less: int = 1,
    order: Any = None,
) -> tuple[Parts, np.ndarray]:  # fmt: skip
    """AutoGPTQ's layout; ``less`` is what zeros are stored less: 1, and 0 in gptq_v2."""
    codes, scales, zeros, meant = grouped(w, size, bits, symmetric, torch.float16, order)
    if less:  # what is stored has to be 0 or more
        zeros = np.maximum(zeros, 1)
        order_ = np.arange(w.shape[1]) // size if order is None else order
        meant = scales[:, order_] * (codes - zeros[:, order_]).astype(np.float32)
    return {
        "qweight": words(codes, bits).T.contiguous(),
        "qzeros": words(zeros.T - less, bits),
        "scales": torch.from_numpy(np.ascontiguousarray(scales.T)).half(),
        "g_idx": torch.from_numpy(
            (np.arange(w.shape[1]) // size if order is None else order).astype(np.int32)
        ),
    }, meant


def _nearest4(x: np.ndarray) -> np.ndarray:
    return np.abs(x[..., None] - FP4).argmin(-1).astype(np.uint8)


def _floats4(w: np.ndarray, size: int, scales: np.ndarray) -> tuple[torch.Tensor, np.ndarray]:
    codes = _nearest4(w / np.repeat(scales, size, axis=1))
    packed = torch.from_numpy(codes[:, 0::2] | codes[:, 1::2] << 4)
    return packed, np.repeat(scales, size, axis=1) * FP4[codes]


def nvfp4(w: np.ndarray, *, modelopt: bool) -> tuple[Parts, np.ndarray]:
    """NVFP4: of ModelOpt, whose second scale multiplies, or compressed-tensors', which divides."""
    largest = np.abs(w.reshape(len(w), -1, 16)).max(-1)
    factor = np.float32(np.abs(w).max() / (6 * 448))
    if not modelopt:
        factor = np.float32(1) / np.float32(1 / factor)
    eight = torch.from_numpy(largest / 6 / factor).to(torch.float8_e4m3fn)
    packed, meant = _floats4(w, 16, eight.float().numpy() * factor)
    if modelopt:
        return {
            "weight": packed,
            "weight_scale": eight,
            "weight_scale_2": torch.tensor(factor),
            "input_scale": torch.tensor(0.1),
        }, meant
    divisor = torch.tensor([1 / factor])
    return {"weight_packed": packed, "weight_scale": eight, "weight_global_scale": divisor}, meant


def mxfp4(w: np.ndarray) -> tuple[Parts, np.ndarray]:
    """compressed-tensors' mxfp4-pack-quantized."""
    largest = np.abs(w.reshape(len(w), -1, 32)).max(-1)
    powers = np.floor(np.log2(largest)) - 2
    packed, meant = _floats4(w, 32, (2.0**powers).astype(np.float32))
    scale = torch.from_numpy((powers + 127).astype(np.uint8))
    return {"weight_packed": packed, "weight_scale": scale}, meant


def fp8(w: np.ndarray, share: str) -> tuple[Parts, np.ndarray]:
    """Floats of 8 bits with a scale of the matrix, its rows, or blocks of 128."""
    rows, cols = w.shape
    if share == "tensor":
        scales, wide = np.float32(np.abs(w).max() / 448).reshape(1), None
        wide = np.full(w.shape, scales[0])
    elif share == "row":
        scales = np.abs(w).max(1, keepdims=True) / np.float32(448)
        wide = np.broadcast_to(scales, w.shape)
    else:
        high, across = -(-rows // 128), -(-cols // 128)
        scales = np.zeros((high, across), np.float32)
        for i in range(high):
            for j in range(across):
                block = w[128 * i : 128 * i + 128, 128 * j : 128 * j + 128]
                scales[i, j] = np.abs(block).max() / 448
        wide = np.repeat(np.repeat(scales, 128, 0), 128, 1)[:rows, :cols]
    eight = torch.from_numpy(w / wide).to(torch.float8_e4m3fn)
    meant = eight.float().numpy() * wide
    return {"weight": eight, "weight_scale": torch.from_numpy(scales.astype(np.float32))}, meant


def nf4(w: np.ndarray, *, nested: bool) -> tuple[Parts, np.ndarray]:
    """bitsandbytes' nf4 in blocks of 64; ``nested``: their largest values have 8 bits."""
    blocks = w.reshape(-1, 64)
    largest = np.abs(blocks).max(1)
    state: dict[str, Any] = {
        "quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": list(w.shape),
    }  # fmt: skip
    parts: Parts = {"weight.quant_map": torch.from_numpy(NF4.copy())}
    if nested:
        offset = np.float32(largest.mean())
        table = np.sort(np.random.default_rng(0).uniform(-1, 1, 256)).astype(np.float32)
        outer = np.array(
            [np.abs(largest[i : i + 256] - offset).max() for i in range(0, len(largest), 256)],
            np.float32,
        )
        own = np.repeat(outer, 256)[: len(largest)]
        kept = np.abs((largest - offset)[:, None] / own[:, None] - table).argmin(1)
        largest = table[kept] * own + offset
        state |= {"nested_blocksize": 256, "nested_offset": float(offset)}
        parts["weight.absmax"] = torch.from_numpy(kept.astype(np.uint8))
        parts["weight.nested_absmax"] = torch.from_numpy(outer)
        parts["weight.nested_quant_map"] = torch.from_numpy(table.copy())
    else:
        parts["weight.absmax"] = torch.from_numpy(largest)
    parts_of = blocks[..., None] / largest[:, None, None]
    picked = np.abs(parts_of - NF4).argmin(-1).astype(np.uint8).reshape(-1)
    parts["weight"] = torch.from_numpy(picked[0::2] << 4 | picked[1::2])[:, None]
    raw = json.dumps(state).encode()
    parts["weight.quant_state.bitsandbytes__nf4"] = torch.tensor(list(raw), dtype=torch.uint8)
    meant = (NF4[picked].reshape(-1, 64) * largest[:, None]).reshape(w.shape)
    return parts, meant.astype(np.float32)
