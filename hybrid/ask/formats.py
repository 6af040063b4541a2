"""The weight formats that a model can be asked for in, and what they are called in its config.json.

Loads neither torch nor transformers.
"""

from __future__ import annotations

from cpu_experts.formats import FORMATS
from hybrid.errors import UsageError

QUANT_METHOD = "hybrid"
DEFAULT_EXPERTS = "q4_0"
#: Formats for dense weights; None keeps them as the checkpoint has them.
DENSE_FORMATS = ("bf16", "q8_0", "q4_0")


def check_formats(experts: str | None, dense: str | None) -> None:
    """Refuse unknown weight formats.

    Raises
    ------
    UsageError
        Naming the known ones.
    """
    if experts is not None and experts not in FORMATS:
        raise UsageError(
            f"unknown format for experts: {experts!r}", hint=f"choose one of: {', '.join(FORMATS)}"
        )
    if dense is not None and dense not in DENSE_FORMATS:
        raise UsageError(
            f"unknown format for dense weights: {dense!r}",
            hint=f"choose one of: {', '.join(DENSE_FORMATS)}, or leave it out",
        )
