"""Counts parameters and cached numbers of the layers' token mixers, family by family."""

from __future__ import annotations

from planner.describe.checked_table import Fields
from planner.describe.layer_kinds import FAR, NEAR, attention_kinds
from planner.describe.model import Mixer

_SLIDING = ("sliding_attention", "chunked_attention", "hybrid_sliding")
_SEEING_ALL = ("full_attention", "indexed_attention", "hybrid")
_LINEAR = ("linear_attention", "mamba", "conv")
_GATED_OUTPUT = (
    "afmoe",
    "hy_v4",
    "inkling2_text",
    "muse_spark",
    "muse_spark_text",
    "qwen3_5_moe",
    "qwen3_5_moe_text",
    "qwen3_next",
)
"""Families that multiply attention's output by a gate as wide as it."""


def layer_mixers(
    tables: list[Fields], fields: Fields, family: str, hidden: int, blocks: list[str] | None
) -> list[Mixer]:
    """Return the mixer of each layer, given what the file says of each and of all."""
    kinds = blocks or attention_kinds(fields, family, len(tables))
    made: dict[tuple[int, str], Mixer] = {}
    for table, kind in zip(tables, kinds, strict=True):
        if (id(table), kind) not in made:
            made[id(table), kind] = _mixer(_of_kind(table, kind), family, hidden, kind)
    return [made[id(table), kind] for table, kind in zip(tables, kinds, strict=True)]


def _of_kind(table: Fields, kind: str) -> Fields:
    """Let what a file says of layers that see all, or near tokens only, win for these."""
    if kind not in _SLIDING + _SEEING_ALL:
        return table
    prefix = NEAR if kind in _SLIDING else FAR
    own = {}
    for name, value in table.data.items():
        plain = name.replace(prefix, "", 1)
        if plain != name and value is not None:
            own[plain] = value
            table.read.add(name)
    return table.with_data({**table.data, **own}) if own else table


def _mixer(fields: Fields, family: str, hidden: int, kind: str) -> Mixer:
    """Count one mixer."""
    if kind in ("moe", "mlp"):
        return Mixer(kind="none", params=0)
    if kind in _LINEAR:
        return _recurrence(fields, family, hidden, kind)
    sliding = kind in _SLIDING
    window = None
    if sliding and fields.has("sliding_window", "sliding_window_size", "attention_chunk_size"):
        window = fields.count("sliding_window", "sliding_window_size", "attention_chunk_size")
    if fields.has("o_lora_rank"):
        return _compressed(fields, hidden, kind, window)
    if family == "jetmoe":
        return _routed_attention(fields, hidden)
    if fields.has("kv_lora_rank"):
        return _latent(fields, family, hidden, window)
    return _grouped_query(fields, family, hidden, sliding, window)


