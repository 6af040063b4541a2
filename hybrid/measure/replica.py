"""A few layers of a model with random weights, which stand for it.

The replica is loaded and generates as the model itself would, so that what is measured is what
runs: which path a single token takes, which code attends, what surrounds the layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import cycle
from pathlib import Path
from typing import Any

from hybrid.demo import demo_path
from hybrid.formats.registry import weight_bytes
from hybrid.loading import load_fast_model
from hybrid.machine.compute_dtype import automatic_dtype
from hybrid.measure.alone import DRAWING, SETTLING, Passes, Timed, generate
from hybrid.measure.random_model import check_room, first_layers, write_random_model
from hybrid.measure.terms_of_step import Part, Pass, extra
from hybrid.textstream import TextStream
from hybrid.weights.tokenizer import load_tokenizer
from planner.describe.model import ModelSpec
from planner.describe.terms import SAMPLING, TEXT

ROWS = 32768
"""Tokens of the replica's vocabulary at most: a larger head takes longer in proportion."""
_TOKEN_BYTES = 160 << 20
"""Weights that a token reads, so that they come from memory and not from a cache."""
_STORE_BYTES = 3 << 29
"""Experts of the replica at most, where more layers are not needed to have every kind."""
_TEXT = "for name, value in sorted(settings.items()):\n    print(name, value)\n"
"""What is written, again and again: how long that takes depends on the text but little."""


def shortened(
    settings: Mapping[str, Any], model: ModelSpec, experts: str, dense: str
) -> dict[str, Any]:
    """Return the ``config.json`` of a replica: the first layers, ``ROWS`` tokens at most.

    As many layers as it takes to have every kind of them and to read ``_TOKEN_BYTES`` a token.
    """
    shape, missing = model.experts, set(model.layers)
    each = weight_bytes(shape.params_each, experts)
    token = store = moe = kept = 0
    for layer in model.layers:
        kept += 1
        missing.discard(layer)
        moe += layer.moe
        token += weight_bytes(layer.mixer.params + layer.ffn_params, dense)
        token += layer.moe * shape.top_k * each
        store += layer.moe * shape.count * each
        enough = token >= _TOKEN_BYTES or store + shape.count * each > _STORE_BYTES
        if not missing and moe > 1 and enough:
            break
    short = first_layers(settings, len(model.layers), kept)
    return short | {"vocab_size": min(model.vocab, ROWS)}


class Replica(Timed):
    """A loaded replica of ``model`` whose parts are timed whenever it generates.

    Parameters
    ----------
    model
        What it stands for.
    settings
        The ``config.json`` of :func:`shortened`.
    folder
        Where its files are written.
    experts, dense
        Weight formats.

    Raises
    ------
    DiskSpaceError
        When there is no room for them.
    """

    def __init__(
        self, model: ModelSpec, settings: dict[str, Any], folder: Path, experts: str, dense: str
    ) -> None:
        check_room(settings, folder, experts, dense)
        write_random_model(settings, folder, experts=experts, dense=dense)
        network, _ = load_fast_model(folder, dtype=automatic_dtype(model))
        super().__init__(network, model)
        self._tokenizer = load_tokenizer(demo_path())

    def extras(self, new_tokens: int, turns: int) -> Iterator[Part]:
        """Generate with and without drawing and writing; the first turn does not count."""

        def steps(passes: Passes, **options: Any) -> list[Pass]:
            found = generate(self.network, SETTLING, new_tokens, passes, **options)
            return found[1 + SETTLING :]

        found = [
            (
                steps(self.passes()),
                steps(self.passes(), **DRAWING),
                steps(self.passes(self._writer())),
            )
            for _ in range(1 + turns)
        ][1:]
        # In the one-token kernels there are as many tokens to choose from as the model has.
        scale = 1.0 if self.fast is not None else self.scale
        yield extra(SAMPLING, self.model, scale, [(plain, drawn) for plain, drawn, _ in found])
        yield extra(TEXT, self.model, 1.0, [(plain, written) for plain, _, written in found])

    def _writer(self) -> Callable[[], object]:
        """Something that writes a token at every call."""
        stream = TextStream(self._tokenizer)
        ids = cycle(self._tokenizer(_TEXT)["input_ids"])
        return lambda: stream.put([next(ids)])
