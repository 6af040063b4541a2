"""The list of backends: what devices are called, whose a name is, and that asking loads nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest

from gpu_experts import backends
from gpu_experts.backends import BACKENDS
from gpu_experts.cuda import CUDA
from gpu_experts.emulated import EMULATED


def test_asking_what_there_could_be_loads_nothing() -> None:
    """Names are understood by commands that must start at once."""
    code = "import sys, gpu_experts.backends as b; b.find('cuda:1'); b.choices(); b.name_of('x')"
    check = "print(sorted({'numpy', 'torch', 'triton'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; {check}"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("cuda", (CUDA, 0)),
        ("cuda:1", (CUDA, 1)),
        ("cuda:12", (CUDA, 12)),
        ("emulated", (EMULATED, 0)),
        ("emulated:0", None),
        ("cuda:", None),
        ("cuda:-1", None),
        ("cuda:x", None),
        ("cuda:1:2", None),
        ("cudart", None),
        ("gpu", None),
        ("", None),
    ],
)
def test_names_of_devices(name: str, found: object) -> None:
    """A name means one device, and in full it is the same one; what is none's means none."""
    assert backends.find(name) == found
    if found is not None:
        backend, number = backends.find(name)
        assert backends.find(backend.called(number)) == found


@pytest.mark.parametrize(
    ("device", "name", "emulated"),
    [
        ("NVIDIA GeForce RTX 4060 (cuda:0)", "cuda:0", False),
        ("NVIDIA A100 (80 GB) (cuda:3)", "cuda:3", False),
        ("emulated, exact", "emulated", True),
        ("emulated, timing", None, False),
        ("a GPU (of an old version)", None, False),
        ("another", None, False),
        ("", None, False),
    ],
)
def test_names_in_calibrations(device: str, name: str | None, emulated: bool) -> None:
    """They lead back to what users call the device, and say whether it is an emulated one."""
    assert backends.name_of(device) == name
    assert backends.is_emulated(device) == emulated


def test_an_emulated_device_is_never_just_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first backend with a device is taken; the one that every machine has does not count."""
    for count, first in ((0, None), (2, "cuda")):
        monkeypatch.setitem(BACKENDS, "cuda", replace(CUDA, count=lambda count=count: count))
        found = backends.first_there()
        assert (found and found.name) == first
        assert backends.by_number(1) == "cuda:1"
    assert backends.emulation() is EMULATED


def test_a_folder_is_a_backend() -> None:
    """Each folder beside the list is in it, under the name of the folder."""
    import gpu_experts

    folders = os.scandir(gpu_experts.__path__[0])
    names = {f.name for f in folders if f.is_dir() and not f.name.startswith("_")}
    assert names == set(BACKENDS)