def _grouped_query(
    fields: Fields, family: str, hidden: int, sliding: bool, window: int | None
) -> Mixer:
    """Multi-head, grouped-query and multi-query attention."""
    near = ("num_sliding_attention_heads",) if sliding else ()
    heads = fields.count(*near, "num_attention_heads", "n_heads")
    kv_heads = fields.count("num_key_value_heads", "num_attention_groups", default=heads)
    head_dim = fields.count("head_dim", default=hidden // heads)
    value_dim = fields.count("v_head_dim", default=head_dim)
    queries = heads * head_dim
    projected = queries + kv_heads * (head_dim + value_dim)
    gate = heads * value_dim if family in _GATED_OUTPUT else 0
    bias = fields.flag("attention_bias", fields.flag("qkv_bias", family.startswith("qwen2")))
    params = hidden * (projected + gate + heads * value_dim) + (projected if bias else 0)
    cache = kv_heads * (head_dim + value_dim)
    return Mixer(
        kind="full" if window is None else "sliding",
        params=params + _twice(family, params),
        cache_per_token=cache + _twice(family, cache),
        window=window,
        score_flops=2 * heads * (head_dim + value_dim),
    )


def _twice(family: str, value: int) -> int:
    """LongCat's layers attend twice."""
    return value if family == "longcat_flash" else 0


def _latent(fields: Fields, family: str, hidden: int, window: int | None) -> Mixer:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).

    The cache holds the compressed latent and the shared rotary key, as transformers keeps it.
    """
    heads = fields.count("num_attention_heads")
    rank = fields.count("kv_lora_rank")
    rope = fields.count("qk_rope_head_dim", least=0)
    nope = fields.count("qk_nope_head_dim")
    value = fields.count("v_head_dim")
    queries = heads * (nope + rope)
    if fields.has("q_lora_rank"):
        q_rank = fields.count("q_lora_rank")
        query_params = hidden * q_rank + q_rank * queries
    else:
        q_rank = hidden
        query_params = hidden * queries
    params = query_params + hidden * (rank + rope) + rank * heads * (nope + value)
    params += heads * value * hidden * (2 if family in _GATED_OUTPUT else 1)
    cache = rank + rope
    if fields.has("index_n_heads"):
        # DeepSeek-V3.2's indexer: its queries, one shared key, a weight per head.
        index_heads, index_dim = fields.count("index_n_heads"), fields.count("index_head_dim")
        params += q_rank * index_heads * index_dim + hidden * (index_dim + index_heads)
        cache += index_dim
    return Mixer(
        kind="latent",
        params=params + _twice(family, params),
        cache_per_token=cache + _twice(family, cache),
        window=window,
        score_flops=2 * heads * (2 * rank + rope),
    )


def _compressed(fields: Fields, hidden: int, kind: str, window: int | None) -> Mixer:
    """DeepSeek-V4: one shared key-value head, grouped low-rank output, compressed far context."""
    heads, dim = fields.count("num_attention_heads"), fields.count("head_dim")
    q_rank, o_rank = fields.count("q_lora_rank"), fields.count("o_lora_rank")
    groups = fields.count("o_groups")
    queries = heads * dim
    params = hidden * q_rank + q_rank * queries + hidden * dim
    params += o_rank * queries + groups * o_rank * hidden
    rate = None
    if fields.has("compress_rates") and fields.table("compress_rates").has(kind):
        rate = fields.table("compress_rates").count(kind)
    if kind == "compressed_sparse_attention":
        index = fields.count("index_n_heads") * fields.count("index_head_dim")
        params += 4 * hidden * dim + q_rank * index + 4 * hidden * fields.count("index_head_dim")
    elif rate:
        params += 2 * hidden * dim
    near = dim * fields.count("sliding_window", default=128)
    return Mixer(
        kind="full" if rate else "sliding",
        params=params,
        cache_per_token=-(-dim // rate) if rate else dim,
        window=None if rate else fields.count("sliding_window", default=window or 128),
        state=near if rate else 0,
        score_flops=4 * queries // (rate or 1),
    )


def _routed_attention(fields: Fields, hidden: int) -> Mixer:
    """JetMoE's mixture of attention heads: query and output projections are experts too.

    They stay with the dense weights: only feed-forward experts are placed.
    """
    kv_heads, dim = fields.count("num_key_value_heads"), fields.count("kv_channels")
    inner = kv_heads * dim
    routed = fields.count("num_local_experts") * 2 * hidden * inner
    top_k = fields.count("num_experts_per_tok")
    return Mixer(
        kind="full",
        params=routed + 2 * hidden * inner,
        cache_per_token=2 * inner,
        score_flops=4 * top_k * inner,
    )


def _recurrence(fields: Fields, family: str, hidden: int, kind: str) -> Mixer:
    """Mixers whose memory does not grow with the context."""
    if kind == "conv":
        kernel = fields.count("conv_L_cache", default=3)
        params = 4 * hidden * hidden + kernel * hidden
        return Mixer(kind="linear", params=params, state=kernel * hidden)
    if fields.has("linear_num_value_heads"):
        return _gated_delta(fields, hidden)
    if fields.has("linear_num_heads"):
        return _kimi_delta(fields, hidden)
    if fields.has("mamba_n_heads", "mamba_num_heads", "mamba_d_state"):
        return _mamba(fields, hidden)
    heads = fields.count("num_attention_heads")
    head_dim = fields.count("head_dim", default=hidden // heads)
    inner = heads * head_dim
    return Mixer(kind="linear", params=5 * hidden * inner, state=heads * head_dim * head_dim)


def _gated_delta(fields: Fields, hidden: int) -> Mixer:
    """Gated DeltaNet, as in Qwen3-Next."""
    key_heads, value_heads = (
        fields.count("linear_num_key_heads"),
        fields.count("linear_num_value_heads"),
    )
    key_dim, value_dim = fields.count("linear_key_head_dim"), fields.count("linear_value_head_dim")
    kernel = fields.count("linear_conv_kernel_dim", default=4)
    keys, values = key_heads * key_dim, value_heads * value_dim
    conv = 2 * keys + values
    params = hidden * (conv + values + 2 * value_heads) + values * hidden + conv * kernel
    return Mixer(
        kind="linear", params=params, state=value_heads * key_dim * value_dim + conv * kernel
    )


def _kimi_delta(fields: Fields, hidden: int) -> Mixer:
    """Kimi delta attention and its kin: q, k, v, output, a decay and an output gate."""
    heads, dim = fields.count("linear_num_heads"), fields.count("linear_head_dim")
    kernel = fields.count("linear_conv_kernel_dim", "short_conv_kernel_size", default=4)
    inner = heads * dim
    low_rank = 2 * (hidden + inner) * dim
    params = 4 * hidden * inner + low_rank + 3 * inner * kernel + hidden * heads
    return Mixer(kind="linear", params=params, state=heads * dim * dim + 3 * inner * kernel)


def _mamba(fields: Fields, hidden: int) -> Mixer:
    """Mamba (one state per channel) and Mamba-2 (heads that share a state)."""
    state = fields.count("mamba_d_state", "ssm_state_size")
    kernel = fields.count("mamba_d_conv", "conv_kernel", default=4)
    if not fields.has("mamba_n_heads", "mamba_num_heads"):
        inner = fields.count("mamba_expand", default=2) * hidden
        rank = fields.count("mamba_dt_rank", default=-(-hidden // 16))
        params = 3 * hidden * inner + inner * (rank + 2 * state) + rank * inner + inner * state
        return Mixer(kind="linear", params=params, state=inner * (state + kernel))
    heads = fields.count("mamba_n_heads", "mamba_num_heads")
    width = fields.count("mamba_expand", "expand", default=2) * hidden
    head_dim = fields.count("mamba_d_head", "mamba_head_dim", default=width // heads)
    groups = fields.count("mamba_n_groups", "n_groups", default=1)
    inner = heads * head_dim
    conv = inner + 2 * groups * state
    params = hidden * (inner + conv + heads) + inner * hidden + conv * kernel
    return Mixer(kind="linear", params=params, state=heads * head_dim * state + conv * kernel)
