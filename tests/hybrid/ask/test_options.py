"""What a user asks for is understood once, whichever way it comes in."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import hybrid
from hybrid.ask import asked_model
from hybrid.ask.asked_model import find_model
from hybrid.ask.options import Options
from hybrid.cli import main
from hybrid.cli import plan as plan_command
from hybrid.errors import UsageError
from hybrid.formats.errors import HybridError
from hybrid.planning import plan as planning
from hybrid.session.model import HybridModel
from planner.errors import SpecError
from planner_examples import save_config

GIB = 2**30
WISHES: dict[str, Any] = {
    "vram": "4GiB",
    "ram": "1.5 GiB",
    "context": 64,
    "threads": 1,
    "experts": "q8_0",
    "dense": "bf16",
}
FLAGS = [word for name, value in WISHES.items() for word in (f"--{name}", str(value))]


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> list[Options]:
    """Collects the options of every session and plan, none of which goes any further."""
    found: list[Options] = []

    def take(*given: Any, **_: Any) -> None:
        options = next(value for value in given if isinstance(value, Options))
        found.append(options)
        raise UsageError("that was understood", hint="look")

    monkeypatch.setattr(HybridModel, "open", take)
    monkeypatch.setattr(planning, "machine_for", take)
    monkeypatch.setattr(plan_command, "machine_for", take)
    return found


def test_every_way_in_understands_the_same(heard: list[Options]) -> None:
    """run, chat and plan, and their Python twins, make equal options of the same wishes."""
    assert main(["run", "-p", "a", *FLAGS]) == 2
    assert main(["chat", *FLAGS]) == 2
    assert main(["plan", "demo", *FLAGS]) == 2
    with pytest.raises(UsageError, match="that was understood"):
        HybridModel.from_pretrained(**WISHES)
    with pytest.raises(UsageError, match="that was understood"):
        hybrid.plan("demo", **{**WISHES, "vram": 4 * GIB})
    assert len(heard) == 5
    assert set(heard) == {
        Options(
            vram_bytes=4 * GIB,
            ram_bytes=GIB * 3 // 2,
            context=64,
            threads=1,
            experts="q8_0",
            dense="bf16",
        )
    }


def test_nothing_asked_for_is_whatever_there_is(heard: list[Options]) -> None:
    """Every way in has the same defaults."""
    for words in (["run", "-p", "a"], ["chat"], ["plan", "demo"]):
        assert main(words) == 2
        assert main([*words, "--vram", "auto", "--ram", "AUTO"]) == 2
    for call in (HybridModel.from_pretrained, lambda: hybrid.plan("demo")):
        with pytest.raises(UsageError, match="that was understood"):
            call()
    assert heard == [Options()] * 8


def test_what_only_a_session_is_asked(heard: list[Options], tmp_path: Path) -> None:
    """A dtype, a device, checks and files mean the same on the command line and in Python."""
    uses = tmp_path / "uses.json"
    uses.write_text("{}")
    words = ["--device", "emulated", "--dtype", "float32", "--verify"]
    files = ["--popularity", str(uses), "--routing", str(tmp_path / "r.npz")]
    assert main(["run", "-p", "a", *words, *files, "--perfetto", str(tmp_path / "p.json")]) == 2
    with pytest.raises(UsageError, match="that was understood"):
        HybridModel.from_pretrained(
            device="emulated",
            dtype=torch.float32,
            verify=True,
            popularity=str(uses),
            keep_timeline=True,
            record_routing=True,
        )
    first, second = heard
    assert first == second
    assert (first.device, first.dtype, first.popularity) == ("emulated", "float32", uses)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"device": "cpu", "vram": "4GiB"}, "vram '4GiB' is asked for with device 'cpu'"),
        ({"device": 0, "vram": "0GiB"}, "device 'cuda:0' is asked for with vram '0GiB'"),
        ({"device": True}, "device is True, neither"),
        ({"vram": "six"}, "^vram 'six' is not a size"),
        ({"ram": "six", "prefix": "--"}, "^--ram 'six' is not a size"),
        ({"context": 0}, "context is 0"),
        ({"dtype": "float17"}, "unknown dtype to compute in: 'float17'"),
        ({"dtype": 3}, "unknown dtype to compute in: 3"),
        ({"policy": "belady"}, "unknown cache policy: 'belady'"),
    ],
)
def test_what_cannot_be_is_refused(given: dict[str, Any], said: str) -> None:
    """Each with a hint, in the words that it was given in."""
    with pytest.raises((UsageError, SpecError), match=said) as caught:
        Options.of(**given)
    assert caught.value.hint


def test_what_torch_calls_things_has_names() -> None:
    """Devices and dtypes of torch are what their names are; "auto" is nothing in particular."""
    assert Options.of(device=torch.device("cuda", 1)) == Options.of(device=1)
    assert Options.of(device=1).device == "cuda:1"
    assert Options.of(dtype=torch.float16).dtype == "float16"
    assert Options.of(dtype="auto") == Options()


def callers(name: str) -> set[str]:
    """The files of the package that call a function."""
    root = Path(hybrid.__file__).parent
    return {
        path.relative_to(root).as_posix()
        for path in root.rglob("*.py")
        if re.search(rf"(?<!def )\b{name}\(", path.read_text("utf-8"))
    }


def test_what_users_write_is_understood_in_one_place() -> None:
    """Sizes and names of models are parsed by one file each, so that no two can differ."""
    assert callers("size_in_bytes") == {"ask/options.py"}
    sizes_of_no_model = {"cli/serve.py", "weights/copies.py"}
    assert callers("parse_bytes") == {"ask/sizes.py", *sizes_of_no_model}
    assert callers("from_hf_config") == {"ask/asked_model.py"}


def test_a_plan_reads_the_models_settings_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the command line and in Python, whatever asks for the model afterwards."""
    folder = save_config(tmp_path / "small-moe")
    read: list[Path] = []
    whole = asked_model.read_table
    monkeypatch.setattr(
        asked_model, "read_table", lambda path, *what: (read.append(path), whole(path, *what))[1]
    )
    assert main(["plan", str(folder), "-H", "rtx4060-laptop", "--tokens", "1"]) == 0
    assert read == [folder / "config.json"]
    hybrid.plan(folder, "rtx4060-laptop", tokens=1)
    assert read == [folder / "config.json"] * 2


def test_a_model_is_found_however_it_is_named(tmp_path: Path) -> None:
    """By its directory, its config.json, a shipped name or a description, with its formats."""
    folder = save_config(tmp_path / "small-moe")
    there = find_model(folder)
    assert (there.spec.name, there.directory) == ("small-moe", folder)
    file = find_model(folder / "config.json")
    assert (file.spec, file.directory) == (there.spec, None)
    assert find_model(there.spec).spec is there.spec
    described = tmp_path / "mine.toml"
    lines = [f"{key} = {value!r}".lower() for key, value in there.config.items()]
    described.write_text("\n".join(["[config]", *lines]))
    assert find_model(described).spec.layers == there.spec.layers
    assert find_model("demo").in_formats("q8_0", None).experts == "q8_0"
    described.write_text("\n".join(["colour = 'red'", "[config]", *lines]))
    with pytest.raises(HybridError, match="unknown field 'colour'"):
        find_model(described)


@pytest.mark.parametrize("asked", [{"experts": "q5_x"}, {"dense": "int3"}])
def test_unknown_formats_are_refused_when_they_are_asked_for(asked):
    """Before anything is imported or loaded, with the known ones."""
    with pytest.raises(UsageError, match="unknown format") as caught:
        Options.of(**asked)
    assert "q8_0" in str(caught.value.hint)
