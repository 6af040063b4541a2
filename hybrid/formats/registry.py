"""The weight formats there are; a new one is a file of its own and a line here."""

from __future__ import annotations

import math

from hybrid.formats import (
    bf16,
    f32,
    int4_32,
    int4_64,
    int4_128,
    int4_256,
    iq4_nl,
    iq4_xs,
    mxfp4,
    nf4,
    nvfp4,
    q2_k,
    q3_k,
    q4_0,
    q4_1,
    q4_k,
    q5_0,
    q5_1,
    q5_k,
    q6_k,
    q8_0,
)
from hybrid.formats.errors import FormatError
from hybrid.formats.strips import Format

#: Formats by name, in the order in which they are offered.
FORMATS: dict[str, Format] = {}


def register(new: Format) -> Format:
    """Make a format known; comes before its first use.

    Raises
    ------
    FormatError
        When its name is taken.
    """
    if new.name in FORMATS:
        raise FormatError(f"there is a weight format {new.name!r} already")
    FORMATS[new.name] = new
    return new


for _module in (
    q4_0, q4_1, q5_0, q5_1, q8_0, q2_k, q3_k, q4_k, q5_k, q6_k, iq4_nl, iq4_xs, mxfp4, nvfp4,
    int4_32, int4_64, int4_128, int4_256, nf4, bf16, f32,
):  # fmt: skip
    register(_module.FORMAT)


def format_of(name: str) -> Format:
    """Return the format of this name.

    Raises
    ------
    FormatError
        Naming the known ones.
    """
    if name not in FORMATS:
        raise FormatError(
            f"unknown weight format {name!r}", hint=f"choose one of: {', '.join(FORMATS)}"
        )
    return FORMATS[name]


def is_quantized(name: str) -> bool:
    """Whether the format has groups and scales."""
    return format_of(name).quantized


def packs_dense(name: str | None) -> bool:
    """Whether weights outside the experts, asked for in this format, are kept packed.

    Else they are ordinary tensors: of the format's dtype, or as the checkpoint has them for None.
    """
    return name is not None and not format_of(name).tensor


def quantized_formats() -> list[str]:
    """Return the quantized formats, those of most bits first."""
    return _by_bits([known for known in FORMATS.values() if known.quantized])


def advised_formats() -> list[str]:
    """Return what plans propose where weights take too much, those of most bits first."""
    return _by_bits([known for known in FORMATS.values() if known.advised])


def dense_formats() -> list[str]:
    """Return what weights outside the experts can be asked for in, formats of most bits first."""
    return _by_bits([known for known in FORMATS.values() if known.dense])


def _by_bits(formats: list[Format]) -> list[str]:
    return [one.name for one in sorted(formats, key=lambda one: -one.bits_per_weight)]


def bits_per_weight(name: str) -> float:
    """Bits that a weight of the format takes, its share of a scale included.

    Of two formats, ``UP+DOWN``, those of an expert whose gate and up have the one and down the
    other (:attr:`hybrid.formats.block.Block.format_name`).
    """
    up, _, down = name.partition("+")
    bits = format_of(up).bits_per_weight
    return (2 * bits + format_of(down).bits_per_weight) / 3 if down else bits


def is_format(name: str) -> bool:
    """Whether experts may have this format: a known one, or two of them as ``UP+DOWN``."""
    up, plus, down = name.partition("+")
    return up in FORMATS and (down in FORMATS if plus else True)


def weight_bytes(params: float, name: str) -> int:
    """Bytes of ``params`` weights in a format."""
    return math.ceil(params * bits_per_weight(name) / 8)
