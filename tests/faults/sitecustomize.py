"""A disk that does as a test says: with this folder on PYTHONPATH a Python process asks the Unix
socket FAULTS_SOCKET before each write and each sync of an SQLite write-ahead log.

It sends a line, `write` or `sync`, and waits for the answer, a result code of SQLite: with 0 the
operation is done, with another one it fails with that, and is not done.

This is a virtual file system of SQLite's (https://www.sqlite.org/vfs.html) before the usual one,
made with ctypes; it takes effect because Python's own module uses the same shared library.
"""

from __future__ import annotations

import ctypes
import os
import socket
import threading
from ctypes import CFUNCTYPE, POINTER, c_char_p, c_int, c_int64, c_void_p
from typing import Any

OPEN_WAL = 0x00080000
"""SQLITE_OPEN_WAL."""

# The name goes on as the pointer that it is: SQLite reads what stands behind it.
OPEN = CFUNCTYPE(c_int, c_void_p, c_void_p, c_void_p, c_int, c_void_p)
WRITE = CFUNCTYPE(c_int, c_void_p, c_void_p, c_int, c_int64)
SYNC = CFUNCTYPE(c_int, c_void_p, c_int)


class Vfs(ctypes.Structure):
    """sqlite3_vfs, version 3."""

    _fields_ = (
        ("iVersion", c_int),
        ("szOsFile", c_int),
        ("mxPathname", c_int),
        ("pNext", c_void_p),
        ("zName", c_char_p),
        ("pAppData", c_void_p),
        ("xOpen", OPEN),
        ("others", c_void_p * 14),
    )


class Methods(ctypes.Structure):
    """sqlite3_io_methods, version 3."""

    _fields_ = (
        ("iVersion", c_int),
        ("xClose", c_void_p),
        ("xRead", c_void_p),
        ("xWrite", WRITE),
        ("xTruncate", c_void_p),
        ("xSync", SYNC),
        ("others", c_void_p * 13),
    )


class File(ctypes.Structure):
    """sqlite3_file."""

    _fields_ = (("pMethods", POINTER(Methods)),)


class Disk:
    """Asks before it writes."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._lock = threading.Lock()
        self._answers: Any = None
        self._kept: list[Any] = []
        """What SQLite points to."""
        library = ctypes.CDLL("libsqlite3.so.0")
        library.sqlite3_initialize()
        library.sqlite3_vfs_find.restype = POINTER(Vfs)
        usual = library.sqlite3_vfs_find(None).contents
        vfs = Vfs.from_buffer_copy(usual)
        vfs.zName = b"faults"
        vfs.xOpen = OPEN(lambda *arguments: self._open(usual, *arguments))
        self._kept += [usual, vfs]
        library.sqlite3_vfs_register(ctypes.byref(vfs), 1)

    def _open(self, usual: Vfs, own: int, name: int, file: int, flags: int, out: int) -> int:
        """Opens a file as usual; one of a write-ahead log gets methods that ask."""
        result = int(usual.xOpen(own, name, file, flags, out))
        opened = File.from_address(file)
        if result == 0 and flags & OPEN_WAL:
            before = opened.pMethods.contents
            methods = Methods.from_buffer_copy(before)
            methods.xWrite = WRITE(lambda *what: self._ask("write") or before.xWrite(*what))
            methods.xSync = SYNC(lambda *what: self._ask("sync") or before.xSync(*what))
            self._kept += [before, methods]
            opened.pMethods = ctypes.pointer(methods)
        return result

    def _ask(self, operation: str) -> int:
        with self._lock:
            if self._answers is None:
                connection = socket.socket(socket.AF_UNIX)
                connection.connect(self._address)
                self._answers = connection.makefile("rw")
            self._answers.write(f"{operation}\n")
            self._answers.flush()
            return int(self._answers.readline())


if "FAULTS_SOCKET" in os.environ:
    DISK = Disk(os.environ["FAULTS_SOCKET"])
