"""Reads text that a model was not trained on, for the benchmarks that need some."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from hybrid.demo.corpus import stdlib_files
from hybrid.demo.evaluate import windows
from hybrid.errors import UsageError


def held_out_windows(
    tokenizer: Any, texts: Sequence[str] | None, context: int, tokens: int
) -> Tensor:
    """Return token ids ``[N, context]``, at most ``tokens`` of them, spread over the texts.

    Parameters
    ----------
    texts
        Documents; when None, those sources of Python's standard library that the demo model was
        not trained on.

    Raises
    ------
    UsageError
        When the texts are shorter than one window.
    """
    documents = [*stdlib_files(held_out=True).values()] if texts is None else texts
    try:
        return windows(tokenizer, documents, context, tokens)
    except ValueError as error:
        raise UsageError(str(error), hint="give more text, or a smaller context") from error
