"""The evaluation tables of the report, from the metrics of `predictor train --json`."""

from __future__ import annotations

from typing import Any

from serving.demo.report import EvaluationTable, Row

ITEM_COLUMNS = {
    "hits@10": "hits_at_10",
    "recall@10": "recall_at_10",
    "NDCG@10": "ndcg_at_10",
    "coverage@10": "coverage_at_10",
}
TYPE_COLUMNS = {
    "accuracy": "accuracy",
    "macro F1": "f1",
    "ROC AUC": "roc_auc",
    "log loss": "log_loss",
    "calibration error": "ece",
}
TEXT_COLUMNS = {
    "train accuracy": "train_accuracy",
    "validation accuracy": "validation_accuracy",
    "majority accuracy": "majority_accuracy",
}


def evaluation_tables(metrics: dict[str, Any]) -> list[EvaluationTable]:
    """One table for each kind of prediction that was measured."""
    protocol = metrics["protocol"]
    split = (
        f"split: {protocol['split']}; {protocol['train_events']:,} events to train on, "
        f"{protocol['test_contexts']:,} histories to test with"
    )
    tables = []
    if "items" in metrics:
        filtered = "left out" if protocol["history_filtered"] else "in it"
        note = (
            f"{split}; all {protocol['catalogue']:,} items ranked, those that the user had before "
            f"{filtered}; hits: of the next basket, in the top 10, over min(10, basket)"
        )
        tables.append(_table("Next items", note, ITEM_COLUMNS, metrics["items"]))
    if "types" in metrics:
        tables.append(_table("Next behavior type", split, TYPE_COLUMNS, metrics["types"]))
    if "known_item_types" in metrics:
        note = f"{split}; the item of the event is known, as in Rank"
        known = metrics["known_item_types"]
        tables.append(_table("Behavior type, the item known", note, TYPE_COLUMNS, known))
    if "own_text" in metrics:
        experiments = {
            "own text: a text tells its type": metrics["own_text"],
            "next type: a history tells the next type": metrics["next_type"],
        }
        tables.append(_table("Behavior texts", split, TEXT_COLUMNS, experiments))
    return tables


def _table(
    title: str, note: str, columns: dict[str, str], methods: dict[str, dict[str, Any]]
) -> EvaluationTable:
    ours = next(iter(methods))  # the model comes first, then the baselines
    rows = [
        Row(name, [values.get(key) for key in columns.values()], name == ours)
        for name, values in methods.items()
    ]
    return EvaluationTable(title, note, list(columns), rows)
