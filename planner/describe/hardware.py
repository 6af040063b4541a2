"""Describes a machine to the planner: sizes and rates, each with its source."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any

from planner.describe.bandwidth import check
from planner.describe.checked_table import Fields
from planner.describe.estimate import Source
from planner.describe.terms import CALIBRATED
from planner.errors import SpecError


@dataclass(frozen=True)
class Quantity:
    """A number of the machine in SI units, and where it comes from.

    Parameters
    ----------
    value
        The number; its unit is in the field's name.
    source
        Measured here, fitted, analytic (a data sheet's figure) or assumed.
    origin
        The data sheet, measurement or reasoning it was taken from.
    error
        Relative standard deviation, or None when nobody knows it.
    """

    value: float
    source: Source
    origin: str
    error: float | None = None


CONTEXT_BYTES = 400 * 2**20
"""The part of what a GPU's driver and kernels take that is gone once a process uses the GPU at
all, and missing in the free memory that the GPU then tells: assumed."""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """The accelerator.

    ``reserve_bytes`` of its memory are no model's: the driver's context, compiled kernels and the
    allocator's slack.
    """

    name: str
    vram_bytes: Quantity
    memory_bytes_per_s: Quantity
    flop_per_s: Quantity
    memory_efficiency: Quantity
    flop_efficiency: Quantity
    launch_s: Quantity
    reserve_bytes: Quantity = Quantity(
        600 * 2**20, Source.ASSUMED, "driver context, compiled kernels and allocator slack"
    )


@dataclass(frozen=True, kw_only=True)
class Cpu:
    """The processor and its memory.

    The fields with a default are what the runtime's own code costs beyond arithmetic on this
    processor: a calibration measures them, a data sheet does not have them.
    """

    name: str
    ram_bytes: Quantity
    memory_bytes_per_s: Quantity
    flop_per_s: Quantity
    memory_efficiency: Quantity
    flop_efficiency: Quantity
    start_s: Quantity
    layer_overhead_s: Quantity
    prompt_layer_overhead_s: Quantity | None = None
    """Per layer of a step of several tokens; as of a single one where it is not given."""
    token_start_s: Quantity | None = None
    prompt_start_s: Quantity | None = None
    """Around the layers of a decode step and of a prompt: embedding, sampling, bookkeeping."""
    deciding_s: Quantity | None = None
    """Beside a GPU, for every activated expert of a layer: placing it and handing it over."""


@dataclass(frozen=True, kw_only=True)
class Link:
    """From host memory to the accelerator."""

    bytes_per_s: Quantity
    latency_s: Quantity
    cpu_slowdown: Quantity
    """How many times longer CPU experts take while copies read the same DRAM; at least 1."""


@dataclass(frozen=True, kw_only=True)
class Disk:
    """Where the expert store lies when RAM is short."""

    bytes_per_s: Quantity
    latency_s: Quantity


@dataclass(frozen=True, kw_only=True)
class Point:
    """One calibration measurement: what one expert took on a lane.

    Parameters
    ----------
    lane
        ``cpu``, ``gpu`` or ``copy``; ``panels`` is the processor, too, by torch's products.
    hidden, intermediate, format
        The expert's shape and weight format.
    load
        Tokens; 0 for a copy.
    seconds, error
        What it typically took, and the standard deviation of that.
    disturbed
        Part of the processors' time that other programs took meanwhile, where it was too much.
    matrices
        The expert's: 3 with a gate, 2 without; at least 2 where nobody says.
    """

    lane: str
    hidden: int
    intermediate: int
    format: str
    load: int
    seconds: float
    error: float | None = None
    disturbed: float | None = None
    matrices: int = 2


@dataclass(frozen=True, kw_only=True)
class TermPoint:
    """One calibration measurement of what is no routed expert.

    Parameters
    ----------
    term
        One of ``planner.describe.terms.CALIBRATED``: attention (norms, router and residual sums
        included), shared experts or the MLP of a layer without experts, the head, what a step
        costs around its layers and head and what comes on top of that where it is asked for, what
        one routed expert adds to a single token's layer on the CPU, what the host takes in a layer
        from the router's answer until the device has its work and by how much every expert to copy
        makes that longer, and what a layer's experts take beyond their plan, until their sum is
        there.
    family
        The ``model_type`` whose code was measured.
    kind
        The attention's kind; empty elsewhere.
    params
        Weights of the part: of one layer's attention, of the layer's dense weights besides it,
        of the head, of one expert; for what surrounds the layers, of the head.
    format
        Their weight format.
    tokens, context
        Tokens of the step, and in the cache after it. A single token takes the path of decode.
    piece
        So many tokens of a prompt, at most, were computed at a time; 0 is all of them.
    seconds, error
        What it typically took, and the standard deviation of that.
    lane
        Where the dense weights were: ``cpu``, where the CPU-only runtime computes all, or ``gpu``,
        where experts are shared. There attention is from one layer's end to the next router's
        answer, whatever lies between, and the feed-forward what the device computes beyond that:
        shared experts while the host decides, dense layers before the next one with experts.
    disturbed
        As of :class:`Point`.
    """

    term: str
    family: str
    kind: str = ""
    params: int
    format: str
    tokens: int
    context: int
    piece: int = 0
    seconds: float
    error: float | None = None
    lane: str = "cpu"
    disturbed: float | None = None


PANELS = "panels"
LANES = ("cpu", "gpu", "copy", PANELS)
TERM_LANES = ("cpu", "gpu")
_LIKE = "a hardware description that ships (configs/hardware)"
_PARTS: dict[str, type] = {"gpu": Gpu, "cpu": Cpu, "link": Link, "disk": Disk}
_RATIOS = ("memory_efficiency", "flop_efficiency")
_MAY_BE_ZERO = (
    "reserve_bytes",
    "launch_s",
    "latency_s",
    "start_s",
    "layer_overhead_s",
    "prompt_layer_overhead_s",
    "token_start_s",
    "prompt_start_s",
    "deciding_s",
)


@dataclass(frozen=True, kw_only=True)
class HardwareSpec:
    """A machine. ``gpu`` and ``link`` are both present or both absent.

    Raises
    ------
    SpecError
        On construction from a table with a missing, misnamed or impossible value, or with points
        that read faster than the memory.
    """

    name: str
    summary: str
    cpu: Cpu
    disk: Disk
    gpu: Gpu | None = None
    link: Link | None = None
    points: tuple[Point, ...] = field(default=())
    terms: tuple[TermPoint, ...] = field(default=())

    @classmethod
    def from_table(cls, data: Mapping[str, Any], where: str) -> HardwareSpec:
        """Build from a parsed ``configs/hardware/*.toml`` or what a calibration wrote."""
        table = Fields(data, where, _LIKE)
        table.only(("name", "summary", *_PARTS, "points", "terms"))
        parts: dict[str, Any] = {
            part: _part(kind, table.table(part))
            for part, kind in _PARTS.items()
            if table.has(part) or part in ("cpu", "disk")
        }
        if ("gpu" in parts) != ("link" in parts):
            raise SpecError(
                f"{where} has only one of [gpu] and [link]",
                hint="describe both, or neither for a machine without a GPU",
            )
        spec = cls(
            name=table.text("name"),
            summary=table.text("summary", ""),
            points=tuple(map(_point, _entries(data, "points", where))),
            terms=tuple(map(_term, _entries(data, "terms", where))),
            **parts,
        )
        check(spec, where)
        return spec

    def with_values(self, part: str, **values: float) -> HardwareSpec:
        """Return this machine with numbers of one part replaced, marked as assumed by the user.

        Raises
        ------
        SpecError
            When the machine has no such part, or a value is not positive, or is below what the
            machine's points read at.
        """
        old = getattr(self, part)
        if old is None:
            raise SpecError(
                f"{self.name} has no {part} to change", hint="choose a machine that has one"
            )
        for name, value in values.items():
            if not value > 0:
                raise SpecError(
                    f"{part} {name} is {value:g}, not above 0",
                    hint="for a machine without a GPU choose hardware without one",
                )
        new = {name: Quantity(v, Source.ASSUMED, "set by the user") for name, v in values.items()}
        changed = replace(self, **{part: replace(old, **new)})
        check(changed, f"{self.name} changed")
        return changed

    def emulated(self) -> HardwareSpec:
        """Return this machine with its GPU emulated, which reserves nothing of its memory."""
        if self.gpu is None or not self.gpu.reserve_bytes.value:
            return self
        none = Quantity(0, Source.ANALYTIC, "an emulated device has no driver")
        gpu = replace(self.gpu, reserve_bytes=none)
        return replace(self, summary=f"{self.summary}; its GPU is emulated", gpu=gpu)


def _part(kind: type, table: Fields) -> Any:
    """Read one section: the fields of ``kind``, all without a default, and nothing else."""
    table.only([f.name for f in fields(kind)])
    wanted = [f.name for f in fields(kind) if f.default is MISSING or table.has(f.name)]
    return kind(**{n: table.text(n) if n == "name" else _quantity(table, n) for n in wanted})


def _quantity(table: Fields, name: str) -> Quantity:
    """Read ``name = { value = ..., source = ..., from = ... }``."""
    _, raw = table.first(name)
    if not isinstance(raw, Mapping):
        raise SpecError(
            f"{table.where}: {name} is {raw!r}, without a source",
            hint=f'write {name} = {{ value = 1e9, source = "analytic", from = "data sheet" }}',
        )
    entry = Fields(raw, f"{table.where} {name}", _LIKE)
    entry.only(("value", "source", "from", "error"))
    least, most = _range(name)
    value = entry.number("value", least=least, most=most)
    if value == 0 and name not in _MAY_BE_ZERO:
        raise SpecError(f"{entry.where} is 0", hint="sizes, rates and efficiencies are above 0")
    word = entry.text("source")
    if word not in {source.value for source in Source}:
        raise SpecError(
            f"{entry.where}: source is {word!r}", hint=f"use one of {', '.join(Source)}"
        )
    error = entry.number("error") if entry.has("error") else None
    return Quantity(value, Source(word), entry.text("from"), error)


def _range(name: str) -> tuple[float, float]:
    """Return what a value may be; a rate in GB/s, say, is far out of it."""
    if name in _RATIOS:
        return 1e-3, 1.0
    if name.endswith("_per_s"):
        return 1e6, 1e18
    if name.endswith("_s"):
        return 0.0, 60.0
    return (1.0, 1e3) if name == "cpu_slowdown" else (0.0, 1e18)


def _entries(data: Mapping[str, Any], name: str, where: str) -> Iterator[Fields]:
    """Read a list of tables, absent or not."""
    found = data.get(name, [])
    if not isinstance(found, list) or not all(isinstance(entry, Mapping) for entry in found):
        raise SpecError(f"{where}: {name} is not a list of tables", hint=f"write [[{name}]] tables")
    for index, entry in enumerate(found):
        yield Fields(entry, f"{where} {name}[{index}]", _LIKE)


def _point(entry: Fields) -> Point:
    """Read one calibration point."""
    entry.only([f.name for f in fields(Point)])
    lane = entry.text("lane")
    if lane not in LANES:
        raise SpecError(f"{entry.where}: lane is {lane!r}", hint=f"use one of {', '.join(LANES)}")
    return Point(
        lane=lane,
        hidden=entry.count("hidden"),
        intermediate=entry.count("intermediate"),
        format=entry.text("format"),
        load=entry.count("load", default=0, least=0 if lane == "copy" else 1),
        seconds=entry.number("seconds"),
        error=entry.number("error") if entry.has("error") else None,
        disturbed=entry.number("disturbed") if entry.has("disturbed") else None,
        matrices=entry.count("matrices", default=2),
    )


def _term(entry: Fields) -> TermPoint:
    """Read one calibration point of what is no routed expert."""
    entry.only([f.name for f in fields(TermPoint)])
    term = entry.text("term")
    if term not in CALIBRATED:
        raise SpecError(
            f"{entry.where}: term is {term!r}",
            hint=f"use one of {', '.join(CALIBRATED)}; earlier calibrations named them otherwise: "
            "measure again with 'hybrid calibrate'",
        )
    lane = entry.text("lane", "cpu")
    if lane not in TERM_LANES:
        raise SpecError(
            f"{entry.where}: lane is {lane!r}", hint=f"use one of {', '.join(TERM_LANES)}"
        )
    return TermPoint(
        term=term,
        family=entry.text("family"),
        kind=entry.text("kind") if entry.data.get("kind") else "",
        params=entry.count("params", least=0),
        format=entry.text("format"),
        tokens=entry.count("tokens"),
        context=entry.count("context"),
        piece=entry.count("piece", default=0, least=0),
        seconds=entry.number("seconds"),
        error=entry.number("error") if entry.has("error") else None,
        disturbed=entry.number("disturbed") if entry.has("disturbed") else None,
        lane=lane,
    )


def to_toml(spec: HardwareSpec) -> str:
    """Return ``spec`` as the TOML text that ``HardwareSpec.from_table`` reads back as an equal."""
    lines = [f"name = {_toml(spec.name)}"]
    if spec.summary:
        lines.append(f"summary = {_toml(spec.summary)}")
    # Lists of one-line tables stand above the first section, or they would belong to it.
    for name in ("points", "terms"):
        if entries := [_pairs(vars(point)) for point in getattr(spec, name)]:
            lines += [f"{name} = [", *(f"    {{ {entry} }}," for entry in entries), "]"]
    for part in _PARTS:
        values = getattr(spec, part)
        if values is None:
            continue
        lines += ["", f"[{part}]"]
        for name, value in vars(values).items():
            if isinstance(value, Quantity):
                number = {"value": value.value, "source": str(value.source)}
                entry = {**number, "from": value.origin, "error": value.error}
                lines.append(f"{name} = {{ {_pairs(entry)} }}")
            elif value is not None:
                lines.append(f"{name} = {_toml(value)}")
    return "\n".join(lines) + "\n"


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{n} = {_toml(v)}" for n, v in values.items() if v not in (None, ""))


def _toml(value: str | float) -> str:
    """Return a value as TOML; JSON's texts and Python's shortest numbers are TOML, too."""
    return json.dumps(value) if isinstance(value, str) else repr(value)
