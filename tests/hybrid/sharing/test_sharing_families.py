"""Every text family on an emulated device: the same tokens as on the CPU alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hybrid.ask.names import find_hardware
from hybrid.loading import load_fast_model
from hybrid.machine.devices import open_device
from hybrid.model import Model
from hybrid.sharing.budget import Budget
from hybrid.sharing.placement import place_model
from massive import make_massive
from tiny_families import causal_families, tiny_config

FAMILIES = causal_families()


@pytest.mark.parametrize(
    ("massive", "dtype"),
    [(False, torch.float32), (True, torch.float32), (True, torch.bfloat16)],
    ids=["plain", "massive", "massive-bfloat16"],
)
@pytest.mark.parametrize("kind", sorted(FAMILIES))
def test_a_shared_family_writes_the_same_tokens(
    kind: str, massive: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Whatever its cache and its routing are like; experts of its own gating stay on the CPU."""
    config_kind, model_kind = FAMILIES[kind]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        eager = model_kind(tiny_config(config_kind))
    if massive:
        make_massive(eager)
    eager.save_pretrained(tmp_path)
    model, _ = load_fast_model(tmp_path, fast=False, dtype=dtype)
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, **options)
    device = open_device("emulated", 1 << 30, 1)
    hardware = find_hardware("rtx4060-laptop-8gb")
    placement = place_model(Model(model), device, hardware, Budget(None, None, 64), threads=1)
    assert torch.equal(model.generate(ids, **options), expected)
    if placement.executor is None:
        assert any("on the CPU" in note.what for note in placement.notes)
        return
    assert not placement.executor.notes or "lookahead" in placement.executor.notes[0].what
    assert placement.executor.device is not None
    placement.executor.residents.settle(5.0)
    placement.executor.residents.check_integrity()
