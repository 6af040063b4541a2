"""Packed weights read one by one: the plain twin of every quantized format's layout."""

from __future__ import annotations

import numpy as np

#: Planes of a code's bits, groups of a unit, bytes of a group's sub-scales and of a row's numbers.
LAYOUTS = {
    "q4_0": ((4,), 1, 0, (2,)),
    "q4_1": ((4,), 1, 0, (2, 2)),
    "q5_0": ((4, 1), 1, 0, (2,)),
    "q5_1": ((4, 1), 1, 0, (2, 2)),
    "q8_0": ((8,), 1, 0, (2,)),
    "q2_k": ((2,), 8, 2, (2, 2)),
    "q3_k": ((2, 1), 8, 2, (2,)),
    "q4_k": ((4,), 8, 2, (2, 2)),
    "q5_k": ((4, 1), 8, 2, (2, 2)),
    "q6_k": ((4, 2), 8, 2, (2,)),
    "iq4_nl": ((4,), 1, 0, (2,)),
    "iq4_xs": ((4,), 8, 1, (2,)),
    "mxfp4": ((4,), 1, 0, (1,)),
    "nvfp4": ((4,), 8, 2, (4,)),
    "int4_32": ((4,), 8, 0, (2,) * 8 + (1,) * 8),
    "int4_64": ((4,), 8, 0, (2,) * 4 + (1,) * 4),
    "int4_128": ((4,), 8, 0, (2,) * 2 + (1,) * 2),
    "int4_256": ((4,), 8, 0, (2, 1)),
    "nf4": ((4,), 8, 0, (4,) * 4),
}
ZERO = {"q4_0": 8, "q5_0": 16, "q3_k": 4, "q6_k": 32}
IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
NF4 = (-112, -78, -59, -44, -32, -21, -10, 0, 9, 18, 28, 38, 49, 63, 81, 112)
FP4 = (0, 0.5, 1, 1.5, 2, 3, 4, 6)


def unit_bytes(fmt: str) -> int:
    """Bytes of a unit of 16 rows."""
    planes, groups, subs, numbers = LAYOUTS[fmt]
    return 16 * (groups * (4 * sum(planes) + subs) + sum(numbers))


def _code(unit: bytes, planes: tuple[int, ...], group: int, row: int, k: int) -> int:
    four, at, shift, code = k // 4, group * 64 * sum(planes), 0, 0
    for bits in planes:
        step = four if bits == 8 else 2 * (four % 4) + four // 4
        chunk, field = divmod(step, 8 // bits)
        byte = unit[at + 64 * chunk + 4 * row + k % 4]
        code |= (byte >> bits * field & 2**bits - 1) << shift
        at, shift = at + 64 * bits, shift + bits
    return code


def float8(byte: int) -> float:
    """What a sub-scale of nvfp4 stands for."""
    exponent, mantissa = byte >> 3, byte & 7
    return mantissa * 2.0**-9 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)


def float4(code: int) -> float:
    """What a code of mxfp4 and nvfp4 stands for."""
    return -FP4[code & 7] if code & 8 else FP4[code]


def weight(fmt: str, unit: bytes, row: int, k: int) -> float:
    """Input ``k`` of a unit's row, in float64."""
    planes, groups, subs, numbers = LAYOUTS[fmt]
    group, at = k // 32, 64 * sum(planes) * groups
    code = _code(unit, planes, group, row, k % 32)
    sub = [unit[at + 16 * (subs * group + i) + row] for i in range(subs)]
    at += 16 * subs * groups
    scales = []
    for size in numbers:
        raw = unit[at + size * row : at + size * (row + 1)]
        at += 16 * size
        kind = {1: np.uint8, 2: np.float16, 4: np.float32}[size]
        scales.append(float(np.frombuffer(raw, kind)[0]))
    half = k % 32 // 16
    signed = [(byte ^ 128) - 128 for byte in sub]
    match fmt:
        case "q8_0":
            return scales[0] * ((code ^ 128) - 128)
        case "q4_0" | "q5_0":
            return scales[0] * (code - ZERO[fmt])
        case "q4_1" | "q5_1":
            return scales[0] * code + scales[1]
        case "q4_k" | "q5_k":
            return scales[0] * sub[0] * code - scales[1] * sub[1]
        case "q2_k":
            return scales[0] * (sub[half] & 15) * code - scales[1] * (sub[half] >> 4)
        case "q3_k" | "q6_k":
            return scales[0] * signed[half] * (code - ZERO[fmt])
        case "iq4_nl":
            return scales[0] * IQ4[code]
        case "iq4_xs":
            return scales[0] * signed[0] * IQ4[code]
        case "mxfp4":
            return 2.0 ** (scales[0] - 127) * float4(code)
        case "nvfp4":
            return scales[0] * float8(sub[half]) * float4(code)
        case "int4_32" | "int4_64" | "int4_128" | "int4_256":
            own = len(scales) // 2 * k // 256
            return scales[own] * (code - scales[len(scales) // 2 + own])
        case "nf4":
            return scales[k // 64] * NF4[code]
    raise AssertionError(fmt)
