"""The vectors of this process's SIMD level, and what is done with them in one instruction."""

from __future__ import annotations

from llvmlite import ir

from cpu_experts.jit.ir import F16, F32, I8, I16, I32, Builder, Value, call, load
from cpu_experts.jit.simd_level import EMULATED, LEVEL
from hybrid.formats.strips import TILE

BITS = 512 if LEVEL == "avx512vnni" else 256
LANES = BITS // 32
#: Vectors that a number for each of a strip's rows takes.
PARTS = TILE // LANES
REGISTERS = 32 if BITS == 512 else 16
#: Whether four products at a time are added up to int32, of bytes without a sign and with one.
DOT = LEVEL != "avx2" or EMULATED

#: 1.5 * 2^23 and its bits: the last bits of floats near it count in ones, so that a whole number
#: below 2^22 in size that is added to these bits is a float, which is larger by this much.
SHIFT, SHIFT_BITS = 1.5 * 2.0**23, 0x4B400000

BYTES = ir.VectorType(I8, 4 * LANES)
WORDS = ir.VectorType(I16, 2 * LANES)
INTS = ir.VectorType(I32, LANES)
FLOATS = ir.VectorType(F32, LANES)
HALVES = ir.VectorType(F16, LANES)
#: A byte of every row.
SUBS = ir.VectorType(I8, LANES)


def fma(b: Builder, x: Value, y: Value, z: Value) -> Value:
    """``x * y + z``, rounded once."""
    return call(b, f"llvm.fma.v{LANES}f32", FLOATS, [x, y, z])


def pin(b: Builder, value: Value) -> Value:
    """Fix the order of what comes before and after: an empty instruction LLVM cannot see into."""
    if EMULATED:  # the vector may be wider than this processor's registers
        return value
    fn_type = ir.FunctionType(value.type, [value.type])
    return b.asm(fn_type, "", "=v,0", [value], side_effect=True)


def read(b: Builder, base: Value, at: int, kind: ir.VectorType, width: int) -> list[Value]:
    """A vector of ``kind`` for each part of the rows, side by side; an element is ``width``."""
    return [load(b, base, at + width * kind.count * p, kind) for p in range(PARTS)]


def look_up(b: Builder, table: bytes, codes: Value) -> Value:
    """The bytes of a table of 16 that codes stand for."""
    one = ir.VectorType(I8, 32)
    numbers = [ir.Constant(I8, byte) for byte in table]
    if BITS == 256:
        return call(b, "llvm.x86.avx2.pshuf.b", one, [ir.Constant(one, numbers * 2), codes])
    if not EMULATED:
        return call(
            b, "llvm.x86.avx512.pshuf.b.512", BYTES, [ir.Constant(BYTES, numbers * 4), codes]
        )
    undefined, sides = ir.Constant(BYTES, ir.Undefined), []
    for first in (0, 32):
        picks = ir.Constant(ir.VectorType(I32, 32), list(range(first, first + 32)))
        side = b.shuffle_vector(codes, undefined, picks)
        sides.append(call(b, "llvm.x86.avx2.pshuf.b", one, [ir.Constant(one, numbers * 2), side]))
    both = ir.Constant(ir.VectorType(I32, 64), list(range(64)))
    return b.shuffle_vector(*sides, both)
