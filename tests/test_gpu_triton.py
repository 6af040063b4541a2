"""The Triton kernels without a GPU: in the interpreter, and compiled for GPUs that are not here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent

pytest.importorskip("triton")


def test_the_kernels_in_the_interpreter() -> None:
    """The kernels' tests pass in Triton's interpreter, in a process of its own.

    Whether kernels are interpreted is settled when they are defined: another process leaves
    this one alone.
    """
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, str(HERE / "test_gpu_kernels.py")],
        cwd=HERE.parent,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from gpu_experts import triton_kernels as kernels

POINTERS = {"words_ptr": "*i32", "scales_ptr": "*fp16", "floats_ptr": "*fp32", "y_ptr": "*fp32",
            "out_ptr": "*fp32", "weight_ptr": "*fp32", "x_ptr": "*bf16"}
FLOATS = ("alpha", "limit", "up_offset")

def compile(kernel, capability, **constants):
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name == "h_ptr":
            signature[name] = "*bf16" if "matrix" in kernel.__name__ else "*fp32"
        elif name.endswith("_ptr"):
            signature[name] = POINTERS.get(name, "*i32")
        else:
            signature[name] = "fp32" if name in FLOATS else "i32"
    source = ASTSource(kernel, signature, constexprs=constants)
    options = {"num_warps": 4, "num_stages": 2}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return compiled.asm["ptx"], compiled.metadata.shared

up = {"GATED": True, "BIAS": True, "CLAMPED": True, "ACTIVATION": "silu"}
capability, q4 = int(sys.argv[1]), sys.argv[2] == "q4_0"
compile(kernels.up_vector, capability, Q4=q4, **up, STRIPS=1, GROUPS=8)
compile(kernels.down_vector, capability, Q4=q4, BIAS=True, STRIPS=1, GROUPS=8)
compile(kernels.add_pairs, capability, BLOCK=256)
for matrix in (
    compile(kernels.up_matrix, capability, Q4=q4, **up, STRIPS=2, ROWS=64),
    compile(kernels.down_matrix, capability, Q4=q4, BIAS=True, STRIPS=4, ROWS=64),
):
    assert "mma" in matrix[0], "no tensor cores"
    assert matrix[1] <= 48 << 10, matrix[1]
print("compiled")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="triton's compiler is built for Linux")
@pytest.mark.parametrize("fmt", ["q4_0", "q8_0"])
@pytest.mark.parametrize("capability", ["80", "89", "90"])
def test_the_kernels_compile_for_gpus(capability: str, fmt: str, tmp_path: Path) -> None:
    """Ampere, Ada and Hopper code comes out, matrix kernels use tensor cores, shared memory fits.

    Needs no GPU: Triton brings its own assembler.
    """
    env = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    env.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", COMPILE, capability, fmt]
    # Triton reads a kernel's source from its file: the definitions are in one, only calls here.
    done = subprocess.run(command, cwd=HERE.parent, env=env, capture_output=True, text=True)
    assert done.stdout.strip() == "compiled", done.stderr[-3000:]
