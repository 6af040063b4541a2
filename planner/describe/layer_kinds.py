"""Names the kinds of a model's layers: how each mixes tokens, and which have routed experts.

A file lists them, or states a rule in its family's way, or leaves them to what its family always
does, as transformers knows it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from planner.describe.checked_table import Fields
from planner.errors import SpecError

FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"
_CHUNKED = "chunked_attention"
OF_KINDS = NEAR, FAR = ("swa_", "global_")
"""How fields begin that are said of layers that see near tokens only, or all."""

_OF_KINDS = re.compile(
    r"(layer|attn|attention|moe|expert).*_(types?|kinds?|pattern|list|period|interval|freq)$"
)
_NO_KINDS = ("indexer_types", "layer_rope_theta", "no_rope_layers", "no_rope_layer_interval")
"""Fields that look as if they were, and change nothing that is counted."""

Kinds = Callable[[Fields, int], list[str]]


def layer_tables(fields: Fields, depth: int) -> list[Fields]:
    """Return what a file says of each layer.

    Where it has a list of numbers, one for each layer, a layer's own is taken; and what
    ``per_layer_config`` says of single layers.
    """
    own = _own_fields(fields, depth)
    for name, value in fields.data.items():
        listed = isinstance(value, list) and len(value) >= depth and len({*map(repr, value)}) > 1
        if listed and all(isinstance(item, int | float) for item in value):
            for layer in range(depth):
                own[layer][name] = value[layer]
    made: dict[str, Fields] = {"{}": fields}
    for table in own:
        made.setdefault(repr(table), fields.with_data({**fields.data, **table}))
    return [made[repr(table)] for table in own]


def unread_kinds(fields: Fields, depth: int) -> Iterator[str]:
    """Name the fields that seem to tell kinds of layers apart, and that nobody has read.

    They have an entry for each layer, or a name like those that do.
    """
    for name, value in fields.data.items():
        if name in fields.read or name in _NO_KINDS or name.startswith(("mtp_", "_")):
            continue
        listed = isinstance(value, list) and len(value) == depth > 2
        if listed or (value not in (None, [], {}) and _OF_KINDS.search(name)):
            yield name


def _own_fields(fields: Fields, depth: int) -> list[dict[str, Any]]:
    own: list[dict[str, Any]] = [{} for _ in range(depth)]
    if fields.has("per_layer_config"):
        layers = fields.table("per_layer_config")
        for layer in layers.data:
            if not str(layer).isdigit() or int(layer) >= depth:
                raise SpecError(
                    f"{layers.where}: {layer!r} is none of {depth} layers",
                    hint="its entries are named by a layer's number, from 0",
                )
            for name, value in layers.table(layer).data.items():
                own[int(layer)][name] = value
                for prefix in OF_KINDS:  # which is said of a kind of layer, not of this one
                    if prefix + name in fields.data:
                        own[int(layer)][prefix + name] = value
    return own


def attention_kinds(fields: Fields, family: str, depth: int) -> list[str]:
    """Name each layer's kind of mixer, from the list or rule that the family uses."""
    if kinds := fields.names("layer_types", "layers_block_type", length=depth):
        fields.read.update(_BY_NUMBER)
        return kinds
    for name, (zero, one) in _BY_NUMBER.items():
        if fields.has(name):
            return [one if number else zero for number in fields.one_each(name, depth)]
    if family in _RULES:
        return _RULES[family](fields, depth)
    if fields.has("full_attention_interval"):
        return _every("full_attention_interval", LINEAR)(fields, depth)
    if fields.has("attn_layer_period"):
        period = fields.count("attn_layer_period")
        offset = fields.count("attn_layer_offset", default=0, least=0)
        return [FULL if layer % period == offset else "mamba" for layer in range(depth)]
    if fields.has("sliding_window") and fields.flag("use_sliding_window", True):
        return [SLIDING] * depth
    return [FULL] * depth


def kinds_only_numbered(config: Mapping[str, Any]) -> list[str] | None:
    """Return the layers' kinds where a file has numbers for them that transformers does not read.

    Its MiniMax has another rule where ``layer_types`` is left out, whatever the numbers say.
    """
    if config.get("model_type") != "minimax" or config.get("layer_types"):
        return None
    fields = Fields(config, "config.json")
    depth = fields.count("num_hidden_layers", default=0, least=0)
    if not depth or not fields.has("attn_type_list"):
        return None
    zero, one = _BY_NUMBER["attn_type_list"]
    return [one if number else zero for number in fields.one_each("attn_type_list", depth)]


