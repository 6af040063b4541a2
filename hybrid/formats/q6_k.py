"""q6_k: 6-bit codes under scales of 16 inputs, the numbers of GGUF's format of this name."""

from __future__ import annotations

import numpy as np

from hybrid.formats.gguf_bits import fields, half
from hybrid.formats.groups import GROUPS, Fields
from hybrid.formats.signed_super import signed_super
from hybrid.formats.strips import GROUP, U8


def _blocks(raw: U8) -> Fields:
    codes = fields(raw[..., :128], 64, 4) | fields(raw[..., 128:192], GROUP, 2) << np.uint8(4)
    shape = raw.shape[:2]
    subs = raw[..., 192:208].reshape(*shape, GROUPS, 2)
    return Fields(codes.reshape(*shape, GROUPS, GROUP), subs, (half(raw, 208),))


FORMAT = signed_super("q6_k", (4, 2), -128, blocks=_blocks, block_bytes=210)
