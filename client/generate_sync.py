"""Writes OUT/foretell/_sync_client.py from client/foretell/_async_client.py; `make protos` runs it.

Usage: python client/generate_sync.py [OUT]    (OUT: the folder `client` unless given)
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import unasync

CLIENT = Path(__file__).parent
HEADER = "# Generated from _async_client.py by client/generate_sync.py: change that one.\n"
NAMES = {"AsyncClient": "Client", "async_channel": "sync_channel"}
"""Beside unasync's own rules, which also write SyncX for every AsyncX."""


def generate() -> str:
    """The source of the sync client."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "_async", "client.py"), Path(folder, "_sync", "client.py")
        source.parent.mkdir()
        source.write_bytes((CLIENT / "foretell" / "_async_client.py").read_bytes())
        unasync.unasync_files([str(source)], [unasync.Rule("/_async/", "/_sync/", NAMES)])
        code = target.read_text()
    # Words of the docstrings are no names to unasync.
    summary = code.index('"""', 3) + 3
    code = HEADER + '"""The client of both services for threads."""' + code[summary:]
    return _ruff("format", _ruff("check", code, "--fix", "--select", "I"))


def _ruff(command: str, code: str, *options: str) -> str:
    name = CLIENT / "foretell" / "_sync_client.py"
    return subprocess.run(
        [sys.executable, "-m", "ruff", command, *options, "--quiet", "--stdin-filename", name, "-"],
        input=code,
        capture_output=True,
        text=True,
        check=True,
    ).stdout


if __name__ == "__main__":
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else CLIENT
    (out / "foretell" / "_sync_client.py").write_text(generate())
