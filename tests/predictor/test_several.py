"""`--processes`: several processes behind one port, kept by a supervisor."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import pytest

from foretell import Client, ClientSettings, Event, ForetellError
from foretell.predictor.v1 import event_service_pb2 as event_pb
from foretell.predictor.v1 import model_service_pb2 as model_pb
from foretell.predictor.v1 import prediction_service_pb2 as pb
from predictor.__main__ import main
from serving.process import ServiceProcess

if TYPE_CHECKING:
    from tests.predictor.conftest import Stubs

Start = Callable[..., ServiceProcess]
Eventually = Callable[[Callable[[], bool]], None]

OF_ITS_OWN = ("grpc.use_local_subchannel_pool", 1)
"""Makes a channel open a connection of its own."""


@pytest.fixture
def page_ports(free_port: Callable[[], int]) -> tuple[int, int]:
    """Two ports that follow one another and that nobody listens on."""
    first, second = free_port(), free_port()
    while second != first + 1:
        first, second = second, free_port()
    return first, second


def workers(service: ServiceProcess) -> set[int]:
    """Process ids of a supervisor's children."""
    pid = service.process.pid
    return {int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}


def alive(pid: int) -> bool:
    """Whether it runs; one that has ended and that nobody has waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def free(port: int) -> bool:
    """Whether a service could listen on it."""
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            one.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def calls_of(port: int) -> float:
    """How often GetInfo was called, by a process's page of metrics."""
    page = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30).read().decode()
    name = "grpc_server_started_total{"
    counts = [line for line in page.splitlines() if line.startswith(name) and "GetInfo" in line]
    return float(counts[0].split()[-1]) if counts else 0.0


@pytest.fixture
def connect_each(
    stubs_of: Callable[[grpc.Channel], "Stubs"],
) -> Iterator[Callable[..., list["Stubs"]]]:
    """Connects until there is a connection to each process; gives one of each, in their order."""
    with contextlib.ExitStack() as channels:

        def to(address: str, pages: tuple[int, ...]) -> list["Stubs"]:
            found: dict[int, Stubs] = {}
            for _ in range(50):  # the kernel deals connections out by chance
                channel = channels.enter_context(
                    grpc.insecure_channel(address, options=[OF_ITS_OWN])
                )
                stubs = stubs_of(channel)
                before = [calls_of(page) for page in pages]
                stubs.models.GetInfo(model_pb.GetInfoRequest(), timeout=30)
                (at,) = (n for n, page in enumerate(pages) if calls_of(page) > before[n])
                found.setdefault(at, stubs)
                if len(found) == len(pages):
                    return [found[at] for at in range(len(pages))]
            raise AssertionError(f"all connections came to processes {list(found)}")

        yield to


def predict(stubs: "Stubs") -> pb.Prediction:
    query = pb.PredictionQuery(user_id="ann", k=5)
    return stubs.predictions.Predict(pb.PredictRequest(query=query), timeout=30).prediction


class Load:
    """Callers with a connection each, who predict and ingest in turn until they are stopped."""

    CALLERS = 8

    def __init__(self, address: str) -> None:
        self.failed: list[ForetellError] = []
        self.ingested = [0] * self.CALLERS
        self._before = [0] * self.CALLERS
        self._address = address
        self._stop = threading.Event()
        self._callers = [
            threading.Thread(target=self._run, args=(at,)) for at in range(self.CALLERS)
        ]

    def _run(self, at: int) -> None:
        # Channels of equal settings would share one connection.
        settings = ClientSettings(keepalive_s=30 + at)
        with Client(predictor=self._address, settings=settings) as client:
            while not self._stop.wait(0.05):
                try:
                    client.predict("ann")
                    client.ingest_events([Event("bob", "view", item_id="tea-1")])
                    self.ingested[at] += 1
                except ForetellError as error:
                    self.failed.append(error)

    def __enter__(self) -> "Load":
        for caller in self._callers:
            caller.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for caller in self._callers:
            caller.join()

    def goes_on(self) -> bool:
        """Whether each caller has been answered since this was last true."""
        now = list(self.ingested)
        if all(after > before for before, after in zip(self._before, now, strict=True)):
            self._before = now
            return True
        return False


def test_two_processes_are_one_service(
    start_predictor: Start, connect_each: Callable[..., list["Stubs"]],
    make_version: Callable[..., Path], register: Callable[[Path], None],
    catalogue_embedder: ServiceProcess, page_ports: tuple[int, int], eventually: Eventually,
) -> None:  # fmt: skip
    flags = ["--processes", "2", "--metrics-port", str(page_ports[0])]
    service = start_predictor(catalogue_embedder.address, *flags)
    each = connect_each(service.address, page_ports)
    before = workers(service)
    assert len(before) == 2

    # An event that one has taken, the other sees at once.
    for number in range(50):
        event = event_pb.Event(user_id="ann", behavior_type="buy", item_id=f"tea-{number % 5}")
        taken, other = each if number % 2 else each[::-1]
        taken.events.IngestEvents(event_pb.IngestEventsRequest(events=[event]), timeout=30)
        seen = other.events.ListEvents(event_pb.ListEventsRequest(user_id="ann"), timeout=30)
        assert len(seen.events) == number + 1

    # An activation through one switches both.
    for at, name in enumerate(("one", "two")):
        register(make_version(name, seed=at + 1))
        each[at].models.ActivateModel(model_pb.ActivateModelRequest(version=name), timeout=60)
        first, second = (predict(stubs) for stubs in each)
        assert first.model_version == second.model_version == name
        assert list(first.items) == list(second.items)

    # Nobody else gets on the port: no other service, nor another supervisor.
    port = service.address.rpartition(":")[2]
    assert not free(int(port))
    command = [sys.executable, "-m", "predictor", "--port", port, "--processes", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == f"predictor: cannot listen on 127.0.0.1:{port}"

    # One that is killed under load is replaced; no call fails, and no event is stored twice.
    with Load(service.address) as load:
        eventually(load.goes_on)
        killed = min(before)
        os.kill(killed, signal.SIGKILL)
        eventually(lambda: len(workers(service) - {killed}) == 2)
        assert before - {killed} < workers(service)  # the other one went on
        eventually(lambda: not any(free(port) for port in page_ports))
        load.goes_on()
        eventually(load.goes_on)
    assert not load.failed
    info = connect_each(service.address, page_ports)[0].models.GetInfo(model_pb.GetInfoRequest())
    assert info.events == 50 + sum(load.ingested)

    # SIGTERM ends all of them; nothing more was printed than that they were ready.
    last = workers(service)
    assert service.stop() == 0
    assert not any(alive(pid) for pid in last)
    assert service.process.stdout is not None
    assert service.process.stdout.read() == ""


def test_settings_that_do_not_go_together_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--processes", "3", "--metrics-port", "65534"])
    assert "metrics_port" in capsys.readouterr().err
