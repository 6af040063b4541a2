"""Models by their names on the hub, fetched by the real client from a hub on this machine."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from gguf_files import recipe, write_gguf
from hybrid import plan
from hybrid.ask.asked_model import find_model
from hybrid.ask.names import find_hardware
from hybrid.ask.options import Options
from hybrid.cli import main
from hybrid.cli.download import obtain
from hybrid.errors import CheckpointError, DiskSpaceError, HybridError
from hybrid.gguf.header import read_gguf
from hybrid.hub.fetch import config_of, directory_of, download, manifest
from hybrid.hub.kept import kept_copy
from hybrid.hub.names import HubName, hub_name
from hybrid.hub.refusals import UnreachableError
from hybrid.loading import load_fast_model
from hybrid.machine.machines import Machine
from local_hub import COMMIT, Hub, serving

NAME = "maker/tiny-moe"
NEEDED = {
    *("config.json", "generation_config.json", "model.safetensors"),
    *("tokenizer.json", "tokenizer_config.json"),
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_model: Path) -> Iterator[Hub]:
    """A hub with one model, which also has what nobody needs."""
    with serving(monkeypatch, tmp_path / "hub") as served:
        served.publish(NAME, tiny_model)
        served.files[NAME] |= {
            "pytorch_model.bin": b"other weights",
            "tiny-Q4_K_M.gguf": b"other weights",
            "onnx/model.onnx": b"other weights",
            "README.md": b"words",
        }
        yield served


@pytest.mark.parametrize(
    ("text", "repo", "revision"),
    [
        ("maker/name-2.5_b", "maker/name-2.5_b", None),
        ("maker/name@v1.0", "maker/name", "v1.0"),
        ("https://huggingface.co/maker/name", "maker/name", None),
        ("https:/hf.co/maker/name/", "maker/name", None),  # as a path has it
        ("huggingface.co/maker/name/tree/refs/pr/3", "maker/name", "refs/pr/3"),
    ],
)
def test_names_and_addresses(text: str, repo: str, revision: str | None) -> None:
    """With a revision after @, or as a browser shows it."""
    assert hub_name(text) == HubName(repo, revision)


@pytest.mark.parametrize(
    "text", ["demo", "name", "./maker/name", "/maker/name", "~/maker/name", "a/b/c", "", "a b/c"]
)
def test_what_is_no_name_of_the_hub(text: str) -> None:
    """Paths, single words, and an address of another place."""
    assert hub_name(text) is None
    assert hub_name(f"https://example.com/{text.strip('./~')}") is None


def test_a_directory_comes_before_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A folder that is called as a repository is that folder."""
    (tmp_path / "maker" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub_name("maker/name") is None
    assert hub_name("maker/other") is not None


@pytest.fixture
def ggufs(hub: Hub, tmp_path: Path) -> Hub:
    """A second repository: GGUF files of two sizes, one of them split, and a projector."""
    made_by = recipe("qwen3moe")
    names = list(made_by["tensors"])
    whole = write_gguf(tmp_path / "whole.gguf", made_by, matrices="Q4_0").read_bytes()
    files = {"tiny-Q4_0.gguf": whole, "mmproj-F16.gguf": b"other weights", "README.md": b""}
    for part, some in enumerate((names[:20], names[20:])):
        name = f"tiny-Q8_0-{part + 1:05d}-of-00002.gguf"
        split = {"split__no": part, "split__count": 2, "split__tensors__count": len(names)}
        tensors = {tensor: made_by["tensors"][tensor] for tensor in some}
        file = tmp_path / name
        write_gguf(file, made_by | {"tensors": tensors}, matrices="Q8_0", **split)
        files[f"Q8_0/{name}"] = file.read_bytes()
    hub.files["maker/tiny-GGUF"] = files
    return hub


def test_a_gguf_of_a_repository(ggufs: Hub) -> None:
    """Only the files of the size that is asked for come, and a plan takes their headers alone."""
    name = hub_name("maker/tiny-GGUF:q8_0")
    assert name is not None
    asked = find_model(name)
    assert (asked.spec.moe_layers, asked.experts, asked.spec.name) == (3, "q8_0", "tiny-Q8_0")
    ggufs.sent.clear()
    wanted = manifest(name)
    assert str(wanted.name) == "maker/tiny-GGUF:Q8_0"
    first = download(wanted)
    assert first.name == "tiny-Q8_0-00001-of-00002.gguf"
    assert sorted(ggufs.sent) == sorted(f"Q8_0/{path.name}" for path in first.parent.iterdir())
    assert len(read_gguf(first).files) == 2
    assert kept_copy(name) == first


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("maker/tiny-GGUF:Q5_K_M", "no GGUF file of Q5_K_M"),
        ("maker/tiny-GGUF", "no GGUF file of a usual size"),
    ],
)
def test_sizes_of_gguf_files_that_there_are(ggufs: Hub, text: str, message: str) -> None:
    """What there is to choose from is named; one alone would have been taken."""
    name = hub_name(text)
    assert name is not None
    with pytest.raises(CheckpointError, match=message) as caught:
        manifest(name)
    assert "maker/tiny-GGUF:Q4_0, maker/tiny-GGUF:Q8_0" in str(caught.value.hint)
    ggufs.files["maker/tiny-GGUF"].pop("tiny-Q4_0.gguf")
    if name.quant is None:
        assert manifest(name).name.quant == "Q8_0"


