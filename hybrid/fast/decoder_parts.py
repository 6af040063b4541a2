"""Reads a transformers decoder into the values that the one-token kernels take.

Nothing is believed by name alone: norms, routers and rotary embeddings are run on samples and
compared with the formula that the kernels would use in their place.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.cache_utils import (
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
)

from cpu_experts.decoder import ops as kernels
from cpu_experts.decoder.decoder import Decoder
from cpu_experts.decoder.layers import Latent, Layer
from cpu_experts.kernels.records import Experts
from hybrid.anatomy.names import EXPERTS_BLOCKS, MLP_PROJECTIONS, SHARED_EXPERTS, SHARED_GATE
from hybrid.anatomy.samples import UnfitError, close, floats, sample
from hybrid.anatomy.widened import widened
from hybrid.fast.delta_parts import read_delta
from hybrid.fast.dense_parts import Packer, matrix_of, norm_of, only
from hybrid.fast.packed_rows import packed_rows
from hybrid.fast.router_parts import read_router
from hybrid.formats.errors import HybridError
from hybrid.formats.strips import F32
from hybrid.grafts import runner_of
from hybrid.machine import host
from hybrid.packed.dense import (
    QuantizedLinear,
    pack_tied,
    packed_size,
)
from hybrid.transformers_api import cache_argument
from planner.describe.words import in_words

#: Heads that one item of attention over a compressed cache looks at it for, at most.
_HEADS_AN_ITEM = 8


def _check_room(model: Any, layers: nn.Module) -> None:
    """Raise UnfitError unless copies of the dense weights fit into the memory that is left."""
    copied = 0
    for path, module in [*layers.named_modules(), ("lm_head", model.lm_head)]:
        if type(module) is nn.Linear:
            copied += packed_size(module)
        elif type(module) is QuantizedLinear and path.rpartition(".")[2] in MLP_PROJECTIONS:
            copied += module.packed.numel()  # three matrices make one block
    left = host.available_memory_bytes()
    if copied > left:
        raise UnfitError(
            f"copies of dense weights take {in_words(copied)}, {in_words(left)} of memory is left",
            "free memory, or convert with --dense q8_0: quantized projections are not copied; "
            "HybridModel makes no copies, either",
        )


def read_rotary(model: Any, rotary: Any, head_dim: int) -> tuple[bool, int]:
    """Return whether the rotary embedding turns neighbours (or halves), and how many pairs.

    Families give cosines once for every pair, or all of them twice in a row.
    """
    code = sys.modules[type(model).__module__]
    if not hasattr(code, "apply_rotary_pos_emb"):
        raise UnfitError(f"{code.__name__} has no apply_rotary_pos_emb")
    q = sample(1, 1, 1, head_dim)
    cos, sin = rotary_sides(rotary, q, torch.tensor([[5]]))
    expected, _ = code.apply_rotary_pos_emb(q, q, cos, sin)
    for pairs, paired in product((cos.numel() // 2, cos.numel()), (False, True)):
        turned = q.reshape(-1).numpy().copy()
        if 2 * pairs <= head_dim:
            angles = (rotary_row(cos, pairs), rotary_row(sin, pairs))
            kernels.rotate(turned, *angles, paired)
            if close(torch.from_numpy(turned), expected.float().reshape(-1)):
                return paired, pairs
    raise UnfitError("the rotary embedding turns in another way")


def rotary_sides(rotary: Any, like: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Return cosines and sines of positions, which some families have as complex numbers."""
    sides = rotary(like, positions)
    if isinstance(sides, Tensor) and sides.is_complex():
        return sides.real, sides.imag
    cos, sin = sides
    return cos, sin


def rotary_row(values: Tensor, pairs: int) -> F32:
    """Return one position's cosines or sines, ``[pairs]`` float32."""
    return np.ascontiguousarray(values.detach().float().reshape(-1)[:pairs].numpy())


def _shared(block: Any, packer: Packer) -> tuple[Experts | None, Tensor | None]:
    """The shared expert of a block, packed, and the row that weighs it."""
    for name in SHARED_EXPERTS:
        if getattr(block, name, None) is not None:
            gate = getattr(block, SHARED_GATE, None)
            return _mlp(block, name, packer), None if gate is None else gate.weight
    return None, None


