"""The ``hybrid`` command: one file per command, one verb each."""

from hybrid.cli.app import main

__all__ = ["main"]
