"""The lines of the log, as a process of its own writes them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import logging, sys
import grpc
from serving import logs
from serving.calls import Call
logs.configure("embedder", logs.LogFormat(sys.argv[1]))
logging.getLogger("a.module").info("said", extra={"rows": 3})
class Context:
    def peer(self): return "ipv4:127.0.0.1:1"
    def time_remaining(self): return 1.0
call = Call("/foretell.embedder.v1.VectorService/Embed", Context(), False)
call.notes["batch"] = 2
if sys.argv[2:]:
    sys.stderr.close()
for call.code in (grpc.StatusCode.OK, grpc.StatusCode.INTERNAL):
    logs.CallLog().end(call)
print("ended")
"""


def run(*arguments: str, stderr: int | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM, *arguments]
    if isinstance(stderr, Path):
        with stderr.open("w") as file:
            return subprocess.run(
                command, stdout=subprocess.PIPE, stderr=file, text=True, check=True
            )
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=stderr, text=True, check=True)


def test_lines_of_calls_and_of_the_program_are_alike() -> None:
    said, good, bad = map(json.loads, run("json", stderr=subprocess.PIPE).stderr.splitlines())
    for line in (said, good, bad):
        assert line["service"] == "embedder"
        assert line["timestamp"].endswith("Z")
    assert (said["message"], said["level"], said["logger"]) == ("said", "info", "a.module")
    assert said["rows"] == 3
    assert (good["message"], good["level"], good["logger"]) == ("call", "info", "call")
    assert (good["code"], good["batch"]) == ("OK", 2)
    assert 0 <= good["deadline_left_ms"] <= 1000
    assert (bad["code"], bad["level"]) == ("INTERNAL", "warning")


def test_a_terminal_gets_text() -> None:
    said, good, bad = run("text", stderr=subprocess.PIPE).stderr.splitlines()
    assert "said" in said
    assert "VectorService/Embed" in good
    assert "warning" in bad


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is Linux's alone")
def test_a_full_disk_ends_no_call() -> None:
    assert run("json", stderr=Path("/dev/full")).stdout == "ended\n"


def test_a_closed_log_ends_no_call() -> None:
    assert run("json", "closed", stderr=subprocess.PIPE).stdout == "ended\n"
