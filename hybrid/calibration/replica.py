"""A few layers of a model with random weights, run and timed part by part.

The replica is loaded and generates as the model itself would, so that what is measured is what
runs: which path a single token takes, which code attends, what surrounds the layers. In
transformers' code hooks tell the parts apart. Where the fast path fits, a single token's layers
are one compiled call; there the parts are the differences between that call and others that leave
something out, all of them in the same generation, taking turns.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import torch

from cpu_experts.decoder import Decoder
from cpu_experts.formats import TILE, packed_bytes
from cpu_experts.layers import Matrix
from hybrid.bench.random_model import check_room, first_layers, write_random_model
from hybrid.calibration.parts import (
    ALONE,
    NO_HEAD,
    NO_SHARED,
    OTHER_TOP_K,
    WHOLE,
    Part,
    Pass,
    aside,
    compiled,
    in_modules,
)
from hybrid.demo import demo_path
from hybrid.fast.decoder_parts import read_norm
from hybrid.fast.prompt import PIECE
from hybrid.loading import load_fast_model, load_tokenizer
from hybrid.textstream import TextStream
from planner.cost import weight_bytes
from planner.model import Layer, ModelSpec

ROWS = 32768
"""Tokens of the replica's vocabulary at most: a larger head takes longer in proportion."""
_TOKEN_BYTES = 160 << 20
"""Weights that a token reads, so that they come from memory and not from a cache."""
_STORE_BYTES = 3 << 29
"""Experts of the replica at most, where more layers are not needed to have every kind."""
_PAGE = 4096
_SHARED = ("shared_expert", "shared_experts", "shared_mlp", "shared_expert_gate")
_PLAIN = ("mlp", "feed_forward", "ffn", "block_sparse_moe")
_DRAWING = {"do_sample": True, "temperature": 0.7, "top_k": 50, "top_p": 0.95}
"""How tokens are drawn: with all that most models' settings ask for."""
_TEXT = "for name, value in sorted(settings.items()):\n    print(name, value)\n"
"""What is written, again and again: how long that takes depends on the text but little."""
_SETTLING = 2
"""Steps after a prompt that are not counted: the cache changes its layout in the first."""


def shortened(
    settings: Mapping[str, Any], model: ModelSpec, experts: str, dense: str
) -> dict[str, Any]:
    """Return the ``config.json`` of a replica: the first layers, ``ROWS`` tokens at most.

    As many layers as it takes to have every kind of them and to read ``_TOKEN_BYTES`` a token.
    """
    shape, missing = model.experts, set(model.layers)
    each = weight_bytes(shape.params_each, experts)
    token = store = moe = kept = 0
    for layer in model.layers:
        kept += 1
        missing.discard(layer)
        moe += layer.moe
        token += weight_bytes(layer.mixer.params + layer.ffn_params, dense)
        token += layer.moe * shape.top_k * each
        store += layer.moe * shape.count * each
        enough = token >= _TOKEN_BYTES or store + shape.count * each > _STORE_BYTES
        if not missing and moe > 1 and enough:
            break
    short = first_layers(settings, len(model.layers), kept)
    return short | {"vocab_size": min(model.vocab, ROWS)}


class Recorder:
    """A streamer that cuts a generation into passes; others note what their parts took."""

    def __init__(self, write: Callable[[], object] = lambda: None) -> None:
        self.passes: list[Pass] = []
        self._write = write
        self.spans: defaultdict[tuple[str, int], float] = defaultdict(float)
        self._prompted = False
        self._last_s = time.perf_counter()

    def put(self, value: Any) -> None:
        """Note that a pass has ended; what comes first is the prompt itself."""
        if not self._prompted:
            self._prompted = True
            self.spans.clear()
            return
        self._write()
        self.passes.append(Pass(time.perf_counter() - self._last_s, dict(self.spans)))
        self.spans.clear()
        self._last_s = time.perf_counter()

    def end(self) -> None:
        """Do nothing: the last token was put."""


