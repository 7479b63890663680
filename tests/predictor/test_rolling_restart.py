"""Both services are restarted one after another at steady load, and no call fails."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from foretell import Client, ClientSettings, Event, ForetellError, Item
from serving.process import ServiceProcess

Start = Callable[..., ServiceProcess]
Eventually = Callable[[Callable[[], bool]], None]

WRITE_TIMEOUT_S = 30.0


@pytest.fixture
def ports(free_port: Callable[[], int]) -> list[int]:
    """Three ports that nobody listens on."""
    return [free_port() for _ in range(3)]


class Load:
    """Callers of both services, each with one call in flight, until they are stopped."""

    def __init__(self, client: Client, users: list[str], items: list[Item]) -> None:
        self.failed: list[tuple[str, ForetellError]] = []
        self.done = {"predict": 0, "rank": 0, "ingest": 0, "upsert": 0}
        ids = [item.id for item in items]
        view = Event(users[0], "view", item_id=ids[0])
        self._calls: dict[str, Callable[[], object]] = {
            "predict": lambda: client.predict(users[0], k=5),
            "rank": lambda: client.rank(users[1], ids),
            "ingest": lambda: client.ingest_events([view]),
            "upsert": lambda: client.upsert_items(items[:2]),
        }
        self._stop = threading.Event()
        self._callers = [threading.Thread(target=self._run, args=(name,)) for name in self.done]

    def _run(self, name: str) -> None:
        while not self._stop.wait(0.1):
            try:
                self._calls[name]()
                self.done[name] += 1
            except ForetellError as error:
                self.failed.append((name, error))

    def __enter__(self) -> "Load":
        for caller in self._callers:
            caller.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for caller in self._callers:
            caller.join()

    def goes_on(self) -> bool:
        """Whether each caller has been answered since this was asked last."""
        if all(self.done.values()):
            self.done.update(dict.fromkeys(self.done, 0))
            return True
        return False


@pytest.fixture
def client(ports: list[int]) -> Iterator[Client]:
    """Calls the two predictors in turn."""
    embedder, *predictors = (f"127.0.0.1:{port}" for port in ports)
    settings = ClientSettings(write_timeout_s=WRITE_TIMEOUT_S)
    with Client(embedder, ",".join(predictors), settings=settings) as connected:
        yield connected


@pytest.mark.timeout(300)  # six starts of services, on a machine that may be busy
def test_no_call_fails_while_each_process_is_restarted(
    start_embedder: Start, start_predictor: Start, make_version: Callable[..., Path],
    register: Callable[[Path], None], client: Client, ports: list[int], tmp_path: Path,
    eventually: Eventually, catalogue: dict[str, str],
) -> None:  # fmt: skip
    def embedder() -> ServiceProcess:
        data = str(tmp_path / "embedder")
        return start_embedder("--data-dir", data, "--port", str(ports[0]))

    def predictor(port: int) -> ServiceProcess:
        return start_predictor(f"127.0.0.1:{ports[0]}", "--port", str(port), "--drain-s", "0.2")

    items = [Item(item_id, text) for item_id, text in catalogue.items()]
    register(make_version("rolling"))
    with ThreadPoolExecutor() as pool:  # in any order
        predictors = pool.map(predictor, ports[1:])
        running = [embedder(), *predictors]
    client.upsert_items(items)
    client.ingest_events(
        [Event(user, "buy", item_id=item.id) for user in ("ann", "bob") for item in items[:5]]
    )
    client.activate_model("rolling")
    with Load(client, ["ann", "bob"], items) as load:
        eventually(load.goes_on)
        away_s = []
        for at, port in enumerate(ports):
            begin = time.monotonic()
            assert running[at].stop() == 0
            running[at] = embedder() if at == 0 else predictor(port)
            away_s.append(time.monotonic() - begin)
            load.goes_on()
            eventually(load.goes_on)
        eventually(lambda: client.predict("ann").fallback_reason is None)
    if away_s[0] > WRITE_TIMEOUT_S - 5:  # a write may have waited for all of that, and in vain
        assert {name for name, _ in load.failed} <= {"upsert"}
        pytest.skip(f"the machine is so busy that the embedder's restart took {away_s[0]:.0f} s")
    assert not load.failed
