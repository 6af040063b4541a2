"""The few calls of torch.cuda that the device needs; tests put others in place."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from gpu_experts.device import Memory
from gpu_experts.errors import DeviceFailedError

#: Compute capability from which on a GPU multiplies bfloat16, and Triton uses tensor cores at all.
AMPERE = 8

#: How errors say that memory ran out which torch's own allocator does not hand out: kernels being
#: loaded, cuBLAS's handles, the driver's buffers.
_NO_MEMORY = ("out of memory", "ALLOC_FAILED")


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch, Triton, cuBLAS or the driver says that memory ran out."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(said in str(error) for said in _NO_MEMORY)


def runs_on(capability: tuple[int, int], built_for: Sequence[str]) -> bool:
    """Whether a GPU runs code for one of ``built_for``, such as ``sm_86`` and ``compute_90``.

    Machine code runs on the same generation from its own minor version on, the intermediate code
    on all that came later. Where torch names neither, nothing is known against it.
    """

    def runs(kind: str, version: tuple[int, int], special: str) -> bool:
        if special == "a":
            return version == capability
        newer = kind == "compute" and not special
        return version <= capability and (newer or version[0] == capability[0])

    found = [re.fullmatch(r"(sm|compute)_(\d+)(\d)([a-z]?)", name) for name in built_for]
    known = [(m[1], (int(m[2]), int(m[3])), m[4]) for m in found if m]
    return not known or any(runs(*one) for one in known)


class RawEvent(Protocol):
    """A timed event as torch.cuda has it."""

    def record(self, stream: Any) -> None: ...
    def query(self) -> bool: ...
    def elapsed_time(self, end_event: Any) -> float: ...


class Stream(Protocol):
    """A stream as torch.cuda has it."""

    def wait_event(self, event: Any) -> None: ...


class Runtime(Protocol):
    """One GPU.

    Attributes
    ----------
    device, name
        What torch calls it, and what people call it.
    dtype
        The half-precision type that it multiplies natively.
    """

    device: torch.device
    name: str
    dtype: torch.dtype

    def memory(self) -> Memory: ...
    def stream(self) -> Stream: ...
    def current(self) -> Stream: ...
    def event(self) -> RawEvent: ...
    def on(self, stream: Stream) -> Any: ...
    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor: ...
    def release_cached(self) -> None: ...


class CudaRuntime:
    """The GPU that torch.cuda calls ``index``.

    Raises
    ------
    DeviceFailedError
        When there is none of this number.
    """

    def __init__(self, index: int) -> None:
        if not torch.cuda.is_available():
            built = torch.version.cuda is not None
            raise DeviceFailedError(
                "torch finds no CUDA device",
                hint="check the driver with nvidia-smi"
                if built
                else f"torch {torch.__version__} is built without CUDA: install one that is not",
            )
        count = torch.cuda.device_count()
        if not 0 <= index < count:
            raise DeviceFailedError(
                f"no CUDA device {index}: this machine has {count}",
                hint=f"choose one of: {', '.join(map(str, range(count)))}",
            )
        self.device = torch.device("cuda", index)
        self.name = f"{torch.cuda.get_device_name(index)} (cuda:{index})"
        capability = torch.cuda.get_device_capability(index)
        built_for = torch.cuda.get_arch_list()
        if not runs_on(capability, built_for):
            raise DeviceFailedError(
                f"torch {torch.__version__} has no code for {self.name} of compute capability "
                f"{capability[0]}.{capability[1]}: it is built for {', '.join(built_for)}",
                hint="install a torch that is built for it, or use the CPU alone (vram=0)",
            )
        self.dtype = torch.bfloat16 if capability[0] >= AMPERE else torch.float16

    def memory(self) -> Memory:
        """What the driver says, and what torch holds and does not use."""
        free, total = torch.cuda.mem_get_info(self.device)
        cached = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return Memory(total, free + cached)

    def stream(self) -> Stream:
        return torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]

    def current(self) -> Stream:
        return torch.cuda.current_stream(self.device)

    def event(self) -> RawEvent:
        return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        """Enqueue what follows on ``stream``, from whichever thread.

        Work here writes tensors that were made under inference mode: torch allows that only
        to code that is in it, and whether it is belongs to the thread. So does the current
        device, which Triton launches on; leaving a stream of another device than that would
        make a context there, which takes hundreds of megabytes of its memory.
        """
        with torch.inference_mode():
            if torch.cuda.current_device() == self.device.index and stream == self.current():
                yield  # nothing to switch, and switching takes longer than a launch
                return
            with torch.cuda.device(self.device), torch.cuda.stream(stream):  # type: ignore[arg-type]
                yield

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Host memory that the device can fetch from and write to; RuntimeError when refused."""
        return torch.empty(shape, dtype=dtype, pin_memory=True)

    def release_cached(self) -> None:
        """Give memory that torch holds and does not use back to the driver."""
        torch.cuda.empty_cache()
