"""What is known before the first token: how fast this machine is, and which experts are used."""

from __future__ import annotations

import sys
from pathlib import Path

from gpu_experts.device import Device
from hybrid.ask.asked_model import find_model
from hybrid.errors import UsageError
from hybrid.machine import calibrations
from hybrid.machine.calibrations import Identity
from hybrid.machine.machines import Machine
from hybrid.measure.calibrate import hardware_for
from hybrid.model import Model
from planner.decide.popularity import Popularity, read_popularity


def machine_with(device: Device, directory: Path, threads: int) -> Machine:
    """Return this machine with ``device`` as its GPU, as a model runs on it.

    A real device is measured with the model's shape when it is used for the first time, or what
    was measured is damaged, which takes about a minute; what other programs disturbed is taken as
    it is, until ``hybrid calibrate`` measures it again. For a model without experts, whose shape
    decides nothing, any calibration will do. So may an emulated one be, by ``hybrid
    calibrate``; else it is taken for that of ``EMULATED_AS``, beside this machine's CPU where that
    was calibrated.

    Parameters
    ----------
    directory
        The converted model's.
    """
    if device.backend.emulated:
        return Machine.emulating(find_model(directory), threads)
    damaged = calibrations.damage(Identity.of_this_machine(threads, device.name))
    if damaged is not None:
        _say(f"{damaged.reason}: measuring anew")
    spec = hardware_for(
        directory if find_model(directory).spec.moe_layers else None,
        force=damaged is not None,
        calmer=False,
        device=device,
        threads=threads,
        progress=_say,
    )
    return Machine(spec)


def known_uses(file: Path | None, name: str, model: Model) -> Popularity | None:
    """Return the uses of experts that a popularity file or a routing trace (``.npz``) counts.

    Parameters
    ----------
    name, model
        The model that they have to be of.

    Raises
    ------
    TraceError
        When it is damaged or of another model.
    """
    if file is None:
        return None
    if not model.layers:
        raise UsageError(
            f"{name} has no experts, {file} counts how often some were used",
            hint="leave the popularity file out",
        )
    if file.suffix == ".npz":
        return Popularity.of_trace(file, name, len(model.layers[0].blocks))
    uses = read_popularity(file)
    uses.check_weights(model.weights, name, str(file))
    if uses.identity is None:
        _say(f"{file} does not say of which weights of {uses.model} it is: taken for this model's")
    return uses


def _say(text: str) -> None:
    print(f"hybrid: {text}", file=sys.stderr)
