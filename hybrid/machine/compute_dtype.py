"""What dense layers that are not quantized compute in unless something else is asked for.

Loads neither torch nor transformers.
"""

from __future__ import annotations

from hybrid.machine import host
from planner.describe.model import ModelSpec

#: Dense weights up to which a model is small: float32 costs it next to nothing, and it writes the
#: same text on every processor.
SMALL = 1 << 24


def automatic_dtype(model: ModelSpec | None) -> str:
    """Return ``"float32"`` or ``"bfloat16"``, whichever suits a model on this processor's CPU.

    bfloat16 where the processor multiplies it natively and the model is not small, float32
    elsewhere: there torch's bfloat16 products were measured 3 to 10 times slower on prompts and
    no faster on single tokens. ``None`` is a model that nobody could count the weights of.
    """
    small = model is not None and model.dense_params <= SMALL
    return "bfloat16" if host.has_native_bf16() and not small else "float32"
