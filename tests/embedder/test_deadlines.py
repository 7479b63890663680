"""Nothing is encoded or written for a caller whose deadline has passed."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, cast

import pytest

from embedder.service import EmbedderService
from foretell.embedder.v1 import embedder_service_pb2 as pb
from foretell.errors import DeadlineExceededError

if TYPE_CHECKING:
    from tests.embedder.conftest import Open

REQUESTS = [
    ("Embed", pb.EmbedRequest(texts=["late"])),
    ("UpsertItems", pb.UpsertItemsRequest(items=[pb.Item(id="late", text="late")])),
    ("Search", pb.SearchRequest(texts=pb.TextQueries(texts=["late"]))),
]


class Context:
    """A call's, of which so many seconds remain."""

    def __init__(self, remaining_s: float) -> None:
        self._until = time.monotonic() + remaining_s

    def time_remaining(self) -> float:
        return max(0.0, self._until - time.monotonic())


@pytest.mark.parametrize(("method", "request_"), REQUESTS, ids=[name for name, _ in REQUESTS])
async def test_a_call_whose_deadline_has_passed(
    open_collections: Open, method: str, request_: Any
) -> None:
    opened = open_collections()
    about = cast("Any", type("About", (), {"cols": opened.writer._texts._cols}))
    texts = opened.writer._texts
    with ThreadPoolExecutor(1) as searching:
        service = EmbedderService(about, texts._batcher, texts, opened.collections, searching)
        with pytest.raises(DeadlineExceededError):
            await getattr(service, method)(request_, cast("Any", Context(0.0)))
        assert not opened.backend.batches
        assert not len(opened.collections.get("items").index)
        await getattr(service, method)(request_, cast("Any", Context(60.0)))
    assert opened.backend.batches == [["late"]]
