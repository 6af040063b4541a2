"""Whoever adds a part adds a file and a line: a made-up one of each runs through everything.

Each is registered in a process of its own, where no other test sees it.
"""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

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
            number=7,
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
    """Put kernels together that cannot read a registered format; print what is said."""
    register_f8()
    from cpu_experts.errors import BackendError
    from cpu_experts.kernels import scalar

    del scalar.LOOPS["f8"]
    try:
        import cpu_experts.ffn  # noqa: F401
    except BackendError as error:
        print(error)


def test_a_format_without_a_loop_is_refused() -> None:
    """No format is taken for another one: the kernels name the one that they cannot read."""
    said = in_own_process("run_without_loop", NUMBA_DISABLE_JIT="1")
    assert said == "the scalar kernels do not know the weight format 'f8'\n"


if __name__ == "__main__":
    globals()[sys.argv[1]](*map(Path, sys.argv[2:]))
