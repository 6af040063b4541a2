"""A repository of the hub that is converted while it comes: file by file, each gone once packed.

A folder has what the model needs beside its weights, and of every weight file a stand-in: its
header, and holes. A file that is wanted comes into ``arriving``; when the last layer that it has
experts of is packed, ``packed`` keeps what else it had, with holes in the place of experts, and it
goes. What is where is told by the files alone, so that a run that was killed is taken up.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import struct
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from hybrid.errors import CheckpointError
from hybrid.hub.fetch import Manifest, fetch_file, first_bytes
from hybrid.weights.checks import Checkpoint
from hybrid.weights.partial import reporting_full_disk
from hybrid.weights.source_files import AGAIN, TensorInfo

#: What is asked for first of a file: most headers are smaller.
_HEAD_BYTES = 1 << 18
#: What is copied at a time of a file that goes.
_PIECE_BYTES = 1 << 24
_ENDING = ".safetensors"


class ArrivingCheckpoint(Checkpoint):
    """A repository whose weight files come when they are read, and go when they are packed.

    Parameters
    ----------
    wanted
        What of the repository the model needs: safetensors.
    folder
        Where it works. All but the weights, and their headers, are fetched here and now.

    Raises
    ------
    CheckpointError
        When they cannot be fetched.
    """

    def __init__(self, wanted: Manifest, folder: Path) -> None:
        super().__init__(folder)
        self._wanted = wanted
        self._arriving, self._packed = folder / "arriving", folder / "packed"
        with reporting_full_disk(folder):
            for place in (self._arriving, self._packed):
                place.mkdir(parents=True, exist_ok=True)
            for file in wanted.files:
                if not (folder / file).is_file():
                    self._fetch_beginning(file)
        #: By file: the first and the last layer that it has experts of, and its other tensors.
        self._layers: dict[str, tuple[int, int]] = {}
        self._others: dict[str, list[TensorInfo]] = {}
        self._coming: _Coming | None = None

    @property
    def name(self) -> str:
        """What it is called."""
        return self._wanted.name.repo.rpartition("/")[2]

    def identity(self) -> str:
        """Return a digest of its state on the hub and of the headers."""
        digest = hashlib.sha256(f"{self._wanted.name.repo}@{self._wanted.commit}".encode())
        digest.update((self.path / "config.json").read_bytes())
        for file in self.files:
            digest.update(_header(file))
        return digest.hexdigest()

    def expect(self, layers: Sequence[Iterable[str]], others: Iterable[str]) -> None:
        """Say which tensors each layer's experts are made of, in order, and what is needed last.

        The next file of that order comes while one is packed.
        """
        for layer, keys in enumerate(layers):
            for file in {self.tensors[key].path.name: None for key in keys}:
                first, _ = self._layers.get(file, (layer, layer))
                self._layers[file] = (first, layer)
        for key in others:
            info = self.tensors[key]
            self._others.setdefault(info.path.name, []).append(info)

    def place(self, info: TensorInfo) -> Path:
        """Return the file that a tensor can be read from now, which comes if it is not here."""
        file = info.path.name
        whole, thin = self._arriving / file, self._packed / file
        if (self._coming is None or self._coming.file != file) and whole.is_file():
            return whole
        if thin.is_file() and info in self._others.get(file, ()):
            return thin
        if self._coming is not None and self._coming.file != file:
            self._coming.wait()
        if self._coming is None or self._coming.file != file:
            self._coming = _Coming(self._wanted, file, self._arriving)
        self._coming.wait()
        self._coming = None
        self._check(file)
        after = next(self._after(file), None)
        if after is not None:
            self._coming = _Coming(self._wanted, after, self._arriving)
        return whole

    def layer_done(self, layer: int) -> None:
        """Let go of the files without experts of later layers; nobody may have them open."""
        for file, (_, last) in self._layers.items():
            whole = self._arriving / file
            coming = self._coming is not None and self._coming.file == file
            if last <= layer and whole.is_file() and not coming:
                _write_with_holes(self._packed / file, whole.stat().st_size, self._pieces(file))
                whole.unlink()

    def peak_bytes(self, layers: Sequence[int], other_bytes: int) -> int:
        """Return the most that all of this takes on disk at once, with the packed model.

        Parameters
        ----------
        layers
            Bytes of each layer's packed experts.
        other_bytes
            Of all other weights of the packed model.
        """
        sizes, order = self._wanted.files, self._order()
        thin = {file: sum(info.nbytes for info in self._others.get(file, ())) for file in order}
        most = packed = 0
        for layer, nbytes in enumerate(layers):
            packed += nbytes
            spans = {file: self._layers.get(file, (len(layers), len(layers))) for file in order}
            gone = [file for file, (_, last) in spans.items() if last < layer]
            here = [file for file, (first, last) in spans.items() if first <= layer <= last]
            here += [file for file, (first, _) in spans.items() if first > layer][:1]
            kept = sum(thin[file] for file in gone)
            most = max(most, packed + kept + sum(sizes[file] for file in here))
        at_last = sum(thin[file] if file in self._layers else sizes[file] for file in order)
        return max(most, at_last + packed + other_bytes)

    @property
    def nbytes(self) -> int:
        """Bytes on disk of what has come and was not let go."""
        places = (self._arriving, self._packed)
        return sum(_allocated(file) for place in places for file in place.rglob("*"))

    def remove(self) -> None:
        """Remove all that came."""
        if self._coming is not None:
            self._coming.wait()
        shutil.rmtree(self.path)

    def _order(self) -> list[str]:
        """Files in the order in which they are needed."""
        return [*self._layers, *(file for file in self._others if file not in self._layers)]

    def _after(self, file: str) -> Iterator[str]:
        """Yield the files that are needed after one and are not here."""
        order = self._order()
        for name in order[order.index(file) + 1 :] if file in order else ():
            if not ((self._arriving / name).is_file() or (self._packed / name).is_file()):
                yield name

    def _fetch_beginning(self, file: str) -> None:
        """Fetch what is no weights whole, and of weights the header, with holes for the rest."""
        name, commit, size = self._wanted.name, self._wanted.commit, self._wanted.files[file]
        if not file.endswith(_ENDING):
            (self.path / file).parent.mkdir(parents=True, exist_ok=True)
            os.replace(fetch_file(name, commit, file, self._arriving), self.path / file)
            return
        head = first_bytes(name, commit, file, min(size, _HEAD_BYTES))
        length = 8 + struct.unpack("<Q", head[:8])[0] if len(head) >= 8 else 0
        if len(head) < length <= size:
            head = first_bytes(name, commit, file, length)
        _write_with_holes(self.path / file, size, [(0, head[:length] or head)])

    def _check(self, file: str) -> None:
        """Refuse a file that is not the one whose header came before."""
        whole, stand_in = self._arriving / file, self.path / file
        if whole.stat().st_size != stand_in.stat().st_size or _header(whole) != _header(stand_in):
            whole.unlink()
            raise CheckpointError(
                f"{file} of {self._wanted.name} is not the file whose header came before",
                hint=AGAIN,
            )

    def _pieces(self, file: str) -> Iterator[tuple[int, bytes]]:
        """Yield of a whole file what is not experts', and where that lies."""
        whole = self._arriving / file
        yield 0, _header(whole)
        with whole.open("rb") as source:
            for info in self._others.get(file, ()):
                end = info.offset + info.nbytes
                for at in range(info.offset, end, _PIECE_BYTES):
                    source.seek(at)
                    yield at, source.read(min(_PIECE_BYTES, end - at))


