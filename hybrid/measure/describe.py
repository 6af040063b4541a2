"""From measurements to a hardware description: every number with its spread and its origin."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from statistics import median, pstdev
from typing import TYPE_CHECKING

from hybrid.formats.block import Block
from hybrid.formats.registry import weight_bytes
from hybrid.machine.calibrations import COMMAND, Identity, layer_overhead
from hybrid.measure.experts import DiskTimes, ExpertTimes
from hybrid.measure.interference import DISTURBED
from hybrid.measure.terms_of_step import Part, typical
from planner.describe.bandwidth import MEMORY_BYTES, raised
from planner.describe.estimate import Source
from planner.describe.hardware import PANELS, Cpu, Disk, HardwareSpec, Point, Quantity, TermPoint
from planner.describe.terms import CALL, CPU, DECIDING, HANDING, JOINING, MIXER

if TYPE_CHECKING:
    from hybrid.measure.device import DeviceTimes

_OF_EXPERTS = (CPU, DECIDING, HANDING, JOINING)
"""Terms that depend on the experts' format and not on the dense weights'."""


@dataclass(frozen=True)
class ModelParts:
    """The parts of one model.

    Attributes
    ----------
    family, experts, dense
        Its ``model_type``, and the formats of its experts and of its dense weights.
    parts
        What they took.
    disturbed
        Part of the processors' time that other programs took meanwhile.
    top_k
        Experts that a token activates in a layer.
    """

    family: str
    experts: str
    dense: str
    parts: list[Part]
    disturbed: float = 0.0
    top_k: int = 1


@dataclass
class Measured:
    """Everything a calibration found.

    Attributes
    ----------
    reads
        Bytes a second from memory.
    disk
        The disk's times.
    experts
        Of every shape, the wanted model's first.
    parts
        Of every model.
    device
        The device's times, where there is one.
    placed
        Of every model where its experts were shared with the device.
    left_out
        What there was no time for.
    refused
        What could not be measured, and why.
    """

    reads: list[float]
    disk: DiskTimes
    experts: list[ExpertTimes] = field(default_factory=list)
    parts: list[ModelParts] = field(default_factory=list)
    device: DeviceTimes | None = None
    placed: list[ModelParts] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)

    def disturbed(self) -> float:
        """Part of the processors' time that other programs took during the worst of it."""
        experts = [times.disturbed for times in self.experts]
        return max(*experts, *(model.disturbed for model in [*self.parts, *self.placed]), 0.0)


def to_spec(found: Measured, identity: Identity, when: datetime) -> HardwareSpec:
    """Describe the machine that was measured; no bandwidth is below what was read from it."""
    terms = [term for model in found.parts for term in _terms(model)]
    shared = [replace(term, lane="gpu") for model in found.placed for term in _terms(model)]
    points = [point for times in found.experts for point in _cpu_points(times)]
    gpu, link = None, None
    if found.device is not None:
        gpu, link = found.device.gpu(COMMAND), found.device.link(COMMAND)
        points += found.device.points()
    remarks = ""
    if found.left_out:
        remarks += f"; left out for lack of time: {', '.join(found.left_out)}"
    remarks += "".join(f"; not measured: {what}" for what in found.refused)
    if (disturbed := found.disturbed()) >= DISTURBED:
        remarks += f"; other programs used {disturbed:.0%} of the processors meanwhile"
    spec = HardwareSpec(
        name="this-machine",
        summary=f"{identity.cpu}, {identity.threads} threads, {identity.simd_level}; "
        f"calibrated {when:%Y-%m-%d %H:%M} UTC{remarks}",
        cpu=_cpu(found, identity, terms, shared),
        disk=_disk(found.disk),
        gpu=gpu,
        link=link,
        points=tuple(points),
        terms=(*terms, *shared),
    )
    return raised(spec)


def _quantity(samples: Sequence[float], what: str, source: Source = Source.MEASURED) -> Quantity:
    """The samples' median, with their standard deviation relative to it."""
    value = float(median(samples))
    count = f"median of {len(samples)}" if len(samples) > 1 else "one sample"
    error = float(pstdev(samples) / value) if len(samples) > 1 and value else None
    return Quantity(value, source, f"{COMMAND}: {what}, {count}", error)


