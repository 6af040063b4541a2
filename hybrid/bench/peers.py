"""Measures a model through this runtime, llama.cpp and transformers (``hybrid bench peers``).

Of a shape, llama.cpp holds random weights, every matrix in q4_0 as ours are; transformers holds
bfloat16, of fewer layers, which we then run as few of. Other programs with a ``llama-bench``, such
as ik_llama.cpp, hold the same file as llama.cpp. Of a checkpoint, transformers holds the
weights as they are and computes in what our dense layers compute in; we run it as ``hybrid run``
does. All run the same number of tokens on the same number of threads. llama.cpp runs in a process
of its own, with the environment it would have without us. Two take turns, and ratios are taken
between neighbours in time, because the machine's speed drifts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from hybrid.ask.dtypes import check_dtype
from hybrid.bench.cases import CASES, Case, Peer, long_case
from hybrid.bench.llama_bench import LlamaBench, parse_peer
from hybrid.bench.model import check_no_shape, read_spec
from hybrid.bench.record import Told, provenance, spread, untold
from hybrid.bench.sides import (
    InProcess,
    llama_cpp,
    plain_checkpoint,
    plain_random,
)
from hybrid.demo import demo_path
from hybrid.errors import UsageError
from hybrid.loading import load_fast_model, set_threads
from hybrid.machine import host
from hybrid.measure.interference import DISTURBED, Others
from hybrid.measure.random_model import write_random_model
from hybrid.model import Model
from hybrid.paths import expanded, temporary_folder
from hybrid.weights.source import Source
from planner.describe.context import longest_context

#: The shape that is compared unless another is given: what it is, and how much of it.
_SPEC, _LAYERS, _VOCABULARY = "qwen3-30b-a3b", 12, 32000


def run(
    model: str | None = None,
    *,
    spec: str | Path | None = None,
    layers: int | None = None,
    vocabulary: int | None = None,
    context: int | None = None,
    programs: Sequence[str] = (),
    plain_layers: int = 2,
    repeat: int = 5,
    threads: int | None = None,
    dtype: str = "auto",
    progress: Callable[[str], None] = lambda text: None,
    finished: Told = untold,
) -> dict[str, Any]:
    """Compare with transformers on a checkpoint, or with llama.cpp, too, on a shape.

    Parameters
    ----------
    model
        A checkpoint's directory, or ``"demo"``; exclusive with ``spec``.
    spec, layers, vocabulary
        A Qwen3-MoE shape, named as for ``hybrid plan``, and how many layers and tokens instead of
        its own; 12 layers of Qwen3-30B-A3B with 32,000 tokens where nothing is given.
    context
        Also decode with this many tokens in the cache; llama.cpp computes them once.
    programs
        Others that hold what llama.cpp holds, ``NAME=PATH/TO/llama-bench [OPTION ...]`` each. With
        some, llama-cpp-python is compared with only where it is installed.
    plain_layers
        Layers of a shape's comparison with transformers, whose weights in bfloat16 are four times
        the size; 0 to leave it out.
    repeat
        Pairs a case.
    dtype
        What our norms and other dense weights that stay as they are are computed in: ``"auto"``,
        ``"float32"`` or ``"bfloat16"``.
    progress
        Called with a line about what is measured next.
    finished
        Called with the record so far and a line after every result.

    Returns
    -------
    One record with a result a case and peer: both sides' seconds (median, quartiles, samples)
    and ``speedup``, the median of the peer's time over ours pair by pair, with its samples.
    A checkpoint's record has ``experts_implementation``, by which transformers computes experts;
    its results say which part of the processors' time other programs took (``disturbed``).
    Decoding beside llama.cpp has ``least_s`` too, what reading a token's weights and cache once
    takes, measured with every pair, and ``most_speedup``, the peer's time over that: no program
    that reads the same bytes can be faster than that. A side that was faster is the measure.

    Raises
    ------
    UsageError
        When llama-cpp-python or gguf is not installed, for a shape of another family, or when
        a program of ``programs`` cannot be run or measures nothing.
    CheckpointError
        When the checkpoint cannot be read, or is converted: transformers alone cannot load it.
    """
    check_dtype(dtype)
    cases = list(CASES) if context is None else [*CASES, long_case(context)]
    others = [parse_peer(given) for given in programs]
    if model is not None:
        check_no_shape(model, spec, layers, vocabulary)
        if others:
            raise UsageError(
                f"--peer {others[0][0]} is given with {model}, which is no GGUF file",
                hint="compare with other programs on a shape, --spec",
            )
        threads = _set_threads(threads)
        return _of_checkpoint(model, cases, repeat, threads, dtype, progress, finished)
    _require_packages(others)
    from hybrid.bench.gguf_model import require_qwen3, write_gguf

    threads = _set_threads(threads)
    layers = _LAYERS if layers is None else layers
    name, settings, made_for = read_spec(spec or _SPEC, layers)
    require_qwen3(settings)
    _check_contexts(cases, made_for, name)
    settings["vocab_size"] = _VOCABULARY if vocabulary is None else vocabulary
    longest = max(case.prompt + case.generate for case in cases) + 8
    results: list[dict[str, Any]] = []
    record = provenance("hybrid bench peers", threads) | {
        "spec": name,
        "layers": settings["num_hidden_layers"],
        "vocabulary": settings["vocab_size"],
        "format": "q4_0",
        "dtype": None,
        "decode_path": None,
        "peers": {},
        "results": results,
    }

    def keep(row: dict[str, Any]) -> None:
        results.append(row)
        finished(record, _in_words(row))

    with ExitStack() as stack:
        ours = stack.enter_context(_ours(settings, dtype, progress))
        record |= {"dtype": ours.dtype, "decode_path": str(ours.path)}
        path = stack.enter_context(temporary_folder("bench")) / "model.gguf"
        write_gguf(settings, path)
        peers: list[Peer] = [LlamaBench(*other, path, threads) for other in others]
        if _installed("llama_cpp"):
            peers.append(stack.enter_context(llama_cpp(path, threads, longest)))
        for side in (ours.model, *peers):
            side.measure(Case("", 32, 4, True))
        record["peers"] = {peer.name: peer.about for peer in peers}
        for case in cases:
            for peer in peers:
                keep(_compare(ours.model, peer, case, repeat, progress, threads))
    if plain_layers:
        few = settings | {"num_hidden_layers": plain_layers}
        with _ours(few, dtype, progress) as ours:
            plain = plain_random(few)
            record["peers"][plain.name] = plain.about
            for side in (ours.model, plain):
                side.measure(Case("", 32, 4, True))
            for case in CASES:
                row = _compare(ours.model, plain, case, repeat, progress)
                keep(row | {"layers": plain_layers})
    return record


def _of_checkpoint(
    model: str,
    cases: list[Case],
    repeat: int,
    threads: int,
    dtype: str,
    progress: Callable[[str], None],
    finished: Told,
) -> dict[str, Any]:
    """Compare with transformers alone: its own weights, in the type that ours computes in."""
    path = demo_path() if model == "demo" else expanded(model)
    source = Source.open(path)
    sizes = source.config.get_text_config()
    _check_contexts(cases, longest_context(sizes.to_dict(), f"config of {model}"), model)
    progress("loading")
    network, _ = load_fast_model(path, dtype=dtype)
    ours = InProcess(network, "ours")
    plain = plain_checkpoint(path, str(network.dtype).removeprefix("torch."))
    store = Model(network).index
    results: list[dict[str, Any]] = []
    record = provenance("hybrid bench peers", threads) | {
        "model": model,
        "family": type(network).__name__,
        "layers": sizes.num_hidden_layers,
        "vocabulary": sizes.vocab_size,
        "format": store.experts_format,
        "dense": store.dense_format or "as in the checkpoint",
        "dtype": str(network.dtype).removeprefix("torch."),
        "decode_path": str(Model(network).fast.path),
        "peers": {plain.name: plain.about},
        "experts_implementation": plain.model.config._experts_implementation,
        "results": results,
    }
    for side in (ours, plain):
        side.measure(Case("", 32, 4, True))
    others = Others()
    for case in cases:
        row = _compare(ours, plain, case, repeat, progress)
        results.append(row | {"disturbed": others.lap()})
        finished(record, _in_words(results[-1]))
    return record


def _set_threads(threads: int | None) -> int:
    return set_threads(host.default_threads() if threads is None else threads)


def _check_contexts(cases: list[Case], made_for: int | None, name: str) -> None:
    """Refuse to decode after more tokens than a model was made for."""
    for case in cases:
        if case.again and made_for is not None and case.prompt > made_for:
            raise UsageError(
                f"--context {case.prompt} is asked for, {name} was made for {made_for}",
                hint=f"give {made_for} or less",
            )


def _require_packages(others: Sequence[object]) -> None:
    """Refuse to begin without what is needed: llama-cpp-python only where there are no others."""
    needed = {"gguf": "gguf"} if others else {"llama_cpp": "llama-cpp-python", "gguf": "gguf"}
    missing = [package for module, package in needed.items() if not _installed(module)]
    if missing:
        raise UsageError(
            f"the comparison with llama.cpp needs {' and '.join(missing)}, not installed here",
            hint=f"pip install {' '.join(missing)}",
        )


def _installed(module: str) -> bool:
    return find_spec(module) is not None


def _in_words(row: dict[str, Any]) -> str:
    low, high = min(row["speedup_samples"]), max(row["speedup_samples"])
    rates = [f"{row[side]['tokens_per_s']:.1f}" for side in ("ours", "theirs")]
    return (
        f"{row['name']}, {row['peer']}: ours {rates[0]}, theirs {rates[1]} tokens/s, "
        f"{row['speedup']:.2f}x ({low:.2f} to {high:.2f})"
    )


class _Ours(NamedTuple):
    model: InProcess
    path: Any
    dtype: str


@contextmanager
def _ours(settings: dict[str, Any], dtype: str, progress: Callable[[str], None]) -> Iterator[_Ours]:
    with temporary_folder("bench") as folder:
        progress(f"writing random weights of {settings['num_hidden_layers']} layers")
        write_random_model(settings, folder, experts="q4_0", dense="q4_0")
        model, _ = load_fast_model(folder, dtype=dtype)
        computed_in = str(model.dtype).removeprefix("torch.")
        yield _Ours(InProcess(model, "ours"), Model(model).fast.path, computed_in)


def _compare(
    ours: InProcess,
    peer: Peer,
    case: Case,
    pairs: int,
    progress: Callable[[str], None],
    threads: int | None = None,
) -> dict[str, Any]:
    """Take turns; with ``threads``, say what reading a token's bytes with them takes."""
    times: list[float] = []
    theirs: list[float] = []
    least: list[float] = []
    for turn in range(pairs):
        progress(f"{case.name}, {peer.name}: pair {turn + 1} of {pairs}")
        least_s = None if threads is None else ours.least_s(case, threads)
        if least_s is not None:
            least.append(least_s)
        times.append(ours.measure(case))
        theirs.append(peer.measure(case))
    ratios = [their / our for our, their in zip(times, theirs, strict=True)]
    tokens = 1 if case.decode else case.prompt
    limit: dict[str, Any] = {}
    if least:
        # Whoever read the bytes in less time shows that it can be done.
        least = list(map(min, least, times, theirs))
        most = [their / one for one, their in zip(least, theirs, strict=True)]
        limit = {"least_s": spread(least), "most_speedup": median(most)}
    return (
        case._asdict()
        | limit
        | {
            "peer": peer.name,
            "ours": spread(times) | {"tokens_per_s": tokens / median(times)},
            "theirs": spread(theirs) | {"tokens_per_s": tokens / median(theirs)},
            "speedup": median(ratios),
            "speedup_samples": ratios,
        }
    )


