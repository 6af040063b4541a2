"""Attaches the expert store to a model that transformers loads: the quantizer that it calls.

transformers builds the model without memory, hands it to :class:`HybridQuantizer` together
with the list of weight files, loads the dense weights from those files, and hands the model
back. In between, the experts' parameters are taken out; at the end the store takes their
place.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from transformers.core_model_loading import WeightRenaming
from transformers.quantizers.base import HfQuantizer

from hybrid.anatomy.experts import ExpertsSpec, find_experts, offer_experts_function
from hybrid.anatomy.text_part import leave_towers_out
from hybrid.ask.formats import QUANT_METHOD
from hybrid.errors import CheckpointError, StoreError
from hybrid.formats.block import Block
from hybrid.grafts import CORRECTIONS, remove_parameters, set_runner, set_store
from hybrid.weights.config import HybridConfig
from hybrid.weights.source_config import check_kinds
from hybrid.weights.source_files import read_object
from hybrid.weights.store import DATA_NAME, ExpertStore, LayerRecord


class HybridQuantizer(HfQuantizer):
    """Runs the experts from a store, and dense matrices in quantized form if they are.

    A directory made by ``hybrid convert`` is used as it is; any other is converted into the
    cache folder first, and its weight files are replaced by the converted ones.
    """

    requires_calibration = False
    quantization_config: HybridConfig
    _moved: tuple[str, str] = ("", "")
    _elsewhere: Mapping[str, str] = MappingProxyType({})

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        from hybrid.packed.dense import install_dense

        if not checkpoint_files or not checkpoint_files[0].endswith(".safetensors"):
            raise CheckpointError(
                "a hybrid model is loaded from safetensors files, got "
                f"{checkpoint_files[0] if checkpoint_files else 'a state dict'}",
                hint="save the model with save_pretrained first",
            )
        leave_towers_out(model)
        # Some families have transformers cast these.
        model._keep_in_fp32_modules_strict = {*model._keep_in_fp32_modules_strict, *CORRECTIONS}
        specs = find_experts(model)
        directory = Path(checkpoint_files[0]).parent
        check_kinds(model.config, read_object(directory / "config.json"))
        if self.quantization_config.store is None:
            directory = self._converted(directory)
            checkpoint_files[:] = sorted(map(str, directory.glob("*.safetensors")))
        self._store = ExpertStore.open(directory, verify=self.quantization_config.verify)
        self._records = _match(self._store, specs, self.quantization_config.store)
        for spec in specs:
            remove_parameters(model, spec.path, spec.parameters)
        self._specs = specs
        index = self._store.index
        if specs:
            self._moved = _moved(index.layers[0].module, specs[0].path)
        places = {path: self._place(model, path) for path in index.dense}
        self._elsewhere = {path: place for path, place in places.items() if not self._in_text(path)}
        dense = {places[path]: shape for path, shape in index.dense.items()}
        formats = {place: index.format_of(path) for path, place in places.items()}
        install_dense(model, dense, formats)

    def _in_text(self, path: str) -> bool:
        """Whether a module of the store lies where the experts do, as far as there are any."""
        return bool(self._specs) and path.startswith(self._moved[0])

    def _place(self, model: Any, path: str) -> str:
        """Return where a module of the store is in a model that may be wrapped differently."""
        old, new = self._moved
        if self._in_text(path):
            return f"{new}{path.removeprefix(old)}"
        names = [name for name, _ in model.named_modules()]
        alike = [name for name in names if f".{name}".endswith(f".{path}")]
        return path if path in names or not alike else alike[0]

    def get_weight_conversions(self) -> list[Any]:
        """Tell transformers where packed matrices go that were written from another class."""
        (old, new), found = self._moved, []
        if old != new:
            found.append(WeightRenaming(rf"^{re.escape(old)}(.+\.packed)$", rf"{new}\1"))
        for path, place in self._elsewhere.items():
            if path != place:
                found.append(WeightRenaming(rf"^{re.escape(path)}\.packed$", f"{place}.packed"))
        return found

    def _converted(self, source: Path) -> Path:
        from hybrid.weights.cache import converted_copy

        config = self.quantization_config
        directory, store_id = converted_copy(source, config.experts, config.dense, config.cache_dir)
        config.store = store_id
        return directory

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> None:
        from hybrid.fast.attach import attach_fast_path
        from hybrid.packed.experts import LayerExperts
        from hybrid.packed.first_measure import panels_of

        offer_experts_function()
        least_loads: dict[Block, int | None] = {}
        for spec, record in zip(self._specs, self._records, strict=True):
            shape = record.shape(self._store.index.format)
            if shape not in least_loads:
                least_loads[shape] = panels_of(shape, model.dtype)
            runner = LayerExperts(spec, self._store, record, least_loads[shape])
            set_runner(spec.module, runner)
            spec.install(model)
        set_store(model, self._store)
        attach_fast_path(model, fast=self.quantization_config.fast)

    def is_serializable(self) -> bool:
        """``save_pretrained`` would lose the experts; copy the converted directory instead."""
        return False

    @property
    def is_trainable(self) -> bool:
        """Adapters and dense weights are; the experts stay as they are."""
        return True


def _match(
    store: ExpertStore, specs: list[ExpertsSpec], expected_id: str | None
) -> list[LayerRecord]:
    """Find each layer's record and check that it fits.

    Records are matched by the module's path; where the model is wrapped differently than it
    was at conversion (a text model inside a multimodal one), by what follows the prefix.
    """
    where = store.path / DATA_NAME
    if expected_id is not None and store.index.id != expected_id:
        raise StoreError(
            f"{where} belongs to another model: it is store {store.index.id}, "
            f"config.json asks for store {expected_id}",
            hint="convert the model again with 'hybrid convert'",
        )
    layers, paths = store.index.layers, [spec.path for spec in specs]
    by_path = {layer.module: layer for layer in layers}
    if by_path.keys() != set(paths):
        by_path = {_tail(layer.module): layer for layer in layers}
        paths = [_tail(path) for path in paths]
    if len(layers) != len(paths) or by_path.keys() != set(paths):
        there, wanted = (f" ({names[0]} ...)" if names else "" for names in (list(by_path), paths))
        raise StoreError(
            f"{where} has experts for {len(layers)} layers{there}, "
            f"the model has {len(paths)}{wanted}",
            hint="config.json and the store must come from one conversion; convert again",
        )
    records = [by_path[path] for path in paths]
    for spec, record in zip(specs, records, strict=True):
        stored = (record.experts, record.hidden, record.intermediate, record.gated, record.bias)
        expected = (spec.experts, spec.hidden, spec.intermediate, spec.gated, spec.bias)
        if stored != expected:
            raise StoreError(
                f"{where} belongs to another model: {record.module} has (experts, hidden, "
                f"intermediate, gated, bias) = {stored} there, {expected} in config.json",
                hint="config.json and the store must come from one conversion; convert again",
            )
    return records


def _tail(path: str) -> str:
    """The path from its first numbered list on: ``layers.3.mlp.experts``."""
    parts = path.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[max(0, numbers[0] - 1) :]) if numbers else path


def _moved(stored: str, path: str) -> tuple[str, str]:
    """Return how paths begin in a store, and how in a model that is wrapped differently."""
    return stored.removesuffix(_tail(stored)), path.removesuffix(_tail(path))


def merge_configs(asked: HybridConfig, of_model: Any) -> HybridConfig:
    """Combine the config passed to ``from_pretrained`` with the one in ``config.json``.

    A checkpoint that is quantized in another way is dequantized when it is converted.

    Raises
    ------
    UsageError
        When a converted directory has other formats than those asked for.
    """
    settings = of_model if isinstance(of_model, dict) else of_model.to_dict()
    return asked.merged(settings) if settings.get("quant_method") == QUANT_METHOD else asked
