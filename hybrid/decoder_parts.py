"""Reads a transformers decoder into the values that the one-token kernels take.

Nothing is believed by name alone: norms, routers and rotary embeddings are run on samples and
compared with the formula that the kernels would use in their place.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from cpu_experts import dense as kernels
from cpu_experts import tables
from cpu_experts.decoder import Decoder
from cpu_experts.errors import CpuExpertsError
from cpu_experts.formats import F32
from cpu_experts.layers import Experts, Latent, Layer, Matrix, Norm, Router, fill_record
from hybrid.dense import (
    Arena,
    PackedMlp,
    QuantizedLinear,
    pack_linear,
    pack_mlp,
    pack_tied,
    replace_module,
)

#: Tokens whose experts tell ways of choosing apart; few would not, where groups matter seldom.
_ROUTED = 200
#: Heads that one item of attention over a compressed cache looks at it for, at most.
_HEADS_AN_ITEM = 8


class UnfitError(Exception):
    """Why a model's decoder is none that the one-token kernels know."""


def _floats(tensor: Tensor | None) -> F32 | None:
    if tensor is None:
        return None
    return tensor.detach().float().reshape(-1).contiguous().numpy().copy()


def _close(found: Tensor, wanted: Tensor) -> bool:
    tolerance = 2e-2 if wanted.dtype == torch.bfloat16 else 1e-4
    return torch.allclose(found.float(), wanted.float(), rtol=tolerance, atol=tolerance)


def _sample(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def _only(module: nn.Module, allowed: str, what: str) -> None:
    strange = [name for name, _ in module.named_children() if name not in allowed.split()]
    if strange:
        raise UnfitError(f"{what} has {', '.join(strange)}")


def read_norm(module: Any) -> Norm:
    """Return a norm, a weight that means ``1 + weight`` folded in."""
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if eps is None or getattr(module, "weight", None) is None:
        raise UnfitError(f"{type(module).__name__} has no eps or no weight")
    weight = module.weight.detach()
    x = _sample(3, weight.numel()).to(weight.dtype) * 2 + 1
    wanted = module(x)
    bias = getattr(module, "bias", None)
    for offset, centered in product((0.0, 1.0), (False, True)):
        y = x.float() - (x.float().mean(-1, keepdim=True) if centered else 0)
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps) * (weight.float() + offset)
        if _close(y if bias is None else y + bias.float(), wanted):
            folded = np.ascontiguousarray((weight.float() + offset).numpy())
            return Norm(weight=folded, eps=float(eps), bias=_floats(bias), centered=centered)
    raise UnfitError(f"{type(module).__name__} is another norm")


def _matrix(owner: Any, name: str, arena: Arena) -> Matrix:
    """Return a projection, its module replaced by a packed one where it is not yet."""
    module = getattr(owner, name)
    if type(module) is nn.Linear:
        module = pack_linear(module)
        replace_module(owner, name, module)
    if type(module) is not QuantizedLinear:
        raise UnfitError(f"{name} is a {type(module).__name__}")
    arena.move(module.packed)
    return Matrix(
        weight=module.packed.numpy(),
        rows=module.rows,
        cols=module.cols,
        format=module.weight_format,
        bias=_floats(module.bias),
    )


