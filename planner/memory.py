"""What goes where: weights, caches and workspace against VRAM, RAM and disk."""

from __future__ import annotations

from dataclasses import dataclass

from planner.capacity import equal_capacities
from planner.cost import CostModel, weight_bytes
from planner.errors import SpecError

VRAM_RESERVE_BYTES = 600 * 2**20
"""Driver context, compiled kernels and allocator slack: assumed."""
RAM_RESERVE_BYTES = 2 * 2**30
"""The operating system and Python with torch: assumed."""


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
    in_ram
        Share of the experts that stay in RAM; the rest are read from disk when needed.
    shortage
        What does not fit, in words; None when everything does.
    """

    items: tuple[Item, ...]
    vram_bytes: int
    ram_bytes: int
    slots: tuple[int, ...]
    in_ram: float
    shortage: str | None

    @property
    def fits(self) -> bool:
        """Whether the model can run at all."""
        return self.shortage is None

    def used(self, place: str) -> int:
        """Bytes taken in ``place``."""
        return sum(item.bytes for item in self.items if item.place == place)


def fit(cost: CostModel, *, context: int, prompt: int, batch: int) -> Fit:
    """Place a model's memory.

    Parameters
    ----------
    cost
        The model, the machine and the formats.
    context
        Tokens of cache reserved for each sequence.
    prompt
        Tokens computed at once in prefill, which sizes the workspace.
    batch
        Sequences.

    Raises
    ------
    SpecError
        When the context exceeds the model's, or the prompt exceeds the context.
    """
    model, hardware = cost.model, cost.hardware
    _check_lengths(cost, context, prompt)
    experts = model.experts
    dense = weight_bytes(model.dense_params, cost.dense_format)
    cache = model.cached_numbers(context) * cost.kv_bytes * batch
    workspace = workspace_bytes(cost, prompt * batch)
    stored = experts.count * model.moe_layers * cost.experts.bytes
    home = "vram" if hardware.gpu else "ram"
    items = [
        Item(f"dense weights ({cost.dense_format})", home, dense),
        Item(f"KV cache ({context} tokens)", home, cache),
        Item("workspace", home, workspace),
        Item("operating system and runtime", "ram", RAM_RESERVE_BYTES),
    ]
    vram = int(hardware.gpu.vram_bytes.value) if hardware.gpu else 0
    ram = int(hardware.cpu.ram_bytes.value)
    shortage = None
    slots = 0
    if hardware.gpu:
        items.append(Item("driver and kernels", "vram", VRAM_RESERVE_BYTES))
        free = vram - _sum(items, "vram")
        if free < 0:
            shortage = f"VRAM is short by {-free / 2**30:.2f} GiB before any expert"
        slots = min(max(0, free) // cost.experts.bytes, experts.count * model.moe_layers)
        items.append(Item(f"expert slots ({slots})", "vram", slots * cost.experts.bytes))
    room = ram - _sum(items, "ram")
    if room < 0:
        shortage = f"RAM is short by {-room / 2**30:.2f} GiB before any expert"
    kept = min(stored, max(0, room))
    items.append(Item(f"experts in RAM ({cost.expert_format})", "ram", kept))
    items.append(Item(f"expert store ({cost.expert_format})", "disk", stored))
    return Fit(
        items=tuple(items),
        vram_bytes=vram,
        ram_bytes=ram,
        slots=equal_capacities(slots, model.moe_layers, experts.count),
        in_ram=kept / stored,
        shortage=shortage,
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


def _check_lengths(cost: CostModel, context: int, prompt: int) -> None:
    longest = cost.model.context
    if longest is not None and context > longest:
        raise SpecError(
            f"--context {context} exceeds the {longest} tokens {cost.model.name} was made for",
            hint=f"use --context {longest} or less",
        )
    if prompt > context:
        raise SpecError(
            f"--prompt {prompt} exceeds --context {context}",
            hint="raise --context or shorten the prompt",
        )
