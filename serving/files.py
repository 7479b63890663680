"""Files that must be what was written: synced, with digests that tell whether they still are."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHUNK_BYTES = 4 * 1024 * 1024
"""Written, read and hashed at a time."""

SYNCED_BYTES = 64 * 1024 * 1024
"""Synced at a time: a commit's fsync must not wait for gigabytes of a snapshot."""


class DamagedError(Exception):
    """It is not what was written, or of no use here; the message says why."""


@dataclass(frozen=True)
class File:
    """What a file must be."""

    bytes: int
    sha256: str
    """Hexadecimal."""


class HashedFile:
    """A new file that is hashed while it is written, and synced when it is closed.

    Attributes:
        written: bytes and digest, after the block.
    """

    def __init__(self, path: Path) -> None:
        self.written = File(0, "")
        self._file = path.open("xb", buffering=0)
        self._digest = hashlib.sha256()
        self._size = 0

    def write(self, chunk: bytes | memoryview) -> None:
        """Appends bytes."""
        before, left = self._size, memoryview(chunk)
        while left:
            left = left[self._file.write(left) :]
        self._digest.update(chunk)
        self._size += len(chunk)
        if before // SYNCED_BYTES != self._size // SYNCED_BYTES:
            os.fsync(self._file.fileno())

    def __enter__(self) -> HashedFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._file:
            if kind is None:
                os.fsync(self._file.fileno())
        self.written = File(self._size, self._digest.hexdigest())


def write_signed(path: Path, content: dict[str, Any]) -> None:
    """A new JSON file with a digest of its content, synced."""
    whole = {"content": content, "sha256": _digest_of(content)}
    with HashedFile(path) as file:
        file.write(json.dumps(whole, indent=1).encode())


def read_signed(path: Path) -> dict[str, Any]:
    """The content of a file of `write_signed`.

    Raises:
        DamagedError: it is missing or is not what was written.
    """
    try:
        whole = json.loads(path.read_bytes())
        content: dict[str, Any] = whole["content"]
        if whole["sha256"] != _digest_of(content):
            raise DamagedError(f"{path.name} has another sha256 than it says")
    except FileNotFoundError as error:
        raise DamagedError(f"{path.name} is missing") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"{path.name} cannot be read: {error}") from error
    return content


def check_file(path: Path, expected: File, into: memoryview | None = None) -> None:
    """Reads a file, into a buffer of its size if one is given, and compares it with its digest.

    Raises:
        DamagedError: it is missing or is not what was written.
    """
    try:
        file = path.open("rb", buffering=0)
    except FileNotFoundError as error:
        raise DamagedError(f"{path.name} is missing") from error
    with file:
        size = os.fstat(file.fileno()).st_size
        if size != expected.bytes or (into is not None and len(into) != size):
            raise DamagedError(f"{path.name} has {size} bytes, not {expected.bytes}")
        digest = hashlib.sha256()
        spare = memoryview(bytearray(0 if into is not None else CHUNK_BYTES))
        for start in range(0, size, CHUNK_BYTES):
            whole = min(CHUNK_BYTES, size - start)
            chunk = spare[:whole] if into is None else into[start : start + whole]
            done = 0
            while done < whole and (count := file.readinto(chunk[done:])):
                done += count
            digest.update(chunk)
    if digest.hexdigest() != expected.sha256:
        raise DamagedError(f"{path.name} has another sha256 than its manifest says")


def file_digest(path: Path) -> File:
    """What a file is now."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    return File(path.stat().st_size, digest.hexdigest())


def make_folder(path: Path) -> None:
    """Makes a folder that lasts, with those above it that are missing."""
    missing = [one for one in (path.absolute(), *path.absolute().parents) if not one.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for one in missing:
        sync_folder(one.parent)


def sync_folder(path: Path) -> None:
    """Makes the names in a folder last."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest_of(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
