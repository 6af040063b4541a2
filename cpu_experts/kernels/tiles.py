"""Matrix units (AMX) as LLVM IR: weights widened into tiles, and products of tiles.

A tile of weights holds 32 inputs of a strip as bfloat16: row k has inputs 2k and 2k + 1 of all 16
rows, pair by pair. That is how a strip lies anyway, so widening moves nothing across rows. A tile
of activations is 16 tokens by 32 inputs as they lie in memory; sums are float32 and stay in the
unit over all inputs.

The registers have fixed parts: 0 to 3 sum up (tokens by strips), 4 and 5 hold activations, 6 and 7
weights. Who uses them calls :func:`begin` first and :func:`end` last, in the same thread.
"""

# numba calls the intrinsics with its own types and compiler state.
# mypy: disable-error-code="no-untyped-def, misc"

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from cpu_experts.jit.ir import (
    BF16,
    F16,
    F32,
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
from cpu_experts.kernels.simd_loops import Quantized, loop_of
from hybrid.formats.registry import FORMATS
from hybrid.formats.strips import GROUP, TILE

#: Formats that are widened into tiles.
TILED = ("q4_0", "q8_0", "bf16")
#: Bytes of a tile: 16 rows of 64.
TILE_BYTES = 1024
#: Tokens that one product takes: two tiles of them.
TOKENS = 2 * TILE
_INTS = ir.VectorType(I32, TILE)
_FLOATS = ir.VectorType(F32, TILE)
_PAIRS = ir.VectorType(I16, 2 * TILE)
_BYTES = ir.VectorType(I8, 4 * TILE)
_ROWS = range(TILE)
#: Formats whose codes take all bits of a byte.
_EIGHT_BITS = ("q8_0",)


def _register(number: int) -> Value:
    return ir.Constant(I8, number)


def _fill_quantized(b: Builder, fmt: str, base: Value, out: Value) -> None:
    """Write the tile of a unit: scales times codes, each rounded once to float32, then to bfloat16.

    A code becomes a float32 without being converted: as a byte of the mantissa of 128, or of 256
    where it has all eight bits. From the product with the scale that of the constant is taken
    away, which is exact, within one rounding.
    """
    codes_of, size = loop_of(fmt), FORMATS[fmt].unit_bytes
    assert isinstance(codes_of, Quantized)
    scale = b.fpext(load(b, base, size - 2 * TILE, ir.VectorType(F16, TILE)), _FLOATS)
    if fmt in _EIGHT_BITS:
        scales, one = [scale, scale], 256
    else:
        scales, one = (
            [_picked(b, scale, [8 * half + i // 2 for i in _ROWS]) for half in (0, 1)],
            128,
        )
    shifts = [b.fmul(each, const(_FLOATS, -float(one + codes_of.offset))) for each in scales]
    for step in range(GROUP // 4):
        (chunk,) = codes_of.codes(b, base, step)
        for pair in range(2):
            numbers = _of_256(b, chunk, pair) if one == 256 else _of_128(b, chunk, pair)
            first, second = (
                call(b, "llvm.fma.v16f32", _FLOATS, [number, each, shift])
                for number, each, shift in zip(numbers, scales, shifts, strict=True)
            )
            rounded = _rounded(b, first, second)
            if one == 256:
                rounded = _picked(b, rounded, [16 * (i % 2) + i // 2 for i in range(2 * TILE)])
            store(b, rounded, out, 32 * codes_of.inputs(step) + 64 * pair)


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
        operands = [chunk, ir.Constant(_BYTES, places)]
        moved = call(b, "llvm.x86.avx512.permvar.qi.512", _BYTES, operands)
        # Hidden from LLVM, which would make one slower instruction of three.
        hidden = b.asm(ir.FunctionType(_BYTES, [_BYTES]), "", "=x,0", [moved], side_effect=False)
        moved = b.bitcast(hidden, _INTS)
        bits = b.or_(b.and_(moved, const(_INTS, 0xFF << 16)), const(_INTS, 0x43000000))
        numbers.append(b.bitcast(bits, _FLOATS))
    return numbers


def _of_256(b: Builder, chunk: Value, pair: int) -> list[Value]:
    """256 + codes of two inputs, all rows of one and then of the other."""
    words, numbers = b.bitcast(chunk, _INTS), []
    for byte in (2 * pair, 2 * pair + 1):
        to = 15 - 8 * byte
        moved = b.shl(words, const(_INTS, to)) if to > 0 else b.lshr(words, const(_INTS, -to))
        bits = b.or_(b.and_(moved, const(_INTS, 0xFF << 15)), const(_INTS, 0x43800000))
        numbers.append(b.bitcast(bits, _FLOATS))
    return numbers


def _rounded(b: Builder, first: Value, second: Value) -> Value:
    """Round to bfloat16, halves to even."""
    name = "llvm.x86.avx512bf16.cvtne2ps2bf16.512"
    rounded = call(b, name, ir.VectorType(BF16, 2 * TILE), [second, first])
    return b.bitcast(rounded, _PAIRS)


def fill_tiles(fmt: str) -> Any:
    """Return what widens a strip of a format into tiles, as a numba intrinsic.

    ``fill(w, w_at, inner, tiles, at)`` reads ``inner`` units at byte ``w_at`` of ``w`` and writes
    whole tiles at byte ``at`` of ``tiles``.
    """

    def codegen(context, b, signature, args):
        kinds = signature.args
        base = gep(b, data(context, b, kinds[0], args[0]), args[1])
        out = gep(b, data(context, b, kinds[3], args[3]), args[4])
        b.call(_fill_function(b.module, fmt), [base, args[2], out])
        return context.get_dummy_value()

    @intrinsic
    def fill(typingctx, w, w_at, inner, tiles, at):
        i64 = types.int64
        return types.void(w, i64, i64, tiles, i64), codegen

    return fill


def _function(module: Any, name: str, arguments: list[Any]) -> Any:
    """A function of its own in the module, which stays one: see the micro-kernels."""
    kind = ir.FunctionType(ir.VoidType(), arguments)
    function = ir.Function(module, kind, name)
    function.linkage = "linkonce_odr"
    function.attributes.add("noinline")
    return function


def _fill_function(module: Any, fmt: str) -> Any:
    name = f"fill_tiles_{fmt}"
    if name in module.globals:
        return module.globals[name]
    pointer = I8.as_pointer()
    function = _function(module, name, [pointer, I64, pointer])
    base, inner, out = function.args
    b = ir.IRBuilder(function.append_basic_block())
    size = FORMATS[fmt].unit_bytes
    if FORMATS[fmt].quantized:

        def unit(g: Value) -> list[Value]:
            here = gep(b, base, b.mul(g, ir.Constant(I64, size)))
            _fill_quantized(b, fmt, here, gep(b, out, b.mul(g, ir.Constant(I64, TILE_BYTES))))
            return []

        loop(b, inner, [], unit)
        b.ret_void()
        return function

    def pair(k: Value) -> list[Value]:
        at = b.mul(k, ir.Constant(I64, 64))
        pairs = load(b, base, at, _PAIRS)
        places = [16 * (i % 2) + i // 2 for i in range(2 * TILE)]
        store(b, _picked(b, pairs, places), out, at)
        return []

    loop(b, b.lshr(inner, ir.Constant(I64, 1)), [], pair)  # of bfloat16, a unit is one input
    b.ret_void()
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
    bit = ir.IntType(1)
    function = _function(module, name, [pointer, I64, pointer, pointer, I64, pointer, bit])
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
            floats = load(b, source, b.mul(i, ir.Constant(I64, 4 * TILE)), _FLOATS)
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
