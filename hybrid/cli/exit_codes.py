"""Names the exit codes that shells and scripts tell apart."""

INTERRUPTED = 130
"""The exit code of a program that Ctrl-C ended, as shells count it."""
