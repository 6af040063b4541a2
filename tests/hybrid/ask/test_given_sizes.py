"""What users give as sizes, lengths, threads and devices: taken, or refused before anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numba
import numpy as np
import psutil
import pytest
import torch

from hybrid.ask.options import Options
from hybrid.ask.sizes import size_in_bytes
from hybrid.cli import main
from hybrid.errors import UsageError
from hybrid.loading import set_threads
from hybrid.machine import host
from hybrid.machine.calibrations import Identity
from hybrid.machine.devices import choose_device
from hybrid.machine.host import checked_ram
from hybrid.model import Model
from hybrid.session import spine
from hybrid.session.model import HybridModel
from hybrid.sharing.budget import beyond_ram, fitted_alone
from planner.describe.words import enough_in_words, in_words
from planner.foretell.memory import RAM_RESERVE_BYTES

RUN = ["run", "-p", "import os", "-n", "3", "--greedy", "-t", "1"]


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a GPU on which nothing may be loaded."""

    def load(*_: Any, **__: Any) -> None:
        pytest.fail("it was loaded before it was checked")

    monkeypatch.setattr(spine, "load_fast_model", load)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def chosen(device: Any, vram: Any) -> str | None:
    """The device that a run takes for what a user writes."""
    options = Options.of(device=device, vram=vram)
    return choose_device(options.device, options.vram_bytes)


@pytest.mark.parametrize("size", [0, "0", "0GiB", "0.0", " 0 MiB "])
def test_no_vram_is_the_cpu_alone(size: str | int) -> None:
    """However 0 is written."""
    assert chosen(None, size) is None
    assert chosen("cpu", size) is None


@pytest.mark.parametrize("size", [None, "auto", "AUTO", "Auto "])
def test_auto_is_whatever_there_is(size: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """In any case."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert chosen(None, size) is None
    assert size_in_bytes(size, "vram") is None
    assert checked_ram(size_in_bytes(size, "ram")) is None


@pytest.mark.parametrize(
    ("size", "said"),
    [
        ("inf", "'inf' is not a size"),
        ("nan", "'nan' is not a size"),
        ("1e999GiB", "'1e999GiB' is not a size"),
        (2**62, "more than any machine has"),
        ("0.5", "less than one byte"),
        (-1, "'-1' is below 0"),
        ("four", "'four' is not a size"),
        (True, "'True' is not a size"),
    ],
)
@pytest.mark.usefixtures("unloaded")
def test_vram_that_cannot_be(size: Any, said: str) -> None:
    """What is wrong with it, and an example, before anything is loaded."""
    with pytest.raises(UsageError, match=said) as caught:
        HybridModel.from_pretrained(vram=size, threads=1)
    assert caught.value.hint


@pytest.mark.parametrize("option", [[], ["--vram", "0"], ["--vram", "1GiB"]])
@pytest.mark.usefixtures("unloaded")
def test_more_ram_than_there_is(option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """On the CPU alone and with a device, with both sizes."""
    assert main([*RUN, *option, "--ram", "900TiB"]) == 2
    error, hint = capsys.readouterr().err.splitlines()
    assert "ram is 921600.00 GiB, this machine has " in error
    assert hint.startswith("hint: ")


def test_all_the_ram_that_a_machine_is_sold_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 24 GiB the system tells a little less; 24 GiB is no slip, and is what there is."""
    told = (24 << 30) - (500 << 20)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("", (), {"total": told})())
    assert checked_ram(24 << 30) == told
    assert checked_ram(20 << 30) == 20 << 30
    with pytest.raises(UsageError, match=r"25\.00 GiB, this machine has 23\.51 GiB"):
        checked_ram(25 << 30)


