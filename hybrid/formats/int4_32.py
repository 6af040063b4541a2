"""int4_32: 4-bit codes, a float16 scale and a code of zero of 32 inputs."""

from __future__ import annotations

from hybrid.formats.int4 import int4_format

FORMAT = int4_format("int4_32", 32)
