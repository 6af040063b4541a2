"""The fast path of a loaded model beside transformers' code on the same weights."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

import hybrid.fast.decode
from cpu_experts.decoder.decoder import Decoder
from hybrid.fast.attach import DecodePath, attach_fast_path
from hybrid.packed.dense import QuantizedEmbedding
from hybrid.session.model import HybridModel
from hybrid.transformers_api import cache_argument, returned_cache
from hybrid.weights.checkpoint import convert
from hybrid.weights.config import HybridConfig
from massive import make_massive
from tiny_families import VOCAB, families, tiny_config

FAMILIES = [
    *("qwen3_moe", "mixtral", "olmoe", "qwen2_moe", "phimoe", "granitemoe", "gpt_oss"),
    *("glm4_moe", "ernie4_5_moe"),
]
#: Families with a compressed cache, at sizes that every format takes; queries with and without
#: compression, groups of experts chosen by one or two of each.
COMPRESSED = {
    "deepseek_v3": {"n_group": 4, "topk_group": 2},
    "deepseek_v3 with plain queries": {"q_lora_rank": None, "rope_interleave": False},
    "deepseek_v2": {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
    "deepseek_v2 with plain queries": {"q_lora_rank": None, "first_k_dense_replace": 1},
    "glm4_moe_lite": {},
}
RANKS = {"kv_lora_rank": 32, "q_lora_rank": 32}
STORES = {"f32": ("f32", None), "q8_0": ("q8_0", "q8_0")}
NEW_TOKENS = 20
PROMPT = torch.tensor([[5, 9, 33, 21, 7, 80, 2]])


def _save(family: str, directory: Path, massive: bool = False, **changes: Any) -> None:
    """A tiny model with weights large enough that every part of it shows in the logits."""
    config, kind = families()[family]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind(tiny_config(config, **changes))
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=2.4 / parameter.shape[-1] ** 0.5)
            else:
                parameter.data += torch.randn_like(parameter) * 0.2
        for name, buffer in model.named_buffers():
            if "correction" in name:
                buffer.copy_(torch.rand_like(buffer) * 0.1)
    if massive:
        make_massive(model)
    model.save_pretrained(directory)


def _load(
    family: str,
    folder: Path,
    store: str = "f32",
    dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> Any:
    experts, dense = STORES[store]
    _save(family, folder / "source", **changes)
    convert(folder / "source", folder / "model", experts=experts, dense=dense)
    return _open(folder / "model", dtype)


def _open(converted: Path, dtype: torch.dtype) -> Any:
    model = AutoModelForCausalLM.from_pretrained(
        converted, dtype=dtype, quantization_config=HybridConfig(fast=False)
    )
    model.generation_config.eos_token_id = None  # every run as long as it is asked to be
    return model


def install_fast_decode(model: Any) -> DecodePath:
    """Give a model that was loaded without it the fast path; ``model.slow`` goes past it.

    Packed modules replace the model's own, as in HybridModel.
    """
    model.slow = model.forward
    attach_fast_path(model, replace=True)
    model.hybrid_fast.settle(model)
    return model.hybrid_fast.path


def _greedy(model: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and the logits that they were chosen by."""
    out = model.generate(
        PROMPT,
        attention_mask=torch.ones_like(PROMPT),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        pad_token_id=0,
        **options,
    )
    return out.sequences, torch.cat(out.logits)


