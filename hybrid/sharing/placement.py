"""Puts a loaded model on a device: what fits where, and who runs the experts from then on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gpu_experts.device import Device
from hybrid.anatomy.survey import survey
from hybrid.errors import UsageError
from hybrid.formats.notes import Note
from hybrid.grafts import expert_modules, set_runner
from hybrid.ledger.dense_seconds import DenseSeconds
from hybrid.ledger.metrics import Figure, GenerationTimes, Term
from hybrid.ledger.residual import DECODE
from hybrid.ledger.shared import layer_terms, step_terms
from hybrid.ledger.timeline import Timeline
from hybrid.machine.devices import memory_told
from hybrid.model import Model
from hybrid.packed.bf16_products import panels_from
from hybrid.packed.dense_move import move_dense
from hybrid.packed.experts import LayerExperts
from hybrid.packed.gradients import refuse_gradients
from hybrid.sharing.budget import Budget, fitted
from hybrid.sharing.device_guard import DeviceGuard
from hybrid.sharing.device_slots import MakeDirector
from hybrid.sharing.executor import Executor
from hybrid.sharing.forward import watch_steps
from hybrid.sharing.predictor import Lookahead
from hybrid.sharing.shared_first import SharedFirst
from planner.cost.cost import CostModel
from planner.decide.cache import ExpertCache
from planner.decide.capacity import equal_capacities
from planner.decide.director import REALISED, Director
from planner.decide.policies import check_policy, policy
from planner.decide.popularity import Popularity
from planner.describe.hardware import HardwareSpec
from planner.describe.model import ModelSpec
from planner.describe.words import enough_in_words, in_words
from planner.foretell.memory import Fit, HostMemory


class PlacedExperts:
    """One layer's experts on both devices; stands where :class:`LayerExperts` stood."""

    own_gating = False

    def __init__(self, executor: Executor, layer: int, experts: LayerExperts) -> None:
        self.executor, self.layer = executor, layer
        self.blocks, self.shape, self.spec = experts.blocks, experts.shape, experts.spec
        self.panels_from = experts.panels_from

    def __call__(self, hidden: Tensor, expert_ids: Tensor, routing_weights: Tensor) -> Tensor:
        out = self.executor.run_layer(self.layer, hidden, expert_ids, routing_weights)
        if not torch.is_grad_enabled():
            return out
        why = "gradients do not pass through experts that are shared with a device"
        hint = "train on the CPU alone: load the model without a device, or with vram=0"
        return refuse_gradients(out, hidden, routing_weights, why=why, hint=hint)


RING_BYTES = 256 << 20
"""Pinned where the experts do not fit: enough to hide what fills it."""


