"""The weight formats that a model can be asked for in, and what they are called in its config.json.

Loads neither torch nor transformers.
"""

from __future__ import annotations

from hybrid.errors import UsageError
from hybrid.formats.registry import FORMATS, dense_formats

QUANT_METHOD = "hybrid"
DEFAULT_EXPERTS = "q4_0"


def check_formats(experts: str | None, dense: str | None) -> None:
    """Refuse unknown weight formats; None for dense weights keeps them as the checkpoint has them.

    Raises
    ------
    UsageError
        Naming the known ones.
    """
    if experts is not None and experts not in FORMATS:
        raise UsageError(
            f"unknown format for experts: {experts!r}", hint=f"choose one of: {', '.join(FORMATS)}"
        )
    if dense is not None and dense not in dense_formats():
        raise UsageError(
            f"unknown format for dense weights: {dense!r}",
            hint=f"choose one of: {', '.join(dense_formats())}, or leave it out",
        )