def block_kinds(fields: Fields) -> list[str] | None:
    """What each layer is in families whose layers hold one thing each (Nemotron-H)."""
    letters = {"M": LINEAR, "E": "moe", "*": FULL, "-": "mlp"}
    for name in ("layers_block_type", "layer_types"):
        blocks = fields.get(name)
        if isinstance(blocks, list) and "moe" in blocks:
            return [str(block) for block in blocks]
    pattern = fields.get("hybrid_override_pattern")
    if isinstance(pattern, str):
        return [letters[letter] for letter in pattern if letter in letters]
    return None


def sparse_layers(fields: Fields, family: str, depth: int, blocks: list[str] | None) -> list[bool]:
    """Which layers have routed experts; every family states it in its own way."""
    layers = range(depth)
    if blocks:
        return [block == "moe" for block in blocks]
    if kinds := fields.names("mlp_layer_types", length=depth):
        fields.read.update(_SPARSE)
        return [kind != "dense" for kind in kinds]
    for name in ("moe_layers", "moe_layers_enum"):
        if (listed := fields.numbers(name)) is not None:
            return [layer in listed for layer in layers]
    if isinstance(fields.get("moe_layer_freq"), list):
        return [bool(one) for one in fields.one_each("moe_layer_freq", depth)]
    if fields.has("expert_layer_period"):
        period = fields.count("expert_layer_period")
        offset = fields.count("expert_layer_offset", default=0, least=0)
        return [layer % period == offset for layer in layers]
    if fields.has("moe_layer_start_index"):
        start = fields.count("moe_layer_start_index", least=0)
        end = fields.count("moe_layer_end_index", default=depth - 1, least=-1)
        end = depth - 1 if end < 0 else end
        every = fields.count("moe_layer_interval", default=1)
        return [start <= layer <= end and (layer + 1) % every == 0 for layer in layers]
    if fields.has("decoder_sparse_step"):
        step = fields.count("decoder_sparse_step")
        dense = fields.numbers("mlp_only_layers")
        if dense is None:
            dense = list(range(_DENSE_FIRST.get(family, 0)))
        return [layer not in dense and (layer + 1) % step == 0 for layer in layers]
    step = fields.count("interleave_moe_layer_step", "moe_layer_freq", default=1)
    first = fields.count(
        *("first_k_dense_replace", "num_dense_layers", "dense_mlp_idx"),
        default=_DENSE_FIRST.get(family, 0),
        least=0,
    )
    if fields.has("interleave_moe_layer_step"):
        return [(layer + 1) % step == 0 for layer in layers]
    return [layer >= first and layer % step == 0 for layer in layers]


def _every(names: str, other: str, full: str = FULL, default: int | None = None) -> Kinds:
    """Full attention in the last layer of every so many."""

    def kinds(fields: Fields, depth: int) -> list[str]:
        every = fields.count(names, default=default)
        return [other if (layer + 1) % every else full for layer in range(depth)]

    return kinds


def _where(full: Callable[[int, int], bool], other: str = SLIDING, name: str = FULL) -> Kinds:
    """Full attention in the layers that a rule holds for, given their number and the depth."""
    return lambda _, depth: [name if full(layer, depth) else other for layer in range(depth)]


def _always(*kinds: str) -> Kinds:
    """The same few kinds, over and over."""
    return lambda _, depth: [kinds[layer % len(kinds)] for layer in range(depth)]


def _cohere2_moe(fields: Fields, depth: int) -> list[str]:
    dense = fields.count("first_k_dense_replace", default=0, least=0)
    prefix = _every("prefix_dense_sliding_window_pattern", SLIDING, default=1)
    rest = _every("sliding_window_pattern", SLIDING, default=4)
    return prefix(fields, dense) + rest(fields, depth - dense)


def _deepseek_v4(fields: Fields, depth: int) -> list[str]:
    kinds = ("heavily_compressed_attention", "compressed_sparse_attention")
    return [kinds[0] if layer < 2 else kinds[layer % 2] for layer in range(depth)]


def _dots1(fields: Fields, depth: int) -> list[str]:
    full = fields.count("max_window_layers", default=depth, least=0)
    if not fields.has("sliding_window"):
        full = depth
    return [SLIDING if layer >= full else FULL for layer in range(depth)]


def _dots3_note(fields: Fields, depth: int) -> list[str]:
    near = fields.flag("use_sliding_window", True)
    return [FULL if not near or i < 2 or i % 4 == 1 else SLIDING for i in range(depth)]


def _exaone_moe(fields: Fields, depth: int) -> list[str]:
    if not fields.has("sliding_window"):
        return [FULL] * depth
    return _every("sliding_window_pattern", SLIDING, default=4)(fields, depth)


def _inkling(fields: Fields, depth: int) -> list[str]:
    near = fields.numbers("local_layer_ids")
    if near is None:
        near = [layer for layer in range(depth) if (layer + 1) % 6]
    return ["hybrid_sliding" if layer in near else "hybrid" for layer in range(depth)]