@dataclass(frozen=True)
class Placement:
    """How a model lies on a machine, and who runs its experts.

    Attributes
    ----------
    device
        Its name.
    fit
        What takes memory where.
    cost
        What was placed, and on what: predictions come from it.
    executor
        Runs the experts; None when there are none, or the device cannot run this model's.
    notes
        What is slower or smaller than it could be.
    popularity
        What was known of the experts' use; None is nothing.
    shared
        Launches shared experts early, where they are launched.
    told
        What the device says of itself, which may become more as it runs.
    """

    device: str
    fit: Fit
    cost: CostModel
    executor: Executor | None
    notes: tuple[Note, ...]
    popularity: Popularity | None = None
    shared: SharedFirst | None = None
    told: Sequence[Note] = ()

    @property
    def known(self) -> tuple[Note, ...]:
        """What is slower or smaller than it could be, as far as that is known by now."""
        return (*self.notes, *self.told)

    @property
    def spec(self) -> ModelSpec:
        """The model."""
        return self.cost.model

    @property
    def hardware(self) -> HardwareSpec:
        """The machine, with the memory that may be used."""
        return self.cost.hardware

    def begin_run(self) -> None:
        """Forget what the last call of ``generate`` took."""
        if self.executor is not None:
            self.executor.timeline.restart()
            if self.executor.usage.recorder is not None:
                self.executor.usage.recorder.end_sequence()

    def figures(self) -> dict[str, Figure]:
        """Return the counts of the last call, and of prefetching since the slots were opened."""
        if self.executor is None:
            return {}
        decode = self.executor.timeline.phases[DECODE]
        fetched = self.executor.director.prefetcher
        loaded = "counted since the slots were opened"
        hits = decode.hits / decode.activated if decode.activated else None
        return {
            "hit_rate": Figure(
                hits,
                "share",
                "hits / activated experts in decode, kept by the policy "
                f"{self.executor.director.cache.policy_name}",
            ),
            "prefetch_precision": Figure(
                fetched.prefetch_precision if fetched.fetched else None, "share", loaded
            ),
            "prefetch_coverage": Figure(
                fetched.prefetch_coverage if fetched.fetched else None, "share", loaded
            ),
            "prefetch_useful_bytes": Figure(fetched.useful_bytes, "bytes", loaded),
            "prefetch_wasted_bytes": Figure(fetched.wasted_bytes, "bytes", loaded),
        }

    def terms(self, times: GenerationTimes) -> tuple[Term, ...]:
        """Return what a step of the last call consisted of, predicted and measured."""
        if self.executor is None:
            return ()
        return step_terms(self.executor.timeline, self.cost, times)

    def by_layer(self) -> tuple[Term, ...]:
        """Return what every layer's part of a step of the last call consisted of."""
        return () if self.executor is None else layer_terms(self.executor.timeline)

    def slow_paths(self) -> tuple[Note, ...]:
        """Return what is slower or smaller than it could be, and what went wrong since."""
        if self.executor is None:
            return self.known
        director, found = self.executor.director, [*self.known, *self.executor.notes]
        if not director.looks_ahead:
            saved = director.most_saved_s * REALISED * 1e6
            reason = f"it takes {director.deciding_s * 1e6:.0f} us a layer to save {saved:.0f} us"
            found.append(Note("no prefetching in decode", reason, "none needed"))
        elif not director.prefetcher.active:
            reason = "most of what it fetched lately was not used"
            found.append(Note("prefetching pauses", reason, "none needed: it tries again"))
        return tuple(found)

    @property
    def decision(self) -> tuple[str, str]:
        """What lies where: on the device, and in this machine's memory."""
        executor, placed = self.executor, self.fit
        if not self.spec.moe_layers:
            there = f"{in_words(placed.vram_bytes)}: {placed.items_told('vram')}"
            here = f"{in_words(placed.ram_bytes)}: {placed.items_told('ram')}"
            return f"{self.device}, {there}; no experts to share", f"RAM, {here}"
        if executor is not None and executor.device is None:
            first = f"{self.device}, given up: all experts run on the CPU"
        else:
            slots = placed.slots_told(executor.slot_count if executor else 0)
            size, items = in_words(placed.vram_bytes), placed.items_told("vram")
            first = f"{self.device}, {size}: {items}; {slots}"
        size, items = in_words(placed.ram_bytes), placed.items_told("ram")
        return first, f"RAM, {size}: {items}; {placed.host_told()}"

    def __str__(self) -> str:
        return "; ".join(self.decision)


def place_model(
    model: Model,
    device: Device,
    hardware: HardwareSpec,
    budget: Budget,
    *,
    threads: int,
    timeline: Timeline | None = None,
) -> Placement:
    """Move a loaded model's dense weights to ``device`` and share its experts with the CPU.

    Parameters
    ----------
    model
        What was loaded.
    device
        Not opened yet.
    hardware
        What the machine does how fast, the device included.
    budget
        What may be used.
    threads
        Of the CPU's kernels.
    timeline
        Collects what happens.

    Raises
    ------
    UsageError
        When not even the dense weights and the cache fit; the message says what is needed.
    SpecError
        When there is no policy of the name that ``budget`` has.
    """
    check_policy(budget.policy)
    cost, placed = fitted(model, device, hardware, budget)
    if not placed.fits:
        raise UsageError(f"{device.name}: {placed.shortage}", hint=_remedy(placed, budget))
    nbytes = model.index.nbytes
    device.pin(nbytes if placed.host is HostMemory.PINNED else RING_BYTES)
    with memory_told(device):
        move_dense(model.network, device.torch_device)
    layers: list[LayerExperts] = model.layers
    for experts in layers:
        experts.panels_from = panels_from(experts.shape, cost.hardware)
        if experts.own_gating:  # computed on the CPU, between projections that are
            experts.spec.module.to("cpu")
    notes = []
    reason = unfit(layers, cost.model)
    executor, shared = None, None
    if reason is not None:
        remedy = "none yet: attention and dense layers run on the device"
        notes.append(Note("all experts on the CPU", reason, remedy))
    elif layers:
        with memory_told(device):
            executor, shared = _share_experts(
                model, device, cost, placed, budget, threads, timeline
            )
    known = budget.popularity
    return Placement(device.name, placed, cost, executor, tuple(notes), known, shared, device.notes)


