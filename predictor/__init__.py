"""Histories, models and predictions: the predictor service.

`predictor.train` is the Python API of `python -m predictor train`:

    from pathlib import Path
    from predictor import train
    from predictor.learning import sources

    source = sources.read_files(Path("events.csv"), Path("items.csv"))
    with sources.embedder(None, sources.CACHE_DIR, None) as client:
        dataset = sources.with_vectors(source, client)
    trained = train(dataset, Path("models/first"))
    trained.report["items"]["foretell"]["ndcg_at_10"]
"""

from typing import Any

__all__ = ["train"]


def __getattr__(name: str) -> Any:
    """`train` is loaded when it is asked for: serving does without what training needs."""
    if name == "train":
        from predictor.learning.training import train

        return train
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