class _Counted:
    """Counts the tokens that go through the fast path of a model."""

    def __init__(self, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        decoder = model.hybrid_fast.decoder
        real = decoder.forward

        def forward(arguments: Any) -> Any:
            self.count += 1
            return real(arguments)

        monkeypatch.setattr(decoder, "forward", forward)


@pytest.fixture(autouse=True)
def half_precision_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let transformers' caches round keys and values to half precision, as ours keeps them."""
    for kind in (DynamicLayer, DynamicSlidingWindowLayer):
        real = kind.update

        def update(self: Any, *states: Any, real: Any = real, **options: Any) -> Any:
            keys, values = (side.half().to(side.dtype) for side in states[:2])
            return real(self, keys, values, *states[2:], **options)

        monkeypatch.setattr(kind, "update", update)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model with the fast path; ``model.slow`` is transformers' own forward."""
    model = _load("qwen3_moe", tmp_path_factory.mktemp("qwen"))
    assert install_fast_decode(model).fast
    return model


@pytest.mark.parametrize(
    ("family", "store"), [*product(FAMILIES, STORES), *product(COMPRESSED, ["f32"])]
)
def test_a_family_decodes_as_transformers_does(
    family: str, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prefill and 20 tokens: the same tokens, the same logits, on the fast path."""
    changes: dict[str, Any] = RANKS | COMPRESSED[family] if family in COMPRESSED else {}
    model = _load(family.split()[0], tmp_path, store, **changes)
    tokens, logits = _greedy(model)
    path = install_fast_decode(model)
    assert path.fast, path.reason
    counted = _Counted(model, monkeypatch)
    fast_tokens, fast_logits = _greedy(model)
    assert counted.count == NEW_TOKENS - 1
    assert torch.equal(fast_tokens, tokens)
    distances = (fast_logits - logits).abs().amax(dim=1) / logits.std()
    # Roundings, of activations to int8 and of keys and values to half precision, can fall to
    # the other side of a half, and from then on the two caches differ.
    assert distances[0] < 1e-3
    assert distances.max() < (5e-3 if store == "f32" else 0.2)


@pytest.mark.parametrize("family", [*FAMILIES, *COMPRESSED])
def test_massive_activations_in_float32(family: str, tmp_path: Path) -> None:
    """A stream with values in the thousands takes the fast path, to the same tokens."""
    changes: dict[str, Any] = RANKS | COMPRESSED[family] if family in COMPRESSED else {}
    model = _load(family.split()[0], tmp_path, massive=True, **changes)
    tokens, logits = _greedy(model)
    path = install_fast_decode(model)
    assert path.fast, path.reason
    fast_tokens, fast_logits = _greedy(model)
    assert torch.equal(fast_tokens, tokens)
    assert (fast_logits - logits).abs().max() < 5e-3 * logits.std()


@pytest.mark.parametrize(
    ("family", "store"), [*product(FAMILIES, STORES), *product(COMPRESSED, ["f32"])]
)
def test_massive_activations_in_bfloat16(family: str, store: str, tmp_path: Path) -> None:
    """In bfloat16 the path is taken, too, and is at least as exact as transformers' code there.

    Exact is the same model in float32. All read the same tokens, one by one after the prompt.
    """
    changes: dict[str, Any] = RANKS | COMPRESSED[family] if family in COMPRESSED else {}
    model = _load(family.split()[0], tmp_path, store, dtype=torch.bfloat16, massive=True, **changes)
    path = install_fast_decode(model)
    assert path.fast, path.reason
    ids = torch.randint(0, VOCAB, (1, 24), generator=torch.Generator().manual_seed(3))
    wanted, found, theirs = (
        _step_by_step(forward, other.config, ids)
        for other in [_open(tmp_path / "model", torch.float32)]
        for forward in (other, model, model.slow)
    )
    apart, theirs_apart = ((logits - wanted).norm(dim=1) for logits in (found, theirs))
    assert apart.median() <= 1.2 * theirs_apart.median()


@torch.no_grad()
def _step_by_step(forward: Any, config: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits ``[T, V]`` float32 of all tokens but the first eight."""
    cache = DynamicCache(config=config)
    forward(input_ids=ids[:, :8], **cache_argument(cache), use_cache=True)
    steps = [
        forward(input_ids=ids[:, at : at + 1], **cache_argument(cache), use_cache=True)
        for at in range(8, ids.shape[1])
    ]
    return torch.cat([step.logits[0].float() for step in steps])


@pytest.mark.parametrize("family", COMPRESSED)
def test_quantized_products_of_a_compressed_cache(family: str, tmp_path: Path) -> None:
    """Fed the same tokens, both paths' logits are as near as the roundings that differ let them.

    transformers' code rounds every latent to int8 and then makes keys of it, ours rounds none.
    """
    changes = RANKS | COMPRESSED[family]
    model = _load(family.split()[0], tmp_path, "q8_0", **changes)
    tokens = _greedy(model)[0]
    path = install_fast_decode(model)
    assert path.fast, path.reason
    logits = []
    with torch.no_grad():
        for forward in (model, model.slow):
            cache = DynamicCache(config=model.config)
            forward(input_ids=PROMPT, **cache_argument(cache), use_cache=True)
            steps = [
                forward(input_ids=tokens[:, at : at + 1], **cache_argument(cache), use_cache=True)
                for at in range(PROMPT.shape[1], tokens.shape[1])
            ]
            logits.append(torch.cat([step.logits[:, -1] for step in steps]))
    found, wanted = logits
    distances = (found - wanted).norm(dim=1) / wanted.norm(dim=1)
    assert distances.median() < 0.08


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_generation_beyond_a_sliding_window(family: str, tmp_path: Path) -> None:
    """A window of 8 with 27 positions: prompt and new tokens both leave it."""
    model = _load(family, tmp_path, sliding_window=8)
    tokens, logits = _greedy(model)
    assert install_fast_decode(model).fast
    fast_tokens, fast_logits = _greedy(model)
    assert torch.equal(fast_tokens, tokens)
    assert (fast_logits - logits).abs().max() < 1e-4 * logits.std()


def test_yarn_and_partial_rotary_embeddings(tmp_path: Path) -> None:
    """Angles come from the model's own module, whatever its kind."""
    rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}
    rope["original_max_position_embeddings"] = 32
    model = _load("qwen3_moe", tmp_path, rope_parameters=rope)
    tokens, logits = _greedy(model)
    assert install_fast_decode(model).fast
    fast_tokens, fast_logits = _greedy(model)
    assert torch.equal(fast_tokens, tokens)
    assert (fast_logits - logits).abs().max() < 1e-4 * logits.std()


def test_mixed_layers_and_tied_weights(tmp_path: Path) -> None:
    """A layer without experts, and an lm_head that is the embedding: one copy of its weights."""
    changes = {"mlp_only_layers": [0], "tie_word_embeddings": True}
    model = _load("qwen3_moe", tmp_path, **changes)
    tokens, logits = _greedy(model)
    assert install_fast_decode(model).fast
    fast_tokens, fast_logits = _greedy(model)
    assert torch.equal(fast_tokens, tokens)
    assert (fast_logits - logits).abs().max() < 1e-4 * logits.std()
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, QuantizedEmbedding)
    assert embedding.packed.data_ptr() == model.lm_head.packed.data_ptr()


