"""A discrete-event run of prefill and decode over the lanes CPU, GPU, link and disk.

Decisions are the runtime's own: the same scheduler, cache policies and prefetch rule decide here
and there. A layer begins with its mixer and router; then its experts run as planned, while the
link's idle time prefetches for the next layer. The CPU slows down while copies read the same
memory. Nothing is random here: what is made up lies in the routing.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import islice, pairwise

import numpy as np
from numpy.typing import NDArray

from planner.cache import ExpertCache
from planner.cost import CostModel
from planner.memory import Fit
from planner.outcome import CPU, DENSE, DISK, GPU, HEAD, LINK, MIXER, Event, Run, Step
from planner.plan import LayerPlan
from planner.prefetch import Ahead, NoPrefetch, ValuePrefetch
from planner.problem import LayerCost, Problem, timeline
from planner.routing import RECALL, Choice, Routing
from planner.schedule import schedule
from planner.spec import LayerWork

Scheduler = Callable[[LayerWork, Collection[int], LayerCost], LayerPlan]


class RamCache:
    """Which experts RAM holds when it cannot hold all: the least recently used is dropped.

    It starts full, with the first experts of every layer.

    Parameters
    ----------
    share
        Part of the experts that fits.
    layers
        Which MoE layers there are.
    experts
        Experts of each.
    """

    def __init__(self, share: float, layers: Sequence[int], experts: int) -> None:
        self._capacity = int(share * len(layers) * experts)
        self._holds_all = share >= 1
        every = ((layer, expert) for expert in range(experts) for layer in layers)
        self._held = OrderedDict.fromkeys(islice(every, 0 if self._holds_all else self._capacity))

    def read(self, layer: int, experts: Iterable[int]) -> list[int]:
        """Use experts of a layer; return those that had to come from disk."""
        if self._holds_all:
            return []
        missing = []
        for expert in experts:
            key = (layer, expert)
            if key in self._held:
                self._held.move_to_end(key)
                continue
            missing.append(expert)
            self._held[key] = None
            if len(self._held) > self._capacity:
                self._held.popitem(last=False)
        return missing


class Simulator:
    """One run's lanes and memory.

    Parameters
    ----------
    cost
        Model, machine and formats.
    fit
        Expert slots, and the share of the experts that RAM holds.
    routing
        Which experts are chosen.
    cache
        Residency of every layer and the policy that changes it; None without a GPU.
    scheduler
        Ours, or a baseline.
    prefetch
        Whether idle link time copies experts that the next layer will likely use.
    refill
        Whether what is left of it copies experts that the CPU computed and the cache values
        above whom it evicts.
    record
        How many decode steps to keep events of, besides the prefill's; none at all when 0.
    shares
        ``[L]`` how many layers each decoder layer stands for; those of 0 are left out. By
        default every layer stands for itself.
    """

    def __init__(
        self,
        cost: CostModel,
        fit: Fit,
        routing: Routing,
        cache: ExpertCache | None,
        scheduler: Scheduler = schedule,
        prefetch: bool = False,
        refill: bool = False,
        record: int = 0,
        shares: Sequence[float] | None = None,
    ) -> None:
        self.cost = cost
        self._shares = shares or [1.0] * len(cost.model.layers)
        self.routing = routing
        self.cache = cache
        self.scheduler = scheduler
        self.prefetch = prefetch
        self.refill = refill
        self.record = record
        link = cost.hardware.link
        self._slowdown = link.cpu_slowdown.value if link else 1.0
        self._now_s = 0.0
        self._link_free_s = 0.0
        self._recording = False
        self._share = 1.0
        self._guess: NDArray[np.int64] | None = None
        moe = [
            share for layer, share in zip(cost.model.layers, self._shares, strict=True) if layer.moe
        ]
        simulated = [number for number, share in enumerate(moe) if share]
        self._following = dict(pairwise(simulated))
        self._ram = RamCache(fit.in_ram, simulated, cost.model.experts.count)
        self._layers: list[Counter[str]] = [Counter() for _ in range(cost.model.moe_layers)]
        self._events: list[Event] = []
        self._busy_s: defaultdict[str, float] = defaultdict(float)
        self._plans: dict[int, LayerPlan] = {}
        self._prefetcher: NoPrefetch = NoPrefetch()
        self._refilled = 0

    def simulate(self, prompt: int, batch: int = 1) -> Run:
        """Run the prompt of every sequence, then every decode step of the routing."""
        prompt_choices, *steps = self.routing.choices
        self._recording = self.record > 0
        prefill = self._step(prompt_choices, prompt * batch, prompt, batch)
        # Decode's figures leave out what the prompt did.
        self._busy_s.clear()
        self._layers = [Counter() for _ in self._layers]
        self._refilled = 0
        if self.prefetch and self.cache:
            self._prefetcher = self._value_prefetch()
        decode = []
        for at, choices in enumerate(steps):
            self._recording = at < self.record
            self._guess = self.routing.guess[at]
            decode.append(self._step(choices, batch, prompt + at + 1, batch))
        return Run(
            prefill=prefill,
            decode=decode,
            layers=self._layers,
            events=self._events,
            busy_s=dict(self._busy_s),
            plans=[plan for _, plan in sorted(self._plans.items())],
            prefetched=self._prefetcher.fetched,
            prefetch_used=self._prefetcher.used,
            refilled=self._refilled,
        )

    def _step(self, choices: Sequence[Choice], tokens: int, context: int, batch: int) -> Step:
        """One forward pass over all layers and the head."""
        step = Step()
        moe = 0
        for index, layer in enumerate(self.cost.model.layers):
            self._share = self._shares[index]
            if self._share:
                mixer_s = self.cost.mixer(layer, tokens, context, batch).value
                self._dense(step, MIXER, mixer_s, f"mixer {index}")
                ffn_s = self.cost.ffn(layer, tokens).value
                if layer.moe:
                    self._experts(step, choices[moe], moe, ffn_s, mixer_s)
                else:
                    self._dense(step, DENSE, ffn_s, f"feed-forward {index}")
            moe += layer.moe
        self._share = 1.0
        self._dense(step, HEAD, self.cost.head(batch).value, "head")
        return step

    def _dense(self, step: Step, term: str, duration_s: float, name: str) -> None:
        """Advance time by dense work, on the device that holds dense weights."""
        lane = "gpu" if self.cost.on_gpu else "cpu"
        self._occupy(lane, name, self._now_s, self._now_s + duration_s)
        step.terms[term] += duration_s * self._share
        step.bound_s += duration_s * self._share
        self._now_s += duration_s

    def _occupy(self, lane: str, name: str, start_s: float, end_s: float) -> None:
        """Note work on a lane."""
        self._busy_s[lane] += end_s - start_s
        if self._recording:
            self._events.append(Event(lane, name, start_s, end_s))

    def _experts(
        self, step: Step, choice: Choice, layer: int, shared_s: float, mixer_s: float
    ) -> None:
        """Run one layer's routed experts; its shared one goes first, where dense weights are."""
        cache = self.cache
        residency: frozenset[int] = frozenset()
        if cache:
            residency = cache.residency(layer)
            cache.step(layer, choice.ids, choice.weights)
        link_free_s = max(0.0, self._link_free_s - self._now_s)
        work = LayerWork(layer, choice.loads, shared_s, link_free_s)
        plan = self._plan(work, residency) if cache else self._cpu_only(work)
        read = self._ram.read(layer, plan.cpu + plan.copies)
        idle_copies: list[tuple[int, int]] = []
        link_end_s = max(plan.link_end_s, link_free_s)
        if cache:
            for expert in self._prefetcher.resolve(layer, choice.ids):
                cache.unpin(layer, expert)
            self._admit(cache, [(layer, expert) for expert in plan.copies])
            if self.prefetch or self.refill:
                idle_s = plan.makespan_s + mixer_s - link_end_s
                idle_copies = self._use_idle_link(cache, plan, idle_s, residency)
                link_end_s += len(idle_copies) * self.cost.experts.copy_s()
        cpu_end_s, gpu_end_s, read_s = self._ends(plan, work, read, link_end_s)
        hits = sum(expert in residency for expert in choice.ids)
        self._account(step, plan, work, hits, (cpu_end_s, gpu_end_s, read_s))
        self._note(work, plan, residency, read_s)
        self._note_idle(plan, link_free_s, idle_copies)
        self._plans[layer] = plan
        if plan.copies or idle_copies:
            self._link_free_s = self._now_s + link_end_s
        self._now_s += max(cpu_end_s, gpu_end_s, shared_s)

    def _use_idle_link(
        self, cache: ExpertCache, plan: LayerPlan, idle_s: float, residency: Collection[int]
    ) -> list[tuple[int, int]]:
        """Choose, admit and return copies that end before the next router answers.

        First what the next layer will likely use, by the runtime's prefetch rule; then what the
        CPU computed in this layer, where the cache values it above whom it evicts.
        """
        room = int(idle_s / self.cost.experts.copy_s())
        if room <= 0:
            return []
        chosen: list[tuple[int, int]] = []
        following = self._following.get(plan.layer)
        if self.prefetch and following is not None and self._guess is not None:
            ahead = Ahead(following, self._probability(self._guess[following]), idle_s)
            chosen = [(f.layer, f.expert) for f in self._prefetcher.choose([ahead], cache)]
            for layer, expert in chosen:
                self._take(cache, layer, expert)
                cache.pin(layer, expert)
        if self.refill and len(chosen) < room:
            value = cache.value(plan.layer)
            missing = [expert for expert in plan.cpu if expert not in residency]
            missing.sort(key=lambda expert: -value[expert])
            refills = [(plan.layer, expert) for expert in missing[: room - len(chosen)]]
            refills = self._admit(cache, refills)
            self._refilled += len(refills)
            chosen += refills
        return chosen

    def _value_prefetch(self) -> ValuePrefetch:
        """Make the runtime's prefetch rule from decode's makespans."""
        shared_s = next(
            self.cost.ffn(layer, 1).value for layer in self.cost.model.layers if layer.moe
        )
        experts = self.cost.experts
        return ValuePrefetch(
            self.cost.decode_table(shared_s).by_hits(), experts.copy_s(), experts.bytes
        )

    def _probability(self, guess: NDArray[np.int64]) -> NDArray[np.float64]:
        """What a predictor that names ``guess`` and is right ``RECALL`` of the time believes."""
        experts = self.cost.model.experts
        rest = (1 - RECALL) * experts.top_k / experts.count
        belief = np.full(experts.count + experts.identity, rest)
        belief[guess.ravel()] = RECALL
        return belief[: experts.count]

    def _admit(
        self, cache: ExpertCache, copies: Sequence[tuple[int, int]]
    ) -> list[tuple[int, int]]:
        """Keep what is worth more than what it replaces; return what was kept."""
        kept = []
        for layer, expert in copies:
            if cache.worth_admitting(layer, expert):
                self._take(cache, layer, expert)
                kept.append((layer, expert))
        return kept

    def _take(self, cache: ExpertCache, layer: int, expert: int) -> None:
        """Give an expert a slot."""
        evicted = cache.admit(layer, expert)
        if self._recording:
            out = "" if evicted is None else f", {evicted} out"
            name = f"layer {layer}: expert {expert} in{out}"
            self._events.append(Event("cache", name, self._now_s, self._now_s))

    def _plan(self, work: LayerWork, residency: Collection[int]) -> LayerPlan:
        """Ask the scheduler; steps of equal loads are looked up in decode's table."""
        if self.scheduler is not schedule or len({load for _, load in work.loads}) != 1:
            return self.scheduler(work, residency, self.cost.experts)
        return self.cost.decode_table(work.gpu_free_s).plan(work, residency)

    def _cpu_only(self, work: LayerWork) -> LayerPlan:
        """Everything on the CPU, the shared expert first."""
        experts_s = self.cost.experts.cpu_set_s([load for _, load in work.loads])
        end_s = work.gpu_free_s + experts_s
        return LayerPlan(work.layer, work.expert_ids, (), (), end_s, 0.0, 0.0, end_s, "all_cpu")

    def _ends(
        self, plan: LayerPlan, work: LayerWork, read: list[int], link_end_s: float
    ) -> tuple[float, float, float]:
        """When CPU, GPU and disk are done, with what the plan leaves out.

        Copies slow the CPU down while both run: until the link is done the CPU loses
        ``1 - 1/slowdown`` of the time. Experts on disk are read one after the other; the last of
        them is computed when all are read.
        """
        cpu_end_s, gpu_end_s = plan.cpu_end_s, plan.gpu_end_s
        if plan.cpu and link_end_s > 0:
            lost_s = link_end_s * (1 - 1 / self._slowdown)
            cpu_end_s = min(cpu_end_s * self._slowdown, cpu_end_s + lost_s)
        if not read:
            return cpu_end_s, gpu_end_s, 0.0
        read_s = self.cost.disk_read(len(read)).value
        experts, load = self.cost.experts, dict(work.loads)[read[-1]]
        if not set(read).isdisjoint(plan.cpu):
            cpu_end_s = max(cpu_end_s, read_s + experts.cpu_s(load))
        if not set(read).isdisjoint(plan.copies):
            gpu_end_s = max(gpu_end_s, read_s + experts.copy_s() + experts.gpu_s(load))
        return cpu_end_s, gpu_end_s, read_s

    def _account(
        self,
        step: Step,
        plan: LayerPlan,
        work: LayerWork,
        hits: int,
        ends_s: tuple[float, float, float],
    ) -> None:
        """Add a layer to the step's counts, and its time to the terms of whoever ended last."""
        cpu_end_s, gpu_end_s, read_s = ends_s
        shared_s = work.gpu_free_s
        end_s = max(cpu_end_s, gpu_end_s, shared_s)
        step.terms[DENSE] += shared_s * self._share
        if read_s and end_s > max(plan.makespan_s, shared_s):
            step.terms[DISK] += (end_s - max(plan.makespan_s, shared_s)) * self._share
            end_s = max(plan.makespan_s, shared_s)
        if cpu_end_s >= gpu_end_s:
            last = CPU
        else:
            # The GPU lane is the link's when its last expert starts as its copy arrives.
            waited = gpu_end_s > shared_s + self._gpu_work_s(plan, work) * 1.001
            last = LINK if waited else GPU
        step.terms[last] += (end_s - shared_s) * self._share
        step.bound_s += max(plan.lower_bound_s, shared_s) * self._share
        step.activated += len(work.loads)
        step.hits += hits
        self._layers[plan.layer].update(
            activated=len(work.loads),
            hits=hits,
            cpu=len(plan.cpu),
            resident=len(plan.gpu) - len(plan.copies),
            copied=len(plan.copies),
        )

    def _note_idle(
        self, plan: LayerPlan, link_free_s: float, copies: Sequence[tuple[int, int]]
    ) -> None:
        """Keep what the link did besides the plan."""
        at_s = self._now_s + max(plan.link_end_s, link_free_s)
        for layer, expert in copies:
            end_s = at_s + self.cost.experts.copy_s()
            self._occupy("link", f"prefetch: layer {layer} expert {expert}", at_s, end_s)
            at_s = end_s

    def _gpu_work_s(self, plan: LayerPlan, work: LayerWork) -> float:
        """Seconds the GPU computes routed experts in this plan."""
        loads = dict(work.loads)
        return sum(self.cost.experts.gpu_s(loads[expert]) for expert in plan.gpu)

    def _note(
        self, work: LayerWork, plan: LayerPlan, residency: Collection[int], read_s: float
    ) -> None:
        """Keep what the lanes did: sums always, single events while recording."""
        busy, now_s, layer = self._busy_s, self._now_s, plan.layer
        shared_lane = "gpu" if self.cost.on_gpu else "cpu"
        if not self._recording:
            busy[shared_lane] += work.gpu_free_s
            busy["gpu"] += self._gpu_work_s(plan, work) if plan.gpu else 0.0
            busy["cpu"] += plan.cpu_end_s - (0.0 if self.cost.on_gpu else work.gpu_free_s)
            busy["link"] += len(plan.copies) * self.cost.experts.copy_s() if plan.copies else 0.0
            busy["disk"] += read_s
            return
        self._occupy(shared_lane, f"shared {layer}", now_s, now_s + work.gpu_free_s)
        if read_s:
            self._occupy("disk", f"read for layer {layer}", now_s, now_s + read_s)
        if not self.cost.on_gpu:
            start_s = now_s + work.gpu_free_s
            self._occupy("cpu", f"layer {layer} experts", start_s, now_s + plan.cpu_end_s)
            return
        for span in timeline(Problem.of(work, residency, self.cost.experts), plan):
            name = f"layer {layer} expert {span.expert}"
            self._occupy(span.lane, name, now_s + span.start_s, now_s + span.end_s)
