"""Several processes of a service: what their supervisor does when they do not behave."""

import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from serving.supervisor import FIRST_BACKOFF_S

TINY = """
import os, signal, sys, time

if sys.argv[1:2] == ["worker"]:
    with open("starts", "a") as file:
        file.write(f"{os.getpid()} {time.monotonic()}\\n")
    if os.environ["MODE"] == "refuses":
        sys.exit(3)
    if os.environ["MODE"] == "obeys":
        from serving import supervisor
        from serving.settings import ServiceSettings

        supervisor.worker_settings(ServiceSettings, sys.argv[2:])
    if os.environ["MODE"] == "hangs":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("tiny ready at here", flush=True)
    if os.environ["MODE"] == "dies":
        sys.exit(1)
    while True:
        signal.pause()

from serving import supervisor
from serving.settings import ServiceSettings

supervisor.ENDING_S = 0.2
settings = ServiceSettings(drain_s=0, grace_s=0)
sys.exit(supervisor.supervise("tiny", settings, int(os.environ["COUNT"])))
"""
"""A service whose workers do as MODE says."""


def starts(folder: Path) -> list[str]:
    """Process id and time of each start of a worker."""
    return (folder / "starts").read_text().splitlines()


Start = Callable[[str, int], subprocess.Popen[str]]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """`start(MODE, COUNT)` gives a supervisor of so many workers."""
    (tmp_path / "tiny.py").write_text(TINY)
    begun: list[subprocess.Popen[str]] = []

    def run(mode: str, count: int) -> subprocess.Popen[str]:
        monkeypatch.setenv("MODE", mode)
        monkeypatch.setenv("COUNT", str(count))
        command = [sys.executable, "-m", "tiny"]
        begun.append(subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True))
        return begun[-1]

    yield run
    for process in begun:
        process.kill()
        process.communicate()


def test_where_one_cannot_start_none_does(start: Start) -> None:
    service = start("refuses", 2)
    assert service.communicate(timeout=60)[0] == ""
    assert service.returncode == 3


def test_what_dies_again_and_again_is_replaced_ever_later(start: Start, tmp_path: Path) -> None:
    service = start("dies", 1)
    assert service.stdout is not None
    assert service.stdout.readline().startswith("tiny ready at 127.0.0.1:")
    deadline = time.monotonic() + 60
    times: list[float] = []
    while len(times) < 5:
        assert time.monotonic() < deadline
        times = [float(line.split()[1]) for line in starts(tmp_path)]
        time.sleep(0.02)
    gaps = [after - before for before, after in pairwise(times)]
    assert all(gap >= FIRST_BACKOFF_S * 2**n for n, gap in enumerate(gaps))
    service.send_signal(signal.SIGTERM)
    assert service.communicate(timeout=60)[0] == ""  # it was said once
    assert service.returncode == 0


def test_what_does_not_end_is_killed(start: Start) -> None:
    service = start("hangs", 2)
    assert service.stdout is not None
    service.stdout.readline()
    service.send_signal(signal.SIGINT)
    service.communicate(timeout=60)
    assert service.returncode == 1


def test_workers_end_with_their_supervisor(start: Start, tmp_path: Path) -> None:
    service = start("obeys", 2)
    assert service.stdout is not None
    service.stdout.readline()
    ends = [os.pidfd_open(int(line.split()[0])) for line in starts(tmp_path)]
    assert len(ends) == 2
    service.kill()
    for end in ends:
        with selectors.DefaultSelector() as selector:
            selector.register(end, selectors.EVENT_READ)  # readable once the process has ended
            assert selector.select(30)
        os.close(end)
