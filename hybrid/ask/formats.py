"""The weight formats that a model can be asked for in, and what they are called in its config.json.

Loads neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Iterable

from hybrid.errors import UsageError
from hybrid.formats.registry import FORMATS, dense_formats, is_format

QUANT_METHOD = "hybrid"
DEFAULT_EXPERTS = "q4_0"


def in_words(names: Iterable[str]) -> str:
    """List formats in a sentence: "q4_0, q8_0 or bf16"."""
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last


def check_formats(experts: str | None, dense: str | None) -> None:
    """Refuse unknown weight formats; None for dense weights keeps them as the checkpoint has them.

    Raises
    ------
    UsageError
        Naming the known ones.
    """
    if experts is not None and not is_format(experts):
        raise UsageError(
            f"unknown format for experts: {experts!r}",
            hint=f"choose one of: {', '.join(FORMATS)}, or two as UP+DOWN",
        )
    if dense is not None and dense not in dense_formats():
        raise UsageError(
            f"unknown format for dense weights: {dense!r}",
            hint=f"choose one of: {', '.join(dense_formats())}, or leave it out",
        )
