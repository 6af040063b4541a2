"""Measures attention, dense layers and the host where experts are shared with a device.

The model's first layers are put on the device as any model is, half of their experts resident at
most, and generate there. The executor's clock tells the parts apart: from one layer's end to the
next router's answer, from there until the device has its work, and from the last layer's end to
the end of the forward pass. What is left of the time from token to token surrounds the layers.
So a prediction made of these and a run's report mean the same by every term.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
import torch

from gpu_experts.device import Device
from hybrid.fast.attach import DecodePath, FastPath
from hybrid.grafts import set_fast_path
from hybrid.ledger.residual import Phase
from hybrid.ledger.timeline import Timeline
from hybrid.loading import load_fast_model
from hybrid.measure.alone import DRAWING, SETTLING, Passes, generate
from hybrid.measure.terms_of_step import Part, Pass, Planned, parts_of_layer
from hybrid.model import Model
from hybrid.sharing.budget import Budget, fitted
from hybrid.sharing.placement import Placement, place_model
from planner.describe.hardware import HardwareSpec
from planner.describe.model import Layer, ModelSpec
from planner.describe.terms import (
    CALL,
    DECIDING,
    DENSE,
    EXPERTS,
    HANDING,
    HEAD,
    JOINING,
    MIXER,
    SAMPLING,
)

RESIDENT = 0.5
"""Share of the experts that may be resident at most: a device that holds all has less to decide."""
SAMPLES = 5

_Key = tuple[str, str, int]


class UnmeasuredError(Exception):
    """Why a model's dense parts could not be measured on a device."""


