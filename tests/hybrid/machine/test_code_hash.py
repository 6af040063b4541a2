"""What a calibration is keyed by: the code of what was measured, whatever is said about it."""

from __future__ import annotations

from pathlib import Path

import pytest

from hybrid.machine import code_hash as hashing
from hybrid.machine.code_hash import code_hash, code_only
from source_rules import modules, without_prose

ROOT = Path(hashing.__file__).parents[2]
SOURCES = modules(ROOT, ["hybrid", "planner", "cpu_experts", "gpu_experts"]).values()

SOURCE = '''"""A module."""

# Of its own.
LIMIT = 1  # a number
"""What it limits."""
TEXT = "# kept"


def f(x: int) -> str:
    """Return a text.

    It says "what" and 'why' and # more.
    """
    return f"{x}" + '"""' + TEXT  # joined


class A:
    r"""A class\\s."""
'''


def squeezed(source: str) -> str:
    return "".join(source.split())


def test_every_source_is_reduced_to_its_code() -> None:
    """In all four packages, as Python's own tokenizer finds comments and docstrings."""
    for path in SOURCES:
        source = path.read_text(encoding="utf-8")
        assert squeezed(code_only(source)) == squeezed(without_prose(source)), path


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Two files of code, one of them in a folder of a folder."""
    (tmp_path / "package/inner").mkdir(parents=True)
    (tmp_path / "package/a.py").write_text(SOURCE)
    (tmp_path / "package/inner/b.py").write_text(SOURCE)
    return tmp_path


@pytest.mark.parametrize("file", ["package/a.py", "package/inner/b.py"])
@pytest.mark.parametrize("places", [["package"], ["package/a.py", "package/inner"]])
@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("A module.", "Another module\n\nwith more to say.", True),
        ("# Of its own.\n", "", True),
        ("a number", 'a "number"', True),
        ("What it limits.", "What 'it' limits.", True),
        ("Return a text.", "Return text.", True),
        ("# joined", "", True),
        ("A class", "The class", True),
        ("\n\n\n", "\n\n  \n\n", True),
        ("LIMIT = 1", "LIMIT = 2", False),
        ("# kept", "# Kept", False),
        ('"{x}"', '"{x!r}"', False),
        ("    return", "        return", False),
        ("f(x", "g(x", False),
    ],
)
def test_only_code_changes_the_hash(
    tree: Path, file: str, places: list[str], old: str, new: str, same: bool
) -> None:
    """Comments, docstrings and empty lines may change; not a letter of code, wherever it lies."""
    before = code_hash(tree, places)
    assert SOURCE.count(old)
    (tree / file).write_text(SOURCE.replace(old, new))
    assert (code_hash(tree, places) == before) == same


def test_a_file_that_comes_or_goes_changes_the_hash(tree: Path) -> None:
    """Whether it holds code or not."""
    before = code_hash(tree, ["package"])
    (tree / "package/inner/c.py").write_text("")
    more = code_hash(tree, ["package"])
    (tree / "package/inner/c.py").unlink()
    (tree / "package/inner/b.py").unlink()
    assert len({before, more, code_hash(tree, ["package"])}) == 3
