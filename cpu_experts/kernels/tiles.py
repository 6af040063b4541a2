"""Matrix units (AMX) as LLVM IR: weights widened into tiles, and products of tiles.

A tile of weights holds 32 inputs of a strip as bfloat16: row k has inputs 2k and 2k + 1 of all 16
rows, pair by pair. That is how a strip lies anyway, so widening moves nothing across rows. A tile
of activations is 16 tokens by 32 inputs as they lie in memory; sums are float32 and stay in the
unit over all inputs.

The registers have fixed parts: 0 to 3 sum up (tokens by strips), 4 and 5 hold activations, 6 and 7
weights. Who uses them calls :func:`begin` first and :func:`end` last, in the same thread.
"""

# numba calls the intrinsics with its own types and compiler state.
# mypy: disable-error-code="no-untyped-def, misc, untyped-decorator"

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from cpu_experts.jit.compiled import kernel
from cpu_experts.jit.ir import (
    BF16,
    I8,
    I16,
    I32,
    I64,
    Builder,
    Value,
    call,
    const,
    data,
    floats_at,
    gep,
    load,
    loop,
    store,
)
from cpu_experts.jit.turns import Turn
from cpu_experts.kernels.simd_loops import Grouped, loop_of
from cpu_experts.kernels.vectors import BYTES, FLOATS, INTS, fma
from hybrid.formats.registry import FORMATS
from hybrid.formats.strips import TILE

