"""The way of the data through both services, a step after the other."""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from rich.console import Console
from tqdm import tqdm

import foretell
from foretell.importing import EventReader, ItemReader
from serving.demo.files import DataFiles, own_files
from serving.demo.report import (
    LINES,
    Basket,
    Line,
    Profile,
    RankedItem,
    Report,
    Step,
    show,
    write_page,
)
from serving.demo.tables import evaluation_tables
from serving.process import ServiceProcess, started

PROFILES = 3
"""Users in the report."""
BASKETS = 3
"""Latest baskets of a user that are shown."""
VERSION = "demo"


class Demo:
    """One run; everything it makes is in one folder.

    Of an earlier run it keeps what costs time and stays true: the embedder's data directory, so
    that no text is encoded again. The predictor starts anew, because events of a person's file
    have no ids by which a repetition could be told.
    """

    def __init__(self, folder: Path, console: Console) -> None:
        self.folder = folder
        self.console = console
        self.steps: list[Step] = []
        self.peak_memory_mb: dict[str, float] = {}

    def run(self, events: Path | None, items: Path | None, *, full: bool) -> None:
        """From data to report."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for old in ("predictor", "models"):
            shutil.rmtree(self.folder / old, ignore_errors=True)
        with self._step("prepare the data"):
            files = self._files(events, items, full=full)
            # A file that cannot be read is told before anything is started.
            EventReader(files.events)
            if files.items is not None:
                ItemReader(files.items)
        with contextlib.ExitStack() as running:
            with self._step("start the services"):
                embedder = running.enter_context(_embedder(self.folder))
                predictor = running.enter_context(_predictor(self.folder, embedder.address))
                client = foretell.Client(embedder.address, predictor.address)
                running.enter_context(client)
            if files.items is not None:
                self._import_items(client, files.items)
            events_of = self._import_events(client, files.events)
            metrics = self._train(files, embedder.address)
            with self._step("register and activate the model"):
                self._command("register", self._version, "--data-dir", _data(self.folder))
                client.activate_model(VERSION, timeout_s=120)
            with self._step("predict") as step:
                profiles = _profiles(client, events_of)
                step.append(f"{PROFILES} users")
            info = client.predictor_info()
            lineage = json.loads((self._version / "lineage.json").read_text())
            self.peak_memory_mb = {
                "embedder": _peak_mb(embedder),
                "predictor": _peak_mb(predictor),
                "training": lineage["peak_memory_bytes"] / 2**20,
            }
        report = Report(
            title=files.title,
            events=info.events,
            users=info.users,
            items=info.items,
            model_version=info.model_version,
            profiles=profiles,
            tables=evaluation_tables(metrics),
            plots=self._keep_plots(),
            steps=self.steps,
            peak_memory_mb=self.peak_memory_mb,
            commands=_commands(profiles[0], self.folder),
        )
        self._write(report, metrics)

    @property
    def _version(self) -> Path:
        """The version directory, whose name is the version's."""
        return self.folder / "models" / VERSION

    def _files(self, events: Path | None, items: Path | None, *, full: bool) -> DataFiles:
        if events is not None:
            return own_files(events, items)
        # Imported here: a person's own files need neither the data nor pandas.
        from serving.demo.complete_journey import write_files

        return write_files(self.folder / "data", full=full)

    def _import_items(self, client: foretell.Client, path: Path) -> None:
        with self._step("embed the items") as step:
            reader = ItemReader(path)
            total = sum(1 for _ in ItemReader(path, with_attributes=False))
            with self._bar("items", total) as bar:
                result = client.import_items(reader, progress=lambda done: _advance(bar, done))
            read = client.embedder_info().texts_encoded
            step.append(f"{result.written:,} items; the encoder had to read {read:,} texts")
        self.console.print(str(reader.summary), highlight=False)

    def _import_events(self, client: foretell.Client, path: Path) -> Counter[str]:
        """Returns the number of events of each user."""
        with self._step("ingest the events") as step:
            events = EventReader(path, with_attributes=False)
            events_of = Counter(event.user_id for event in events)
            total = events_of.total()
            # Without timestamps the order is the time: up to now, a microsecond apart.
            start = datetime.now(UTC) - timedelta(microseconds=total)
            reader = EventReader(path, start=start)
            with self._bar("events", total) as bar:
                result = client.import_events(reader, progress=lambda done: _advance(bar, done))
            step.append(f"{result.written:,} events")
        self.console.print(str(reader.summary), highlight=False)
        return events_of

    def _train(self, files: DataFiles, embedder: str) -> dict[str, Any]:
        with self._step("train and evaluate the model"):
            sources = ["--events", str(files.events)]
            if files.items is not None:
                sources += ["--items", str(files.items)]
            printed = self._command(
                *("train", *sources, "--embedder", embedder, "--json"),
                *("--out", self._version),
            )
        metrics: dict[str, Any] = json.loads(printed)
        return metrics

    def _command(self, *arguments: str | Path) -> str:
        """Runs `python -m predictor ARGUMENTS`; its progress goes to this terminal."""
        command = [sys.executable, "-m", "predictor", *arguments]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            try:
                printed, _ = process.communicate()
            except KeyboardInterrupt:
                process.terminate()
                process.wait()
                raise
        if process.returncode:
            raise RuntimeError(f"python -m predictor {arguments[0]} failed")
        return printed

    @contextlib.contextmanager
    def _step(self, name: str) -> Iterator[list[str]]:
        """Times a step; notes appended to the list are part of the report."""
        self.console.rule(f"[bold]{name}", align="left")
        notes: list[str] = []
        start = time.monotonic()
        yield notes
        self.steps.append(Step(name, time.monotonic() - start, "; ".join(notes)))

    def _bar(self, unit: str, total: int) -> tqdm[Any]:
        return tqdm(total=total, unit=f" {unit}", unit_scale=True, file=sys.stderr)

    def _keep_plots(self) -> list[str]:
        """Copies the model's plots beside the report."""
        plots = sorted((self._version / "plots").glob("*.png"))
        for plot in plots:
            shutil.copy2(plot, self.folder)
        return [plot.name for plot in plots]

    def _write(self, report: Report, metrics: dict[str, Any]) -> None:
        write_page(report, self.folder / "report.html")
        cost = {
            "steps_s": {step.name: round(step.seconds, 2) for step in report.steps},
            "peak_memory_mb": report.peak_memory_mb,
        }
        text = json.dumps({**metrics, "cost": cost}, indent=2)
        (self.folder / "metrics.json").write_text(text, encoding="utf-8")
        show(report, self.console)
        self.console.print(f"written: {self.folder / 'report.html'}", highlight=False)