def _cpu(
    found: Measured, identity: Identity, terms: list[TermPoint], shared: list[TermPoint]
) -> Cpu:
    rate = _bandwidth(found, identity)
    times = found.experts[0]
    params, _, name = _expert(times.shape)
    most = max(times.loads)
    # Small experts come from a cache, faster than from memory.
    shares = [min(1.0, one / rate.value) for one in _rates(times)]
    rates = [2 * params * most / max(s, 1e-12) for s in times.loads[most]]

    def overhead(single: bool) -> Quantity:
        """What the smallest step's attention takes beyond reading its weights.

        Where a device reads them meanwhile, all that a single token's takes there.
        """
        tokens = [t for t in shared if t.term == MIXER and t.tokens == 1]
        if single and tokens:
            first = min(tokens, key=lambda term: term.context)
            origin = f"{COMMAND}: a single token's attention and router, on the device"
            return Quantity(first.seconds, Source.FITTED, origin)
        return layer_overhead(terms, rate, single=single)

    def around(single: bool) -> Quantity:
        mine = [t for t in terms if t.term == CALL and (t.tokens == 1) == single]
        first = min(mine, key=lambda term: term.tokens)
        origin = f"{COMMAND}: a step of {first.tokens} tokens without layers and head"
        error = first.error / first.seconds if first.error and first.seconds else None
        return Quantity(first.seconds, Source.MEASURED, origin, error)

    return Cpu(
        name=identity.cpu,
        ram_bytes=Quantity(
            float(identity.ram_bytes), Source.MEASURED, f"{COMMAND}: the system's own figure"
        ),
        memory_bytes_per_s=rate,
        memory_efficiency=_quantity(shares, f"{name}, one token each, beside plain reads"),
        flop_per_s=_quantity(rates, f"{name}, {most} tokens each"),
        flop_efficiency=Quantity(
            1.0, Source.MEASURED, f"{COMMAND}: flop_per_s is what the kernels reach", 0.0
        ),
        start_s=_quantity(times.start_s, f"{name}, a call besides its experts"),
        layer_overhead_s=overhead(single=found.device is None or bool(shared)),
        prompt_layer_overhead_s=overhead(single=False),
        token_start_s=around(single=True),
        prompt_start_s=around(single=False),
        deciding_s=_deciding(found.placed),
    )


def _expert(shape: Block) -> tuple[int, int, str]:
    """Weights of one expert, their bytes, and what such experts are called."""
    params = _matrices(shape) * shape.hidden * shape.intermediate
    name = f"experts of {shape.hidden} x {shape.intermediate} in {shape.format_name}"
    return params, weight_bytes(params, shape.format_name), name


def _matrices(shape: Block) -> int:
    return 3 if shape.gated else 2


def _rates(times: ExpertTimes) -> list[float]:
    """Bytes a second that experts of one token each read, in samples."""
    _, size, _ = _expert(times.shape)
    return [size / max(s, 1e-12) for s in times.loads[1]]


def _bandwidth(found: Measured, identity: Identity) -> Quantity:
    """What plain reads reach, or experts where those read faster from memory."""
    best = _quantity(found.reads, f"{identity.threads} threads reading 1 GiB")
    for times in found.experts:
        _, size, name = _expert(times.shape)
        rate = _quantity(_rates(times), f"{name}, one token each, read faster than plain reads did")
        told = size >= MEMORY_BYTES and median(times.loads[1]) > 0  # a difference of two times
        if told and rate.value > best.value:
            best = rate
    return best


def _deciding(placed: Sequence[ModelParts]) -> Quantity | None:
    """What an expert of any model takes: as those of a single token of the measured one do."""
    for model in placed:
        for part in model.parts:
            if part.term == DECIDING and part.tokens == 1:
                origin = f"{COMMAND}: deciding in a token's layer, without copies, by its experts"
                return Quantity(typical(part.samples) / model.top_k, Source.FITTED, origin)
    return None


def _disk(times: DiskTimes) -> Disk:
    how = (
        "the system could not be told to forget the file, memory may have answered"
        if times.cached
        else "the system had been told to forget the file"
    )
    return Disk(
        bytes_per_s=_quantity(times.bytes_per_s, f"a file in the cache folder, {how}"),
        latency_s=_quantity(times.latency_s, f"4 KiB anywhere in it, {how}"),
    )


def _cpu_points(times: ExpertTimes) -> Iterator[Point]:
    """What the runtime takes: in torch's products from the load on from which they are faster."""
    least = times.panels_from()
    used = {
        load: times.panels.get(load, samples) if least and load >= least else samples
        for load, samples in times.loads.items()
    }
    for lane, found in (("cpu", used), (PANELS, times.panels)):
        for load, samples in sorted(found.items()):
            yield Point(
                lane=lane,
                hidden=times.shape.hidden,
                intermediate=times.shape.intermediate,
                format=times.shape.format_name,
                load=load,
                seconds=typical(samples),
                error=_spread(samples),
                disturbed=_worth_telling(times.disturbed),
                matrices=_matrices(times.shape),
            )


def _terms(model: ModelParts) -> Iterator[TermPoint]:
    """Points of a model's parts; only attention depends on the context of a single token."""
    merged: dict[tuple[str, str, int, int, int, int], list[float]] = {}
    for part in model.parts:
        context = part.context if part.term == MIXER else part.tokens
        key = (part.term, part.kind, part.params, part.tokens, context, part.piece)
        merged.setdefault(key, []).extend(part.samples)
    for (term, kind, params, tokens, context, piece), samples in merged.items():
        yield TermPoint(
            term=term,
            family=model.family,
            kind=kind,
            params=params,
            format=model.experts if term in _OF_EXPERTS else model.dense,
            tokens=tokens,
            context=context,
            piece=piece,
            seconds=typical(samples),
            error=_spread(samples) if any(samples) else None,
            disturbed=_worth_telling(model.disturbed),
        )


def _spread(samples: Sequence[float]) -> float | None:
    return float(pstdev(samples)) if len(samples) > 1 else None


def _worth_telling(disturbed: float) -> float | None:
    return disturbed if disturbed >= DISTURBED else None
