"""``hybrid bench peers``: the same shape through this runtime, llama.cpp and transformers.

llama.cpp holds random weights, every matrix in q4_0 as ours are; transformers holds bfloat16,
of fewer layers, which we then run as few of. All run the same number of tokens on the same
number of threads. llama.cpp runs in a process of its own, with the environment it would have
without us. Two take turns, and ratios are taken between neighbours in time, because the
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
from typing import Any, NamedTuple, Protocol

import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from hybrid import host
from hybrid.arguments.dtypes import check_dtype
from hybrid.bench.kernels import read_seconds
from hybrid.bench.model import bytes_per_token, generate_once, memory_to_read, read_spec
from hybrid.bench.random_model import write_random_model
from hybrid.bench.record import Told, provenance, spread, untold
from hybrid.errors import HybridError, UsageError
from hybrid.loading import load_fast_model, set_threads
from hybrid.transformers_api import cache_argument

_PLAIN = "transformers, bfloat16"


class Case(NamedTuple):
    """One comparison: what is timed is the prompt, or the tokens after it.

    With ``again`` the prompt stays in the cache from one turn to the next.
    """

    name: str
    prompt: int
    generate: int
    decode: bool
    again: bool = False


CASES = (
    Case("decode", 32, 64, True),
    Case("prefill of 512", 512, 1, False),
    Case("prefill of 32", 32, 1, False),
)


def long_case(context: int) -> Case:
    """Decoding with ``context`` tokens in the cache."""
    return Case(f"decode after {context}", context, 32, True, again=True)


class Peer(Protocol):
    """What is compared with."""

    name: str

    def measure(self, case: Case) -> float:
        """Return the seconds of the prompt, or of one token after it."""
        ...


class InProcess:
    """A model of transformers, with our fast path or without.

    Where a prompt stays in the cache, it is not computed at all: keys and values are random,
    and what they are does not change the time of a token.
    """

    def __init__(self, model: Any, name: str) -> None:
        self.name = name
        self._model = model
        self._words = memory_to_read(model) if hasattr(model, "hybrid_store") else None
        self._held: tuple[int, Any] | None = None

    def measure(self, case: Case) -> float:
        """Return the seconds of the prompt, or of one token after it."""
        if not case.again:
            _, prefill, decode = generate_once(self._model, case.prompt, case.generate + 1)
            return decode / case.generate if case.decode else prefill
        if self._held is None or self._held[0] != case.prompt:
            self._held = (case.prompt, _random_cache(self._model, case.prompt))
        cache = self._held[1]
        # The first token brings the cache into the layout of those that are timed.
        _, _, decode = generate_once(
            self._model, case.prompt + 1, case.generate + 1, **cache_argument(cache)
        )
        cache.crop(case.prompt - cache.get_seq_length())
        return decode / case.generate

    def least_s(self, case: Case, threads: int) -> float | None:
        """Seconds to read once what a token of ``case`` reads; None where that is not known."""
        per_token = bytes_per_token(self._model, case.prompt + case.generate / 2)
        if per_token is None or self._words is None or not case.decode:
            return None
        return per_token / self._words.nbytes * read_seconds(self._words, threads)


@torch.no_grad()
def _random_cache(model: Any, tokens: int) -> Any:
    """A cache of ``tokens`` positions, as large as the model's own would be."""
    cache = DynamicCache(config=model.config)
    ids = torch.zeros(1, 1, dtype=torch.long)
    model(input_ids=ids, use_cache=True, **cache_argument(cache))
    layers: list[Any] = cache.layers
    for index, layer in enumerate(layers):
        _, heads, _, dim = layer.keys.shape
        shape, dtype = (1, heads, tokens - 1, dim), layer.keys.dtype
        cache.update(torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype), index)
    return cache


class LlamaCpp:
    """llama.cpp in a child process, see :mod:`hybrid.bench.llama_worker`."""

    name = "llama.cpp"

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.load_s: float = self._answer()["load_s"]

    def measure(self, case: Case) -> float:
        """Return the seconds of the prompt, or of one token after it."""
        request = {"prompt": case.prompt, "generate": case.generate, "again": case.again}
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
            start_new_session=True,  # Ctrl-C is for us, who end it
        ) as process:
            try:
                yield LlamaCpp(process)
            finally:
                process.kill()


