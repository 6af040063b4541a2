"""What dense layers that are not quantized may be asked to compute in.

Loads neither torch nor transformers.
"""

from __future__ import annotations

from hybrid.errors import UsageError

DTYPES = ("auto", "float32", "bfloat16")


def check_dtype(name: str) -> str:
    """Return ``name``; refuse what is no type to compute in.

    Raises
    ------
    UsageError
        Naming the known ones.
    """
    if name not in DTYPES:
        raise UsageError(
            f"unknown dtype to compute in: {name!r}", hint=f"choose one of: {', '.join(DTYPES)}"
        )
    return name
