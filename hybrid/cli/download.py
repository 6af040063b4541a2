"""What a model of the hub takes and will do here, said before its first byte is fetched."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import typer

from hybrid.ask.asked_model import AskedModel, find_model
from hybrid.ask.options import Options
from hybrid.errors import UsageError
from hybrid.formats.registry import weight_bytes
from hybrid.hub.fetch import Manifest, download, manifest
from hybrid.hub.kept import kept_copy
from hybrid.hub.names import hub_name
from hybrid.hub.refusals import UnreachableError
from hybrid.paths import cache_dir, require_room
from hybrid.planning.plan import machine_for, plan_on
from hybrid.weights.arriving import ArrivingCheckpoint
from hybrid.weights.declared_formats import check_format, is_coded
from planner.describe.words import in_words
from planner.foretell.dryrun import PlanResult


def obtain(model: str, options: Options, *, yes: bool) -> Path:
    """Return a model's directory; download one that is named as on the hub, unless it is here.

    Says what it takes on disk and, where this machine was measured, whether it fits and how fast
    it will be. One that does not fit is fetched only when asked to: ``yes``, or on a terminal.

    Raises
    ------
    UsageError
        When it does not fit.
    CheckpointError, DiskSpaceError, UnsupportedModelError
        When it cannot be fetched, the disk has too little room, or its weights are in a format
        that cannot be read.
    """
    published = hub_name(model)
    if published is None:
        return Path(model)
    try:
        wanted = manifest(published)
    except UnreachableError as error:
        kept = kept_copy(published)
        if kept is None:
            raise
        _say(f"{error.message}; taking what was downloaded earlier")
        return kept
    if wanted.missing_bytes:
        _announce(wanted, options, yes=yes)
    return download(wanted)


def obtain_piecewise(model: str, dst: Path, options: Options) -> ArrivingCheckpoint:
    """Return a model of the hub whose weights come while they are packed into ``dst``.

    Raises
    ------
    UsageError
        When it is none of the hub.
    CheckpointError, DiskSpaceError, UnsupportedModelError
        When it cannot be fetched, or its weights are in a format that cannot be read so.
    """
    published = hub_name(model)
    if published is None:
        raise UsageError(
            f"{model} is no name of the hub: there is nothing to download",
            hint="leave out --keep-source, or give ORG/NAME",
        )
    wanted = manifest(published)
    if wanted.name.quant is not None:
        raise UsageError(
            f"{wanted.name} is a GGUF file, which is packed when all of it is there",
            hint="leave out --keep-source; 'hybrid remove --download' takes it out of the cache",
        )
    _announce(wanted, options, yes=True, kept=False)
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        disable_progress_bars,
    )

    disable_progress_bars()  # of files that come beside the progress of the conversion
    key = hashlib.sha256(f"{wanted.name.repo}@{wanted.commit}".encode()).hexdigest()[:16]
    checkpoint = ArrivingCheckpoint(wanted, dst.with_name(f"{dst.name}.source-{key}"))
    if is_coded(checkpoint.path, checkpoint.config):
        checkpoint.remove()
        raise UsageError(
            f"{wanted.name} is quantized: its formats are known when all of it is there",
            hint="leave out --keep-source; 'hybrid remove --download' takes it out of the cache",
        )
    return checkpoint


def _announce(wanted: Manifest, options: Options, *, yes: bool, kept: bool = True) -> None:
    """Say what a download takes and how its model will run; refuse what has no room."""
    asked = find_model(wanted.name).in_formats(options.experts, options.dense)
    check_format(None, asked.config)
    packed = packed_bytes(asked)
    _say(
        f"{wanted.name}: {in_words(wanted.missing_bytes)} to download, its packed weights take "
        f"about {in_words(packed)}{' more' if kept else ''}"
    )
    if kept:  # the download, beside what is packed into the cache
        require_room(
            cache_dir(),
            packed,
            f"{wanted.name} with packed weights takes {{}}",
            hint="free some space, or set HYBRID_CACHE to a folder on another disk",
        )
    machine = machine_for(asked, None, options)
    if machine is not None:
        _foretell(plan_on(machine, asked, options), yes=yes)


def packed_bytes(asked: AskedModel) -> int:
    """Return about how many bytes a converted model takes."""
    spec = asked.spec
    return weight_bytes(spec.expert_params, asked.experts) + weight_bytes(
        spec.total_params - spec.expert_params, asked.dense
    )


def _foretell(result: PlanResult, *, yes: bool) -> None:
    """Say how a model will run; ask, or refuse, where it does not fit."""
    prediction = result.prediction
    if prediction is not None:
        rate = result.request.batch / prediction.tpot.value
        _say(
            f"it fits {result.request.hardware.name}: about {rate:.1f} tokens/s, "
            f"{prediction.ttft.value:.1f} s to the first token of {result.request.prompt}"
        )
        return
    shortage = f"{result.request.model.name} does not fit: {result.fit.shortage}"
    if yes:
        _say(shortage)
    elif not sys.stdin.isatty():
        remedies = "".join(f"{remedy}; " for remedy in result.remedies[:1])
        raise UsageError(shortage, hint=f"{remedies}--yes downloads it all the same")
    else:
        typer.confirm(f"{shortage}. Download it all the same?", abort=True, err=True)


def _say(text: str) -> None:
    print(f"hybrid: {text}", file=sys.stderr)
