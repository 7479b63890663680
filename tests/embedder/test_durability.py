"""What an acknowledgement promises, on disks that hang, fail, are full, read-only or damaged."""

import contextlib
import os
import resource
import shutil
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedder.__main__ import main
from foretell import Client, Item
from foretell.errors import ForetellError, ResourceExhaustedError, UnavailableError
from serving.database import Database
from serving.process import ServiceProcess

Start = Callable[..., ServiceProcess]

QUICK = ("--precision", "float32")
"""Spares a start the measuring of a faster path."""

FULL = 13
"""SQLITE_FULL."""

SYNC_FAILED = 1034
"""SQLITE_IOERR_FSYNC."""

FAULTS = Path(__file__).parents[1] / "faults"


class Disk:
    """What the processes' write-ahead logs do; see tests/faults/sitecustomize.py.

    Attributes:
        operations: all writes and syncs so far, each by its first letter.
        syncing: set while a sync is held.
    """

    def __init__(self, path: Path) -> None:
        self.operations = ""
        self.syncing = threading.Event()
        self._may_sync = threading.Event()
        self._may_sync.set()
        self._failing: dict[str, int] = {}
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        threading.Thread(target=self._accept, daemon=True).start()

    def hold_syncs(self) -> None:
        """Syncs wait until `let_go`."""
        self._may_sync.clear()

    def let_go(self) -> None:
        """Ends `hold_syncs`."""
        self._may_sync.set()

    def fail(self, operation: str, code: int) -> None:
        """Writes or syncs fail; with 0 they are well again."""
        self._failing[operation] = code

    def close(self) -> None:
        self.let_go()
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:  # closed
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        # A killed process does not wait for its answer.
        with contextlib.suppress(OSError), connection, connection.makefile("rw") as lines:
            for line in lines:
                operation = line.strip()
                if operation == "sync" and not self._may_sync.is_set():
                    self.syncing.set()
                    self._may_sync.wait()
                    self.syncing.clear()
                self.operations += operation[0]
                lines.write(f"{self._failing.get(operation, 0)}\n")
                lines.flush()


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    """The disk of the services that the test starts."""
    probe = (
        "import _sqlite3, sys; sys.exit('libsqlite3.so.0' not in open('/proc/self/maps').read())"
    )
    if (
        not Path("/proc/self/maps").exists()
        or subprocess.run([sys.executable, "-c", probe]).returncode
    ):
        pytest.skip("Python's sqlite3 does not use a shared libsqlite3, which this needs")
    path = tmp_path / "faults"
    monkeypatch.setenv("PYTHONPATH", str(FAULTS), prepend=os.pathsep)
    monkeypatch.setenv("FAULTS_SOCKET", str(path))
    made = Disk(path)
    yield made
    made.close()


@pytest.fixture
def calls() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool


def upsert(client: Client, id: str, request_id: str | None = None) -> int:
    return client.upsert_items([Item(id, "red shoes")], request_id=request_id).seq


def ids(client: Client) -> list[str]:
    listed = [item.id for item in client.list_items().elements]
    assert [item.id for item in client.get_items(listed).items] == listed
    return listed


def test_the_answer_leaves_after_the_sync(
    start_embedder: Start, tmp_path: Path, disk: Disk, calls: ThreadPoolExecutor
) -> None:
    service = start_embedder(*QUICK, "--data-dir", str(tmp_path / "data"))
    with Client(embedder=service.address) as client:
        upsert(client, "first")  # encodes the text
        disk.hold_syncs()
        before = disk.operations
        writes: list[Future[int]] = [calls.submit(upsert, client, f"held {n}") for n in range(3)]
        assert disk.syncing.wait(60)
        # The write is in the log, and yet neither the caller nor a reader has it.
        assert disk.operations.startswith(before + "w")
        assert ids(client) == ["first"]
        assert not any(write.done() for write in writes)
        disk.let_go()
        assert sorted(write.result(60) for write in writes) == [4, 5, 6]
        present = ["first", "held 0", "held 1", "held 2"]
        assert ids(client) == present
        assert disk.operations.endswith("ws")

        # Killed before the sync it has told nobody that the write is done.
        disk.hold_syncs()
        write = calls.submit(upsert, client, "unknown", "once")
        assert disk.syncing.wait(60)
        service.kill()
    assert isinstance(write.exception(60), ForetellError)
    disk.let_go()
    service = start_embedder(*QUICK, "--data-dir", str(tmp_path / "data"))
    with Client(embedder=service.address) as client:
        # It is there or not; repeated, it is there once.
        assert ids(client) in (present, [*present, "unknown"])
        assert upsert(client, "unknown", "once") == 7
        assert ids(client) == [*present, "unknown"]


