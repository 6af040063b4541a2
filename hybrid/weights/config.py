"""Holds a hybrid model's options, as transformers carries them in ``quantization_config``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from hybrid.ask.formats import QUANT_METHOD, check_formats
from hybrid.errors import CheckpointError, UsageError
from hybrid.weights.checks import is_converted
from hybrid.weights.source_files import read_object


class HybridConfig(QuantizationConfigMixin):
    """Run a model's experts from a packed store.

    Parameters
    ----------
    experts
        Weight format of the experts (:mod:`hybrid.formats.registry`), such as ``"q4_0"``. None is
        what a converted directory has, and ``"q4_0"`` for any other.
    dense
        Format of all other matrices: ``"bf16"``, ``"q8_0"``, ``"q4_0"``, or None to keep them as
        the checkpoint has them.
    cache_dir
        Where a checkpoint that is not converted yet is converted to; by default the platform's
        cache folder, or ``HYBRID_CACHE``.
    verify
        Compare every expert with its checksum when loading.
    fast
        Compute the tokens of one sequence on the CPU in our own code where the decoder is one
        that it knows; else, and always if false, transformers' code runs.
    store
        Id of the store that belongs to a converted directory; set by the conversion.
    quant_method
        Always ``"hybrid"``: by this name transformers finds the class.

    Raises
    ------
    UsageError
        On an unknown format.
    """

    def __init__(
        self,
        experts: str | None = None,
        dense: str | None = None,
        *,
        cache_dir: str | Path | None = None,
        verify: bool = False,
        fast: bool = True,
        store: str | None = None,
        quant_method: str = QUANT_METHOD,
    ) -> None:
        check_formats(experts, dense)
        self.quant_method = quant_method  # type: ignore[assignment]
        self.experts = experts
        self.dense = dense
        self.cache_dir = cache_dir
        self.verify = verify
        self.fast = fast
        self.store = store

    @classmethod
    def for_loading(
        cls,
        directory: Path,
        *,
        experts: str | None = None,
        dense: str | None = None,
        verify: bool = False,
        fast: bool = True,
    ) -> HybridConfig:
        """Return the config to load ``directory`` with.

        A converted directory keeps its formats; any other is converted to ``experts`` (q4_0
        by default) and ``dense`` (as in the checkpoint by default).

        Raises
        ------
        CheckpointError
            When its ``config.json`` is missing or damaged.
        UsageError
            When a converted directory has other formats than those asked for.
        """
        raw = read_object(directory / "config.json")
        asked = cls(experts, dense, verify=verify, fast=fast)
        return asked.merged(raw["quantization_config"]) if is_converted(raw) else asked

    @classmethod
    def from_dict(
        cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **more: Any
    ) -> Any:
        """Make the config of what a converted directory's ``config.json`` holds.

        Raises
        ------
        CheckpointError
            When it holds what no conversion wrote.
        """
        names = cls().to_dict()
        for name, value in config_dict.items():
            if name not in names or not isinstance(value, str | None):
                raise CheckpointError(
                    f"quantization_config in config.json has {name} = {value!r}, which this "
                    "version does not know",
                    hint="upgrade hybrid-moe, or convert the model again with 'hybrid convert'",
                )
        made = super().from_dict(config_dict, return_unused_kwargs, **more)  # type: ignore[no-untyped-call]
        return made

    def merged(self, settings: dict[str, Any]) -> HybridConfig:
        """Return the config of a converted directory that is loaded with these options.

        Raises
        ------
        UsageError
            When it has other formats than those asked for.
        """
        for name in ("experts", "dense"):
            asked, there = getattr(self, name), settings.get(name)
            if asked is not None and asked != there:
                raise UsageError(
                    f"the directory is converted with {name}={there!r}, "
                    f"{name}={asked!r} is asked for",
                    hint="convert the original checkpoint again, or leave the format out",
                )
        merged: HybridConfig = self.from_dict(settings)
        merged.verify, merged.fast = self.verify, self.fast
        return merged

    def to_dict(self) -> dict[str, Any]:
        """What a converted directory's ``config.json`` holds: nothing of this machine."""
        return {
            "quant_method": self.quant_method,
            "experts": self.experts,
            "dense": self.dense,
            "store": self.store,
        }
