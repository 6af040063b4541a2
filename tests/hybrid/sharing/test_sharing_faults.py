"""What goes wrong while a model shares its experts with a device: the text is the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from shared_demo import GREEDY, PROMPT, device_of, placed, placement_of


def test_interrupting_generation_leaves_the_model_usable(demo_text: str) -> None:
    """Ctrl-C in the middle of an answer, again and again: the next answer is right."""
    model = placed("demo", 20)
    for limit in (1, 2, 5, 11):
        told: list[str] = []

        def stop(piece: str, told: list[str] = told, limit: int = limit) -> None:
            told.append(piece)
            if len(told) == limit:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            model.generate(PROMPT, on_text=stop, **GREEDY)
    assert model.generate(PROMPT, **GREEDY) == demo_text


@pytest.mark.parametrize("fault", ["copy", "compute", "memory"])
def test_a_fault_in_the_middle_changes_no_text(fault: Any, demo_text: str, capfd: Any) -> None:
    """The device fails while it writes; the text goes on with the same tokens, and it is said."""
    model = placed("demo", 20)
    device_of(model).fail(fault, 30)
    assert model.generate(PROMPT, **GREEDY) == demo_text
    said = [path.what for path in model.report().slow_paths]
    wanted = "expert slots instead of 20" if fault == "memory" else "all experts on the CPU since"
    assert any(wanted in what for what in said)
    assert wanted in capfd.readouterr().err
    assert model.generate(PROMPT, **GREEDY) == demo_text


def test_attention_without_memory_is_repeated_with_fewer_slots(
    demo_text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An allocation of torch's own fails in the middle of a pass: its cache is cut back."""
    model = placed("demo", 20)
    attention = model.model.get_decoder().layers[3].self_attn
    original, calls = attention.forward, []

    def forward(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        result = original(*args, **kwargs)  # the cache has the token now
        if len(calls) == 7:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return result

    monkeypatch.setattr(attention, "forward", forward)
    assert model.generate(PROMPT, **GREEDY) == demo_text
    assert any("15 expert slots instead of 20" in p.what for p in model.report().slow_paths)


def test_a_stalled_device_times_out(demo_text: str) -> None:
    """An event that never comes, as after a suspend, ends the device and not the program."""
    model = placed("demo", 20)
    executor = placement_of(model).executor
    assert executor is not None
    executor.guard.timeout_s = 0.3
    device_of(model).fail("stall", 20)
    assert model.generate(PROMPT, **GREEDY) == demo_text
    assert any("did not finish in" in path.reason for path in model.report().slow_paths)
