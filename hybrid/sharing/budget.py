"""What a model may use of a device and of this machine, and what lies where within that."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gpu_experts.device import Device
from hybrid.ask.names import find_hardware
from hybrid.errors import UsageError
from hybrid.formats.notes import Note
from hybrid.formats.registry import packs_dense
from hybrid.machine.machines import Machine
from hybrid.model import Model
from planner.cost.cost import CostModel
from planner.decide import policies
from planner.decide.popularity import Popularity
from planner.describe.hardware import HardwareSpec
from planner.describe.words import in_words
from planner.foretell.memory import STAGING, Fit, fit
from planner.foretell.request import Request


@dataclass(frozen=True)
class Budget:
    """What a model may use.

    Parameters
    ----------
    vram_bytes
        Of the device; None is all that is free there.
    ram_bytes
        Of the host; None is all it has.
    context
        Tokens of cache to keep room for.
    popularity
        What is known of the experts' use; None is nothing.
    record_routing
        Whether to keep what the routers choose.
    policy
        Which experts stay on the device: one of ``planner.decide.policies.names()``.
    """

    vram_bytes: int | None
    ram_bytes: int | None
    context: int
    popularity: Popularity | None = None
    record_routing: bool = False
    policy: str = policies.DEFAULT_POLICY


def fitted(
    model: Model, device: Device, hardware: HardwareSpec, budget: Budget
) -> tuple[CostModel, Fit]:
    """Return what a loaded model takes where on ``device``, and what predicts its durations.

    Takes what :func:`place_model` takes.
    """
    if device.backend.emulated:
        hardware = hardware.emulated()
    machine = Machine(hardware).within(
        budget.vram_bytes, budget.ram_bytes, (device.name, device.memory())
    )
    cost = cost_of(model, machine.spec, device.torch_device)
    layers = model.layers
    return cost, fit(
        cost,
        context=budget.context,
        batch=Request.batch,
        slot_bytes=layers[0].blocks.shape[1] if layers else None,
        staging=STAGING,
        popularity=budget.popularity,
        dense_stored=model.dense_bytes,
    )


def cost_of(model: Model, hardware: HardwareSpec, where: torch.device) -> CostModel:
    """Return what predicts sizes and durations of a loaded model whose dense part is ``where``."""
    index = model.index
    dense = index.dense_format
    # Quantized matrices are widened on a GPU, and what is not quantized is torch's anywhere.
    if dense is None and index.dense and where.type == "cpu":
        own = model.asked
        return CostModel(own.spec, hardware, index.format, own.dense, dense_bytes=own.dense_bytes)
    if dense is None or not packs_dense(dense) or where.type != "cpu":
        dense = "f32" if model.network.dtype == torch.float32 else "bf16"
    return CostModel(model.spec, hardware, index.experts_format, dense)


def fitted_alone(model: Model, ram_bytes: int, context: int) -> Fit:
    """Return what a loaded model takes of ``ram_bytes`` on the CPU alone.

    Raises
    ------
    UsageError
        When it does not run within them.
    """
    hardware = find_hardware("cpu-only-laptop").with_values("cpu", ram_bytes=ram_bytes)
    placed = Request(
        model=model.spec,
        hardware=hardware,
        experts=model.asked.experts,
        dense=model.asked.dense,
        dense_bytes=model.asked.dense_bytes,
        context=context,
        prompt=min(Request.prompt, context),
    ).fit()
    if not placed.fits:
        raise UsageError(
            str(placed.shortage),
            hint="give ram what is needed or more, or leave it out to use all that there is",
        )
    return placed


def beyond_ram(placed: Fit) -> Note | None:
    """Say how many experts memory has no room for; None when it has for all."""
    if placed.in_ram >= 1:
        return None
    stored, kept = (
        sum(item.bytes for item in placed.items if item.name.startswith(what))
        for what in ("expert store", "experts in RAM")
    )
    return Note(
        "experts beyond ram",
        f"of {in_words(placed.ram_bytes)}, {in_words(kept)} are left for experts: "
        f"{1 - placed.in_ram:.0%} of them stay on disk, and are read again when they are used "
        "unless the system has memory to spare",
        f"give ram {in_words(placed.ram_bytes + stored - kept)} or more",
    )
