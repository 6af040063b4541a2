"""The ``hybrid`` command: one file per command, one verb each."""

from hybrid.cli.exit_codes import INTERRUPTED

__all__ = ["command", "main"]


def command() -> int:
    """Run the command line as a program of its own and return its exit code.

    Once the work is done, Ctrl-C ends the program where it stands: in what Python tears down on
    its way out nothing can be interrupted, it would only be shown. (Where whoever started it has
    it ignore Ctrl-C, it goes on ignoring it.)
    """
    try:
        import os
        import signal
        import sys

        # Python has no object for a stream that whoever started it has closed.
        for name in ("stdout", "stderr"):
            if getattr(sys, name) is None:
                setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        if sys.stdin is None:
            sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115
        code = main()
        if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        return code
    except KeyboardInterrupt:
        return INTERRUPTED


def main(args: "list[str] | None" = None) -> int:
    """Run the command line and return its exit code; Ctrl-C ends it at any time, quietly."""
    try:
        from hybrid.cli.app import main as run

        return run(args)
    except KeyboardInterrupt:
        return INTERRUPTED
