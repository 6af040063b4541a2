"""The project's own rules: clean code, what loads when, what is shown and shipped."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ["hybrid", "planner", "cpu_experts", "gpu_experts"]


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize(
    "command",
    [
        ("-m", "ruff", "check", *PACKAGES, "tests", "configs"),
        ("-m", "ruff", "format", "--check", *PACKAGES, "tests", "configs"),
        ("-m", "mypy"),
        ("-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"),
    ],
    ids=["ruff check", "ruff format", "mypy strict", "import-linter"],
)
def test_static_checks(command: tuple[str, ...]) -> None:
    """Style, types and the independence of the engines hold in the whole tree."""
    done = _run(sys.executable, *command)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "code",
    [
        "import hybrid, planner, cpu_experts, gpu_experts",
        "from hybrid.cli import main; main(['--help'])",
        "from hybrid.cli import main; main(['env'])",
        "from hybrid.cli import main; main(['plan', 'OLMoE', '--hardware', 'rtx4060-laptop'])",
    ],
)
def test_light_commands_load_neither_torch_nor_numba(code: str) -> None:
    """What only asks or plans starts at once: the heavy libraries stay unloaded."""
    check = "import sys; print(sorted({'torch', 'numba', 'transformers'} & set(sys.modules)))"
    done = _run(sys.executable, "-c", f"{code}\n{check}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_public_names_resolve() -> None:
    """Everything that ``hybrid`` lists can be imported from it; anything else is an error."""
    import hybrid

    for name in hybrid.__all__:
        assert getattr(hybrid, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        hybrid.no_such_name  # noqa: B018


def test_specs_ship_with_the_package() -> None:
    """The model, hardware and experiment files are found where the code looks for them."""
    from hybrid.ask.names import shipped_names

    for folder in ("models", "hardware", "experiments"):
        assert shipped_names(folder), folder


def test_every_file_ships() -> None:
    """What is no Python lies in a package and is named as its data: the wheel has it."""
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    shipped = {
        file
        for package, patterns in setup["package-data"].items()
        for pattern in patterns
        for file in (ROOT / package.replace(".", "/")).glob(pattern)
    }
    for package in ("hybrid", "planner", "cpu_experts", "gpu_experts"):
        for file in (ROOT / package).rglob("*"):
            made = "__pycache__" in file.parts
            if file.is_file() and not made and file.suffix not in (".py", ".md"):
                assert file in shipped, file


@pytest.mark.parametrize("installed", [False, True])
def test_specs_are_those_of_the_copy_that_runs(installed: bool, tmp_path: Path) -> None:
    """From a bare checkout and an installed copy alike, whatever else can be imported.

    An installed copy has the folder in the package; beside it may be another package's.
    """
    for name in ("hybrid", "planner", "cpu_experts", "configs"):
        inside = "hybrid/configs" if installed and name == "configs" else name
        shutil.copytree(
            ROOT / name, tmp_path / inside, ignore=shutil.ignore_patterns("__pycache__")
        )
    if installed:
        (tmp_path / "configs/models").mkdir(parents=True)
        (tmp_path / "configs/models/foreign.toml").touch()
    code = "from hybrid.ask import names; print(names.__file__, *names.shipped_names('models'))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    file, *found = done.stdout.split()
    assert file.startswith(str(tmp_path))
    assert found == sorted(path.stem for path in (ROOT / "configs/models").glob("*.toml"))


def test_readme_commands_exist() -> None:
    """Every ``hybrid`` command that the README shows is one that the program has."""
    from hybrid.cli.app import COMMANDS

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = set(re.findall(r"^(?:\$ )?(?:.*&& )?hybrid ([a-z]+)", text, flags=re.MULTILINE))
    assert shown
    assert shown <= set(COMMANDS)