def test_a_failing_disk_is_told_and_loses_nothing(
    start_embedder: Start, tmp_path: Path, disk: Disk
) -> None:
    service = start_embedder(*QUICK, "--data-dir", str(tmp_path / "data"))
    kinds: list[tuple[str, int, type[ForetellError], str]] = [
        ("write", FULL, ResourceExhaustedError, "DISK_FULL"),
        ("sync", SYNC_FAILED, UnavailableError, "DISK_FAILED"),
    ]
    with Client(embedder=service.address) as client:
        seq = upsert(client, "before")
        for operation, code, error, reason in kinds:
            disk.fail(operation, code)
            with pytest.raises(error) as raised:
                upsert(client, "failed")
            assert raised.value.reason == reason
            assert raised.value.retry_after_s
            with pytest.raises(error):
                client.create_vector_collection("failed", 2)
            assert len(client.list_collections()) == 2
            assert "failed" not in ids(client)
            disk.fail(operation, 0)
            seq += 1
            assert upsert(client, f"well after {operation}") == seq
        present = ["before", "well after sync", "well after write"]
        assert ids(client) == present
        disk.fail("sync", SYNC_FAILED)
        with pytest.raises(UnavailableError):
            upsert(client, "unknown", "once")
        service.kill()
    disk.fail("sync", 0)
    assert "Traceback" not in (tmp_path / "embedder.log").read_text()
    service = start_embedder(*QUICK, "--data-dir", str(tmp_path / "data"))
    with Client(embedder=service.address) as client:
        # SQLite may find the write whose sync failed in its log; its request_id tells.
        assert ids(client) in (present, [*present[:1], "unknown", *present[1:]])
        assert upsert(client, "unknown", "once") == seq + 1
        assert ids(client) == [*present[:1], "unknown", *present[1:]]


def test_a_quota_is_a_full_disk(start_embedder: Start, tmp_path: Path) -> None:
    """The kernel refuses to let a file grow (RLIMIT_FSIZE), as with a quota."""
    data = tmp_path / "data"
    service = start_embedder(*QUICK, "--data-dir", str(data))
    pid = service.process.pid
    with Client(embedder=service.address) as client:
        client.create_vector_collection("vectors", 256)
        client.put_vectors("vectors", ["before"], [[1.0] * 256])
        unlimited = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        largest = max(path.stat().st_size for path in data.iterdir())
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (largest + 100_000, unlimited[1]))
        many = [f"{n:05}" for n in range(1_000)]
        with pytest.raises(ResourceExhaustedError) as raised:
            client.put_vectors("vectors", many, [[1.0] * 256] * len(many))
        assert raised.value.reason == "DISK_FULL"
        assert [item.id for item in client.list_items(collection="vectors").elements] == ["before"]
        client.put_vectors("vectors", ["small"], [[1.0] * 256])  # there is room for this one
        resource.prlimit(pid, resource.RLIMIT_FSIZE, unlimited)
        assert client.put_vectors("vectors", many, [[1.0] * 256] * len(many)).written == 1_000
        assert len(client.search(ids=["small"], collection="vectors", k=1_000).hits[0].ids) == 1_000
    assert "Traceback" not in (tmp_path / "embedder.log").read_text()


CAP_DAC_OVERRIDE = 1
PR_CAPBSET_DROP = 24

