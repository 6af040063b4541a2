"""Versions of other libraries: what was tested, what is said of others, what differs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeModel

import hybrid.fast.selftest
from cpu_experts.jit.hostcpu import ENVIRONMENT_VARIABLE
from hybrid.machine import versions
from hybrid.machine.versions import Untested, untested
from hybrid.session.model import HybridModel
from hybrid.transformers_api import cache_argument, given_cache, returned_cache


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let other versions of libraries seem to be installed, None for none."""

    def install(**found: str | None) -> None:
        real = metadata.version

        def version(name: str) -> str:
            answer = found.get(name, real(name) if name not in found else None)
            if answer is None:
                raise metadata.PackageNotFoundError(name)
            return answer

        monkeypatch.setattr("hybrid.machine.versions.metadata.version", version)

    return install


def test_what_runs_here_was_tested() -> None:
    """The ranges allow what this suite runs on, from the sources and from the installed package."""
    assert untested() == ()
    if not (Path(versions.__file__).parents[2] / "pyproject.toml").is_file():
        return
    here = {text.split(";")[0].replace(" ", "") for text in versions._requirements()}
    assert any(text.startswith("transformers") and "<" in text for text in here)
    for name in versions.CHECKED:
        assert any(text.startswith(name) and "<" in text for text in here), name


def test_another_version_is_named(installed: Callable[..., None]) -> None:
    """Beyond the range, before it, and a build's own suffix; what is not there is no fault."""
    installed(transformers="5.99.0", torch="2.13.0+cpu", numba="0.61.0", tokenizers=None)
    first, second = sorted(untested(), key=lambda found: found.package)
    assert (first.package, first.version) == ("numba", "0.61.0")
    assert second.version == "5.99.0"
    assert str(second) == f"transformers 5.99.0 was not tested ({second.tested} was)"
    assert second.remedy == f'pip install "transformers{second.tested}"'


def told(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Our own lines on stderr, without progress."""
    lines = capsys.readouterr().err.splitlines()
    return [line for line in lines if line.startswith("hybrid: ")]


NEWER = Untested("transformers", "5.99.0", ">=5.23,<5.25")


def test_an_untested_version_is_told_at_load(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line, before any text: the version, what became of the fast path, and the remedy."""
    monkeypatch.setattr("hybrid.fast.attach.untested", lambda: (NEWER,))
    model = HybridModel.from_pretrained()
    (line,) = told(capsys)
    assert line == (
        "hybrid: transformers 5.99.0 was not tested (>=5.23,<5.25 was): the fast path passes its "
        'own test; pip install "transformers>=5.23,<5.25"'
    )
    model.generate("def f():", max_new_tokens=2)
    rest = [path for path in model.report().slow_paths if path not in model.notes]
    assert not any("5.99" in str(path) for path in rest)


@pytest.mark.parametrize("newer", [(), (NEWER,)])
def test_a_test_that_fails_for_any_reason_is_told_at_load(
    newer: tuple[Untested, ...],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """An error that nobody foresaw costs speed, not the text, and its cause is said once."""
    wanted = HybridModel.from_pretrained().generate("def f():", max_new_tokens=8, do_sample=False)
    capsys.readouterr()

    def changed(*_: Any, **__: Any) -> Any:
        raise TypeError("forward() got an unexpected keyword argument 'cache'")

    monkeypatch.setattr(hybrid.fast.selftest, "check_decoder", changed)
    monkeypatch.setattr("hybrid.fast.attach.untested", lambda: newer)
    model = HybridModel.from_pretrained()
    (line,) = told(capsys)
    cause = "its test ended in TypeError: forward() got an unexpected keyword argument 'cache'"
    assert f"single tokens in transformers' code: {cause}" in line
    assert line.endswith(newer[0].remedy if newer else "with the model's config.json")
    assert model.generate("def f():", max_new_tokens=8, do_sample=False) == wanted


def test_steps_that_go_past_the_path_are_told_at_load(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A version whose calls look otherwise than we know: said with the reason, before any text."""
    monkeypatch.setattr("hybrid.fast.attach.given_cache", lambda arguments: None)
    HybridModel.from_pretrained()
    (line,) = told(capsys)
    assert "of the model's steps in transformers' code: no cache" in line


def test_a_model_of_transformers_tells_before_its_first_text(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing at load, where nothing is tested; one line when the first text asks for the path."""
    monkeypatch.setattr("hybrid.fast.attach.untested", lambda: (NEWER,))
    config = hybrid.HybridConfig("f32")
    model = AutoModelForCausalLM.from_pretrained(tiny_model, quantization_config=config)
    capsys.readouterr()
    for _ in range(2):
        model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=2, do_sample=False)
    assert capsys.readouterr().err.count("5.99.0") == 1


def test_the_cache_by_either_name() -> None:
    """Calls and outputs carry it under the name of the installed version; both are understood."""
    cache = object()
    for name in ("cache", "past_key_values"):
        assert given_cache({name: cache, "input_ids": 1}) is cache
    assert given_cache({"past_key_values": None, "cache": cache}) is cache
    assert given_cache({"input_ids": 1}) is None
    ((name, _),) = cache_argument(cache).items()
    assert name in Qwen3MoeModel.forward.__annotations__


def test_a_call_by_the_old_name_takes_the_path() -> None:
    """``past_key_values`` works with every version that takes it, and is no reason to be slow."""
    model = HybridModel.from_pretrained().model
    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        ids = torch.tensor([[5, 9, 2]])
        model.hybrid_fast.refused.clear()
        first = model(input_ids=ids, past_key_values=cache, use_cache=True)
        again = model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
    assert returned_cache(first) is returned_cache(again) is cache
    assert cache.get_seq_length() == 4
    assert not model.hybrid_fast.refused


CLEAN = """
import sys
from transformers.utils import logging
from hybrid.cli import main
sys.exit(main(["run", "-p", "def f():", "-n", "4", "--greedy"]))
"""


def test_no_library_warns_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With every warning switched on, a text of the demo is all that a run shows, and its end."""
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)  # which a run would speak of
    words = [sys.executable, "-W", "default::FutureWarning", "-c", CLEAN]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert all("tokens/s" in line or "onvert" in line or "ompil" in line for line in lines), lines


def test_only_one_module_knows_versions() -> None:
    """No other file of ours asks which version of transformers there is."""
    package = Path(versions.__file__).parents[1]
    for file in package.rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        if file.name not in ("transformers_api.py", "versions.py"):
            assert "past_key_values" not in text, file
            assert "is_transformers_version" not in text, file
