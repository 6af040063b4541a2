"""The kernels' machine code for processors with AVX-512, read on any x86 machine."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numba
import pytest

from hybrid.formats.registry import quantized_formats

HERE = Path(__file__).parent
QUANTIZED = quantized_formats()
CPUS = ("znver4", "sapphirerapids")
#: Instructions that collect numbers from anywhere, or spread them.
_ANYWHERE = re.compile(r"^\s+(vp?(?:gather|scatter)\w+)", re.MULTILINE)
_CONTROL = "__main__._gathering"

pytestmark = [
    pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="compiles for x86"),
    pytest.mark.skipif(bool(numba.config.DISABLE_JIT), reason="nothing is compiled"),
    pytest.mark.timeout(900),
]


@pytest.fixture(scope="module")
def assembly(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], dict[str, str]]]:
    """Assembly by kernel, for one of ``CPUS``; compiling, which takes a minute, begins at once."""
    chosen = ("HYBRID_", "NUMBA_")  # choices of a level or a processor, perhaps
    environment = {k: v for k, v in os.environ.items() if not k.startswith(chosen)}
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(HERE.parents[1]), str(HERE.parent / "support")]
    )
    folders = {cpu: tmp_path_factory.mktemp(cpu) for cpu in CPUS}
    started = {
        cpu: subprocess.Popen(
            [sys.executable, str(HERE.parent / "support" / "assembly.py"), cpu, str(folder)],
            env=environment | {"NUMBA_CACHE_DIR": str(folder)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for cpu, folder in folders.items()
    }

    def read(cpu: str) -> dict[str, str]:
        _, said = started[cpu].communicate()
        assert started[cpu].returncode == 0, said[-2000:]
        return {path.stem: path.read_text() for path in folders[cpu].glob("*.s")}

    yield read
    for child in started.values():
        child.kill()
        child.wait()


@pytest.mark.parametrize("cpu", CPUS)
def test_loops_read_side_by_side(cpu: str, assembly: Callable[[str], dict[str, str]]) -> None:
    """No kernel gathers or scatters; one that is written so that it has to is found out."""
    found = assembly(cpu)
    assert ("tdpbf16ps" in "".join(found.values())) == (cpu == "sapphirerapids")
    used = {name: dict(Counter(_ANYWHERE.findall(text))) for name, text in found.items()}
    assert used.pop(_CONTROL)
    assert not {name: counts for name, counts in used.items() if counts}
    for fmt in QUANTIZED:
        assert "vpdpbusd" in found[f"cpu_experts.kernels.dots.micro_kernels_{fmt}"]
    assert re.search(r"vpaddq\s.*%zmm", found["cpu_experts.kernels.reading._read"])
