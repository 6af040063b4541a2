"""A loaded model: its transformers network, and all that we know of it, read in one place."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from hybrid import grafts
from hybrid.ask.asked_model import AskedModel, find_model
from hybrid.errors import UsageError
from hybrid.fast.attach import FastPath
from hybrid.packed.experts import experts_of
from hybrid.weights.store import ExpertStore, StoreIndex
from planner.describe.context import longest_context
from planner.describe.model import ModelSpec


@dataclass(frozen=True, eq=False)
class Model:
    """A network that transformers loaded with us.

    Attributes
    ----------
    network
        The transformers model. What we added to it stays on it, and is read here.
    """

    network: Any

    @property
    def store(self) -> ExpertStore:
        """What its experts run from."""
        store: ExpertStore = grafts.store_of(self.network)
        return store

    @property
    def index(self) -> StoreIndex:
        """What the store says of itself: formats, sizes, the checkpoint it was made from."""
        return self.store.index

    @property
    def directory(self) -> Path:
        """The converted directory that it was loaded from."""
        return self.store.path

    @property
    def layers(self) -> list[Any]:
        """What runs the experts of each MoE layer, in the layers' order."""
        return experts_of(self.network)

    @property
    def fast(self) -> FastPath:
        """What computes the calls that take the fast path."""
        fast: FastPath = grafts.fast_path_of(self.network)
        return fast

    @cached_property
    def asked(self) -> AskedModel:
        """Its counts and formats as its directory says them, which is what calibrations name.

        Raises
        ------
        UsageError, PlannerError
            When the directory is gone, or the planner cannot read its ``config.json``.
        """
        where = self.directory
        if not where.is_dir():  # a name that no directory has would be taken for a shipped model's
            raise UsageError(
                f"{where} is there no more", hint="load the model from where it lies now"
            )
        return find_model(where)

    @property
    def spec(self) -> ModelSpec:
        """Its counts; raises what :attr:`asked` raises."""
        return self.asked.spec

    @property
    def dense_format(self) -> str:
        """Weight format of its dense layers, in a user's words."""
        config = self.network.hf_quantizer.quantization_config
        packed = sorted(set(self.index.dense_formats.values()))
        kept = f" ({', '.join(packed)})" if packed else ""
        return config.dense or f"as in the checkpoint{kept}"

    @property
    def weights(self) -> str:
        """The digest of its checkpoint, in whatever format its experts are."""
        return self.index.source["identity"]

    @cached_property
    def context(self) -> int | None:
        """The most tokens that it takes, prompt included; None when it does not say."""
        config = self.network.config.get_text_config()
        return longest_context(config.to_dict(), f"config of {self.directory.name}")

    @cached_property
    def dense_bytes(self) -> int | None:
        """Bytes of the files of its dense weights; None when they are there no more."""
        return sum(file.stat().st_size for file in self.directory.glob("*.safetensors")) or None

    @property
    def vocabulary(self) -> int:
        """Rows of its embedding: its tokens' ids are less."""
        return int(self.network.config.get_text_config().vocab_size)

    @property
    def device(self) -> torch.device:
        """Where its dense layers are."""
        device: torch.device = self.network.device
        return device

    def changes(self) -> str:
        """Say what is changed about the network that transformers made, a line for each kind."""
        return grafts.describe(self.network)
