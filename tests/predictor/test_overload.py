"""The predictor's calls wait only so long for one another."""

import asyncio
from collections.abc import Sequence
from typing import Any, cast

import pytest

from foretell.common.v1 import common_pb2
from foretell.errors import ResourceExhaustedError
from foretell.predictor.v1 import prediction_service_pb2 as pb
from predictor.prediction import Predictor
from predictor.service import PredictionService
from serving.admission import STRETCH

QUERIES = 200


class SlowPredictor:
    """Answers when it is allowed to."""

    def __init__(self) -> None:
        self.asked = 0
        self.open = asyncio.Event()

    async def predict(
        self, queries: Sequence[object], into: object, deadline: object
    ) -> common_pb2.Timings:
        self.asked += len(queries)
        await self.open.wait()
        return common_pb2.Timings()


class Waiting:
    """The context of a call without a deadline."""

    def time_remaining(self) -> None:
        return None


async def test_a_call_that_would_wait_long_is_refused_before_it_costs_anything() -> None:
    predictor = SlowPredictor()
    service = PredictionService(cast("Predictor", predictor), 1.0)
    now = 0.0
    service._admission._clock = lambda: now
    context = cast("Any", Waiting())
    queries = [pb.PredictionQuery(user_id="u", k=1)] * QUERIES
    many = pb.PredictManyRequest(queries=queries)
    calls = [asyncio.ensure_future(service.PredictMany(many, context)) for _ in range(2)]
    while predictor.asked < 2 * QUERIES:
        await asyncio.sleep(0)
    now = 4.0  # both calls end at once: 100 queries a second
    predictor.open.set()
    await asyncio.gather(*calls)
    predictor.open.clear()
    calls = [asyncio.ensure_future(service.PredictMany(many, context)) for _ in range(STRETCH + 1)]
    while predictor.asked < (2 + len(calls)) * QUERIES:
        await asyncio.sleep(0)
    with pytest.raises(ResourceExhaustedError) as raised:
        await service.PredictMany(many, context)
    assert raised.value.retry_after_s
    assert predictor.asked == (2 + len(calls)) * QUERIES
    single = asyncio.ensure_future(
        service.Predict(pb.PredictRequest(query=pb.PredictionQuery(user_id="u")), context)
    )
    predictor.open.set()
    await asyncio.gather(single, *calls)
