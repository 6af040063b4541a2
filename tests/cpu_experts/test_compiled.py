"""How kernels are compiled: what shares a file, what a bad disk does, what is done only once."""

from __future__ import annotations

import importlib.util
import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numba.core.codegen import CPUCodeLibrary

from cpu_experts.jit import compiled
from hybrid.formats import q4_0, registry

SOURCE = """
from numba import prange

def zero_and_add(a, threads):
    a[:] = 0
    for w in prange(threads):
        a[w] += 1

def twice(x):
    return x + x

def checked(x):
    if x < 0:
        raise ValueError("negative", x)
    return x

def twice_checked(x):
    return checked(x) + checked(x)

def add_in_parallel(a, threads):
    for w in prange(threads):
        a[w] += twice_checked(a[w])
"""


@pytest.fixture
def fresh(tmp_path: Path) -> Callable[[str], Any]:
    """Functions of a module that no process has compiled before, as new objects every time."""
    file = tmp_path / "fresh.py"
    file.write_text(SOURCE)

    def load(name: str) -> Any:
        spec = importlib.util.spec_from_file_location("fresh", file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return getattr(module, name)

    return load


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is said once in a process was not said yet."""
    monkeypatch.setattr(compiled, "_warned", set())


def _files(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_ino for path in folder.rglob("*.nb[ci]")}


def test_what_is_compiled_differently_shares_no_file(
    fresh: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processes of another level or version neither read nor replace this one's files."""
    monkeypatch.setattr(compiled, "_salt", lambda: "one")
    assert compiled.kernel()(fresh("twice"))(2) == 4
    before = _files(tmp_path)
    assert len(before) == 2
    monkeypatch.setattr(compiled, "_salt", lambda: "two")
    assert compiled.kernel()(fresh("twice"))(2) == 4
    after = _files(tmp_path)
    assert before.items() < after.items()
    assert len(after) == 4


@pytest.mark.parametrize(
    ("folder", "file"), [(0, "ffn.py"), (0, "kernels/experts.py"), (1, "q4_0.py")]
)
def test_edited_sources_share_no_file_with_what_they_were(
    folder: int, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this package, in a folder of it, and among the formats, whose sizes are constants."""
    copies = tuple(tmp_path / source.name for source in compiled._SOURCES)
    for source, copy in zip(compiled._SOURCES, copies, strict=True):
        shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(compiled, "_SOURCES", copies)
    salt = compiled._salt.__wrapped__
    before = salt()
    assert salt() == before
    with (copies[folder] / file).open("a") as source_file:
        source_file.write("_ADDED = 1\n")
    assert salt() != before


def test_a_registered_format_shares_no_file_with_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are compiled for all formats that are known: with another one they are others."""
    salt = compiled._salt.__wrapped__
    before = salt()
    monkeypatch.setitem(registry.FORMATS, "more", replace(q4_0.FORMAT, name="more"))
    assert salt() != before


def test_a_second_start_compiles_nothing(fresh: Callable[[str], Any]) -> None:
    """What one object compiled, another of the same source loads."""
    compiled.kernel()(fresh("twice"))(2)
    again = compiled.kernel()(fresh("twice"))
    assert again(2) == 4
    assert sum(again.stats.cache_hits.values()) == 1


@pytest.mark.parametrize("suffix", ["nbc", "nbi"])
def test_a_damaged_file_is_made_anew(
    fresh: Callable[[str], Any], tmp_path: Path, caplog: pytest.LogCaptureFixture, suffix: str
) -> None:
    """Files that a crash cut short cost a compilation each and one warning, once."""
    compiled.kernel()(fresh("twice"))(2)
    compiled.kernel()(fresh("checked"))(2)
    for path in tmp_path.rglob(f"*.{suffix}"):
        path.write_bytes(path.read_bytes()[:9])
    with caplog.at_level(logging.WARNING, "cpu_experts"):
        assert compiled.kernel()(fresh("twice"))(2) == 4
        assert compiled.kernel()(fresh("checked"))(2) == 2
    assert caplog.text.count("damaged") == len(caplog.records) == 1
    healed = compiled.kernel()(fresh("twice"))
    assert healed(2) == 4
    assert sum(healed.stats.cache_hits.values()) == 1


def test_without_a_folder_for_them_kernels_are_compiled_and_not_kept(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """numba has nowhere to cache functions that have no file: one warning of all, no error."""
    names: dict[str, Any] = {}
    exec(SOURCE, names)
    with caplog.at_level(logging.WARNING, "cpu_experts"):
        assert compiled.kernel()(names["twice"])(2) == 4
        assert compiled.kernel()(names["checked"])(2) == 2
    assert caplog.text.count("not kept") == len(caplog.records) == 1
    assert "NUMBA_CACHE_DIR" in caplog.text


def test_a_full_disk_is_no_error(
    fresh: Callable[[str], Any], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the code cannot be written the call still gives its result, and says why."""

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("numba.core.caching.IndexDataCacheFile.save", full)
    with caplog.at_level(logging.WARNING, "cpu_experts"):
        assert compiled.kernel()(fresh("twice"))(2) == 4
    assert "No space left on device" in caplog.text


def test_only_prange_makes_a_region(fresh: Callable[[str], Any]) -> None:
    """Setting an array to zero costs no fork and join of its own, in no specialisation."""
    function = compiled.kernel(parallel=True)(fresh("zero_and_add"))
    for kind in (np.float64, np.float32):
        a = np.ones(3, kind)
        function(a, 2)
        assert list(a) == [1, 1, 0]
    for signature in function.signatures:
        found = function.get_metadata(signature)["parfor_diagnostics"]
        assert len(found.initial_parfors) == 1


@pytest.fixture
def nested(fresh: Callable[[str], Any]) -> Callable[[], tuple[Any, Any, Any]]:
    """Kernels that call each other: the innermost, the middle one and the one with a region."""

    def load() -> tuple[Any, Any, Any]:
        inner, middle, outer = fresh("checked"), fresh("twice_checked"), fresh("add_in_parallel")
        inner = compiled.kernel()(inner)
        middle.__globals__["checked"] = inner
        middle = compiled.kernel()(middle)
        outer.__globals__["twice_checked"] = middle
        return inner, middle, compiled.kernel(parallel=True)(outer)

    return load


def test_what_kernels_call_is_compiled_once_as_a_part_of_them(
    nested: Callable[[], tuple[Any, Any, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither inner kernels nor what a parallel loop becomes are optimized or kept by themselves.

    A second start finds the whole in one file.
    """
    optimized: list[str] = []
    optimize = CPUCodeLibrary._optimize_final_module

    def count(library: Any) -> None:
        if library.name != "nrt":  # numba's own, once in a process
            optimized.append(library.name)
        optimize(library)

    monkeypatch.setattr(CPUCodeLibrary, "_optimize_final_module", count)
    for times in range(2):
        _, _, outer = nested()
        a = np.ones(3)
        outer(a, 2)
        assert list(a) == [3, 3, 1]
        assert optimized == ["add_in_parallel"]
        assert sum(outer.stats.cache_hits.values()) == times
    assert {name.split("-")[0] for name in _files(tmp_path)} == {"fresh.add_in_parallel"}


def test_a_kernel_is_called_from_kernels_and_from_python(
    nested: Callable[[], tuple[Any, Any, Any]],
) -> None:
    """In any order: the code that is linked is never what Python calls."""
    inner, middle, outer = nested()
    a = np.ones(3)
    outer(a, 1)
    assert (inner(3.0), middle(3.0)) == (3, 6)
    inner, middle, outer = nested()
    assert (inner(3.0), middle(3.0)) == (3, 6)
    outer(a, 1)
    assert list(a) == [9, 1, 1]


@pytest.mark.parametrize("start", ["first", "second"])
def test_an_inner_kernel_can_raise(nested: Callable[[], tuple[Any, Any, Any]], start: str) -> None:
    """With arguments of its own, which it reads from what numba keeps beside the code."""
    if start == "second":
        nested()[1](1.0)
    _, middle, _ = nested()
    with pytest.raises(ValueError, match="negative") as caught:
        middle(-2.5)
    assert caught.value.args == ("negative", -2.5)
