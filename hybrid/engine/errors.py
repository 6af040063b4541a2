"""What ends one text before its time, and leaves the others alone."""

from __future__ import annotations

from hybrid.formats.errors import HybridError


class NotANumberError(HybridError):
    """A text's logits are no numbers."""

    def __init__(self, tokens: int) -> None:
        super().__init__(
            f"what the model computed after {tokens} tokens of this text is not a number (NaN)",
            hint="check the model's weights with --verify",
        )


class BeyondHalfError(HybridError):
    """A text's keys or values are too large for the cache."""

    def __init__(self, tokens: int) -> None:
        super().__init__(
            f"keys or values of the {tokens} tokens of this text are beyond half precision "
            "(65504), in which the cache of many texts holds them",
            hint="answer one text at a time, with --parallel 1",
        )


class TooLongError(HybridError):
    """A prompt does not fit into the memory of all texts."""

    def __init__(self, tokens: int, room: int) -> None:
        super().__init__(
            f"the prompt has {tokens} tokens and the cache of all texts holds {room}, which must "
            f"also hold the answer: shorten it to {room - 1} tokens or fewer",
            hint="give the cache more memory with --cache",
        )
