"""A config.json as its publisher wrote it is the model that transformers reads from it."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from hybrid.ask.asked_model import find_model
from hybrid.ask.config_classes import as_read, config_class
from hybrid.ask.names import resolve, shipped_names
from moe_configs import moe_families
from planner.describe.families import from_hf_config, from_table, text_key
from planner.describe.model import ModelSpec
from planner.errors import SpecError

LISTS = ("layer_types", "mlp_layer_types", "per_layer_config", "moe_layers", "layers_block_type")
LATENT = {
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "kv_lora_rank": 512,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
EVERY_FOURTH = [4, 8, 12, 16, 20, 24, 27]
KIMI = LATENT | {
    "model_type": "kimi_linear",
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 27,
    "num_experts": 256,
    "num_experts_per_token": 8,
    "moe_intermediate_size": 1024,
    "num_shared_experts": 1,
    "first_k_dense_replace": 1,
    "vocab_size": 163840,
    "model_max_length": 1048576,
    "linear_attn_config": {
        "full_attn_layers": EVERY_FOURTH,
        "kda_layers": [n for n in range(1, 28) if n not in EVERY_FOURTH],
        "num_heads": 32,
        "head_dim": 128,
        "short_conv_kernel_size": 4,
    },
}
MIMO = {
    "model_type": "mimo_v2_flash",
    "hidden_size": 4096,
    "intermediate_size": 16384,
    "num_hidden_layers": 48,
    "num_attention_heads": 64,
    "num_key_value_heads": 4,
    "head_dim": 192,
    "v_head_dim": 128,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 2048,
    "vocab_size": 152576,
    "hybrid_layer_pattern": [int(n > 0 and n % 6 != 5) for n in range(48)],
    "sliding_window": 128,
    "sliding_window_size": 128,
    "swa_num_key_value_heads": 8,
    "moe_layer_freq": [0] + [1] * 47,
}
BAILING = LATENT | {
    "model_type": "bailing_hybrid",
    "hidden_size": 2048,
    "intermediate_size": 5120,
    "num_hidden_layers": 42,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 512,
    "num_shared_experts": 1,
    "first_k_dense_replace": 1,
    "vocab_size": 157184,
    "layer_group_size": 6,
    "head_dim": 128,
}
MINIMAX = {
    "model_type": "minimax_text_01",
    "attn_type_list": ([0] * 7 + [1]) * 10,
    "head_dim": 128,
    "hidden_size": 6144,
    "intermediate_size": 9216,
    "num_attention_heads": 64,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 80,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "vocab_size": 200064,
    "shared_intermediate_size": 0,
}


@pytest.fixture(scope="module")
def families() -> dict[str, dict[str, Any]]:
    """The default config of every family that we name, as transformers writes it."""
    from transformers.models.auto import modeling_auto as auto

    names = {
        **auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        **auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    }
    found = moe_families(names)
    return {name: config.to_dict() | {"model_type": name} for name, config in found.items()}


def spec(config: dict[str, Any]) -> ModelSpec:
    return from_hf_config(as_read(config), "x")


def text_of(config: dict[str, Any]) -> dict[str, Any]:
    key = text_key(config)
    return config if key is None else text_of(config[key])


def read_by_transformers(config: dict[str, Any]) -> dict[str, Any] | None:
    """What transformers makes of a file; None where it refuses it."""
    from transformers import CONFIG_MAPPING

    settings = copy.deepcopy(config)
    family = settings.pop("model_type")
    try:
        return CONFIG_MAPPING[family](**settings).to_dict() | {"model_type": family}
    except (TypeError, ValueError, AttributeError, KeyError):
        return None


def differences(families: dict[str, dict[str, Any]], change: Any) -> tuple[dict[str, Any], int]:
    """Where a changed file is another model to us than what transformers makes of it."""
    wrong, compared = {}, 0
    for name, config in families.items():
        file = copy.deepcopy(config)
        change(text_of(file), name)
        theirs = read_by_transformers(file)
        if theirs is None:
            continue
        ours, wanted = spec_or_refusal(file), spec_or_refusal(theirs)
        compared += isinstance(wanted, ModelSpec)
        if ours != wanted:
            wrong[name] = (ours, wanted)
    return wrong, compared


def spec_or_refusal(config: dict[str, Any]) -> ModelSpec | str:
    try:
        return spec(config)
    except SpecError as error:
        return error.message


def test_kinds_that_a_file_leaves_out_are_the_familys(families: dict[str, dict[str, Any]]) -> None:
    """Without lists of the layers' kinds, every family's rule gives transformers' layers."""

    def leave_out(text: dict[str, Any], name: str) -> None:
        if "nemotron_h" not in name:  # whose depth is the list's length
            for field in LISTS:
                text.pop(field, None)

    wrong, compared = differences(families, leave_out)
    assert not wrong
    assert compared >= 75


