"""Reads the demo model's training text: the running interpreter's standard library sources.

Every Python installation has it, so neither the training script nor the tests download anything.
The split into training and held-out files is a function of a file's relative path alone: the same
path is on the same side on every machine and for every Python version, and a held-out file is
never read while training.
"""

import hashlib
import sysconfig
from pathlib import Path

# Directories left out wherever they appear: installed packages, and code that is mostly tables,
# test inputs or somebody else's text.
_SKIPPED_DIRECTORIES = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
)
# Build settings of one machine (``_sysconfigdata_*.py``, ``config-3.x-*/``), not library source.
_SKIPPED_PREFIXES = ("_sysconfigdata", "config-")
_HELD_OUT_ONE_IN = 20


def is_held_out(relative_path: str) -> bool:
    """Whether the file at this POSIX path below the standard library is kept from training."""
    digest = hashlib.sha256(relative_path.encode()).digest()
    return int.from_bytes(digest[:8], "big") % _HELD_OUT_ONE_IN == 0


def stdlib_files(*, held_out: bool, root: Path | None = None) -> dict[str, str]:
    """Read one side of the split.

    Parameters
    ----------
    held_out
        Which side: the held-out files, or the files to train on.
    root
        Where to look; the running interpreter's standard library when None.

    Returns
    -------
    dict of str to str
        Relative POSIX path to text, sorted by path. Files that are empty or not valid UTF-8 are
        left out.
    """
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    texts = {}
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        if _SKIPPED_DIRECTORIES.intersection(relative.parts):
            continue
        if any(part.startswith(_SKIPPED_PREFIXES) for part in relative.parts):
            continue
        if is_held_out(relative.as_posix()) != held_out:
            continue
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            texts[relative.as_posix()] = text.replace("\r\n", "\n")
    return dict(sorted(texts.items()))