class Placed:
    """The first layers of ``model`` on a device, timed whenever they generate.

    Parameters
    ----------
    folder
        Holds those layers, converted.
    model
        What they are the first layers of.
    device
        Opened and, by :meth:`close`, closed.
    hardware
        What was measured of the machine so far, the device included.
    context
        Tokens of cache to keep room for.
    threads
        Of the CPU's kernels.

    Raises
    ------
    UnmeasuredError
        When they cannot share their experts with the device.
    """

    def __init__(
        self,
        folder: Path,
        model: ModelSpec,
        device: Device,
        hardware: HardwareSpec,
        context: int,
        threads: int,
    ) -> None:
        self.model = model
        self._device = device
        self._begun = Counter[tuple[int, bool]]()
        self._timeline = Timeline()
        self.network, _ = load_fast_model(folder, dtype=device.dtype, fast=False)
        path = DecodePath(False, f"shared with {device.name}")
        set_fast_path(self.network, FastPath(path))
        self.network.generation_config.eos_token_id = None
        self.network.generation_config.pad_token_id = 0
        depth = self.network.config.get_text_config().num_hidden_layers
        self.layers = model.layers[:depth]
        self.placement = self._placed(hardware, context, threads)
        self.vocab = int(self.network.config.get_text_config().vocab_size)
        self.dense_format = self.placement.cost.dense_format
        self.family = self.placement.spec.family

    def _placed(self, hardware: HardwareSpec, context: int, threads: int) -> Placement:
        everything = Budget(None, None, context)
        _, most = fitted(Model(self.network), self._device, hardware, everything)
        experts = self.model.experts.count * sum(layer.moe for layer in self.layers)
        spare = max(0, sum(most.slots) - max(1, int(experts * RESIDENT)))
        vram = most.used("vram") - spare * most.slot_bytes
        found = place_model(
            Model(self.network),
            self._device,
            hardware,
            Budget(min(vram, most.vram_bytes), None, context),
            threads=threads,
            timeline=self._timeline,
        )
        if found.executor is None:
            raise UnmeasuredError(next(n.reason for n in found.notes if "on the CPU" in n.what))
        return found

    def generate(self, prompt: int, new_tokens: int, **options: Any) -> list[Pass]:
        """Generate after a random prompt; the first pass is the prompt's.

        Of every length turn and turn about with nothing resident, as a session begins, and with
        what the last generation left. ``options`` go to ``generate()``.

        Raises
        ------
        UnmeasuredError
            When the device failed meanwhile, or a pass was repeated.
        """
        executor = self.placement.executor
        assert executor is not None
        like = prompt, bool(options)
        if self._begun[like] % 2 == 0 and executor.device is not None:
            executor.guard.reopen()
        self._begun[like] += 1
        self.placement.begin_run()
        slots, moe = executor.slot_count, sum(layer.moe for layer in self.layers)
        found = generate(self.network, prompt, new_tokens, Passes(self._take), **options)
        lacking = any(len(one.times.layers) != moe for one in found)
        if executor.device is None or executor.slot_count != slots or lacking:
            notes = [note.reason for note in executor.notes]
            raise UnmeasuredError(notes[-1] if notes else "its passes could not be told apart")
        return found

    def _take(self, whole_s: float) -> Pass:
        """Read the executor's clock of a pass and set it to zero."""
        self._timeline.finish()
        phase = next((p for p in self._timeline.phases.values() if p.steps), Phase())
        self._timeline.restart()
        plans = tuple(Planned(layer.copies, layer.planned_s) for layer in phase.layers)
        return Pass(whole_s, phase.measured, plans)

    def close(self) -> None:
        """Give the device's memory back."""
        if self.placement.executor is not None:
            self.placement.executor.close()
        del self.network

    def parts(self, runs: Mapping[int, Sequence[Sequence[Pass]]]) -> Iterator[Part]:
        """Turn generations into parts.

        Parameters
        ----------
        runs
            For every length of the prompt what :meth:`generate` returned, once or repeatedly.
        """
        head_s, around_s = self._larger_head()
        for prompt, passes in runs.items():
            prompts = [run[0] for run in passes]
            # The steps' contexts differ by a few tokens; their middle stands for all.
            context = prompt + 1 + (SETTLING + len(passes[0])) // 2
            decoded = [step for run in passes for step in run[1 + SETTLING :]]
            for steps, tokens, seen in ((prompts, prompt, prompt), (decoded, 1, context)):
                if steps:
                    beyond = self._beyond(tokens)
                    yield from parts_of(
                        self.model, self.layers, steps, tokens, seen, beyond, head_s, around_s
                    )

    def extras(self, new_tokens: int, turns: int) -> Iterator[Part]:
        """Generate with and without drawing; the first turn does not count."""

        def around(**options: Any) -> list[float]:
            steps = self.generate(SETTLING, new_tokens, **options)[1 + SETTLING :]
            return [max(0.0, step.around_s) for step in steps]

        found = [(around(), around(**DRAWING)) for _ in range(1 + turns)][1:]
        least_s = median(seconds for plain, _ in found for seconds in plain)
        scale = self.model.vocab / self.vocab
        samples = [scale * max(0.0, s - least_s) for _, drawn in found for s in drawn]
        yield Part(SAMPLING, "", self.model.head_params, 1, 1, tuple(samples))

    def _larger_head(self) -> tuple[float, float]:
        """What the whole vocabulary takes more in the forward pass, and after it.

        A device computes the product when the host has gone on.
        """
        head = self.network.get_output_embeddings()
        x = self._random(1)
        found = [self._lasting(lambda: head(x)) for _ in range(1 + SAMPLES)][1:]
        on_host_s, after_s = (median(column) for column in zip(*found, strict=True))
        more = self.model.vocab / self.vocab - 1
        # Where the host computes, it takes longer; handing a larger one to a device does not.
        in_pass_s = on_host_s if self._device.torch_device.type == "cpu" else 0.0
        return more * in_pass_s, more * after_s

    def _beyond(self, tokens: int) -> dict[int, list[float]]:
        """What shared experts take when the router's answer is there, by their weights."""
        shared = self.placement.shared
        moe = [layer for layer in self.layers if layer.moe]
        found = {layer.ffn_params: [0.0] for layer in moe}
        if shared is None:
            return found
        chosen = {moe[number].ffn_params: number for number in shared.layers}
        x = self._random(tokens)
        for params, number in chosen.items():
            samples = [
                self._lasting(lambda at=number: shared.launch(at, x))[1]  # type: ignore[misc]
                for _ in range(1 + SAMPLES)
            ]
            shared.abandon()
            found[params] = samples[1:]
        return found

    def _random(self, tokens: int) -> torch.Tensor:
        hidden = torch.randn(tokens, self.model.hidden)
        return hidden.to(self.network.device, self.network.dtype)

    def _lasting(self, work: Callable[[], object]) -> tuple[float, float]:
        """Seconds that the host takes for ``work``, and that the device goes on beyond that."""
        probe = torch.zeros(1, device=self.network.device)
        with torch.inference_mode():
            self._device.to_host(probe)
            begun_s = time.perf_counter()
            self._device.to_host(probe)
            idle_s = time.perf_counter() - begun_s
            begun_s = time.perf_counter()
            work()
            handed_s = time.perf_counter()
            self._device.to_host(probe)
            ended_s = time.perf_counter()
        return handed_s - begun_s, max(0.0, ended_s - handed_s - idle_s)


