"""``hybrid plan``: names, outputs, what it loads, and every kind of bad input."""

from __future__ import annotations

import html.parser
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numba
import pytest

from hybrid.ask.asked_model import find_model
from hybrid.ask.names import find_hardware, resolve
from hybrid.ask.options import Options
from hybrid.ask.sizes import parse_bytes
from hybrid.cli import main
from hybrid.demo import demo_path
from hybrid.errors import UsageError
from hybrid.machine import calibrations, host
from hybrid.machine.calibrations import Identity
from hybrid.machine.machines import Machine
from hybrid.planning.plan import machine_for, plan
from planner.foretell.report import SCHEMA, to_dict
from planner_examples import LAPTOP, QUICK, hybrid_plan
from tiny_model import save_tiny_llama


def test_names_resolve_when_unique() -> None:
    """Case, publisher and a unique beginning or part suffice; ambiguity is named."""
    assert find_model("qwen/qwen3-30b-a3b").spec.name == "Qwen3-30B-A3B"
    assert find_model("Mixtral").spec.name == "Mixtral-8x7B"
    assert find_hardware("rtx4060-laptop").name == "rtx4060-laptop-8gb"
    assert find_hardware("RTX4090").name == "rtx4090-desktop"
    with pytest.raises(UsageError) as caught:
        find_model("gpt-oss")
    assert "gpt-oss-120b, gpt-oss-20b" in caught.value.message


@pytest.mark.parametrize(
    ("kind", "typed", "meant"),
    [
        ("models", "Qwen3-31B-A3B", "qwen3-30b-a3b"),
        ("models", "Mixtrl-8x7B", "mixtral-8x7b"),
        ("hardware", "rtx4600-laptop", "rtx4060-laptop-8gb"),
        ("hardware", "rtx4090-desktp", "rtx4090-desktop"),
    ],
)
def test_unknown_names_suggest_the_nearest(kind: str, typed: str, meant: str) -> None:
    """A slip in a name is answered with the name that was probably meant, and the list."""
    with pytest.raises(UsageError) as caught:
        resolve(typed, kind)
    assert f"did you mean {meant}?" in str(caught.value.hint)
    assert "known:" in str(caught.value.hint)


def test_sizes_are_read_with_their_units() -> None:
    """Binary and decimal units differ; a bare letter is binary, as in llama.cpp."""
    assert parse_bytes("6GiB", "--vram") == 6 * 2**30
    assert parse_bytes("6G", "--vram") == 6 * 2**30
    assert parse_bytes("6 GB", "--vram") == 6 * 10**9
    assert parse_bytes("512MiB", "--vram") == 512 * 2**20
    assert parse_bytes("1000000", "--ram") == 10**6
    for bad in ("", "six", "6Gi", "6GiBB", "-1GiB", "0", "nan", "inf"):
        with pytest.raises(UsageError) as caught:
            parse_bytes(bad, "--vram")
        assert "--vram" in caught.value.message
        assert caught.value.hint


def test_text_report(capsys: pytest.CaptureFixture[str]) -> None:
    """The report says whether it fits, how fast, what binds, why, beside what, and what helps."""
    code, out, err = hybrid_plan("Qwen3-30B-A3B", *LAPTOP, *QUICK, capsys=capsys)
    assert (code, err) == (0, "")
    for words in (
        "verdict              fits",
        "time to first token",
        "tokens/s",
        "binding resource",
        "hit rate",
        "VRAM GiB   RAM GiB   disk GiB",
        "expert slots",
        "KV cache (64 tokens)",
        "token ms   share   prompt ms    source",
        "ms against",
        "all CPU: every expert on the CPU",
        "on demand: all on the GPU, LRU cache",
        "static split: the most used on the GPU, in hindsight",
        "oracle cache",
        "lower bound",
        "What would help most",
        "(assumed)",
    ):
        assert words in out, words
    assert "\x1b" not in out
    assert not re.search(r"[ \t]+$", out, re.MULTILINE)


