"""Makes a ModelSpec of a Hugging Face ``config.json``, whatever its family calls its fields.

The counts follow the modelling code in transformers: projections exactly, norms and the other
vectors of a layer not at all where they are below a thousandth of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from planner.describe.checked_table import Fields
from planner.describe.mixers import layer_mixers
from planner.describe.model import Experts, Layer, ModelSpec
from planner.errors import SpecError

_EXPERT_COUNT = (
    "num_local_experts",
    "num_experts",
    "n_routed_experts",
    "moe_num_experts",
    "num_routed_experts",
)
_TOP_K = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_topk",
    "moe_top_k",
    "moe_k",
    "top_k_experts",
)
_SHARED_COUNT = (
    "n_shared_experts",
    "num_shared_experts",
    "moe_num_shared_experts",
    "num_shared_expert",
)
_SHARED_WIDTH = (
    "shared_expert_intermediate_size",
    "shared_experts_intermediate_size",
    "shared_intermediate_size",
    "moe_shared_expert_intermediate_size",
    "share_expert_dim",
)
_LAYERS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")
_MOST_LAYERS = 10_000
_MOST_EXPERTS = 100_000
_HIDDEN = ("hidden_size", "d_model", "n_embd")
_UNGATED = {"relu2", "relu2_no_gate"}
_TIED_BY_DEFAULT = {"gemma4", "gemma4_text", "cohere2_moe", "diffusion_gemma"}


def from_hf_config(config: Mapping[str, Any], name: str | None = None) -> ModelSpec:
    """Describe the language model a ``config.json`` stands for.

    Parameters
    ----------
    config
        The parsed file. The text part of a multimodal model is used; its towers are not counted.
    name
        How to call it; by default its own name or its family.

    Raises
    ------
    SpecError
        When the model has no routed experts, lacks a field, or a value cannot be.
    """
    family = str(config.get("model_type") or "unknown")
    name = name or str(config.get("_name_or_path") or "") or family
    text = _text_part(config)
    family = str(text.get("model_type") or family)
    fields = Fields(text, f"config of {name}")
    if family == "dbrx" and fields.has("ffn_config"):
        fields = Fields(_flatten_dbrx(text), fields.where)
    blocks = _block_types(fields)
    depth = len(blocks) if blocks else fields.count(*_LAYERS, most=_MOST_LAYERS)
    switched_off = any(text.get(switch) is False for switch in ("is_moe", "enable_moe_block"))
    if switched_off or not fields.has(*_EXPERT_COUNT) or fields.count(*_EXPERT_COUNT, least=0) < 2:
        raise SpecError(
            f"{name} ({family}) is not a Mixture-of-Experts model: its config has none of "
            f"{', '.join(_EXPERT_COUNT[:3])} above 1",
            hint="this software places routed experts; run a dense model with llama.cpp or vLLM",
        )
    if family == "doge":
        raise SpecError(
            f"{name} (doge): its {fields.count(*_EXPERT_COUNT)} experts are rows of an embedding",
            hint="there is nothing to place: run it whole on one device",
        )
    hidden = fields.count(*_HIDDEN)
    experts = _experts(fields, family, hidden)
    mixers = layer_mixers(fields, family, hidden, depth, blocks)
    sparse = _sparse_layers(fields, depth, blocks)
    layers = tuple(
        Layer(
            mixer=mixer,
            ffn_params=_ffn_params(
                fields, family, hidden, experts, moe, blocks[index] if blocks else None
            ),
            moe=moe,
        )
        for index, (mixer, moe) in enumerate(zip(mixers, sparse, strict=True))
    )
    tied = Fields(config, fields.where).flag("tie_word_embeddings", family in _TIED_BY_DEFAULT)
    return ModelSpec(
        name=name,
        family=family,
        hidden=hidden,
        vocab=fields.count("vocab_size"),
        context=_context(fields),
        tied=fields.flag("tie_word_embeddings", tied),
        layers=layers,
        experts=experts,
        other_params=hidden + _per_layer_embedding(fields, hidden, depth),
    )


def from_table(data: Mapping[str, Any], where: str) -> ModelSpec:
    """Describe the model of a ``configs/models/*.toml``: its name and its config.json's fields."""
    fields = Fields(data, where)
    fields.only(("name", "repository", "source", "config", "null", "published"))
    fields.table("config")
    return from_hf_config(settings_of(data), fields.text("name"))


def settings_of(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config.json that a ``configs/models/*.toml`` stands for.

    ``null`` lists the fields that are null there, which TOML cannot write: transformers has other
    defaults for some.
    """
    return {**data["config"], **dict.fromkeys(data.get("null", ()))}


def _context(fields: Fields) -> int | None:
    """Most tokens of context; None when the model states no limit (it has no positions)."""
    names = ("max_position_embeddings", "model_max_length", "max_seq_len", "n_positions")
    return fields.count(*names) if fields.has(*names) else None


def _text_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the language model's table of a multimodal configuration."""
    for key in ("thinker_config", "text_config", "language_config", "llm_config"):
        inner = config.get(key)
        if isinstance(inner, Mapping) and inner:
            return _text_part(inner)
    return config


def _flatten_dbrx(text: Mapping[str, Any]) -> dict[str, Any]:
    """DBRX keeps its expert and attention fields in tables of their own."""
    attention = text.get("attn_config") or {}
    ffn = text["ffn_config"]
    return {
        **text,
        "moe_num_experts": ffn.get("moe_num_experts"),
        "moe_top_k": ffn.get("moe_top_k"),
        "intermediate_size": ffn.get("ffn_hidden_size"),
        "num_attention_heads": text.get("n_heads"),
        "num_key_value_heads": attention.get("kv_n_heads"),
    }


def _block_types(fields: Fields) -> list[str] | None:
    """Families whose layers hold one thing each (Nemotron-H): what each layer is."""
    pattern = fields.data.get("hybrid_override_pattern")
    if isinstance(pattern, str):
        letters = {"M": "linear_attention", "E": "moe", "*": "full_attention", "-": "mlp"}
        return [letters[letter] for letter in pattern if letter in letters]
    blocks = fields.data.get("layers_block_type")
    if isinstance(blocks, list) and "moe" in blocks:
        return [str(block) for block in blocks]
    return None


def _experts(fields: Fields, family: str, hidden: int) -> Experts:
    """The routed experts of one layer."""
    own_width = ("moe_intermediate_size", "expert_ffn_hidden_size", "ffn_hidden_size")
    gated = fields.data.get("mlp_hidden_act") not in _UNGATED
    return Experts(
        count=fields.count(*_EXPERT_COUNT, most=_MOST_EXPERTS),
        top_k=fields.count(*_TOP_K),
        identity=fields.count("zero_expert_num", default=0, least=0),
        hidden=fields.count("moe_latent_size", "moe_hidden_size", default=hidden),
        intermediate=fields.count(*own_width, "intermediate_size"),
        matrices=3 if gated else 2,
        bias=family == "gpt_oss",
    )


def _sparse_layers(fields: Fields, depth: int, blocks: list[str] | None) -> list[bool]:
    """Which layers have routed experts; every family states it in its own way."""
    layers = range(depth)
    if blocks:
        return [block == "moe" for block in blocks]
    if kinds := fields.names("mlp_layer_types", length=depth):
        return [kind != "dense" for kind in kinds]
    for name in ("moe_layers", "moe_layers_enum"):
        if (listed := fields.numbers(name)) is not None:
            return [layer in listed for layer in layers]
    if isinstance(fields.data.get("moe_layer_freq"), list):
        frequency = fields.numbers("moe_layer_freq") or []
        return [layer < len(frequency) and bool(frequency[layer]) for layer in layers]
    if fields.has("expert_layer_period"):
        period = fields.count("expert_layer_period")
        offset = fields.count("expert_layer_offset", default=0, least=0)
        return [layer % period == offset for layer in layers]
    if fields.has("moe_layer_start_index"):
        start = fields.count("moe_layer_start_index", least=0)
        end = fields.count("moe_layer_end_index", default=depth - 1, least=0)
        every = fields.count("moe_layer_interval", default=1)
        return [start <= layer <= end and (layer + 1) % every == 0 for layer in layers]
    if fields.has("decoder_sparse_step"):
        step = fields.count("decoder_sparse_step")
        dense = fields.numbers("mlp_only_layers") or []
        return [layer not in dense and (layer + 1) % step == 0 for layer in layers]
    step = fields.count("interleave_moe_layer_step", "moe_layer_freq", default=1)
    first = fields.count("first_k_dense_replace", "num_dense_layers", default=0, least=0)
    if fields.has("interleave_moe_layer_step"):
        return [(layer + 1) % step == 0 for layer in layers]
    return [layer >= first and layer % step == 0 for layer in layers]


def _ffn_params(
    fields: Fields, family: str, hidden: int, experts: Experts, moe: bool, block: str | None
) -> int:
    """Weights of a layer besides its mixer and its routed experts."""
    norms = 2 * hidden
    if block not in (None, "moe", "mlp"):
        return hidden
    if not moe:
        width = (
            "intermediate_size_mlp",
            "dense_intermediate_size",
            "prefix_dense_intermediate_size",
        )
        dense = fields.count(*width, "intermediate_size", "ffn_hidden_size")
        return experts.matrices * hidden * dense + norms
    router = hidden * (experts.count + experts.identity)
    projections = 2 * hidden * experts.hidden if experts.hidden != hidden else 0
    shared = experts.matrices * hidden * _shared_width(fields, family, experts)
    extra = 0
    if family == "longcat_flash":
        # Each of its layers is two attentions and two dense feed-forwards around one MoE.
        extra = 2 * 3 * hidden * fields.count("ffn_hidden_size")
    elif family.startswith("gemma4") or family == "diffusion_gemma":
        # A dense feed-forward runs beside the experts.
        extra = 3 * hidden * fields.count("intermediate_size")
    return router + projections + shared + norms + extra


def _per_layer_embedding(fields: Fields, hidden: int, depth: int) -> int:
    """Gemma's small models give every layer an embedding of its own, and projections for it."""
    width = fields.count("hidden_size_per_layer_input", default=0, least=0)
    if not width:
        return 0
    table = fields.count("vocab_size_per_layer_input") * depth * width
    return table + depth * 3 * hidden * width


def _shared_width(fields: Fields, family: str, experts: Experts) -> int:
    """Total intermediate width of the shared experts, 0 when there are none."""
    if family.startswith(("llama4", "hunyuan")):
        return experts.intermediate
    if fields.has(*_SHARED_WIDTH):
        return fields.count(*_SHARED_WIDTH, least=0)
    return fields.count(*_SHARED_COUNT, default=0, least=0) * experts.intermediate
