"""What is changed about transformers' objects: all of it listed, all of it taken back."""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from hybrid import grafts
from hybrid.demo import demo_path
from hybrid.loading import load_fast_model
from hybrid.model import Model
from hybrid.packed.experts import LayerExperts
from hybrid.sharing.placement import PlacedExperts
from hybrid.weights.checkpoint import convert
from shared_demo import placed
from tiny_families import families, tiny_config

ROOT = Path(__file__).parents[2]
#: What somebody may set in tests and scripts, for :func:`grafts.runner_of`.
NAMES = {"hybrid_store", "hybrid_fast", "hybrid_experts", "hybrid_own"}


def _names(path: Path) -> Iterator[str]:
    """Attributes that a file uses, and its strings, one of which may be an attribute's name."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_nobody_else_names_what_is_added() -> None:
    """The attributes on transformers' objects stand in one file of the package."""
    files = {path.name: set(_names(path)) for path in (ROOT / "hybrid").glob("*.py")}
    assert files["grafts.py"] >= NAMES
    own = {name for name in files["grafts.py"] if name.lstrip("_").startswith("hybrid_")}
    for path in (ROOT / "hybrid").rglob("*.py"):
        if path.name != "grafts.py":
            assert not own & set(_names(path)), path


def _traces(network: nn.Module) -> list[str]:
    """What is ours about a network, found without its own list."""
    found = [type(module).__name__ for module in network.modules() if _is_ours(type(module))]
    for module in network.modules():
        found += [name for name in vars(module) if name.lstrip("_").startswith("hybrid")]
        found += ["forward" for name in vars(module) if name == "forward"]
        hooks: list[Any] = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        found += ["a hook" for hook in hooks if hook.__module__.startswith("hybrid")]
    return found


def _is_ours(kind: type) -> bool:
    return kind.__module__.startswith("hybrid") or "_hybrid_asks_first" in vars(kind)


def _undo_all(network: nn.Module) -> None:
    for graft in grafts.grafts_of(network):
        graft.undo()
    assert grafts.grafts_of(network) == []


def test_a_loaded_model_says_what_was_changed() -> None:
    """Line by line, for the model and for its copy; undone, nothing of ours is left of either."""
    network, _ = load_fast_model(demo_path(), dtype=torch.float32)
    layers = len(Model(network).layers)
    said = Model(network).changes().splitlines()
    assert "its class asks for the fast path before transformers' forward" in said
    assert "the store of its experts is with it" in said
    assert "its fast path is with it" in said
    assert f"experts run by LayerExperts ({layers} times)" in said
    assert f"its experts interface calls the function 'hybrid' ({layers} times)" in said
    assert any(line.startswith("QuantizedLinear in the place of Linear") for line in said)
    twin = copy.deepcopy(network)
    Model(twin).fast.settle(twin)
    _undo_all(twin)
    assert _traces(twin) == []
    assert Model(network).changes().splitlines() == said
    kind = type(network).__bases__[0]
    _undo_all(network)
    assert _traces(network) == []
    assert type(network) is kind
    assert network.config._experts_implementation != "hybrid"


def test_undoing_gives_the_dense_weights_back() -> None:
    """An ordinary module with the same weights comes back; the experts' parameters are empty."""
    network, _ = load_fast_model(demo_path(), dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(demo_path(), dtype=torch.float32)
    _undo_all(network)
    wanted = dict(plain.named_parameters())
    found = dict(network.named_parameters())
    assert found.keys() == wanted.keys()
    empty = {name for name, value in found.items() if value.is_meta}
    assert empty == {name for name in wanted if ".experts." in name}
    assert all(torch.equal(found[name], wanted[name]) for name in wanted if name not in empty)


def test_quantized_matrices_are_listed_and_widened(tmp_path: Path) -> None:
    """A directory whose dense weights are quantized: undone, torch's own layers multiply them."""
    config = tiny_config(families()["qwen3_moe"][0])
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "model", experts="f32", dense="q8_0")
    network = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    x = torch.randn(3, config.hidden_size)
    before = network.model.layers[0].self_attn.q_proj(x)
    assert "in the place of a layer that is not quantized" in grafts.describe(network)
    _undo_all(network)
    assert _traces(network) == []
    after = network.model.layers[0].self_attn.q_proj
    assert type(after) is nn.Linear
    assert torch.allclose(after(x), before, atol=1e-2 * before.abs().max().item())


@pytest.mark.timeout(600)
def test_a_placed_model_says_what_was_changed() -> None:
    """Shared with a device: runners, hooks and forwards more; the experts' own come back first."""
    model = placed("demo", 4)
    network = model.model
    layers = len(Model(network).layers)
    said = Model(network).changes().splitlines()
    assert f"experts run by PlacedExperts ({layers} times)" in said
    assert f"experts run by LayerExperts ({layers} times)" in said
    assert "the clock of a forward pass starts at the first decoder layer" in said
    what = "forward passes are timed, and repeated when the device's memory runs out"
    assert what in said
    for graft in grafts.grafts_of(network):
        if "PlacedExperts" in graft.what:
            graft.undo()
    assert {type(runner) for runner in Model(network).layers} == {LayerExperts}
    assert PlacedExperts.__name__ not in Model(network).changes()
    model.close()
    _undo_all(network)
    assert _traces(network) == []


def test_changes_of_classes_are_listed() -> None:
    """What is changed for every network of the process has its line and its undo, too."""

    class Output:
        kept = 1

    before = len(grafts.grafts_everywhere())
    first = grafts.set_on_class(Output, "kept", 2, "kept is 2")
    second = grafts.set_on_class(Output, "added", 3, "added is 3")
    assert grafts.grafts_everywhere()[before:] == [first, second]
    assert (Output.kept, Output.added) == (2, 3)  # type: ignore[attr-defined]
    for graft in (second, first):
        graft.undo()
    assert Output.kept == 1
    assert not hasattr(Output, "added")
    assert any("HybridConfig" in graft.what for graft in grafts.grafts_everywhere())


def test_nobody_else_alters_objects() -> None:
    """Hooks, forwards, classes and parameters of modules are changed in one file of the package."""
    ours = {"register_forward_hook", "register_forward_pre_hook", "register_parameter"}
    altered = {"forward", "__class__", "_experts_implementation", "all_tied_weights_keys"}
    for path in (ROOT / "hybrid").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if path.name == "grafts.py":
                continue
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                owner = ast.unparse(node.func.value)
                assert node.func.attr not in ours or owner == "self", (path, node.lineno)
            if isinstance(node, ast.Assign):
                for target in node.targets:
                    name = target.attr if isinstance(target, ast.Attribute) else ""
                    assert name not in altered, (path, node.lineno)
