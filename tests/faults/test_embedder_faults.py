"""An embedder that is silent, slow or resets: predictions degrade, and recover by themselves."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from foretell import Client, Event, FallbackReason, Item, Method, Prediction, PredictionQuery
from serving.process import ServiceProcess

if TYPE_CHECKING:
    from tests.faults.conftest import Proxy

Start = Callable[..., ServiceProcess]
Eventually = Callable[[Callable[[], bool]], None]

DEADLINE_S = 2.5
"""Of the callers, in all of their calls; the predictor gives the embedder 0.3 s."""


def test_predictions_degrade_within_their_deadline_and_recover_by_themselves(
    embedder_address: str, start_predictor: Start, proxy: Callable[[str], "Proxy"],
    make_version: Callable[..., Path], register: Callable[[Path], None], eventually: Eventually,
) -> None:  # fmt: skip
    between = proxy(embedder_address)
    items = [Item(f"tea {n}", f"{shade} tea") for n, shade in enumerate(("green", "red", "white"))]
    ids = [item.id for item in items]
    register(make_version("faults", item_ids=ids))
    service = start_predictor(between.address, "--embedder-deadline-ms", "300")

    def slow(delay_s: float) -> None:
        between.delay_s = delay_s

    def resets(lifetime: int | None) -> None:
        between.reset_after(itertools.repeat(lifetime))
        between.reset()

    faults: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "silent": (between.hold, between.resume),
        "slow": (lambda: slow(2.5), lambda: slow(0)),
        "resetting": (lambda: resets(20), lambda: resets(None)),
    }
    with (
        Client(embedder_address) as embedder,
        Client(predictor=service.address, timeout_s=DEADLINE_S) as client,
    ):

        def answers() -> list[Prediction]:
            """Of each method; on the way to none does a call take longer than its deadline."""
            queries = [PredictionQuery(user, k=3) for user in ("ann", "bob", "nobody")]
            many = client.predict_many(queries)
            assert not many.failures
            assert many.predictions[2].fallback_reason is FallbackReason.NO_HISTORY
            return [
                client.predict("ann", k=3),
                client.rank("ann", ids),
                *many.predictions[:2],
            ]

        def by_the_model() -> bool:
            return not any(answer.fallback_reason for answer in answers())

        embedder.upsert_items(items)
        client.activate_model("faults", timeout_s=60)
        client.ingest_events(
            Event(user, "view", item_id=item) for user in ("ann", "bob") for item in ids
        )
        eventually(by_the_model)
        for name, (begin, end) in faults.items():
            begin()
            try:
                event = Event("ann", "search", text=f"{name} tea")
                assert client.ingest_events([event]).accepted == 1
                for answer in answers():
                    assert answer.fallback_reason is FallbackReason.EMBEDDER_UNAVAILABLE, name
                    assert {item.method for item in answer.items} == {Method.PERSONAL_FREQUENCY}
                    assert len(answer.items) == 3
                    assert answer.model_version == "faults"
                    assert answer.behavior_types
                assert not client.predictor_info().embedder_available
            finally:
                end()
            embedder.upsert_items([Item(name, "a new tea")])
            eventually(by_the_model)
            eventually(lambda: client.predictor_info().pending_texts == 0)
            (ranked,) = client.rank("ann", [name]).items  # followed since
            assert ranked.method is Method.MODEL
        embedder.delete_items([*ids, *faults])
