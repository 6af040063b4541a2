"""A runtime in place of torch.cuda whose streams really are asynchronous: it finds races.

Tensors on its device are made of two halves: what torch sees, and memory that only the stream's
work touches. An operation on them is enqueued on the current stream and done later, in an order
that streams and events allow and that is as unkind as they allow it to be. As in CUDA,

- memory that is given back is given out again at once, to the same stream's next allocation;
- what a copy from pinned memory brings is what lies there when the copy runs;
- what a kernel reads in host memory must be there until it has run;
- a copy from or to ordinary memory holds the host up;
- an operation on tensors of the device and of the host together is an error.
"""

from __future__ import annotations

import random
import threading
import time
import weakref
from collections import defaultdict, deque
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map

from gpu_experts.device import Memory

#: Stands for the GPU: tensors that torch itself never computes with.
DEVICE = torch.device("meta")
POISON = 0xA5
aten = torch.ops.aten


class Mark:
    """Where in a stream an event was recorded."""

    def __init__(self, stream: StrictStream) -> None:
        self.stream, self.over, self.time = stream, False, 0.0


class StrictStream:
    """Work in order; an entry is a function, a mark to pass or an event's mark to wait for."""

    def __init__(self, name: str, runtime: StrictRuntime) -> None:
        self.name, self.runtime = name, runtime
        self.work: deque[tuple[str, Any]] = deque()

    def wait_event(self, event: StrictEvent) -> None:
        assert event.mark is not None, "a stream waits for an event that was never recorded"
        self.runtime.enqueue(self, "wait", event.mark)


class StrictEvent:
    """A timed event; asking for it lets the device do a little."""

    def __init__(self, runtime: StrictRuntime) -> None:
        self.runtime = runtime
        self.mark: Mark | None = None

    def record(self, stream: StrictStream) -> None:
        self.mark = Mark(stream)
        self.runtime.enqueue(stream, "mark", self.mark)

    def query(self) -> bool:
        return self.mark is None or self.runtime.progress(self.mark)

    def elapsed_time(self, end: StrictEvent) -> float:
        assert self.mark.over, "the time of an event that is not over is asked for"
        assert end.mark.over, "the time to an event that is not over is asked for"
        return (end.mark.time - self.mark.time) * 1e3


class _Block:
    """An allocation; given back to its stream when the last tensor that sees it is gone."""

    def __init__(self, memory: torch.Tensor, free: list[torch.Tensor]) -> None:
        self.memory, self._free = memory, free

    def __del__(self) -> None:
        self._free.append(self.memory)


class DeviceTensor(torch.Tensor):
    """A tensor on the device: ``memory`` is what the stream's work reads and writes."""

    memory: torch.Tensor
    owner: _Block
    runtime: StrictRuntime
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, memory: torch.Tensor, owner: _Block, runtime: StrictRuntime) -> DeviceTensor:
        with torch.inference_mode(False):
            made = torch.Tensor._make_wrapper_subclass(
                cls,
                memory.shape,
                strides=memory.stride(),
                storage_offset=memory.storage_offset(),
                dtype=memory.dtype,
                device=DEVICE,
            )
        made.memory, made.owner, made.runtime = memory, owner, runtime
        return made

    def __repr__(self) -> str:
        return f"DeviceTensor({list(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        found = [a for a in _flat((args, kwargs or {})) if isinstance(a, DeviceTensor)]
        return found[0].runtime.operate(func, args, kwargs or {})


class _OnDevice(TorchDispatchMode):
    """Brings what is created on the device there; other operations on it come by themselves."""

    def __init__(self, runtime: StrictRuntime) -> None:
        super().__init__()
        self.runtime = runtime

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        on_device = any(isinstance(a, DeviceTensor) for a in _flat((args, kwargs)))
        if on_device or kwargs.get("device") == DEVICE:
            return self.runtime.operate(func, args, kwargs)
        return func(*args, **kwargs)