def run(
    spec: str | Path,
    *,
    layers: int | None = 12,
    vocabulary: int | None = 32000,
    context: int | None = None,
    plain_layers: int = 2,
    repeat: int = 5,
    threads: int | None = None,
    dtype: str = "auto",
    progress: Callable[[str], None] = lambda text: None,
    finished: Told = untold,
) -> dict[str, Any]:
    """Compare with llama.cpp and with transformers on the shape of ``spec``.

    Parameters
    ----------
    spec, layers, vocabulary
        A Qwen3-MoE shape, named as for ``hybrid plan``, and how many layers and tokens instead of
        its own.
    context
        Also decode with this many tokens in the cache; llama.cpp computes them once.
    plain_layers
        Layers of the comparison with transformers, whose weights in bfloat16 are four times the
        size; 0 to leave it out.
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
    Decoding beside llama.cpp has ``least_s`` too, what reading a token's weights and cache once
    takes, measured with every pair, and ``most_speedup``, the peer's time over that: no program
    that reads the same bytes can be faster than that. A side that was faster is the measure.

    Raises
    ------
    UsageError
        When llama-cpp-python or gguf is not installed, or for another family.
    """
    check_dtype(dtype)
    _require_packages()
    from hybrid.bench.gguf_model import require_qwen3

    threads = host.default_threads() if threads is None else threads
    set_threads(threads)
    name, settings = read_spec(spec, layers)
    require_qwen3(settings)
    made_for = settings.get("max_position_embeddings")
    if context is not None and made_for is not None and context > made_for:
        raise UsageError(
            f"--context {context} is asked for, {name} was made for {made_for}",
            hint=f"give {made_for} or less",
        )
    if vocabulary is not None:
        settings["vocab_size"] = vocabulary
    cases = list(CASES) if context is None else [*CASES, long_case(context)]
    longest = max(case.prompt + case.generate for case in cases) + 8
    results: list[dict[str, Any]] = []
    record = provenance("hybrid bench peers", threads) | {
        "spec": name,
        "layers": settings["num_hidden_layers"],
        "vocabulary": settings["vocab_size"],
        "format": "q4_0",
        "dtype": None,
        "decode_path": None,
        "peers": {
            LlamaCpp.name: f"llama-cpp-python {_version('llama-cpp-python')}",
            _PLAIN: f"transformers {_version('transformers')}",
        },
        "results": results,
    }

    def keep(row: dict[str, Any]) -> None:
        results.append(row)
        finished(record, _in_words(row))

    with (
        _ours(settings, dtype, progress) as ours,
        _llama_cpp(settings, threads, longest) as llama,
    ):
        record |= {"dtype": ours.dtype, "decode_path": str(ours.path)}
        for side in (ours.model, llama):
            side.measure(Case("", 32, 4, True))
        for case in cases:
            keep(_compare(ours.model, llama, case, repeat, progress, threads))
    if plain_layers:
        few = settings | {"num_hidden_layers": plain_layers}
        with _ours(few, dtype, progress) as ours:
            plain = _plain(few)
            for side in (ours.model, plain):
                side.measure(Case("", 32, 4, True))
            for case in CASES:
                row = _compare(ours.model, plain, case, repeat, progress)
                keep(row | {"layers": plain_layers})
    return record


def _require_packages() -> None:
    """Refuse to begin without what the comparison needs."""
    needed = {"llama_cpp": "llama-cpp-python", "gguf": "gguf"}
    missing = [package for module, package in needed.items() if find_spec(module) is None]
    if missing:
        raise UsageError(
            f"the comparison with llama.cpp needs {' and '.join(missing)}, not installed here",
            hint=f"pip install {' '.join(missing)}",
        )


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
    with tempfile.TemporaryDirectory(prefix="hybrid-bench-") as folder:
        progress(f"writing random weights of {settings['num_hidden_layers']} layers")
        write_random_model(settings, Path(folder), experts="q4_0", dense="q4_0")
        model, _ = load_fast_model(folder, dtype=dtype)
        computed_in = str(model.dtype).removeprefix("torch.")
        yield _Ours(InProcess(model, "ours"), model.hybrid_fast.path, computed_in)


def _plain(settings: dict[str, Any]) -> InProcess:
    """transformers' own model in bfloat16: random routers, else one number a matrix."""
    config = AutoConfig.for_model(**settings)
    auto: Any = AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(config, dtype=torch.bfloat16)
    model = model.to_empty(device="cpu").eval()
    for name, parameter in model.named_parameters():
        if name.endswith("mlp.gate.weight"):
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        else:
            torch.nn.init.constant_(parameter, 1.0 if parameter.ndim == 1 else 0.003)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return InProcess(model, _PLAIN)


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


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "of unknown version"


def peers_table(result: dict[str, Any]) -> str:
    """Return the record as text."""
    lines = [
        f"{result['spec']}, {result['layers']} layers, {result['format']}"
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
    return "\n".join(lines)
