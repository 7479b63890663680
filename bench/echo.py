"""The peer of bench.rpc: a plain grpc.aio server that answers at once, with the services' messages.

`python -m bench.echo ANSWERS [--through HOST:PORT]` reads a folder with one file for each method's
answer. With --through Predict asks another of its kind for a Search first: two processes on the
way, as in foretell, and no work in either. With --pause-ms it waits first, as long as chance says.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc

from foretell.embedder.v1 import embedder_service_pb2 as embedder_pb
from foretell.embedder.v1 import embedder_service_pb2_grpc as embedder_grpc
from foretell.predictor.v1 import event_service_pb2 as event_pb
from foretell.predictor.v1 import event_service_pb2_grpc as event_grpc
from foretell.predictor.v1 import model_service_pb2 as model_pb
from foretell.predictor.v1 import model_service_pb2_grpc as model_grpc
from foretell.predictor.v1 import prediction_service_pb2 as prediction_pb
from foretell.predictor.v1 import prediction_service_pb2_grpc as prediction_grpc


class Echo:
    """Answers of all methods, each the same every time.

    Args:
        answers: the folder.
        through: whom Predict asks first.
        pause_s: gives the seconds that Predict waits; 0: none.
    """

    def __init__(
        self, answers: Path, through: grpc.aio.Channel | None, pause_s: Callable[[], float]
    ) -> None:
        def read(name: str, kind: Any) -> Any:
            return kind.FromString((answers / name).read_bytes())

        self._predicted = read("Predict", prediction_pb.PredictResponse)
        self._ranked = read("Rank", prediction_pb.RankResponse)
        self._ingested = read("IngestEvents", event_pb.IngestEventsResponse)
        self._found = read("Search", embedder_pb.SearchResponse)
        self._query = read("Search.request", embedder_pb.SearchRequest)
        self._pause_s = pause_s
        self._other = None if through is None else embedder_grpc.EmbedderServiceStub(through)

    def __getattr__(self, name: str) -> None:
        """The methods that nobody calls."""

    async def Predict(self, request: prediction_pb.PredictRequest, context: Any) -> Any:
        """After a Search, where there is another process, and after the pause."""
        if pause_s := self._pause_s():
            await asyncio.sleep(pause_s)
        if self._other is not None:
            await self._other.Search(self._query)
        return self._predicted

    async def Rank(self, request: prediction_pb.RankRequest, context: Any) -> Any:
        """At once."""
        return self._ranked

    async def IngestEvents(self, request: event_pb.IngestEventsRequest, context: Any) -> Any:
        """At once."""
        return self._ingested

    async def Search(self, request: embedder_pb.SearchRequest, context: Any) -> Any:
        """At once."""
        return self._found

    async def GetInfo(self, request: Any, context: Any) -> Any:
        """Of either service: that it is there."""
        ours = isinstance(request, model_pb.GetInfoRequest)
        return model_pb.GetInfoResponse() if ours else embedder_pb.GetInfoResponse()


async def serve(answers: Path, through: str | None, pause_s: Callable[[], float]) -> None:
    """Serves until it is ended."""
    channel = grpc.aio.insecure_channel(through) if through else None
    echo: Any = Echo(answers, channel, pause_s)
    server = grpc.aio.server()
    prediction_grpc.add_PredictionServiceServicer_to_server(echo, server)
    model_grpc.add_ModelServiceServicer_to_server(echo, server)
    event_grpc.add_EventServiceServicer_to_server(echo, server)
    embedder_grpc.add_EmbedderServiceServicer_to_server(echo, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    sys.stdout.write(f"echo ready at 127.0.0.1:{port}\n")
    sys.stdout.flush()
    await server.wait_for_termination()


def main() -> None:
    """Runs the server."""
    parser = argparse.ArgumentParser(prog="python -m bench.echo", description=__doc__)
    parser.add_argument("answers", type=Path)
    parser.add_argument("--through", metavar="HOST:PORT")
    parser.add_argument("--pause-ms", type=float, default=0.0, metavar="MS",
                        help="median of Predict's pauses, log-normal (default: none)")  # fmt: skip
    parser.add_argument("--sigma", type=float, default=0.0, help="of their logarithm")
    options = parser.parse_args()
    chance = random.Random(0)

    def pause_s() -> float:
        if not options.pause_ms:
            return 0.0
        return chance.lognormvariate(math.log(options.pause_ms / 1e3), options.sigma)

    asyncio.run(serve(options.answers, options.through, pause_s))


if __name__ == "__main__":
    main()
