"""A loaded model whose parts are timed whenever it generates.

In transformers' code hooks tell the parts apart. Where the fast path fits, a single token's layers
are one compiled call, whose own clock is read (:mod:`hybrid.ledger.alone`).
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from hybrid import grafts
from hybrid.anatomy.names import FEED_FORWARDS, SHARED_EXPERTS, SHARED_GATE
from hybrid.errors import UsageError
from hybrid.fast.decode import FastDecoder
from hybrid.fast.prompt import PIECE
from hybrid.ledger.alone import step_times, token_times
from hybrid.loop.loop import Loop
from hybrid.measure.terms_of_step import Part, Pass, in_modules, single_tokens, totals
from hybrid.packed.experts import experts_of
from hybrid.stopwatch import Stopwatch
from planner.cost.step_times import StepTimes
from planner.describe.model import Layer, ModelSpec
from planner.describe.terms import CPU, DENSE, HEAD, MIXER

_PAGE = 4096
SETTLING = 2
"""Steps after a prompt that are not counted: the cache changes its layout in the first."""
DRAWING = {"do_sample": True, "temperature": 0.7, "top_k": 50, "top_p": 0.95}
"""How tokens are drawn: with all that most models' settings ask for."""

_LAYER = "layer"
"""A decoder layer as a whole, of which attention and router are what is left."""


class Passes:
    """A streamer that cuts a generation into passes; the first is the prompt's.

    Parameters
    ----------
    take
        Makes a pass of its seconds, and forgets what its parts took.
    write
        Called for every token.
    """

    def __init__(self, take: Callable[[float], Pass], write: Callable[[], object] = lambda: None):
        self.found: list[Pass] = []
        self._take, self._write = take, write
        self._prompted = False
        self._last_s = time.perf_counter()

    def put(self, value: Any) -> None:
        """Note that a pass has ended; what comes first is the prompt itself."""
        if not self._prompted:
            self._prompted = True
            self._take(0.0)
            return
        self._write()
        self.found.append(self._take(time.perf_counter() - self._last_s))
        self._last_s = time.perf_counter()

    def end(self) -> None:
        """Do nothing: the last token was put."""


def generate(
    network: Any, prompt: int, new_tokens: int, passes: Passes, **options: Any
) -> list[Pass]:
    """Generate after a random prompt as a session does; ``options`` go to ``generate()``."""
    vocabulary, draw = network.config.get_text_config().vocab_size, torch.Generator().manual_seed(1)
    ids = torch.randint(0, vocabulary, (1, prompt), generator=draw).to(network.device)
    network.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        streamer=passes,
        custom_generate=Loop(passes),
        **{"do_sample": False, **options},
    )
    return passes.found