class Replica:
    """A loaded replica of ``model`` whose parts are timed whenever it generates.

    Parameters
    ----------
    model
        What it stands for.
    settings
        The ``config.json`` of :func:`shortened`.
    folder
        Where its files are written.
    experts, dense
        Weight formats.

    Raises
    ------
    DiskSpaceError
        When there is no room for them.
    """

    def __init__(
        self, model: ModelSpec, settings: dict[str, Any], folder: Path, experts: str, dense: str
    ) -> None:
        check_room(settings, folder, experts, dense)
        write_random_model(settings, folder, experts=experts, dense=dense)
        self.network, _ = load_fast_model(folder)
        self.network.hybrid_fast.past_hooks = True
        self.network.generation_config.eos_token_id = None
        self.network.generation_config.pad_token_id = 0
        self.model = model
        self.vocab = int(settings["vocab_size"])
        self._tokenizer = load_tokenizer(demo_path())
        modules = self.network.get_decoder().layers
        self.layers: tuple[Layer, ...] = model.layers[: len(modules)]
        self._shares = defaultdict[tuple[str, int], list[float]](list)
        self._recorder = Recorder()
        for index, module in enumerate(modules):
            self._watch(module, ("layer", index))
            for part in _beside_attention(module):
                experts_too = hasattr(part, "hybrid_experts")
                self._watch(part, ("experts" if experts_too else "feed_forward", index))
        self._watch(self.network.get_output_embeddings(), ("head", 0))
        for runner in self.runners():  # so that no call is the first to use a page
            runner.blocks[:, ::_PAGE].sum()
        self.fast = self.network.hybrid_fast.decoder
        if self.fast is not None:
            self.fast.decoder = _Turns(self.fast.decoder, self.network, self)

    def runners(self) -> list[Any]:
        """Each MoE layer's experts, callable as transformers calls them."""
        found = (getattr(part, "hybrid_experts", None) for part in self.network.modules())
        return [experts for experts in found if experts is not None]

    def note(self, key: tuple[str, int], seconds: float) -> None:
        """Add to a part's time in the present pass."""
        self._recorder.spans[key] += seconds

    def generate(
        self, prompt: int, new_tokens: int, *, draw: bool = False, write: bool = False
    ) -> list[Pass]:
        """Generate after a random prompt, the likeliest tokens or drawn ones; also write them.

        The first pass is the prompt's.
        """
        ids = torch.randint(0, self.vocab, (1, prompt), generator=torch.Generator().manual_seed(1))
        self._recorder = Recorder(self._writer()) if write else Recorder()
        self.network.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            streamer=self._recorder,
            **(_DRAWING if draw else {"do_sample": False}),
        )
        return self._recorder.passes

    def _writer(self) -> Callable[[], object]:
        """Something that writes a token at every call."""
        stream = TextStream(self._tokenizer)
        ids = cycle(self._tokenizer(_TEXT)["input_ids"])
        return lambda: stream.put([next(ids)])

    def _watch(self, module: Any, key: tuple[str, int]) -> None:
        """Note what a module takes whenever transformers' code calls it."""
        started_s: list[float] = []

        def before(*_: Any) -> None:
            started_s.append(time.perf_counter())

        def after(*_: Any) -> None:
            self.note(key, time.perf_counter() - started_s.pop())

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)

    def asides(self, new_tokens: int, turns: int) -> Iterator[Part]:
        """Generate with and without drawing and writing; the first turn does not count."""

        def steps(**asked: bool) -> list[Pass]:
            return self.generate(_SETTLING, new_tokens, **asked)[1 + _SETTLING :]

        found = [(steps(), steps(draw=True), steps(write=True)) for _ in range(1 + turns)][1:]
        scale = self.model.vocab / self.vocab
        yield aside("sampling", self.model, scale, [(plain, drawn) for plain, drawn, _ in found])
        yield aside("text", self.model, 1.0, [(plain, written) for plain, _, written in found])

    def parts(self, runs: Mapping[int, list[list[Pass]]]) -> Iterator[Part]:
        """Turn generations into parts.

        Parameters
        ----------
        runs
            For every length of the prompt what :meth:`generate` returned, once or repeatedly.
        """
        scale = self.model.vocab / self.vocab
        steps: dict[int, list[Pass]] = {}
        for prompt, passes in runs.items():
            prompts = [run[0] for run in passes]
            yield from in_modules(
                self.model, self.layers, scale, prompts, prompt, prompt, PIECE if self.fast else 0
            )
            # The steps' contexts differ by a few tokens; their middle stands for all.
            context = prompt + 1 + (_SETTLING + len(passes[0])) // 2
            if decoded := [step for run in passes for step in run[1 + _SETTLING :]]:
                steps[context] = decoded
        if self.fast is not None and steps:
            top_k = self.fast.decoder.top_k
            yield from compiled(self.model, self.layers, scale, steps, top_k)
        else:
            for context, decoded in steps.items():
                yield from in_modules(self.model, self.layers, scale, decoded, 1, context)


