"""Fits weights, caches and workspace into VRAM, RAM and disk."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from enum import StrEnum

from planner.cost.cost import CostModel
from planner.decide.capacity import equal_capacities
from planner.decide.popularity import Popularity
from planner.describe.words import enough_in_words, in_words
from planner.errors import SpecError

RAM_RESERVE_BYTES = 2 * 2**30
"""The operating system and Python with torch: assumed."""


PIECE = 512
"""Tokens of a prompt that a CPU computes at a time."""
STAGING = 4
"""Slots for experts that are copied, used once and not kept."""
PINNED_SHARE = 0.5
"""The most of RAM that is pinned for copies: systems refuse, or starve, beyond about half."""


class HostMemory(StrEnum):
    """How the experts lie in RAM.

    A copy in memory of its own would be the third way: on huge pages it was read 3 % faster than
    the mapped file, which does not pay for loading it.
    """

    PINNED = "pinned"
    """A page-locked copy: the GPU reads it at the link's full rate."""
    FILE = "file-backed"
    """The store itself, memory-mapped: the system drops and reads pages as it needs. Copies to a
    GPU go through a pinned ring."""


class SlotShares(StrEnum):
    """How the slots are shared among the layers."""

    EQUAL = "equally over the layers, as no popularity is known"
    POPULARITY = "over the layers by how their experts were used before"


@dataclass(frozen=True)
class Item:
    """One thing that takes memory."""

    name: str
    place: str
    """``vram``, ``ram`` or ``disk``."""
    bytes: int


@dataclass(frozen=True)
class Fit:
    """How a model lies on a machine.

    Parameters
    ----------
    items
        Everything that takes memory, in the order of the report.
    vram_bytes, ram_bytes
        What the machine has; VRAM 0 without a GPU.
    slots
        GPU expert slots of each MoE layer; 0 without a GPU.
    slot_bytes
        Size of one slot.
    experts
        Of all layers.
    shared
        How the slots are shared among the layers.
    host
        How the experts lie in RAM.
    in_ram
        Share of the experts that stay in RAM; the rest are read from disk when needed.
    dense_stored
        Bytes of dense weights on disk, to the last where their files tell. Where models lie alike,
        they lie alike whatever is known of that.
    """

    items: tuple[Item, ...]
    vram_bytes: int
    ram_bytes: int
    slots: tuple[int, ...]
    in_ram: float
    slot_bytes: int = 0
    experts: int = 0
    shared: SlotShares = SlotShares.EQUAL
    host: HostMemory = HostMemory.FILE
    dense_stored: int = field(default=0, compare=False)

    @property
    def short_of(self) -> tuple[str, ...]:
        """The places, ``vram`` and ``ram``, that are too small before any expert."""
        sizes = {"vram": self.vram_bytes, "ram": self.ram_bytes}
        return tuple(place for place, size in sizes.items() if self.used(place) > size)

    @property
    def fits(self) -> bool:
        """Whether the model can run at all."""
        return not self.short_of

    @property
    def shortage(self) -> str | None:
        """What does not fit, in words; None when everything does."""
        return "; ".join(map(self._shortage, self.short_of)) or None

    def _shortage(self, place: str) -> str:
        needed, size = self.used(place), self.vram_bytes if place == "vram" else self.ram_bytes
        return (
            f"{place.upper()} is short by {in_words(needed - size)} before any expert: "
            f"{enough_in_words(needed)} are needed, {in_words(size)} are there"
        )

    def used(self, place: str) -> int:
        """Bytes taken in ``place``."""
        return sum(item.bytes for item in self.listed if item.place == place)

    def slots_told(self, slots: int) -> str:
        """Say how many experts can be resident in so many slots, and which layers have those."""
        share = f"{slots} of {self.experts} experts can be resident ({slots / self.experts:.0%})"
        return f"{share}, slots are shared {self.shared}"

    def host_told(self) -> str:
        """Say how the experts lie in RAM, and which share of them."""
        kept = math.floor(100 * self.in_ram)
        rest = "" if self.in_ram >= 1 else ", the others are read from disk when they are needed"
        return f"experts are {self.host}, {kept}% of them stay in RAM{rest}"

    @property
    def listed(self) -> tuple[Item, ...]:
        """Everything that takes memory, and what dense weights take on disk."""
        return (*self.items, Item("dense weights", "disk", self.dense_stored))

    def with_dense_stored(self, size: int) -> Fit:
        """Return the same with what dense weights take on disk, where their files tell."""
        return replace(self, dense_stored=size)

    def items_told(self, place: str) -> str:
        """List what takes memory in ``place``."""
        items = (item for item in self.items if item.place == place and item.bytes)
        return ", ".join(f"{item.name} {in_words(item.bytes)}" for item in items)


