"""What all benchmarks share: options, the time budget, hardware and versions, the JSON line, and
peers, which run in environments of their own.

A benchmark writes tables and progress to the standard error. Its last line on the standard output
is one JSON object: {"bench", "versions", "hardware", "figures"}, figures being numbers whose
names end in their unit where they have one, and None for what the budget did not reach.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

Figures = dict[str, float | int | None]

PEERS = Path(__file__).parent / "peers"
"""Requirements of each peer's environment, and the scripts that run there."""

CACHE = Path("~/.cache/foretell/bench")
"""Environments and results of peers, and converted data."""

CPU_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "asimd", "bf16")
"""Instructions that decide how fast products of vectors are."""


def parser(name: str, description: str, budget_s: float) -> argparse.ArgumentParser:
    """An argument parser with the options that every benchmark has.

    Args:
        name: of the module in bench.
        description: what is measured; for --help.
        budget_s: the default of --budget-s.
    """
    made = argparse.ArgumentParser(
        prog=f"python -m bench.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--budget-s", type=float, default=budget_s, metavar="S",
                      help="seconds for the whole run, about: it bounds repetitions, never the "
                      "work that is compared (default: %(default)g)")  # fmt: skip
    made.add_argument(
        "--threads",
        type=int,
        default=2,
        metavar="N",
        help="of torch, for ours and peers alike (default: %(default)s; on a machine "
        "that is busy 1, for threads that wait for one another take ten times as long)",
    )
    made.add_argument("--cache-dir", type=Path, default=CACHE, metavar="DIR",
                      help="environments and results of peers, converted data "
                      "(default: %(default)s)")  # fmt: skip
    made.add_argument("--fresh", action="store_true",
                      help="run peers anew, whatever results of theirs are kept")  # fmt: skip
    return made


class Budget:
    """The seconds that a run may take; they count from here on."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._begin = time.monotonic()

    @property
    def spent(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._begin

    @property
    def left(self) -> float:
        """Seconds that remain, 0 at least."""
        return max(0.0, self.seconds - self.spent)


def say(text: str) -> None:
    """A line for the person who waits."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def hardware() -> str:
    """The machine in words: CPU, cores of this process, instructions, memory, GPUs."""
    info = _cpu_info()
    flags = [flag for flag in CPU_FLAGS if flag in info.get("flags", "").split()]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    parts = [info.get("model name", platform.processor() or platform.machine())]
    parts += [f"{cores()} cores", " ".join(flags), f"{memory:.0f} GiB", *_gpus()]
    return ", ".join(part for part in parts if part)


def cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_info() -> dict[str, str]:
    """The first processor in /proc/cpuinfo; empty where there is none."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    first = path.read_text().split("\n\n", 1)[0]
    lines = (line.split(":", 1) for line in first.splitlines() if ":" in line)
    info = {key.strip(): value.strip() for key, value in lines}
    return {**info, "flags": info.get("flags", info.get("Features", ""))}


def _gpus() -> list[str]:
    import torch  # here, so that a benchmark without it starts at once

    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


QUIET = 0.5
"""Running processes, on average, up to which a machine counts as idle."""


def load() -> float:
    """Running processes in the last minute: timings beside other work mean little."""
    load = os.getloadavg()[0]
    if load > QUIET:
        say(f"warning: the machine is busy (load {load:.1f}), so that times are upper bounds")
    return round(load, 2)


def versions(*names: str) -> dict[str, str]:
    """Python and the installed versions of the distributions, and of foretell-services."""
    found = {"python": platform.python_version()}
    return found | {
        name: importlib.metadata.version(name) for name in ("foretell-services", *names)
    }


def finish(bench: str, versions: Mapping[str, str], figures: Figures) -> None:
    """Writes the last line. Floats keep six significant digits."""
    rounded = {
        name: float(f"{value:.6g}") if isinstance(value, float) else value
        for name, value in figures.items()
    }
    result = {"bench": bench, "versions": versions, "hardware": hardware(), "figures": rounded}
    sys.stdout.write(json.dumps(result, allow_nan=False) + "\n")


def table(columns: Sequence[str], rows: Mapping[str, Mapping[str, str]]) -> str:
    """Plain text: rows by name, cells right-aligned, "-" where there is none."""
    first = max([*map(len, rows), 0]) + 2
    width = {
        column: max(len(column), *(len(cells.get(column, "-")) for cells in rows.values()), 1)
        for column in columns
    }
    lines = [" " * first + "  ".join(column.rjust(width[column]) for column in columns)]
    for name, cells in rows.items():
        line = "  ".join(cells.get(column, "-").rjust(width[column]) for column in columns)
        lines.append(name.ljust(first) + line)
    return "\n".join(lines)


async def rate(
    embed: Callable[[Sequence[str]], Awaitable[object]],
    texts: Sequence[str],
    size: int,
    callers: int,
) -> float:
    """Texts per second that concurrent callers get, each with one call in flight.

    Args:
        embed: encodes the texts of a call.
        texts: of all callers together.
        size: texts in a call.
        callers: number of them.
    """
    calls = (texts[start : start + size] for start in range(0, len(texts), size))

    async def caller() -> None:
        for call in calls:  # shared: each takes the next one
            await embed(call)

    started = time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(callers)))
    return len(texts) / (time.perf_counter() - started)


# --- Peers -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Peer:
    """A program to compare with, in its own virtual environment."""

    name: str
    python: Path

    def versions(self, *distributions: str) -> dict[str, str]:
        """What is installed there."""
        code = (
            "import importlib.metadata as m, json, sys;"
            "print(json.dumps({n: m.version(n) for n in sys.argv[1:]}))"
        )
        output = subprocess.check_output([self.python, "-c", code, *distributions], text=True)
        found: dict[str, str] = json.loads(output)
        return found

    def run(
        self, script: str, arguments: Sequence[str], threads: int
    ) -> Generator[dict[str, Any], None, None]:
        """Runs bench/peers/SCRIPT there and yields the JSON objects that it prints, line by line.

        Raises:
            RuntimeError: it failed; with the end of its standard error.
        """
        environment = {
            **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
            "OMP_NUM_THREADS": str(threads),
            "MKL_NUM_THREADS": str(threads),
        }
        command = [str(self.python), str(PEERS / script), *arguments]
        with (
            tempfile.TemporaryFile("w+") as complaints,
            subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=complaints, text=True, env=environment
            ) as process,
        ):
            assert process.stdout is not None
            try:
                for line in process.stdout:
                    yield json.loads(line)
            except BaseException:
                process.kill()
                raise
            if process.wait():
                complaints.seek(0)
                end = "".join(complaints.readlines()[-20:])
                raise RuntimeError(f"{script} ended with {process.returncode}:\n{end}")


def peer(name: str, cache: Path) -> Peer:
    """The environment of bench/peers/NAME.txt, made where it is missing.

    It is kept under `cache` by the content of the file and the version of Python.

    Raises:
        subprocess.CalledProcessError: pip could not install something; its message is on the
            standard error.
    """
    requirements = PEERS / f"{name}.txt"
    key = hashlib.sha256(requirements.read_bytes()).hexdigest()[:12]
    folder = cache.expanduser() / "venvs" / f"{name}-{key}-{_python()}"
    python, ready = folder / "bin" / "python", folder / ".ready"
    if not ready.exists():
        say(f"making the environment of {name} in {folder}")
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        install = ["-m", "pip", "install", "-qq", "--disable-pip-version-check"]
        subprocess.run([python, *install, "-r", requirements], check=True, stdout=sys.stderr)
        ready.touch()
    return Peer(name, python)


def _python() -> str:
    return f"py{sys.version_info.major}.{sys.version_info.minor}"


def kept(
    cache: Path,
    name: str,
    key: Mapping[str, Any],
    measure: Callable[[], Iterator[dict[str, Any]]],
    *,
    enough: Callable[[dict[str, Any]], bool] = lambda result: True,
    fresh: bool = False,
) -> tuple[dict[str, Any], bool]:
    """A peer's result, from an earlier run where there is one: (result, whether it was).

    Args:
        name: what is measured; begins the file's name.
        key: all that the result depends on: versions, hardware, settings, data.
        measure: yields the result, and again whenever there is more of it, so that a run that is
            cut short leaves what it had.
        enough: whether an earlier result will do.
        fresh: whether an earlier one is passed over.
    """
    text = json.dumps(key, sort_keys=True)
    number = hashlib.sha256(text.encode()).hexdigest()[:16]
    path = cache.expanduser() / "results" / f"{name}-{number}.json"
    if path.exists() and not fresh:
        stored: dict[str, Any] = json.loads(path.read_text())
        if enough(stored["result"]):
            say(f"{name}: from the cache, measured {stored['finished']} ({path})")
            return stored["result"], True
    latest: dict[str, Any] = {}
    path.parent.mkdir(parents=True, exist_ok=True)
    for latest in measure():
        finished = datetime.now(UTC).isoformat(timespec="seconds")
        new = path.with_suffix(".new")
        new.write_text(json.dumps({"key": key, "finished": finished, "result": latest}, indent=1))
        new.replace(path)
    return latest, False
