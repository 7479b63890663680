"""A few kills of real services; and an embedder that loses things, which must be noticed."""

import json
import shutil
import threading
from pathlib import Path

import pytest

from bench import crash
from bench.crashing import campaign
from bench.crashing.model import Kind


@pytest.mark.parametrize(("service", "kills"), [("embedder", 1), ("predictor", 2)])
def test_nothing_is_lost(
    service: str,
    kills: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(campaign, "LOADED_S", (0.2, 1.0))
    flags = ["--kills", str(kills), "--seed", "4", "--keep", str(tmp_path / "kept")]
    status = crash.main(["--service", service, *flags])
    said, complaints = capsys.readouterr()
    figures = json.loads(said.splitlines()[-1])["figures"]
    assert status == 0, complaints
    wrong = ("lost", "resurrected", "torn", "duplicated", "disagreements")
    assert [figures[name] for name in wrong] == [0, 0, 0, 0, 0]
    assert figures["kills"] == kills
    assert figures["acknowledged"] > 20
    assert "Traceback" not in (tmp_path / "kept" / "log").read_text()


def test_a_store_that_goes_back_in_time_is_noticed(tmp_path: Path) -> None:
    data, copy = tmp_path / "data", tmp_path / "copy"
    with crash.embedder_in(tmp_path, seed=5) as (child, subject):

        def load(address: str, number: int) -> None:
            killed = threading.Event()
            before = subject.acknowledged
            subject.load(address, (5, number), killed)
            while subject.acknowledged < before + 80:
                killed.wait(0.01)  # leaves the processor to the callers
            killed.set()
            assert subject.end() == []

        address = child.start()
        assert subject.check(address) == []
        load(address, 0)
        child.stop()
        shutil.copytree(data, copy)
        address = child.start()
        assert subject.check(address) == []
        load(address, 1)
        child.kill()
        shutil.rmtree(data)
        copy.rename(data)
        found = subject.check(child.start())
        child.stop()
    assert {violation.kind for violation in found} >= {
        Kind.LOST,  # acknowledged writes
        Kind.RESURRECTED,  # deleted items
        Kind.DISAGREEMENT,  # with those who follow
    }
