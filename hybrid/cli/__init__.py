"""The ``hybrid`` command: one file per command, one verb each."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["main"]


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; Ctrl-C ends it at any time, quietly."""
    try:
        from hybrid.cli.app import main as run

        return run(args)
    except KeyboardInterrupt:
        return 130
