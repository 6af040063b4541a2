"""The shape of the project: rooms and floors, no circles, files of one sitting, tests apart."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest

from source_rules import circles, code_lines, import_graph, modules

ROOT = Path(__file__).parents[1]
PACKAGES = ["hybrid", "planner", "cpu_experts", "gpu_experts"]
SUPPORT = ROOT / "tests/support"
#: A file with more lines of code is split.
MOST_LINES = 400
#: What only measuring needs: each with the rooms that may import it.
APART = {
    "hybrid.bench": ("hybrid.bench", "hybrid.cli"),
    "hybrid.demo.corpus": ("hybrid.demo", "hybrid.bench"),
    "hybrid.demo.evaluate": ("hybrid.demo", "hybrid.bench"),
    "hybrid.demo.muon": ("hybrid.demo",),
    "hybrid.demo.train": ("hybrid.demo",),
}
TEST_IMPORT = re.compile(r"\b(?:from|import)\s+(test_\w+|conftest)\b")
BUILD = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    """Which module of the packages imports which."""
    return import_graph(modules(ROOT, PACKAGES))


@pytest.fixture(scope="module")
def settings() -> dict[str, Any]:
    """What ``pyproject.toml`` says."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def copied(folder: Path, *names: str) -> Path:
    """Copy these files and folders of the project, without what Python and tools left there."""
    left = shutil.ignore_patterns("__pycache__", "*.egg-info", "results")
    for name in names:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=left)
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run Python in ``folder``, whose packages are found first."""
    return subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env={"PYTHONPATH": str(folder), "PATH": ""},
        capture_output=True,
        text=True,
    )


def test_every_folder_is_a_package_that_ships(settings: dict[str, Any]) -> None:
    """The list in ``pyproject.toml`` is that of the folders with modules, and of the configs."""
    folders = {path.parent for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").is_file()] == []
    names = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    listed = settings["tool"]["setuptools"]["packages"]
    assert len(listed) == len(set(listed))
    assert set(listed) == names | {"hybrid.configs"}


def test_the_wheel_has_every_file(tmp_path: Path) -> None:
    """Modules, the demo's weights, the page's template and the configs: nothing is left behind."""
    source = copied(
        tmp_path, *PACKAGES, "configs", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md"
    )
    expected = {
        path.relative_to(source).as_posix()
        for package in PACKAGES
        for path in (source / package).rglob("*")
        if path.is_file() and path.suffix != ".md"
    }
    for pattern in (
        "__init__.py",
        "*.toml",
        "models/*.toml",
        "hardware/*.toml",
        "experiments/*.toml",
    ):
        files = source.glob(f"configs/{pattern}")
        expected |= {f"hybrid/{path.relative_to(source).as_posix()}" for path in files}
    done = run(source, "-c", BUILD, str(tmp_path))
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    found = {name for name in ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert found == expected


@pytest.mark.parametrize("package", PACKAGES)
def test_a_room_without_a_floor_is_refused(package: str, tmp_path: Path) -> None:
    """The contract names every room: a new one fails until it is told where it stands."""
    for path in modules(ROOT, PACKAGES).values():
        target = tmp_path / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    copied(tmp_path, "pyproject.toml")
    (tmp_path / package / "attic").mkdir()
    (tmp_path / package / "attic/__init__.py").touch()
    code = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    done = run(tmp_path, "-c", code, "--no-cache")
    assert done.returncode == 1, done.stderr
    assert f"{package}, from the top BROKEN" in done.stdout
    assert "attic" in done.stdout


def test_no_circles(graph: dict[str, set[str]]) -> None:
    """Files can be read in an order in which none needs a later one, imports for types included.

    In ``gpu_experts`` a device says what kind it is and a kind opens devices.
    """
    free = {name: targets for name, targets in graph.items() if not _is_in(name, "gpu_experts")}
    assert circles({name: targets & free.keys() for name, targets in free.items()}) == []


def test_measuring_is_not_part_of_the_program(graph: dict[str, set[str]]) -> None:
    """Only the command line reaches the benchmarks, and only they what trained the demo."""
    wrong = [
        (name, target)
        for name, targets in graph.items()
        for target in sorted(targets)
        for part, allowed in APART.items()
        if _is_in(target, part) and not any(_is_in(name, room) for room in allowed)
    ]
    assert wrong == []


def _is_in(name: str, part: str) -> bool:
    return f"{name}.".startswith(f"{part}.")


@pytest.mark.parametrize("folder", [*PACKAGES, "tests"])
def test_files_can_be_read_in_one_sitting(folder: str) -> None:
    """No file has more code than that; what explains it is not counted."""
    long = {
        str(path.relative_to(ROOT)): count
        for path in (ROOT / folder).rglob("*.py")
        if (count := code_lines(path.read_text(encoding="utf-8"))) > MOST_LINES
    }
    assert long == {}


def test_no_test_file_imports_another(settings: dict[str, Any]) -> None:
    """What tests share lies in ``tests/support`` or a ``conftest.py``; programs in them, too."""
    assert settings["tool"]["pytest"]["ini_options"]["pythonpath"] == ["tests/support"]
    found = {
        str(path.relative_to(ROOT)): TEST_IMPORT.findall(path.read_text(encoding="utf-8"))
        for path in (ROOT / "tests").rglob("*.py")
    }
    assert {path: names for path, names in found.items() if names} == {}
    text = "    from {0} import layer\nimport {0}, os\nfrom tests import {0}"
    assert TEST_IMPORT.findall(text.format("test_ffn")) == ["test_ffn"] * 3


def test_helpers_have_names_of_their_own() -> None:
    """None is called like a package or a room, or like a module that Python brings."""
    rooms = {part for name in modules(ROOT, PACKAGES) for part in name.split(".")[:2]}
    helpers = {path.stem for path in SUPPORT.glob("*.py")}
    assert helpers & (rooms | set(sys.stdlib_module_names)) == set()


def test_the_map_is_of_this_project() -> None:
    """Every room is on it, in the table; every file and folder that it names is there."""
    text = (ROOT / "hybrid/README.md").read_text(encoding="utf-8")
    named = {name for name in re.findall(r"`([\w./]+)`", text) if "/" in name}
    assert {name for name in named if not (ROOT / name).exists()} == set()
    rooms = {
        path.parent.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).glob("*/__init__.py")
    }
    assert rooms - set(re.findall(r"^\| `([\w/]+)` \|", text, re.MULTILINE)) == set()


def test_circles_are_found(tmp_path: Path) -> None:
    """Over any number of files, in functions and for types; who only looks on is none of it."""
    package = tmp_path / "made"
    package.mkdir()
    for name, text in {
        "__init__": "",
        "a": "TYPE_CHECKING = False\nif TYPE_CHECKING:\n    from made.b import B\n",
        "b": "def f():\n    from made import c\n",
        "c": "import made.a\n",
        "d": "from made.a import x\n",
    }.items():
        (package / f"{name}.py").write_text(text)
    assert circles(import_graph(modules(tmp_path, ["made"]))) == [["made.a", "made.b", "made.c"]]


def test_only_code_is_counted() -> None:
    """Strings that stand alone, comments and empty lines are no code; other strings are."""
    source = '''"""A module
of two lines."""

# Alone.
a = """kept
over two lines"""  # Beside.


def f():
    """One line."""
    return "# kept"
'''
    assert code_lines(source) == 4
