"""What is called: a mix of methods over users and items, of whom few make most of the calls."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import numpy as np
from google.protobuf.message import Message
from numpy.typing import NDArray

from foretell import limits, types
from foretell._sync_client import Client
from foretell.embedder.v1 import embedder_service_pb2 as embedder_pb
from foretell.errors import FailedPreconditionError, InvalidArgumentError
from foretell.predictor.v1 import event_service_pb2 as event_pb
from foretell.predictor.v1 import prediction_service_pb2 as prediction_pb

RANK_ITEMS: Final = 20
"""Items that a Rank orders: a page of a shop."""

QUERY_WORDS: Final = 3
"""Words of an item's text that a search asks for."""

MAX_ITEMS: Final = 20_000
"""Items of the catalogue that calls are about."""

HISTORY_PAUSE: Final = timedelta(hours=1)
"""Between two events that a user is given beforehand."""


@dataclass(frozen=True, slots=True)
class Method:
    """A method that can be called."""

    service: str
    """predictor or embedder."""
    path: str
    """gRPC's name of it."""
    answer: type[Message]


METHODS: Final[Mapping[str, Method]] = {
    "predict": Method(
        "predictor",
        "/foretell.predictor.v1.PredictionService/Predict",
        prediction_pb.PredictResponse,
    ),
    "rank": Method(
        "predictor", "/foretell.predictor.v1.PredictionService/Rank", prediction_pb.RankResponse
    ),
    "ingest": Method(
        "predictor",
        "/foretell.predictor.v1.EventService/IngestEvents",
        event_pb.IngestEventsResponse,
    ),
    "embed": Method(
        "embedder", "/foretell.embedder.v1.EmbedderService/Embed", embedder_pb.EmbedResponse
    ),
    "search": Method(
        "embedder", "/foretell.embedder.v1.EmbedderService/Search", embedder_pb.SearchResponse
    ),
}


def parse_mix(text: str) -> dict[str, float]:
    """The weights of `--mix`, such as predict=8,rank=1,ingest=1; their sum becomes 1.

    Raises:
        InvalidArgumentError: an unknown method, or no number greater than 0.
    """
    weights: dict[str, float] = {}
    for entry in text.split(","):
        name, _, number = entry.partition("=")
        try:
            weight = float(number or 1)
        except ValueError:
            weight = 0
        if name not in METHODS or name in weights or not 0 < weight < float("inf"):
            raise InvalidArgumentError(
                f"--mix: {entry!r} is no weight such as predict=8; methods are "
                f"{', '.join(METHODS)}, each at most once",
                reason="BAD_MIX",
                field="mix",
            )
        weights[name] = weight
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items()}


class Zipf:
    """Numbers from 0 on, the n-th with a probability proportional to 1 / n^exponent."""

    def __init__(self, count: int, exponent: float) -> None:
        weights = np.arange(1, count + 1, dtype=np.float64) ** -exponent
        self._cumulative = np.cumsum(weights / weights.sum())
        self._last = count - 1

    def draw(self, random: np.random.Generator, count: int = 1) -> NDArray[np.int64]:
        """`count` numbers."""
        found = np.searchsorted(self._cumulative, random.random(count), side="right")
        return np.minimum(found, self._last)  # the sum may end a rounding error below 1


