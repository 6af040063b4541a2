"""What a model that shares its experts with a device leaves behind: counts, traces, a timeline."""

from __future__ import annotations

import sys
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

from hybrid.errors import UsageError
from hybrid.ledger.metrics import LANES
from hybrid.paths import write_whole
from hybrid.sharing.executor import Executor
from hybrid.sharing.placement import Placement
from hybrid.weights.store import weights_of
from planner.decide.popularity import Popularity
from planner.foretell.perfetto import trace_events


class Keepsakes:
    """The part of a loaded model that writes what it kept while it ran."""

    model: Any
    placement: Placement | None
    _name: str

    def save_popularity(self, path: str | PathLike[str]) -> None:
        """Write how often each expert was used, for a later start with a device.

        Counts this model's calls, and those that ``popularity`` told when it was loaded.

        Raises
        ------
        UsageError
            When the model runs on the CPU alone, where nobody counts, or ``path`` cannot be
            written.
        """
        executor = self.require_executor("counts which experts are used")
        usage = executor.usage
        known = Popularity(self._name, usage.tokens, usage.uses, weights_of(self.model))
        before = self.placement.popularity if self.placement else None
        if before is not None:
            tokens, uses = usage.tokens + before.tokens, usage.uses + before.uses
            known = replace(known, tokens=tokens, uses=uses)
        write_whole(Path(path), known.to_json())

    def save_routing(self, path: str | PathLike[str]) -> None:
        """Write which experts every token used as a trace, for ``hybrid plan --trace``.

        Raises
        ------
        UsageError
            When ``record_routing`` was not asked for, nothing was generated yet, or ``path``
            exists, cannot be written, or has another ending than ``.npz``, by which traces are
            told from popularity files.
        """
        if Path(path).suffix != ".npz":
            raise UsageError(
                f"{path}: the name of a routing trace ends in .npz",
                hint=f"for example {Path(path).with_suffix('.npz')}",
            )
        recorder = self.require_executor("records the routers' choices").usage.recorder
        if recorder is None:
            raise UsageError("no routing was kept", hint="load the model with record_routing=True")
        recorder.save(Path(path))
        if recorder.left_out:
            print(
                f"hybrid: {path} has {recorder.tokens} tokens, {recorder.left_out} came after",
                file=sys.stderr,
            )

    def close(self) -> None:
        """Give the device's memory back; the model goes on with its experts on the CPU."""
        if self.placement is not None and self.placement.executor is not None:
            self.placement.executor.close()

    def require_executor(self, what: str) -> Executor:
        """Return who shares the experts with a device; UsageError when nobody ``what``."""
        executor = None if self.placement is None else self.placement.executor
        if executor is None:
            raise UsageError(
                f"on the CPU alone nothing {what}", hint="load the model with a device (vram=...)"
            )
        return executor

    def perfetto(self) -> str:
        """Return what every lane did since loading as Chrome trace events, for ui.perfetto.dev.

        Raises
        ------
        UsageError
            When the model runs on the CPU alone, or ``keep_timeline`` was not asked for.
        """
        timeline = self.require_executor("has lanes to show").timeline
        if not timeline.keep:
            raise UsageError("no timeline was kept", hint="load the model with keep_timeline=True")
        timeline.finish()
        title = f"{self._name} on {self.placement.device}"  # type: ignore[union-attr]
        return trace_events(title, timeline.events, LANES)
