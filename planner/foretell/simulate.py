"""A discrete-event run of prefill and decode over the lanes CPU, GPU, link and disk.

Decisions are the runtime's own: the same director decides here and there. So are the times of a
step (``planner.cost.step_times``); this keeps the clock and accounts. A layer begins with its
mixer and router; then its experts run as planned, while the link's idle time prefetches for the
next layer. Nothing is random here: what is made up lies in the routing.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict
from collections.abc import Iterable, Sequence
from itertools import islice

from planner.cost.cost import CostModel
from planner.cost.step_times import (
    ExpertsTimes,
    StepTimes,
    Terms,
    dense_times,
    experts_times,
    overhead,
)
from planner.decide.cache import ExpertCache
from planner.decide.director import Admission, Decision, Director, Fill, Scheduler
from planner.decide.layer_plan import LayerPlan
from planner.decide.problem import Problem, timeline
from planner.decide.schedule import schedule
from planner.describe.estimate import LayerWork
from planner.describe.terms import CALL, DENSE, HEAD, MIXER
from planner.foretell.memory import Fit
from planner.foretell.routing import RECALL, Choice, Routing
from planner.foretell.run import Event, Run, Step


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
    scheduler, prefetch, refill
        As of ``Director``; there is none without a GPU.
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
        self.record = record
        self.director = (
            Director(cost, cache, scheduler=scheduler, prefetch=prefetch, refill=refill)
            if cache
            else None
        )
        self._now_s = 0.0
        self._link_free_s = 0.0
        self._recording = False
        self._at = -1
        moe = [
            share for layer, share in zip(cost.model.layers, self._shares, strict=True) if layer.moe
        ]
        simulated = [number for number, share in enumerate(moe) if share]
        self._following = {
            layer: simulated[at + 1 : at + 1 + len(RECALL)] for at, layer in enumerate(simulated)
        }
        self._ram = RamCache(fit.in_ram, simulated, cost.model.experts.count)
        self._layers: list[Counter[str]] = [Counter() for _ in range(cost.model.moe_layers)]
        self._layers_s: list[defaultdict[str, float]] = [
            defaultdict(float) for _ in cost.model.layers
        ]
        self._events: list[Event] = []
        self._busy_s: defaultdict[str, float] = defaultdict(float)
        self._plans: dict[int, LayerPlan] = {}
        self._counts: Counter[str] = Counter()

    def simulate(self, prompt: int, batch: int = 1) -> Run:
        """Run the prompt of every sequence, then every decode step of the routing."""
        prompt_choices, *steps = self.routing.choices
        self._recording = self.record > 0
        prefill = self._prompt(prompt_choices, prompt, batch)
        # Decode's figures leave out what the prompt did.
        self._busy_s.clear()
        self._layers = [Counter() for _ in self._layers]
        self._counts.clear()
        used = self.director.prefetcher.used if self.director else 0
        decode = []
        for at, choices in enumerate(steps):
            self._recording = at < self.record
            self._at = at
            step = Step()
            times = self._pass(step, choices, batch, prompt + at + 1, batch)
            for sums, terms in zip(self._layers_s, times.layers, strict=True):
                for name, seconds in terms.items():
                    sums[name] += seconds
            decode.append(self._ended(step, batch))
        return Run(
            prefill=prefill,
            decode=decode,
            layer_terms=tuple(
                {name: seconds / len(decode) for name, seconds in sums.items()}
                for sums in self._layers_s
            ),
            layers=self._layers,
            events=self._events,
            busy_s=dict(self._busy_s),
            plans=[plan for _, plan in sorted(self._plans.items())],
            prefetched=self._counts["prefetch"],
            prefetch_used=self.director.prefetcher.used - used if self.director else 0,
            refilled=self._counts["refill"],
        )

    def _prompt(self, choices: Sequence[Choice], prompt: int, batch: int) -> Step:
        """The prompt of every sequence, piece by piece where the runtime computes it so."""
        step, cut = Step(), self.cost.pieces(prompt, batch)
        sizes = [tokens for tokens, _ in cut]
        dealt = [choices] if len(cut) == 1 else self.routing.in_pieces(sizes)
        for (tokens, context), chosen in zip(cut, dealt, strict=True):
            self._pass(step, chosen, tokens * batch, context, batch)
        return self._ended(step, prompt * batch)

    def _pass(
        self, step: Step, choices: Sequence[Choice], tokens: int, context: int, batch: int
    ) -> StepTimes:
        """One forward pass over all layers and the head."""
        dense = dense_times(self.cost, tokens, context, batch)
        layers: list[Terms] = []
        moe = 0
        for index, layer in enumerate(self.cost.model.layers):
            share, terms = self._shares[index], {}
            if share:
                mixer_s, ffn_s = dense.layers[index]
                self._wait(step, f"mixer {index}", mixer_s, share)
                terms = {MIXER: mixer_s}
                if layer.moe:
                    dense_s = mixer_s, ffn_s
                    terms |= self._experts(step, choices[moe], moe, tokens, dense_s, share).terms()
                else:
                    self._wait(step, f"feed-forward {index}", ffn_s, share)
                    terms[DENSE] = ffn_s
                if share != 1:
                    terms = {name: seconds * share for name, seconds in terms.items()}
            layers.append(terms)
            moe += layer.moe
        self._wait(step, "head", dense.head_s)
        times = StepTimes(tuple(layers), {HEAD: dense.head_s})
        step.add(times)
        return times

    def _ended(self, step: Step, tokens: int) -> Step:
        """Add what a step of ``tokens`` takes around its passes."""
        if call_s := overhead(self.cost, tokens).value:
            self._wait(step, "around the layers", call_s)
            step.add(StepTimes((), {CALL: call_s}))
        return step

    def _wait(
        self,
        step: Step,
        name: str,
        duration_s: float,
        share: float = 1.0,
        lane: str | None = None,
    ) -> None:
        """Advance time by what experts wait for; by default where dense weights are."""
        lane = lane or ("gpu" if self.cost.on_gpu else "cpu")
        self._occupy(lane, name, self._now_s, self._now_s + duration_s)
        step.bound_s += duration_s * share
        self._now_s += duration_s

    def _occupy(self, lane: str, name: str, start_s: float, end_s: float) -> None:
        """Note work on a lane."""
        self._busy_s[lane] += end_s - start_s
        if self._recording:
            self._show(lane, name, start_s, end_s)

    def _show(self, lane: str, name: str, start_s: float, end_s: float) -> None:
        """Keep an event."""
        self._events.append(Event(lane, name, start_s, end_s))

    def _experts(
        self,
        step: Step,
        choice: Choice,
        layer: int,
        tokens: int,
        dense_s: tuple[float, float],
        share: float,
    ) -> ExpertsTimes:
        """Run one layer's routed experts; its shared one goes first, where dense weights are."""
        mixer_s, shared_s = dense_s
        link_free_s = max(0.0, self._link_free_s - self._now_s)
        if self.director:
            decision = self.director.place(
                layer,
                choice.loads,
                choice.ids,
                choice.weights,
                gpu_free_s=shared_s,
                link_free_s=link_free_s,
            )
        else:
            decision = self._cpu_only(LayerWork(layer, choice.loads, shared_s, link_free_s))
        plan = decision.plan
        read = self._ram.read(layer, plan.cpu + plan.copies)
        link_end_s = max(plan.link_end_s, link_free_s)
        idle_s = plan.makespan_s + mixer_s - link_end_s
        fills = self._fill(self.director, decision, idle_s) if self.director else ()
        if fills:
            link_end_s += len(fills) * self.cost.experts.copy_s() + self._read_s(fills)
        times = experts_times(self.cost, tokens, decision.work, plan, link_end_s, read)
        if times.deciding_s:
            self._wait(step, f"deciding {layer}", times.deciding_s, share, "cpu")
        self._note_admissions(decision.admitted)
        self._note_admissions([fill.admission for fill in fills])
        self._count(step, decision, share)
        self._note(decision, times)
        self._note_idle(plan, link_free_s, fills)
        self._plans[layer] = plan
        if plan.copies or fills:
            self._link_free_s = self._now_s + link_end_s
        self._now_s += times.end_s
        if times.joining_s:
            self._wait(step, f"joining {layer}", times.joining_s, share, "cpu")
        return times

    def _fill(self, director: Director, decision: Decision, idle_s: float) -> tuple[Fill, ...]:
        """Have idle link time used until the next router answers."""
        ahead = [
            (layer, self.routing.expected(self._at, layer, distance))
            for distance, layer in enumerate(self._following[decision.plan.layer], start=1)
        ]
        fills = director.fill(decision, ahead, [idle_s])
        self._counts.update(fill.reason for fill in fills)
        return fills

    def _read_s(self, fills: Sequence[Fill]) -> float:
        """Time that copies wait for the disk."""
        wanted = [(fill.admission.layer, fill.admission.expert) for fill in fills]
        read = sum(len(self._ram.read(layer, [expert])) for layer, expert in wanted)
        return self.cost.disk_read(read).value if read else 0.0

    def _cpu_only(self, work: LayerWork) -> Decision:
        """Everything on the CPU, the shared expert first."""
        experts_s = self.cost.experts.cpu_set_s([load for _, load in work.loads])
        end_s = work.gpu_free_s + experts_s
        plan = LayerPlan(work.layer, work.expert_ids, (), (), end_s, 0.0, 0.0, end_s, "all_cpu")
        return Decision(work, plan, frozenset(), ())

    def _count(self, step: Step, decision: Decision, share: float) -> None:
        """Add a layer to the step's counts and to its lower bound."""
        plan, work = decision.plan, decision.work
        step.bound_s += max(plan.lower_bound_s, work.gpu_free_s) * share
        step.activated += len(work.loads)
        step.hits += decision.hits
        self._layers[plan.layer].update(
            activated=len(work.loads),
            hits=decision.hits,
            cpu=len(plan.cpu),
            resident=len(plan.gpu) - len(plan.copies),
            copied=len(plan.copies),
        )

    def _note_idle(self, plan: LayerPlan, link_free_s: float, fills: Sequence[Fill]) -> None:
        """Keep what the link did besides the plan."""
        at_s = self._now_s + max(plan.link_end_s, link_free_s)
        for fill in fills:
            end_s = at_s + self.cost.experts.copy_s()
            name = f"{fill.reason}: layer {fill.admission.layer} expert {fill.admission.expert}"
            self._occupy("link", name, at_s, end_s)
            at_s = end_s

    def _note_admissions(self, admissions: Iterable[Admission]) -> None:
        """Keep who got a slot, while recording."""
        if not self._recording:
            return
        for one in admissions:
            out = "" if one.evicted is None else f", {one.evicted} out"
            name = f"layer {one.layer}: expert {one.expert} in{out}"
            self._events.append(Event("cache", name, self._now_s, self._now_s))

    def _note(self, decision: Decision, times: ExpertsTimes) -> None:
        """Keep what the lanes did: sums always, single events while recording."""
        read_s = times.read_s
        work, plan = decision.work, decision.plan
        busy, now_s, layer = self._busy_s, self._now_s, plan.layer
        shared_lane = "gpu" if self.cost.on_gpu else "cpu"
        busy[shared_lane] += work.gpu_free_s
        busy["gpu"] += times.gpu_busy_s
        busy["cpu"] += plan.cpu_end_s - (0.0 if self.cost.on_gpu else work.gpu_free_s)
        busy["link"] += len(plan.copies) * self.cost.experts.copy_s() if plan.copies else 0.0
        busy["disk"] += read_s
        if not self._recording:
            return
        self._show(shared_lane, f"shared {layer}", now_s, now_s + work.gpu_free_s)
        if read_s:
            self._show("disk", f"read for layer {layer}", now_s, now_s + read_s)
        if not self.cost.on_gpu:
            start_s = now_s + work.gpu_free_s
            self._show("cpu", f"layer {layer} experts", start_s, now_s + plan.cpu_end_s)
            return
        for span in timeline(Problem.of(work, decision.residency, self.cost.experts), plan):
            name = f"layer {layer} expert {span.expert}"
            self._show(span.lane, name, now_s + span.start_s, now_s + span.end_s)