def test_only_what_is_needed_is_fetched_and_once(hub: Hub) -> None:
    """Other forms of the weights stay there; a second time nothing comes."""
    first = directory_of(HubName(NAME))
    assert {path.name for path in first.iterdir()} == NEEDED
    assert set(hub.sent) == NEEDED
    hub.sent.clear()
    assert directory_of(HubName(NAME)) == first
    assert directory_of(HubName(NAME, COMMIT)) == first
    assert hub.sent == []


def test_an_index_says_which_weights(hub: Hub, tiny_model: Path) -> None:
    """A repository with two sets of weights is fetched as its index has it; what lacks is named."""
    files = hub.files[NAME]
    files["part-1.safetensors"] = files["model.safetensors"]
    index = {"weight_map": {"lm_head.weight": "part-1.safetensors"}}
    files["model.safetensors.index.json"] = json.dumps(index).encode()
    wanted = manifest(HubName(NAME))
    assert "part-1.safetensors" in wanted.files
    assert "model.safetensors" not in wanted.files
    del files["part-1.safetensors"]
    with pytest.raises(CheckpointError, match=r"lacks 1 of the 1 .*part-1\.safetensors"):
        manifest(HubName(NAME))


def test_a_plan_fetches_the_config_alone(hub: Hub, tiny_model: Path) -> None:
    """And plans what a copy on this machine gives, which knows its size on disk to the byte."""
    published = plan(NAME, "rtx4060-laptop", context=512)
    assert hub.sent == ["config.json"]
    local = plan(tiny_model, "rtx4060-laptop", context=512)
    assert published.request.model.name == "tiny-moe"
    for place in ("vram", "ram"):
        assert published.fit.items_told(place) == local.fit.items_told(place)
    assert published.fit.slots == local.fit.slots
    assert published.fit.used("disk") == pytest.approx(local.fit.used("disk"), rel=0.05)


