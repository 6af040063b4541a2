"""A layer's plan as a value: who computes which expert, what is copied, and when it ends."""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from typing import Any, NamedTuple

from planner.describe.estimate import LayerWork
from planner.errors import WorkError


class LayerPlan(NamedTuple):
    """Where every activated expert of one layer runs.

    Parameters
    ----------
    layer
        Index among the model's MoE layers.
    cpu
        Experts the CPU computes, ids ascending.
    gpu
        Experts the GPU computes, in the order it starts them.
    copies
        The experts of ``gpu`` that are not resident, in the order the link copies them.
    cpu_end_s, gpu_end_s, link_end_s
        When each lane is done, in seconds from the start of the step. A lane without work ends
        when it becomes free: the CPU at 0, the others when ``LayerWork`` says.
    lower_bound_s
        No plan for the same work has a smaller makespan than this.
    method
        The rule that found the plan; the name of a baseline where nothing beat it.
    """

    layer: int
    cpu: tuple[int, ...]
    gpu: tuple[int, ...]
    copies: tuple[int, ...]
    cpu_end_s: float
    gpu_end_s: float
    link_end_s: float
    lower_bound_s: float
    method: str

    @property
    def makespan_s(self) -> float:
        """When the layer's last expert is done, in seconds."""
        return max(self.cpu_end_s, self.gpu_end_s)

    @property
    def gap(self) -> float:
        """Distance from the lower bound as a fraction of it; 0 means proven optimal."""
        if self.lower_bound_s == self.makespan_s:
            return 0.0
        if self.lower_bound_s == 0:
            return math.inf
        return (self.makespan_s - self.lower_bound_s) / self.lower_bound_s

    def validate(
        self, work: LayerWork | None = None, residency: Collection[int] | None = None
    ) -> None:
        """Check that the plan makes sense, alone or as a plan for ``work``.

        Raises
        ------
        WorkError
            When an expert runs twice or not at all, a copy is missing or needless, or a time
            cannot be.
        """
        self._check_alone()
        if work is not None:
            self._check_covers(work)
        if residency is not None:
            needed = set(self.gpu) - set(residency)
            if needed != set(self.copies):
                raise self._error(
                    f"copies {sorted(self.copies)}, but its GPU experts lack {sorted(needed)}",
                    "plan again: the residency has changed since this plan was made",
                )

    def _check_alone(self) -> None:
        placed = self.cpu + self.gpu
        if len(set(placed)) != len(placed):
            twice = sorted({expert for expert in placed if placed.count(expert) > 1})
            raise self._error(f"runs experts {twice} more than once", "place each expert once")
        if list(self.cpu) != sorted(self.cpu):
            raise self._error(f"lists its CPU experts as {list(self.cpu)}", "sort them by id")
        if len(set(self.copies)) != len(self.copies) or not set(self.copies) <= set(self.gpu):
            raise self._error(
                f"copies {list(self.copies)} but runs {list(self.gpu)} on the GPU",
                "copy each expert at most once, and only experts the GPU runs",
            )
        for name in ("cpu_end_s", "gpu_end_s", "link_end_s", "lower_bound_s"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise self._error(f"has {name} = {value!r}", "times are finite and at least 0")
        if self.lower_bound_s > self.makespan_s:
            raise self._error(
                f"ends at {self.makespan_s!r} s, below its lower bound {self.lower_bound_s!r} s",
                "take the plan and its bound from the same work and cost model",
            )

    def _check_covers(self, work: LayerWork) -> None:
        if work.layer != self.layer:
            raise self._error(f"was given the work of layer {work.layer}", "match plan and work")
        placed, activated = set(self.cpu) | set(self.gpu), {expert for expert, _ in work.loads}
        if placed != activated:
            raise self._error(
                f"leaves out experts {sorted(activated - placed)} "
                f"and adds experts {sorted(placed - activated)}",
                "a plan runs exactly the experts that were activated",
            )

    def _error(self, problem: str, hint: str) -> WorkError:
        return WorkError(f"the plan of layer {self.layer} {problem}", hint=hint)

    def to_json(self) -> str:
        """Return the plan as canonical JSON: the same plan is always the same bytes."""
        return json.dumps(self._asdict(), sort_keys=True, separators=(",", ":"), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> LayerPlan:
        """Read what ``to_json`` wrote.

        Raises
        ------
        WorkError
            When the text is not JSON, a field is missing, unknown or of the wrong type, or the
            plan does not validate.
        """
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise WorkError(
                f"a layer plan is not valid JSON: {error}", hint="was the file cut short?"
            ) from error
        expected = set(cls._fields)
        if not isinstance(values, dict) or set(values) != expected:
            found = sorted(values) if isinstance(values, dict) else type(values).__name__
            raise WorkError(
                f"a layer plan has the fields {sorted(expected)}, got {found}",
                hint="write plans with LayerPlan.to_json",
            )
        plan = cls(**{name: _typed(name, value) for name, value in values.items()})
        plan.validate()
        return plan


def _typed(name: str, value: Any) -> Any:
    """Return a JSON value as the field's type, or say which field has the wrong one."""
    if name in ("cpu", "gpu", "copies"):
        if isinstance(value, list) and all(_is_id(item) for item in value):
            return tuple(value)
    elif name == "layer":
        if _is_id(value):
            return value
    elif name == "method":
        if isinstance(value, str):
            return value
    elif isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    raise WorkError(
        f"the layer plan's {name} cannot be {value!r}", hint="write plans with LayerPlan.to_json"
    )


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
