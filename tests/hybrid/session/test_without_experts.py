"""Models without experts run like others: nothing is shared, all else is as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from hybrid import HybridModel, plan
from hybrid.cli import main
from tiny_model import save_tiny_llama

LAPTOP = ["--hardware", "rtx4060-laptop-8gb"]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama directory."""
    folder = tmp_path_factory.mktemp("dense") / "tiny-llama"
    save_tiny_llama(folder)
    return folder


@pytest.mark.parametrize("where", [{"vram": 0}, {"device": "emulated"}])
def test_text_is_transformers(dense: Path, where: dict[str, object]) -> None:
    """The same tokens on the CPU alone, by the one-token kernels, and whole on a device."""
    model = HybridModel.from_pretrained(dense, dtype="float32", **where)
    assert model.loaded.fast.path.fast == ("vram" in where)
    ids = torch.arange(40, 52)[None]
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    expected = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32).generate(
        ids, **options
    )
    assert torch.equal(model.generate(ids, **options), expected)
    report = str(model.report())
    assert "none to share" in report
    assert "expert store" not in report


def test_commands(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Converted, planned and run from the command line; what is about experts is refused."""
    assert main(["convert", str(dense), str(tmp_path / "out"), "--dense", "q8_0"]) == 0
    assert "no experts to share, dense weights" in capsys.readouterr().err
    assert main(["run", str(tmp_path / "out"), "-p", "hello", "-n", "3", "--vram", "0"]) == 0
    assert main(["plan", str(tmp_path / "out"), *LAPTOP]) == 0
    told = capsys.readouterr().out
    assert "2 layers, no experts to share" in told
    assert "hit rate" not in told.split("Beside other rules")[0]
    assert main(["calibrate", str(dense)]) == 2
    assert "has no experts, whose speed is what is measured" in capsys.readouterr().err
    options = ["--device", "emulated", "--popularity", str(tmp_path / "uses.json")]
    assert main(["run", str(dense), "-p", "hello", *options]) == 2
    assert "this model has no experts, nothing is written to it" in capsys.readouterr().err


def test_plan_counts_every_weight(dense: Path) -> None:
    """All weights are read for every token, and fit where dense weights do."""
    found = plan(dense, "cpu-only-laptop")
    spec = found.request.model
    model = AutoModelForCausalLM.from_pretrained(dense)
    assert spec.total_params == pytest.approx(model.num_parameters(), rel=0.01)
    assert (spec.expert_params, found.fit.slots, found.fit.in_ram) == (0, (), 1.0)
    assert found.prediction is not None
    assert found.prediction.tpot.value > 0
