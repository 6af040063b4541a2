"""Reads gated delta nets, of either way that families lay their projections out."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from cpu_experts.decoder.delta_layer import Delta, Places
from cpu_experts.decoder.matrices import Matrix, Norm
from hybrid.anatomy.samples import UnfitError, floats
from hybrid.fast.dense_parts import Packer, matrix_of, only
from hybrid.fast.packed_rows import packed_rows
from hybrid.formats.strips import F32, TILE


def read_delta(net: Any, packer: Packer) -> dict[str, Any]:
    """What a gated delta net is to a layer."""
    value_heads, key_dim, value_dim = net.num_v_heads, net.head_k_dim, net.head_v_dim
    if net.activation != "silu" or key_dim % TILE or value_dim % TILE:
        raise UnfitError(
            f"a gated delta net has heads of {key_dim} and {value_dim} with {net.activation};"
            f" the kernels take multiples of {TILE} with silu"
        )
    together = hasattr(net, "in_proj_qkvz")
    matrices, places = (_together if together else _one_by_one)(net, packer)
    conv = net.conv1d.weight.detach().float().squeeze(1).t()
    return {
        **dict(zip("qkv", matrices, strict=False)),
        "o": matrix_of(net, "out_proj", packer),
        "heads": value_heads,
        "kv_heads": net.num_k_heads,
        "head_dim": value_dim,
        "delta": Delta(
            key_heads=net.num_k_heads,
            value_heads=value_heads,
            key_dim=key_dim,
            value_dim=value_dim,
            places=places,
            conv=np.ascontiguousarray(conv.numpy()),
            bias=floats(net.conv1d.bias),
            forgets=_vector(-net.A_log.detach().float().exp()),
            steps=_vector(net.dt_bias),
            norm=Norm(weight=_vector(net.norm.weight), eps=float(net.norm.variance_epsilon)),
        ),
    }


def _vector(tensor: Tensor) -> F32:
    return np.array(tensor.detach().float().numpy())


def _together(net: Any, packer: Packer) -> tuple[list[Matrix], Places]:
    """Two products: a key head's q, k, v and z behind one another, and its b and a (Qwen3-Next)."""
    only(net, "in_proj_qkvz in_proj_ba conv1d norm out_proj", f"a layer ({type(net).__name__})")
    matrices = [matrix_of(net, name, packer) for name in ("in_proj_qkvz", "in_proj_ba")]
    shared, key = net.num_v_heads // net.num_k_heads, net.head_k_dim
    values, behind = shared * net.head_v_dim, matrices[0].rows
    step = 2 * key + 2 * values
    return matrices, Places(
        q=0,
        q_step=step,
        k=key,
        k_step=step,
        v=2 * key,
        v_step=step,
        z=2 * key + values,
        z_step=step,
        b=behind,
        a=behind + shared,
        a_step=2 * shared,
    )


def _one_by_one(net: Any, packer: Packer) -> tuple[list[Matrix], Places]:
    """All heads' q, then their k, v, z, b and a (Qwen3.5)."""
    only(
        net,
        "in_proj_qkv in_proj_z in_proj_b in_proj_a conv1d norm out_proj",
        f"a layer ({type(net).__name__})",
    )
    shared, key = net.num_v_heads // net.num_k_heads, net.head_k_dim
    values, keys = shared * net.head_v_dim, net.num_k_heads * key
    small = torch.cat([net.in_proj_b.weight.detach(), net.in_proj_a.weight.detach()])
    matrices = [matrix_of(net, name, packer) for name in ("in_proj_qkv", "in_proj_z")]
    matrices.append(packed_rows(small, None, packer.arena))
    behind = sum(matrix.rows for matrix in matrices[:2])
    return matrices, Places(
        q=0,
        q_step=key,
        k=keys,
        k_step=key,
        v=2 * keys,
        v_step=values,
        z=matrices[0].rows,
        z_step=values,
        b=behind,
        a=behind + net.num_v_heads,
        a_step=shared,
    )
