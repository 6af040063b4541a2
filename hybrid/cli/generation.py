"""What ``hybrid run`` and ``hybrid chat`` share: loading a model, the summary, what is kept."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from hybrid.errors import UsageError
from hybrid.ledger.metrics import summary_line
from hybrid.paths import check_temporary_folder, check_writable, write_whole
from hybrid.weights.checks import check_before_loading

if TYPE_CHECKING:
    from hybrid.ask.options import Options
    from hybrid.session.model import HybridModel


def load(model: str | None, options: Options, *, yes: bool) -> HybridModel:
    """Import what is needed and load ``model``, from the hub if it is there; see ``obtain``.

    Collecting garbage while importing torch and transformers costs a fifth of the start and
    finds nothing, so it waits until the model is there.
    """
    from hybrid.cli.download import obtain

    check_temporary_folder()
    directory = None if model is None else obtain(model, options, yes=yes)
    if directory is not None and directory.is_dir():  # before torch, which takes seconds
        check_before_loading(directory)
    gc.disable()
    try:
        from transformers.utils import logging

        from hybrid.session.model import HybridModel

        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        return HybridModel.open(directory, options, name=model)
    finally:
        gc.freeze()
        gc.enable()


def prompt_progress(model: HybridModel) -> AbstractContextManager[None]:
    """Show how far a long prompt is, on stderr."""
    from hybrid.fast.prompt import prompt_bar

    return prompt_bar(model.model)


def set_seed(seed: int | None) -> None:
    """Make what is sampled next repeatable."""
    if seed is not None:
        import torch

        torch.manual_seed(seed)


def check_files(
    *, perfetto: Path | None = None, routing: Path | None = None, popularity: Path | None = None
) -> None:
    """Refuse files that could not be written at the end, before anything takes long.

    Raises
    ------
    UsageError
        When one exists that is not added to, cannot be made, or has a name that cannot be used.
    """
    check_writable("--perfetto", perfetto)
    check_writable("--routing", routing)
    if routing is not None and routing.suffix != ".npz":
        raise UsageError(
            f"--routing {routing}: the name of a routing trace ends in .npz",
            hint=f"for example --routing {routing.with_suffix('.npz')}",
        )
    if popularity is None:
        return
    if popularity.suffix == ".npz":
        if not popularity.is_file():
            raise UsageError(
                f"--popularity {popularity}: there is no such routing trace",
                hint="record one with --routing, or name a .json file that is written at the end",
            )
        return
    check_writable("--popularity", popularity, replaced=True)


def require_device(options: Options, **files: Path | None) -> None:
    """Refuse files that only a model on a device fills, where it will run on the CPU alone.

    Raises
    ------
    UsageError
        Naming the option.
    """
    given = [f"--{name}" for name, file in files.items() if file is not None]
    if not given:
        return
    from hybrid.machine.devices import choose_device

    if choose_device(options.device, options.vram_bytes) is None:
        raise UsageError(
            f"{given[0]}: on the CPU alone there is nothing to write to it",
            hint=f"add --vram or --device, or leave {' and '.join(given)} out",
        )


def require_sharing(model: HybridModel, **files: Path | None) -> None:
    """Refuse the same files where a device turns out not to take experts of this model.

    Raises
    ------
    UsageError
        Naming the option.
    """
    given = [f"--{name}" for name, file in files.items() if file is not None]
    if given and (model.placement is None or model.placement.executor is None):
        layers = model.loaded.layers
        why = "all experts of this model run on the CPU" if layers else "this model has no experts"
        raise UsageError(
            f"{given[0]}: {why}, nothing is written to it",
            hint=f"leave {' and '.join(given)} out",
        )


def write_timeline(model: HybridModel, file: Path | None) -> None:
    """Write the timeline of all lanes, if a file is given, and say so on stderr."""
    if file is None:
        return
    write_whole(file, model.perfetto())
    print(f"wrote {file}: open it in ui.perfetto.dev", file=sys.stderr)


def known(file: Path | None) -> Path | None:
    """Return a popularity file to begin with: none where it is yet to be written."""
    return file if file is not None and file.exists() else None


def write_popularity(model: HybridModel, file: Path | None) -> None:
    """Write the session's uses of experts, if a file is given, and say so on stderr."""
    if file is None:
        return
    if file.suffix == ".npz":  # a trace is read and stays as it is
        return
    model.save_popularity(file)
    print(f"wrote {file}: which experts this session used", file=sys.stderr)


def write_routing(model: HybridModel, file: Path | None) -> None:
    """Write the routing trace, if a file is given, and say so on stderr."""
    if file is not None:
        model.save_routing(file)
        print(f"wrote {file}: a routing trace", file=sys.stderr)


class Summary:
    """Tells on stderr how a model's calls went, and each slow path once."""

    def __init__(self, model: HybridModel) -> None:
        self._model = model
        self._told = {note.cause for note in model.notes}

    def tell(self, *, whole: bool = False) -> None:
        """Tell how the last call went: its figures and what ran slowly, or the ``whole`` report.

        Without figures, when it was interrupted before the model began, nothing.
        """
        report = self._model.report()
        if whole:
            print(report, file=sys.stderr)
            return
        if "new_tokens" not in report.figures:
            return
        print(summary_line(report.figures), file=sys.stderr)
        for path in report.slow_paths:
            if path.cause not in self._told:
                self._told.add(path.cause)
                print(f"slow: {path}", file=sys.stderr)


def read_text(file: Path) -> str:
    """Return the content of ``file``, which must be UTF-8."""
    try:
        data = file.read_bytes()
    except OSError as error:
        raise UsageError(
            f"cannot read {file}: {error.strerror}", hint="check the path and its permissions"
        ) from error
    return decode_utf8(data, str(file))


def given_text(value: str, option: str) -> str:
    """Return a text that was given by ``option``, read as UTF-8 whatever the locale says."""
    try:
        return decode_utf8(os.fsencode(value), option)
    except UnicodeEncodeError as error:
        raise UsageError(
            f"{option} is no text at letter {error.start}: {value[error.start]!r}",
            hint="give it as UTF-8",
        ) from error


def given_texts(values: Sequence[str] | None, option: str) -> list[str] | None:
    """Return texts that were given by ``option``, one after the other."""
    return None if values is None else [given_text(value, option) for value in values]


def decode_utf8(data: bytes, name: str) -> str:
    """Return ``data`` as text; ``name`` says where it comes from if it is not UTF-8."""
    try:
        return data.decode("utf-8").removeprefix("\N{ZERO WIDTH NO-BREAK SPACE}")  # a mark of order
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{name} is not valid UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}",
            hint="convert the text to UTF-8, for example with iconv",
        ) from error
