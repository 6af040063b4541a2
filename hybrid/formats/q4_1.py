"""q4_1: 4-bit codes of 32 inputs, a float16 scale and lowest value, as GGUF has them."""

from __future__ import annotations

from hybrid.formats.affine import affine_format

FORMAT = affine_format("q4_1", 4)
