"""Threading layers: what numba can be asked for and lacks is one error, before a thread starts."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import import_module
from typing import Any

import pytest

from cpu_experts.errors import BackendError
from cpu_experts.jit import threading_layer


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A way to say which of numba's modules cannot be imported; the others can."""

    def lack(*names: str) -> None:
        def load(module: str) -> None:
            if module.rpartition(".")[2] in {f"{name}pool" for name in names}:
                raise ImportError(module)

        monkeypatch.setattr(threading_layer, "import_module", load)

    return lack


def test_layers_that_are_there_are_taken(without: Any) -> None:
    """As numba takes them: by name in any case, or by what they are safe for."""
    without("tbb")
    for asked in ("default", "workqueue", "forksafe", "omp", "OMP", "threadsafe"):
        threading_layer.check_threading_layer(asked)
    without("omp")
    for asked in ("tbb", "safe", "threadsafe"):
        threading_layer.check_threading_layer(asked)


@pytest.mark.parametrize(
    ("missing", "asked", "found", "remedy"),
    [
        (["tbb"], "tbb", "omp, workqueue", "install TBB"),
        (["tbb"], "safe", "omp, workqueue", "install TBB"),
        (["omp"], "omp", "tbb, workqueue", "install OpenMP"),
        (["tbb", "omp"], "threadsafe", "workqueue", " or OpenMP"),
        ([], "openmp", "tbb, omp, workqueue", "unset NUMBA_THREADING_LAYER"),
    ],
)
def test_a_layer_that_is_not_there(
    without: Any, missing: list[str], asked: str, found: str, remedy: str
) -> None:
    """Named with its variable, what there is instead, and what helps."""
    without(*missing)
    with pytest.raises(BackendError) as caught:
        threading_layer.check_threading_layer(asked)
    assert caught.value.message == f"NUMBA_THREADING_LAYER is {asked!r}, numba finds {found} here"
    assert remedy in str(caught.value.hint)


def test_the_modules_are_numbas() -> None:
    """They are looked for where numba has them: what it finds itself is found."""
    for name in threading_layer._installed():
        assert import_module(f"numba.np.ufunc.{name}pool").launch_threads


def test_a_run_says_which_variable_is_wrong() -> None:
    """Exit code 2, one error and one hint on stderr, no traceback."""
    done = subprocess.run(
        [sys.executable, "-m", "hybrid", "run", "-p", "x", "-n", "1"],
        env=os.environ | {"NUMBA_THREADING_LAYER": "none-such"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    error, hint = done.stderr.splitlines()
    assert error.startswith("error: NUMBA_THREADING_LAYER is 'none-such', numba finds ")
    assert hint.startswith("hint: unset NUMBA_THREADING_LAYER or choose")
