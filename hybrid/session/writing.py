"""A text that is about to be written: its prompt, its options, and what watches it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hybrid.session.generation_stream import GenerationStream


@dataclass(frozen=True, eq=False)
class Writing:
    """A call of :meth:`HybridModel.write` before anything of it is computed.

    Attributes
    ----------
    ids
        The prompt, ``[1, T]``.
    stream
        Makes text of the tokens that come, and knows when it ends.
    settings
        What stands in the place of the model's own settings.
    options
        Of ``generate``, settled.
    """

    ids: Tensor
    stream: GenerationStream
    settings: Any
    options: dict[str, Any]