def fit(
    cost: CostModel,
    *,
    context: int,
    batch: int,
    slot_bytes: int | None = None,
    staging: int = 0,
    dense_stored: int | None = None,
    popularity: Popularity | None = None,
) -> Fit:
    """Place a model's memory.

    Parameters
    ----------
    cost
        The model, the machine and the formats.
    context
        Tokens of cache reserved for each sequence. The workspace is for the longest prompt that
        it admits: a GPU computes that at once, a CPU in pieces.
    batch
        Sequences.
    slot_bytes
        Size of one expert slot; by default that of the expert's weights alone.
    staging
        Slots set aside for experts on their way; the runtime's and the dry run's are ``STAGING``.
    dense_stored
        Bytes of dense weights on disk; as they are counted in memory by default.
    popularity
        Of earlier sessions: shares the slots among the layers; equally without.

    Raises
    ------
    SpecError
        When the context exceeds the model's.
    TraceError
        When the popularity is another model's.
    """
    model, hardware = cost.model, cost.hardware
    if model.context is not None and context > model.context:
        raise SpecError(
            f"--context {context} exceeds the {model.context} tokens {model.name} was made for",
            hint=f"use --context {model.context} or less",
        )
    experts = model.experts
    dense = cost.dense_bytes
    cache = model.cached_numbers(context) * cost.kv_bytes * batch
    at_once = context if hardware.gpu else min(context, PIECE)
    workspace = workspace_bytes(cost, at_once * batch)
    home = "vram" if hardware.gpu else "ram"
    items = [
        Item(f"dense weights ({cost.dense_format})", home, dense),
        Item(f"KV cache ({context} tokens)", home, cache),
        Item("workspace", home, workspace),
        Item("operating system and runtime", "ram", RAM_RESERVE_BYTES),
    ]
    vram = int(hardware.gpu.vram_bytes.value) if hardware.gpu else 0
    ram = int(hardware.cpu.ram_bytes.value)
    if hardware.gpu and (reserve := int(hardware.gpu.reserve_bytes.value)):
        items.append(Item("driver and kernels", "vram", reserve))
    if not model.moe_layers:
        return Fit(
            items=tuple(items),
            vram_bytes=vram,
            ram_bytes=ram,
            slots=(),
            in_ram=1.0,
            dense_stored=dense if dense_stored is None else dense_stored,
        )
    slots, slot_bytes = 0, slot_bytes or cost.experts.bytes
    stored = model.store_bytes(cost.expert_format)
    if hardware.gpu:
        room = max(0, vram - _sum(items, "vram")) // slot_bytes
        staging = min(staging, room)
        slots = min(room - staging, model.expert_count)
        if staging:
            items.append(Item(f"copies on their way ({staging})", "vram", staging * slot_bytes))
        items.append(Item(f"expert slots ({slots})", "vram", slots * slot_bytes))
    room = max(0, ram - _sum(items, "ram"))
    kept = min(stored, room)
    pinned = hardware.gpu and stored <= min(room, PINNED_SHARE * ram)
    host = HostMemory.PINNED if pinned else HostMemory.FILE
    items.append(Item(f"experts in RAM ({cost.expert_format}, {host})", "ram", kept))
    items.append(Item(f"expert store ({cost.expert_format})", "disk", stored))
    if popularity is not None:
        popularity.check(model.moe_layers, experts.count, "the popularity file")
        capacities, shared = popularity.capacities(slots), SlotShares.POPULARITY
    else:
        shared = SlotShares.EQUAL
        capacities = equal_capacities(slots, model.moe_layers, experts.count)
    return Fit(
        items=tuple(items),
        vram_bytes=vram,
        ram_bytes=ram,
        slots=capacities,
        in_ram=kept / stored,
        slot_bytes=slot_bytes,
        experts=model.expert_count,
        shared=shared,
        host=host,
        dense_stored=dense if dense_stored is None else dense_stored,
    )


def workspace_bytes(cost: CostModel, tokens: int) -> int:
    """Activations of ``tokens`` tokens in float32, and one row of logits each for sampling.

    The widest moment of a layer holds the residual, queries, keys, values and the experts' input
    and output rows: eight rows of hidden size, and three of intermediate size per chosen expert.
    """
    model = cost.model
    row = 8 * model.hidden + 3 * model.experts.top_k * model.experts.intermediate
    return 4 * (tokens * row + model.vocab)


def _sum(items: list[Item], place: str) -> int:
    return sum(item.bytes for item in items if item.place == place)