def _llama4(fields: Fields, depth: int) -> list[str]:
    if not fields.has("attention_chunk_size"):
        return [FULL] * depth
    if fields.get("no_rope_layers"):
        turned = fields.one_each("no_rope_layers", depth)
    else:
        every = fields.count("no_rope_layer_interval", default=4)
        turned = [(layer + 1) % every for layer in range(depth)]
    return [_CHUNKED if near else FULL for near in turned]


def _qwen2_moe(fields: Fields, depth: int) -> list[str]:
    near = 0
    if fields.flag("use_sliding_window"):
        near = fields.count("max_window_layers", default=0, least=0)
    return [SLIDING if (i + 1) % 2 and i < near else FULL for i in range(depth)]


def _unlimited_ocr(fields: Fields, depth: int) -> list[str]:
    return ["reference_sliding_attention" if fields.has("sliding_window") else FULL] * depth


_GEMMA4 = _where(lambda i, depth: (i + 1) % 6 == 0 or i == depth - 1)
_QWEN_NEXT = _every("full_attention_interval", LINEAR, default=4)

_RULES: dict[str, Kinds] = {
    "afmoe": _every("global_attn_every_n_layers", SLIDING, default=4),
    "bailing_hybrid": _every("layer_group_size", LINEAR, default=6),
    "beam": _GEMMA4,
    "cohere2_moe": _cohere2_moe,
    "deepseek_v4": _deepseek_v4,
    "diffusion_gemma": _GEMMA4,
    "diffusion_gemma_text": _GEMMA4,
    "dots1": _dots1,
    "dots3_note": _dots3_note,
    "dots3_note_text": _dots3_note,
    "exaone_moe": _exaone_moe,
    "flint": _where(lambda i, depth: i < 2 or i % 4 == 1 or i == depth - 1),
    "gemma4": _GEMMA4,
    "gemma4_text": _GEMMA4,
    "glm5_next": _every("full_attention_interval", LINEAR, default=4),
    "glm5_next_text": _every("full_attention_interval", LINEAR, default=4),
    "gpt_oss": _where(lambda i, _: i % 2 == 1),
    "granitemoe_swa": _where(lambda i, _: i % 4 == 0),
    "granitemoehybrid": _always(LINEAR),
    "inkling2_loop_text": _every("sliding_window_pattern", "hybrid_sliding", "hybrid", 6),
    "inkling2_text": _every("sliding_window_pattern", "hybrid_sliding", "hybrid", 6),
    "inkling_text": _inkling,
    "kimi_linear": _where(lambda i, _: i > 0 and i % 4 == 0, LINEAR),
    "kolibri1": _where(lambda i, _: (i + 1) % 5 == 0),
    "laguna": _always(FULL),
    "lara_mini": _always(LINEAR, SLIDING, LINEAR, FULL, SLIDING),
    "llama4": _llama4,
    "llama4_text": _llama4,
    "mellum": _always(FULL),
    "mimo_v2_flash": _where(lambda i, _: i == 0 or (i + 1) % 6 == 0),
    "minimax": _where(lambda i, _: i % 2 == 0, LINEAR),
    "minimax_m3_vl_text": _always(FULL),
    "muse_spark": _where(lambda i, depth: (depth - 1 - i) % 4 == 0),
    "muse_spark_text": _where(lambda i, depth: (depth - 1 - i) % 4 == 0),
    "qwen2_moe": _qwen2_moe,
    "qwen3_5_moe": _QWEN_NEXT,
    "qwen3_5_moe_text": _QWEN_NEXT,
    "qwen3_next": _QWEN_NEXT,
    "qwen4_exp_text": _QWEN_NEXT,
    "step3p5": _always(FULL),
    "unlimited_ocr_text": _unlimited_ocr,
    "zaya": _always("hybrid"),
}
"""What a family does that lists no kinds."""

_SPARSE = ("moe_layer_freq", "moe_layers", "moe_layers_enum", "interleave_moe_layer_step")

_BY_NUMBER = {
    "attn_type_list": (LINEAR, FULL),
    "hybrid_layer_pattern": (FULL, SLIDING),
}
"""Lists of a number for each layer, and what 0 and 1 mean."""

_DENSE_FIRST = {
    "axk1": 1,
    "axk2": 1,
    "beam": 3,
    "dots3_note": 1,
    "dots3_note_text": 1,
    "ernie4_5_vl_moe_text": 1,
    "flint": 2,
    "glm4_moe_lite": 1,
    "glm5_next_text": 3,
    "hy_v3": 1,
    "hy_v4": 1,
    "hy_v4_vl_text": 1,
    "kimi_linear": 1,
    "laguna": 1,
    "mimo_v2_flash": 1,
    "step3p5": 3,
    "unlimited_ocr_text": 1,
}
"""Layers without experts that a family begins with, where a file does not say how many."""
