"""Measures a whole model's load, prefill and decode (``hybrid bench model``).

Every repeat is one ``generate()`` of random tokens with a streaming read of memory beside it,
so that rates and bandwidth are neighbours in time on a machine whose speed drifts.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hybrid.ask.asked_model import find_model
from hybrid.ask.counts import whole_number
from hybrid.ask.dtypes import check_dtype
from hybrid.bench.record import Told, provenance, spread, untold
from hybrid.demo import demo_path
from hybrid.errors import UsageError
from hybrid.grafts import store_of
from hybrid.ledger.alone import begin_run, prompt_loads
from hybrid.ledger.metrics import Term
from hybrid.ledger.prediction import Prediction, computes_otherwise, predicted
from hybrid.ledger.residual import DECODE, PREFILL
from hybrid.loading import load_fast_model, set_threads
from hybrid.loop.loop import Loop
from hybrid.machine import calibrations, host
from hybrid.machine.calibrations import Identity
from hybrid.machine.compute_dtype import automatic_dtype
from hybrid.machine.coverage import Coverage
from hybrid.measure.alone import Timed
from hybrid.measure.interference import Others
from hybrid.measure.reads import read_seconds, shares_of_bandwidth
from hybrid.model import Model
from hybrid.paths import temporary_folder

#: Memory that the streaming read goes over: the store's own pages where they are this many.
_READ_BYTES = 1 << 30
_HALF_BYTES = 2  # of a key or value in the cache
#: New tokens, and generations, of those whose parts are timed.
_TIMED_TOKENS, _TIMED_RUNS = 51, 2


class _Clock:
    """A streamer that notes when tokens come; the prompt comes first."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def read_spec(spec: str | Path, layers: int | None) -> tuple[str, dict[str, Any], int | None]:
    """Return a model's name, its ``config.json`` with other many layers if given, its context.

    Parameters
    ----------
    spec
        A shipped name or a file, as for ``hybrid plan``.
    layers
        How many instead of its own.

    Raises
    ------
    UsageError, PlannerError
        When there is no such model, or it cannot be read.
    """
    found = find_model(spec)
    name, settings = found.spec.name, found.config
    settings.pop("quantization_config", None)  # random weights are in the formats asked for
    if layers is not None:
        most = settings.get("num_hidden_layers", layers)
        whole_number(layers, "--layers", most=most, hint=f"the shape of {name} has {most}")
        settings["num_hidden_layers"] = layers
        if "layer_types" in settings:
            settings["layer_types"] = settings["layer_types"][:layers]
    return name, settings, found.spec.context


def run(
    model: str | None = None,
    *,
    spec: str | Path | None = None,
    layers: int | None = None,
    vocabulary: int | None = None,
    experts: str = "q4_0",
    dense: str | None = "q4_0",
    prompt: int = 512,
    generate: int = 64,
    repeat: int = 5,
    threads: int | None = None,
    calibrate: bool = True,
    dtype: str = "auto",
    progress: Callable[[str], None] = lambda text: None,
    finished: Told = untold,
) -> dict[str, Any]:
    """Measure a model directory, or random weights of a described shape.

    Parameters
    ----------
    model
        A directory, or ``"demo"``, the default; exclusive with ``spec``.
    spec, layers, vocabulary
        A shape, named as for ``hybrid plan``, and how many layers and tokens instead of its own.
    experts, dense
        Formats of the random weights; a directory that is converted first takes them too.
    prompt, generate
        Tokens of the prompt, and tokens generated after it.
    calibrate
        Whether to measure this machine with the model's shape and formats first, unless it was
        before, undisturbed; otherwise predictions come from what is there.
    dtype
        What dense layers that are not quantized are computed in: ``"auto"``, ``"float32"`` or
        ``"bfloat16"``. Nothing is predicted of what ``"auto"`` is not here, as no calibration is
        about it.
    progress
        Called with a line about what is done next.
    finished
        Called with the record so far and a line after every repeat.

    Returns
    -------
    One record: prefill and decode (median, quartiles and samples), ``bytes_per_token`` of weights
    and cache, ``read_fraction`` of the bandwidth read beside the repeats or, where tokens read
    faster, of what they reached (never above 1), peak memory, how single
    tokens were computed, which part of the processors' time other programs took meanwhile
    (``disturbed``), and what was ``predicted`` from which ``calibration``, with predicted
    over measured less 1 as ``residuals``, of the whole and of the ``terms``, which are measured
    by themselves after the repeats (all None when this machine was not calibrated).
    ``start`` is of a fresh process on the store, whose pages are in memory by then: seconds to
    import, to load and to the first token, and the most memory in use that no file backs, all the
    way to the end of a text of the same length.
    """
    check_dtype(dtype)
    threads = host.default_threads() if threads is None else threads
    set_threads(threads)
    if spec is None or model is not None:
        model = "demo" if model is None else model
        check_no_shape(model, spec, layers, vocabulary)
        path = demo_path() if model == "demo" else Path(model)
        found = find_model(path)
        _check_length(found.spec.context, prompt, generate)
        if calibrate and dtype in ("auto", automatic_dtype(found.spec)):
            _calibrate(path, None, None, threads, progress)
        return _measure(str(path), dtype, {}, prompt, generate, repeat, threads, progress, finished)
    name, settings, longest = read_spec(spec, layers)
    if vocabulary is not None:
        settings["vocab_size"] = vocabulary
    _check_length(longest, prompt, generate)
    from hybrid.measure.random_model import check_room, write_random_model

    with temporary_folder("bench") as folder:
        described = folder / "config.json"
        described.write_text(json.dumps(settings))
        if calibrate and dtype in ("auto", automatic_dtype(find_model(described).spec)):
            # Before the disk is busy with the weights.
            _calibrate(described, experts, dense, threads, progress)
        needed = check_room(settings, folder, experts, dense)
        progress(f"writing random weights, {needed / 2**30:.2f} GiB")
        write_random_model(settings, folder, experts=experts, dense=dense)
        shape = {"spec": name, "layers": settings["num_hidden_layers"]}
        return _measure(
            str(folder), dtype, shape, prompt, generate, repeat, threads, progress, finished
        )


