import re
from pathlib import Path

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


def test_probe(embedder_address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert probe.main([embedder_address]) == 0
    assert probe.main([embedder_address, "foretell.embedder.v1.EmbedderService"]) == 0
    assert probe.main([embedder_address, "other.Service"]) == 1
    assert "NOT_FOUND" in capsys.readouterr().err
    assert probe.main(["127.0.0.1:1"]) == 1
    assert "UNAVAILABLE" in capsys.readouterr().err
