"""Model specs: the shipped files against published counts, config.json of every MoE family."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest

from planner.describe.checked_table import Fields, read_table
from planner.describe.families import from_hf_config, from_table
from planner.describe.model import ModelSpec
from planner.errors import SpecError

MODELS = Path(__file__).parents[2] / "configs" / "models"


def shipped() -> list[Path]:
    return sorted(MODELS.glob("*.toml"))


def spec(stem: str) -> ModelSpec:
    path = MODELS / f"{stem}.toml"
    return from_table(read_table(path), path.name)


def agrees(count: float, published: float, digits: int) -> bool:
    """Whether ``count`` lies within 1% of some number that rounds to the published one."""
    half = 0.5 * 10 ** (math.floor(math.log10(published)) - digits + 1)
    return (published - half) * 0.99 <= count <= (published + half) * 1.01


# Digits the publisher gives of total and active counts, and what they leave out of either:
# Mistral, Qwen and AllenAI count the embedding as active, OpenAI and DeepSeek do not, Zhipu counts
# neither embedding nor head. The figures and their sources are in the files.
PUBLISHED_DIGITS = {
    "deepseek-v2-lite": (3, 2),
    "deepseek-v3": (3, 2),
    "glm-4.5-air": (3, 2),
    "gpt-oss-120b": (5, 3),
    "gpt-oss-20b": (4, 3),
    "mixtral-8x7b": (3, 3),
    "olmoe-1b-7b": (2, 2),
    "phi-3.5-moe": (3, 2),
    "qwen2-57b-a14b": (2, 2),
    "qwen3-30b-a3b": (3, 2),
    "qwen3.6-35b-a3b": (2, 1),
}


def test_every_shipped_model_is_in_the_table() -> None:
    """No model file escapes the comparison with its publisher's figures."""
    assert [path.stem for path in shipped()] == sorted(PUBLISHED_DIGITS)


@pytest.mark.parametrize("stem", sorted(PUBLISHED_DIGITS))
def test_counts_agree_with_the_published_ones(stem: str) -> None:
    """Total and active parameters are the publisher's, to 1% of a number that rounds to theirs."""
    published = read_table(MODELS / f"{stem}.toml")["published"]
    model = spec(stem)
    total, active = model.total_params, model.active_params
    if published["counted"] == "with the embedding":
        active += model.embedding_params
    elif published["counted"] == "without embedding and head":
        total -= model.embedding_params + model.head_params
        active -= model.head_params
    else:
        assert published["counted"] == "without the embedding"
    total_digits, active_digits = PUBLISHED_DIGITS[stem]
    assert agrees(total, published["total_params"], total_digits)
    assert agrees(active, published["active_params"], active_digits)
    assert published["source"]


def test_the_comparison_is_strict() -> None:
    """The rounding rule accepts 2% off a published two-digit number at most where it rounds."""
    assert agrees(46.70e9, 46.7e9, 3)
    assert not agrees(47.5e9, 46.7e9, 3)
    assert not agrees(2.6e9, 2.4e9, 2)


@pytest.mark.parametrize(
    ("stem", "expert", "dense"),
    [
        # Model card of gpt-oss (arXiv 2508.10925, table 1): MLP 114.71B includes the routers.
        ("gpt-oss-120b", 114.70e9, 2.13e9),
        ("gpt-oss-20b", 19.12e9, 1.80e9),
        # Mixtral: 8 experts of 176.2M in 32 layers.
        ("mixtral-8x7b", 45.10e9, 1.61e9),
        # Qwen3-30B-A3B's card gives 29.9B without embeddings.
        ("qwen3-30b-a3b", 28.99e9, 1.54e9),
    ],
)
def test_expert_and_dense_parts(stem: str, expert: float, dense: float) -> None:
    """The split into routed experts and everything else agrees with published breakdowns."""
    model = spec(stem)
    assert model.expert_params == pytest.approx(expert, rel=0.01)
    assert model.dense_params == pytest.approx(dense, rel=0.01)
    assert model.expert_params + model.dense_params == model.total_params


