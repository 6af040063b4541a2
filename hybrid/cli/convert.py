"""``hybrid convert``: make a directory with a packed expert store from a checkpoint."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hybrid.ask.formats import DEFAULT_EXPERTS, in_words
from hybrid.ask.names import directory_name
from hybrid.ask.options import Options
from hybrid.cli.download import obtain, obtain_piecewise
from hybrid.cli.exit_codes import ERROR
from hybrid.errors import UsageError
from hybrid.formats.errors import HybridError
from hybrid.formats.registry import FORMATS, dense_formats
from hybrid.paths import check_temporary_folder, expanded
from hybrid.weights.checks import Checkpoint, check_files, findings
from hybrid.weights.gguf_checkpoint import checkpoint_at
from hybrid.weights.partial import destination
from hybrid.weights.progress import conversion_progress
from planner.describe.words import in_words as size

if TYPE_CHECKING:
    from hybrid.weights.checkpoint import CheckResult, ConvertResult


def convert(
    src: Annotated[
        str,
        typer.Argument(
            help="A Hugging Face directory with safetensors, a GGUF file, or ORG/NAME of the hub."
        ),
    ],
    dst: Annotated[
        Path | None,
        typer.Argument(help="The directory to make.", show_default="none, with --check"),
    ] = None,
    experts: Annotated[
        str | None,
        typer.Option(
            help=f"Format of the experts: {in_words(FORMATS)}; or two, UP+DOWN, one for down. "
            f"[default: {DEFAULT_EXPERTS}; those of a GGUF file]"
        ),
    ] = None,
    dense: Annotated[
        str | None,
        typer.Option(
            help=f"Format of all other matrices: {in_words(dense_formats())}. "
            "[default: as in the checkpoint]"
        ),
    ] = None,
    imatrix: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="An importance matrix (llama.cpp's, in GGUF): scales are searched for the least "
            "error of what the model computes.",
        ),
    ] = None,
    collect_importance: Annotated[
        Path | None,
        typer.Option(
            metavar="TEXT",
            help="Make that file first: read this text with the model and see what its matrices "
            "multiply. Without DST that is all.",
        ),
    ] = None,
    exact: Annotated[
        bool,
        typer.Option(
            "--exact", help="Refuse weights that cannot be kept exactly as they were published."
        ),
    ] = False,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="Check SRC against the digests its download left, and DST against its own.",
        ),
    ] = False,
    keep_source: Annotated[
        str,
        typer.Option(
            "--keep-source",
            metavar="yes|no",
            help="Whether what is downloaded of the hub stays in its cache; with 'no' each weight "
            "file is removed as soon as it is packed.",
        ),
    ] = "yes",
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="Say what would hinder the conversion, all at once, and write nothing; with "
            "--verify, read every weight, too.",
        ),
    ] = False,
) -> None:
    """Convert a checkpoint.

    DST is an ordinary Hugging Face directory plus experts.bin, ready for 'hybrid run DST'. A
    conversion that was interrupted goes on where it stopped when it is started again.
    """
    options = Options.of(experts=experts, dense=dense)  # refused before torch is imported
    check_temporary_folder()
    if collect_importance is not None and (imatrix is None or imatrix.exists()):
        raise UsageError(
            "--collect-importance makes the file that --imatrix names: "
            + ("none is named" if imatrix is None else f"{imatrix} exists"),
            hint="add --imatrix FILE, with a name that is free",
        )
    if dst is None and not check and collect_importance is None:
        raise UsageError("DST is missing", hint="name the directory to make, or add --check")
    if dst is not None:  # before a download
        destination(expanded(src), expanded(dst))
    if keep_source not in ("yes", "no"):
        raise UsageError(f"--keep-source {keep_source!r} is not known", hint="choose yes or no")
    if keep_source == "no":
        if dst is None or check or collect_importance is not None:
            raise UsageError(
                "--keep-source no converts while it downloads: it needs DST, and neither --check "
                "nor --collect-importance",
                hint="leave out --keep-source",
            )
        arriving = obtain_piecewise(src, expanded(dst), options)
        _convert(arriving, dst, experts, dense, imatrix, exact=exact, verify=verify)
        return
    source = expanded(obtain(src, options, yes=True))
    if collect_importance is not None and imatrix is not None:
        _collect(source, collect_importance, imatrix)
        if dst is None:
            return
    if dst is None or check:
        _check(source, experts, dense, exact=exact, verify=verify)
        return
    checkpoint = checkpoint_at(source)
    _convert(checkpoint, dst, experts, dense, imatrix, exact=exact, verify=verify)


def _convert(
    source: Checkpoint,
    dst: Path,
    experts: str | None,
    dense: str | None,
    imatrix: Path | None,
    *,
    exact: bool,
    verify: bool,
) -> None:
    """Convert, and say what was made."""
    check_files(source)  # before torch, which takes seconds, is imported
    from hybrid.weights import checkpoint
    from hybrid.weights.importance import Importance

    importance = None if imatrix is None else Importance.read(expanded(imatrix))
    with conversion_progress(f"Converting {source.name}") as progress:
        result = checkpoint.convert(
            source,
            dst,
            experts=experts,
            dense=dense,
            importance=importance,
            exact=exact,
            verify=verify,
            progress=progress,
            tell=_say,
        )
    kept = f", {result.resumed_layers} layers from an earlier run" if result.resumed_layers else ""
    _say(
        f"{result.path}: {_experts(result)}{kept}, "
        f"dense weights {size(result.dense_bytes)}, {result.elapsed_s:.0f} s"
    )


def _collect(source: Path, text: Path, out: Path) -> None:
    """Make an importance matrix of a text."""
    from hybrid.cli.generation import read_text
    from hybrid.measure.importance import collect

    check_files(checkpoint_at(source))
    read = read_text(text)
    tokens = collect(source, read, expanded(out), called=text.name, progress=_say)
    _say(f"{out}: importance of inputs of {tokens} tokens")


def _experts(made: ConvertResult | CheckResult) -> str:
    """Say how many experts there are, how large and in which format."""
    if not made.layers:
        return "no experts to share"
    return (
        f"{made.experts} experts in {made.layers} layers, "
        f"{size(made.expert_bytes)} as {made.format}"
    )


def _check(src: Path, experts: str | None, dense: str | None, *, exact: bool, verify: bool) -> None:
    """Tell all that was found; the exit code is that of an error where something hinders."""
    source = checkpoint_at(src)
    errors, notes = findings(source, source.checks)  # before torch is imported
    if errors:
        _tell(errors, notes)
    from hybrid.weights import checkpoint

    with conversion_progress(f"Reading {directory_name(src)}") as progress:
        found = checkpoint.check(
            src, experts=experts, dense=dense, exact=exact, verify=verify, progress=progress
        )
    _tell(found.errors, found.notes)
    _say(f"{src} can be converted: {_experts(found)}, dense weights {size(found.dense_bytes)}")


def _tell(errors: Sequence[HybridError], notes: Sequence[str]) -> None:
    for note in notes:
        _say(note)
    for error in errors:
        _say(f"error: {error}")
    if errors:
        raise typer.Exit(ERROR)


def _say(text: str) -> None:
    print(text, file=sys.stderr)