WITHOUT_ROOTS_RIGHTS = f"""
import ctypes, os, sys
ctypes.CDLL(None).prctl({PR_CAPBSET_DROP}, {CAP_DAC_OVERRIDE}, 0, 0, 0)
os.execv(sys.executable, [sys.executable, "-m", "embedder", *sys.argv[1:]])
"""
"""Runs the embedder so that permissions hold for it, even for root."""


def test_a_read_only_directory_is_refused(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    command = [sys.executable, "-c", WITHOUT_ROOTS_RIGHTS, *QUICK, "--data-dir", str(data)]
    data.chmod(0o500)
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    finally:
        data.chmod(0o700)
    assert ended.returncode == 2
    assert "Traceback" not in ended.stderr
    said = ended.stderr.splitlines()[-1]
    assert said.startswith("embedder: ")
    assert "Permission denied" in said
    assert str(data) in said
    assert list(data.iterdir()) == []


def truncated(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def first_bytes_flipped(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[:16] = bytes(byte ^ 0xFF for byte in content[:16])
    file.write_bytes(content)


def pages_flipped(file: Path) -> None:
    """The heads of all pages but the first."""
    content = bytearray(file.read_bytes())
    for page in range(4096, len(content), 4096):
        content[page : page + 8] = bytes(byte ^ 0xFF for byte in content[page : page + 8])
    file.write_bytes(content)


def test_a_damaged_database_is_refused(
    start_embedder: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    service = start_embedder(*QUICK, "--data-dir", str(data))
    with Client(embedder=service.address) as client:
        client.upsert_items([Item(f"item {n}", "red shoes") for n in range(1_000)])
    assert service.stop() == 0
    for damage in (truncated, first_bytes_flipped, pages_flipped):
        copy = tmp_path / damage.__name__
        shutil.copytree(data, copy)
        damage(copy / "embedder.sqlite")
        assert main(["--port", "0", *QUICK, "--data-dir", str(copy)]) == 2, damage
        said = capsys.readouterr().err
        assert "Traceback" not in said
        assert said.splitlines()[-1].startswith("embedder: ")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int]]:
    """The files of a database whose process was killed, and how long its log was after each of
    its commits, which wrote 0, 1, 2, ..."""
    folder, copy = tmp_path_factory.mktemp("written"), tmp_path_factory.mktemp("killed")
    database = Database(folder / "numbers.sqlite", NUMBERS)
    log = folder / "numbers.sqlite-wal"
    with closing(database):
        with closing(sqlite3.connect(folder / "numbers.sqlite")) as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        sizes = []
        for number in range(6):
            statement = f"INSERT INTO numbers VALUES ({number}, randomblob({3_000 * number}))"
            database.submit(lambda c, s=statement: c.execute(s).rowcount).result()  # type: ignore[misc]
            sizes.append(log.stat().st_size)
        for name in ("numbers.sqlite", "numbers.sqlite-wal"):
            shutil.copy(folder / name, copy / name)
    return copy, sizes


NUMBERS = "CREATE TABLE IF NOT EXISTS numbers (number INTEGER PRIMARY KEY, padding);\n"


@given(st.data())
@settings(max_examples=40)
def test_a_torn_or_flipped_log_loses_only_what_came_after(
    written: tuple[Path, list[int]], data: st.DataObject
) -> None:
    """What SQLite promises of its log's checksums, which all else here builds on."""
    folder, sizes = written
    position = data.draw(st.integers(0, sizes[-1] - 1), label="position")
    cut = data.draw(st.booleans(), label="cut")
    with tempfile.TemporaryDirectory() as made:
        copy = Path(made)
        shutil.copytree(folder, copy, dirs_exist_ok=True)
        log = copy / "numbers.sqlite-wal"
        content = bytearray(log.read_bytes())
        content[position] ^= 0x10
        log.write_bytes(content[:position] if cut else content)
        with closing(Database(copy / "numbers.sqlite", NUMBERS)) as database:
            rows = database.connection().execute("SELECT number FROM numbers").fetchall()
    whole = sum(size <= position for size in sizes)
    assert [number for (number,) in rows] == list(range(whole))
