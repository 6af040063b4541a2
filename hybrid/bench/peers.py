"""``hybrid bench peers``: the same shape through this runtime and through llama.cpp.

Both hold random weights, every matrix in q4_0, and run the same number of tokens on the same
number of threads. llama.cpp runs in a process of its own, with the environment it would have
without us. The two take turns, and ratios are taken between neighbours in time, because the
machine's speed drifts.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from hybrid import host
from hybrid.bench.model import generate_once, read_spec
from hybrid.bench.random_model import write_random_model
from hybrid.bench.record import provenance, spread
from hybrid.errors import HybridError, UsageError
from hybrid.loading import load_fast_model, set_threads


class Case(NamedTuple):
    """One comparison: what is timed is the prompt, or the tokens after it."""

    name: str
    prompt: int
    generate: int
    decode: bool


CASES = (
    Case("decode", 32, 64, True),
    Case("prefill of 512", 512, 1, False),
    Case("prefill of 32", 32, 1, False),
)


def long_case(context: int) -> Case:
    """Decoding with ``context`` tokens in the cache."""
    return Case(f"decode after {context}", context, 48, True)


class LlamaCpp:
    """llama.cpp in a child process, see :mod:`hybrid.bench.llama_worker`."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.load_s: float = self._answer()["load_s"]

    def measure(self, case: Case) -> float:
        """Return the seconds of the prompt, or of one token after it."""
        request = {"prompt": case.prompt, "generate": case.generate}
        assert self._process.stdin is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        answer = self._answer()
        return answer["decode_s"] / case.generate if case.decode else answer["prefill_s"]

    def _answer(self) -> dict[str, float]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise HybridError(
                f"llama.cpp ended with code {self._process.wait()}",
                hint="its own message is above; a build for another processor is a usual cause",
            )
        answer: dict[str, float] = json.loads(line)
        return answer


@contextmanager
def _llama_cpp(settings: dict[str, Any], threads: int, context: int) -> Iterator[LlamaCpp]:
    from hybrid.bench.gguf_model import write_gguf

    environment = {k: v for k, v in os.environ.items() if k != "GOMP_SPINCOUNT"}
    with tempfile.TemporaryDirectory(prefix="hybrid-bench-") as folder:
        path = Path(folder) / "model.gguf"
        write_gguf(settings, path)
        worker = [sys.executable, "-m", "hybrid.bench.llama_worker"]
        with subprocess.Popen(
            [*worker, str(path), str(threads), str(context)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        ) as process:
            try:
                yield LlamaCpp(process)
            finally:
                process.kill()


def run(
    spec: Path,
    *,
    layers: int | None = 12,
    vocabulary: int | None = 32000,
    context: int | None = None,
    repeat: int = 5,
    threads: int | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Compare with llama.cpp on the shape of ``spec``.

    Parameters
    ----------
    spec, layers, vocabulary
        A Qwen3-MoE file of ``configs/models``, and how many layers and tokens instead of its own.
    context
        Also decode with this many tokens in the cache (two repeats: the prompt takes long).
    repeat
        Pairs a case.

    Returns
    -------
    One record with a result a case: both sides' seconds (median, quartiles, samples) and
    ``speedup``, the median of llama.cpp's time over ours pair by pair, with its samples.

    Raises
    ------
    UsageError
        When llama-cpp-python or gguf is not installed, or for another family.
    """
    for module, package in (("llama_cpp", "llama-cpp-python"), ("gguf", "gguf")):
        if find_spec(module) is None:
            raise UsageError(f"{package} is not installed", hint=f"pip install {package}")
    threads = host.default_threads() if threads is None else threads
    set_threads(threads)
    settings = read_spec(spec, layers)
    if vocabulary is not None:
        settings["vocab_size"] = vocabulary
    cases = [(case, repeat) for case in CASES]
    if context is not None:
        cases.append((long_case(context), 2))
    longest = max(case.prompt + case.generate for case, _ in cases) + 8
    with tempfile.TemporaryDirectory(prefix="hybrid-bench-") as folder:
        progress("writing random weights for both")
        write_random_model(settings, Path(folder), experts="q4_0", dense="q4_0")
        with _llama_cpp(settings, threads, longest) as peer:
            model, _ = load_fast_model(folder)
            generate_once(model, 32, 4)
            peer.measure(Case("", 32, 4, True))
            results = [_compare(model, peer, case, pairs, progress) for case, pairs in cases]
            path = str(model.hybrid_decode)
    return provenance("hybrid bench peers", threads) | {
        "spec": spec.stem,
        "layers": settings["num_hidden_layers"],
        "vocabulary": settings["vocab_size"],
        "format": "q4_0",
        "decode_path": path,
        "peer": f"llama-cpp-python {_version('llama-cpp-python')}",
        "results": results,
    }


def _compare(
    model: Any, peer: LlamaCpp, case: Case, pairs: int, progress: Callable[[str], None]
) -> dict[str, Any]:
    ours: list[float] = []
    theirs: list[float] = []
    for turn in range(pairs):
        progress(f"{case.name}: pair {turn + 1} of {pairs}")
        _, prefill, decode = generate_once(model, case.prompt, case.generate + 1)
        ours.append(decode / case.generate if case.decode else prefill)
        theirs.append(peer.measure(case))
    ratios = [their / our for our, their in zip(ours, theirs, strict=True)]
    tokens = 1 if case.decode else case.prompt
    return case._asdict() | {
        "ours": spread(ours) | {"tokens_per_s": tokens / median(ours)},
        "llama_cpp": spread(theirs) | {"tokens_per_s": tokens / median(theirs)},
        "speedup": median(ratios),
        "speedup_samples": ratios,
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "of unknown version"


def peers_table(result: dict[str, Any]) -> str:
    """Return the record as text."""
    lines = [
        f"{result['spec']}, {result['layers']} layers, {result['format']},"
        f" {result['threads']} threads, {result['machine']['simd_level']}; {result['peer']}",
        f"{'':<20}{'ours':>10}{'llama.cpp':>12}   tokens/s{'speedup':>12}",
    ]
    for row in result["results"]:
        spread_of = row["speedup_samples"]
        lines.append(
            f"{row['name']:<20}{row['ours']['tokens_per_s']:>10.1f}"
            f"{row['llama_cpp']['tokens_per_s']:>12.1f}{row['speedup']:>20.2f}x"
            f" ({min(spread_of):.2f} to {max(spread_of):.2f})"
        )
    return "\n".join(lines)