def check_no_shape(
    model: str, spec: str | Path | None, layers: int | None, vocabulary: int | None
) -> None:
    """Refuse what describes a shape beside a model, which has its own."""
    if spec is not None:
        raise UsageError("give either a model directory or --spec", hint="one of the two")
    for option, value in (("--layers", layers), ("--vocabulary", vocabulary)):
        if value is not None:
            raise UsageError(
                f"{option} {value} is given with {model}, whose own there are",
                hint=f"use it with --spec, or leave {option} out",
            )


def _check_length(longest: int | None, prompt: int, generate: int) -> None:
    """Refuse more tokens than a model was made for."""
    if longest is not None and prompt + generate > longest:
        raise UsageError(
            f"--prompt {prompt} and --generate {generate} make {prompt + generate} tokens, the "
            f"model was made for {longest}",
            hint="give fewer",
        )


def _measure(
    directory: str,
    dtype: str,
    shape: dict[str, Any],
    prompt: int,
    generate: int,
    repeat: int,
    threads: int,
    progress: Callable[[str], None],
    finished: Told,
) -> dict[str, Any]:
    progress("loading")
    model, _ = load_fast_model(directory, dtype=dtype)
    loaded = Model(model)
    words = memory_to_read(model)
    origin = shape | provenance("hybrid bench model", threads)
    origin |= {
        "family": type(model).__name__,
        "experts": loaded.index.experts_format,
        "dense": loaded.index.dense_format or "as in the checkpoint",
        "dtype": str(model.dtype).removeprefix("torch."),
        "decode_path": str(loaded.fast.path),
        "prompt_tokens": prompt,
        "generated_tokens": generate,
    }
    prefills: list[float] = []
    decodes: list[float] = []
    reads: list[float] = []
    begin_run(loaded, prompt)
    generate_once(model, prompt, 2)
    loads = prompt_loads(loaded)
    read_seconds(words, threads)
    others = Others()
    for turn in range(repeat):
        progress(f"run {turn + 1} of {repeat}")
        reads.append(words.nbytes / read_seconds(words, threads))
        generate_once(model, 2, 2)  # the read has emptied the caches, of Python's own code, too
        _, ttft, decode = generate_once(model, prompt, generate)
        prefills.append(ttft)
        decodes.append(decode / (generate - 1))
        finished(
            origin | _times(prompt, prefills, decodes, reads),
            f"run {turn + 1} of {repeat}: prefill {prompt / ttft:.1f} tokens/s, "
            f"decode {1 / decodes[-1]:.1f} tokens/s",
        )
    per_token = bytes_per_token(model, prompt + generate / 2)
    bandwidth, share = median(reads), None
    if per_token is not None:
        (share,), reached = shares_of_bandwidth([per_token / median(decodes)], [bandwidth])
        bandwidth = bandwidth if reached is None else reached
    disturbed = others.lap()
    peak_bytes = host.peak_memory_bytes()
    known = (loads or None) if prompt > 1 else None
    if (otherwise := computes_otherwise(loaded)) is not None:
        progress(f"not predicted: {otherwise}")
    found = predicted(loaded, prompt, generate, threads=threads, loads=known)
    about: dict[str, Any] = dict.fromkeys(("predicted", "calibration", "residuals", "terms"))
    if found is not None:
        progress("timing its parts")
        about = _compared(model, found, prompt, median(prefills), median(decodes), threads)
    progress("starting anew")
    return origin | {
        **_times(prompt, prefills, decodes, reads),
        "bytes_per_token": per_token,
        "disturbed": disturbed,
        "read_bandwidth_bytes_per_s": bandwidth,
        "read_fraction": share,
        "store_bytes": loaded.index.nbytes,
        "peak_memory_bytes": peak_bytes,
        **about,
        "start": _start(directory, dtype, threads, prompt, generate),
    }