def _remedy(placed: Fit, budget: Budget) -> str:
    """Say what to give a model that does not fit, for every place that is too small."""
    found = []
    for place in placed.short_of:
        enough = f"{place} of {enough_in_words(placed.used(place))} or more"
        if place == "vram":
            found.append(f"give it {enough}, a shorter context, or vram=0 for the CPU alone")
        elif budget.ram_bytes is not None:
            found.append(f"give it {enough}, or leave ram out to use all that this machine has")
        else:
            found.append(f"run it on a machine with {enough}")
    return "; ".join(found)


def _share_experts(
    model: Model,
    device: Device,
    cost: CostModel,
    placed: Fit,
    budget: Budget,
    threads: int,
    timeline: Timeline | None,
) -> tuple[Executor, SharedFirst]:
    network, layers = model.network, model.layers
    seconds = DenseSeconds(cost, budget.context)
    specs = [experts.spec for experts in layers]
    views = survey(network, specs)
    lookahead, shared = Lookahead.discover(network, specs, views=views), SharedFirst(views)
    executor = Executor(
        DeviceGuard(device, layers, directors(cost, placed.slots, budget), sum(placed.slots)),
        seconds,
        threads=threads,
        lookahead=lookahead,
        shared=shared,
        read_ahead=model.store.read_ahead if placed.in_ram < 1 else None,
        timeline=timeline,
        record_routing=budget.record_routing,
    )
    if budget.popularity is not None:
        executor.guard.warm()
    if lookahead.reason is not None:
        remedy = "none yet: experts of those layers are not copied ahead"
        executor.notes.append(Note("layers without lookahead", lookahead.reason, remedy))
    for number, module in enumerate(expert_modules(network)):
        set_runner(module, PlacedExperts(executor, number, layers[number]))
    watch_steps(network, executor, seconds)
    return executor, shared


def directors(cost: CostModel, capacities: Sequence[int], budget: Budget) -> MakeDirector:
    """Return what makes directors over a number of slots, with nothing resident.

    They share one policy: what it has learned about the experts stays true.

    Parameters
    ----------
    capacities
        Slots of every layer at first; fewer are shared out anew.
    """
    layers, experts = cost.model.moe_layers, cost.model.experts.count
    known = budget.popularity
    kept = policy(budget.policy, layers, experts, known)

    def make(slots: int) -> Director:
        if slots == sum(capacities):
            shares = tuple(capacities)
        elif known is None:
            shares = equal_capacities(slots, layers, experts)
        else:
            shares = known.capacities(slots)
        return Director(cost, ExpertCache(kept, shares))

    return make


def unfit(layers: list[LayerExperts], spec: ModelSpec) -> str | None:
    """Why a device cannot run these experts; None when it can."""
    if any(experts.own_gating for experts in layers):
        return "the kernels have no parameters for this family's activation"
    formats = sorted({experts.shape.format_name for experts in layers})
    if len(formats) > 1:
        return f"its layers have experts of different formats: {', '.join(formats)}"
    if len({(experts.shape, experts.blocks.shape) for experts in layers}) > 1:
        return "its layers have experts of different shapes"
    if len(layers) != spec.moe_layers:
        return f"{len(layers)} layers have experts, its config.json says {spec.moe_layers}"
    return None
