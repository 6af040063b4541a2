"""Makes a ModelSpec of a Hugging Face ``config.json``, whatever its family calls its fields.

The counts follow the modelling code in transformers: projections exactly, norms and the other
vectors of a layer not at all where they are below a thousandth of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from planner.describe.checked_table import Fields
from planner.describe.context import CONTEXT_NAMES, longest_context
from planner.describe.layer_kinds import block_kinds, layer_tables, sparse_layers, unread_kinds
from planner.describe.mixers import layer_mixers
from planner.describe.model import Experts, Layer, ModelSpec
from planner.describe.published import translated
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
_HIDDEN = ("hidden_size", "d_model", "n_embd")
_SYNONYMS = (_EXPERT_COUNT, _TOP_K, _SHARED_COUNT, _LAYERS, _HIDDEN, CONTEXT_NAMES)
_SIZES = {
    "layers": _LAYERS,
    "hidden": _HIDDEN,
    "vocabulary": ("vocab_size",),
    "experts": _EXPERT_COUNT,
    "identity": ("zero_expert_num",),
    "top_k": _TOP_K,
}
_ALWAYS = ("layers", "hidden", "vocabulary")
"""Sizes that every model has, so that none has a null there."""
_MOST_LAYERS = 10_000
_MOST_EXPERTS = 100_000
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
        When it lacks a field, or a value cannot be.
    """
    text = _language_model(config)
    family = text["model_type"]
    name = name or str(config.get("_name_or_path") or config.get("model_type") or "") or family
    fields = Fields(text, f"config of {name}")
    blocks = block_kinds(fields)
    depth = len(blocks) if blocks else fields.count(*_LAYERS, most=_MOST_LAYERS)
    tables = layer_tables(fields, depth)
    switched_off = any(text.get(switch) is False for switch in ("is_moe", "enable_moe_block"))
    routed = not switched_off and any(
        table.has(*_EXPERT_COUNT) and table.count(*_EXPERT_COUNT, least=0) > 1 for table in tables
    )
    if not switched_off:
        _check_counted(tables, name)
    if family == "doge":
        raise SpecError(
            f"{name} (doge): its {fields.count(*_EXPERT_COUNT)} experts are rows of an embedding",
            hint="there is nothing to place: run it whole on one device",
        )
    hidden = fields.count(*_HIDDEN)
    mixers = layer_mixers(tables, fields, family, hidden, blocks)
    sparse = sparse_layers(fields, family, depth, blocks) if routed else [False] * depth
    made: dict[tuple[int, bool, str | None], tuple[Experts | None, int]] = {}
    layers = []
    for index, (table, mixer, moe) in enumerate(zip(tables, mixers, sparse, strict=True)):
        key = (id(table), moe, blocks[index] if blocks else None)
        if key not in made:
            experts = _experts(table, family, hidden) if moe else None
            made[key] = experts, _ffn_params(table, family, hidden, experts, key[2])
        experts, ffn_params = made[key]
        layers.append(Layer(mixer=mixer, ffn_params=ffn_params, experts=experts))
    tied = fields.flag("tie_word_embeddings", family in _TIED_BY_DEFAULT)
    return ModelSpec(
        name=name,
        family=family,
        hidden=hidden,
        vocab=fields.count("vocab_size"),
        context=longest_context(text, fields.where),
        tied=Fields(config, fields.where).flag("tie_word_embeddings", tied),
        layers=tuple(layers),
        other_params=hidden + _per_layer_embedding(fields, hidden, depth),
        unread=tuple(unread_kinds(fields, depth)),
    )


def stated_sizes(config: Mapping[str, Any]) -> dict[str, tuple[str, Any]]:
    """Return what a config.json states of its language model, as it is: field and value by size.

    Sizes that are not stated are left out. A field that is null states nothing where others of its
    names may, or a default.
    """
    text = _language_model(config)
    found = {}
    for size, names in _SIZES.items():
        stated = [(name, text[name]) for name in names if name in text]
        known = [each for each in stated if each[1] is not None]
        if known or (stated and size in _ALWAYS):
            found[size] = (known or stated)[0]
    return found


def _check_counted(tables: list[Fields], name: str) -> None:
    """Refuse a config that says how many experts a token uses, but not how many there are."""
    for table in tables:
        used = next((field for field in _TOP_K if table.has(field)), None)
        if used is not None and not table.has(*_EXPERT_COUNT):
            raise SpecError(
                f"{name} has {used}, and none of {', '.join(_EXPERT_COUNT[:3])}",
                hint="compare with the publisher's own, complete config.json",
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


def _language_model(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the language model's table in the planner's words, with its family's name."""
    text = _text_part(config)
    family = str(text.get("model_type") or config.get("model_type") or "unknown")
    return translated({**text, "model_type": family})


def _text_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the language model's table of a multimodal configuration."""
    key = text_key(config)
    return config if key is None else _text_part(config[key])


def are_synonyms(name: str, other: str) -> bool:
    """Whether two names of a field are read as one, so that messages may keep either."""
    return any(name in names and other in names for names in _SYNONYMS)


def text_key(config: Mapping[str, Any]) -> str | None:
    """Return the field that has the language model's table; None where the file is its own."""
    for key in ("thinker_config", "text_config", "language_config", "llm_config"):
        if isinstance(config.get(key), Mapping) and config[key]:
            return key
    return None


def _experts(fields: Fields, family: str, hidden: int) -> Experts:
    """The routed experts of one layer."""
    own_width = ("moe_intermediate_size", "expert_ffn_hidden_size", "ffn_hidden_size")
    return Experts(
        count=fields.count(*_EXPERT_COUNT, most=_MOST_EXPERTS),
        top_k=fields.count(*_TOP_K),
        identity=fields.count("zero_expert_num", default=0, least=0),
        hidden=fields.count("moe_latent_size", "moe_hidden_size", default=hidden),
        intermediate=fields.count(*own_width, "intermediate_size"),
        matrices=_matrices(fields),
        bias=family == "gpt_oss",
    )


def _matrices(fields: Fields) -> int:
    """Matrices of an MLP or an expert: 3 when gated."""
    return 2 if fields.get("mlp_hidden_act") in _UNGATED else 3


def _ffn_params(
    fields: Fields, family: str, hidden: int, experts: Experts | None, block: str | None
) -> int:
    """Weights of a layer besides its mixer and its routed experts."""
    norms = 2 * hidden
    if block not in (None, "moe", "mlp"):
        return hidden
    if experts is None:
        width = (
            "intermediate_size_mlp",
            "dense_intermediate_size",
            "prefix_dense_intermediate_size",
        )
        dense = fields.count(*width, "intermediate_size", "ffn_hidden_size")
        return _matrices(fields) * hidden * dense + norms
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
