"""A version's derived collections in the embedder."""

from __future__ import annotations

import contextlib
import logging

from foretell import limits
from foretell.embedder.v1 import embedder_service_pb2 as pb
from foretell.errors import FailedPreconditionError, NotFoundError
from foretell.vectors import to_block
from predictor.embedder import Embedder
from predictor.models.version import EncoderConfig, Version

log = logging.getLogger(__name__)

CALL_S = 60.0
"""Deadline of one call."""

CHUNK_BYTES = 16 * 1024 * 1024
"""Vectors of one PutVectors: well below the message limit, ids included."""


def items_collection(version: str) -> str:
    """The version's collection of items."""
    return f"{version}.items"


def behaviors_collection(version: str) -> str:
    """The version's collection of behavior texts."""
    return f"{version}.behaviors"


async def check_encoder(embedder: Embedder, encoder: EncoderConfig) -> None:
    """Raises:
    FailedPreconditionError: the embedder encodes text otherwise than the version was trained
        for, or keeps no collections.
    """
    info = await embedder.call(
        embedder.stub.GetInfo, pb.GetInfoRequest(), CALL_S, wait_for_ready=True
    )
    ours = (encoder.name, encoder.pooling, encoder.cols)
    theirs = (info.encoder, info.pooling, info.cols)
    if ours != theirs:
        raise FailedPreconditionError(
            f"the version was trained on vectors of {_describe(*ours)}; "
            f"the embedder gives those of {_describe(*theirs)}",
            reason="ENCODER_MISMATCH",
        )
    if not info.has_store:
        raise FailedPreconditionError(
            "the embedder has no data directory and keeps no collections",
            reason="EMBEDDER_WITHOUT_STORE",
        )


def _describe(name: str, pooling: str, cols: int) -> str:
    return f"{name} ({pooling}, {cols} dimensions)"


async def published(embedder: Embedder, version: Version) -> bool:
    """Whether the embedder has the version's collections."""
    listed = await embedder.call(
        embedder.stub.ListCollections, pb.ListCollectionsRequest(), CALL_S, wait_for_ready=True
    )
    return _collections(version).keys() <= {collection.name for collection in listed.collections}


async def publish(embedder: Embedder, version: Version) -> None:
    """Creates the version's collections and gives the items their residuals.

    Items that the embedder does not have (any more) are left out.

    Raises:
        AlreadyExistsError: collections of its name are there; see `unpublish`.
    """
    for name, source in _collections(version).items():
        request = pb.CreateCollectionRequest(
            name=name, derived=version.projection.to_derived(source)
        )
        await embedder.call(embedder.stub.CreateCollection, request, CALL_S, wait_for_ready=True)
    ids = [version.item_ids[at] for at in version.warm]
    rows = max(1, min(limits.BATCH, CHUNK_BYTES // (4 * version.config.dims)))
    absent = 0
    for begin in range(0, len(ids), rows):
        response = await embedder.call(
            embedder.stub.PutVectors,
            pb.PutVectorsRequest(
                collection=items_collection(version.config.version),
                ids=ids[begin : begin + rows],
                vectors=to_block(version.residuals[begin : begin + rows]),
            ),
            CALL_S,
            wait_for_ready=True,
        )
        absent += len(response.failures)
    log.info(
        "published %s: %d residuals, %d of them for items that are not there",
        version.config.version,
        len(ids),
        absent,
    )


async def unpublish(embedder: Embedder, name: str) -> None:
    """Deletes a version's collections, where they exist."""
    for collection in (items_collection(name), behaviors_collection(name)):
        with contextlib.suppress(NotFoundError):
            await embedder.call(
                embedder.stub.DeleteCollection,
                pb.DeleteCollectionRequest(name=collection),
                CALL_S,
                wait_for_ready=True,
            )


def _collections(version: Version) -> dict[str, str]:
    """The version's collections and what they are derived from."""
    config = version.config
    wanted: dict[str, str] = {}
    if config.has_items:
        wanted[items_collection(config.version)] = "items"
    if config.has_texts:
        wanted[behaviors_collection(config.version)] = "behaviors"
    return wanted
