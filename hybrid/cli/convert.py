"""``hybrid convert``: make a directory with a packed expert store from a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hybrid.ask.formats import DEFAULT_EXPERTS, in_words
from hybrid.ask.options import Options
from hybrid.cli.download import obtain
from hybrid.formats.registry import FORMATS, dense_formats
from hybrid.paths import check_temporary_folder
from hybrid.weights.progress import conversion_progress
from planner.describe.words import in_words as size_in_words


def convert(
    src: Annotated[
        str,
        typer.Argument(
            help="A Hugging Face MoE directory with safetensors, or ORG/NAME of the hub."
        ),
    ],
    dst: Annotated[Path, typer.Argument(help="The directory to make.")],
    experts: Annotated[
        str, typer.Option(help=f"Format of the experts: {in_words(FORMATS)}.")
    ] = DEFAULT_EXPERTS,
    dense: Annotated[
        str | None,
        typer.Option(
            help=f"Format of all other matrices: {in_words(dense_formats())}. "
            "[default: as in the checkpoint]"
        ),
    ] = None,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="Check SRC against the digests its download left, and DST against its own.",
        ),
    ] = False,
) -> None:
    """Convert a Mixture-of-Experts checkpoint.

    DST is an ordinary Hugging Face directory plus experts.bin, ready for 'hybrid run DST'. A
    conversion that was interrupted goes on where it stopped when it is started again.
    """
    options = Options.of(experts=experts, dense=dense)  # refused before torch is imported
    check_temporary_folder()

    from hybrid.weights import checkpoint

    source = obtain(src, options, yes=True)
    with conversion_progress(f"Converting {Path(src).name}") as progress:
        result = checkpoint.convert(
            source, dst, experts=experts, dense=dense, verify=verify, progress=progress
        )
    kept = f", {result.resumed_layers} layers from an earlier run" if result.resumed_layers else ""
    typer.echo(
        f"{result.path}: {result.experts} experts in {result.layers} layers{kept}, "
        f"{size_in_words(result.expert_bytes)} as {experts}, "
        f"dense weights {size_in_words(result.dense_bytes)}, {result.elapsed_s:.0f} s",
        err=True,
    )
