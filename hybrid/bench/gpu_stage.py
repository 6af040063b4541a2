"""Shares experts with a real GPU, on which the model's own code and dense weights run.

Weights are random, and a router's answer is replaced by the routing that is replayed: what is
measured is how long things take, and its text means nothing.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from gpu_experts.device import Device
from hybrid.anatomy.survey import survey
from hybrid.ask.asked_model import AskedModel
from hybrid.bench.stages import FORMAT, Run
from hybrid.errors import UsageError
from hybrid.grafts import expert_modules, set_runner
from hybrid.ledger.dense_seconds import DenseSeconds
from hybrid.loading import load_fast_model
from hybrid.machine import host
from hybrid.machine.devices import memory_told
from hybrid.measure.random_model import check_room, first_layers, write_random_model
from hybrid.model import Model
from hybrid.packed.bf16_products import panels_from
from hybrid.packed.dense_move import move_dense
from hybrid.paths import check_temporary_folder
from hybrid.sharing.placement import RING_BYTES, unfit
from hybrid.sharing.predictor import Lookahead
from hybrid.sharing.shared_first import SharedFirst
from hybrid.transformers_api import cache_argument
from planner.cost.cost import CostModel
from planner.describe.words import in_words
from planner.foretell.memory import STAGING, HostMemory, fit

_RAN_OUT = (
    "ran out of memory",
    "choose fewer layers with --layers, or smaller shares with --resident",
)


class OnGpu:
    """A GPU with a model's dense weights on it; see :class:`hybrid.bench.stages.Stage`.

    Parameters
    ----------
    subject, cost
        The model as it is published, and what is predicted of the layers that are run.
    device
        The GPU, not opened; closed here in the end.
    context
        Tokens of cache that are needed.
    progress
        Called with a line about what is done next.

    Raises
    ------
    UsageError, DiskSpaceError
        When the device cannot run the model, or has no room for its dense weights; or the disk
        has none for its random weights.
    """

    uncounted = 1
    """The first round compiles kernels, pins memory and fills torch's pools."""

    def __init__(
        self,
        subject: AskedModel,
        cost: CostModel,
        device: Device,
        context: int,
        progress: Callable[[str], None],
    ) -> None:
        self.cost, self.device = cost, device
        self.seconds = DenseSeconds(cost, 0)
        check_temporary_folder()
        self._folder = tempfile.TemporaryDirectory(prefix="hybrid-bench-")
        folder = Path(self._folder.name)
        settings = first_layers(subject.config, len(subject.spec.layers), len(cost.model.layers))
        needed = check_room(settings, folder, FORMAT, "bf16")
        progress(f"writing random weights, {needed / 2**30:.2f} GiB")
        write_random_model(settings, folder, experts=FORMAT, dense="bf16")
        network, _ = load_fast_model(folder, dtype=device.dtype, fast=False)
        model = Model(network)
        self.layers = model.layers
        for experts in self.layers:
            experts.panels_from = panels_from(experts.shape, cost.hardware)
        if reason := unfit(self.layers, cost.model):
            raise UsageError(f"{cost.model.name} cannot share its experts: {reason}")
        free = device.memory().free_bytes
        placed = fit(
            cost,
            context=context,
            batch=1,
            slot_bytes=self.layers[0].blocks.shape[1],
            staging=STAGING,
        )
        if not placed.fits:
            raise UsageError(
                f"{placed.shortage}: {in_words(free)} of {device.name} are not enough",
                hint="choose fewer layers with --layers, or close what else uses the device",
            )
        pinned = placed.host is HostMemory.PINNED
        device.pin(model.index.nbytes if pinned else RING_BYTES)
        progress(f"moving dense weights to {device.name}")
        self._network = network
        with memory_told(device, *_RAN_OUT):
            move_dense(network, device.torch_device)
            specs = [experts.spec for experts in self.layers]
            views = survey(network, specs)
            self._lookahead = Lookahead.discover(network, specs, views=views)
        self.shared = SharedFirst(views)
        for number, module in enumerate(expert_modules(network)):
            set_runner(module, _Replayed(self, number))
        self.run: Run | None = None
        self._cache: Any = None
        self._next = torch.zeros(1, 1, dtype=torch.int64, device=device.torch_device)

    def limit(self, layers: int) -> None:
        """Compute no more than so many layers' routers; one rule looks ahead, so once is enough."""
        self._lookahead.limit(layers)

    def scores(self, layer: int, hidden: Tensor) -> Tensor:
        """Compute the next layers' routers, as looking ahead does."""
        found = self._lookahead.scores(layer, hidden)
        return torch.empty(0, device=hidden.device) if found is None else found

    def forward(self, tokens: int, first: bool, run: Run) -> None:
        """Run the model, its experts by ``run``, until the next token is known."""
        self.run = run
        if first:
            self._cache = DynamicCache(config=self._network.config)
        ids = self._next.expand(1, tokens)
        with torch.no_grad(), memory_told(self.device, *_RAN_OUT):
            output = self._network(
                input_ids=ids, use_cache=True, logits_to_keep=1, **cache_argument(self._cache)
            )
            self._next = output.logits[:, -1:].argmax(-1)
            self._next.item()  # waits for the device, as whoever samples does

    def close(self) -> None:
        """Give the device's memory and the disk's room back."""
        self.device.close()
        self._cache = self._network = None
        self._folder.cleanup()


class _Replayed:
    """Stands where a layer's experts stood: they get the tokens that the routing gives them."""

    own_gating = False

    def __init__(self, stage: OnGpu, layer: int) -> None:
        self._stage, self._layer = stage, layer

    def __call__(self, hidden: Tensor, expert_ids: Tensor, routing_weights: Tensor) -> Tensor:
        assert self._stage.run is not None
        return self._stage.run(self._layer, hidden)


def of_gpu(device: Device) -> dict[str, Any]:
    """Return name, memory, driver and versions of a GPU and its software, for a record."""
    known = [gpu for gpu in host.gpus() if gpu.driver and device.name.startswith(gpu.name)]
    return {
        "name": device.name,
        "memory_bytes": device.memory().total_bytes,
        "driver": known[0].driver if known else None,
        **device.backend.software(),
    }