@pytest.mark.parametrize("option", [[], ["--vram", "0"], ["--vram", "1GiB"]])
def test_too_little_ram_is_refused(option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """As ``hybrid plan`` says it: what is needed and what there is."""
    assert main([*RUN, *option, "--ram", "1MiB"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    *_, error, hint = err.splitlines()
    assert "RAM is short by" in error
    assert "are needed" in error
    assert "leave" in hint


def test_experts_beyond_ram_are_told(capfd: Any) -> None:
    """A limit that holds a part of them: the share on disk, once, and what would hold all."""
    model = HybridModel.from_pretrained(threads=1)
    least = sum(
        item.bytes
        for item in fitted_alone(Model(model.model), 8 << 30, 4096 // 4).items
        if item.place == "ram" and not item.name.startswith("experts")
    )
    assert least > RAM_RESERVE_BYTES
    nbytes = model.model.hybrid_store.index.nbytes
    words = [*RUN, "--ram"]
    assert main([*words, str(least + nbytes // 2)]) == 0
    out, err = capfd.readouterr()
    assert out
    assert err.count("experts beyond ram") == 1
    assert "stay on disk" in err
    assert main([*words, str(least + nbytes)]) == 0
    assert "experts beyond ram" not in capfd.readouterr().err
    half = beyond_ram(fitted_alone(Model(model.model), least + nbytes // 2, 1024))
    assert half is not None
    assert "%" in half.reason


@pytest.mark.parametrize("context", [-5, 0, 1.5, "abc", "8", True])
@pytest.mark.parametrize("vram", ["1GiB", 0])
@pytest.mark.usefixtures("unloaded")
def test_a_context_that_cannot_be(context: Any, vram: Any) -> None:
    """Anything but a whole number above 0 is named before anything is loaded."""
    with pytest.raises(UsageError, match=r"context is .*whole number of at least 1") as caught:
        HybridModel.from_pretrained(vram=vram, context=context, threads=1)
    assert repr(context) in caught.value.message
    assert caught.value.hint


def test_more_tokens_than_memory_is_kept_for(tiny_model: Path, capfd: Any) -> None:
    """They are computed, and the report says both lengths and the remedy; fewer say nothing."""
    model = HybridModel.from_pretrained(
        tiny_model, vram="1GiB", context=cast(int, np.int64(8)), threads=1
    )
    model.generate("abcd", max_new_tokens=4, do_sample=False)
    assert not [path for path in model.report().slow_paths if "cache is larger" in path.what]
    model.generate("abcdefgh", max_new_tokens=4, do_sample=False)
    (found,) = [path for path in model.report().slow_paths if "cache is larger" in path.what]
    assert "took 12 tokens, memory is kept for 8" in found.reason
    assert "context of 12" in found.remedy


@pytest.mark.parametrize("threads", ["2", 1.5, 0, True])
@pytest.mark.usefixtures("unloaded")
def test_threads_that_cannot_be(threads: Any) -> None:
    """Named with their value; no TypeError."""
    with pytest.raises(UsageError, match="threads is ") as caught:
        HybridModel.from_pretrained(threads=threads)
    assert repr(threads) in caught.value.message
    assert caught.value.hint


def test_devices_as_torch_takes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """A number is a GPU's, a torch.device is its name; anything else is refused."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert chosen(0, None) == "cuda:0"
    assert chosen(1, "4GiB") == "cuda:1"
    assert chosen(torch.device("cuda"), None) == "cuda:0"
    assert chosen(torch.device("cuda", 1), None) == "cuda:1"
    assert chosen(torch.device("cpu"), None) is None
    for device in (2, -1, True, 1.0, "cuda:", "cuda:²", torch.device("meta"), ["cuda"]):
        unfit: Any = device
        with pytest.raises(UsageError) as caught:
            chosen(unfit, None)
        assert caught.value.hint


def test_a_note_is_told_once(capfd: Any) -> None:
    """Loading says what is known then, the end only what is new; the decoder's note is true."""
    assert main([*RUN, "--vram", "1GiB"]) == 0
    err = capfd.readouterr().err
    assert err.count("an emulated device instead of a GPU") == 1
    assert err.count("single tokens in transformers' code") == 1
    assert "the model lies on a device (emulated)" in err
    assert "0.00 GiB" not in err
    assert "do not compute this decoder" not in err


@pytest.mark.parametrize(
    ("size", "told"),
    [
        (0, "0.0 KiB"),
        (300, "0.3 KiB"),
        (40 << 10, "40.0 KiB"),
        ((3 << 20) + 1, "3.0 MiB"),
        (5 << 30, "5.00 GiB"),
    ],
)
def test_small_sizes_are_told(size: int, told: str) -> None:
    """A small model's parts are no row of zeros; what is enough is never told as less."""
    assert in_words(size) == told
    number, unit = enough_in_words(size).split()
    assert float(number) * 2 ** {"KiB": 10, "MiB": 20, "GiB": 30}[unit] >= size


@pytest.mark.parametrize(
    ("variables", "threads"),
    [
        ({"NUMBA_NUM_THREADS": "6", "OMP_NUM_THREADS": "3"}, 3),
        ({"NUMBA_NUM_THREADS": "6", "OMP_NUM_THREADS": " 5,2 "}, 5),
        ({"NUMBA_NUM_THREADS": "6", "OMP_NUM_THREADS": "0"}, 4),
        ({"NUMBA_NUM_THREADS": "6", "OMP_NUM_THREADS": "\u00b2"}, 4),
        ({"NUMBA_NUM_THREADS": "6"}, 4),
        ({"NUMBA_NUM_THREADS": "2"}, 2),
        ({"OMP_NUM_THREADS": "1"}, 1),
    ],
)
def test_threads_that_the_environment_asks_for(
    variables: dict[str, str],
    threads: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The outermost team's of OpenMP's, else every core; never more than numba is told to have.
    Nothing is said about what is as it was asked for."""
    monkeypatch.setattr(host, "usable_cores", lambda: 4)
    for name in ("NUMBA_NUM_THREADS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert host.default_threads() == threads
    assert capsys.readouterr().err == ""


def test_the_environments_threads_are_cut_and_that_is_said_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is meant for all programs is no error, however often it is asked for; a number that
    is given is one, with the most there can be. Plans take the same number as runs."""
    most = numba.config.NUMBA_NUM_THREADS
    host._say_too_many.cache_clear()
    monkeypatch.setenv("OMP_NUM_THREADS", "4711")
    for _ in range(2):
        assert set_threads(host.default_threads()) == most
        assert Identity.of_this_machine().threads == most
    assert capsys.readouterr().err == (
        f"hybrid: OMP_NUM_THREADS is 4711, {most} threads are used; NUMBA_NUM_THREADS sets the "
        "most there can be\n"
    )
    assert main([*RUN[:-1], "4711"]) == 2
    error, hint = capsys.readouterr().err.splitlines()
    assert error == f"error: threads is 4711, it must be a whole number between 1 and {most}"
    assert hint == "hint: NUMBA_NUM_THREADS sets the most there can be"
