"""Turns what torch raises about a GPU into this package's errors."""

from __future__ import annotations

from gpu_experts.cuda.runtime import Runtime, ran_out_of_memory
from gpu_experts.errors import DeviceMemoryError
from gpu_experts.events import failed


class Guard:
    """Turns torch's errors into this package's; entered several times a layer, so no generator."""

    __slots__ = ("_asked_bytes", "_runtime", "_what")

    def __init__(self, runtime: Runtime, what: str, asked_bytes: int | None) -> None:
        self._runtime, self._what, self._asked_bytes = runtime, what, asked_bytes

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if not isinstance(error, RuntimeError):
            return
        if not ran_out_of_memory(error):
            said = next(iter(str(error).splitlines()), type(error).__name__)
            raise failed(self._what, said) from error
        asked, free = self._asked_bytes, self._runtime.memory().free_bytes
        words = "" if asked is None else f"{asked} bytes asked for, "
        raise DeviceMemoryError(
            f"no memory on {self._runtime.name} for {self._what}: {words}{free} free",
            asked_bytes=asked,
            free_bytes=free,
            hint="use fewer slots, a shorter context, or close what else uses the device",
        ) from error