class _FromNumbers(TorchFunctionMode):
    """Makes tensors of Python's numbers in ordinary memory first, which torch does elsewhere."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        where = kwargs.get("device")
        if func in (torch.tensor, torch.as_tensor) and where is not None:
            return func(*args, **{**kwargs, "device": "cpu"}).to(where)
        return func(*args, **kwargs)


class StrictRuntime:
    """One "GPU".

    Parameters
    ----------
    seed
        Chooses among the orders that are allowed; None is the laziest: nothing is done before
        somebody waits for it, and then nothing else.

    Attributes
    ----------
    host_waits
        How often an operation held the host up, such as asking for a number.
    """

    def __init__(self, seed: int | None = None, total_bytes: int = 1 << 30) -> None:
        self.device, self.name, self.dtype = DEVICE, "strict (cuda:0)", torch.float32
        self.total_bytes = total_bytes
        self.faults: list[BaseException] = []
        self.host_waits = 0
        self.main = StrictStream("model", self)
        self._random = None if seed is None else random.Random(seed)
        self._streams = [self.main]
        self._lock = threading.RLock()
        self._here = threading.local()
        self._free: dict[tuple[StrictStream, int], list[torch.Tensor]] = defaultdict(list)
        self._pinned: dict[int, Any] = {}

    # What CudaDevice asks for.

    def memory(self) -> Memory:
        return Memory(self.total_bytes, self.total_bytes)

    def stream(self) -> StrictStream:
        self._streams.append(StrictStream("link", self))
        return self._streams[-1]

    def current(self) -> StrictStream:
        return getattr(self._here, "stream", self.main)

    def event(self) -> StrictEvent:
        return StrictEvent(self)

    @contextmanager
    def on(self, stream: StrictStream):
        before, self._here.stream = self.current(), stream
        try:
            with torch.inference_mode(), _OnDevice(self):
                yield
        finally:
            self._here.stream = before

    def pinned(self, shape, dtype) -> torch.Tensor:
        made = torch.empty(shape, dtype=dtype)
        storage = made.untyped_storage()
        self._pinned[storage.data_ptr()] = storage  # its address stays its own
        return made

    def release_cached(self) -> None:
        """Parts of larger allocations stay cached in torch: all of them, to be unkind."""

    # What tests ask for.

    @contextmanager
    def here(self):
        """Where tensors of the device can be made and used by the model's own thread."""
        with _FromNumbers(), _OnDevice(self):
            yield

    def launch(self, kernel: Callable[..., None], *tensors: torch.Tensor) -> None:
        """Enqueue ``kernel(*memory)``, which may read pinned memory where it lies."""
        lent = [None if isinstance(t, DeviceTensor) else weakref.ref(t) for t in tensors]
        for tensor in tensors:
            assert isinstance(tensor, DeviceTensor) or self._is_pinned(tensor), "not pinned"
        memories = [t.memory if isinstance(t, DeviceTensor) else None for t in tensors]

        def run() -> None:
            both = zip(memories, lent, strict=True)
            held = [memory if ref is None else ref() for memory, ref in both]
            assert all(tensor is not None for tensor in held), "host memory was given back too soon"
            kernel(*held)

        self.enqueue(self.current(), "run", run)

    def finish(self) -> None:
        """Let the device do everything, and raise what went wrong there."""
        with self._lock:
            while any(self._step(stream) for stream in self._streams):
                pass
            stuck = [stream.name for stream in self._streams if stream.work]
        if self.faults:
            raise self.faults[0]
        assert not stuck, f"streams wait for each other: {stuck}"

    # How it works.

    def enqueue(self, stream: StrictStream, kind: str, what: Any) -> None:
        with self._lock:
            stream.work.append((kind, what))
            self._wander(2)

    def progress(self, mark: Mark) -> bool:
        """Do a little, and say whether the device has come to ``mark``."""
        with self._lock:
            if self._random is None:
                self._reach(mark)
            else:
                self._wander(4)
            return mark.over

    def operate(self, func, args, kwargs):
        """Enqueue an operation; views are had at once."""
        if not torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "Meta"):
            with _OnDevice(self):  # made of other operations
                found = func.decompose(*args, **kwargs)
            if found is not NotImplemented:
                return found
        with _disable_current_modes():
            return self._operate(func, tree_map(self._adopt, args), kwargs)

    def _operate(self, func, args, kwargs):
        schema = func._schema
        if func in (aten.copy_.default, aten._to_copy.default):
            return self._copy(func, args, kwargs)
        if not any("Tensor" in str(returned.type) for returned in schema.returns):
            self._drain()  # the host asks for a number
            return func(*tree_map(_memory, args))
        returned = schema.returns[0].alias_info if schema.returns else None
        if func is aten._unsafe_view.default or (returned is not None and not returned.is_write):
            base = args[0]
            found = func(*tree_map(_memory, args), **tree_map(_memory, kwargs))
            return tree_map(
                lambda m: DeviceTensor(m, base.owner, self) if isinstance(m, torch.Tensor) else m,
                found,
            )
        hosts = [a for a in _flat((args, kwargs)) if isinstance(a, torch.Tensor)]
        if any(not isinstance(a, DeviceTensor) and a.dim() for a in hosts):
            raise RuntimeError("Expected all tensors to be on the same device")
        real_args, real_kwargs = tree_map(_memory, args), tree_map(_memory, kwargs)
        if "device" in real_kwargs:
            real_kwargs["device"] = torch.device("cpu")
        if returned is not None:  # in place
            self._enqueue_run(lambda: func(*real_args, **real_kwargs))
            return args[0]
        try:
            like = func(*tree_map(_shape, args), **{**tree_map(_shape, kwargs), **_meta(kwargs)})
        except NotImplementedError:  # the shape of the result depends on numbers
            self._drain()
            like = func(*real_args, **real_kwargs)
        made = tree_map(lambda t: self._allocate(t) if isinstance(t, torch.Tensor) else t, like)
        if func.overloadpacket in (aten.empty, aten.empty_like, aten.new_empty, aten.empty_strided):
            return made

        def run() -> None:
            found = func(*real_args, **real_kwargs)
            for into, value in zip(_flat(made_memory), _flat(found), strict=True):
                into.copy_(value)

        made_memory = tree_map(_memory, made)
        self._enqueue_run(run)
        return made

    def _adopt(self, value: Any) -> Any:
        """Make an empty tensor that torch made on the device by itself one of ours."""
        ours = isinstance(value, DeviceTensor) or not isinstance(value, torch.Tensor)
        return value if ours or value.device != DEVICE or value.numel() else self._allocate(value)

    def _copy(self, func, args, kwargs):
        """Between host and device, or between types."""
        if func is aten.copy_.default:
            into, source = args[0], args[1]
            waits = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
        else:
            source, waits = args[0], not kwargs.get("non_blocking", False)
            dtype = kwargs.get("dtype") or source.dtype
            where = kwargs.get("device") or source.device
            like = torch.empty(source.shape, dtype=dtype, device="meta")
            into = (
                self._allocate(like) if where == DEVICE else torch.empty(source.shape, dtype=dtype)
            )
        to, held = _memory(into), _memory(source)
        if not isinstance(source, DeviceTensor) and not self._is_pinned(source):
            held = held.clone()  # the driver has taken what is in ordinary memory when it returns
        if not isinstance(into, DeviceTensor) and not self._is_pinned(into):
            waits = True
        self._enqueue_run(lambda: to.copy_(held))
        crosses = isinstance(source, DeviceTensor) != isinstance(into, DeviceTensor)
        if waits and crosses:
            self._drain()
        return into

    def _enqueue_run(self, run: Callable[[], Any]) -> None:
        self.enqueue(self.current(), "run", run)

    def _allocate(self, like: torch.Tensor) -> DeviceTensor:
        """Memory of this stream; what was written there before, or is yet to be, still is."""
        size = max(512, -(-like.numel() * like.element_size() // 512) * 512)
        stream = self.current()
        with self._lock:
            free = self._free[stream, size]
            memory = free.pop() if free else torch.empty(size, dtype=torch.uint8)
        self._enqueue_run(lambda: memory.fill_(POISON))
        with torch.inference_mode(False):
            seen = memory[: like.numel() * like.element_size()].view(like.dtype).view(like.shape)
        return DeviceTensor(seen, _Block(memory, free), self)

    def _is_pinned(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._pinned

    def _drain(self) -> None:
        """Hold the host up until the stream is through."""
        self.host_waits += 1
        event = self.event()
        event.record(self.current())
        with self._lock:
            self._reach(event.mark)
        assert event.mark.over or self.faults, "the host waits for what never comes"

    def _reach(self, mark: Mark) -> None:
        """Do what must be done before ``mark``, and nothing else."""
        while not mark.over and mark.stream.work:
            if not self._step(mark.stream):
                self._reach(mark.stream.work[0][1])
                if not mark.stream.work[0][1].over:
                    return

    def _wander(self, steps: int) -> None:
        """Do some of what may be done, on any stream."""
        if self._random is not None:
            for _ in range(self._random.randrange(steps + 1)):
                self._step(self._random.choice(self._streams))

    def _step(self, stream: StrictStream) -> bool:
        """Do the next thing on a stream; False when there is none or it must wait."""
        if not stream.work:
            return False
        kind, what = stream.work[0]
        if kind == "wait" and not what.over:
            return False
        stream.work.popleft()
        if kind == "mark":
            what.over, what.time = True, time.perf_counter()
        elif kind == "run":
            try:
                with torch.inference_mode(), _disable_current_modes():
                    what()
            except BaseException as error:
                self.faults.append(error)
        return True


def _flat(tree: Any) -> list[Any]:
    return torch.utils._pytree.tree_leaves(tree)


def _memory(value: Any) -> Any:
    return value.memory if isinstance(value, DeviceTensor) else value


def _shape(value: Any) -> Any:
    """A tensor without numbers, for torch to say what an operation gives."""
    if not isinstance(value, torch.Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def _meta(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {"device": torch.device("meta")} if "device" in kwargs else {}
