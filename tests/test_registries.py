"""Whoever adds a part adds a file and a line: a made-up one of each runs through everything.

A format is registered in a process of its own, where no other test sees it; a backend and a cache
policy until their test is over.
"""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from planner.errors import SpecError

SUPPORT = Path(__file__).parent / "support"
PROMPT = "def f(x):"
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 4}


def in_own_process(function: str, *arguments: Path, **environment: str) -> str:
    """Call a function of this file in a new process; return what it prints."""
    path = os.pathsep.join(filter(None, (str(SUPPORT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, __file__, function, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": path} | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def command(*arguments: str) -> str:
    """Run ``hybrid`` with these arguments here; return what it prints."""
    from hybrid.cli import main

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main(list(arguments)) == 0
    return out.getvalue()


# A format


def register_f8() -> None:
    """Make ``f8`` known: the upper byte of a float16, not quantized, one byte a weight."""
    import numpy as np

    from cpu_experts.kernels import scalar
    from hybrid.formats.registry import register
    from hybrid.formats.strips import TILE, Format

    def pack(w: Any) -> Any:
        bits = w.transpose(0, 2, 1).astype(np.float16).view(np.uint16)
        return ((bits + np.uint16(0x80)) >> 8).astype(np.uint8)

    def widen(units: Any) -> Any:
        return (units.astype(np.uint16) << 8).view(np.float16).astype(np.float32)

    def loop(w: Any, w_at: Any, act: Any, act_at: Any, inner: Any, out: Any, out_at: Any) -> None:
        x = act[act_at : act_at + 4 * inner].view(np.float32)
        strip = widen(w[w_at : w_at + TILE * inner].reshape(inner, TILE))
        out[out_at : out_at + TILE] += x @ strip

    register(
        Format(
            name="f8",
            unit_bytes=TILE,
            unit_inputs=1,
            pack=pack,
            unpack=lambda units: widen(units).transpose(0, 2, 1),
            unpack_rows=lambda units, rows: widen(units[np.arange(len(rows)), :, rows]),
            dense=True,
        )
    )
    scalar.LOOPS["f8"] = loop


def rounded_reference(source: Path, packed: set[str]) -> Any:
    """The source's model in plain float32, its experts and these matrices as f8 holds them."""
    import torch
    from transformers import AutoModelForCausalLM

    from hybrid.formats.matrix import pack, unpack

    model = AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.float32, experts_implementation="eager"
    )
    changed = 0
    for name, parameter in model.named_parameters():
        if name.removesuffix(".weight") in packed or "experts" in name:
            rows = parameter.detach().reshape(-1, parameter.shape[-1]).numpy()
            held = unpack(pack(rows, "f8"), *rows.shape, "f8")
            parameter.data = torch.from_numpy(held).view(parameter.shape)
            changed += 1
    assert changed > len(packed)
    return model


def run_f8(source: Path, target: Path) -> None:
    """Convert, plan and generate in f8; compare with float32 on the same weights."""
    register_f8()
    import torch

    from gpu_experts import reference
    from hybrid import HybridModel, plan
    from hybrid.formats.matrix import unpack
    from hybrid.weights.store import ExpertStore

    command("convert", str(source), str(target), "--experts", "f8", "--dense", "f8", "--verify")
    sizes = {}
    for fmt in ("f8", "bf16"):
        found = plan(source, "cpu-only-laptop", experts=fmt, dense=fmt, context=64, prompt=8)
        sizes[fmt] = {item.name: item.bytes for item in found.fit.items}
    for name in ("experts", "dense weights"):
        (own,), (other,) = (
            [size for item, size in sizes[fmt].items() if item.startswith(name)] for fmt in sizes
        )
        assert own < other, sizes
    assert "f8" in command("plan", str(target), "--hardware", "cpu-only-laptop")

    model = HybridModel.from_pretrained(target, dtype="float32", threads=1)
    exact = rounded_reference(source, set(model.model.hybrid_store.index.dense))
    ids = model.tokenizer(PROMPT, return_tensors="pt").input_ids
    with torch.no_grad():
        torch.testing.assert_close(
            model.model(input_ids=ids).logits, exact(input_ids=ids).logits, rtol=1e-4, atol=1e-5
        )
        written = exact.generate(ids, **GREEDY)[0, ids.shape[1] :]
    assert model.generate(PROMPT, **GREEDY) == model.tokenizer.decode(written)

    store = ExpertStore.open(target)
    shape = store.index.layers[0].shape("f8")
    up = store.blocks(store.index.layers[0])[0, : shape.up_bytes]
    widened = reference.dequantize(torch.from_numpy(up.copy()), shape.up_rows, shape.hidden, "f8")
    assert torch.equal(widened, torch.from_numpy(unpack(up, shape.up_rows, shape.hidden, "f8")))
    print(written.tolist())


def test_a_format_is_one_file_and_its_loop(tiny_model: Path, tmp_path: Path) -> None:
    """A registered format converts, plans and generates; its logits are those of its weights.

    On the scalar kernels, uncompiled: what the vector ones need on top is a loop of their own.
    """
    assert in_own_process("run_f8", tiny_model, tmp_path / "f8", NUMBA_DISABLE_JIT="1")


def run_without_loop() -> None:
    """Use a registered format that the kernels cannot read; print what is said."""
    register_f8()
    from cpu_experts.errors import BackendError
    from cpu_experts.kernels import scalar

    del scalar.LOOPS["f8"]
    import numpy as np

    from cpu_experts.ffn import linear
    from hybrid.formats.matrix import pack

    weight, out = pack(np.zeros((16, 4), np.float32), "f8"), np.zeros((1, 16), np.float32)
    try:
        linear(np.zeros((1, 4), np.float32), weight, "f8", None, out)
    except BackendError as error:
        print(error)


def test_a_format_without_a_loop_is_refused() -> None:
    """No format is taken for another one: the kernels name the one that they cannot read."""
    said = in_own_process("run_without_loop", NUMBA_DISABLE_JIT="1")
    assert said == "the scalar kernels do not know the weight format 'f8'\n"


# A GPU backend


def imagined() -> Any:
    """Two devices that are the emulated one but for what a backend is asked for."""
    import torch

    from gpu_experts.backend import Backend, StandIn
    from gpu_experts.emulated.device import EmulatedDevice

    class Imagined(EmulatedDevice):
        """Counts what it computes."""

        dtype = torch.float32

        def __init__(self, number: int, stand_in: StandIn) -> None:
            super().__init__(64 << 20, run=stand_in.run)
            self.name = f"Imagined (made-up:{number})"
            self.computed = 0

        def compute(self, *call: Any) -> Any:
            self.computed += 1
            return super().compute(*call)

    Imagined.backend = Backend(
        name="made-up",
        reserve_bytes=3 << 20,
        absent="its driver finds {count} of them",
        remedy="make one up",
        count=lambda: 2,
        open=Imagined,
        ran_out_of_memory=lambda error: str(error) == "there is no more of it",
    )
    return Imagined.backend


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose only GPUs are made up."""
    from gpu_experts.backends import BACKENDS

    monkeypatch.setitem(BACKENDS, "cuda", replace(BACKENDS["cuda"], count=lambda: 0))
    monkeypatch.setitem(BACKENDS, "made-up", imagined())


@pytest.mark.usefixtures("made_up")
def test_devices_of_a_backend_are_chosen_and_refused_as_any() -> None:
    """By name and number, in the words of all others."""
    from gpu_experts.backends import by_number
    from hybrid.errors import UsageError
    from hybrid.machine.devices import choose_device

    assert by_number(1) == "made-up:1"
    assert choose_device(None, None) == "made-up:0"
    assert choose_device("made-up:1", None) == "made-up:1"
    with pytest.raises(UsageError) as caught:
        choose_device("made-up:2", None)
    assert caught.value.message == "device made-up:2 is asked for, its driver finds 2 of them"
    assert caught.value.hint == "leave the device out, or make one up"
    with pytest.raises(UsageError, match="unknown device 'madeup'") as caught:
        choose_device("madeup", None)
    assert "choose cuda, cuda:N, emulated, made-up, made-up:N or cpu" in str(caught.value.hint)


@pytest.mark.usefixtures("made_up")
def test_a_backend_is_one_folder_and_its_line(
    quick: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A registered backend is calibrated, planned with and run on; the text is the CPU's, also
    where it runs out of memory in its own words."""
    from hybrid import HybridModel
    from hybrid.machine import calibrations
    from hybrid.machine.calibrations import Identity

    name, words = "Imagined (made-up:1)", (str(tiny_model), "--threads", "1")
    command("calibrate", *words, "--device", "made-up:1")
    spec = calibrations.load(Identity.of_this_machine(1, name))
    assert spec is not None
    assert spec.gpu is not None
    assert spec.gpu.name == name
    assert spec.gpu.reserve_bytes.value == 3 << 20
    command("plan", *words, "--tokens", "1", "--prompt", "8")
    assert f"this machine, as it was calibrated with {name}" in capsys.readouterr().err

    options = GREEDY | {"max_new_tokens": 12}
    text = HybridModel.from_pretrained(tiny_model, device="cpu", threads=1).generate(
        PROMPT, **options
    )
    model = HybridModel.from_pretrained(
        tiny_model, device="made-up:1", vram="32MiB", threads=1, context=64
    )
    assert "measuring" not in capsys.readouterr().err
    assert model.placement is not None
    assert model.placement.device == name
    executor = model.placement.executor
    assert executor is not None
    assert model.generate(PROMPT, **options) == text
    device: Any = executor.device
    assert device.computed

    head, slots = model.model.get_output_embeddings(), executor.slot_count

    def break_once(*_: Any) -> None:
        broken.remove()
        raise RuntimeError("there is no more of it")

    broken = head.register_forward_pre_hook(break_once)
    assert model.generate(PROMPT, **options) == text
    assert executor.slot_count < slots
    model.close()


# A cache policy


def hoarding() -> Any:
    """A policy that keeps the experts of the highest ids, whatever is used."""
    import numpy as np

    from planner.decide.policy import Policy

    class Hoard(Policy):
        """Notes of every layer who got a slot, and how many steps it saw."""

        name = "hoard"
        made: list[Any] = []  # noqa: RUF012

        def __init__(self, layers: int, experts: int) -> None:
            super().__init__(layers, experts)
            self.got: list[list[int]] = [[] for _ in range(layers)]
            self.steps = [0] * layers
            self.made.append(self)

        def observe(self, layers: Any, ids: Any, weights: Any, tokens: int = 1) -> None:
            for layer in layers.tolist():
                self.steps[layer] += 1

        def value(self, layers: Any) -> Any:
            return np.tile(np.arange(float(self.experts)), (len(layers), 1))

        def admitted(self, layer: int, expert: int) -> None:
            self.got[layer].append(expert)

    return Hoard


def test_a_policy_is_one_file_and_its_line(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A registered policy is chosen by name for dry runs: who it values most is resident."""
    import numpy as np

    from hybrid import plan
    from planner.decide import policies

    kind = hoarding()
    monkeypatch.setitem(policies.POLICIES, kind.name, kind)
    assert kind.name in policies.names()
    # Only the first experts are used: who hoards the last ones has nothing of them.
    trace = tmp_path / "first.npz"
    ids = np.tile(np.arange(2), (40, 2, 1)).astype(np.uint8)
    np.savez(trace, expert_ids=ids, routing_weights=np.full(ids.shape, 0.5, np.float16))
    request: dict[str, Any] = {"context": 64, "prompt": 8, "tokens": 8, "trace": trace}
    most = plan(tiny_model, "rtx4060-laptop", **request).fit
    request["vram"] = most.used("vram") - 12 * most.slot_bytes
    rates = {}
    for name in (kind.name, policies.DEFAULT_POLICY):
        found = plan(tiny_model, "rtx4060-laptop", policy=name, **request)
        assert found.fit.slots == (2, 2)
        assert found.prediction is not None
        rates[name] = found.prediction.run.hit_rate
    assert rates[kind.name] < rates[policies.DEFAULT_POLICY] == 1.0
    assert all(got[:2] == [7, 6] for got in kind.made[0].got)


def test_a_policy_decides_who_is_resident_in_a_run(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what was used before it takes what it likes; it sees every step; the text is the same."""
    import numpy as np
    import torch

    from hybrid.ask.names import find_hardware
    from hybrid.loading import load_fast_model
    from hybrid.machine.devices import open_device
    from hybrid.model import Model
    from hybrid.sharing.budget import Budget, fitted
    from hybrid.sharing.placement import place_model
    from planner.decide import policies
    from planner.decide.popularity import Popularity

    kind = hoarding()
    monkeypatch.setitem(policies.POLICIES, kind.name, kind)
    network, _ = load_fast_model(tiny_model, fast=False)
    ids = torch.tensor([[1, 2, 3]])
    expected = network.generate(ids, **GREEDY)
    device, hardware = open_device("emulated", 1 << 30, 1), find_hardware("rtx4060-laptop")
    _, most = fitted(Model(network), device, hardware, Budget(None, None, 64))
    vram = most.used("vram") - 12 * most.slot_bytes
    uses = np.tile(np.arange(8, 0, -1), (2, 1))
    with pytest.raises(SpecError, match="unknown cache policy: 'hoarde'") as caught:
        place_model(
            Model(network), device, hardware, Budget(vram, None, 64, policy="hoarde"), threads=1
        )
    assert "choose one of: lru, lfu, arc, static, mrs, blend, forecast, hoard" in str(
        caught.value.hint
    )
    budget = Budget(vram, None, 64, Popularity("tiny", 20, uses), policy=kind.name)
    executor = place_model(Model(network), device, hardware, budget, threads=1).executor
    assert executor is not None
    (ran,) = kind.made
    assert [executor.director.cache.residency(layer) for layer in range(2)] == [{6, 7}] * 2
    before = list(ran.steps)
    assert torch.equal(network.generate(ids, **GREEDY), expected)
    taken = [now - then for now, then in zip(ran.steps, before, strict=True)]
    assert taken == [GREEDY["max_new_tokens"]] * 2
    executor.residents.settle(5.0)
    executor.residents.check_integrity()


if __name__ == "__main__":
    globals()[sys.argv[1]](*map(Path, sys.argv[2:]))
