import os
import re
import signal
import threading
from pathlib import Path
from typing import NoReturn

import pytest

from serving import probe
from serving.process import start


def test_a_module_that_ends_did_not_start(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with pytest.raises(RuntimeError, match=re.escape(f"exit status 2); see {log}")):
        start("json.tool", ["--no-such-flag"], log=log)
    assert "--no-such-flag" in log.read_text()


def test_another_first_line_is_no_start() -> None:
    with pytest.raises(RuntimeError, match="python -m this did not start"):
        start("this")


def test_what_is_not_ready_in_time_is_killed(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="exit status -9"):
        start("timeit", ["-n", "1000000000000", "pass"], timeout_s=0.3)


def test_who_is_interrupted_leaves_no_process() -> None:
    def interrupted(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    task = Path(f"/proc/self/task/{os.getpid()}/children")
    before, handler = task.read_text(), signal.signal(signal.SIGUSR1, interrupted)
    try:
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGUSR1)).start()
        with pytest.raises(KeyboardInterrupt):
            start("timeit", ["-n", "1000000000000", "pass"])
    finally:
        signal.signal(signal.SIGUSR1, handler)
    assert task.read_text() == before


def test_probe(embedder_address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert probe.main([embedder_address]) == 0
    assert probe.main([embedder_address, "foretell.embedder.v1.EmbedderService"]) == 0
    assert probe.main([embedder_address, "other.Service"]) == 1
    assert "NOT_FOUND" in capsys.readouterr().err
    assert probe.main(["127.0.0.1:1"]) == 1
    assert "UNAVAILABLE" in capsys.readouterr().err
