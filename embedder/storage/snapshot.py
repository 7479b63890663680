"""Snapshots: what indexes held at one moment, on disk, so that a start need not read all of SQLite.

A snapshot is a directory COLLECTION-ORDINAL with the files

    rows.f32            float32, little-endian, (slots, cols): the vectors
    seqs.i64            int64, little-endian, (slots,): of each slot's last change, -1: dead
    ids.txt             UTF-8, one id a line (ids have no control characters)
    accelerator.faiss   what faiss writes, where the index has an accelerator
    manifest.json       whose index it is, up to which seq, and bytes and sha256 of each file

It is written under a temporary name; each file is synced, the manifest last; then the directory
gets its name and the folder is synced. So a snapshot that has its name is whole, and if the disk
should lose some of it all the same, the digests tell: then it counts as missing. SQLite remains the
record of truth.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from embedder.search.accelerators import Accelerator, usable
from embedder.search.index import Frozen
from embedder.storage.store import CollectionRow
from serving.files import (
    CHUNK_BYTES,
    DamagedError,
    File,
    HashedFile,
    check_file,
    read_signed,
    sync_folder,
    write_signed,
)

log = logging.getLogger(__name__)

FORMAT = 1
"""Of the files. Snapshots of other formats count as damaged."""

SPARE = 0.25
"""Share of free slots behind the ones read, so that the first change need not copy all."""

ROWS, SEQS, IDS, ACCELERATOR = "rows.f32", "seqs.i64", "ids.txt", "accelerator.faiss"
MANIFEST = "manifest.json"

_NAME = re.compile(r"(\d+)-(\d+)")


@dataclass(frozen=True)
class Manifest:
    """Whose index a snapshot has."""

    format: int
    store: str
    """The store's own id."""
    collection: int
    """Number of the collection."""
    name: str
    cols: int
    seq: int
    """All changes up to here are in it; some later ones may be."""
    slots: int
    vectors: int
    """Slots that are alive."""
    accelerator: str | None
    """Its kind."""
    files: dict[str, File]


@dataclass(frozen=True)
class Snapshot:
    """A snapshot that was read."""

    path: Path
    manifest: Manifest
    frozen: Frozen
    """Its arrays may have room behind the slots."""