def test_caches_follow_the_kind_of_attention() -> None:
    """Grouped queries, latents, windows and recurrences cache what their papers say."""
    assert spec("qwen3-30b-a3b").cached_numbers(1000) == 48 * 2 * 4 * 128 * 1000
    # 576 numbers a token and layer (DeepSeek-V2, section 2.1.4).
    assert spec("deepseek-v3").cached_numbers(1000) == 61 * 576 * 1000
    # Every other layer of gpt-oss keeps 128 tokens only.
    assert spec("gpt-oss-20b").cached_numbers(1000) == 12 * 2 * 8 * 64 * (1000 + 128)
    hybrid = spec("qwen3.6-35b-a3b")
    growth = hybrid.cached_numbers(2000) - hybrid.cached_numbers(1000)
    assert growth == 10 * 2 * 2 * 256 * 1000
    assert hybrid.cached_numbers(0) > 0


def test_dense_layers_come_first_where_the_model_says_so() -> None:
    """DeepSeek's first layers have no experts, Mixtral's all have."""
    assert [layer.moe for layer in spec("deepseek-v3").layers[:5]] == [False] * 3 + [True] * 2
    assert spec("deepseek-v2-lite").moe_layers == 26
    assert all(layer.moe for layer in spec("mixtral-8x7b").layers)


MIXTRAL: dict[str, Any] = read_table(MODELS / "mixtral-8x7b.toml")["config"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_local_experts": None}, "has num_experts_per_tok, and none of num_local_experts"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"vocab_size": None}, "lacks vocab_size"),
        ({"hidden_size": -4096}, "hidden_size is -4096"),
        ({"intermediate_size": 0}, "intermediate_size is 0"),
        ({"num_hidden_layers": 10**15}, "num_hidden_layers is 1e+15"),
        ({"num_attention_heads": "32"}, "num_attention_heads is '32'"),
        ({"num_attention_heads": 3.5}, "num_attention_heads is 3.5"),
        ({"num_experts_per_tok": 9}, "top_k 9 exceeds its 8 experts"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no'"),
        ({"layer_types": ["full_attention"]}, "layer_types has 1 entries for 32 layers"),
    ],
)
def test_bad_configs_are_refused(change: dict[str, Any], words: str) -> None:
    """A config that lacks a field or has an impossible one names it, its value and a remedy."""
    with pytest.raises(SpecError) as caught:
        from_hf_config({**MIXTRAL, **change}, "m")
    assert words in caught.value.message
    assert caught.value.hint


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    """Cut JSON, cut TOML, a list and a missing file each give one error that names the file."""
    bad = {"a.json": '{"model_type": "mix', "b.toml": "name = ", "c.json": "[1]", "d.json": None}
    for name, text in bad.items():
        path = tmp_path / name
        if text is not None:
            path.write_text(text)
        with pytest.raises(SpecError, match=re.escape(name)):
            read_table(path)


def test_unknown_fields_of_a_model_file_are_named() -> None:
    """A misspelt section is refused with what was probably meant."""
    with pytest.raises(SpecError) as caught:
        from_table({"name": "x", "confg": {}}, "x.toml")
    assert "confg" in caught.value.message
    assert "'config'" in str(caught.value.hint)


def test_lists_of_one_number_and_nulls() -> None:
    """Hunyuan writes one number per layer where others write one; null means absent."""
    fields = Fields({"moe_topk": [8, 8], "head_dim": None}, "x")
    assert fields.count("moe_topk") == 8
    assert fields.count("head_dim", default=3) == 3


def test_damaged_values_never_escape_as_another_error() -> None:
    """Whatever field of a config holds whatever JSON value, it parses or is refused by name."""
    junk = [None, -1, 0, 1e30, "x", [], {}, True, 3.5, [1, 2], math.nan, 10**15]
    for path in shipped():
        config = read_table(path)["config"]
        for key in config:
            for value in junk:
                try:
                    from_hf_config({**config, key: value}, path.stem)
                except SpecError as error:
                    found = error
                else:
                    continue
                assert path.stem in found.message
                assert found.hint