#: Bytes of a tile: 16 rows of 64.
TILE_BYTES = 1024
#: Tokens that one product takes: two tiles of them.
TOKENS = 2 * TILE
_PAIRS = ir.VectorType(I16, 2 * TILE)
_ROWS = range(TILE)
_INTERLEAVED = [TILE * (i % 2) + i // 2 for i in range(2 * TILE)]
#: Strip, first tile, number of tiles, where they go.
_FILL = ir.FunctionType(ir.VoidType(), [I8.as_pointer(), I64, I64, I8.as_pointer()])

_FILLERS: dict[str, int] = {}
#: What holds the machine code of fillers, which stays where it is while this does.
MADE: list[Any] = []
_LOCK = Turn()


def _register(number: int) -> Value:
    return ir.Constant(I8, number)


def filler(fmt: str) -> int:
    """Return the address of what widens strips of a format, for :func:`fill`; compiles it once."""
    with _LOCK:
        if fmt not in _FILLERS:
            number, place = list(FORMATS).index(fmt), np.zeros(1, np.int64)

            def find(place):
                place[0] = _address(number)

            find.__qualname__ = f"fill_tiles_{fmt}"
            found = kernel()(find)
            found(place)
            MADE.append(found)
            _FILLERS[fmt] = int(place[0])
        return _FILLERS[fmt]


@intrinsic(prefer_literal=True)
def _address(typingctx, number):
    """The address of what widens the format in this place of the registry."""
    if not isinstance(number, types.IntegerLiteral):
        return None

    def codegen(context, b, signature, args):
        return b.ptrtoint(_fill_function(b.module, list(FORMATS)[number.literal_value]), I64)

    return types.int64(number), codegen


@intrinsic
def fill(typingctx, filler, w, w_at, step, steps, tiles, at):
    """Widen tiles ``step : step + steps`` of the strip at byte ``w_at`` of ``w``.

    They are written to byte ``at`` of ``tiles``, one after the other.
    """

    def codegen(context, b, signature, args):
        kinds = signature.args
        strip = gep(b, data(context, b, kinds[1], args[1]), args[2])
        out = gep(b, data(context, b, kinds[5], args[5]), args[6])
        function = b.inttoptr(args[0], _FILL.as_pointer())
        b.call(function, [strip, args[3], args[4], out])
        return context.get_dummy_value()

    i64 = types.int64
    return types.void(i64, w, i64, i64, i64, tiles, i64), codegen


def _fill_function(module: Any, fmt: str) -> Any:
    name = f"fill_tiles_{fmt}"
    if name in module.globals:
        return module.globals[name]
    function = _function(module, name, _FILL)
    strip, first, count, out = function.args
    b = ir.IRBuilder(function.append_basic_block())
    emitted = loop_of(fmt)

    def tile(k: Value) -> list[Value]:
        at, to = b.add(first, k), gep(b, out, b.mul(k, ir.Constant(I64, TILE_BYTES)))
        if isinstance(emitted, Grouped):
            _grouped_tile(b, emitted, strip, at, to)
        else:
            _bf16_tile(b, strip, at, to)
        return []

    loop(b, count, [], tile)
    b.ret_void()
    return function


def _bf16_tile(b: Builder, strip: Value, number: Value, out: Value) -> None:
    """The 32 inputs of a tile are 16 rows of 2 bytes each."""
    base = gep(b, strip, b.mul(number, ir.Constant(I64, TILE_BYTES)))
    for row in range(TILE):
        store(b, _picked(b, load(b, base, 64 * row, _PAIRS), _INTERLEAVED), out, 64 * row)


def _grouped_tile(b: Builder, form: Grouped, strip: Value, number: Value, out: Value) -> None:
    """Write the tile of a group: its numbers in float32, rounded to bfloat16.

    A code becomes a float32 without being converted: as bits of the mantissa of 128, or of 256
    where it has all eight. What the constant adds to the product goes with the group's minimum.
    """
    layout, codes = form.layout, form.codes
    here = b.and_(number, ir.Constant(I64, layout.groups - 1))
    which = b.sub(number, here)
    unit = gep(b, strip, b.mul(which, ir.Constant(I64, layout.unit_bytes // layout.groups)))
    group = gep(b, unit, b.mul(here, ir.Constant(I64, layout.group_bytes)))
    factors = form.scales.factors(b, layout, unit, here)
    wide = codes.most > 127
    base = -float((256 if wide else 128) + codes.zero)
    for run, ((scale,),) in enumerate(zip(factors.scales, strict=True)):
        shift = b.fmul(scale, const(FLOATS, base))
        if factors.shifts:
            shift = b.fadd(shift, factors.shifts[run][0])
        sides = [(scale, shift)] * 2
        if not wide:
            sides = [
                (_picked(b, scale, rows), _picked(b, shift, rows))
                for rows in ([8 * half + i // 2 for i in _ROWS] for half in (0, 1))
            ]
        for step in range(run, 8, len(factors.scales)):
            (chunk,) = codes.read(b, group, step)
            for pair in range(2):
                numbers = _of_256(b, chunk, pair) if wide else _of_128(b, chunk, pair)
                values = [fma(b, v, *side) for v, side in zip(numbers, sides, strict=True)]
                rounded = _rounded(b, *values)
                rounded = _picked(b, rounded, _INTERLEAVED) if wide else rounded
                store(b, rounded, out, 32 * codes.inputs(step) + 64 * pair)


def _picked(b: Builder, vector: Value, places: list[int]) -> Value:
    """Elements of a vector."""
    mask = ir.Constant(ir.VectorType(I32, len(places)), places)
    return b.shuffle_vector(vector, ir.Constant(vector.type, ir.Undefined), mask)


def _of_128(b: Builder, chunk: Value, pair: int) -> list[Value]:
    """128 + codes of two inputs, side by side: of the first eight rows, and of the others."""
    numbers = []
    for half in (0, 1):
        places = [0] * 4 * TILE
        for i in _ROWS:
            places[4 * i + 2] = 4 * (8 * half + i // 2) + 2 * pair + i % 2
        operands = [chunk, ir.Constant(BYTES, places)]
        moved = call(b, "llvm.x86.avx512.permvar.qi.512", BYTES, operands)
        # Hidden from LLVM, which would make one slower instruction of three.
        hidden = b.asm(ir.FunctionType(BYTES, [BYTES]), "", "=x,0", [moved], side_effect=False)
        bits = b.and_(b.bitcast(hidden, INTS), const(INTS, 0xFF << 16))
        numbers.append(b.bitcast(b.or_(bits, const(INTS, 0x43000000)), FLOATS))
    return numbers


def _of_256(b: Builder, chunk: Value, pair: int) -> list[Value]:
    """256 + codes of two inputs, all rows of one and then of the other."""
    words, numbers = b.bitcast(chunk, INTS), []
    for byte in (2 * pair, 2 * pair + 1):
        to = 15 - 8 * byte
        moved = b.shl(words, const(INTS, to)) if to > 0 else b.lshr(words, const(INTS, -to))
        bits = b.or_(b.and_(moved, const(INTS, 0xFF << 15)), const(INTS, 0x43800000))
        numbers.append(b.bitcast(bits, FLOATS))
    return numbers


def _rounded(b: Builder, first: Value, second: Value) -> Value:
    """Round to bfloat16, halves to even."""
    name = "llvm.x86.avx512bf16.cvtne2ps2bf16.512"
    rounded = call(b, name, ir.VectorType(BF16, 2 * TILE), [second, first])
    return b.bitcast(rounded, _PAIRS)


def _function(module: Any, name: str, kind: Any) -> Any:
    """A function of its own in the module, which stays one: see the micro-kernels."""
    function = ir.Function(module, kind, name)
    function.linkage = "linkonce_odr"
    function.attributes.add("noinline")
    return function


def tile_dot(blocks: int) -> Any:
    """Return the product of ``blocks`` tiles of tokens (1 or 2) with two strips, as an intrinsic.

    ``dot(act, act_at, stride, tiles, first, second, steps, out, out_at)`` multiplies the rows at
    byte ``act_at`` of ``act``, ``stride`` bytes apart, with the strips whose tiles begin at bytes
    ``first`` and ``second``, over ``steps`` tiles of inputs, and writes float32
    ``[16 * blocks, 32]`` at ``out[out_at:]``: of every token the 16 rows of one strip, then those
    of the other. Where ``more`` is true it adds to what is there.
    """

    def codegen(context, b, signature, args):
        kinds = signature.args
        act = gep(b, data(context, b, kinds[0], args[0]), args[1])
        weights = data(context, b, kinds[3], args[3])
        out = floats_at(context, b, kinds[7], args[7], args[8])
        strips = [gep(b, weights, at) for at in (args[4], args[5])]
        operands = [act, args[2], *strips, args[6], out, args[9]]
        b.call(_dot_function(b.module, blocks), operands)
        return context.get_dummy_value()

    @intrinsic
    def dot(typingctx, act, act_at, stride, tiles, first, second, steps, out, out_at, more):
        i64 = types.int64
        return types.void(act, i64, i64, tiles, i64, i64, i64, out, i64, types.boolean), codegen

    return dot


def _dot_function(module: Any, blocks: int) -> Any:
    name = f"tile_dot_{blocks}"
    if name in module.globals:
        return module.globals[name]
    pointer = I8.as_pointer()
    kind = ir.FunctionType(
        ir.VoidType(), [pointer, I64, pointer, pointer, I64, pointer, ir.IntType(1)]
    )
    function = _function(module, name, kind)
    act, stride, first, second, steps, out, more = function.args
    b = ir.IRBuilder(function.append_basic_block())
    void, line, row = ir.VoidType(), ir.Constant(I64, 64), ir.Constant(I64, 2 * 4 * TILE)
    sums = {
        2 * m + s: gep(b, out, 2 * 4 * TILE * TILE * m + 4 * TILE * s)
        for m in range(blocks)
        for s in range(2)
    }
    with b.if_else(more) as (then, otherwise):
        with then:
            for register, place in sums.items():
                call(b, "llvm.x86.tileloadd64", void, [_register(register), place, row])
        with otherwise:
            for register in sums:
                call(b, "llvm.x86.tilezero", void, [_register(register)])

    def step(k: Value) -> list[Value]:
        at = b.mul(k, ir.Constant(I64, TILE_BYTES))
        for s, strip in enumerate((first, second)):
            call(b, "llvm.x86.tileloadd64", void, [_register(6 + s), gep(b, strip, at), line])
        inputs = b.mul(k, line)
        for m in range(blocks):
            rows = gep(b, gep(b, act, b.mul(stride, ir.Constant(I64, TILE * m))), inputs)
            call(b, "llvm.x86.tileloadd64", void, [_register(4 + m), rows, stride])
            for s in range(2):
                names = [_register(n) for n in (2 * m + s, 4 + m, 6 + s)]
                call(b, "llvm.x86.tdpbf16ps", void, names)
        return []

    loop(b, steps, [], step)
    for register, place in sums.items():
        call(b, "llvm.x86.tilestored64", void, [_register(register), place, row])
    b.ret_void()
    return function


@intrinsic
def begin(typingctx):
    """Give every register 16 rows of 64 bytes."""

    def codegen(context, b, signature, args):
        content = bytearray(64)
        content[0] = 1  # the palette
        for register in range(8):
            content[16 + 2 * register] = 64
            content[48 + register] = TILE
        kind = ir.ArrayType(I8, 64)
        place = b.alloca(kind)
        place.align = 64
        b.store(ir.Constant(kind, list(content)), place)
        call(b, "llvm.x86.ldtilecfg", ir.VoidType(), [b.bitcast(place, I8.as_pointer())])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def end(typingctx):
    """Give the registers back; a thread that holds none is switched faster."""

    def codegen(context, b, signature, args):
        call(b, "llvm.x86.tilerelease", ir.VoidType(), [])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def round_rows(typingctx, x, at, count, out, out_at):
    """Write ``count`` float32 at ``x[at:]``, a multiple of 16, as bfloat16 at byte ``out_at``."""

    def codegen(context, b, signature, args):
        kinds = signature.args
        source = floats_at(context, b, kinds[0], args[0], args[1])
        target = gep(b, data(context, b, kinds[3], args[3]), args[4])
        name, halves = "llvm.x86.avx512bf16.cvtneps2bf16.512", ir.VectorType(BF16, TILE)

        def some(i: Value) -> list[Value]:
            floats = load(b, source, b.mul(i, ir.Constant(I64, 4 * TILE)), FLOATS)
            rounded = b.bitcast(call(b, name, halves, [floats]), ir.VectorType(I16, TILE))
            store(b, rounded, target, b.mul(i, ir.Constant(I64, 2 * TILE)))
            return []

        loop(b, b.lshr(args[2], ir.Constant(I64, 4)), [], some)
        return context.get_dummy_value()

    i64 = types.int64
    return types.void(x, i64, i64, out, i64), codegen


@intrinsic
def expect_writes(typingctx, x, at, count):
    """Fetch the cache lines of ``count`` four-byte numbers at ``x[at:]``, soon to be written."""

    def codegen(context, b, signature, args):
        base = floats_at(context, b, signature.args[0], args[0], args[1])
        ask = [ir.Constant(I32, n) for n in (1, 3, 1)]

        def line(i: Value) -> list[Value]:
            place = gep(b, base, b.mul(i, ir.Constant(I64, 64)))
            call(b, "llvm.prefetch.p0", ir.VoidType(), [place, *ask])
            return []

        loop(b, b.lshr(b.add(args[2], ir.Constant(I64, TILE - 1)), ir.Constant(I64, 4)), [], line)
        return context.get_dummy_value()

    i64 = types.int64
    return types.void(x, i64, i64), codegen
