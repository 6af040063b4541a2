"""Reads norms as what they do to a stream: divide by a size, multiply by a weight, add a bias.

:func:`read_norm` reads a norm module exactly, as the kernels need it; :func:`probe` reads whatever
code makes of a stream off its results, within that code's precision.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

import torch
from torch import Tensor

from hybrid.anatomy.samples import UnfitError, close, sample
from hybrid.anatomy.widened import widened

_KINDS: tuple[Literal["rms", "centred", "direct"], ...] = ("rms", "centred", "direct")


@dataclass(frozen=True, eq=False)
class Scaling:
    """How an input is made of a layer's stream: ``z = normalised(x) * weight + bias``.

    Parameters
    ----------
    kind
        ``"rms"`` divides the stream by its root mean square, ``"centred"`` takes its mean off
        first, ``"direct"`` leaves it as it is.
    weight, bias
        ``[D]`` float32.
    eps
        Added to the mean square; 0 where it is not known.
    """

    kind: Literal["rms", "centred", "direct"]
    weight: Tensor
    bias: Tensor
    eps: float = 0.0

    @classmethod
    def direct(cls, size: int) -> Scaling:
        """Nothing is done to the stream."""
        return cls("direct", torch.ones(size), torch.zeros(size))

    def __call__(self, x: Tensor) -> Tensor:
        """Return what is made of streams ``x``, ``[T, D]`` float32."""
        if self.kind == "centred":
            x = x - x.mean(-1, keepdim=True)
        if self.kind != "direct":
            x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return x * self.weight + self.bias


def read_norm(module: Any) -> Scaling:
    """Read a norm module: its own weight, one that means ``1 + weight`` folded in, and its eps.

    Raises
    ------
    UnfitError
        When its code computes something else of them.
    """
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if eps is None or getattr(module, "weight", None) is None:
        raise UnfitError(f"{type(module).__name__} has no eps or no weight")
    weight, bias = module.weight.detach().float(), getattr(module, "bias", None)
    bias = torch.zeros_like(weight) if bias is None else bias.detach().float()
    x = sample(3, weight.numel()) * 2 + 1
    results = widened(module)(x)
    for offset, kind in product((0.0, 1.0), _KINDS[:2]):
        scaling = Scaling(kind, weight + offset, bias, float(eps))
        if close(scaling(x), results):
            return scaling
    raise UnfitError(f"{type(module).__name__} is another norm")


def probe(function: Callable[[Tensor], Tensor], like: Tensor) -> Scaling | None:
    """Read a norm off its results, whatever its parameters mean (``weight``, ``1 + weight``).

    A stream of alternating 1 and -1 has mean 0 and size 1, so that every norm returns its weight
    with that sign, plus its bias. Other streams then show whether it is a norm, and which.

    Parameters
    ----------
    function
        What may be a norm.
    like
        A tensor that it was given, for number of dimensions, dtype and device.

    Returns
    -------
    None when it is something else.
    """
    size = like.shape[-1]
    signs = torch.ones(size)
    signs[1::2] = -1
    seeded = torch.Generator().manual_seed(0)
    streams = torch.cat((signs[None], -signs[None], 2 * torch.randn(4, size, generator=seeded) + 1))
    shaped = streams.view((1,) * (like.ndim - 2) + streams.shape).to(like.device, like.dtype)
    made = function(shaped)
    if not isinstance(made, Tensor) or made.numel() != streams.numel():
        return None
    results = made.detach().float().cpu().view(streams.shape)
    weight, bias = (results[0] - results[1]) / 2 * signs, (results[0] + results[1]) / 2
    x = shaped.float().cpu().view(streams.shape)[2:]
    # Weights of trained models are not of size one: each channel counts by its own.
    sizes = results.abs().amax(dim=0)
    tolerance = 1e-3 if like.dtype == torch.float32 else 3e-2
    for kind in _KINDS:
        scaling = Scaling(kind, weight, bias)
        if bool(((scaling(x) - results[2:]).abs() <= tolerance * sizes).all()):
            return scaling
    return None


def same_numbers(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two tensors hold the same numbers, shape and a cast apart."""
    if a is None or b is None or a.numel() != b.numel():
        return False
    if a.dtype == b.dtype:
        return torch.equal(a.reshape(-1), b.reshape(-1))
    return torch.allclose(a.float().reshape(-1), b.float().reshape(-1), rtol=1e-2, atol=1e-6)
