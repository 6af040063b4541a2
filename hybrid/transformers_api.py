"""What differs between the versions of transformers that we run on, in one place.

Differences are recognised by what a version has, never by its number. Who adds one says here
which versions it is about:

* Up to 5.23 a model's ``forward`` takes the cache as ``past_key_values`` and its outputs carry
  it under that name; from 5.24 on both are ``cache``. Calls by the old name still work there,
  with a warning, and will not from 5.40 on.
* Up to 5.23 layers of a cache know their ``dtype``; from 5.24 on only their tensors do. So we
  ask nobody but tensors for it.
* 5.24's Llama 4 with images reads ``image_outputs`` off its language model's output, which has
  none, and fails at every text. So that output says that there are none.
* 5.24 casts weights of fp8 checkpoints that have no scales to the model's type, 8-bit ones at face
  value. :class:`hybrid.weights.source_formats.BlockDequantize` leaves them as they are in every
  version, so that they are refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from hybrid.grafts import set_on_class

#: What ``forward`` has called a cache, newest first.
CACHE_NAMES = ("cache", "past_key_values")
_FIELDS = {field.name for field in dataclasses.fields(MoeCausalLMOutputWithPast)}
_CACHE = next(name for name in CACHE_NAMES if name in _FIELDS)


if not hasattr(MoeCausalLMOutputWithPast, "image_outputs"):
    set_on_class(
        MoeCausalLMOutputWithPast,
        "image_outputs",
        None,
        "outputs of language models have no image_outputs, and say so",
    )


def cache_argument(cache: Any) -> dict[str, Any]:
    """Return ``cache`` as the keyword argument that ``forward`` and ``generate`` take."""
    return {_CACHE: cache}


def given_cache(arguments: Mapping[str, Any]) -> Any:
    """Return the cache among the keyword arguments of a call, by whichever name; None without."""
    return next((arguments[name] for name in CACHE_NAMES if arguments.get(name) is not None), None)


def returned_cache(output: Any) -> Any:
    """Return the cache that a model's output carries."""
    return getattr(output, _CACHE)


def causal_output(logits: Tensor, cache: Any) -> MoeCausalLMOutputWithPast:
    """Return what a causal language model's ``forward`` returns."""
    return MoeCausalLMOutputWithPast(logits=logits, **cache_argument(cache))


def auto_class(config: Any) -> Any:
    """Return the class that loads a model of text from ``config``; None where there is none.

    What ``architectures`` names is no help: files leave it out, or name a class that is not
    transformers', or one that is for more than text where there is one for text alone.
    """
    kinds: tuple[Any, ...] = (AutoModelForCausalLM, AutoModelForImageTextToText)
    return next((kind for kind in kinds if type(config) in kind._model_mapping), None)