def peers_table(result: dict[str, Any]) -> str:
    """Return the record as text."""
    lines = [
        f"{result.get('spec') or result['model']}, {result['layers']} layers, {result['format']}"
        f" with {result['dtype']}, {result['threads']} threads, {result['machine']['simd_level']}",
        *(f"{name}: {version}" for name, version in result["peers"].items()),
        f"{'':<20}{'ours':>10}{'peer':>10}   tokens/s{'speedup':>9}   (range; at full bandwidth)",
    ]
    for row in result["results"]:
        spread_of = row["speedup_samples"]
        layers = f", {row['layers']} layers" if "layers" in row else ""
        most = f"; {row['most_speedup']:.2f}" if "most_speedup" in row else ""
        lines.append(
            f"{row['name']:<20}{row['ours']['tokens_per_s']:>10.1f}"
            f"{row['theirs']['tokens_per_s']:>10.1f}{row['speedup']:>19.2f}x"
            f" ({min(spread_of):.2f} to {max(spread_of):.2f}{most})  {row['peer']}{layers}"
        )
    disturbed = max(row.get("disturbed", 0.0) for row in result["results"])
    if disturbed >= DISTURBED:
        lines.append(f"disturbed: other programs used up to {disturbed:.0%} of the processors")
    return "\n".join(lines)