def test_json_is_the_documented_schema(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every documented field is there; terms add up; the same request gives the same bytes."""
    first, again = (
        hybrid_plan(str(small), *LAPTOP, *QUICK, "--json", capsys=capsys)[1] for _ in range(2)
    )
    assert first == again
    data = json.loads(first)
    assert data["schema"] == SCHEMA == "hybrid.plan/1"
    import planner.foretell.report

    documented = re.findall(
        r"^(\w+(?:, \w+)*) {2,}\S", str(planner.foretell.report.__doc__), re.MULTILINE
    )
    names = {name for entry in documented for name in entry.split(", ")} - {"field"}
    assert names | {"schema"} == set(data)
    assert data["model"]["name"] == "small-moe"
    for whole, parts in (("tpot", "terms"), ("ttft", "prefill_terms")):
        total = sum(term["value_s"] for term in data[parts].values())
        assert total == pytest.approx(data[whole]["value_s"])
    assert len(data["layers"]) == len(data["fit"]["slots"]) == 6
    assert data["tokens_per_s"] == pytest.approx(1 / data["tpot"]["value_s"])
    assert data["lower_bound_s"] <= data["tpot"]["value_s"]


def test_the_api_gives_the_same_as_the_command(
    small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """``plan`` returns objects whose JSON is what the command prints."""
    result = plan(small, "rtx4060-laptop", tokens=2, prompt=16, context=64, vram="6GiB")
    words = (*LAPTOP, *QUICK, "--vram", "6GiB", "--json")
    assert json.loads(hybrid_plan(str(small), *words, capsys=capsys)[1]) == to_dict(result)
    assert result.fit.vram_bytes == 6 * 2**30
    assert result.prediction is not None
    assert result.prediction.tpot.value > 0


def test_markdown_tables_are_regular(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every row of a Markdown table has as many cells as its heading."""
    _, out, _ = hybrid_plan(str(small), *LAPTOP, *QUICK, "--markdown", capsys=capsys)
    blocks = [block for block in out.split("\n\n") if block.startswith("|")]
    assert len(blocks) >= 5
    for block in blocks:
        assert len({line.count("|") for line in block.splitlines()}) == 1


def test_cpu_only_machines(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a GPU there are no slots, no link and nothing to compare."""
    code, out, _ = hybrid_plan(
        str(small), "-H", "cpu-only-laptop", *QUICK, "--json", "--batch", "2", capsys=capsys
    )
    data = json.loads(out)
    assert code == 0
    assert data["alternatives"] == []
    assert data["fit"]["vram_bytes"] == 0
    assert set(data["fit"]["slots"]) == {0}
    assert data["terms"]["copies to the GPU"]["value_s"] == 0


def test_what_does_not_fit_says_what_does(capsys: pytest.CaptureFixture[str]) -> None:
    """The verdict names the shortage, the exit code is 1; each remedy, taken, fits."""
    words = ("DeepSeek-V3", "-H", "cpu-only-laptop", *QUICK)
    code, out, _ = hybrid_plan(*words, capsys=capsys)
    assert code == 1
    assert "does not fit: RAM is short by" in out
    assert "--dense q8_0" in out
    data = json.loads(hybrid_plan(*words, "--json", capsys=capsys)[1])
    assert data["fit"]["fits"] is False
    assert data["tpot"] is None
    assert data["remedies"]
    code, out, _ = hybrid_plan(*words, "--dense", "q8_0", "--json", capsys=capsys)
    fixed = json.loads(out)
    assert code == 0
    assert fixed["fit"]["fits"] is True
    # 342 GiB of experts against 32 GiB of RAM: the disk binds, and the report says so.
    assert fixed["fit"]["in_ram"] < 0.1
    assert "disk" in fixed["binding"]


def test_dense_formats_save_nothing_on_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    """A GPU has dense weights widened: what is asked for is counted as that, and other formats
    are neither a remedy nor a change that helps. What is one fits when it is taken."""
    words = ("DeepSeek-V3", "-H", "rtx4090", *QUICK, "--json")
    plans = {}
    for extra in ((), ("--dense", "q8_0"), ("--dense", "q4_0"), ("--dense", "f32")):
        code, out, _ = hybrid_plan(*words, *extra, capsys=capsys)
        plans[extra] = json.loads(out)
        assert code == 1
        assert not any("--dense" in remedy for remedy in plans[extra]["remedies"])
    in_memory = [
        [item for item in found["fit"]["items"] if item["place"] != "disk"]
        for found in plans.values()
    ]
    assert all(items == in_memory[0] for items in in_memory)
    assert plans[()]["fit"]["items"][0]["name"] == "dense weights (bf16)"
    assert plans["--dense", "q4_0"]["request"]["dense"] == "q4_0"
    assert plans[()]["remedies"] == ["--vram 0 (the CPU alone)"]
    assert hybrid_plan(*words, "--vram", "0", capsys=capsys)[0] == 0
    _, out, _ = hybrid_plan("Mixtral", *LAPTOP, *QUICK, "--dense", "q8_0", capsys=capsys)
    assert "experts q4_0, dense q8_0 (bf16 on the GPU), context 64" in out
    assert "What would help most" in out
    assert "dense weights in" not in out


def test_perfetto_trace(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The trace has the named lanes, spans with microseconds, and the cache's instants."""
    path = tmp_path / "trace.json"
    hybrid_plan(
        str(small), *LAPTOP, *QUICK, "--vram", "1GiB", "--perfetto", str(path), capsys=capsys
    )
    rows = json.loads(path.read_text())["traceEvents"]
    lanes = {row["args"]["name"]: row["tid"] for row in rows if row["name"] == "thread_name"}
    assert set(lanes) == {"cpu", "gpu", "link", "disk", "cache"}
    spans = [row for row in rows if row["ph"] == "X"]
    assert {row["tid"] for row in spans} >= {lanes["gpu"]}
    assert all(row["dur"] >= 0 and row["ts"] >= 0 for row in spans)
    assert any("mixer" in row["name"] for row in spans)


class Page(html.parser.HTMLParser):
    """Collects a page's tags, their attributes and whether they nest."""

    VOID = frozenset({"meta", "link", "br", "img"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_html_page_is_whole_and_self_contained(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tags nest, nothing is loaded from elsewhere, names are escaped, the timeline has data."""
    folder = small.rename(tmp_path / "<b>&model")
    path = tmp_path / "page.html"
    code, _, err = hybrid_plan(str(folder), *LAPTOP, *QUICK, "--html", str(path), capsys=capsys)
    assert code == 0
    assert f"wrote {path}" in err
    text = path.read_text()
    page = Page()
    page.feed(text)
    assert page.open == []
    assert not any({"src", "href"} & set(attributes) for _, attributes in page.seen)
    assert "&lt;b&gt;&amp;model" in text
    assert "<b>&model" not in text
    spans = json.loads(re.search(r"const spans = (\[.*?\]), lanes", text).group(1))  # type: ignore[union-attr]
    assert {span["lane"] for span in spans} >= {1}
    assert len([tag for tag, _ in page.seen if tag == "table"]) >= 5


def test_files_are_not_overwritten_unasked(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An existing file stays as it is without --force, and is replaced whole with it."""
    path = tmp_path / "page.html"
    path.write_text("mine")
    words = (str(small), *LAPTOP, *QUICK, "--html", str(path))
    code, out, err = hybrid_plan(*words, capsys=capsys)
    assert (code, out) == (2, "")
    assert f"{path} exists" in err
    assert "--force" in err
    assert path.read_text() == "mine"
    assert hybrid_plan(*words, "--force", capsys=capsys)[0] == 0
    assert path.read_text().startswith("<!doctype html>")
    assert [p.name for p in tmp_path.iterdir() if "part" in p.name] == []
    missing = tmp_path / "no" / "page.html"
    code, _, err = hybrid_plan(*words[:-1], str(missing), capsys=capsys)
    assert code == 2
    assert "cannot write" in err


def test_context_defaults_to_what_the_model_was_made_for(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A model with a context below 4096 needs no --context; asking for more is refused."""
    config = str(demo_path() / "config.json")
    assert main(["plan", config, "-H", "rtx4060", "--tokens", "2"]) == 0
    assert "context 1024" in capsys.readouterr().out
    assert main(["plan", config, "-H", "rtx4060", "--context", "4096"]) == 2
    assert "--context 4096 exceeds the 1024 tokens" in capsys.readouterr().err


def without_gpu(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """A machine without a GPU whose CPU is calibrated: with the laptop's numbers."""
    monkeypatch.setenv("HYBRID_CACHE", str(folder))
    monkeypatch.setattr(host, "gpus", list)
    cpu = find_hardware("cpu-only-laptop")
    calibrations.save(replace(cpu, name="this-machine"), Identity.of_this_machine())


def test_a_machine_without_a_gpu_emulates_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where VRAM is asked for, as a run does; the plan says so, and reserves for no driver.

    Without VRAM, with 0 and with auto it is the CPU alone, as it was calibrated.
    """
    without_gpu(monkeypatch, tmp_path)
    words = ("demo", "--tokens", "1", "--json")
    code, out, err = hybrid_plan(*words, "--vram", "64MiB", capsys=capsys)
    assert code == 0
    assert "this machine with an emulated GPU" in err
    found = json.loads(out)
    assert found["hardware"]["name"] == "this-machine with the GPU of rtx4060-laptop-8gb"
    assert found["hardware"]["summary"].endswith("; its GPU is emulated")
    assert sum(found["fit"]["slots"]) == 96
    assert not any("driver" in item["name"] for item in found["fit"]["items"])
    for vram in ((), ("--vram", "0"), ("--vram", "auto", "--ram", "auto")):
        code, out, err = hybrid_plan(*words, *vram, capsys=capsys)
        assert code == 0
        assert "emulated" not in err
        found = json.loads(out)
        assert found["hardware"]["name"] == "this-machine"
        assert found["fit"]["vram_bytes"] == 0
    monkeypatch.setattr(host, "gpus", lambda: [host.Gpu("RTX 9999", 1 << 30, "580")])
    code, _, err = hybrid_plan(*words, "--vram", "64MiB", capsys=capsys)
    assert code == 2
    assert "RTX 9999 of this machine was not measured yet" in err


def test_more_than_this_machine_has_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a run refuses it: threads, RAM, and its GPU's memory, whose nominal size is all of it."""
    without_gpu(monkeypatch, tmp_path)
    words = ("demo", "--tokens", "1", "--json")
    for given in ((), ("--vram", "64MiB")):
        code, out, err = hybrid_plan(*words, *given, "--threads", "9999", capsys=capsys)
        assert (code, out) == (2, "")
        most = numba.config.NUMBA_NUM_THREADS
        assert f"threads is 9999, it must be a whole number between 1 and {most}\n" in err
    monkeypatch.setenv("NUMBA_NUM_THREADS", "9999")
    assert hybrid_plan(*words, *given, "--threads", "9999", capsys=capsys)[0] == 0
    code, _, err = hybrid_plan(*words, "--ram", "900TiB", capsys=capsys)
    assert code == 2
    assert "ram is 921600.00 GiB, this machine has" in err
    whole = int(7.9 * 2**30)
    card = find_hardware("rtx4060-laptop").with_values("gpu", vram_bytes=whole)
    monkeypatch.setattr(calibrations, "in_force", lambda threads: (card, "RTX 4060 (cuda:0)"))
    code, out, err = hybrid_plan(*words, "--vram", "8GiB", capsys=capsys)
    assert code == 0
    assert "as it was calibrated with RTX 4060" in err
    assert json.loads(out)["fit"]["vram_bytes"] == whole
    code, _, err = hybrid_plan(*words, "--vram", "9GiB", capsys=capsys)
    assert code == 2
    assert "vram is 9.00 GiB" in err


def test_threads_are_not_taken_of_described_machines() -> None:
    """Their rates are of all cores, and what fewer would reach is not known: no number is given,
    whichever way the machine is described."""
    laptop = find_hardware("cpu-only-laptop")
    for described in ("cpu-only-laptop", laptop, Machine(laptop)):
        with pytest.raises(UsageError, match="threads is 1, but the rates of cpu-only") as caught:
            plan("demo", described, threads=1, tokens=1)
        assert "hybrid calibrate --threads" in str(caught.value.hint)
        assert plan("demo", described, tokens=1).fit.fits


def test_memory_of_a_machine_that_was_found_can_be_less() -> None:
    """What was found for one plan takes other sizes in the next; nothing is emulated without."""
    machine = machine_for(find_model("demo"), "rtx4060-laptop", Options.of(vram="6GiB"))
    assert machine is not None
    for vram, size in ((None, 6 * 2**30), ("2GiB", 2 * 2**30), (0, 0)):
        for emulated in (False, True):
            found = plan("demo", replace(machine, emulated=emulated), vram=vram, tokens=1)
            assert found.fit.vram_bytes == size
            assert found.request.emulated == (emulated and size > 0)


def test_a_described_machine_keeps_its_drivers_share(capsys: pytest.CaptureFixture[str]) -> None:
    """A real card has a driver; its GPU can be left out; and what prompts need is for all of
    the context, however short the prompt that is timed."""
    words = ("demo", *LAPTOP, "--tokens", "1", "--json")
    items = {}
    for extra in ((), ("--prompt", "16"), ("--vram", "auto")):
        found = json.loads(hybrid_plan(*words, *extra, capsys=capsys)[1])["fit"]
        items[extra] = found["items"]
        assert ("driver and kernels", 600 * 2**20) in [
            (item["name"], item["bytes"]) for item in found["items"]
        ]
    assert items[()] == items["--prompt", "16"] == items["--vram", "auto"]
    alone = json.loads(hybrid_plan(*words, "--vram", "0", capsys=capsys)[1])
    assert alone["fit"]["vram_bytes"] == 0
    short = json.loads(hybrid_plan(*words, "-c", "64", capsys=capsys)[1])
    assert short["request"]["prompt"] == 64


def test_neither_torch_nor_numba_is_loaded() -> None:
    """``hybrid plan`` answers without either, and importing it loads neither."""
    code = (
        "import sys; from hybrid.cli import main; "
        "code = main(['plan', 'Mixtral', '-H', 'rtx4090', '--tokens', '2', '--json']); "
        "code = code or main(['plan', 'demo', '--vram', '64MiB', '--tokens', '2', '--json']); "
        "heavy = {'torch', 'numba', 'transformers', 'pandas', 'jinja2'} & set(sys.modules); "
        "sys.exit(f'loaded {heavy}' if heavy else code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("dense", [None, "q8_0"])
def test_a_plan_and_a_conversion_take_the_same(
    dense: str | None, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What lies on disk is foretold to the byte, of a checkpoint and of its converted copy.

    Every family's is in ``tests/hybrid/packed/test_families.py``.
    """
    copy, asked = tmp_path / "copy", [] if dense is None else ["--dense", dense]
    assert main(["convert", str(tiny_model), str(copy), "--experts", "q8_0", *asked]) == 0
    there = {
        "expert store (q8_0)": (copy / "experts.bin").stat().st_size,
        "dense weights": sum(file.stat().st_size for file in copy.glob("*.safetensors")),
    }
    capsys.readouterr()
    for model, formats in ((tiny_model, ["--experts", "q8_0", *asked]), (copy, [])):
        words = (str(model), "-H", "rtx4060-laptop", *formats, *QUICK, "--json")
        items = json.loads(hybrid_plan(*words, capsys=capsys)[1])["fit"]["items"]
        found = {item["name"]: item["bytes"] for item in items if item["place"] == "disk"}
        assert found == there


def test_a_model_without_experts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Says so instead of what there is to share, and takes what its converted copy takes."""
    save_tiny_llama(tmp_path / "plain")
    copy = tmp_path / "copy"
    assert main(["convert", str(tmp_path / "plain"), str(copy)]) == 0
    assert "no experts to share" in capsys.readouterr().err
    size = sum(file.stat().st_size for file in copy.glob("*.safetensors"))
    for model in (tmp_path / "plain", copy):
        words = (str(model), "-H", "rtx4060-laptop", *QUICK)
        told = hybrid_plan(*words, capsys=capsys)[1]
        assert "2 layers, no experts to share" in told
        assert "hit rate  " not in told.partition("Beside other rules")[0]
        items = json.loads(hybrid_plan(*words, "--json", capsys=capsys)[1])["fit"]["items"]
        found = {item["name"]: item["bytes"] for item in items if item["place"] == "disk"}
        assert found == {"dense weights": size}


def test_tokens_a_second_of_several_sequences_say_so(
    small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With --batch, tokens/s are of all sequences together, which is said; alone, nothing is."""
    words = (str(small), *LAPTOP, *QUICK)
    alone, four = (
        hybrid_plan(*words, *batch, capsys=capsys)[1] for batch in ((), ("--batch", "4"))
    )
    assert "sequences" not in alone
    assert re.search(r"time per token .* tokens/s of all 4 sequences", four)
    found = json.loads(hybrid_plan(*words, "--batch", "4", "--json", capsys=capsys)[1])
    assert found["tokens_per_s"] == pytest.approx(4 / found["tpot"]["value_s"])
    assert f"that is {found['tokens_per_s']:.1f} tokens/s" in four
    assert "with the policy blend" in four
