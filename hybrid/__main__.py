"""``python -m hybrid`` is the ``hybrid`` command."""

import sys

from hybrid.cli import command

sys.exit(command())
