"""The routers of later layers, found and folded, beside the families' own code."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hybrid.anatomy.norms import Scaling, probe
from hybrid.anatomy.survey import replaced_experts, survey
from hybrid.errors import UsageError
from hybrid.sharing.predictor import Lookahead
from routed_models import DEPTH, KINDS, routed_model, stand_in, token_ids

#: What is not predicted, by family: hash layers look ids up, and zaya's router has layers and a
#: state of its own.
NOT_PREDICTED = {
    "deepseek_v4": "layers 0, 2: its experts are not chosen by the scores of one matrix",
    "zaya": "layers 0, 1, 2, 3: its router's input is neither the experts' own nor made by a norm",
}
#: Families whose routers see no norm's output as it is; their inputs are taken as they are.
DIRECT = {"axk2", "flex_olmo", "qwen4_exp_text"}
#: Families that keep some modules in float32 when they are loaded, but not when they are cast.
KEEPS_FLOAT32 = {"inkling2_loop_text", "inkling2_text"}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny matrices are fastest on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Run:
    """One forward of a model, with what it chose and what its modules were given.

    Parameters
    ----------
    swap
        A module and what it is given in place of its input.
    """

    def __init__(
        self,
        model: Any,
        specs: Any,
        lookahead: Lookahead | None = None,
        swap: tuple[nn.Module, Tensor] | None = None,
    ) -> None:
        self.ids: dict[int, Tensor] = {}
        self.scores: dict[int, Tensor | None] = {}
        self.given: dict[str, Tensor] = {}
        self.made: dict[str, Any] = {}

        def experts(layer: int, real: Any, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            self.ids[layer] = ids
            if lookahead is not None:
                self.scores[layer] = lookahead.scores(layer, hidden)
            return stand_in(hidden, ids, weights)

        def note(path: str) -> Any:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                if args and isinstance(args[0], Tensor) and path not in self.given:
                    self.given[path], self.made[path] = args[0].clone(), output

            return hook

        hooks = [m.register_forward_hook(note(path)) for path, m in model.named_modules() if path]
        if swap is not None:
            module, x = swap
            hooks.append(
                module.register_forward_pre_hook(lambda _, args: (x.view_as(args[0]), *args[1:]))
            )
        try:
            with replaced_experts(specs, experts), torch.no_grad():
                model(input_ids=token_ids(5), use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()


def way_in(model: Any, kind: str, spec: Any, run: Run, router: nn.Module) -> str:
    """Name the module that turns a layer's stream into its router's choice, or into its input."""
    paths = {module: path for path, module in model.named_modules()}
    at = paths[router]
    if kind in DIRECT:
        return at
    norms = [
        path
        for path, made in run.made.items()
        if isinstance(made, Tensor)
        and made.numel() == run.given[at].numel()
        and torch.equal(made.reshape(-1), run.given[at].reshape(-1))
    ]
    return norms[0] if norms else at.rpartition(".")[0]


@pytest.mark.parametrize(
    ("kind", "massive"),
    # Routers that see the stream as it is choose among equals where one channel decides all.
    [
        *((kind, False) for kind in sorted(KINDS)),
        *((kind, True) for kind in sorted(KINDS.keys() - DIRECT)),
    ],
)
def test_folded_routers_say_what_the_familys_own_code_says(kind: str, massive: bool) -> None:
    """A layer's stream put in front of a later layer's norm: same logits, same experts chosen.

    The family's own forward is run again with that layer's input swapped; its router's input times
    its matrix is what was folded, and its choice is what the lookahead ranks first.
    """
    model, specs = routed_model(kind, massive=massive)
    views = survey(model, specs)
    lookahead = Lookahead(model, views)
    assert lookahead.reason == NOT_PREDICTED.get(kind)
    run = Run(model, specs, lookahead)
    known = [layer for layer, view in enumerate(views) if view.router]
    assert run.scores[len(specs) - 1] is None
    for layer in known[:1]:
        for later in known[1 : DEPTH + 1]:
            router, first = views[later].router, views[layer].router
            assert router is not None
            assert first is not None
            stream = run.given[way_in(model, kind, specs[layer], run, first.module)]
            module = model.get_submodule(way_in(model, kind, specs[later], run, router.module))
            swapped = Run(model, specs, swap=(module, stream))
            scores = run.scores[layer]
            assert scores is not None
            assert scores.dtype == torch.float32
            paths = {module: path for path, module in model.named_modules()}
            z = swapped.given[paths[router.module]].reshape(48, -1)
            wanted = z @ router.weight.T + (0 if router.bias is None else torch.tensor(router.bias))
            found = scores[later - layer - 1][:, : len(router.weight)]
            torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3 * float(wanted.std()))
            chosen = swapped.ids[later].reshape(48, -1).numpy()
            order = dict(lookahead.ranking(layer, scores.numpy()))[later]
            top = order[:, : chosen.shape[1]]
            assert (chosen[:, :, None] == top[:, None, :]).any(-1).mean() >= 0.97
    said = {
        layer: dict(lookahead.ranking(layer, scores.numpy()))
        for layer, scores in run.scores.items()
        if scores is not None
    }
    lookahead.limit(1)
    fewer = Run(model, specs, lookahead).scores
    for layer, of in said.items():
        found, scores = fewer[layer], run.scores[layer]
        assert (found is not None) == (layer + 1 in of)
        if found is not None and scores is not None:
            torch.testing.assert_close(found, scores[:1], rtol=1e-3, atol=1e-3 * float(found.std()))
            ((later, order),) = lookahead.ranking(layer, scores[:1].numpy())
            assert later == layer + 1
            assert (order == of[later]).all()
    lookahead.remove()


def test_most_families_are_predicted() -> None:
    """No more than two of them are not: the list of exceptions cannot grow unseen."""
    assert len(KINDS) >= 55
    assert len(NOT_PREDICTED) == 2


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("deepseek_v3", {"n_group": 4, "topk_group": 2}),
        ("deepseek_v2", {"n_group": 4, "topk_group": 2, "topk_method": "group_limited_greedy"}),
    ],
)
def test_groups_limit_the_choice(kind: str, changes: dict[str, Any]) -> None:
    """Where a token uses experts of some groups only, no other expert is ranked among the first."""
    model, specs = routed_model(kind, n_routed_experts=16, num_experts_per_tok=4, **changes)
    views = survey(model, specs)
    router = views[1].router
    assert router is not None
    assert (router.selection.groups, router.selection.top_groups) == (4, 2)
    run = Run(model, specs)
    paths = {module: path for path, module in model.named_modules()}
    logits = (run.given[paths[router.module]].reshape(48, -1) @ router.weight.T).numpy()
    order = np.argsort(-router.selection.scores(logits), axis=-1)
    assert (np.sort(order[:, :4]) == np.sort(run.ids[1].numpy())).all()
    assert (np.sort(order) == np.arange(16)).all()
    plain = np.argsort(-logits, axis=-1)[:, :4]
    assert (np.sort(plain) != np.sort(run.ids[1].numpy())).any()


@pytest.mark.parametrize("massive", [False, True])
@pytest.mark.parametrize(
    "kind", sorted(KINDS.keys() - NOT_PREDICTED.keys() - DIRECT - KEEPS_FLOAT32)
)
def test_bfloat16_models_are_read_too(kind: str, massive: bool) -> None:
    """The rounding of weights and states does not hide what the parts are."""
    model, specs = routed_model(kind, torch.bfloat16, massive)
    lookahead = Lookahead.discover(model, specs)
    assert lookahead.reason is None
    scores = lookahead.scores(0, torch.randn(1, 64, dtype=torch.bfloat16))
    assert scores is not None
    assert scores.shape[1] == 1
    assert scores.shape[2] >= 8
    assert scores.dtype == torch.float32


@pytest.mark.parametrize("kind", ["qwen3_moe", "llama4_text"])
def test_a_survey_leaves_no_trace(kind: str) -> None:
    """Hooks and experts are as before, logits bit for bit; also after a forward that failed."""
    model, specs = routed_model(kind)
    ids = token_ids(1)
    with torch.no_grad():
        before = model(input_ids=ids, use_cache=False).logits
    hooks = [len(module._forward_hooks) for module in model.modules()]
    survey(model, specs)
    lookahead = Lookahead.discover(model, specs)
    lookahead.remove()
    norm = model.model.norm
    norm.forward, own = None, norm.forward
    with pytest.raises(TypeError):
        survey(model, specs)
    norm.forward = own
    for module in model.modules():
        assert not module._forward_pre_hooks
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert all(spec.module.hybrid_experts is stand_in for spec in specs)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, before)


def test_a_router_before_a_smaller_latent_space_is_followed() -> None:
    """Where the experts' input tells nothing of the router's, that is kept, and removed again."""
    pattern = ["moe", "full_attention", "moe", "moe"]
    model, specs = routed_model("nemotron_h", layers_block_type=pattern, moe_latent_size=24)
    lookahead = Lookahead.discover(model, specs)
    assert lookahead.reason is None
    run = Run(model, specs, lookahead)
    scores = run.scores[0]
    assert scores is not None
    norm, gate = model.model.layers[2].norm, model.model.layers[2].mixer.gate
    z = norm(run.given["model.layers.0.norm"]).view(48, -1)
    torch.testing.assert_close(scores[0], z @ gate.weight.T, rtol=1e-4, atol=1e-4)
    lookahead.remove()
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_layers_beyond_the_last_are_not_predicted() -> None:
    """Three layers ahead at the first of four, one at the last but one, none at the last."""
    model, specs = routed_model("mixtral")
    lookahead = Lookahead.discover(model, specs)
    hidden = torch.randn(1, 64)
    shapes = [
        None if scores is None else tuple(scores.shape)
        for scores in (lookahead.scores(layer, hidden) for layer in range(DEPTH))
    ]
    assert shapes == [(3, 1, 8), (2, 1, 8), (1, 1, 8), None]


def test_scores_of_another_layer_are_refused() -> None:
    """The error names the layer and both numbers of layers."""
    model, specs = routed_model("mixtral")
    lookahead = Lookahead.discover(model, specs)
    lookahead.scores(1, torch.randn(1, 64))
    with pytest.raises(UsageError, match="layer 1 foretells 2 layers, got scores of 3"):
        lookahead.probabilities(1, np.zeros((3, 1, 8), np.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_norms_are_read_off_their_results(dtype: torch.dtype, centred: bool, offset: float) -> None:
    """Weight, 1 + weight, a mean taken off, a bias: each comes out; what is no norm does not."""
    weight, bias = torch.randn(32).to(dtype), torch.randn(32).to(dtype) * centred

    def norm(x: Tensor) -> Tensor:
        x = x.float() - (x.float().mean(-1, keepdim=True) if centred else 0)
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        return (x * (offset + weight.float()) + bias.float()).to(dtype)

    like = torch.empty(1, 5, 32, dtype=dtype)
    scaling = probe(norm, like)
    assert scaling is not None
    assert scaling.kind == ("centred" if centred else "rms")
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(scaling.weight, offset + weight.float(), atol=tolerance, rtol=1e-2)
    torch.testing.assert_close(scaling.bias, bias.float(), atol=tolerance, rtol=1e-2)
    assert probe(torch.tanh, like) is None
    assert probe(lambda x: norm(x) * torch.sigmoid(x), like) is None
    plain = probe(lambda x: x * 3, like)
    assert plain is not None
    assert plain.kind == "direct"
    assert Scaling.direct(32)(torch.ones(2, 32)).eq(1).all()


def test_a_norm_weight_of_zero_is_survived() -> None:
    """What a norm wipes out cannot be had back: the scores are those of the rest."""
    model, specs = routed_model("mixtral")
    norm = model.model.layers[0].post_attention_layernorm
    norm.weight.data[5] = 0
    lookahead = Lookahead.discover(model, specs)
    x = torch.randn(1, 64)
    scores = lookahead.scores(0, norm(x).detach())
    assert scores is not None
    later = model.model.layers[1]
    made = later.post_attention_layernorm(x)
    made[0, 5] = 0
    torch.testing.assert_close(scores[0], made @ later.mlp.gate.weight.T, rtol=1e-4, atol=1e-4)