class Snapshots:
    """The snapshots of a data directory. One thread writes."""

    def __init__(self, folder: Path, store: str) -> None:
        self.folder = folder
        self._store = store

    def load(self, row: CollectionRow, current_seq: int) -> Snapshot | None:
        """The newest good one of a collection; those that are not are logged and deleted.

        One that is ahead of the store, which somebody has put back to an earlier state, must not
        stay: once the store has gone on to its seq, it would look like one of the new state.

        Args:
            row: the collection.
            current_seq: the store's; a snapshot cannot be ahead of it.
        """
        for path in self._of(row.number):
            try:
                return self._read(path, row, current_seq)
            except DamagedError as error:
                log.warning("collection %s: its snapshot %s is deleted: %s", row.name, path, error)
                _delete(path)
            except OSError as error:
                log.warning("collection %s: its snapshot %s is left: %s", row.name, path, error)
        return None

    def write(
        self, row: CollectionRow, seq: int, frozen: Frozen, check: Callable[[], None] = lambda: None
    ) -> None:
        """Writes one, and deletes the older ones of the collection.

        Args:
            row: the collection.
            seq: its `seq` as it was before `frozen` was taken.
            frozen: what its index held.
            check: called now and then; what it raises ends the writing.

        Raises:
            OSError: it could not be written; nothing of it is left.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        older = self._of(row.number)
        ordinal = max((_parts(path)[1] for path in older), default=0) + 1
        path = self.folder / f"{row.number}-{ordinal}"
        temporary = path.with_suffix(".new")
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir()
            self._write_files(temporary, row, seq, frozen, check)
            temporary.rename(path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        sync_folder(self.folder)
        for one in older:
            _delete(one)

    def keep_only(self, numbers: Iterable[int]) -> None:
        """Deletes the snapshots of other collections, and what was not finished."""
        kept = set(numbers)
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            match = _NAME.fullmatch(path.name)
            if match is None:
                shutil.rmtree(path, ignore_errors=True)
            elif int(match[1]) not in kept:
                _delete(path)

    def read(self, path: Path) -> Snapshot:
        """Reads one, whatever the store says.

        Raises:
            DamagedError: it is not what was written.
            OSError: it cannot be read.
        """
        manifest = _read_manifest(path / MANIFEST)
        slots, cols = manifest.slots, manifest.cols
        room = slots + int(SPARE * slots)
        rows, seqs = np.empty((room, cols), np.float32), np.empty(room, np.int64)
        ids = bytearray(manifest.files[IDS].bytes)
        parts = {
            ROWS: rows[:slots].reshape(-1).view(np.uint8).data,
            SEQS: seqs[:slots].view(np.uint8).data,
            IDS: memoryview(ids),
        }
        with ThreadPoolExecutor(len(manifest.files)) as pool:
            reading = [
                pool.submit(check_file, path / name, expected, parts.get(name))
                for name, expected in manifest.files.items()
            ]
            for one in reading:
                one.result()
        names = ids.decode().split("\n") if slots else []
        if len(names) != slots or int((seqs[:slots] >= 0).sum()) != manifest.vectors:
            raise DamagedError("its files do not have as many vectors as its manifest says")
        accelerator = None
        if manifest.accelerator and usable(manifest.accelerator):
            # Read by faiss only now that its digest is known.
            try:
                accelerator = Accelerator.read(path / ACCELERATOR, manifest.accelerator)
            except RuntimeError as error:  # written by another faiss
                raise DamagedError(f"faiss cannot read {ACCELERATOR}: {error}") from error
            if accelerator.covered > slots:
                raise DamagedError("its accelerator has more vectors than it")
        return Snapshot(path, manifest, Frozen(names, seqs, rows, accelerator))

    def fault(self, manifest: Manifest, row: CollectionRow | None, current_seq: int) -> str | None:
        """Why it is no snapshot of a collection of this store."""
        if row is None or (manifest.store, manifest.collection) != (self._store, row.number):
            return "it is of another store or collection"
        if manifest.cols != row.cols:
            return f"it has {manifest.cols} columns, the collection {row.cols}"
        if not row.created_seq <= manifest.seq <= current_seq:
            return (
                f"it is of seq {manifest.seq}; the collection was made at {row.created_seq}, and "
                f"the store is at {current_seq}"
            )
        return None

    def paths(self) -> list[Path]:
        """All that are there."""
        found = self.folder.iterdir() if self.folder.is_dir() else ()
        return [path for path in found if _NAME.fullmatch(path.name)]

    def _of(self, number: int) -> list[Path]:
        """A collection's, newest first."""
        own = [path for path in self.paths() if _parts(path)[0] == number]
        return sorted(own, key=_parts, reverse=True)

    def _read(self, path: Path, row: CollectionRow, current_seq: int) -> Snapshot:
        fault = self.fault(_read_manifest(path / MANIFEST), row, current_seq)
        if fault is not None:
            raise DamagedError(fault)
        return self.read(path)

    def _write_files(
        self,
        folder: Path,
        row: CollectionRow,
        seq: int,
        frozen: Frozen,
        check: Callable[[], None],
    ) -> None:
        seqs = np.ascontiguousarray(frozen.seqs, "<i8")
        rows = np.ascontiguousarray(frozen.rows, "<f4")
        parts = {
            ROWS: _chunks(rows.reshape(-1).view(np.uint8).data),
            SEQS: _chunks(seqs.view(np.uint8).data),
            IDS: _chunks(memoryview("\n".join(frozen.ids).encode())),
        }
        files = {}
        for name, chunks in parts.items():
            with HashedFile(folder / name) as file:
                for chunk in chunks:
                    check()
                    file.write(chunk)
            files[name] = file.written
        if frozen.accelerator is not None:
            with HashedFile(folder / ACCELERATOR) as file:

                def write(chunk: bytes) -> None:
                    check()
                    file.write(chunk)

                frozen.accelerator.write(write)
            files[ACCELERATOR] = file.written
        manifest = Manifest(
            format=FORMAT,
            store=self._store,
            collection=row.number,
            name=row.name,
            cols=row.cols,
            seq=seq,
            slots=len(seqs),
            vectors=int((seqs >= 0).sum()),
            accelerator=None if frozen.accelerator is None else frozen.accelerator.kind,
            files=files,
        )
        sync_folder(folder)
        write_signed(folder / MANIFEST, asdict(manifest))
        sync_folder(folder)


def _read_manifest(path: Path) -> Manifest:
    content = read_signed(path)
    if content.get("format") != FORMAT:
        raise DamagedError(f"it has format {content.get('format')}; this program reads {FORMAT}")
    content["files"] = {name: File(**file) for name, file in content["files"].items()}
    return Manifest(**content)


def _chunks(whole: memoryview) -> Iterator[memoryview]:
    return (whole[start : start + CHUNK_BYTES] for start in range(0, len(whole), CHUNK_BYTES))


def _parts(path: Path) -> tuple[int, int]:
    """Number of the collection and ordinal."""
    number, ordinal = path.name.split("-")
    return int(number), int(ordinal)


def _delete(path: Path) -> None:
    """Under another name, so that half of it is never taken for a damaged one."""
    old = path.with_suffix(".old")
    shutil.rmtree(old, ignore_errors=True)
    path.rename(old)
    shutil.rmtree(old, ignore_errors=True)