def _beside_attention(layer: Any) -> Iterator[Any]:
    """The modules of a decoder layer that are experts, shared experts or a dense MLP."""
    experts = [name for name, part in layer.named_modules() if hasattr(part, "hybrid_experts")]
    if not experts:
        yield from (getattr(layer, name) for name in _PLAIN if hasattr(layer, name))
        return
    for path in experts:
        yield layer.get_submodule(path)
    blocks = {layer, *(layer.get_submodule(path.rpartition(".")[0]) for path in experts)}
    for block in blocks:
        for name in _SHARED:
            if isinstance(getattr(block, name, None), torch.nn.Module):
                yield getattr(block, name)


class _Turns:
    """Stands in for a decoder: its steps take turns among the whole and what leaves something out.

    Attributes
    ----------
    names
        The variants, in turn.
    top_k
        Experts a token has in the variant with another number of them.
    """

    def __init__(self, decoder: Decoder, network: Any, replica: Replica) -> None:
        self._decoder, self._replica = decoder, replica
        top_k = replica.model.experts.top_k
        variants = {WHOLE: decoder, NO_HEAD: _variant(decoder, network, rows=TILE)}
        self.top_k = max(1, top_k // 2) if top_k > 1 else 2
        variants[OTHER_TOP_K] = _variant(decoder, network, top_k=self.top_k)
        if any(layer.shared is not None and layer.router for layer in decoder.layers):
            variants[NO_SHARED] = _variant(decoder, network, shared=False)
        self.names = tuple(variants)
        self._several_kinds = len(set(replica.layers)) > 1
        self._next = cycle(variants.items())

    def step(self, x: Any, cos: Any, sin: Any, cache: Any, logits: Any) -> None:
        """Compute a token with the variant whose turn it is."""
        name, decoder = next(self._next)
        logits.fill(0)
        start_s = time.perf_counter()
        decoder.step(x, cos, sin, cache, logits[: decoder.vocabulary])
        self._replica.note((name, 0), time.perf_counter() - start_s)
        if name == NO_HEAD and self._several_kinds:
            for index in range(len(decoder.layers)):
                start_s = time.perf_counter()
                decoder.layer_step(index, x, cos, sin, cache)
                self._replica.note((ALONE, index), time.perf_counter() - start_s)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._decoder, name)


def _variant(
    decoder: Decoder,
    network: Any,
    *,
    top_k: int | None = None,
    shared: bool = True,
    rows: int | None = None,
) -> Decoder:
    """The same decoder with another ``top_k``, without shared experts, or with a shorter head."""
    head = network.get_output_embeddings()
    rows = head.rows if rows is None else rows
    weight = head.packed.numpy()[: packed_bytes(rows, head.cols, head.weight_format)]
    layers = []
    for layer in decoder.layers:
        if layer.router is not None and top_k is not None:
            layer = replace(layer, router=replace(layer.router, top_k=top_k))
        if layer.router is not None and not shared:
            layer = replace(layer, shared=None)
        layers.append(layer)
    matrix = Matrix(weight=weight, rows=rows, cols=head.cols, format=head.weight_format)
    return Decoder(layers, norm=read_norm(network.get_decoder().norm), lm_head=matrix)
