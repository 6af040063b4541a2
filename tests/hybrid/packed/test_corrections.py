"""What routers add to their scores stays in float32, so that the same experts are chosen."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hybrid.grafts import CORRECTIONS
from hybrid.weights.checkpoint import convert
from tiny_families import EXPERTS, VOCAB, families, tiny_config

FAMILIES = families()
#: One of each way in which families keep it: named as strict or not, of the router or beside it.
KINDS = ["deepseek_v3", "lfm2_moe", "minimax_m2", "minimax_m3_vl_text", "laguna", "ernie4_5_moe"]
#: Fewer than 16 bits tell apart.
CORRECTION = 1 + 1e-4 * torch.tensor([3.0, 7, 1, 5, 0, 6, 2, 4])
IDS = torch.randint(3, VOCAB, (1, 5), generator=torch.Generator().manual_seed(1))

Cast = Callable[[Any], Any]
CASTS: dict[str, tuple[torch.dtype, Cast]] = {
    "loaded": (torch.bfloat16, lambda model: model),
    "to": (torch.float32, lambda model: model.to(torch.bfloat16)),
    "bfloat16": (torch.float32, lambda model: model.bfloat16()),
    "twice": (torch.bfloat16, lambda model: model.to(torch.float32).to(torch.bfloat16)),
}


@pytest.fixture(scope="module", params=KINDS)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A family's class and a converted model of it, whose routers have nothing but corrections."""
    config, kind = FAMILIES[request.param]
    torch.manual_seed(0)
    model = kind._from_config(tiny_config(config), experts_implementation="eager")
    for path, tensor in corrections(model).items():
        tensor.data = CORRECTION.reshape(tensor.shape).clone()
        router = model.get_submodule(path.rpartition(".")[0].removesuffix(".moe_statics"))
        if not hasattr(router, "weight"):
            router = getattr(router, "gate", None) or router.router
        torch.nn.init.zeros_(router.weight)
    directory = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(directory / "src")
    convert(directory / "src", directory / "to", experts="f32", dense="bf16")
    return kind, directory / "to"


def corrections(model: Any) -> dict[str, Tensor]:
    named = (*model.named_parameters(), *model.named_buffers())
    return {path: found for path, found in named if path.rpartition(".")[2] in CORRECTIONS}


def chosen(model: Any) -> list[set[int]]:
    """Return the experts that each layer chose for the first token."""
    found: list[set[int]] = []

    def note(runner: Any) -> Any:
        def run(hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            found.append({int(i) for i in ids.reshape(-1, ids.shape[-1])[0]})
            result: Tensor = runner(hidden, ids, weights)
            return result

        return run

    for module in [module for module in model.modules() if hasattr(module, "hybrid_experts")]:
        module.hybrid_experts = note(module.hybrid_experts)
    with torch.no_grad():
        model(input_ids=IDS)
    return found


@pytest.mark.parametrize("cast", CASTS)
def test_the_same_experts_are_chosen_in_16_bits(cast: str, saved: tuple[Any, Path]) -> None:
    """However a model comes to compute in bfloat16, its routers choose as in float32."""
    kind, directory = saved
    assert len(CORRECTION.bfloat16().unique()) < EXPERTS
    dtype, change = CASTS[cast]
    model = change(kind.from_pretrained(directory, dtype=dtype))
    assert model.dtype == torch.bfloat16
    for path, found in corrections(model).items():
        assert found.dtype == torch.float32, path
        assert torch.equal(found.flatten(), CORRECTION), path
    layers = chosen(model)
    assert layers
    for experts in layers:
        assert experts == set(CORRECTION.topk(len(experts)).indices.tolist())
