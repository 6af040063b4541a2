"""Names the exit codes that shells and scripts tell apart."""

INTERRUPTED = 130
"""The exit code of a program that Ctrl-C ended, as shells count it."""

ERROR = 2
"""The exit code of an error that the user can act on."""
