"""SIMD levels and bfloat16 units: which are chosen, and that every level computes the same."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cpu_experts.errors import BackendError
from cpu_experts.jit import hostcpu
from hybrid.formats.block import Block
from hybrid.machine.calibrations import Identity
from hybrid.machine.host import has_native_bf16
from hybrid.packed.bf16_products import offered

HERE = Path(__file__).parent
SUPPORT = HERE.parent / "support"
ROOT = Path(hostcpu.__file__).parents[2]
AVX2 = hostcpu.LEVELS["avx2"]
AVX512 = hostcpu.LEVELS["avx512vnni"] | AVX2
ZEN4 = AVX512 | {"avx512bf16"}
XEON = ZEN4 | {"amx-bf16", "amx-int8", "amx-tile"}


@pytest.mark.parametrize(
    ("features", "level", "units"),
    [
        (XEON, "avx512vnni", {"bf16", "amx"}),
        (ZEN4, "avx512vnni", {"bf16"}),
        (AVX512, "avx512vnni", set()),
        (hostcpu.LEVELS["avxvnni"], "avxvnni", set()),
        (AVX2, "avx2", set()),
        ({"neon"}, "portable", set()),
        ({"neon", "bf16"}, "portable", {"bf16"}),
    ],
)
@pytest.mark.parametrize("unset", [None, ""])
def test_a_processor_is_what_it_has(
    features: set[str], level: str, units: set[str], unset: str | None
) -> None:
    """The best level that it runs and every unit, and as text a value of the switch."""
    found = hostcpu.choose(features, unset)
    assert (found.level, found.emulated, found.units) == (level, False, units)
    assert hostcpu.choose(features, str(found)) == found


@pytest.mark.parametrize(
    ("features", "choice", "level", "emulated", "units"),
    [
        (XEON, "avx2", "avx2", False, set()),
        (XEON, "avx512vnni", "avx512vnni", False, set()),
        (XEON, "avx512vnni+bf16", "avx512vnni", False, {"bf16"}),
        (XEON, "portable+amx", "portable", False, {"amx"}),
        (AVX2, "avx2+bf16", "avx2", False, {"bf16"}),
        (AVX2, "avx512vnni-emulated+bf16+amx", "avx512vnni", True, {"bf16", "amx"}),
        (AVX2, "avxvnni-emulated", "avxvnni", True, set()),
    ],
)
def test_a_processor_is_taken_for_another(
    features: set[str], choice: str, level: str, emulated: bool, units: set[str]
) -> None:
    """A level without units hides those that there are, and named ones count as there."""
    found = hostcpu.choose(features, choice)
    assert (found.level, found.emulated, found.units) == (level, emulated, units)
    assert str(found) == choice


@pytest.mark.parametrize(
    ("choice", "thing"),
    [
        ("avx9", "'avx9' is no SIMD level"),
        ("+bf16", "'' is no SIMD level"),
        ("bf16", "'bf16' is no SIMD level"),
        ("avx2+bf61", "'bf61' is no unit"),
        ("avx2+bf16-emulated", "'bf16-emulated' is no unit"),
        ("avx2+", "'' is no unit"),
    ],
)
def test_what_is_no_choice_is_refused(choice: str, thing: str) -> None:
    """With the value, the part that is wrong, and how to write it."""
    with pytest.raises(BackendError, match=re.escape(f"HYBRID_SIMD={choice!r}: {thing}")) as caught:
        hostcpu.choose(AVX512, choice)
    assert "LEVEL[-emulated][+bf16][+amx]" in str(caught.value.hint)
    assert "avx512vnni, avxvnni, avx2, portable" in str(caught.value.hint)


def test_a_level_that_cannot_run_is_refused_by_name() -> None:
    """A level without its instructions is an error and no fallback, whatever units are named."""
    with pytest.raises(BackendError, match=r"needs .*avx512vnni.*; this processor runs avx2"):
        hostcpu.choose(AVX2, "avx512vnni+bf16")
    for features, choice in (({"neon"}, "avx2-emulated"), (AVX2, "portable-emulated+bf16")):
        with pytest.raises(BackendError, match="cannot be emulated on this processor"):
            hostcpu.choose(features, choice)


@pytest.mark.parametrize(
    ("there", "choice", "native"),
    [(XEON, None, True), (XEON, "avx2", False), (AVX2, None, False), (AVX2, "avx2+amx", True)],
)
def test_decisions_ask_the_switch(
    there: set[str], choice: str | None, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The type of dense layers, panels and whose a calibration is: all as the processor counts."""
    monkeypatch.setattr(hostcpu, "host_features", lambda: there)
    monkeypatch.delenv("HYBRID_SIMD", raising=False)
    if choice:
        monkeypatch.setenv("HYBRID_SIMD", choice)
    assert has_native_bf16() == native
    assert offered(Block(hidden=32, intermediate=32, format="q4_0")) == native
    as_it_is = str(hostcpu.choose(there))
    assert Identity.of_this_machine(1).simd_level == (choice or as_it_is)


def test_nothing_else_asks_what_the_processor_has() -> None:
    """No module but one asks LLVM or torch for features: it would not heed the switch."""
    asks = re.compile(r"get_host_cpu_features|torch\.(backends\.)?cpu\.|_is_\w+_supported")
    asking = {
        path.relative_to(ROOT).as_posix()
        for package in ("hybrid", "planner", "cpu_experts", "gpu_experts")
        for path in (ROOT / package).rglob("*.py")
        if asks.search(path.read_text(encoding="utf-8"))
    }
    assert asking == {"cpu_experts/jit/hostcpu.py"}


def _pytest(level: str, *args: str, **extra: str) -> None:
    """Run tests in a process of their own, because a level is chosen once per process.

    pytest's exit code is not 0 when a test fails, and neither when none was found.
    """
    env = os.environ | {"HYBRID_SIMD": level} | extra
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *args]
    done = subprocess.run(command, cwd=HERE.parents[1], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


OTHERS = [
    level
    for level in hostcpu.available_levels(hostcpu.host_features())
    if level != hostcpu.processor().kernels
]


@pytest.mark.parametrize("level", OTHERS)
def test_every_level_that_this_processor_runs(level: str) -> None:
    """The kernels' tests pass on each level besides the one in use."""
    _pytest(level, str(HERE / "test_ffn.py"), str(HERE / "test_strips.py"))


def test_what_another_process_compiled_has_names_of_its_own(tmp_path: Path) -> None:
    """Code from the cache beside code that is compiled now: none is taken for another's."""
    _pytest(
        "portable", str(HERE / "test_ffn.py"), "-k", "load and 1-", NUMBA_CACHE_DIR=str(tmp_path)
    )
    _pytest("portable", str(HERE / "test_strips.py"), NUMBA_CACHE_DIR=str(tmp_path))


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
sys.path.insert(0, {str(SUPPORT)!r})
from unittest import mock
from cpu_experts.jit import hostcpu
features = frozenset().union(*hostcpu.LEVELS.values())
with mock.patch.object(hostcpu, "host_features", lambda: features):
    from micro_kernels import assembly
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