def test_other_names_of_fields_are_understood(families: dict[str, dict[str, Any]]) -> None:
    """A field under the name that a family's publisher gives it is the same field."""

    def rename(text: dict[str, Any], _: str) -> None:
        known = config_class(text["model_type"])
        assert known is not None
        for other, own in known.names.items():
            if own in text:
                text[other] = text.pop(own)

    wrong, _ = differences(families, rename)
    assert not wrong


def test_fields_that_a_file_leaves_out_have_the_classes_values(
    families: dict[str, dict[str, Any]],
) -> None:
    """A file of nothing but the sizes that every file has is the model that transformers makes."""
    kept = sizes_of_every_file()

    def leave_out(text: dict[str, Any], _: str) -> None:
        for field in [field for field in text if field not in kept]:
            del text[field]

    wrong, compared = differences(families, leave_out)
    assert not wrong
    assert compared >= 60


def sizes_of_every_file() -> set[str]:
    sizes = "hidden_size vocab_size num_hidden_layers num_layers num_attention_heads n_layers"
    experts = "num_experts n_routed_experts num_local_experts moe_num_experts enable_moe_block"
    blocks = "layers_block_type d_model n_heads ffn_config attn_config"
    return {"model_type", *sizes.split(), *experts.split(), *blocks.split()}


def test_no_familys_own_fields_are_strange(families: dict[str, dict[str, Any]]) -> None:
    """What tells kinds of layers apart in a family's own config is read, or known to be none."""
    assert {name: found for name in families if (found := spec(families[name]).unread)} == {}


@pytest.mark.parametrize(
    ("config", "kinds", "cache_gib", "billions"),
    [
        (KIMI, {"latent": 7, "linear": 20}, 0.267, 49.12),
        (MIMO, {"full": 9, "sliding": 39}, 0.727, 308.78),
        (BAILING, {"latent": 7, "linear": 35}, 0.283, 35.26),
        (MINIMAX, {"full": 10, "linear": 70}, 1.387, 456.09),
    ],
    ids=lambda value: value.get("model_type") if isinstance(value, dict) else None,
)
def test_published_files(
    config: dict[str, Any], kinds: dict[str, int], cache_gib: float, billions: float
) -> None:
    """Published models whose files differ most from transformers': layers, cache of 32k, size."""
    found = spec(config)
    assert Counter(layer.mixer.kind for layer in found.layers) == kinds
    assert found.cached_numbers(32768) * 2 / 2**30 == pytest.approx(cache_gib, abs=1e-3)
    assert found.total_params / 1e9 == pytest.approx(billions, abs=5e-3)


def test_published_files_are_those_of_transformers() -> None:
    """Of the published files that transformers reads, it makes the same models."""
    for config in (KIMI, MIMO, BAILING):
        theirs = read_by_transformers(config)
        assert theirs is not None
        assert spec(config) == spec(theirs)


def test_shipped_models_are_as_published() -> None:
    """Descriptions that ship have every field that matters: defaults change nothing."""
    for name in shipped_names("models"):
        table = resolve(name, "models")
        found = find_model(name).spec
        assert found == replace(from_table(table, name), name=found.name, routing=found.routing)


def test_a_list_of_unread_kinds_is_named() -> None:
    """A field with an entry for each layer that nobody reads is said, not passed over."""
    odd = {**MIMO, "attention_kinds": ["near", "far"] * 24, "layer_period": 3}
    assert spec(odd).unread == ("attention_kinds", "layer_period")


def test_layers_of_different_experts_are_counted_one_by_one() -> None:
    """A number for each layer counts for that layer, whether listed or in a table."""
    base = {**MIMO, "moe_layer_freq": [1] * 48}
    counts = [64 + layer for layer in range(48)]
    listed = spec({**base, "n_routed_experts": counts})
    told = {str(layer): {"n_routed_experts": count} for layer, count in enumerate(counts)}
    assert listed.layers == spec({**base, "per_layer_config": told}).layers
    assert listed.expert_count == sum(counts)
    assert listed.expert_params == sum(counts) * 3 * 4096 * 2048
    assert listed.experts.count == counts[-1]


@pytest.mark.parametrize("value", [[8, 4], [8, 8, 4]])
def test_a_list_where_one_number_belongs_is_refused(value: list[int]) -> None:
    """Lists that are no layer's and differ are not cut to their first entry."""
    with pytest.raises(SpecError, match="where one number is expected"):
        spec({**MIMO, "num_experts_per_tok": value})


@pytest.mark.parametrize(
    ("layers", "words"), [({"48": {}}, "none of 48 layers"), ({"x": {}}, "'x'"), ({"1": 3}, "3")]
)
def test_bad_settings_of_single_layers_are_named(layers: dict[str, Any], words: str) -> None:
    """What a file says of layers that are not there is refused."""
    with pytest.raises(SpecError, match=words):
        spec({**MIMO, "per_layer_config": layers})


def test_plans_need_no_torch() -> None:
    """Defaults are read from sources: families that nobody has are read as they are."""
    assert config_class("qwen3_moe") is not None
    assert config_class("nobody_has_this") is None
    assert as_read({"model_type": "nobody_has_this", "a": 1})["a"] == 1
