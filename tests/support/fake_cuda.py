"""A runtime in place of torch.cuda: works on the CPU at once, and logs what is ordered how."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager

import torch

from gpu_experts.device import Memory


class FakeStream:
    """Counts what is enqueued and knows, for every event waited for, since when."""

    def __init__(self, name: str, runtime: FakeRuntime) -> None:
        self.name, self.runtime = name, runtime

    def wait_event(self, event: FakeRaw) -> None:
        assert event.place is not None, "a stream waits for an event that was never recorded"
        self.runtime.log.append((self, "wait", event))


class FakeRaw:
    """A timed event; over as soon as it is recorded, unless the runtime holds its stream."""

    def __init__(self, runtime: FakeRuntime) -> None:
        self.runtime = runtime
        self.place: int | None = None
        self.stream: FakeStream | None = None
        self.time = 0.0

    def record(self, stream: FakeStream) -> None:
        self.stream, self.time = stream, time.perf_counter()
        self.place = len(self.runtime.log)
        self.runtime.log.append((stream, "record", self))

    def query(self) -> bool:
        if self.runtime.broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return self.place is None or self.stream not in self.runtime.held

    def elapsed_time(self, end: FakeRaw) -> float:
        return (end.time - self.time) * 1e3


class FakeRuntime:
    """One "GPU" on the CPU."""

    def __init__(self, total_bytes: int = 1 << 20) -> None:
        self.device = torch.device("cpu")
        self.name = "fake (cuda:0)"
        self.dtype = torch.float32
        self.total_bytes = total_bytes
        self.log: list[tuple[FakeStream, str, FakeRaw]] = []
        self.held: set[FakeStream] = set()
        self.broken = False
        self.refuses_to_pin = False
        self.refuses_memory = False
        self.delay_s = 0.0
        self.threads: set[str] = set()
        self.main = FakeStream("model", self)

    def memory(self) -> Memory:
        return Memory(self.total_bytes, self.total_bytes // 2)

    def stream(self) -> FakeStream:
        return FakeStream("link", self)

    def current(self) -> FakeStream:
        return self.main

    def event(self) -> FakeRaw:
        return FakeRaw(self)

    @contextmanager
    def on(self, stream: FakeStream):
        self.threads.add(threading.current_thread().name)
        if self.refuses_memory:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB")
        time.sleep(self.delay_s)
        with torch.inference_mode():
            yield

    def pinned(self, shape, dtype) -> torch.Tensor:
        if self.refuses_to_pin:
            raise RuntimeError("CUDA error: out of memory\nmore lines")
        return torch.empty(shape, dtype=dtype)

    def release_cached(self) -> None:
        if self.refuses_memory:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB")


def is_before(log, earlier, later) -> bool:
    """Whether the streams order the end of ``earlier`` before the start of ``later``.

    ``earlier.end`` and ``later.start`` were recorded; a wait orders all that its event's
    stream had been given before the record.
    """
    end, start = earlier.end, later.start
    if end.stream is start.stream:
        return end.place < start.place
    return any(
        stream is start.stream
        and kind == "wait"
        and place < start.place
        and event.stream is end.stream
        and event.place >= end.place
        for place, (stream, kind, event) in enumerate(log)
    )
