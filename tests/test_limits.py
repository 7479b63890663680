"""The limits in the comments of the protos are those of the table that the checks read."""

import re
from pathlib import Path

import pytest

from foretell import limits

PROTOS = Path(__file__).parent.parent / "protos" / "foretell"

FIELD = re.compile(r"((?:^ *//.*\n)+)^ *[^/\n]*?\b(\w+)(?: = \d+;| \{)", re.MULTILINE)
"""A comment and the name of what it is about: a field or a oneof."""

NUMBER = re.compile(r"\b\d+(?:,\d{3})*\b")

SMALLEST = 1
ID = (SMALLEST, limits.ID_CHARS)
OPTIONAL_ID = (limits.ID_CHARS,)
ATTRIBUTES = (
    limits.ATTRIBUTES,
    SMALLEST,
    limits.ATTRIBUTE_KEY_CHARS,
    limits.ATTRIBUTE_VALUE_CHARS,
)
BATCH = (SMALLEST, limits.BATCH)
TEXTS = (SMALLEST, limits.TEXT_CHARS)
QUERIES = (SMALLEST, limits.QUERIES)
PAGE = (limits.PAGE,)
VERSION = (SMALLEST, limits.COLLECTION_CHARS)
FILTER = (limits.FILTER_IDS,)
KEY = (SMALLEST, limits.ATTRIBUTE_KEY_CHARS)

LIMITS: dict[str, tuple[int, ...]] = {
    "VectorBlock.data": (limits.MESSAGE_BYTES // 2**20,),
    "VectorBlock.cols": (limits.COLS,),
    "EmbedRequest.texts": BATCH + TEXTS,
    "Item.id": ID,
    "Item.text": (limits.TEXT_CHARS,),
    "Item.attributes": ATTRIBUTES,
    "UpsertItemsRequest.items": BATCH,
    "UpsertItemsRequest.request_id": OPTIONAL_ID,
    "PutVectorsRequest.ids": BATCH + ID,
    "PutVectorsRequest.request_id": OPTIONAL_ID,
    "GetItemsRequest.ids": BATCH,
    "ListItemsRequest.page_size": PAGE,
    "DeleteItemsRequest.ids": BATCH,
    "DeleteItemsRequest.request_id": OPTIONAL_ID,
    "TextQueries.texts": QUERIES + TEXTS,
    "IdQueries.ids": QUERIES,
    "Condition.kind": (limits.CONDITION_DEPTH, limits.CONDITION_LEAVES),
    "Condition.exists": KEY,
    "AttributeValues.key": KEY,
    "AttributeValues.values": (SMALLEST, limits.CONDITION_VALUES, limits.ATTRIBUTE_VALUE_CHARS),
    "AttributeRange.key": KEY,
    "QueryFilter.allow_ids": FILTER,
    "QueryFilter.deny_ids": FILTER,
    "QueryFilter.condition": (limits.CONDITIONS,),
    "SearchRequest.queries": QUERIES,
    "SearchRequest.k": (SMALLEST, limits.K),
    "SearchRequest.scores_k": (SMALLEST, limits.K),
    "VectorCollection.cols": (SMALLEST, limits.COLS),
    "TermRows.terms": (SMALLEST, limits.TERMS, SMALLEST, limits.TERM_CHARS),
    "DerivedCollection.layers": (SMALLEST, limits.LAYERS),
    "CreateCollectionRequest.name": (SMALLEST, limits.COLLECTION_CHARS),
    "CreateCollectionRequest.request_id": OPTIONAL_ID,
    "ListCollectionsResponse.collections": (limits.COLLECTIONS,),
    "DeleteCollectionRequest.request_id": OPTIONAL_ID,
    "Event.user_id": ID,
    "Event.behavior_type": (SMALLEST, limits.TYPE_CHARS, limits.BEHAVIOR_TYPES),
    "Event.item_id": OPTIONAL_ID,
    "Event.text": (limits.TEXT_CHARS,),
    "Event.event_id": OPTIONAL_ID,
    "Event.attributes": ATTRIBUTES,
    "IngestEventsRequest.events": BATCH,
    "IngestEventsRequest.request_id": OPTIONAL_ID,
    "ListEventsRequest.user_id": ID,
    "ListEventsRequest.page_size": PAGE,
    "DeleteUserRequest.user_id": ID,
    "DeleteUserRequest.request_id": OPTIONAL_ID,
    "PredictionQuery.user_id": OPTIONAL_ID,
    "PredictionQuery.history": (limits.INLINE_EVENTS,),
    "PredictionQuery.k": (SMALLEST, limits.K),
    "PredictionQuery.allow_item_ids": FILTER,
    "PredictionQuery.deny_item_ids": FILTER,
    "PredictManyRequest.queries": QUERIES,
    "RankRequest.item_ids": (SMALLEST, limits.RANK_ITEMS),
    "ListModelsRequest.page_size": PAGE,
    "ActivateModelRequest.version": VERSION,
    "ActivateModelRequest.request_id": OPTIONAL_ID,
    "DeleteModelRequest.version": VERSION,
    "DeleteModelRequest.request_id": OPTIONAL_ID,
}


def comments() -> dict[str, str]:
    """`Message.field` to its comment, of all protos."""
    found: dict[str, str] = {}
    for path in PROTOS.rglob("*.proto"):
        for message in re.finditer(r"^message (\w+) \{\n(.*?)^\}", path.read_text(), re.M | re.S):
            for comment, name in FIELD.findall(message[2]):
                text = " ".join(line.strip(" /") for line in comment.splitlines())
                found[f"{message[1]}.{name}"] = text
    return found


def stated(comment: str) -> tuple[int, ...]:
    """The numbers of all sentences that begin with `Limit:`, up to a semicolon."""
    sentences = re.findall(r"Limit: (.*?)(?:\. |\.$|;)", comment + " ")
    without_alphabet = (re.sub(r"of a-z.*", "", re.sub(r"\(.*", "", each)) for each in sentences)
    numbers = (NUMBER.findall(each) for each in without_alphabet)
    return tuple(int(number.replace(",", "")) for each in numbers for number in each)


def test_every_limit_of_the_protos_is_in_the_table() -> None:
    found = {name: stated(comment) for name, comment in comments().items() if "Limit:" in comment}
    assert found == LIMITS


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("SearchRequest.k", f"Unset means {limits.K_DEFAULT}."),
        ("PredictionQuery.k", f"Unset means {limits.K_DEFAULT} "),
        ("ListItemsRequest.page_size", f"0 means {limits.PAGE_DEFAULT}."),
        ("ListEventsRequest.page_size", f"0 means {limits.PAGE_DEFAULT}."),
        ("ListModelsRequest.page_size", f"0 means {limits.PAGE_DEFAULT}."),
    ],
)
def test_every_default_is_in_the_table(field: str, value: str) -> None:
    assert value in comments()[field]


def test_what_is_said_in_words() -> None:
    assert limits.FUTURE_SECONDS == 24 * 3_600
    assert "one day ahead" in comments()["Event.timestamp"]
    assert limits.REQUEST_ID_SECONDS == 24 * 3_600
    events = (PROTOS / "predictor/v1/event_service.proto").read_text()
    embedder = (PROTOS / "embedder/v1/embedder_service.proto").read_text()
    for text in (events, embedder):
        assert "within 24 hours" in text
    predictions = (PROTOS / "predictor/v1/prediction_service.proto").read_text()
    assert f"the last {limits.HISTORY_EVENTS:,} events" in predictions
    assert f"up to {limits.QUERIES} users" in predictions
