"""Opens the models that ``hybrid bench peers`` compares: transformers', ours and llama.cpp's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from hybrid.bench.cases import Case
from hybrid.bench.model import bytes_per_token, generate_once, memory_to_read
from hybrid.formats.errors import HybridError
from hybrid.grafts import store_of
from hybrid.measure.reads import read_seconds
from hybrid.transformers_api import cache_argument

PLAIN_RANDOM = "transformers, bfloat16"


class InProcess:
    """A model of transformers, with our fast path or without.

    Where a prompt stays in the cache, it is not computed at all: keys and values are random,
    and what they are does not change the time of a token.
    """

    def __init__(self, model: Any, name: str) -> None:
        self.name = name
        self.about = f"transformers {_version('transformers')}"
        self.model = model
        self._words = memory_to_read(model) if store_of(model) is not None else None
        self._held: tuple[int, Any] | None = None

    def measure(self, case: Case) -> float:
        """Return the seconds of the prompt, or of one token after it."""
        if not case.again:
            _, prefill, decode = generate_once(self.model, case.prompt, case.generate + 1)
            return decode / case.generate if case.decode else prefill
        if self._held is None or self._held[0] != case.prompt:
            self._held = (case.prompt, _random_cache(self.model, case.prompt))
        cache = self._held[1]
        # The first token brings the cache into the layout of those that are timed.
        _, _, decode = generate_once(
            self.model, case.prompt + 1, case.generate + 1, **cache_argument(cache)
        )
        cache.crop(case.prompt - cache.get_seq_length())
        return decode / case.generate

    def least_s(self, case: Case, threads: int) -> float | None:
        """Seconds to read once what a token of ``case`` reads; None where that is not known."""
        per_token = bytes_per_token(self.model, case.prompt + case.generate / 2)
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
        self.about = f"llama-cpp-python {_version('llama-cpp-python')}"
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
def llama_cpp(path: Path, threads: int, context: int) -> Iterator[LlamaCpp]:
    """Hold a GGUF file in llama-cpp-python, in a process of its own."""
    environment = {k: v for k, v in os.environ.items() if k != "GOMP_SPINCOUNT"}
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


def plain_checkpoint(path: Path, dtype: str) -> InProcess:
    """transformers' own model of a checkpoint, as who has nothing else would load it."""
    auto: Any = AutoModelForCausalLM
    model = auto.from_pretrained(path, dtype=getattr(torch, dtype), local_files_only=True)
    return InProcess(model, f"transformers, {dtype}")


def plain_random(settings: dict[str, Any]) -> InProcess:
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
    return InProcess(model, PLAIN_RANDOM)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "of unknown version"
