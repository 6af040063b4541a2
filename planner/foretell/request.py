"""What a forecast is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from hybrid.formats.registry import FORMATS, is_format, weight_bytes
from planner.cost.cost import CostModel
from planner.decide import policies
from planner.decide.popularity import Popularity, read_popularity
from planner.describe.hardware import HardwareSpec
from planner.describe.model import ModelSpec
from planner.errors import SpecError
from planner.foretell.memory import STAGING, Fit, fit
from planner.foretell.routing import Routing, from_trace, synthetic

WIDENED = "bf16"
"""What dense weights are on a GPU, where no kernels read quantized ones: their format changes what
they are, not what they take. Float16, on GPUs without bfloat16, takes as much."""
_MOST_SIMULATED = 8192
"""Decoded tokens of all sequences: what a simulation holds in memory."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked.

    Parameters
    ----------
    model, hardware
        What runs, and where.
    experts, dense
        Weight formats, of what is stored: see ``dense_there``.
    dense_bytes
        Of all dense weights, where several formats make them up.
    emulated
        Whether the GPU is emulated, which computes with the CPU's dense weights as they are.
    context, prompt, tokens, batch
        Tokens of cache per sequence, of the prompt, decoded; sequences.
    trace
        A recorded routing, or None for a synthetic one.
    popularity
        A file of expert uses in earlier sessions, or a trace (``.npz``) to count; or None.
    policy
        Which experts the cache keeps: one of ``planner.decide.policies.names()``.
    seed
        Of the synthetic routing.

    Raises
    ------
    SpecError
        When a count is below 1, the prompt exceeds the context, or a format or the policy is
        unknown.
    """

    model: ModelSpec
    hardware: HardwareSpec
    experts: str = "q4_0"
    dense: str = "bf16"
    dense_bytes: int | None = None
    emulated: bool = False
    context: int = 4096
    prompt: int = 512
    tokens: int = 16
    batch: int = 1
    trace: Path | None = None
    popularity: Path | None = None
    policy: str = policies.DEFAULT_POLICY
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("context", "prompt", "tokens", "batch"):
            value = getattr(self, name)
            if value < 1:
                raise SpecError(f"--{name} is {value}", hint=f"--{name} must be at least 1")
        if self.prompt > self.context:
            raise SpecError(
                f"--prompt {self.prompt} exceeds --context {self.context}",
                hint="raise --context or shorten the prompt",
            )
        if self.tokens * self.batch > _MOST_SIMULATED:
            raise SpecError(
                f"--tokens {self.tokens} x --batch {self.batch} exceeds {_MOST_SIMULATED}",
                hint="the time per token settles after a few dozen: simulate fewer",
            )
        for name in ("experts", "dense"):
            value = getattr(self, name)
            if not is_format(value) or (name == "dense" and "+" in value):
                raise SpecError(
                    f"--{name} {value!r} is not a weight format",
                    hint=f"use one of {', '.join(FORMATS)}",
                )

        policies.check_policy(self.policy)

    @property
    def widens(self) -> bool:
        """Whether dense weights are widened, so that another format of theirs saves nothing."""
        return self.hardware.gpu is not None and not self.emulated

    @property
    def dense_there(self) -> str:
        """What dense weights are where they lie during a run."""
        return WIDENED if self.widens else self.dense

    @cached_property
    def cost(self) -> CostModel:
        """The cost model of this request."""
        several = self.dense_bytes if self.dense_there == self.dense else None
        return CostModel(
            self.model, self.hardware, self.experts, self.dense_there, dense_bytes=several
        )

    def fit(self) -> Fit:
        """How it lies in memory."""
        stored = weight_bytes(self.model.dense_params, self.dense)
        experts = self.model.experts if self.model.moe_layers else None
        return fit(
            self.cost,
            context=self.context,
            batch=self.batch,
            slot_bytes=None if experts is None else experts.block(self.experts).stride,
            staging=STAGING,
            popularity=self.known,
            dense_stored=stored if self.dense_bytes is None else self.dense_bytes,
        )

    @cached_property
    def known(self) -> Popularity | None:
        """What is known of the experts' use before the first token."""
        if self.popularity is None:
            return None
        if self.popularity.suffix == ".npz":
            return Popularity.of_trace(self.popularity, self.model.name, self.model.experts.count)
        return read_popularity(self.popularity)

    def routing(self) -> Routing:
        """The routing every variant of this request replays."""
        sizes = (self.model, self.prompt, self.tokens, self.batch, self.seed)
        return from_trace(self.trace, *sizes) if self.trace else synthetic(*sizes)
