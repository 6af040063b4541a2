"""Runs shared experts ahead of the routed ones where the family's own code calls them afterwards.

On a device they can run while the host still decides where the routed experts go. The module is
computed when it is launched, and gives that result when the family's code calls it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from hybrid.anatomy.experts import ExpertsSpec
from hybrid.anatomy.survey import LayerView, SharedView, survey
from hybrid.grafts import replace_forward


class SharedFirst:
    """Launches shared experts early; make one with :meth:`discover`.

    Attributes
    ----------
    reason
        Which layers have shared experts that cannot be launched early, or none; None when all can.
    """

    def __init__(self, views: Sequence[LayerView]) -> None:
        late = {layer: v.shared for layer, v in enumerate(views) if v.shared and v.shared.after}
        early = [layer for layer, view in enumerate(views) if view.shared and not view.shared.after]
        self._early = {layer: _Early(shared) for layer, shared in late.items()}
        parts = []
        if early:
            parts.append(f"layers {_listed(early)}: the family computes them first by itself")
        none = [layer for layer, view in enumerate(views) if view.shared is None]
        if none:
            parts.append(f"layers {_listed(none)}: no module takes the experts' input alone")
        self.reason = "; ".join(parts) or None

    @classmethod
    def discover(
        cls,
        model: Any,
        specs: Sequence[ExpertsSpec],
        *,
        views: Sequence[LayerView] | None = None,
    ) -> SharedFirst:
        """Find the shared experts of ``model`` and wrap those that are called late.

        Parameters
        ----------
        model, specs
            As for :func:`hybrid.anatomy.survey.survey`.
        views
            Its result, where it is there already.
        """
        return cls(survey(model, specs) if views is None else views)

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers whose shared experts :meth:`launch` computes."""
        return tuple(self._early)

    def launch(self, layer: int, hidden: Tensor) -> bool:
        """Compute a layer's shared expert now and keep the result for when it is called.

        Parameters
        ----------
        layer
            Index among the layers with experts.
        hidden
            The experts' input, ``[..., D]``; to be left as it is until then.

        Returns
        -------
        Whether there was something to launch.
        """
        early = self._early.get(layer)
        if early is None:
            return False
        early.launch(hidden)
        return True

    def abandon(self) -> None:
        """Forget results that were not called for: the step they belong to was cancelled."""
        for early in self._early.values():
            early.kept = None

    def remove(self) -> None:
        """Give every module its own forward back."""
        for early in self._early.values():
            early.remove()
        self._early.clear()


class _Early:
    """One module, its own forward replaced by one that knows what was launched.

    Attributes
    ----------
    kept
        What was launched: the input, how often it had been written to, and the result.
    """

    def __init__(self, shared: SharedView) -> None:
        self._dims = shared.dims
        self._compute: Callable[..., Tensor] = shared.module.forward
        self.kept: tuple[Tensor, int, Tensor] | None = None
        what = "a shared expert gives the result that was launched early"
        self._graft = replace_forward(shared.module, self._forward, what)

    def launch(self, hidden: Tensor) -> None:
        shaped = hidden.reshape((1,) * (self._dims - 2) + (-1, hidden.shape[-1]))
        self.kept = (shaped, _version(shaped), self._compute(shaped))

    def remove(self) -> None:
        self.kept = None
        self._graft.undo()

    def _forward(self, *args: Any, **kwargs: Any) -> Tensor:
        kept, self.kept = self.kept, None
        given = [*args, *kwargs.values()]
        if kept is not None and len(given) == 1 and _is_same(given[0], kept[0], kept[1]):
            return kept[2].view(given[0].shape)
        return self._compute(*args, **kwargs)


def _is_same(x: Any, launched: Tensor, version: int) -> bool:
    """Whether ``x`` is the launched tensor's memory, in any shape, not written to since."""
    return (
        isinstance(x, Tensor)
        and x.data_ptr() == launched.data_ptr()
        and x.numel() == launched.numel()
        and (x.dtype, x.device) == (launched.dtype, launched.device)
        and x.is_contiguous()
        and launched.is_contiguous()
        and _version(launched) == version
    )


def _version(x: Tensor) -> int:
    """How often a tensor's memory was written to; inference tensors do not count."""
    return 0 if x.is_inference() else x._version


def _listed(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers))
