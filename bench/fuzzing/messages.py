"""Requests of every method, from the contracts alone: Hypothesis strategies over descriptors.

Fields take values of three sorts: plausible ones by the field's name, so that requests get past the
checks; extremes of their type; and too many or too long ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from foretell import limits
from foretell.common.v1.common_pb2 import VectorBlock
from foretell.embedder.v1 import embedder_service_pb2
from foretell.embedder.v1.embedder_service_pb2 import Condition
from foretell.predictor.v1 import event_service_pb2, model_service_pb2, prediction_service_pb2

READS = ("Embed", "Get", "List", "Predict", "Rank", "Search", "Watch")
"""How the names of methods begin that change nothing."""

DEEPEST = 3
"""Messages in messages, but for conditions that are nested on purpose."""

MANY = (limits.QUERIES + 1, limits.K + 1, limits.BATCH + 1)
"""Elements of a list that is too long."""

Words = Mapping[str, tuple[str, ...]]
"""Plausible strings by the name of the field."""


class Request(NamedTuple):
    """Something to send."""

    method: str
    """Full name with slashes."""
    streaming: bool
    """Whether the answer is a stream."""
    data: bytes
    """Perhaps no message at all."""


def methods() -> list[MethodDescriptor]:
    """Every method of both services."""
    files = (
        embedder_service_pb2,
        event_service_pb2,
        model_service_pb2,
        prediction_service_pb2,
    )
    return [
        method
        for file in files
        for service in file.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    ]


def words(
    ids: tuple[str, ...],
    users: tuple[str, ...],
    collections: tuple[str, ...],
    names: tuple[str, ...],
) -> Words:
    """The vocabulary in which these are known; `names`: collections that are made and deleted."""
    by_names = {
        "id ids item_id item_ids allow_ids deny_ids allow_item_ids deny_item_ids": ids,
        "user_id": users,
        "collection source": collections,
        "name": names,
        "version": ("first", "no-such-version", "../first"),
        "behavior_type": ("view", "buy", "search"),
        "request_id event_id": ("", "one", "two"),
        "text texts": ("green tea", "large mug", "", " ", "\u200b", "tea " * 200),
        "key exists": ("brand", "price", ""),
        "values value": ("acme", "3", "-1e308"),
        "terms": ("tea", "mug", "green tea"),
        "page_token": ("", "AAAA", "aXRlbXMKa2VwdC0x", "\u00e9"),
    }
    return {name: values for names, values in by_names.items() for name in names.split()}


def requests(method: MethodDescriptor, vocabulary: Words) -> st.SearchStrategy[Request]:
    """Requests of a method: messages, and bytes that are nearly or not at all messages."""
    name = f"/{method.containing_service.full_name}/{method.name}"
    whole = messages(method.input_type, vocabulary).map(lambda m: m.SerializeToString())
    data = st.one_of(whole, whole, whole, _mangled(whole), st.binary(max_size=64))
    return data.map(lambda some: Request(name, bool(method.server_streaming), some))


@st.composite
def messages(draw: st.DrawFn, kind: Descriptor, vocabulary: Words, depth: int = 0) -> Message:
    """A message of any kind."""
    if kind.full_name == VectorBlock.DESCRIPTOR.full_name:
        return draw(_blocks())
    if kind.full_name == Condition.DESCRIPTOR.full_name and draw(st.integers(0, 9)) == 0:
        return _nested(draw(st.integers(1, 45)))
    message: Message = GetMessageClass(kind)()
    present = draw(st.integers(0, (1 << len(kind.fields)) - 1))
    for at, field in enumerate(kind.fields):
        if present >> at & 1 and (field.message_type is None or depth < DEEPEST):
            _set(draw, message, field, vocabulary, depth)
    return message


def examples(strategy: st.SearchStrategy[Any], count: int, number: int) -> list[Any]:
    """About so many examples, which follow from the number."""
    found: list[Any] = []

    @seed(number)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        derandomize=False,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def collect(example: Any) -> None:
        found.append(example)

    collect()
    return found


def _set(
    draw: st.DrawFn, message: Message, field: FieldDescriptor, vocabulary: Words, depth: int
) -> None:
    entry = field.message_type
    if entry is not None and entry.GetOptions().map_entry:
        text = _text(entry.fields_by_name["key"], vocabulary)
        getattr(message, field.name).update(draw(st.dictionaries(text, text, max_size=3)))
    elif field.is_repeated:
        values = [_value(draw, field, vocabulary, depth) for _ in range(draw(st.integers(0, 3)))]
        if values and entry is None and draw(st.integers(0, 29)) == 0:
            many = values[:1] * draw(st.sampled_from(MANY))
            # Too many of the longest are a matter of the message's size alone.
            values = many if len(str(values[0])) <= limits.ID_CHARS else values
        getattr(message, field.name).extend(values)
    elif entry is not None:
        getattr(message, field.name).CopyFrom(_value(draw, field, vocabulary, depth))
    else:
        setattr(message, field.name, _value(draw, field, vocabulary, depth))


def _value(draw: st.DrawFn, field: FieldDescriptor, vocabulary: Words, depth: int) -> Any:
    if field.message_type is not None:
        return draw(messages(field.message_type, vocabulary, depth + 1))
    if field.enum_type is not None:
        numbers = [value.number for value in field.enum_type.values]
        return draw(st.sampled_from([*numbers, 99, -1]))
    return draw(_SCALARS[field.type](field, vocabulary))


def _text(field: FieldDescriptor, vocabulary: Words) -> st.SearchStrategy[str]:
    known = st.sampled_from(vocabulary.get(field.name, ("", "a", "\x00", "b\nc", "\U0001f600")))
    long = st.sampled_from((limits.ID_CHARS + 1, limits.TEXT_CHARS + 1)).map(lambda n: "x" * n)
    return st.one_of(known, known, known, known, st.text(max_size=12), long)


def _integer(low: int, high: int) -> Callable[[FieldDescriptor, Words], st.SearchStrategy[int]]:
    extremes = st.sampled_from((low, high, 0, 1))
    return lambda field, vocabulary: st.one_of(
        extremes, st.integers(max(low, -3), 20), st.integers(low, high)
    )


def _constant(strategy: st.SearchStrategy[Any]) -> Callable[..., st.SearchStrategy[Any]]:
    return lambda field, vocabulary: strategy


_SCALARS: dict[int, Callable[[FieldDescriptor, Words], st.SearchStrategy[Any]]] = {
    FieldDescriptor.TYPE_STRING: _text,
    FieldDescriptor.TYPE_BYTES: _constant(st.binary(max_size=64)),
    FieldDescriptor.TYPE_BOOL: _constant(st.booleans()),
    FieldDescriptor.TYPE_DOUBLE: _constant(st.floats()),
    FieldDescriptor.TYPE_FLOAT: _constant(st.floats(width=32)),
    FieldDescriptor.TYPE_INT32: _integer(-(2**31), 2**31 - 1),
    FieldDescriptor.TYPE_INT64: _integer(-(2**63), 2**63 - 1),
    FieldDescriptor.TYPE_UINT32: _integer(0, 2**32 - 1),
    FieldDescriptor.TYPE_UINT64: _integer(0, 2**64 - 1),
}


@st.composite
def _blocks(draw: st.DrawFn) -> Message:
    """A block of vectors: most of them whole, some of numbers that are none, some torn."""
    rows, cols = draw(st.integers(0, 4)), draw(st.sampled_from((0, 1, 8, 384, limits.COLS + 1)))
    sort = draw(st.integers(0, 3))
    dtype = "<f2" if sort == 2 else "<f4"
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    numbers = rng.standard_normal((rows, cols))
    odd = draw(st.sampled_from((None, None, None, np.nan, np.inf, 1e30, 0.0)))
    if odd is not None and numbers.size:
        numbers[draw(st.integers(0, rows - 1))] = odd
    with np.errstate(over="ignore"):
        data = numbers.astype(dtype).tobytes()
    if draw(st.integers(0, 5)) == 0:
        data = data[: draw(st.integers(0, len(data)))]
    claimed = rows if draw(st.integers(0, 9)) else draw(st.sampled_from((0, 2**31, 2**32 - 1)))
    block = VectorBlock(data=data, rows=claimed, cols=cols)
    block.element_type = sort  # type: ignore[assignment]  # 3 is none
    return block


def _nested(levels: int) -> Message:
    """A condition so many levels deep."""
    condition = Condition(exists="brand")
    for level in range(levels):
        outer = Condition()
        kind = (outer.all_of, outer.any_of, outer.none_of)[level % 3]
        kind.conditions.add().CopyFrom(condition)
        condition = outer
    return condition


@st.composite
def _mangled(draw: st.DrawFn, whole: st.SearchStrategy[bytes]) -> bytes:
    """A message that was cut, flipped, doubled or stuffed."""
    data = bytearray(draw(whole))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, min(len(data), 4_096) - 1)))
        match draw(st.integers(0, 3)):
            case 0:
                del data[at:]
            case 1 if data:
                data[at] ^= 1 << draw(st.integers(0, 7))
            case 2:
                data[at:at] = draw(st.binary(max_size=9))
            case _:
                data = (data + data)[: limits.MESSAGE_BYTES // 64]
    return bytes(data)
