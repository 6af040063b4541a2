"""Shared experts launched before the routed ones: nothing changes but the order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hybrid.anatomy.survey import LayerView, SharedView, replaced_experts, survey
from hybrid.sharing.shared_first import SharedFirst
from routed_models import DEPTH, KINDS, routed_model, stand_in, token_ids

#: What the families call the shared experts that they compute after the routed ones.
LATE = {
    **dict.fromkeys(
        (
            *("aria_text", "axk1", "axk2", "bailing_hybrid", "cohere2_moe", "deepseek_v2"),
            *("deepseek_v3", "deepseek_v32", "deepseek_v4", "dots1", "dots3_note_text"),
            *("exaone_moe", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "hy_v3", "hy_v4"),
            *("kimi_linear", "kolibri1", "mistral4", "nemotron_h", "sarvam_mla"),
            *("sarvam_moe", "solar_open"),
        ),
        "shared_experts",
    ),
    **dict.fromkeys(("flint", "lara_mini"), "shared_expert"),
    **dict.fromkeys(("granitemoe_swa", "granitemoehybrid", "granitemoeshared"), "shared_mlp"),
    "longcat_flash": "mlps.0",
}
#: Families that compute them first by themselves.
BY_THEMSELVES = {
    *("afmoe", "ernie4_5_moe", "hunyuan_v1_moe", "laguna", "minimax_m3_vl"),
    *("minimax_m3_vl_text", "qwen2_moe", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_next"),
    *("qwen4_exp_text", "step3p7"),
}
#: Families that have shared experts which cannot be told from the experts' input alone: weighed by
#: the router, or beside experts whose input is scaled.
NOT_ALONE = {"inkling_text", "llama4", "llama4_text"}
FIRST = "the family computes them first by itself"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny matrices are fastest on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def forward(
    model: Any, specs: Any, shared: list[nn.Module], early: SharedFirst | None = None
) -> tuple[Tensor, list[tuple[str, int]]]:
    """Return the logits, and in which order the ``shared`` and the routed experts were computed."""
    order: list[tuple[str, int]] = []

    def experts(layer: int, real: Any, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        if early is not None:
            early.launch(layer, hidden)
        order.append(("routed", layer))
        return stand_in(hidden, ids, weights)

    def note(layer: int) -> Any:
        return lambda *_: order.append(("shared", layer))

    # A module's own hooks fire when it is called; what is inside it runs when it is computed.
    inside = [next(m for m in each.modules() if isinstance(m, nn.Linear)) for each in shared]
    hooks = [module.register_forward_hook(note(at)) for at, module in enumerate(inside)]
    try:
        with replaced_experts(specs, experts), torch.no_grad():
            ids = token_ids(6, batch=2, tokens=9)
            return model(input_ids=ids, use_cache=False).logits, order
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_results_are_the_same_and_each_is_computed_once(kind: str) -> None:
    """Bit-identical logits; every late shared expert runs once, before the routed ones.

    Which module that is, is found in every family that has one, and named when it is not there.
    """
    model, specs = routed_model(kind)
    views = survey(model, specs)
    late = [view.shared.module for view in views if view.shared and view.shared.after]
    wanted, slow = forward(model, specs, late)
    early = SharedFirst.discover(model, specs, views=views)
    found, order = forward(model, specs, late, early)
    assert torch.equal(found, wanted)
    layers = range(len(specs))
    if kind in LATE:
        assert early.layers == tuple(layers)
        assert early.reason is None
        assert order == [(what, at) for at in layers for what in ("shared", "routed")]
        assert slow == [(what, at) for at in layers for what in ("routed", "shared")]
        names = [path for path, module in model.named_modules() if module is late[0]]
        assert names[0].endswith(LATE[kind])
    else:
        assert early.layers == ()
        assert order == [("routed", at) for at in layers]
        assert early.reason is not None
        assert (FIRST in early.reason) == (kind in BY_THEMSELVES)
        has_shared = any("shared_expert" in path for path, _ in model.named_modules())
        assert has_shared == (kind in NOT_ALONE | BY_THEMSELVES - {"hunyuan_v1_moe"})
    early.remove()
    again, order = forward(model, specs, late)
    assert torch.equal(again, wanted)
    assert order == slow


@pytest.fixture
def deepseek() -> tuple[Any, SharedFirst, nn.Module]:
    model, specs = routed_model("deepseek_v3")
    early = SharedFirst.discover(model, specs)
    assert early.layers == tuple(range(DEPTH))
    return model, early, model.model.layers[1].mlp.shared_experts


def test_a_result_is_given_once_and_only_for_its_input(
    deepseek: tuple[Any, SharedFirst, nn.Module],
) -> None:
    """Another tensor, other contents or a second call: the module computes as ever."""
    _, early, shared = deepseek
    x, other = torch.randn(6, 64), torch.randn(6, 64)
    with torch.no_grad():
        wanted, of_other = early._early[1]._compute(x), early._early[1]._compute(other)
        assert early.launch(1, x)
        kept = early._early[1].kept
        assert kept is not None
        given = shared(x.view(2, 3, 64))
        assert given.data_ptr() == kept[2].data_ptr()
        assert torch.equal(given.view(6, 64), wanted)
        assert shared(x).data_ptr() != kept[2].data_ptr()
        early.launch(1, x)
        assert torch.equal(shared(other), of_other)
        early.launch(1, x)
        torch.testing.assert_close(shared(x[:3]), wanted[:3])
        early.launch(1, x)
        x += 1
        assert torch.equal(shared(x), early._early[1]._compute(x))
        assert not torch.equal(shared(x), wanted)


def test_a_cancelled_step_leaves_nothing_behind(
    deepseek: tuple[Any, SharedFirst, nn.Module],
) -> None:
    """What was launched and not called for is dropped, its memory with it."""
    _, early, _ = deepseek
    early.launch(1, torch.randn(6, 64))
    early.abandon()
    assert all(kept.kept is None for kept in early._early.values())


def test_inference_mode_and_foreign_layers(deepseek: tuple[Any, SharedFirst, nn.Module]) -> None:
    """Tensors that count no writes work; a layer without a shared expert launches nothing."""
    _, early, shared = deepseek
    with torch.inference_mode():
        x = torch.randn(1, 64)
        wanted = early._early[1]._compute(x)
        assert early.launch(1, x)
        assert torch.equal(shared(x[None])[0], wanted)
    assert not early.launch(99, torch.randn(1, 64))


def test_a_forward_replaced_by_others_is_given_back(
    deepseek: tuple[Any, SharedFirst, nn.Module],
) -> None:
    """Whatever wrapped the module before us wraps it after us."""
    _, early, shared = deepseek
    early.remove()
    assert "forward" not in vars(shared)
    own = shared.forward
    calls = []

    def wrapped(x: Tensor) -> Tensor:
        calls.append(1)
        out: Tensor = own(x)
        return out

    shared.forward = wrapped
    view = LayerView(None, shared=SharedView("", shared, True, 3))  # type: ignore[arg-type]
    again = SharedFirst([view])
    x = torch.randn(2, 64)
    again.launch(0, x)
    shared(x)
    assert len(calls) == 1
    again.remove()
    assert shared.forward is wrapped
