"""The service, from its settings to its end."""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import sqlite3
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import faiss
import grpc
import torch
import transformers
from prometheus_client import CollectorRegistry
from threadpoolctl import ThreadpoolController

from embedder.encoding import choice, encoder
from embedder.encoding.batcher import Batcher
from embedder.encoding.encoder import Tokenizer
from embedder.encoding.text_cache import CacheFile, KnownTexts, TextCache
from embedder.search.index import IndexOptions
from embedder.service import NAME, About, EmbedderService
from embedder.settings import PROGRAM, EmbedderSettings
from embedder.storage.collections import Collections
from embedder.storage.store import Store
from embedder.storage.upkeep import Upkeep
from foretell.embedder.v1 import embedder_service_pb2_grpc as rpc
from foretell.errors import FailedPreconditionError
from serving import cpus, logs, server
from serving.metrics import Batches, Reading, State
from serving.settings import load

log = logging.getLogger(PROGRAM)


async def run(settings: EmbedderSettings) -> None:
    """Loads everything, then serves until SIGTERM.

    Raises:
        FailedPreconditionError: the encoder or the data directory cannot be used.
        OSError: the address cannot be listened on.
    """
    threads = settings.threads or cpus.available()
    # numpy multiplies small matrices only; a second thread would look for work long after each.
    blas = ThreadpoolController().select(internal_api="openblas")
    for library in blas.lib_controllers:
        if "numpy" in library.filepath:
            library.set_num_threads(1)
    files = encoder.locate(settings.encoder, settings.pooling)
    tokenizer = Tokenizer(files, settings.max_tokens)
    loaded = choice.load(
        files,
        tokenizer,
        device=settings.device,
        precision=settings.precision,
        runtime=settings.runtime,
        threads=threads,
        batch_tokens=settings.max_batch_tokens,
    )
    backend = loaded.backend
    backend.encode(tokenizer(["warm up"]))
    log.info("encoder %s: %s, %s", files.name, loaded.path, loaded.agreement)
    identity = encoder.identity(backend, tokenizer, files.pooling)
    about = About(
        version=importlib.metadata.version("foretell-services"),
        encoder=files.name,
        pooling=files.pooling.value,
        cols=backend.cols,
        max_tokens=tokenizer.max_tokens,
        device=backend.device,
        path=loaded.path,
        agreement=loaded.agreement,
        libraries={
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "faiss": faiss.__version__,
            "grpcio": grpc.__version__,
        },
    )
    registry = CollectorRegistry()
    with contextlib.ExitStack() as resources:
        store: Store | None = None
        known: KnownTexts
        if settings.store_dir is not None:
            known = store = resources.enter_context(
                contextlib.closing(Store(settings.store_dir, identity, files.name))
            )
        else:
            assert settings.cache_dir is not None
            known = resources.enter_context(
                contextlib.closing(CacheFile(settings.cache_dir, identity))
            )
        batcher = resources.enter_context(
            contextlib.closing(
                Batcher(
                    backend,
                    tokenizer,
                    max_queue_s=settings.max_queue_ms / 1_000,
                    observe=Batches(registry, "encode", "a pass of the encoder", "texts", "tokens"),
                )
            )
        )
        texts = TextCache(batcher, known, backend.cols, settings.memory_cache_bytes)
        collections = None
        if store is not None:
            started = time.perf_counter()
            options = IndexOptions(settings.index, settings.approximate_from, threads)
            collections = Collections(store, backend.cols, options)
            items = sum(each.items for each in collections.messages())
            log.info("loaded %d vectors in %.2f s", items, time.perf_counter() - started)
            resources.enter_context(
                contextlib.closing(Upkeep(collections, settings.snapshot_changes))
            )
        searching = resources.enter_context(
            ThreadPoolExecutor(
                max(2, threads), "search", faiss.omp_set_num_threads, initargs=(threads,)
            )
        )
        searches = Batches(registry, "search", "a search of an index", "queries")
        service = EmbedderService(about, batcher, texts, collections, searching, searches)

        def register(grpc_server: grpc.aio.Server) -> Sequence[str]:
            rpc.add_EmbedderServiceServicer_to_server(service, grpc_server)
            return [NAME]

        registry.register(State(_readings(batcher, texts, collections)))
        await server.serve(PROGRAM, settings, register, service.stop_watches, registry)


def _readings(batcher: Batcher, texts: TextCache, collections: Collections | None) -> list[Reading]:
    """What the service's page of metrics says of its state."""

    def items() -> dict[str, float]:
        kept = [] if collections is None else collections.messages()
        return {one.name: one.items for one in kept}

    def lag() -> dict[str, float]:
        kept = [] if collections is None else collections.all()
        return {one.row.name: one.index.lag for one in kept}

    return [
        Reading(
            "foretell_texts_encoded",
            "Texts that went through the network.",
            lambda: batcher.texts_encoded,
            counts=True,
        ),
        Reading(
            "foretell_texts_cached",
            "Texts whose vectors were known.",
            lambda: texts.texts_cached,
            counts=True,
        ),
        Reading(
            "foretell_queue_texts",
            "Texts that wait for the encoder.",
            lambda: batcher.waiting_texts,
        ),
        Reading("foretell_collection_items", "Items of a collection.", items, label="collection"),
        Reading(
            "foretell_index_lag_vectors",
            "Vectors of a collection that its approximate index lacks as yet.",
            lag,
            label="collection",
        ),
    ]


def main(arguments: Sequence[str]) -> int:
    """Exit status 0 after SIGTERM or SIGINT; 2 and one line where it cannot start."""
    settings = load(EmbedderSettings, arguments, PROGRAM)
    logs.configure(PROGRAM, settings.log_format)
    log.info("settings: %s", settings.describe())
    try:
        server.run_to_end(run(settings))
    except FailedPreconditionError as error:
        sys.stderr.write(f"{PROGRAM}: {error.message}\n")
        return 2
    except sqlite3.DatabaseError as error:
        sys.stderr.write(f"{PROGRAM}: the data directory is damaged ({error}): restore a backup\n")
        return 2
    except OSError as error:
        sys.stderr.write(f"{PROGRAM}: {error}\n")
        return 2
    except KeyboardInterrupt:  # before the service was ready
        return 130
    return 0