def _mlp(owner: Any, name: str, packer: Packer) -> Experts:
    module = packer.mlp(owner, name)
    return Experts(blocks=module.block.numpy()[None], shape=module.shape)


def _read_layer(layer: Any, window: int, packer: Packer) -> Layer:
    only(
        layer,
        "self_attn linear_attn input_layernorm post_attention_layernorm mlp block_sparse_moe",
        f"a layer ({type(layer).__name__})",
    )
    attention = mixer_of(layer)
    name, other = EXPERTS_BLOCKS
    name = name if hasattr(layer, name) else other
    block = getattr(layer, name)
    router = experts = None
    if hasattr(block, "experts"):
        only(
            block,
            "gate router experts shared_expert shared_experts shared_expert_gate",
            f"the experts' block ({type(block).__name__})",
        )
        runner = runner_of(block.experts)
        if runner is None or runner.own_gating:
            raise UnfitError("the experts' activation has no kernel")
        shared, shared_gate = _shared(block, packer)
        gate = block.gate if hasattr(block, "gate") else block.router
        router = read_router(gate, shared_gate, packer.arena)
        experts = Experts(blocks=runner.blocks, shape=runner.shape)
    else:
        shared = _mlp(layer, name, packer)
    read: Callable[[Any, Packer], dict[str, Any]] = _read_heads
    if hasattr(attention, "kv_b_proj"):
        read = _read_latent
    elif hasattr(attention, "conv1d"):
        read = read_delta
    return Layer(
        **read(attention, packer),
        norm=norm_of(layer.input_layernorm),
        scaling=float(getattr(attention, "scaling", 1.0)),
        window=window,
        residual=float(getattr(layer, "residual_multiplier", 1.0)),
        ffn_norm=norm_of(layer.post_attention_layernorm),
        router=router,
        experts=experts,
        shared=shared,
    )


def _read_heads(attention: Any, packer: Packer) -> dict[str, Any]:
    """What attention with keys and values for its heads is to a layer."""
    only(
        attention,
        "q_proj k_proj v_proj o_proj q_norm k_norm rotary_emb rotary_fn",
        f"attention ({type(attention).__name__})",
    )
    head_dim = attention.head_dim
    q, k, v, o = (matrix_of(attention, f"{x}_proj", packer) for x in "qkvo")
    clip = getattr(attention.config, "clip_qkv", None)
    norms = [
        norm_of(module) if isinstance(module, nn.Module) else None
        for module in (getattr(attention, "q_norm", None), getattr(attention, "k_norm", None))
    ]
    return {
        "q": q,
        "k": k,
        "v": v,
        "o": o,
        "heads": o.cols // head_dim,
        "kv_heads": k.rows // head_dim,
        "head_dim": head_dim,
        "gated": q.rows == 2 * o.cols,
        "q_norm": norms[0],
        "k_norm": norms[1],
        "sinks": floats(getattr(attention, "sinks", None)),
        "clip": float("inf") if clip is None else float(clip),
    }


def mixer_of(layer: Any) -> Any:
    """Return the module in which a layer's tokens see one another."""
    return layer.linear_attn if hasattr(layer, "linear_attn") else layer.self_attn


def _read_latent(attention: Any, packer: Packer) -> dict[str, Any]:
    """What attention over a compressed cache is to a layer."""
    only(
        attention,
        "q_proj q_a_proj q_a_layernorm q_b_proj kv_a_proj_with_mqa kv_a_layernorm kv_b_proj o_proj",
        f"attention ({type(attention).__name__})",
    )
    rank, rope = int(attention.kv_lora_rank), int(attention.qk_rope_head_dim)
    nope, value = int(attention.qk_nope_head_dim), int(attention.v_head_dim)
    low_rank = getattr(attention, "q_b_proj", None) is not None
    kv_b = matrix_of(attention, "kv_b_proj", packer)
    heads = kv_b.rows // (nope + value)
    of_keys = attention.kv_b_proj.weight.view(heads, -1, rank)[:, :nope]
    latent = Latent(
        rank=rank,
        rope=rope,
        nope=nope,
        value=value,
        kv_norm=norm_of(attention.kv_a_layernorm),
        absorb=packed_rows(of_keys.transpose(1, 2).reshape(-1, nope), None, packer.arena),
        kv_b=kv_b,
        q_norm=norm_of(attention.q_a_layernorm) if low_rank else None,
        q_b=matrix_of(attention, "q_b_proj", packer) if low_rank else None,
    )
    return {
        "q": matrix_of(attention, "q_a_proj" if low_rank else "q_proj", packer),
        "k": matrix_of(attention, "kv_a_proj_with_mqa", packer),
        "o": matrix_of(attention, "o_proj", packer),
        "heads": heads,
        "kv_heads": heads // math.gcd(heads, _HEADS_AN_ITEM),
        "head_dim": rank + rope,
        "latent": latent,
    }


