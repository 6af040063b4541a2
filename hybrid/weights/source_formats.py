"""Dequantizes checkpoints in fp8 blocks, mxfp8 and mxfp4 with transformers' own code."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, AutoQuantizationConfig

from hybrid.ask.published import DEQUANTIZED
from hybrid.errors import CheckpointError, first_line


class BlockDequantize(Fp8Dequantize):
    """transformers' dequantization, also for matrices whose last blocks are not full.

    Published fp8 checkpoints have such matrices: 576 rows in blocks of 128, for example.
    """

    def convert(self, input_dict: dict[str, Any], *args: Any, **options: Any) -> dict[str, Any]:
        """Dequantize what has scales and leave everything else as it is.

        transformers' own code may cast the rest, which would take 8-bit weights at face value.
        """
        if "weight" in input_dict and "weight_scale_inv" not in input_dict:
            weight = input_dict["weight"]
            name = options.get("full_layer_name") or "weight"
            return {name: weight[0] if isinstance(weight, list) else weight}
        return super().convert(input_dict, *args, **options)

    def dequantize(self, weight: Tensor, scales: Tensor, dtype: torch.dtype | None) -> Tensor:
        """Return the weights that ``weight`` ``[N, K]`` and its grid of scales stand for."""
        return self._dequantize_one(weight, scales, dtype)

    def rows_per_scale(self, rows: int, scale_rows: int) -> int:
        """Rows of a matrix that share one row of its grid of scales."""
        return self._block(rows, scale_rows, 0)

    def _block(self, size: int, blocks: int, axis: int) -> int:
        stated = getattr(self.hf_quantizer.quantization_config, "weight_block_size", None)
        if stated and -(-size // stated[axis]) == blocks:
            return int(stated[axis])
        return -(-size // blocks)  # one checkpoint may hold several kinds of blocks

    def _dequantize_one(
        self, quantized: Tensor, scales: Tensor, output_dtype: torch.dtype | None = None
    ) -> Tensor:
        *_, rows, cols = quantized.shape
        grid = scales.shape[-2:] if scales.ndim >= 2 else (1, 1)
        more_rows = self._block(rows, grid[0], 0) * grid[0] - rows
        more_cols = self._block(cols, grid[1], 1) * grid[1] - cols
        if not more_rows and not more_cols:
            return super()._dequantize_one(quantized, scales, output_dtype)
        padded = nn.functional.pad(quantized.view(torch.uint8), (0, more_cols, 0, more_rows)).view(
            quantized.dtype
        )
        return super()._dequantize_one(padded, scales, output_dtype)[..., :rows, :cols]


def is_scale(pattern: str) -> bool:
    """Whether a converter's source pattern stands for what goes with a quantized weight."""
    return pattern.rstrip("$").endswith(("_scale_inv", "activation_scale"))


def scale_pattern(pattern: str, sources: Iterable[str]) -> str | None:
    """Return the pattern among ``sources`` of the scales that belong to ``pattern``."""
    wanted = pattern.rstrip("$") + "_scale_inv"
    return next((source for source in sources if source.rstrip("$") == wanted), None)


def source_quantizer(config: Any) -> Any:
    """Return the quantizer that dequantizes a checkpoint with this config; None if plain.

    Raises
    ------
    CheckpointError
        When the settings of a known format make no sense.
    """
    settings = getattr(config, "quantization_config", None) or getattr(
        config.get_text_config(decoder=True), "quantization_config", None
    )
    if not settings:
        return None
    settings = settings if isinstance(settings, dict) else settings.to_dict()
    method = settings.get("quant_method")
    if method not in DEQUANTIZED:
        return None  # settings of something else, such as of the cache, or codes that are read here
    try:
        quantization = AutoQuantizationConfig.from_dict(settings)
    except Exception as error:  # what settings of any kind make of transformers' code
        raise CheckpointError(
            f"quantization_config in config.json cannot be used: {first_line(error)}",
            hint="compare with the publisher's own, complete config.json",
        ) from error
    quantization.dequantize = True
    return AUTO_QUANTIZER_MAPPING[method](quantization, pre_quantized=True)
