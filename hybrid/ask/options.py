"""What a user asks of a session, understood once: sizes in bytes, devices and dtypes by name.

Loads neither torch nor numba.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

from gpu_experts import backends
from hybrid.ask.counts import whole_number
from hybrid.ask.dtypes import check_dtype
from hybrid.ask.formats import check_formats
from hybrid.ask.sizes import Size, size_in_bytes
from hybrid.ask.speculate import Speculate
from hybrid.errors import UsageError
from planner.decide.policies import DEFAULT_POLICY, check_policy


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is asked for; None is whatever there is, or what suits.

    Make one with :meth:`of`, which takes what users write.

    Attributes
    ----------
    experts, dense
        Weight formats.
    dtype
        Name of what dense layers that are not quantized compute in.
    device
        Name of what the model runs on: ``"cpu"``, ``"emulated"``, ``"cuda"``, ``"cuda:1"``.
    vram_bytes, ram_bytes
        Memory to use of the device, 0 for the CPU alone, and of the host.
    context
        Tokens of cache to keep memory for.
    threads
        Of the CPU; whoever knows how many there can be checks it.
    popularity
        A file of how often the experts were used, or a routing trace (``.npz``).
    policy
        Name of the cache policy that decides which experts stay on the device.
    verify
        Whether to compare the store with its checksums first.
    speculate
        Which tokens are drafted, to be checked several at a time.
    keep_timeline, record_routing
        Whether to keep what every lane does, and which experts every token uses.
    """

    experts: str | None = None
    dense: str | None = None
    dtype: str | None = None
    device: str | None = None
    vram_bytes: int | None = None
    ram_bytes: int | None = None
    context: int | None = None
    threads: int | None = None
    popularity: Path | None = None
    policy: str = DEFAULT_POLICY
    verify: bool = False
    speculate: Speculate = field(default_factory=Speculate)
    keep_timeline: bool = False
    record_routing: bool = False

    @classmethod
    def of(
        cls,
        *,
        vram: Size = None,
        ram: Size = None,
        dtype: Any = None,
        device: Any = None,
        context: int | None = None,
        popularity: str | PathLike[str] | None = None,
        policy: str = DEFAULT_POLICY,
        speculate: Any = None,
        prefix: str = "",
        **as_it_is: Any,
    ) -> Options:
        """Understand what a user wrote.

        Parameters
        ----------
        vram, ram
            Bytes, a text such as ``"6GiB"``, or ``"auto"``.
        dtype, device
            Names, or what torch calls them; a device's number is a GPU's.
        speculate
            ``"auto"``, ``"off"``, ``"lookup"``, or how many tokens to draft.
        prefix
            Stands before the names of sizes in errors: ``"--"`` for a command's options.
        as_it_is
            The other fields.

        Raises
        ------
        UsageError
            When a value cannot be, or two contradict each other.
        """
        if not prefix:  # a plan may be in any format that a checkpoint has, and says so itself
            check_formats(as_it_is.get("experts"), as_it_is.get("dense"))
        name, vram_bytes = _device_name(device), size_in_bytes(vram, f"{prefix}vram")
        if name == "cpu" and vram_bytes:
            raise UsageError(
                f"vram {vram!r} is asked for with device 'cpu'",
                hint="leave one of them out: the CPU has no vram",
            )
        if name not in (None, "cpu") and vram_bytes == 0:
            raise UsageError(
                f"device {name!r} is asked for with vram {vram!r}",
                hint="leave one of them out: vram=0 is the CPU alone",
            )
        return cls(
            dtype=_dtype_name(dtype),
            device=name,
            vram_bytes=vram_bytes,
            ram_bytes=size_in_bytes(ram, f"{prefix}ram"),
            context=None if context is None else whole_number(context, "context"),
            popularity=None if popularity is None else Path(popularity),
            policy=check_policy(policy),
            speculate=Speculate.of(speculate),
            **as_it_is,
        )

    @property
    def alone(self) -> bool:
        """Whether the CPU alone is asked for."""
        return self.device == "cpu" or self.vram_bytes == 0


def _device_name(device: Any) -> str | None:
    """Return the name that ``device`` means."""
    if device is None or isinstance(device, str):
        return device
    if isinstance(device, int) and not isinstance(device, bool):
        return backends.by_number(device)
    if not isinstance(getattr(device, "type", None), str):
        raise UsageError(
            f"device is {device!r}, neither a name nor a number",
            hint=f"choose {backends.choices()} or cpu, or leave it out",
        )
    return str(device)


def _dtype_name(dtype: Any) -> str | None:
    """Return the name of what to compute in, which torch may know more of; None is automatic."""
    if dtype is None:
        return None
    known = str(dtype)
    if not isinstance(dtype, str) and known.startswith("torch."):
        return known.removeprefix("torch.")
    return None if check_dtype(dtype) == "auto" else dtype
