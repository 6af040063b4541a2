"""What the executor hands to the device, and in how many calls."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hybrid.ask.names import find_hardware
from shared_layers import LAYERS, exact, on_cpu, random_layers, random_step, shared_executor

SOON = 1e-9


@pytest.mark.parametrize(("cpu_copies", "calls"), [(0.9, 1), (1.1, 2)])
def test_copied_experts_are_computed_in_one_call_where_that_holds_nobody_up(
    monkeypatch: pytest.MonkeyPatch, cpu_copies: float, calls: int
) -> None:
    """Of three missing experts one is copied while the CPU computes two, or two during one.

    In the first case the CPU is done last whatever the GPU waits for. In the second the GPU
    computes the first while the second comes.
    """
    link, layers = 1e6, random_layers()
    hardware = (
        find_hardware("rtx4060-laptop-8gb")
        .with_values("link", bytes_per_s=link, latency_s=SOON)
        .with_values("cpu", start_s=SOON, memory_efficiency=1, memory_bytes_per_s=link / cpu_copies)
    )
    executor = shared_executor(layers, LAYERS, hardware=hardware)
    given: list[str] = []
    device = exact(executor)
    compute = device.compute
    monkeypatch.setattr(device, "compute", lambda *call: given.append(call[-1]) or compute(*call))
    hidden, _, weights = random_step(np.random.default_rng(3), 1)
    step = hidden, torch.tensor([[1, 4, 6]]), weights
    np.testing.assert_allclose(
        executor.run_layer(0, *step).numpy(), on_cpu(layers[0], *step), rtol=0, atol=1e-4
    )
    assert len(given) == calls
    executor.residents.settle(5.0)
    executor.residents.check_integrity()
