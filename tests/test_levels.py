"""SIMD levels: which one is chosen, and that every one of them computes the same."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cpu_experts import hostcpu
from cpu_experts.errors import BackendError

HERE = Path(__file__).parent
AVX512 = hostcpu.LEVELS["avx512vnni"] | hostcpu.LEVELS["avx2"]


def test_the_best_level_is_chosen_and_can_be_overridden() -> None:
    """Features decide; an override is obeyed when the processor can run it."""
    assert hostcpu.choose_level(AVX512) == "avx512vnni"
    assert hostcpu.choose_level(hostcpu.LEVELS["avxvnni"]) == "avxvnni"
    assert hostcpu.choose_level({"avx2", "fma", "f16c"}) == "avx2"
    assert hostcpu.choose_level({"neon"}) == "portable"
    assert hostcpu.choose_level(AVX512, "avx2") == "avx2"


def test_a_level_that_cannot_run_is_refused_by_name() -> None:
    """An unknown level, and one without its instructions, are errors and not fallbacks."""
    with pytest.raises(BackendError, match="'avx9' is no SIMD level") as caught:
        hostcpu.choose_level(AVX512, "avx9")
    assert "portable" in str(caught.value.hint)
    with pytest.raises(BackendError, match=r"needs .*avx512vnni.*; this processor runs avx2"):
        hostcpu.choose_level({"avx2", "fma", "f16c"}, "avx512vnni")


def _pytest(level: str, *args: str, **extra: str) -> None:
    """Run tests in a process of their own, because a level is chosen once per process.

    pytest's exit code is not 0 when a test fails, and neither when none was found.
    """
    env = os.environ | {"HYBRID_SIMD": level} | extra
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *args]
    done = subprocess.run(command, cwd=HERE.parent, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


OTHERS = [
    level
    for level in hostcpu.available_levels(hostcpu.host_features())
    if level != hostcpu.host_level()
]


@pytest.mark.parametrize("level", OTHERS)
def test_every_level_that_this_processor_runs(level: str) -> None:
    """The kernels' tests pass on each level besides the one in use."""
    _pytest(level, str(HERE / "test_ffn.py"), str(HERE / "test_strips.py"))


def test_uncompiled() -> None:
    """The same loops as plain Python: what they compute does not depend on the compiler."""
    _pytest("portable", str(HERE / "test_ffn.py"), NUMBA_DISABLE_JIT="1")


MISSING = [
    f"{level}{hostcpu.EMULATED}"
    for level in ("avx512vnni", "avxvnni")
    if level not in hostcpu.available_levels(hostcpu.host_features())
]


@pytest.mark.skipif(
    "avx2" not in hostcpu.available_levels(hostcpu.host_features()),
    reason="emulation is built on AVX2",
)
@pytest.mark.parametrize("level", MISSING)
def test_micro_kernels_of_levels_that_this_processor_lacks(level: str) -> None:
    """The code of the other vector levels, its one special instruction spelled out."""
    _pytest(level, str(HERE / "test_strips.py"))


@pytest.mark.parametrize(
    ("level", "cpu", "instruction", "register"),
    [
        ("avx512vnni", "icelake-server", "vpdpbusd", "%zmm"),
        ("avxvnni", "alderlake", "vpdpbusd", "%ymm"),
        ("avx2", "haswell", "vpmaddubsw", "%ymm"),
    ],
)
def test_levels_use_their_instruction(
    level: str, cpu: str, instruction: str, register: str
) -> None:
    """Compiled for a processor that has it, a level's inner loop is made of its instruction."""
    features = ",".join(f"+{name}" for name in sorted(hostcpu.LEVELS[level]))
    code = f"""
import sys
sys.path.insert(0, {str(HERE)!r})
from unittest import mock
from cpu_experts import hostcpu
features = frozenset().union(*hostcpu.LEVELS.values())
with mock.patch.object(hostcpu, "host_features", lambda: features):
    from test_strips import assembly
print(assembly("q4_0"))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ
        | {"HYBRID_SIMD": level, "NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": features},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line for line in done.stdout.splitlines() if instruction in line]
    assert lines
    assert all(register in line for line in lines)
