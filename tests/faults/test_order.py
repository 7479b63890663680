"""Either service may start first."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from foretell import Client, Event, Item, Method
from predictor import registry
from predictor.database import open_database
from serving.process import ServiceProcess

if TYPE_CHECKING:
    from tests.faults.conftest import Proxy

Start = Callable[..., ServiceProcess]
Eventually = Callable[[Callable[[], bool]], None]


def test_a_predictor_that_starts_first_takes_up_its_model_when_an_embedder_comes(
    start_predictor: Start, embedder_address: str, proxy: Callable[..., "Proxy"],
    make_version: Callable[..., Path], register: Callable[[Path], None],
    free_ports: tuple[int, int], tmp_path: Path, eventually: Eventually,
) -> None:  # fmt: skip
    """One without the model's collections, even: it gets these, and the texts that came before."""
    ids = ["early tea", "early bread"]
    register(make_version("first", item_ids=ids))
    with contextlib.closing(open_database(tmp_path / "data")) as db:
        db.submit(lambda connection: registry.activate(connection, "first")).result()
    service = start_predictor(f"127.0.0.1:{free_ports[0]}")  # where nobody listens yet
    with Client(embedder_address, service.address) as client:
        events = [Event("ann", "view", item_id=ids[0]), Event("ann", "search", text="early")]
        assert client.ingest_events(events).accepted == 2
        alone = client.predict("ann", k=2)
        assert alone.fallback_reason
        assert alone.model_version == "first"
        assert [item.item_id for item in alone.items] == ids[:1]
        client.upsert_items([Item(item_id, item_id) for item_id in ids])
        proxy(embedder_address, port=free_ports[0])

        def whole() -> bool:
            late = client.predict("ann", k=2)
            return not late.pending_texts and [i.method for i in late.items] == [Method.MODEL] * 2

        eventually(whole)
        client.delete_items(ids)
