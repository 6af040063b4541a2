"""Experts from packed slots against a float64 twin: plain torch here, Triton where it runs.

``test_gpu_triton.py`` runs this file again in Triton's interpreter; with a GPU, both
implementations run on it too.
"""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import pytest
import torch

import naive_gpu
from cpu_experts.ffn import run_experts
from gpu_experts import reference
from gpu_experts.cuda import kernels
from gpu_experts.routing import VECTOR_LOAD, sort_by_slot
from hybrid.formats.block import ACTIVATIONS, Block
from hybrid.formats.errors import FormatError, ShapeError
from hybrid.formats.matrix import pack, unpack
from hybrid.formats.registry import FORMATS
from random_experts import random_experts, random_routing

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
PLACES = [("torch", "cpu")]
if INTERPRETED:
    PLACES = [("triton", "cpu")]
CUDA = [
    pytest.param(implementation, "cuda", marks=pytest.mark.gpu)
    for implementation in ("torch", "triton")
]
everywhere = pytest.mark.parametrize(("implementation", "place"), PLACES + CUDA)

#: Sums of a hundred float32 products of order one, relative to the largest result.
EXACT = 2e-6
#: Widened weights and intermediates rounded to the activations' type, likewise.
ROUNDED = {torch.float32: EXACT, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


@pytest.fixture(autouse=True)
def _only_where_it_can_run(request: pytest.FixtureRequest) -> None:
    """Skip what needs a GPU where there is none."""
    place = request.node.callspec.params.get("place") if hasattr(request.node, "callspec") else None
    if place == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(autouse=True)
def _products_of_bfloat16() -> None:
    """Triton's interpreter multiplies the bits of bfloat16 as integers: widen them for it."""
    if not INTERPRETED:
        return
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    if getattr(builder, "widens_bfloat16", False):
        return
    plain = builder.create_dot

    def create_dot(self, a, b, d, *options):
        return plain(self, _widened(interpreter, a), _widened(interpreter, b), d, *options)

    builder.create_dot, builder.widens_bfloat16 = create_dot, True


def _widened(interpreter, handle):
    import triton.language as tl

    if handle.dtype.scalar != tl.bfloat16:
        return handle
    numbers = (handle.data.astype(np.uint32) << 16).view(np.float32)
    return interpreter.TensorHandle(numbers, tl.float32)


def _compare(shape, tokens, implementation, place, dtype=torch.float32, experts=4, top_k=2):
    """Random experts, routing and tokens; some pairs elsewhere; out holds something before."""
    blocks, weights = random_experts(shape, experts)
    layout = shape.with_stride(blocks.shape[1])
    ids, factors = random_routing(tokens, experts, top_k)
    ids = np.where(np.random.default_rng(3).random(ids.shape) < 0.2, -1, ids).astype(np.int32)
    x = np.random.default_rng(2).standard_normal((tokens, shape.hidden)).astype(np.float32)
    hidden = torch.from_numpy(x).to(place, dtype)
    out = torch.ones(tokens, shape.hidden, device=place)
    routing = sort_by_slot(ids, factors)
    table = torch.from_numpy(routing.table).to(place)
    slots = torch.from_numpy(blocks).to(place)
    kernels.run(hidden, routing, table, slots, layout, out, implementation)
    want = 1 + naive_gpu.experts(shape, weights, hidden.float().cpu().numpy(), ids, factors)
    vector = implementation == "triton" and routing.largest_load <= VECTOR_LOAD
    bound = EXACT if vector or implementation == "torch" else ROUNDED[dtype]
    error = np.abs(out.cpu().numpy() - want).max() / np.abs(want).max()
    assert error <= bound, f"off by {error:.2e} of the largest result"
    return routing


@everywhere
@pytest.mark.parametrize("fmt", ["q4_0", "q8_0"])
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_equals_the_twin_at_every_load(implementation, place, fmt, tokens) -> None:
    """One token, a few, and enough for the matrix kernels with a tile that is not full."""
    shape = Block(hidden=64, intermediate=96, format=fmt)
    routing = _compare(shape, tokens, implementation, place)
    assert (routing.largest_load > VECTOR_LOAD) == (tokens == 40)


@everywhere
@pytest.mark.parametrize("fmt", ["q4_0", "q8_0"])
@pytest.mark.parametrize("tokens", [2, 14])
@pytest.mark.parametrize(("hidden", "intermediate"), [(1, 1), (33, 31), (200, 140)])
def test_ragged_sizes(implementation, place, fmt, tokens, hidden, intermediate) -> None:
    """Sizes that fill neither strips, groups nor spans of 128, with biases."""
    shape = Block(hidden=hidden, intermediate=intermediate, format=fmt, bias=True)
    _compare(shape, tokens, implementation, place)


@everywhere
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("tokens", [1, 12])
def test_activations(implementation, place, activation, gated, tokens) -> None:
    """Every activation, with and without a gate, in both kinds of kernel."""
    shape = Block(hidden=32, intermediate=48, format="q8_0", activation=activation, gated=gated)
    _compare(shape, tokens, implementation, place)


@everywhere
@pytest.mark.parametrize("tokens", [1, 12])
def test_clamped_swiglu_with_offset_and_biases(implementation, place, tokens) -> None:
    """gpt_oss's arithmetic: clamps below typical values, alpha, up + 1, biases everywhere."""
    shape = Block(
        hidden=64,
        intermediate=64,
        format="q4_0",
        limit=0.4,
        alpha=1.702,
        up_offset=1.0,
        bias=True,
    )
    _compare(shape, tokens, implementation, place)


@everywhere
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("fmt", ["q4_0", "q8_0"])
@pytest.mark.parametrize("tokens", [1, 40])
def test_half_precision_activations(implementation, place, dtype, fmt, tokens) -> None:
    """Results are within the type's rounding; a token or a few are exact to float32's."""
    _compare(Block(hidden=96, intermediate=64, format=fmt), tokens, implementation, place, dtype)


@everywhere
@pytest.mark.parametrize("tokens", [1, 70])
def test_tiles_of_all_heights_and_one_slot_only(implementation, place, tokens) -> None:
    """All tokens to the same experts: more than one tile a slot, the last one not full."""
    _compare(
        Block(hidden=32, intermediate=32, format="q4_0"),
        tokens,
        implementation,
        place,
        experts=2,
        top_k=2,
    )


@everywhere
def test_the_same_call_gives_the_same_bits(implementation, place) -> None:
    """No sum depends on which program is first."""
    shape = Block(hidden=64, intermediate=64, format="q4_0")
    blocks, _ = random_experts(shape, 4)
    layout = shape.with_stride(blocks.shape[1])
    ids, factors = random_routing(20, 4, 3)
    routing = sort_by_slot(ids.astype(np.int32), factors)
    x = torch.randn(20, 64, generator=torch.Generator().manual_seed(0)).to(place)
    outs = [torch.zeros(20, 64, device=place) for _ in range(2)]
    for out in outs:
        table, slots = torch.from_numpy(routing.table), torch.from_numpy(blocks)
        kernels.run(x, routing, table.to(place), slots.to(place), layout, out, implementation)
    assert torch.equal(*outs)


@everywhere
def test_nothing_routed_here_changes_nothing(implementation, place) -> None:
    """A call whose every pair is elsewhere leaves the output as it was."""
    shape = Block(hidden=32, intermediate=32, format="q4_0")
    blocks, _ = random_experts(shape, 1)
    layout = shape.with_stride(blocks.shape[1])
    routing = sort_by_slot(np.full((3, 2), -1, np.int32), np.ones((3, 2), np.float32))
    out = torch.full((3, 32), 7.0, device=place)
    table, slots = torch.from_numpy(routing.table), torch.from_numpy(blocks)
    x = torch.zeros(3, 32, device=place)
    kernels.run(x, routing, table.to(place), slots.to(place), layout, out, implementation)
    assert (out == 7).all()


@everywhere
@pytest.mark.parametrize("fmt", ["q4_0", "q8_0"])
@pytest.mark.parametrize(
    "options",
    [
        {"hidden": 72, "intermediate": 40, "bias": True, "limit": 7.0, "up_offset": 1.0},
        {"hidden": 128, "intermediate": 64, "gated": False, "activation": "relu2"},
        {"hidden": 33, "intermediate": 31, "gated": False, "activation": "sigmoid"},
        {"hidden": 4, "intermediate": 4},
    ],
)
def test_trying_the_kernels_out_finds_nothing_wrong(implementation, place, fmt, options) -> None:
    """The comparison with plain torch that a device makes when it is opened passes."""
    if implementation == "torch":
        pytest.skip("is what is compared with")
    shape = Block(format=fmt, **options)
    layout = shape.with_stride(-(-shape.block_bytes // 16) * 16)
    for dtype in (torch.float32, torch.float16):
        note = kernels.probe(
            layout, dtype, torch.device(place), lambda array: torch.from_numpy(array).to(place)
        )
        assert note is None


@everywhere
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_cpus_share_is_added_in_one_kernel(implementation, place, dtype) -> None:
    """``out + share``, rounded once, at sizes that do not fill the last block."""
    if implementation == "torch":
        pytest.skip("adds by itself")
    draw = torch.Generator().manual_seed(0)
    out, share = (torch.randn(3, 333, generator=draw).to(place) for _ in range(2))
    total = torch.empty(3, 333, dtype=dtype, device=place)
    kernels.add_host(out, share, total)
    # Triton's interpreter cuts bfloat16 off instead of rounding it.
    bound = 0.008 if INTERPRETED and dtype is torch.bfloat16 else 0
    torch.testing.assert_close(total, (out + share).to(dtype), rtol=bound, atol=0)


@everywhere
def test_slots_beyond_four_gigabytes_are_reached(implementation, place) -> None:
    """Offsets into slots are 64 bits wide: a slot past 2^32 bytes gives its own expert."""
    if place == "cpu":
        pytest.skip("takes 5 GB of the device's memory")
    shape = Block(hidden=32, intermediate=32, format="q4_0")
    blocks, weights = random_experts(shape, 1)
    layout = replace(shape.with_stride(blocks.shape[1]), stride=1 << 24)
    slots = torch.zeros(300, 1 << 24, dtype=torch.uint8, device=place)
    slots[299, : blocks.shape[1]] = torch.from_numpy(blocks[0]).to(place)
    ids, ones = np.full((1, 1), 299, np.int32), np.ones((1, 1), np.float32)
    routing = sort_by_slot(ids, ones)
    x, out = torch.ones(1, 32, device=place), torch.zeros(1, 32, device=place)
    table = torch.from_numpy(routing.table).to(place)
    kernels.run(x, routing, table, slots, layout, out, implementation)
    want = naive_gpu.experts(shape, weights, np.ones((1, 32), np.float32), ids * 0, ones)
    np.testing.assert_allclose(out.cpu(), want, atol=1e-5)


@pytest.mark.skipif(INTERPRETED, reason="plain torch")
@pytest.mark.parametrize(("fmt", "down"), [("bf16", ""), ("f32", ""), ("q4_k", "q6_k")])
def test_other_experts_in_plain_torch(fmt: str, down: str) -> None:
    """Experts that the device's kernels do not read run from their slots too."""
    shape = Block(hidden=33, intermediate=31, format=fmt, down_format=down, bias=True)
    _compare(shape, 9, "torch", "cpu")


@pytest.mark.skipif(INTERPRETED, reason="plain torch")
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("size", [(16, 32), (50, 70), (1, 1), (300, 40)])
def test_dequantize_is_unpack(fmt: str, size, monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers are those of the CPU's own unpacking, in slices of any size, bit for bit."""
    w = np.random.default_rng(0).standard_normal(size).astype(np.float32)
    packed = pack(w, fmt)
    want = unpack(packed, *size, fmt)
    for limit in (64 << 20, 5000):
        monkeypatch.setattr(reference, "_SLICE_BYTES", limit)
        got = reference.dequantize(torch.from_numpy(packed), *size, fmt)
        np.testing.assert_array_equal(got, want)
    half = reference.dequantize(torch.from_numpy(packed), *size, fmt, torch.bfloat16)
    assert torch.equal(half, torch.from_numpy(want).to(torch.bfloat16))


@pytest.mark.skipif(INTERPRETED, reason="plain torch")
def test_dequantize_refuses_what_does_not_fit() -> None:
    """A buffer of another size, or an unknown format, is named."""
    with pytest.raises(
        ShapeError, match=r"packed q4_0 \[16, 32\] takes uint8 \[288\], got .*\[5\]"
    ):
        reference.dequantize(torch.zeros(5, dtype=torch.uint8), 16, 32, "q4_0")
    with pytest.raises(FormatError, match="'q2'"):
        reference.dequantize(torch.zeros(5, dtype=torch.uint8), 16, 32, "q2")


@pytest.mark.skipif(INTERPRETED, reason="plain torch")
@pytest.mark.parametrize("fmt", ["q4_0", "q8_0"])
def test_the_cpu_kernels_agree_but_for_their_int8_activations(fmt: str) -> None:
    """CPU and device compute the same experts: they differ by what int8 activations round off.

    Each of the two roundings is at most half of 1/127 of a group's largest value; over a
    hundred inputs of either sign the errors add up to 0.9 to 1.7% of the largest result.
    """
    shape = Block(hidden=96, intermediate=128, format=fmt)
    blocks, _ = random_experts(shape, 4)
    ids, factors = random_routing(20, 4, 2)
    x = np.random.default_rng(2).standard_normal((20, 96)).astype(np.float32)
    cpu, out = np.zeros_like(x), torch.zeros(20, 96)
    run_experts(x, ids, factors, blocks, shape, cpu)
    routing = sort_by_slot(ids.astype(np.int32), factors)
    layout = shape.with_stride(blocks.shape[1])
    table, slots = torch.from_numpy(routing.table), torch.from_numpy(blocks)
    kernels.run(torch.from_numpy(x), routing, table, slots, layout, out, "torch")
    error = np.abs(out.numpy() - cpu).max() / np.abs(cpu).max()
    assert 0 < error < 0.02


@pytest.mark.skipif(INTERPRETED, reason="plain torch")
def test_what_runs_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Triton, or for experts that it cannot read, there is a note with the remedy."""
    quantized = naive_gpu.small_layout()
    monkeypatch.setattr(kernels, "has_triton", lambda: True)
    assert kernels.choose(quantized) == ("triton", None)
    monkeypatch.setattr(kernels, "has_triton", lambda: False)
    implementation, note = kernels.choose(quantized)
    assert implementation == "torch"
    assert "install triton" in note.remedy
    wide = Block(hidden=4, intermediate=4, format="bf16", stride=8192)
    monkeypatch.setattr(kernels, "has_triton", lambda: True)
    implementation, note = kernels.choose(wide)
    assert implementation == "torch"
    assert "bf16" in note.reason
    mixed = Block(hidden=4, intermediate=4, format="q4_0", down_format="q6_k", stride=8192)
    implementation, note = kernels.choose(mixed)
    assert implementation == "torch"
    assert "the experts are q4_0+q6_k" in note.reason


@pytest.mark.skipif(INTERPRETED, reason="plain torch")
def test_long_calls_are_cut_to_the_workspace() -> None:
    """No pass takes more than the stated memory, and a single token always runs."""
    shape = Block(hidden=2048, intermediate=768, format="q4_0")
    layout = shape.with_stride(shape.block_bytes)
    each = 4 * 768 + 4 * 2048
    step = kernels.tokens_a_pass(layout, 8)
    assert step * 8 * each <= kernels.WORKSPACE_BYTES < (step + 1) * 8 * each
    assert kernels.tokens_a_pass(layout, 1 << 20) == 1
    assert kernels.tokens_a_pass(layout, 0) >= 1
    short = kernels.workspace_bytes(layout, 10, 8)
    assert short == 80 * each + 10 * 4 * 2048
    assert (
        kernels.workspace_bytes(layout, 100_000, 8) < kernels.WORKSPACE_BYTES + 100_000 * 8192 + 1
    )