def test_a_model_runs_by_its_name(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    """It says before the first byte what it takes, then writes; offline it runs from the cache."""
    words = ["run", NAME, "-p", "x = ", "-n", "3", "--greedy"]
    assert main(words) == 0
    text, told = capsys.readouterr()
    assert f"hybrid: {NAME}: " in told
    assert "to download" in told
    hub.refusals[NAME] = (503, "")
    assert main(words) == 0
    again, told = capsys.readouterr()
    assert again == text
    assert "the hub answers 503" in told
    assert "taking what was downloaded earlier" in told


def test_a_connection_that_ends_is_taken_up_again(hub: Hub, tiny_model: Path) -> None:
    """By the client itself: the file is whole in the end."""
    hub.broken.add("model.safetensors")
    got = directory_of(HubName(NAME)) / "model.safetensors"
    assert got.read_bytes() == (tiny_model / "model.safetensors").read_bytes()
    assert hub.sent.count("model.safetensors") == 2


def _forbid(hub: Hub) -> None:
    hub.refusals[NAME] = (403, "")


REFUSED = {
    "gated": (lambda hub: hub.refusals.update({NAME: (403, "GatedRepo")}), NAME, "is gated"),
    "unknown": (lambda hub: None, "maker/nothing", "no such repository"),
    "private": (lambda hub: hub.refusals.update({NAME: (401, "RepoNotFound")}), NAME, "private"),
    "forbidden": (_forbid, NAME, r"may not be read \(403\)"),
    "revision": (lambda hub: None, f"{NAME}@v9", "no revision 'v9'"),
    "down": (lambda hub: hub.refusals.update({NAME: (503, "")}), NAME, "answers 503"),
    "too many": (lambda hub: hub.refusals.update({NAME: (429, "")}), NAME, "answers 429"),
    "no config": (lambda hub: hub.files[NAME].pop("config.json"), NAME, "no config.json"),
    "no JSON": (lambda hub: hub.files[NAME].update({"config.json": b"{"}), NAME, "is no JSON"),
    "no table": (lambda hub: hub.files[NAME].update({"config.json": b"[]"}), NAME, "no JSON obj"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_hub_refuses_is_said_in_a_line(
    case: str, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    """For plans and for runs alike; nothing is converted."""
    change, name, message = REFUSED[case]
    change(hub)
    for words in (["plan", name, "--hardware", "rtx4060-laptop"], ["run", name, "-p", "x"]):
        assert main(words) == 2
        out, told = capsys.readouterr()
        (error,) = [line for line in told.splitlines() if line.startswith("error: ")]
        assert re.search(message, error), told
        assert "hint: " in told
        assert out == ""


def test_weights_of_another_kind_are_named(hub: Hub) -> None:
    """A repository of weights for torch alone cannot be run."""
    del hub.files[NAME]["model.safetensors"], hub.files[NAME]["tiny-Q4_K_M.gguf"]
    with pytest.raises(CheckpointError, match=r"has no safetensors weights, it has \.bin"):
        directory_of(HubName(NAME))


def test_nobody_answers(monkeypatch: pytest.MonkeyPatch, hub: Hub) -> None:
    """Without a connection, and where it is forbidden to ask."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    for read in (config_of, manifest, directory_of):
        with pytest.raises(UnreachableError, match="cannot be reached"):
            read(HubName(NAME))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for read in (config_of, manifest, directory_of):
        with pytest.raises(UnreachableError, match="HF_HUB_OFFLINE"):
            read(HubName(NAME))


def test_a_full_disk_is_known_before_the_first_byte(
    monkeypatch: pytest.MonkeyPatch, hub: Hub
) -> None:
    """Of the hub's cache, and for the packed weights."""
    wanted = manifest(HubName(NAME))
    assert wanted.missing_bytes == wanted.nbytes == sum(wanted.files.values())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(DiskSpaceError, match="the download of maker/tiny-moe takes"):
        download(wanted)
    assert main(["run", NAME, "-p", "x"]) == 2
    assert hub.sent == ["config.json"]


def test_a_model_that_does_not_fit_is_fetched_only_when_asked_to(
    monkeypatch: pytest.MonkeyPatch,
    hub: Hub,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Programs are told of --yes."""
    machine = Machine(find_hardware("rtx4060-laptop")).within(0, None)
    small = machine.within(None, 1000)
    monkeypatch.setattr("hybrid.cli.download.machine_for", lambda *_: small)
    assert main(["run", NAME, "-p", "x"]) == 2
    told = capsys.readouterr().err
    assert "error: tiny-moe does not fit: RAM is short by" in told
    assert "--yes downloads it all the same" in told
    assert "model.safetensors" not in hub.sent
    assert main(["convert", NAME, str(tmp_path / "made")]) == 0  # it may be for another machine
    assert "hybrid: tiny-moe does not fit: RAM is short by" in capsys.readouterr().err


def test_one_that_fits_is_said_to_be_how_fast(
    monkeypatch: pytest.MonkeyPatch, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one line, from the config alone, where this machine was measured."""
    machine = Machine(find_hardware("rtx4060-laptop")).within(0, None)
    monkeypatch.setattr("hybrid.cli.download.machine_for", lambda *_: machine)
    assert obtain(NAME, Options.of(), yes=False).is_dir()
    assert re.search(r"it fits .*: about [\d,.]+ tokens/s", capsys.readouterr().err)


def test_the_python_interface_takes_the_same_names(hub: Hub) -> None:
    """What the command line does, without asking."""
    network, directory = load_fast_model(NAME)
    assert network.config.num_experts == 8
    assert directory.is_dir()
    with pytest.raises(HybridError, match="no such repository"):
        load_fast_model("maker/nothing")