def _times(
    prompt: int, prefills: list[float], decodes: list[float], reads: list[float]
) -> dict[str, Any]:
    """Return what a record says of the repeats so far."""
    return {
        "prefill": spread(prefills) | {"tokens_per_s": prompt / median(prefills)},
        "decode": spread(decodes) | {"tokens_per_s": 1 / median(decodes)},
        "read_bandwidth_bytes_per_s": median(reads),
    }


def _calibrate(
    model: Path,
    experts: str | None,
    dense: str | None,
    threads: int,
    progress: Callable[[str], None],
) -> None:
    """Measure this machine with a model's shape, unless it was, in a process of its own.

    The replica's memory is no part of what is measured here.
    """
    wanted = find_model(model, experts, dense)
    known = calibrations.load(Identity.of_this_machine(threads))
    if known is not None:
        found = Coverage.of(known, wanted.spec, wanted.experts, wanted.dense)
        if found.whole and not found.disturbed:
            return
    progress("calibrating this machine")
    words = ["calibrate", str(model), "--device", "cpu", "--threads", str(threads)]
    for option, value in (("--experts", experts), ("--dense", dense)):
        words += [] if value is None else [option, value]
    command = [sys.executable, "-m", "hybrid", *words]
    if subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
        raise UsageError(
            f"this machine could not be calibrated for {wanted.spec.name}",
            hint="--no-calibrate takes the calibration that is there",
        )


def _start(directory: str, dtype: str, threads: int, prompt: int, generate: int) -> dict[str, Any]:
    """What a fresh process takes; see :mod:`hybrid.bench.start_worker`."""
    worker = [sys.executable, "-m", "hybrid.bench.start_worker", directory, dtype]
    done = subprocess.run(
        [*worker, str(threads), str(prompt), str(generate)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        start_new_session=True,  # Ctrl-C is for us, who end it
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _compared(
    model: Any, found: Prediction, prompt: int, ttft_s: float, tpot_s: float, threads: int
) -> dict[str, Any]:
    """Set what the calibration made of the same run beside what was measured.

    From here on the model is good for nothing else: its parts are timed.
    """
    hardware = calibrations.alone(threads)
    assert hardware is not None  # it was predicted from
    timed = Timed(model, Model(model).spec)
    runs = [timed.generate(prompt, _TIMED_TOKENS) for _ in range(_TIMED_RUNS)]
    measured = timed.terms(runs, prompt) if prompt > 1 else ({}, {})
    terms = [
        Term(phase, name, term.value, parts.get(name))
        for phase, predicted, parts in (
            (PREFILL, found.prompt, measured[0]),
            (DECODE, found.token, measured[1]),
        )
        for name, term in predicted.items()
        if term.value or parts.get(name)
    ]
    return {
        "predicted": {
            "ttft_s": found.ttft.value,
            "tpot_s": found.tpot.value,
            "prompt_terms_s": {name: term.value for name, term in found.prompt.items()},
            "token_terms_s": {name: term.value for name, term in found.token.items()},
        },
        "calibration": {
            "machine": hardware.summary,
            "read_bandwidth_bytes_per_s": hardware.cpu.memory_bytes_per_s.value,
            "from": str(found.coverage),
            "disturbed": found.coverage.disturbed,
        },
        "residuals": {
            "ttft": found.ttft.value / ttft_s - 1,
            "tpot": found.tpot.value / tpot_s - 1,
        },
        "terms": [term._asdict() | {"residual": term.residual} for term in terms],
    }


def generate_once(
    model: Any, prompt: int, new_tokens: int, **options: Any
) -> tuple[float, float, float]:
    """Return when a generation began, its TTFT, and seconds from the first token to the last.

    A model of ours generates in the loop that a session takes, any other in transformers'.
    ``options`` go to ``generate()``.
    """
    clock = _Clock()
    if store_of(model) is not None:
        options = {"custom_generate": Loop(clock), **options}
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(0, vocabulary, (1, prompt), generator=torch.Generator().manual_seed(1))
    model.generation_config.eos_token_id = None
    start = time.perf_counter()
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        do_sample=False,
        streamer=clock,
        **options,
    )
    return start, clock.times[1] - start, clock.times[-1] - clock.times[1]


def bytes_per_token(model: Any, context: float) -> int | None:
    """Weights and cache that a decode step reads; None in transformers' own code."""
    fast = Model(model).fast.decoder
    if fast is None:
        return None
    total: float = fast.decoder.bytes_per_token()
    for layer in fast.decoder.layers:
        seen = min(context, layer.window) if layer.window else context
        heads, dim, _ = layer.stored
        total += 2 * _HALF_BYTES * heads * dim * seen
    return int(total)


def memory_to_read(model: Any) -> NDArray[np.uint64]:
    """Memory for streaming reads: the store's own pages where they are enough."""
    store = Model(model).store
    if store.index.nbytes >= _READ_BYTES:
        words: NDArray[np.uint64] = store.pages(_READ_BYTES).view(np.uint64)
        return words
    return np.ones(_READ_BYTES // 8, np.uint64)
