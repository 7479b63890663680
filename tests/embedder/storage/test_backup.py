"""Backups while an embedder writes, and what they are restored from and to."""

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from embedder.__main__ import main
from embedder.storage import records, store
from embedder.storage.backup import back_up, restore
from embedder.storage.store import FILE, Store
from embedder.storage.verify import verify
from foretell.embedder.v1 import embedder_service_pb2 as pb
from foretell.errors import FailedPreconditionError

ROW = bytes(16)


def write(opened: Store, number: int, id: str) -> int:
    def apply(connection: Any) -> int:
        seq = store.next_seq(connection)
        records.put_vectors(connection, number, [(id, ROW)], seq)
        store.touch(connection, number, seq)
        return seq

    return opened.database.submit(apply).result()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    opened = Store(folder, "ab" * 16, "fake")
    kind = pb.COLLECTION_KIND_VECTOR
    opened.database.submit(lambda c: store.add_collection(c, "given", kind, 4)).result()
    for number in range(100):
        write(opened, 1, f"id {number}")
    opened.close()
    return folder


def test_a_backup_while_an_embedder_writes(data: Path, tmp_path: Path) -> None:
    opened = Store(data, "ab" * 16, "fake")
    acknowledged: list[int] = []
    stop, some = threading.Event(), threading.Event()

    def load() -> None:
        while not stop.is_set():
            acknowledged.append(write(opened, 1, f"new {len(acknowledged)}"))
            some.set()

    writing = threading.Thread(target=load)
    writing.start()
    assert some.wait(60)
    known = len(acknowledged)
    manifest = back_up(data, tmp_path / "backup")
    stop.set()
    writing.join()
    opened.close()
    assert manifest["seq"] >= acknowledged[known - 1]  # all that was acknowledged before
    restore(tmp_path / "backup", tmp_path / "again")
    assert verify(tmp_path / "again").findings == []
    again = Store(tmp_path / "again", "ab" * 16, "fake")
    connection = again.database.connection()
    found = list(records.changed_vectors(connection, 1, pb.COLLECTION_KIND_VECTOR, 0))
    assert store.current_seq(connection) == manifest["seq"]
    assert [seq for *_, seq in found] == list(range(2, manifest["seq"] + 1))
    write(again, 1, "after")
    again.close()


def test_from_the_command_line(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    backup, again = str(tmp_path / "backup"), str(tmp_path / "again")
    assert main(["backup", "--data-dir", str(data), "--to", backup]) == 0
    assert main(["restore", "--from", backup, "--data-dir", again]) == 0
    assert main(["verify", "--data-dir", again]) == 0
    assert "seq 101" in capsys.readouterr().out
    assert (tmp_path / "again" / FILE).stat().st_size == (tmp_path / "backup" / FILE).stat().st_size
    # Neither goes over what is there.
    for arguments in (
        ["backup", "--data-dir", str(data), "--to", backup],
        ["restore", "--from", backup, "--data-dir", again],
        ["restore", "--from", backup, "--data-dir", str(data)],
    ):
        assert main(arguments) == 2
        assert "is not empty" in capsys.readouterr().err
    assert main(["backup", "--data-dir", str(tmp_path / "none"), "--to", backup]) == 2
    assert "there is no" in capsys.readouterr().err


def flip(path: Path) -> None:
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 1
    path.write_bytes(whole)


@pytest.mark.parametrize(
    ("name", "harm"),
    [
        (FILE, flip),
        (FILE, lambda path: os.truncate(path, 4_096)),
        (FILE, Path.unlink),
        ("manifest.json", flip),
        ("manifest.json", Path.unlink),
    ],
)
def test_a_damaged_backup_is_not_restored(
    data: Path, tmp_path: Path, name: str, harm: Callable[[Path], object]
) -> None:
    back_up(data, tmp_path / "backup")
    harm(tmp_path / "backup" / name)
    with pytest.raises(FailedPreconditionError) as raised:
        restore(tmp_path / "backup", tmp_path / "again")
    assert raised.value.reason == "DAMAGED_BACKUP"
    assert not (tmp_path / "again").exists()


def test_no_embedder_starts_during_a_restore(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    back_up(data, tmp_path / "backup")
    again = tmp_path / "again"
    again.mkdir()
    (again / "embedder.new").write_bytes(b"of a restore that was killed")

    def copy(source: Path, target: Path) -> None:
        with pytest.raises(FailedPreconditionError) as raised:
            Store(again, "ab" * 16, "fake")
        assert raised.value.reason == "DATA_DIR_IN_USE"
        copyfile(source, target)

    copyfile = shutil.copyfile
    monkeypatch.setattr(shutil, "copyfile", copy)
    restore(tmp_path / "backup", again)
    Store(again, "ab" * 16, "fake").close()
    assert verify(again).findings == []


def test_a_backup_that_fails_has_no_manifest(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            back_up(data, tmp_path / "backup")
    with pytest.raises(FailedPreconditionError):
        restore(tmp_path / "backup", tmp_path / "again")


def test_a_newer_schema_is_refused_and_left_as_it_is(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    opened = Store(data, "ab" * 16, "fake")
    opened.database.submit(lambda c: c.execute("PRAGMA user_version = 2").fetchall()).result()
    opened.close()
    before = (data / FILE).read_bytes()
    with pytest.raises(FailedPreconditionError, match=r"version 2, written by a newer") as raised:
        Store(data, "ab" * 16, "fake")
    assert raised.value.reason == "SCHEMA_VERSION"
    assert main(["verify", "--data-dir", str(data)]) == 2
    assert main(["backup", "--data-dir", str(data), "--to", str(tmp_path / "backup")]) == 2
    assert "version 2" in capsys.readouterr().err
    assert (data / FILE).read_bytes() == before


def test_the_commands_do_not_wait_for_torch(data: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from embedder.__main__ import main;"
        "assert main(['verify', '--data-dir', sys.argv[1]]) == 0;"
        "assert main(['backup', '--data-dir', sys.argv[1], '--to', sys.argv[2]]) == 0;"
        "assert not {'torch', 'transformers'} & sys.modules.keys()"
    )
    command = [sys.executable, "-c", code, str(data), str(tmp_path / "backup")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_a_directory_that_cannot_be_written() -> None:
    # Even root writes nothing there.
    with pytest.raises(FailedPreconditionError, match="/sys/kernel cannot be written") as raised:
        Store(Path("/sys/kernel"), "ab" * 16, "fake")
    assert raised.value.reason == "DATA_DIR_READ_ONLY"