def parts_of(
    model: ModelSpec,
    layers: Sequence[Layer],
    steps: Sequence[Pass],
    tokens: int,
    context: int,
    beyond: Mapping[int, Sequence[float]],
    head_s: float,
    around_s: float,
) -> Iterator[Part]:
    """Parts of passes on a device.

    Parameters
    ----------
    model, layers
        The model, and those of its layers that ran.
    steps
        As the executor's clock has them, with their plans.
    tokens, context
        Of each pass.
    beyond
        What the device still computes for a layer's shared experts when the router's answer is
        there, in samples, by the layer's dense weights.
    head_s, around_s
        What the model's own head takes more, in the pass and after it.

    Notes
    -----
    Dense layers before one with experts are timed with it. What they take beyond the latter's
    usual time is theirs, in equal shares: attention as elsewhere, and the rest is the MLP's. Where
    every layer with experts has others before it, all get equal shares. Dense layers after the
    last one with experts are timed with the head, which they are taken from.
    """
    samples = defaultdict[_Key, list[float]](list)
    last = max(number for number, layer in enumerate(layers) if layer.moe)
    for step in steps:
        found = {key: fmean(values) for key, values in _split(layers, step).items()}
        for key, seconds in found.items():
            samples[key].append(seconds)
        late = [parts_of_layer(layer) for layer in layers[last + 1 :]]
        late_s = sum(found.get(key, 0.0) for keys in late for key in keys)
        own_s = max(0.0, step.times.around[HEAD] - late_s)
        samples[HEAD, "", model.head_params].append(own_s + head_s)
        samples[CALL, "", model.head_params].append(max(0.0, step.around_s) + around_s)
    params = model.experts.params_each
    samples[DECIDING, "", params], samples[HANDING, "", params] = _deciding(steps)
    beyond_s = [
        fmean(_all(step, EXPERTS)) - fmean(plan.seconds for plan in step.plans) for step in steps
    ]
    # A pass may end before its plan: what passes do as a rule counts, and no time is below 0.
    usual = median(beyond_s) > 0
    samples[JOINING, "", params] = [max(0.0, seconds) * usual for seconds in beyond_s]
    for params, more in beyond.items():
        samples.setdefault((DENSE, "", params), list(more))
    for (term, kind, params), values in samples.items():
        yield Part(term, kind, params, tokens, context, tuple(values))


def _all(step: Pass, term: str) -> list[float]:
    return [layer[term] for layer in step.times.layers]


def _deciding(steps: Sequence[Pass]) -> tuple[list[float], list[float]]:
    """What a layer takes to decide without copies, pass by pass, and what a copy adds, in samples.

    Those are of every third pass, so that they have a spread.
    """
    slopes = [_per_copy(steps[at::3]) for at in range(min(3, len(steps)))]
    each_s = median(slopes)
    without = [
        max(0.0, fmean(_all(step, DECIDING)) - each_s * fmean(plan.copies for plan in step.plans))
        for step in steps
    ]
    return without, slopes


def _per_copy(steps: Sequence[Pass]) -> float:
    """What a copy adds: the slope through the medians of layers with as many copies.

    By how many such layers there are; 0 where all have as many.
    """
    by_copies = defaultdict[int, list[float]](list)
    for step in steps:
        for plan, seconds in zip(step.plans, _all(step, DECIDING), strict=True):
            by_copies[plan.copies].append(seconds)
    if len(by_copies) < 2:
        return 0.0
    medians = [median(found) for found in by_copies.values()]
    weights = [len(found) ** 0.5 for found in by_copies.values()]
    return max(0.0, float(np.polyfit(list(by_copies), medians, 1, w=weights)[0]))


def _split(layers: Sequence[Layer], step: Pass) -> dict[_Key, list[float]]:
    """Attention and dense MLPs of one pass; the time after the last router is not looked at."""
    groups: list[list[Layer]] = [[]]
    for layer in layers:
        groups[-1].append(layer)
        if layer.moe:
            groups.append([])
    found = defaultdict[_Key, list[float]](list)
    timed = list(zip(groups[:-1], _all(step, MIXER), strict=True))
    for group, seconds in timed:
        if len(group) == 1:
            found[parts_of_layer(group[0])[0]].append(seconds)
    usual_s = {key: fmean(values) for key, values in found.items()}
    for (*before, last), seconds in timed:
        if not before:
            continue
        each_s = seconds / (1 + len(before))
        attention, _ = parts_of_layer(last)
        own_s = usual_s.get(attention)
        if own_s is None:
            found[attention].append(each_s)
        else:
            each_s = max(0.0, seconds - own_s) / len(before)
        for layer in before:
            attention, feed_forward = parts_of_layer(layer)
            like_s = usual_s.get(attention)
            if like_s is None:
                found[attention].append(each_s)
                like_s = each_s
            found[feed_forward].append(max(0.0, each_s - like_s))
    return found
