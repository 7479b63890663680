"""Backups while predictors write, what they are restored from and to, and what `verify` finds."""

import json
import os
import shutil
import threading
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from foretell.errors import FailedPreconditionError
from foretell.predictor.v1 import event_service_pb2 as pb
from foretell.texts import text_id
from predictor import database, registry
from predictor.__main__ import main
from predictor.backup import back_up, restore
from predictor.database import FILE, open_database
from predictor.ingestion import NewEvent, ingest
from predictor.verify import verify
from serving import keeping
from serving.database import Database
from serving.process import ServiceProcess


def event(number: int) -> NewEvent:
    text = f"words {number % 3}" if number % 2 else None
    identity = text_id(text) if text else None
    attributes = json.dumps({"n": str(number)})
    return NewEvent(f"u{number % 5}", "view", number, "i", text, identity, None, attributes)


def write(db: Database, *events: NewEvent) -> None:
    db.submit(lambda connection: ingest(connection, events)).result()


@pytest.fixture
def data(tmp_path: Path, make_version: Callable[..., Path]) -> Path:
    """A data directory with events and the active version v1; v2 can be registered."""
    folder = tmp_path / "data"
    db = open_database(folder)
    write(db, *(event(number) for number in range(20)))
    db.submit(lambda connection: connection.execute("UPDATE texts SET state = 1")).result()
    registry.register(db, folder, make_version("v1"))
    db.submit(lambda connection: registry.activate(connection, "v1")).result()
    db.close()
    return folder


def test_a_backup_while_a_predictor_writes(data: Path, tmp_path: Path) -> None:
    db = open_database(data)
    acknowledged: list[int] = []
    stop, some = threading.Event(), threading.Event()

    def load() -> None:
        while not stop.is_set():
            write(db, event(100 + len(acknowledged)))
            acknowledged.append(1)
            some.set()

    writing = threading.Thread(target=load)
    writing.start()
    assert some.wait(60)
    known = len(acknowledged)
    manifest = back_up(data, tmp_path / "backup")
    stop.set()
    writing.join()
    db.close()
    assert manifest["events"] >= 20 + known  # all that was acknowledged before
    again = tmp_path / "again"
    restore(tmp_path / "backup", again)
    assert verify(again).findings == []
    db = open_database(again)
    (events,) = db.connection().execute("SELECT count(*) FROM events").fetchone()
    assert events == manifest["events"]
    # Nobody knows which of them the embedder has now.
    assert set(db.connection().execute("SELECT state FROM texts")) == {(0,)}
    assert registry.active(db.connection()).version == "v1"
    write(db, event(1))
    db.close()


