"""Decides whether a model's texts are written together, and in how much memory."""

from __future__ import annotations

from cpu_experts.decoder.pages import PAGE, page_bytes
from hybrid.engine.together import Together
from hybrid.errors import UsageError
from hybrid.grafts import fast_path_of
from hybrid.machine.host import available_memory_bytes
from hybrid.session.model import HybridModel
from planner.describe.words import in_words


def open_together(
    model: HybridModel, parallel: int, cache_bytes: int | None, context: int
) -> tuple[Together | None, str]:
    """Return what writes up to ``parallel`` texts at once, and how it does in words.

    Parameters
    ----------
    model
        The model.
    parallel
        Texts at once; with 1 they are written one after the other.
    cache_bytes
        Memory for all of their keys and values; unless given, for as many texts of ``context``
        tokens and for one as long as the model takes, in half of the memory that is free beside the
        experts, and for one of ``context`` tokens at least.
    context
        Tokens that a text is to have room for.

    Returns
    -------
    None, and why, where texts are written one after the other.

    Raises
    ------
    UsageError
        When ``cache_bytes`` hold no text.
    """
    path = fast_path_of(model.model)
    decoder = None if path is None or model.placement is not None else path.decoder
    if parallel > 1 and decoder is not None:
        page = page_bytes([layer.stored[:2] for layer in decoder.decoder.layers])
        if cache_bytes is None:
            free = max(0, available_memory_bytes() - model.loaded.store.index.nbytes) // 2
            tokens = max(parallel * context, model.context or 0)
            cache_bytes = min(_bytes_of(tokens, page), max(free, _bytes_of(context, page)))
        if cache_bytes < 2 * page:
            raise UsageError(
                f"--cache {in_words(cache_bytes)} holds less than {PAGE} tokens of a text and of "
                f"what comes next, which take {in_words(2 * page)}",
                hint="give it more, or leave it out",
            )
        together = Together(model, parallel, cache_bytes)
        if together.refused is None:
            told = f"{together.room} tokens of cache in {in_words(cache_bytes)}"
            return together, f"up to {parallel} answers at once, {told}"
        return None, f"one answer after the other: {together.refused}"
    if parallel == 1:
        return None, "one answer after the other, as --parallel 1 asks"
    if model.placement is not None:
        return None, f"one answer after the other: the model lies on {model.placement.device}"
    return None, f"one answer after the other: {'' if path is None else path.path.reason}"


def _bytes_of(tokens: int, page: int) -> int:
    """Return the memory of so many tokens, in pages of so many bytes, with one to spare."""
    return (-(-tokens // PAGE) + 1) * page
