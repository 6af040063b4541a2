"""q4_k: 4-bit codes under scales and minima of 32 inputs, the numbers of GGUF's format."""

from __future__ import annotations

from hybrid.formats.affine_super import affine_super

FORMAT = affine_super("q4_k", 4)