def _packed_rows(weight: Tensor, bias: Tensor | None, arena: Arena) -> Matrix:
    rows, cols = weight.shape
    linear = nn.Linear(cols, rows, bias=False, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    module = pack_linear(linear)
    arena.move(module.packed)
    return Matrix(
        weight=module.packed.numpy(),
        rows=rows,
        cols=cols,
        format=module.weight_format,
        bias=_floats(bias),
    )


def read_router(module: Any, shared_gate: Tensor | None, arena: Arena) -> Router:
    """Return a router: the parameters that choose as the family's own code does."""
    weight = module.weight.detach()
    bias = getattr(module, "bias", None)
    rows = weight if shared_gate is None else torch.cat((weight, shared_gate.detach().to(weight)))
    if shared_gate is not None and bias is not None:
        bias = torch.cat((bias, torch.zeros(1).to(bias)))
    matrix = _packed_rows(rows, bias, arena)
    x = _sample(_ROUTED, weight.shape[1]).to(weight.dtype)
    outputs = module(x)
    if not isinstance(outputs, tuple) or len(outputs) != 3:
        raise UnfitError(f"{type(module).__name__} returns something else than three tensors")
    logits, weights, ids = outputs
    logits = torch.nn.functional.linear(x.float(), weight.float(), getattr(module, "bias", None))
    wanted = _as_rows(ids, weights, weight.shape[0])
    base = Router(
        matrix=matrix,
        experts=weight.shape[0],
        top_k=ids.shape[-1],
        gated_shared=shared_gate is not None,
    )
    for candidate in _router_candidates(module, base):
        # In bfloat16 the family's own choice between near equals is a matter of rounding.
        same = [_close(a, b) for a, b in zip(_choices(candidate, logits), wanted, strict=True)]
        if sum(same) >= (len(same) if weight.dtype == torch.float32 else 0.8 * len(same)):
            return candidate
    raise UnfitError(f"{type(module).__name__} chooses in another way")


def _as_rows(ids: Tensor, weights: Tensor, experts: int) -> Tensor:
    return torch.zeros(ids.shape[0], experts).scatter_(1, ids, weights.float())


def _choices(router: Router, logits: Tensor) -> Tensor:
    record = np.zeros(1, tables.ROUTER)
    fill_record(record[0], router.record())
    rows = []
    for row in logits.detach().float().numpy():
        ids = np.zeros(max(router.top_k, router.groups), np.int64)
        weights = np.zeros(ids.size, np.float32)
        scratch = np.zeros((2, router.experts), np.float32)
        kernels.route(record[0], np.ascontiguousarray(row), ids, weights, scratch[0], scratch[1])
        k = router.top_k
        rows.append(
            _as_rows(torch.from_numpy(ids[None, :k]), torch.from_numpy(weights[None, :k]), len(row))
        )
    return torch.cat(rows)


def _router_candidates(module: Any, base: Router) -> Iterator[Router]:
    statics = getattr(module, "moe_statics", module)
    correction = _floats(getattr(statics, "e_score_correction_bias", None))
    scales = {1.0, float(getattr(module, "routed_scaling_factor", None) or 1.0)}
    groups = int(getattr(module, "num_group", None) or getattr(module, "n_group", None) or 1)
    top_groups = int(getattr(module, "topk_group", None) or 1)
    floor = float(getattr(module, "norm_min", 1e-20))
    scorings = (tables.SOFTMAX, tables.SOFTMAX_OF_CHOSEN, tables.SIGMOID)
    of_groups = (2, 1) if groups > 1 else (2,)
    for scoring, normalize, scale, of_group in product(
        scorings, (True, False), sorted(scales), of_groups
    ):
        yield replace(
            base,
            scoring=scoring,
            normalize=normalize,
            scale=scale,
            floor=floor,
            correction=correction,
            groups=groups,
            top_groups=top_groups,
            of_group=of_group,
        )
    jitter = getattr(module, "router_jitter_noise", None)
    if jitter is not None and base.top_k == 2:
        yield replace(base, scoring=tables.SPARSEMIXER, jitter=float(jitter))


def read_rotary(model: Any, rotary: Any, head_dim: int) -> tuple[bool, int]:
    """Return whether the rotary embedding turns neighbours (or halves), and how many pairs.

    Families give cosines once for every pair, or all of them twice in a row.
    """
    code = sys.modules[type(model).__module__]
    if not hasattr(code, "apply_rotary_pos_emb"):
        raise UnfitError(f"{code.__name__} has no apply_rotary_pos_emb")
    q = _sample(1, 1, 1, head_dim)
    cos, sin = rotary_sides(rotary, q, torch.tensor([[5]]))
    wanted, _ = code.apply_rotary_pos_emb(q, q, cos, sin)
    for pairs, paired in product((cos.numel() // 2, cos.numel()), (False, True)):
        turned = q.reshape(-1).numpy().copy()
        if 2 * pairs <= head_dim:
            angles = (rotary_row(cos, pairs), rotary_row(sin, pairs))
            kernels.rotate(turned, *angles, paired)
            if _close(torch.from_numpy(turned), wanted.reshape(-1)):
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


def _shared(block: Any, arena: Arena) -> tuple[Experts | None, Tensor | None]:
    """The shared expert of a block, packed, and the row that weighs it."""
    for name in ("shared_expert", "shared_experts", "shared_mlp"):
        if getattr(block, name, None) is not None:
            gate = getattr(block, "shared_expert_gate", None)
            return _mlp(block, name, arena), None if gate is None else gate.weight
    return None, None


def _mlp(owner: Any, name: str, arena: Arena) -> Experts:
    module = getattr(owner, name)
    if not isinstance(module, PackedMlp):
        _only(module, "gate_proj up_proj down_proj act_fn", f"{name} ({type(module).__name__})")
        packed = pack_mlp(module)
        if packed is None:
            raise UnfitError(f"{type(module).__name__} has another form than gate, up and down")
        replace_module(owner, name, packed)
        module = packed
    arena.move(module.block)
    return Experts(blocks=module.block.numpy()[None], shape=module.shape)


def _read_layer(layer: Any, window: int, arena: Arena) -> Layer:
    _only(
        layer,
        "self_attn input_layernorm post_attention_layernorm mlp block_sparse_moe",
        f"a layer ({type(layer).__name__})",
    )
    attention = layer.self_attn
    name = "mlp" if hasattr(layer, "mlp") else "block_sparse_moe"
    block = getattr(layer, name)
    router = experts = None
    if hasattr(block, "experts"):
        _only(
            block,
            "gate router experts shared_expert shared_experts shared_expert_gate",
            f"the experts' block ({type(block).__name__})",
        )
        runner = getattr(block.experts, "hybrid_experts", None)
        if runner is None or runner.own_gating:
            raise UnfitError("the experts' activation has no kernel")
        shared, shared_gate = _shared(block, arena)
        gate = block.gate if hasattr(block, "gate") else block.router
        router = read_router(gate, shared_gate, arena)
        experts = Experts(blocks=runner.blocks, shape=runner.shape)
    else:
        shared = _mlp(layer, name, arena)
    read = _read_latent if hasattr(attention, "kv_b_proj") else _read_heads
    return Layer(
        **read(attention, arena),
        norm=read_norm(layer.input_layernorm),
        scaling=float(attention.scaling),
        window=window,
        residual=float(getattr(layer, "residual_multiplier", 1.0)),
        ffn_norm=read_norm(layer.post_attention_layernorm),
        router=router,
        experts=experts,
        shared=shared,
    )


def _read_heads(attention: Any, arena: Arena) -> dict[str, Any]:
    """What attention with keys and values for its heads is to a layer."""
    _only(
        attention,
        "q_proj k_proj v_proj o_proj q_norm k_norm rotary_emb rotary_fn",
        f"attention ({type(attention).__name__})",
    )
    head_dim = attention.head_dim
    q, k, v, o = (_matrix(attention, f"{x}_proj", arena) for x in "qkvo")
    clip = getattr(attention.config, "clip_qkv", None)
    norms = [
        read_norm(module) if isinstance(module, nn.Module) else None
        for module in (getattr(attention, "q_norm", None), getattr(attention, "k_norm", None))
    ]
    return {
        "q": q,
        "k": k,
        "v": v,
        "o": o,
        "heads": q.rows // head_dim,
        "kv_heads": k.rows // head_dim,
        "head_dim": head_dim,
        "q_norm": norms[0],
        "k_norm": norms[1],
        "sinks": _floats(getattr(attention, "sinks", None)),
        "clip": float("inf") if clip is None else float(clip),
    }


def _read_latent(attention: Any, arena: Arena) -> dict[str, Any]:
    """What attention over a compressed cache is to a layer."""
    _only(
        attention,
        "q_proj q_a_proj q_a_layernorm q_b_proj kv_a_proj_with_mqa kv_a_layernorm kv_b_proj o_proj",
        f"attention ({type(attention).__name__})",
    )
    rank, rope = int(attention.kv_lora_rank), int(attention.qk_rope_head_dim)
    nope, value = int(attention.qk_nope_head_dim), int(attention.v_head_dim)
    low_rank = getattr(attention, "q_b_proj", None) is not None
    kv_b = _matrix(attention, "kv_b_proj", arena)
    heads = kv_b.rows // (nope + value)
    of_keys = attention.kv_b_proj.weight.view(heads, -1, rank)[:, :nope]
    latent = Latent(
        rank=rank,
        rope=rope,
        nope=nope,
        value=value,
        kv_norm=read_norm(attention.kv_a_layernorm),
        absorb=_packed_rows(of_keys.transpose(1, 2).reshape(-1, nope), None, arena),
        kv_b=kv_b,
        q_norm=read_norm(attention.q_a_layernorm) if low_rank else None,
        q_b=_matrix(attention, "q_b_proj", arena) if low_rank else None,
    )
    return {
        "q": _matrix(attention, "q_a_proj" if low_rank else "q_proj", arena),
        "k": _matrix(attention, "kv_a_proj_with_mqa", arena),
        "o": _matrix(attention, "o_proj", arena),
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
    x = _sample(1, 1, attention.kv_a_proj_with_mqa.in_features).to(attention.config.dtype)
    position, cache = torch.tensor([[5]]), _LastKey()
    attention(
        x,
        position_embeddings=rotary(x, position),
        attention_mask=None,
        past_key_values=cache,
    )
    wanted = cache.key.reshape(-1)
    source = attention.kv_a_proj_with_mqa(x).reshape(-1)[rank:].float().numpy()
    pairs = source.size // 2
    cos, sin = (rotary_row(side, pairs) for side in rotary_sides(rotary, x, position))
    for paired, apart in ((True, True), (True, False), (False, False)):
        turned = source.copy()
        kernels.rotate(turned, cos, sin, paired)
        if apart:
            turned = np.concatenate((turned[0::2], turned[1::2]))
        if _close(torch.from_numpy(turned), wanted):
            return paired, apart, pairs
    raise UnfitError("the key of the compressed cache turns in another way")


def read_decoder(model: Any) -> tuple[Decoder, int]:
    """Describe a causal language model's decoder; its dense weights are packed on the way.

    Returns the decoder, and how many pairs its rotary embedding turns.

    Raises
    ------
    UnfitError
        When some part of it is none that the kernels compute.
    """
    base, config = model.get_decoder(), model.config.get_text_config()
    _only(base, "embed_tokens layers norm rotary_emb", f"the decoder ({type(base).__name__})")
    if not hasattr(base, "rotary_emb"):
        raise UnfitError("there is no single rotary embedding")
    if any(parameter.device.type != "cpu" for parameter in model.parameters()):
        raise UnfitError("dense weights are not on the CPU")
    kinds = DynamicCache(config=config).layers
    if any(type(kind) not in (DynamicLayer, DynamicSlidingWindowLayer) for kind in kinds):
        raise UnfitError("its cache keeps something else than keys and values")
    windows = [int(getattr(kind, "sliding_window", 0)) for kind in kinds] or [0] * len(base.layers)
    pack_tied(model)
    arena = Arena()
    try:
        layers = [
            _read_layer(layer, window, arena)
            for layer, window in zip(base.layers, windows, strict=True)
        ]
        if layers[0].latent is None:
            paired, pairs = read_rotary(model, base.rotary_emb, layers[0].head_dim)
        else:
            paired, apart, pairs = _read_latent_rotary(
                base.layers[0].self_attn, base.rotary_emb, layers[0].latent.rank
            )
            layers = [
                replace(layer, latent=layer.latent and replace(layer.latent, apart=apart))
                for layer in layers
            ]
        decoder = Decoder(
            layers,
            norm=read_norm(base.norm),
            lm_head=_matrix(model, "lm_head", arena),
            scale=1.0 / float(getattr(config, "logits_scaling", None) or 1.0),
            paired=paired,
        )
        return decoder, pairs
    except (CpuExpertsError, AttributeError, TypeError, ValueError, IndexError) as error:
        # A family whose parts are called or shaped in other ways than those that fit.
        raise UnfitError(str(error).splitlines()[0]) from error