def test_versions_that_come_and_go_during_a_backup(
    data: Path,
    tmp_path: Path,
    make_version: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    db = open_database(data)
    registry.register(db, data, make_version("gone"))
    copy = keeping.copy_database
    copies: list[Path] = []

    def before_and_after(connection: Any, path: Path) -> None:
        copies.append(path)
        if len(copies) == 1:
            db.submit(lambda c: registry.remove(c, "gone")).result()
            registry.remove_files(data, "gone")
            registry.register(db, data, make_version("came"))
            registry.register(db, data, make_version("both"))
        copy(connection, path)
        if len(copies) == 1:  # it is in this copy, and its files are nowhere
            db.submit(lambda c: registry.remove(c, "both")).result()
            registry.remove_files(data, "both")

    monkeypatch.setattr(keeping, "copy_database", before_and_after)
    manifest = back_up(data, tmp_path / "backup")
    db.close()
    assert len(copies) == 2
    assert manifest["versions"] == ["came", "v1"]
    restore(tmp_path / "backup", tmp_path / "again")
    assert verify(tmp_path / "again").findings == []
    assert {one.name for one in registry.models_dir(tmp_path / "again").iterdir()} == {"came", "v1"}


def test_from_the_command_line(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    backup, again = str(tmp_path / "backup"), str(tmp_path / "again")
    assert main(["backup", "--data-dir", str(data), "--to", backup]) == 0
    assert "20 events, 1 versions" in capsys.readouterr().out
    assert main(["restore", "--from", backup, "--data-dir", again]) == 0
    assert main(["verify", "--data-dir", again]) == 0
    assert "20 events, 5 users, 3 texts, 1 versions; findings: 0" in capsys.readouterr().out
    # Neither goes over what is there.
    for arguments in (
        ["backup", "--data-dir", str(data), "--to", backup],
        ["restore", "--from", backup, "--data-dir", again],
    ):
        assert main(arguments) == 2
        assert "is not empty" in capsys.readouterr().err
    (registry.models_dir(Path(again)) / "v1" / "weights.safetensors").unlink()
    assert main(["verify", "--data-dir", again]) == 1
    assert "version that cannot be served: v1" in capsys.readouterr().out
    assert main(["backup", "--data-dir", str(tmp_path / "none"), "--to", backup]) == 2
    assert "there is no" in capsys.readouterr().err


def flip(path: Path) -> None:
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 1
    path.write_bytes(whole)


def test_a_damaged_backup_is_not_restored(data: Path, tmp_path: Path) -> None:
    back_up(data, tmp_path / "backup")
    weights = "models/v1/weights.safetensors"
    harms: list[tuple[str, Callable[[Path], object]]] = [
        (FILE, flip),
        (FILE, lambda path: os.truncate(path, 4_096)),
        (FILE, Path.unlink),
        (weights, flip),
        (weights, Path.unlink),
        ("models/v1/config.json", flip),
        ("manifest.json", flip),
        ("manifest.json", Path.unlink),
    ]
    for number, (name, harm) in enumerate(harms):
        damaged = tmp_path / str(number)
        shutil.copytree(tmp_path / "backup", damaged)
        harm(damaged / name)
        with pytest.raises(FailedPreconditionError) as raised:
            restore(damaged, tmp_path / "again")
        assert raised.value.reason == "DAMAGED_BACKUP", name
        assert not (tmp_path / "again").exists()


def test_a_restore_that_was_killed_is_repeated_and_never_takes_a_place(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    back_up(data, tmp_path / "backup")
    again = tmp_path / "again"
    left = registry.models_dir(again) / "v1"
    left.mkdir(parents=True)
    (left / "half").write_bytes(b"of a restore that was killed")
    (again / "events.db.new").write_bytes(b"and this too")

    def copy(source: Path, target: Path, **options: Any) -> None:
        copyfile(source, target, **options)
        open_database(again).close()  # a predictor starts meanwhile

    copyfile = shutil.copyfile
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", copy)
        with pytest.raises(FailedPreconditionError, match="was made meanwhile"):
            restore(tmp_path / "backup", again)
    assert verify(again).seen["events"] == 0
    for path in again.glob(f"{FILE}*"):
        path.unlink()
    restore(tmp_path / "backup", again)
    report = verify(again)
    assert (report.findings, report.seen["events"]) == ([], 20)
    assert not (left / "half").exists()


def test_what_verify_finds(data: Path, tmp_path: Path) -> None:
    harms = {
        "event without a user": "DELETE FROM users WHERE user_id = 'u1'",
        "event without a behavior type": "DELETE FROM types",
        "event whose text is missing": "DELETE FROM texts WHERE number = 1",
        "event whose attributes are no JSON object": "UPDATE events SET attributes = '[1]'",
        "user without an event": "INSERT INTO users (user_id) VALUES ('new')",
        "behavior type that counts other events than it has": "UPDATE types SET events = 1",
        "text that counts other events than it has": "UPDATE texts SET events = events + 1",
        "text whose id is not its own": "UPDATE texts SET text = 'other' WHERE number = 1",
        "version with other files than were registered": "UPDATE models SET files = '{}'",
        "active version that is not registered": "DELETE FROM models",
        "SQLite file": "PRAGMA writable_schema = ON; UPDATE sqlite_master SET sql = "
        "replace(sql, 'text_id TEXT NOT NULL', 'text_id TEXT') WHERE name = 'texts'; "
        "INSERT INTO sqlite_master VALUES ('table', 'x', 'x', 3, 'CREATE TABLE x (y)')",
    }
    for number, (kind, statements) in enumerate(harms.items()):
        folder = tmp_path / str(number)
        shutil.copytree(data, folder)
        with database.open_database(folder).connection() as connection:
            connection.executescript(statements)
        assert any(found.startswith(kind) for found in verify(folder).findings), kind
    (registry.models_dir(data) / "v1" / "config.json").unlink()
    assert any(found.startswith("version that cannot be") for found in verify(data).findings)


def test_a_running_service_is_backed_up_and_its_old_events_go(
    start_predictor: Callable[..., ServiceProcess],
    connect: Callable[[str], Any],
    absent: str,
    eventually: Callable[[Callable[[], bool]], None],
    tmp_path: Path,
    free_ports: tuple[int, int],
) -> None:
    service = start_predictor(absent)
    stub = connect(service.address).events
    old, new = (pb.Event(user_id="u", behavior_type=one, item_id="i") for one in ("view", "buy"))
    for one in (old, new):
        one.timestamp.FromSeconds(1_700_000_000)
    stub.IngestEvents(pb.IngestEventsRequest(events=[old, new, new]))
    assert main(["backup", "--data-dir", str(tmp_path / "data"), "--to", str(tmp_path / "b")]) == 0
    stub.IngestEvents(pb.IngestEventsRequest(events=[new]))
    assert service.stop() == 0
    shutil.rmtree(tmp_path / "data")
    restore(tmp_path / "b", tmp_path / "data")
    flags = ["--retention", "view=30", "--retention", "sale=1", "--metrics-port"]
    restored = start_predictor(absent, *flags, str(free_ports[0]))
    stub = connect(restored.address).events

    def kept() -> list[str]:
        events = stub.ListEvents(pb.ListEventsRequest(user_id="u")).events
        return [one.behavior_type for one in events]

    eventually(lambda: kept() == ["buy", "buy"])
    page = urllib.request.urlopen(f"http://127.0.0.1:{free_ports[0]}/metrics", timeout=30)
    assert b'foretell_events_expired_total{behavior_type="view"} 1.0' in page.read()