def serve(folder: Path, console: Console) -> None:
    """Both services on their default ports over the demo's data, until Ctrl-C."""
    if not (_data(folder) / "models").is_dir():
        raise RuntimeError(f"there is no demo in {folder}: run `make demo` first")
    with (
        _embedder(folder, port=50_051) as embedder,
        _predictor(folder, embedder.address, port=50_052) as predictor,
    ):
        console.print(f"embedder at {embedder.address}, predictor at {predictor.address}")
        console.print("Ctrl-C stops both")
        for service in itertools.cycle((embedder, predictor)):
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = service.process.wait(0.5)
                raise RuntimeError(f"a service ended with status {status}; see {folder}/*.log")


def _data(folder: Path) -> Path:
    return folder / "predictor"


def _embedder(folder: Path, port: int = 0) -> contextlib.AbstractContextManager[ServiceProcess]:
    arguments = ["--port", str(port), "--data-dir", str(folder / "embedder")]
    return started("embedder", arguments, log=folder / "embedder.log")


def _predictor(
    folder: Path, embedder: str, port: int = 0
) -> contextlib.AbstractContextManager[ServiceProcess]:
    arguments = ["--port", str(port), "--data-dir", str(_data(folder)), "--embedder", embedder]
    return started("predictor", arguments, log=folder / "predictor.log")


def _advance(bar: tqdm[Any], done: int) -> None:
    bar.update(done - bar.n)


def _peak_mb(service: ServiceProcess) -> float:
    """Peak resident memory of a process, from the kernel."""
    status = Path(f"/proc/{service.process.pid}/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def _profiles(client: foretell.Client, events_of: Counter[str]) -> list[Profile]:
    """Of users ordered by their number of events, those at the quartiles."""
    ranked = [user for user, _ in events_of.most_common()]
    chosen = [ranked[len(ranked) * part // (PROFILES + 1)] for part in range(1, PROFILES + 1)]
    return [_profile(client, user) for user in dict.fromkeys(chosen)]


def _profile(client: foretell.Client, user_id: str) -> Profile:
    history = client.list_events(user_id, page_size=1_000).elements
    prediction = client.predict(user_id, k=10)
    baskets = [
        (when, list(events))
        for when, events in itertools.groupby(history, key=lambda event: event.timestamp)
    ][:BASKETS]
    ids = {event.item_id for _, events in baskets for event in events if event.item_id}
    ids |= {item.item_id for item in prediction.items}
    texts: dict[str, str] = {}
    if ids:
        texts = {item.id: item.text for item in client.get_items(sorted(ids)).items}
    had = {event.item_id for event in history}
    return Profile(
        user_id=user_id,
        baskets=[
            Basket(
                title=f"{when:%a %d %b %Y, %H:%M}" if when else "",
                lines=[
                    Line(
                        event.behavior_type, texts.get(event.item_id) or event.text or event.item_id
                    )
                    for event in events[:LINES]
                ],
                more=max(0, len(events) - LINES),
            )
            for when, events in baskets
        ],
        prediction=prediction,
        items=[
            RankedItem(
                item.item_id,
                texts.get(item.item_id) or item.item_id,
                item.interest_score,
                item.probability,
                item.item_id in had,
            )
            for item in prediction.items
        ],
    )


def _commands(profile: Profile, folder: Path) -> list[str]:
    where = "" if folder == Path("out/demo") else f" --out {folder}"
    serve_command = "make serve" if not where else f".venv/bin/python -m serving.demo serve{where}"
    return [
        f"{serve_command}    # in one terminal; then, in another:",
        f".venv/bin/foretell predict {profile.user_id}",
        f".venv/bin/foretell predict {profile.user_id} --json",
    ]
