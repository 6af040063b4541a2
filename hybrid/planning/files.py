"""What the files of a model say to a plan: what hinders a run of them, and what they take on disk.

Of a checkpoint that has its weights, all that ``hybrid convert`` checks is checked, and the size is
what it would write. Only then are torch and transformers loaded.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from hybrid.ask.asked_model import AskedModel
from hybrid.errors import CheckpointError
from hybrid.formats.errors import HybridError
from hybrid.paths import check_temporary_folder
from hybrid.weights.checks import (
    CHECKS,
    CONVERTED_CHECKS,
    Checkpoint,
    check_declared_format,
    findings,
    is_converted,
)
from planner.foretell.dryrun import PlanResult


@dataclass(frozen=True)
class Files:
    """What was found.

    Attributes
    ----------
    errors
        What hinders a run.
    notes
        What is odd, or not taken.
    dense_bytes
        Bytes of the dense weights' files once the model is converted; None is unknown.
    """

    errors: list[HybridError] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    dense_bytes: int | None = None


def files_of(asked: AskedModel, dense: str | None) -> Files:
    """Look at a model's files, where it has any, for dense weights in the format asked for."""
    if asked.directory is None:
        return Files()
    checkpoint = Checkpoint(asked.directory)
    if not checkpoint.has_weights:
        return Files(*findings(checkpoint, (check_declared_format,)))
    if is_converted(asked.config):
        errors, notes = findings(checkpoint, CONVERTED_CHECKS)
        return Files(errors, notes, None if errors else _size(checkpoint))
    errors, notes = findings(checkpoint, CHECKS)  # before torch, which takes seconds, is imported
    if errors:
        return Files(errors, notes)
    check_temporary_folder()
    from hybrid.weights.checkpoint import check

    found = check(asked.directory, experts=asked.experts, dense=dense)
    return Files(found.errors, found.notes, None if found.errors else found.dense_bytes)


def with_files(result: PlanResult, files: Files) -> PlanResult:
    """Return a plan with the size of the files that were looked at, where that is known."""
    if files.dense_bytes is None:
        return result
    return replace(result, fit=result.fit.with_dense_stored(files.dense_bytes))


def _size(checkpoint: Checkpoint) -> int | None:
    try:
        return sum(file.stat().st_size for file in checkpoint.files)
    except (OSError, CheckpointError):  # gone meanwhile
        return None