class Timed:
    """A loaded model whose parts are timed whenever it generates; for nothing else from then on.

    Parameters
    ----------
    network
        A transformers model of this package, on the CPU.
    model
        What it is, or what it is the first layers of.

    Attributes
    ----------
    layers
        Those of ``model`` that are there.
    scale
        How many times as large the head of ``model`` is.
    """

    def __init__(self, network: Any, model: ModelSpec) -> None:
        self.network, self.model = network, model
        fast = grafts.fast_path_of(network)
        fast.past_hooks = True
        network.generation_config.eos_token_id = None
        network.generation_config.pad_token_id = 0
        self.scale = model.vocab / int(network.config.get_text_config().vocab_size)
        modules = network.get_decoder().layers
        self.layers: tuple[Layer, ...] = model.layers[: len(modules)]
        self._watches: defaultdict[tuple[str, int], list[Stopwatch]] = defaultdict(list)
        for index, module in enumerate(modules):
            self._watch(module, (_LAYER, index))
            for part in _beside_attention(module):
                experts_too = grafts.runner_of(part) is not None
                self._watch(part, (CPU if experts_too else DENSE, index))
        self._watch(network.get_output_embeddings(), (HEAD, 0))
        for runner in experts_of(network):  # so that no call is the first to use a page
            runner.blocks[:, ::_PAGE].sum()
        self.fast: FastDecoder | None = fast.decoder
        if self.fast is not None and self.scale > 1:
            grafts.hook_after(network, self._widen, "a token's logits are as many as of the model")

    def passes(self, write: Callable[[], object] = lambda: None) -> Passes:
        """Return what cuts the next generation into passes; ``write`` is called for every token."""
        return Passes(self._take, write)

    def _take(self, whole_s: float) -> Pass:
        """Read the clocks of a pass and set them to zero."""
        fast = self.fast
        if fast is not None and fast.watch.pieces + fast.step_watch.pieces:
            times = token_times(fast) if fast.watch.pieces else step_times(fast)
            if times is None:
                raise UsageError(
                    "the clock of this processor cannot be read by compiled code",
                    hint="use hybrid without a calibration: only predictions need one",
                )
        else:
            times = StepTimes(
                tuple(map(self._layer, range(len(self.layers)))), {HEAD: self._seconds(HEAD)}
            )
        for watches in self._watches.values():
            for watch in watches:
                watch.reset()
        if self.fast is not None:
            self.fast.begin_run()
        return Pass(whole_s, times)

    def _layer(self, index: int) -> dict[str, float]:
        """What transformers' code took in a layer."""
        experts_s, beside_s = self._seconds(CPU, index), self._seconds(DENSE, index)
        attention_s = max(0.0, self._seconds(_LAYER, index) - beside_s - experts_s)
        return {MIXER: attention_s, CPU: experts_s, DENSE: beside_s}

    def _widen(self, network: Any, arguments: Any, output: Any) -> None:
        """Give a token of the kernels as many logits as the model that is stood for has.

        Choosing among them takes as long as there are many.
        """
        if self.fast is not None and self.fast.watch.pieces:
            own = output.logits
            never = torch.finfo(own.dtype).min
            output.logits = own.new_full((*own.shape[:-1], self.model.vocab), never)
            output.logits[..., : own.shape[-1]] = own

    def generate(self, prompt: int, new_tokens: int, **options: Any) -> list[Pass]:
        """Generate after a random prompt; the first pass is the prompt's.

        ``options`` go to ``generate()``.
        """
        return generate(self.network, prompt, new_tokens, self.passes(), **options)

    def parts(self, runs: Mapping[int, list[list[Pass]]]) -> Iterator[Part]:
        """Turn generations into parts.

        Parameters
        ----------
        runs
            For every length of the prompt what :meth:`generate` returned, once or repeatedly.
        """
        steps: dict[int, list[Pass]] = {}
        for prompt, passes in runs.items():
            prompts = [run[0] for run in passes]
            piece = PIECE if self.fast else 0
            yield from in_modules(
                self.model, self.layers, self.scale, prompts, prompt, prompt, piece
            )
            # The steps' contexts differ by a few tokens; their middle stands for all.
            context = prompt + 1 + (SETTLING + len(passes[0])) // 2
            if decoded := [step for run in passes for step in run[1 + SETTLING :]]:
                steps[context] = decoded
        if self.fast is not None and steps:
            yield from single_tokens(self.model, self.layers, self.scale, steps)
        else:
            for context, decoded in steps.items():
                yield from in_modules(self.model, self.layers, self.scale, decoded, 1, context)

    def terms(self, runs: Sequence[list[Pass]], prompt: int) -> tuple[dict[str, float], ...]:
        """Return what the prompt and what a single token consisted of, by the planner's names.

        Parameters
        ----------
        runs
            What :meth:`generate` returned for a ``prompt`` of several tokens.
        """
        parts = list(self.parts({prompt: list(runs)}))
        first = [run[0] for run in runs]
        later = [step for run in runs for step in run[1 + SETTLING :]]
        return tuple(
            totals(self.model, self.layers, passes, [p for p in parts if p.tokens == tokens])
            for passes, tokens in ((first, prompt), (later, 1))
        )

    def _seconds(self, part: str, index: int = 0) -> float:
        """Return what a part took since the last pass."""
        return sum(watch.seconds for watch in self._watches[part, index])

    def _watch(self, module: Any, key: tuple[str, int]) -> None:
        """Note what a module takes whenever transformers' code calls it."""
        watch = Stopwatch()
        self._watches[key].append(watch)

        def before(*_: Any) -> None:
            watch.start()

        def after(*_: Any) -> None:
            watch.stop()

        grafts.hook_before(module, before, "a part is timed: its start")
        grafts.hook_after(module, after, "a part is timed: its end")


def _beside_attention(layer: Any) -> Iterator[Any]:
    """The modules of a decoder layer that are experts, shared experts or a dense MLP."""
    experts = [name for name, part in layer.named_modules() if grafts.runner_of(part) is not None]
    if not experts:
        yield from (getattr(layer, name) for name in FEED_FORWARDS if hasattr(layer, name))
        return
    for path in experts:
        yield layer.get_submodule(path)
    blocks = {layer, *(layer.get_submodule(path.rpartition(".")[0]) for path in experts)}
    for block in blocks:
        for name in (*SHARED_EXPERTS, SHARED_GATE):
            if isinstance(getattr(block, name, None), torch.nn.Module):
                yield getattr(block, name)