class _LastKey:
    """Stands for a compressed cache and keeps the key that it was given."""

    key: Tensor

    def update(self, latent: Tensor, key: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.key = key
        return latent, key


def _read_latent_rotary(attention: Any, rotary: Any, rank: int) -> tuple[bool, bool, int]:
    """How the key of a compressed cache is turned, as the family's own code leaves it there.

    Returns whether neighbours (or halves) are turned, whether they end up half a head apart, and
    how many pairs there are.
    """
    x = sample(1, 1, attention.kv_a_proj_with_mqa.in_features)
    position, cache = torch.tensor([[5]]), _LastKey()
    attention = widened(attention)
    attention(
        x,
        position_embeddings=rotary(x, position),
        attention_mask=None,
        **cache_argument(cache),
    )
    expected = cache.key.reshape(-1)
    source = attention.kv_a_proj_with_mqa(x).reshape(-1)[rank:].numpy()
    pairs = source.size // 2
    cos, sin = (rotary_row(side, pairs) for side in rotary_sides(rotary, x, position))
    for paired, apart in ((True, True), (True, False), (False, False)):
        turned = source.copy()
        kernels.rotate(turned, cos, sin, paired)
        if apart:
            turned = np.concatenate((turned[0::2], turned[1::2]))
        if close(torch.from_numpy(turned), expected):
            return paired, apart, pairs
    raise UnfitError("the key of the compressed cache turns in another way")


def read_decoder(model: Any, *, replace: bool) -> tuple[Decoder, int]:
    """Describe a causal language model's decoder.

    Dense weights are packed on the way: beside the model's modules, unless it is to ``replace``
    these. What is quantized already is only moved.

    Returns the decoder, and how many pairs its rotary embedding turns.

    Raises
    ------
    UnfitError
        When some part of it is none that the kernels compute.
    """
    base, config = model.get_decoder(), model.config.get_text_config()
    only(base, "embed_tokens layers norm rotary_emb", f"the decoder ({type(base).__name__})")
    if not hasattr(base, "rotary_emb"):
        raise UnfitError("there is no single rotary embedding")
    if any(parameter.device.type != "cpu" for parameter in model.parameters()):
        raise UnfitError("dense weights are not on the CPU")
    kinds = DynamicCache(config=config).layers
    ordinary = (DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer)
    if any(type(kind) not in ordinary for kind in kinds):
        raise UnfitError("its cache keeps something else than keys, values and states")
    windows = [int(getattr(kind, "sliding_window", 0)) for kind in kinds] or [0] * len(base.layers)
    packer = Packer(replace)
    try:
        if replace:
            pack_tied(model)
        else:
            _check_room(model, base.layers)
        layers = [
            _read_layer(layer, window, packer)
            for layer, window in zip(base.layers, windows, strict=True)
        ]
        attending = [layer for layer in layers if layer.delta is None]
        if not attending:
            raise UnfitError("no layer looks at keys")
        latent = attending[0].latent
        if latent is None:
            paired, pairs = read_rotary(model, base.rotary_emb, attending[0].head_dim)
        else:
            paired, apart, pairs = _read_latent_rotary(
                base.layers[0].self_attn, base.rotary_emb, latent.rank
            )
            layers = [
                dataclasses.replace(
                    layer, latent=layer.latent and dataclasses.replace(layer.latent, apart=apart)
                )
                for layer in layers
            ]
        decoder = Decoder(
            layers,
            norm=norm_of(base.norm),
            lm_head=matrix_of(model, "lm_head", packer),
            scale=1.0 / float(getattr(config, "logits_scaling", None) or 1.0),
            paired=paired,
        )
        return decoder, pairs
    except (HybridError, AttributeError, TypeError, ValueError, IndexError) as error:
        # A family whose parts are called or shaped in other ways than those that fit.
        raise UnfitError(str(error).splitlines()[0]) from error