class _Coming:
    """A file on its way, fetched by a thread that does not keep the program from ending."""

    def __init__(self, wanted: Manifest, file: str, folder: Path) -> None:
        self.file = file
        self._error: Exception | None = None
        self._asked = wanted.name, wanted.commit, file, folder
        self._thread = threading.Thread(target=self._fetch, daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Return when it is here; raise what hindered it."""
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _fetch(self) -> None:
        try:
            fetch_file(*self._asked)
        except Exception as error:  # raised where it is waited for
            self._error = error


def _header(file: Path) -> bytes:
    """Return a file's header, with the length before it."""
    with file.open("rb") as opened:
        length = opened.read(8)
        return length + opened.read(struct.unpack("<Q", length)[0])


def _write_with_holes(file: Path, size: int, pieces: Iterable[tuple[int, bytes]]) -> None:
    """Write a file of ``size`` bytes that has some pieces, whole or not at all."""
    aside = file.with_name(f"{file.name}.part")
    with aside.open("wb") as opened:
        opened.truncate(size)
        for at, piece in pieces:
            opened.seek(at)
            opened.write(piece)
        opened.flush()
        os.fsync(opened.fileno())
    os.replace(aside, file)


def _allocated(file: Path) -> int:
    stat = file.stat()
    return min(stat.st_size, getattr(stat, "st_blocks", stat.st_size) * 512)
