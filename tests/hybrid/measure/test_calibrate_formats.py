"""``hybrid calibrate`` and predictions agree on what a checkpoint's weights are kept as."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from hybrid.ask.asked_model import find_model
from hybrid.ledger.prediction import predicted
from hybrid.loading import load_fast_model, set_threads
from hybrid.measure import calibrate as calibration
from hybrid.measure.calibrate import covers, hardware_for
from hybrid.measure.random_model import write_random_model
from hybrid.model import Model
from planner.describe.terms import CALL, CPU, MIXER


def of_dtype(tiny_model: Path, folder: Path, dtype: str) -> Path:
    """The tiny model's directory as far as measuring needs it, its weights said to be ``dtype``."""
    settings = json.loads((tiny_model / "config.json").read_text())
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(settings | {"dtype": dtype}))
    return folder


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_other_floats_are_measured_as_the_kernels_keep_them(
    quick: Path,
    tiny_model: Path,
    dtype: str,
) -> None:
    """What bfloat16 does not hold is measured as float32, and known afterwards."""
    directory = of_dtype(tiny_model, quick / dtype, dtype)
    spec = hardware_for(directory, threads=1)
    assert {term.format for term in spec.terms if term.term != CPU} == {"f32"}
    assert covers(spec, find_model(directory))
    assert not covers(spec, find_model(tiny_model))


def test_replicas_in_float32_hold_what_bfloat16_does_not(tmp_path: Path, tiny_model: Path) -> None:
    """Else the kernels would keep its weights in half the bytes, where they compute in float32."""
    settings = json.loads((tiny_model / "config.json").read_text())
    settings.pop("architectures")
    write_random_model(settings, tmp_path, experts="q4_0", dense="f32")
    network, _ = load_fast_model(tmp_path, dtype=torch.float32)
    assert network.get_output_embeddings().weight_format == "f32"
    assert find_model(tmp_path).dense == "f32"


def test_a_loaded_model_is_predicted_from_its_own_calibration(
    quick: Path,
    tiny_model: Path,
) -> None:
    """Weights stored in bfloat16 are looked up as such, whatever they are computed in."""
    set_threads(1)
    spec = hardware_for(tiny_model, threads=1)
    network, _ = load_fast_model(tiny_model)
    found = predicted(Model(network), 8, 4, threads=1)
    assert found is not None
    of_layer = {(term.term, term.tokens): term.seconds for term in spec.terms}
    assert found.prompt[MIXER].value == pytest.approx(2 * of_layer[MIXER, 8])
    assert found.prompt[CALL].value == pytest.approx(of_layer[CALL, 8])
    assert found.token[CALL].value == pytest.approx(of_layer[CALL, 1])


def test_little_time_is_enough_for_a_prompt_and_tokens(
    quick: Path,
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However slow the machine, what decoding takes is measured."""
    monkeypatch.setattr(calibration, "PROMPTS", (2, 4, 8, 16))
    spec = hardware_for(tiny_model, threads=1, limit_s=0.0)
    assert {term.tokens for term in spec.terms if term.term == MIXER} == {1, 2, 4, 8}
    assert "prompts of 16" in spec.summary