@dataclass(frozen=True, slots=True)
class Workload:
    """All that calls are made of; sent to the generators' processes."""

    mix: Mapping[str, float]
    users: int
    """They are called load-test-0, load-test-1, ..."""
    exponent: float
    """Of Zipf's law, for users and items."""
    items: Sequence[tuple[str, str]] = ()
    """Ids and texts, the most popular first."""
    behavior_types: Sequence[str] = field(default=("view",))

    def services(self, history: int) -> set[str]:
        """Those that are called, histories and the look at the items included."""
        called = {METHODS[name].service for name in self.mix}
        if history:
            return called | {"predictor", "embedder"}
        return called | ({"embedder"} if set(self.mix) - {"predict"} else set())

    def requests(self, random: np.random.Generator) -> Iterator[tuple[str, Any]]:
        """Endless calls: the method's name and its request."""
        names = list(self.mix)
        choice = np.cumsum(list(self.mix.values()))
        users, items = Zipf(self.users, self.exponent), Zipf(len(self.items) or 1, self.exponent)

        def query() -> prediction_pb.PredictionQuery:
            return prediction_pb.PredictionQuery(user_id=user_id(int(users.draw(random)[0])))

        def some(count: int) -> list[tuple[str, str]]:
            return [self.items[at] for at in items.draw(random, count)]

        while True:
            at = int(np.searchsorted(choice, random.random(), side="right"))
            name = names[min(at, len(names) - 1)]
            request: Message
            match name:
                case "predict":
                    request = prediction_pb.PredictRequest(query=query())
                case "rank":
                    ids = dict.fromkeys(item_id for item_id, _ in some(RANK_ITEMS))
                    request = prediction_pb.RankRequest(query=query(), item_ids=ids)
                case "ingest":
                    event = event_pb.Event(
                        user_id=query().user_id,
                        behavior_type=self.behavior_types[
                            int(random.integers(len(self.behavior_types)))
                        ],
                        item_id=some(1)[0][0],
                    )
                    request = event_pb.IngestEventsRequest(
                        events=[event], request_id=uuid.uuid4().hex
                    )
                case "embed":  # two items' texts: some pairs come again, most are new
                    text = " ".join(text for _, text in some(2))
                    request = embedder_pb.EmbedRequest(texts=[text])
                case _:
                    words = some(1)[0][1].split()[:QUERY_WORDS]
                    texts = embedder_pb.TextQueries(texts=[" ".join(words)])
                    request = embedder_pb.SearchRequest(texts=texts)
            yield name, request


def user_id(number: int) -> str:
    """The name of a user, the most active being 0."""
    return f"load-test-{number}"


def prepare(client: Client, workload: Workload, history: int) -> Workload:
    """The workload over what the services hold; gives each user a history.

    Args:
        client: of both services.
        workload: its items and behavior types are filled in.
        history: events that each user gets; those of an earlier test count.

    Raises:
        FailedPreconditionError: calls need items and the embedder has none.
        ForetellError: a service does not answer.
    """
    behavior_types = workload.behavior_types
    if history or "ingest" in workload.mix:
        active = [m for m in client.list_models(page_size=limits.PAGE).elements if m.active]
        behavior_types = tuple(active[0].behavior_types if active else ()) or behavior_types
    items: list[tuple[str, str]] = []
    if "embedder" in workload.services(history):
        items = _items(client)
    made = replace(workload, items=items, behavior_types=behavior_types)
    if history:
        client.import_events(_history(made, history))
    return made


def clean_up(client: Client, workload: Workload) -> None:
    """Deletes the users and their events."""
    for number in range(workload.users):
        client.delete_user(user_id(number))


def _items(client: Client) -> list[tuple[str, str]]:
    """Items in an order that has nothing to do with their ids', the same every time."""
    items: list[tuple[str, str]] = []
    token = ""
    while len(items) < MAX_ITEMS:
        page = client.list_items(page_size=limits.PAGE, page_token=token)
        items += [(item.id, item.text) for item in page.elements if item.text.strip()]
        token = page.next_page_token
        if not token:
            break
    if not items:
        raise FailedPreconditionError(
            "the embedder has no items with a text, which all calls but predict need",
            reason="NO_ITEMS",
        )
    order = np.random.default_rng(0).permutation(len(items))
    return [items[at] for at in order]


def _history(workload: Workload, count: int) -> Iterator[types.Event]:
    random = np.random.default_rng(1)
    popular = Zipf(len(workload.items), workload.exponent)
    start = datetime.now(UTC) - count * HISTORY_PAUSE
    for number in range(workload.users):
        for at, item in enumerate(popular.draw(random, count)):
            yield types.Event(
                user_id=user_id(number),
                behavior_type=workload.behavior_types[at % len(workload.behavior_types)],
                timestamp=start + at * HISTORY_PAUSE,
                item_id=workload.items[item][0],
                event_id=f"{user_id(number)}-{at}",
            )