def test_sampling_draws_the_same_tokens(qwen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fast path sits below sampling: one seed, one text."""
    options: dict[str, Any] = {"do_sample": True, "temperature": 0.8, "top_p": 0.9}
    found = []
    for forward in (qwen.forward, qwen.slow):
        monkeypatch.setattr(qwen, "forward", forward)
        torch.manual_seed(7)
        found.append(qwen.generate(PROMPT, max_new_tokens=12, pad_token_id=0, **options))
    assert torch.equal(*found)


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"prompt_lookup_num_tokens": 3},
        {"num_return_sequences": 1, "use_cache": False},
    ],
    ids=["beams", "prompt lookup", "no cache"],
)
def test_other_ways_to_generate(
    qwen: Any, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beams reorder the cache, lookup feeds several tokens and crops: same result as without us."""
    found = []
    for forward in (qwen.forward, qwen.slow):
        monkeypatch.setattr(qwen, "forward", forward)
        repeated = PROMPT.repeat(1, 3)
        found.append(
            qwen.generate(repeated, max_new_tokens=12, do_sample=False, pad_token_id=0, **options)
        )
    assert torch.equal(*found)


def test_an_assistant_model(qwen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Assisted decoding crops both models' caches after the fast path has written them."""
    wanted = _greedy(qwen)[0]
    counted = _Counted(qwen, monkeypatch)
    monkeypatch.setattr(qwen.generation_config, "num_assistant_tokens", 4)
    monkeypatch.setattr(qwen.generation_config, "num_assistant_tokens_schedule", "constant")
    monkeypatch.setattr(qwen.generation_config, "assistant_confidence_threshold", 0.0)
    found = qwen.generate(
        PROMPT, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0, assistant_model=qwen
    )
    assert torch.equal(found, wanted)
    assert counted.count > 0


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The same with a compressed cache, whose keys and values differ in size."""
    model = _load("deepseek_v3", tmp_path_factory.mktemp("compressed"), **RANKS)
    assert install_fast_decode(model).fast
    return model


@pytest.mark.parametrize(
    ("name", "keys", "values"),
    [("qwen", (1, 2, 24, 16), (1, 2, 24, 16)), ("compressed", (1, 1, 24, 32), (1, 1, 24, 8))],
)
def test_both_paths_take_turns_on_one_cache(
    name: str, keys: Any, values: Any, request: pytest.FixtureRequest
) -> None:
    """Single tokens, several at once, a crop, single tokens: as if computed in one piece."""
    qwen = request.getfixturevalue(name)
    ids = torch.randint(0, VOCAB, (1, 24), generator=torch.Generator().manual_seed(3))
    cache = DynamicCache(config=qwen.config)
    with torch.no_grad():
        wanted = qwen.slow(input_ids=ids, use_cache=True).logits[0]
        found = [qwen(input_ids=ids[:, :6], **cache_argument(cache), use_cache=True).logits[0]]
        for start, stop in ((6, 7), (7, 8), (8, 12), (12, 13), (13, 14)):
            part = qwen(input_ids=ids[:, start:stop], **cache_argument(cache), use_cache=True)
            found.append(part.logits[0])
        qwen(input_ids=ids[:, :1], **cache_argument(cache), use_cache=True)
        cache.crop(-1)
        assert cache.get_seq_length() == 14
        for at in range(14, 24):
            part = qwen(input_ids=ids[:, at : at + 1], **cache_argument(cache), use_cache=True)
            found.append(part.logits[0])
    assert cache.layers[0].keys.shape == keys
    assert cache.layers[0].values.shape == values
    assert (torch.cat(found) - wanted).abs().max() < 1e-4 * wanted.std()


def test_calls_that_the_kernels_do_not_know(qwen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches, masked positions and inner states go to transformers, with its results."""
    counted = _Counted(qwen, monkeypatch)
    single = PROMPT[:, :1]
    with torch.no_grad():
        cache = returned_cache(qwen(input_ids=PROMPT, use_cache=True))
        out = qwen(input_ids=single, **cache_argument(cache), output_hidden_states=True)
        assert len(out.hidden_states) == 3
        mask = torch.ones(1, 9, dtype=torch.long)
        mask[0, 0] = 0
        qwen(input_ids=single, **cache_argument(cache), attention_mask=mask)
        qwen(input_ids=single, **cache_argument(cache), labels=single)
        two = returned_cache(qwen(input_ids=PROMPT.repeat(2, 1), use_cache=True))
        qwen(input_ids=single.repeat(2, 1), **cache_argument(two))
    qwen(input_ids=single, **cache_argument(cache))  # gradients are asked for
    assert counted.count == 0


def test_an_unfit_family_keeps_its_code_and_says_why(tmp_path: Path) -> None:
    """A norm behind the experts has no kernel: nothing stays replaced, the reason is kept."""
    model = _load("axk1", tmp_path)
    weight = model.lm_head.weight
    path = install_fast_decode(model)
    assert not path.fast
    assert "post_mlp_layernorm" in path.reason
    assert model.lm_head.weight is weight
    assert weight.shape == (VOCAB, 64)
    assert str(path).startswith("transformers (the experts' block (AXK1MoE) has")


@pytest.mark.parametrize("massive", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_result_is_found_and_told(
    massive: bool,
    dtype: torch.dtype,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A decoder that computes something else (its scores unscaled) is not used.

    What massive activations do to the size of a layer's numbers hides nothing.
    """
    model = _load("qwen3_moe", tmp_path, dtype=dtype, massive=massive)
    read, wrong = hybrid.fast.decode.read_decoder, 0 if massive else 1

    def misread(model: Any, **options: Any) -> Any:
        model.model.layers[wrong].self_attn.scaling *= 2
        decoder = read(model, **options)
        model.model.layers[wrong].self_attn.scaling /= 2
        return decoder

    monkeypatch.setattr(hybrid.fast.decode, "read_decoder", misread)
    path = install_fast_decode(model)
    assert not path.fast
    assert f"layer {wrong} differs from transformers' by" in path.reason
    assert f"layer {wrong} differs" in capsys.readouterr().err
    assert model.hybrid_fast.decoder is None


def test_the_report_names_the_path(tiny_model: Path) -> None:
    """The report says what computes single tokens, and lists it as slow where it is."""
    model = HybridModel.from_pretrained(tiny_model)
    assert "one-token kernels (tested: every part within" in str(model.report())
    model.model.hybrid_fast.path = DecodePath(False, "some reason")
    assert "single tokens in transformers' code: some reason" in str(model.report())


def test_dense_weights_are_packed_without_rounding(tmp_path: Path) -> None:
    """Weights that were bfloat16 are kept as bfloat16, others as float32; prefill is the same."""
    model = _load("mixtral", tmp_path)
    with torch.no_grad():
        model.lm_head.weight.copy_(model.lm_head.weight.bfloat16())
        wanted = model(input_ids=PROMPT).logits
        assert install_fast_decode(model).fast
        assert model.lm_head.weight_format == "bf16"
        assert model.model.layers[0].self_attn.q_proj.weight_format == "f32"
        assert torch.allclose(model(input_ids=PROMPT).logits, wanted, atol=1e-4)


@pytest.mark.parametrize("spoilt", [(0, 2), (2,)])
def test_a_single_token_that_is_no_number_is_found(
    spoilt: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer counts by the middle one of its tokens, but NaN is none."""
    model = _load("qwen3_moe", tmp_path)
    real, calls = Decoder.layer_step, 0

    def step(self: Any, index: int, *args: Any) -> Any:
        nonlocal calls
        found = real(self, index, *args)
        if index == 1:
            calls += 1
            found = found * float("nan") if calls - 1 in spoilt else found
        return found

    monkeypatch.setattr(Decoder, "layer_step", step)
    path = install_fast_decode(model)
    assert calls == 3
    assert not path.fast
    assert "layer 1 differs from transformers' by inf" in path.reason


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_that_is_off_is_found(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits 5 % too large are wrong in either type, whatever bfloat16 rounds."""
    model = _load("qwen3_moe", tmp_path, dtype=dtype)
    real = Decoder.head_step

    def step(self: Any, x: Any, logits: Any) -> None:
        real(self, x, logits)
        logits *= 1.05

    monkeypatch.setattr(Decoder, "head_step", step)
    path = install_fast_decode(model)
    assert not path.fast
    assert "the head differs from transformers' by 0.05" in path.reason
