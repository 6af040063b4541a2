"""The Triton kernels without a GPU: in the interpreter, and compiled for GPUs that are not here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

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
        cwd=ROOT,
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
from gpu_experts.cuda import triton_kernels as kernels

TYPES = {"slots_ptr": "*u8", "table_ptr": "*i32", "y_ptr": "*fp32", "out_ptr": "*fp32",
         "host_ptr": "*fp32"}
FLOATS = ("alpha", "limit", "up_offset")
HALF = "*fp16" if sys.argv[1] == "75" else "*bf16"

def compile(kernel, **constants):
    signature, attributes = {}, {}
    for at, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            vector = name == "h_ptr" and "vector" in kernel.__name__
            signature[name] = "*fp32" if vector else TYPES.get(name, HALF)
            attributes[at,] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if name in FLOATS else "i32"
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": 4, "num_stages": 2}
    target = GPUTarget("cuda", int(sys.argv[1]), 32)
    compiled = triton.compile(source, target=target, options=options)
    return compiled.asm["ptx"], compiled.metadata.shared

up = {"GATED": True, "BIAS": True, "CLAMPED": True, "ACTIVATION": "silu"}
fmt = sys.argv[2]
compile(kernels.up_vector, FMT=fmt, **up, STRIPS=1, GROUPS=8)
compile(kernels.down_vector, FMT=fmt, BIAS=True, STRIPS=1, GROUPS=8)
compile(kernels.add_pairs, BLOCK=256)
compile(kernels.add_host, BLOCK=512)
for matrix in (
    compile(kernels.up_matrix, FMT=fmt, **up, STRIPS=2, ROWS=64),
    compile(kernels.down_matrix, FMT=fmt, BIAS=True, STRIPS=4, ROWS=64),
):
    assert "mma" in matrix[0] or sys.argv[1] == "75", "no tensor cores"
    assert matrix[1] <= 48 << 10, matrix[1]
print("compiled")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="triton's compiler is built for Linux")
@pytest.mark.parametrize(
    ("capability", "fmt"),
    [
        ("75", "q4_0"),
        ("86", "q4_0"),
        ("86", "q8_0"),
        ("90", "q4_0"),
        ("90", "q8_0"),
        ("120", "q4_0"),
    ],
)
def test_the_kernels_compile_for_gpus(capability: str, fmt: str, tmp_path: Path) -> None:
    """Turing to Blackwell code comes out, shared memory fits, and tensor cores are used.

    Triton has none for Turing, which the device says. Needs no GPU: Triton brings its assembler.
    """
    env = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    env.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", COMPILE, capability, fmt]
    # Triton reads a kernel's source from its file: the definitions are in one, only calls here.
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.stdout.strip() == "compiled", done.stderr[-3000:]


VARIANTS = """
import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.jit import create_function_from_signature
from gpu_experts.cuda import triton_kernels as kernels

backend, memory = CUDABackend(GPUTarget("cuda", 86, 32)), torch.zeros(64, dtype=torch.int32)
for kernel in (kernels.up_vector, kernels.down_vector, kernels.up_matrix, kernels.down_matrix,
               kernels.add_pairs, kernels.add_host):
    bind, seen = create_function_from_signature(kernel.signature, kernel.params, backend), set()
    for pairs in (1, 2, 3, 8, 16, 160):
        for users in (1, 2, 5, 16):
            calls = {"pairs": pairs, "users": users, "numbers": 16 * pairs + users}
            values = {
                p.name: calls.get(p.name, memory if p.name.endswith("_ptr") else 32)
                for p in kernel.params
            }
            seen.add(str(bind(**values)[1]))
    assert len(seen) == 1, (kernel.__name__, seen)
print("one each")
"""


def test_a_kernel_is_compiled_once_whatever_a_call_routes() -> None:
    """Numbers of pairs and users make no variants: those would compile in the middle of a text."""
    env = os.environ.copy()
    env.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", VARIANTS]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.stdout.strip() == "one each", done.stderr[-3000:]
