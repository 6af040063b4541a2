"""Counters that threads share: taking the next item, waiting for the last one; and the time."""

# numba calls the intrinsics with its own types and compiler state.
# mypy: disable-error-code="no-untyped-def, misc"

from __future__ import annotations

import os
import platform
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from cpu_experts.jit.ir import I32, I64, Builder, Value, call, data, gep

#: Looks at a counter before the waiting thread offers its core to others.
_SPINS = 2000


#: On others than x86 the clock that LLVM takes may be one that programs may not read.
_X86, _ARM = ("x86_64", "AMD64", "i386", "i686", "x86"), ("aarch64", "arm64", "ARM64")
_ARM_CLOCK = "mrs $0, cntvct_el0"


def _counter(context: Any, b: Builder, kind: Any, array: Value, at: Value) -> Value:
    address = gep(b, data(context, b, kind, array), b.mul(at, ir.Constant(I64, 8)))
    return b.bitcast(address, I64.as_pointer())


@intrinsic
def fetch_add(typingctx, counter, at):
    """Atomically add 1 to ``counter[at]`` (int64) and return its old value."""

    def codegen(context, b, signature, args):
        pointer = _counter(context, b, signature.args[0], args[0], args[1])
        return b.atomic_rmw("add", pointer, ir.Constant(I64, 1), "acq_rel")

    return types.int64(counter, types.int64), codegen


@intrinsic
def wait_for(typingctx, counter, at, value):
    """Wait until ``counter[at]`` (int64) is at least ``value``; lets other threads run."""

    def codegen(context, b, signature, args):
        pointer = _counter(context, b, signature.args[0], args[0], args[1])
        look, spin = b.append_basic_block("look"), b.append_basic_block("spin")
        rest, done = b.append_basic_block("rest"), b.append_basic_block("done")
        before = b.block
        b.branch(look)
        b.position_at_end(look)
        tries = b.phi(I64)
        seen = b.load_atomic(pointer, "acquire", 8, typ=I64)
        b.cbranch(b.icmp_signed(">=", seen, args[2]), done, spin)
        b.position_at_end(spin)
        again = b.add(tries, ir.Constant(I64, 1))
        patient = b.icmp_signed("<", again, ir.Constant(I64, _SPINS))
        b.cbranch(patient, look, rest)
        b.position_at_end(rest)
        if os.name == "posix":
            call(b, "sched_yield", I32, [])
        b.branch(look)
        tries.add_incoming(ir.Constant(I64, 0), before)
        tries.add_incoming(again, spin)
        tries.add_incoming(again, rest)
        b.position_at_end(done)
        return context.get_dummy_value()

    return types.void(counter, types.int64, types.int64), codegen


@intrinsic
def ticks(typingctx):
    """Return the processor's clock, int64, in units of its own; 0 where there is none to read."""

    def codegen(context, b, signature, args):
        if platform.machine() in _ARM:
            return b.asm(ir.FunctionType(I64, []), _ARM_CLOCK, "=r", [], side_effect=True)
        if platform.machine() not in _X86:
            return ir.Constant(I64, 0)
        return call(b, "llvm.readcyclecounter", I64, [])

    return types.int64(), codegen
