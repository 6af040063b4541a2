"""Shows the progress of a conversion on stderr."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)


@contextmanager
def conversion_progress(title: str) -> Iterator[Callable[[int, int, str], None]]:
    """Show bytes written, rate and time left; yields what :func:`convert` reports to.

    The bar begins with the first piece: what is refused before it is not refused under a bar.
    """
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
    task = bar.add_task(title, total=None)

    def report(done_bytes: int, total_bytes: int, what: str) -> None:
        bar.start()  # once begun, this does nothing
        bar.update(task, completed=done_bytes, total=total_bytes)

    try:
        yield report
    finally:
        if bar.live.is_started:
            bar.stop()
