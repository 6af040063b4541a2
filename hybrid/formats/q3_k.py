"""q3_k: 3-bit codes under scales of 16 inputs, the numbers of GGUF's format of this name."""

from __future__ import annotations

import numpy as np

from hybrid.formats.gguf_bits import fields, half
from hybrid.formats.groups import GROUPS, Fields
from hybrid.formats.signed_super import signed_super
from hybrid.formats.strips import GROUP, U8


def _blocks(raw: U8) -> Fields:
    codes = fields(raw[..., 32:96], GROUP, 2) | fields(raw[..., :32], GROUP, 1) << np.uint8(2)
    low, high = fields(raw[..., 96:104], 8, 4), fields(raw[..., 104:108], 4, 2)
    subs = (low | high << np.uint8(4)) - np.uint8(32)
    shape = raw.shape[:2]
    return Fields(
        codes.reshape(*shape, GROUPS, GROUP), subs.reshape(*shape, GROUPS, 2), (half(raw, 108),)
    )


FORMAT = signed_super("q3_k", (2, 1), -32, blocks=_blocks, block_bytes=110)
