"""A GPU through torch.cuda: slots in its memory, copies on a stream of their own.

Experts are computed on the stream that is current when :meth:`CudaDevice.compute` is called,
the model's own: hidden states and outputs need no further ordering. Blocks are copied on a
second stream. A copy whose block lies in pinned memory is enqueued at once; any other is handed
to a thread that fills a pinned buffer and enqueues it then. A GPU stream cannot wait for
something that is not enqueued yet, so computes that need such a copy are handed to the same
thread, behind it; all others are enqueued at once. Both streams therefore get their work in the
order of the calls. The host waits in :meth:`CudaDevice.to_host`, and in
:meth:`CudaDevice.join` for that thread to have enqueued what is joined, never for the GPU.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from gpu_experts.checks import (
    as_arrays,
    check_compute,
    check_copy,
    check_slots,
    on_host,
    opened,
    require_content,
)
from gpu_experts.cuda import CUDA, kernels
from gpu_experts.cuda.events import ANCHOR_S, Anchor, CudaEvent, issued, over, require
from gpu_experts.cuda.feeder import Feeder, HostBlocks
from gpu_experts.cuda.guard import Guard
from gpu_experts.cuda.runtime import CudaRuntime, Runtime
from gpu_experts.device import F32, I32, TIMEOUT_S, U8, Event, Memory
from gpu_experts.errors import DeviceError, ShapeError
from gpu_experts.events import DoneEvent, failed, poll
from gpu_experts.routing import sort_by_slot
from hybrid.formats.block import Block
from hybrid.formats.notes import Note

#: How long closing waits for what still runs.
CLOSE_S = 5.0
#: What is no larger than this is read by kernels from pinned memory: as a copy it would wait for
#: the copy of an expert that is on the link, which takes longer than reading it does.
LENT_BYTES = 64 << 10


class CudaDevice:
    """A GPU that runs experts from slots in its memory.

    Parameters
    ----------
    index
        Which GPU.
    pinned_bytes
        Host memory to pin: a small ring of buffers, and copies of the blocks that were used
        first with the rest.
    timeout_s
        How long a wait lasts at most that has no time of its own.
    runtime
        What stands for torch.cuda.

    Raises
    ------
    DeviceFailedError
        When there is no such GPU.

    Notes
    -----
    Beside slots, memory goes to outputs and :func:`gpu_experts.cuda.kernels.workspace_bytes`.
    """

    backend = CUDA

    def __init__(
        self,
        index: int = 0,
        pinned_bytes: int = 256 << 20,
        *,
        timeout_s: float = TIMEOUT_S,
        runtime: Runtime | None = None,
    ) -> None:
        self._runtime: Runtime = runtime or CudaRuntime(index)
        self.name = self._runtime.name
        self.dtype: torch.dtype | None = self._runtime.dtype
        self.meaningful = True
        self.torch_device = self._runtime.device
        self.notes: list[Note] = []
        self._pinned_bytes = pinned_bytes
        self._timeout_s = timeout_s
        self._layout: Block | None = None
        self._slots: Tensor | None = None
        self._host: HostBlocks | None = None
        self._feeder: Feeder | None = None
        # By the activations' type: every type has kernels of its own.
        self._implementations: dict[torch.dtype, kernels.Implementation] = {}
        self._tried: Block | None = None
        self._lent: list[Tensor] = []
        self._written: dict[int, CudaEvent] = {}
        self._read: dict[int, CudaEvent] = {}
        self._last: dict[str, CudaEvent] = {}
        with self._guard("the copy stream"):
            self._link = self._runtime.stream()
            self._anchor = Anchor(self._runtime, timeout_s)

    def pin(self, pinned_bytes: int) -> None:
        self._pinned_bytes = pinned_bytes

    def memory(self) -> Memory:
        with self._guard("asking for free memory"):
            return self._runtime.memory()

    def open(self, layout: Block, slots: int) -> None:
        check_slots(layout)
        same = self._layout is not None and self._layout.block_bytes == layout.block_bytes
        host = self._host if same else None
        self.close()
        asked = slots * layout.stride
        what = f"{slots} slots of {layout.stride} bytes"
        with self._guard(what, asked):
            if layout != self._tried:
                self._implementations.clear()
                self._tried = layout
            self._implementation(layout, self._runtime.dtype)
            self._runtime.release_cached()
            shape = (slots, layout.stride)
            self._slots = torch.empty(shape, dtype=torch.uint8, device=self.torch_device)
            # What the memory was used for before may not be over on the model's stream.
            free = self._runtime.event()
            free.record(self._runtime.current())
            self._link.wait_event(free)
        self._layout = layout
        self._host = host or self._host_blocks(layout)
        self._feeder = Feeder("copies")
        weakref.finalize(self, self._feeder.close, 0.0)

    def close(self) -> None:
        if self._feeder is not None:
            self._feeder.close()
        for stream in (self._link, self._runtime.current()) if self._last else ():
            # Memory that is still written must not become someone else's; a device that hangs
            # or failed writes nothing more that anyone would read.
            try:
                with self._guard("closing"):
                    reached = self._runtime.event()
                    reached.record(stream)
                    poll(reached.query, min(CLOSE_S, self._timeout_s), "the device's last work")
            except DeviceError:
                continue
        self._layout = self._slots = self._host = self._feeder = None
        self._lent.clear()
        self._written.clear()
        self._read.clear()
        self._last.clear()

    def copy(self, block: U8, slot: int, what: str) -> Event:
        layout, slots, host, feeder = self._opened()
        check_copy(layout, len(slots), block, slot)
        event, reader = self._event(what), self._read.get(slot)

        def issue() -> None:
            source = host.fetch(block, event)
            with self._runtime.on(self._link):
                if reader is not None and reader.failure is None:
                    self._link.wait_event(reader.end)
                event.start.record(self._link)
                target = slots[slot, : layout.block_bytes]
                target.copy_(source[: layout.block_bytes], non_blocking=True)
                event.end.record(self._link)

        at_once = feeder.idle and host.kept(block) is not None
        self._submit("copy", event, issue, feeder, at_once)
        if host.refused is not None:
            self._note(_refused(host.refused))
        self._written[slot] = event
        return event

    def compute(
        self,
        x: Tensor,
        slot_ids: I32 | list[int],
        routing_weights: F32 | list[float],
        out: Tensor,
        after: Sequence[Event],
        what: str,
    ) -> Event:
        layout, slots, _, feeder = self._opened()
        check_compute(layout, len(slots), x, slot_ids, routing_weights, out)
        for name, tensor in (("x", x), ("out", out)):
            if tensor.device != self.torch_device:
                raise ShapeError(f"{name} is on {tensor.device}, the device is {self.torch_device}")
        ids, weights = as_arrays(slot_ids, routing_weights)
        step = kernels.tokens_a_pass(layout, ids.shape[1])
        parts = [
            (at, sort_by_slot(ids[at : at + step], weights[at : at + step]))
            for at in range(0, len(ids), step)
        ]
        used = {slot for _, routing in parts for slot, _, _ in routing.runs}
        require_content(used, self._written)
        needs = [need for need in (*after, *(self._written[s] for s in used)) if not over(need)]
        event, stream, inputs = self._event(what), self._runtime.current(), x.detach()
        with self._guard(what):
            implementation = self._implementation(layout, x.dtype)

        def issue() -> None:
            require(needs, what)
            with self._runtime.on(stream):
                # Before it waits: behind an expert's copy comes the next one's.
                tables = [self._send(routing.table, implementation) for _, routing in parts]
                for need in needs:
                    if isinstance(need, CudaEvent):
                        stream.wait_event(need.end)
                event.start.record(stream)
                for (at, routing), table in zip(parts, tables, strict=True):
                    part = slice(at, at + step)
                    rows = inputs[part].contiguous()
                    kernels.run(rows, routing, table, slots, layout, out[part], implementation)
                event.end.record(stream)

        before = self._last.get("compute")
        at_once = (before is None or before.issued) and all(map(issued, needs))
        self._submit("compute", event, issue, feeder, at_once)
        self._read.update(dict.fromkeys(used, event))
        return event

    def new_output(self, tokens: int) -> Tensor:
        layout, *_ = self._opened()
        with self._guard("an output", 4 * tokens * layout.hidden):
            return torch.zeros(tokens, layout.hidden, dtype=torch.float32, device=self.torch_device)

    def to_host(
        self, *tensors: Tensor, meanwhile: Callable[[], object] | None = None
    ) -> tuple[NDArray[Any], ...]:
        if (last := self._last.get("compute")) is not None:
            last.settled(self._timeout_s)
        reached = self._runtime.event()
        with self._guard("bringing results to the host"):
            copies = tuple(self._fetch(tensor.detach()) for tensor in tensors)
            reached.record(self._runtime.current())
        lent = len(self._lent)
        if meanwhile is not None:
            meanwhile()
        with self._guard("bringing results to the host"):
            poll(reached.query, self._timeout_s, "the device's work so far")
            del self._lent[:lent]  # whoever reads those has done so
            if time.perf_counter() - self._anchor.time > ANCHOR_S:
                self._anchor = Anchor(self._runtime, self._timeout_s)
        return tuple(map(on_host, copies))

    def join(
        self,
        out: Tensor,
        cpu_out: NDArray[Any] | None,
        events: Sequence[Event],
        dtype: torch.dtype,
        timeout_s: float,
    ) -> Tensor:
        last, stream = time.perf_counter() + timeout_s, self._runtime.current()
        for event in events:
            left = max(0.0, last - time.perf_counter())
            if not isinstance(event, CudaEvent):
                event.wait(left)
                continue
            event.wait_issued(left)
            if not event.done():
                stream.wait_event(event.end)
        with self._guard("the join", 4 * out.numel()):
            if cpu_out is None:
                return out.to(dtype)
            implementation = self._implementations.get(dtype, "torch")
            share = self._send(cpu_out, implementation)
            if implementation == "torch":
                return (out + share).to(dtype)
            total = torch.empty_like(out, dtype=dtype)
            with self._runtime.on(stream):
                kernels.add_host(out, share, total)
            return total

    def occupy(self, seconds: float, what: str) -> Event:
        return DoneEvent(what, time.perf_counter())

    def _opened(self) -> tuple[Block, Tensor, HostBlocks, Feeder]:
        layout = opened(self._layout)
        assert self._slots is not None
        assert self._host is not None
        assert self._feeder is not None
        return layout, self._slots, self._host, self._feeder

    def _event(self, what: str) -> CudaEvent:
        with self._guard(what):
            return CudaEvent(what, self._runtime, self._anchor)

    def _submit(
        self,
        lane: str,
        event: CudaEvent,
        issue: Callable[[], None],
        feeder: Feeder,
        at_once: bool,
    ) -> None:
        """Enqueue on the GPU now, or let the thread do it when its turn comes."""

        def attempt() -> DeviceError | None:
            try:
                with self._guard(event.what):
                    issue()
            except DeviceError as error:
                return error
            except Exception as error:  # a compiler's own errors, for one
                failure = failed(event.what, f"{type(error).__name__}: {error}")
                failure.__cause__ = error
                return failure
            return None

        if at_once:
            broken = attempt()
            if broken is not None:
                raise broken
            event.settle()
            self._last[lane] = event
            return

        def job() -> None:
            event.settle(attempt())

        # In this order: Ctrl-C between the two must not leave an event that nobody settles.
        feeder.submit(job, lambda: event.settle(failed(event.what, "the device was closed")))
        self._last[lane] = event

    def _implementation(self, layout: Block, dtype: torch.dtype) -> kernels.Implementation:
        """What runs experts on activations of this type, tried out when it is first needed."""
        known = self._implementations.get(dtype)
        if known is not None:
            return known
        found, note = kernels.choose(layout)
        if found == "triton":
            with self._runtime.on(self._runtime.current()):
                note = kernels.probe(
                    layout, dtype, self.torch_device, lambda array: self._send(array, "triton")
                )
            if note is not None:
                found = "torch"
            elif self._runtime.dtype is torch.float16:
                note = kernels.NO_TENSOR_CORES
        self._note(note)
        self._implementations[dtype] = found
        return found

    def _send(self, array: NDArray[Any], reader: kernels.Implementation) -> Tensor:
        """``array`` where ``reader``'s kernels can read it; it is free for reuse at once."""
        host = torch.from_numpy(array)
        staged, pinned = self._staging(tuple(host.shape), host.dtype)
        staged.copy_(host)
        if reader == "triton" and pinned and array.nbytes <= LENT_BYTES:
            self._lent.append(staged)
            return staged
        return staged.to(self.torch_device, non_blocking=True)

    def _fetch(self, tensor: Tensor) -> Tensor:
        """Enqueue a copy of ``tensor`` to host memory of its own."""
        if tensor.device != self.torch_device:
            return tensor
        staged, _ = self._staging(tuple(tensor.shape), tensor.dtype)
        return staged.copy_(tensor, non_blocking=True)

    def _staging(self, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, bool]:
        """Pinned host memory, or ordinary memory when the system refuses to pin; and which."""
        try:
            return self._runtime.pinned(shape, dtype), True
        except RuntimeError as error:
            self._note(_refused(str(error)))
            return torch.empty(shape, dtype=dtype), False

    def _host_blocks(self, layout: Block) -> HostBlocks:
        def wait(event: Event) -> None:
            event.wait(self._timeout_s)

        def pinned(nbytes: int) -> Tensor:
            return self._runtime.pinned((nbytes,), torch.uint8)

        def ordinary(nbytes: int) -> Tensor:
            return torch.empty(nbytes, dtype=torch.uint8)

        try:
            return HostBlocks(layout.block_bytes, self._pinned_bytes, pinned, wait)
        except (MemoryError, RuntimeError) as error:
            self._note(_refused(str(error)))
            return HostBlocks(layout.block_bytes, 0, ordinary, wait)

    def _note(self, note: Note | None) -> None:
        if note is not None and note not in self.notes:
            self.notes.append(note)

    def _guard(self, what: str, asked_bytes: int | None = None) -> Guard:
        return Guard(self._runtime, what, asked_bytes)


def _refused(reason: str) -> Note:
    return Note(
        "copies to the GPU from ordinary memory, or through few pinned buffers",
        f"the system refused to pin more: {reason.splitlines()[0]}",
        "raise the locked-memory limit (ulimit -l), or use a smaller pinned budget",
    )
