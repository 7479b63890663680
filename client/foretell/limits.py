"""The table of limits: the services' checks, the proto comments and the tests read it.

Counts are elements, lengths are Unicode code points unless the name says bytes.
"""

from typing import Final

MESSAGE_BYTES: Final = 64 * 1024 * 1024
"""Largest gRPC message on both ends."""

BATCH: Final = 10_000
"""Texts, items, ids, vector rows or events in one call."""

TEXT_CHARS: Final = 20_000
"""One text. An encoder reads some hundred tokens; the rest is kept, not encoded."""

ID_CHARS: Final = 128
"""An item, user, event or request id."""

TYPE_CHARS: Final = 64
"""A behavior type."""

BEHAVIOR_TYPES: Final = 1_000
"""Different behavior types in one event store."""

ATTRIBUTES: Final = 64
"""Attributes of one item or event."""

ATTRIBUTE_KEY_CHARS: Final = 64
"""An attribute's name."""

ATTRIBUTE_VALUE_CHARS: Final = 1_024
"""An attribute's value."""

COLLECTION_CHARS: Final = 64
"""A collection's or a model version's name."""

COLLECTIONS: Final = 256
"""Collections in one embedder."""

COLS: Final = 4_096
"""Dimensions of a vector."""

VALUE: Final = 1e9
"""Magnitude of a number in a vector: products of such vectors are far from float32's end, 3e38."""

LAYERS: Final = 8
"""Affine layers of a derived collection."""

TERMS: Final = 50_000
"""Terms with a row in a derived collection: at 256 float32 dims 51 MB of a message's 64 MiB."""

TERM_CHARS: Final = 64
"""A term: a word or two."""

QUERIES: Final = 256
"""Queries in one Search or PredictMany."""

K: Final = 1_000
"""Hits or items that one query may ask for. faiss allows 2,048 on a GPU."""

K_DEFAULT: Final = 10
"""Hits or items where k is unset."""

FILTER_IDS: Final = 10_000
"""Ids in one allow or deny list."""

CONDITIONS: Final = 16
"""Different attribute conditions in one Search: each may be a list of all ids."""

CONDITION_DEPTH: Final = 16
"""Levels of one condition: two nested messages each, of the 100 that protobuf reads."""

CONDITION_LEAVES: Final = 64
"""Comparisons in one condition: each may be a scan of an attribute."""

CONDITION_VALUES: Final = 10_000
"""Values in all comparisons of one condition: SQLite takes 32,766 parameters."""

RANK_ITEMS: Final = 1_000
"""Items in one Rank."""

INLINE_EVENTS: Final = 1_000
"""Events of an inline history."""

HISTORY_EVENTS: Final = 5_000
"""Latest events of a user that one prediction reads."""

PAGE: Final = 1_000
"""Largest page."""

PAGE_DEFAULT: Final = 100
"""Page size where it is 0."""

FUTURE_SECONDS: Final = 24 * 60 * 60
"""How far ahead of the server's clock a timestamp may be: one day."""

REQUEST_ID_SECONDS: Final = 24 * 60 * 60
"""How long a request_id is remembered."""
