"""Codes of weights as bytes without a sign, and how their products with activations add up.

A level adds up products of 4 neighbouring bytes in one of these ways:

* ``avx512vnni``, ``avxvnni``: ``vpdpbusd`` into int32 lanes, one a row.
* ``avx2``: ``vpmaddubsw`` into int16 lanes, two a row, which are widened before they could
  overflow: never within a group of 4-bit codes (8 steps of at most 2 * 15 * 127), twice of 5-bit
  ones, four times of 6-bit ones. Codes of 8 bits are signed there: their signs go to the
  activations, and they are widened at every step.

``LEVEL-emulated`` is a level's code with its dot product spelled out in ordinary
instructions: slow, and there to check a level on a machine that lacks it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from llvmlite import ir

from cpu_experts.jit.ir import I32, Builder, Value, call, const
from cpu_experts.jit.simd_level import EMULATED
from cpu_experts.kernels.vectors import BITS, BYTES, DOT, INTS, LANES, WORDS, look_up, pin, read

_UNDEFINED = ir.Undefined


@dataclass(frozen=True)
class Codes:
    """How a format's codes are read.

    Parameters
    ----------
    planes
        Bits of each plane of a group (:mod:`hybrid.formats.groups`), lowest first.
    middle
        The code of 0, where codes are shifted numbers.
    numbers
        The 16 numbers that the codes stand for, where they are no numbers themselves.
    """

    planes: tuple[int, ...]
    middle: int = 0
    numbers: tuple[int, ...] = ()

    @property
    def most(self) -> int:
        """The largest byte."""
        if self.numbers:
            return max(self.numbers) - min(self.numbers)
        return int(2 ** sum(self.planes) - 1)

    @property
    def signed(self) -> bool:
        """Whether the bytes have a sign: two products of them would overflow 16 bits."""
        return not DOT and 2 * 127 * self.most > 32767

    @property
    def zero(self) -> int:
        """What the bytes are shifted by."""
        if self.signed:
            return 0
        return -min(self.numbers) if self.numbers else self.middle

    @cached_property
    def steps(self) -> int:
        """Steps that 16 bits hold the sum of two products of."""
        return 32767 // (2 * 127 * self.most) if self.most else 0

    def inputs(self, step: int) -> int:
        """Where the 4 activation bytes of a step lie in the group."""
        return 4 * step if self.planes == (8,) else 4 * (step // 2) + 16 * (step % 2)

    def read(self, b: Builder, group: Value, step: int) -> list[Value]:
        """Bytes of 4 inputs, of the group that begins at ``group``."""
        found: list[Value] = []
        at = shift = 0
        for bits in self.planes:
            chunk, field = divmod(step, 8 // bits)
            raw = read(b, group, 64 * (at + chunk), BYTES, 1)
            mask = const(BYTES, (2**bits - 1) << shift)
            parts = [b.and_(_shifted(b, v, bits * field - shift), mask) for v in raw]
            found = [b.or_(*both) for both in zip(found, parts, strict=True)] if at else parts
            at, shift = at + bits, shift + bits
        if self.planes == (8,):
            return found if self.signed else [b.xor(v, const(BYTES, 0x80)) for v in found]
        if self.numbers:
            table = bytes((number + self.zero) % 256 for number in self.numbers)
            found = [look_up(b, table, v) for v in found]
        return found


def _shifted(b: Builder, value: Value, right: int) -> Value:
    """Bytes shifted by some bits, which may come in from the byte beside them."""
    if right == 0:
        return value
    words = b.bitcast(value, WORDS)
    by = const(WORDS, abs(right))
    return b.bitcast(b.lshr(words, by) if right > 0 else b.shl(words, by), BYTES)


class Sum:
    """Products of one vector of weights and one activation row, as they add up over steps.

    Parameters
    ----------
    start
        Gives what the sum begins with, as int32 lanes.
    """

    def __init__(self, b: Builder, codes: Codes, start: Callable[[], Value]) -> None:
        self._builder, self._codes, self._start = b, codes, start
        self._words: Value = None
        self._total: Value = None
        self._steps = 0
        if DOT or codes.signed:
            self._total = start()

    def add(self, w: Value, x: Value) -> None:
        """Add a step: ``w`` bytes, ``x`` the same 4 activation bytes in every lane."""
        b = self._builder
        if EMULATED:
            self._total = _emulated(b, self._total, w, b.bitcast(x, BYTES))
        elif DOT:
            args = [self._total, b.bitcast(w, INTS), x]
            self._total = call(b, f"llvm.x86.avx512.vpdpbusd.{BITS}", INTS, args)
        elif self._codes.signed:
            size = call(b, "llvm.abs.v32i8", BYTES, [w, ir.Constant(ir.IntType(1), 0)])
            x = call(b, "llvm.x86.avx2.psign.b", BYTES, [b.bitcast(x, BYTES), w])
            self._total = b.add(self._total, _widened(b, _products(b, size, x)))
        else:
            if self._steps == self._codes.steps:
                self._fold()
            products = _products(b, w, b.bitcast(x, BYTES))
            self._words = products if self._words is None else b.add(self._words, products)
            self._steps += 1

    def _fold(self) -> None:
        """Empty the 16 bits into the 32."""
        b = self._builder
        wide = _widened(b, self._words)
        self._total = wide if self._total is None else b.add(self._total, wide)
        self._words, self._steps = None, 0

    def pin(self) -> None:
        """Have it stay where it is between this step and the next."""
        if self._total is not None:
            self._total = pin(self._builder, self._total)
        if self._words is not None:
            self._words = pin(self._builder, self._words)

    def total(self) -> Value:
        """The sum as int32 lanes, one a row."""
        if self._words is not None:
            self._fold()
            self._total = self._builder.add(self._total, self._start())
        return self._total


def _products(b: Builder, unsigned: Value, signed: Value) -> Value:
    return call(b, "llvm.x86.avx2.pmadd.ub.sw", WORDS, [unsigned, signed])


def _widened(b: Builder, words: Value) -> Value:
    return call(b, "llvm.x86.avx2.pmadd.wd", INTS, [words, const(WORDS, 1)])


def _emulated(b: Builder, acc: Value, w: Value, x: Value) -> Value:
    wide = ir.VectorType(I32, 4 * LANES)
    products = b.mul(b.zext(w, wide), b.sext(x, wide))
    for at in range(4):
        picks = ir.Constant(ir.VectorType(I32, LANES), [4 * i + at for i in range(LANES)])
        acc = b.add(acc, b.shuffle_vector(products, ir.Constant(wide, _UNDEFINED), picks))
    return acc
