"""card.md of a version: what it is, what it was made from, how good it is, and where it ends.

After Mitchell et al., 2019 ("Model cards for model reporting").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Report = Mapping[str, Any]

ITEM_COLUMNS = (
    ("hits_at_10", "hits@10"),
    ("recall_at_10", "recall@10"),
    ("ndcg_at_10", "NDCG@10"),
    ("coverage_at_10", "coverage@10"),
    ("cold_recall_at_10", "cold recall@10"),
    ("calibration_ratio", "predicted / observed hits"),
)
TYPE_COLUMNS = (
    ("accuracy", "accuracy"),
    ("precision", "precision"),
    ("recall", "recall"),
    ("f1", "macro-F1"),
    ("roc_auc", "ROC AUC"),
    ("mse", "MSE"),
    ("log_loss", "log loss"),
    ("ece", "calibration error"),
)

PARTS = {
    "ranker": ("ranker", "ndcg_at_10", "NDCG@10"),
    "recommender": ("recommender", "ndcg_at_10", "NDCG@10"),
    "type_model": ("type model", "log_loss", "log loss"),
    "item_type_model": ("type-given-item model", "log_loss", "log loss"),
}
"""The parts beside the sequence model: name, and the measure by which validation decided."""

ITEMS_EXPLAINED = (
    "Every item of the catalogue is ranked, none is sampled; an item that scores the same as the "
    "target counts against it. hits@10 is hits over min(10, items of the basket); cold items have "
    "no event in training."
)
TYPES_EXPLAINED = (
    "Averages over types weigh each type alike. MSE is the squared distance to what came, summed "
    "over types; the calibration error is that of the most probable type, in 15 groups."
)

FEW_CONTEXTS = 1_000
"""Below this many measured predictions one standard error of a hit rate may reach 0.016."""


def model_card(config: Report, report: Report, lineage: Report) -> str:
    """The card as Markdown.

    What a mapping lacks is left out, so that cards of all kinds of versions can be written.

    Args:
        config: config.json.
        report: metrics.json: protocol; parts, each with `on` and the measures that decided; items,
            types and known_item_types, each from method to metrics, the version's own first.
        lineage: lineage.json.
    """
    version = _text(config.get("version", "unnamed"))
    sections = [
        f"# Model card: {version}",
        _summary(config, report),
        _section("Intended use", _intended(config)),
        _section("Data", _data(report, lineage)),
        _section("Parts", _parts(config, report)),
        *(
            _section(title, _measures(report[key], columns, explained))
            for title, key, columns, explained in (
                ("Next items", "items", ITEM_COLUMNS, ITEMS_EXPLAINED),
                ("Next behavior type", "types", TYPE_COLUMNS, TYPES_EXPLAINED),
                (
                    "Behavior type of a known item",
                    "known_item_types",
                    TYPE_COLUMNS,
                    TYPES_EXPLAINED,
                ),
            )
            if report.get(key)
        ),
        _section("Training", _training(lineage)),
        _section("Known limits", _list(_limits(config, report))),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _section(title: str, body: str) -> str:
    return f"## {title}\n\n{body}" if body else ""


def _summary(config: Report, report: Report) -> str:
    kind = str(config.get("network", {}).get("model_type", "")).removeprefix("bag:")
    what = f"A `{kind}` version of foretell" if kind else "A version of foretell"
    predicts = "the next behavior type"
    if config.get("has_items"):
        predicts += " and the next items"
    return f"{what}. From a user's history it predicts {predicts} of the user."


def _intended(config: Report) -> str:
    repeats = "may be answered again" if config.get("repeats") == "allowed" else "are left out"
    items = f" Items of the user's history {repeats} unless a request says otherwise."
    return (
        "To rank what a user may want or do next in the service whose events it was trained on: "
        "lists of suggestions, reminders, what to prepare. It is not made for decisions that "
        "concern a person's rights, credit, health or work, nor for users of another service."
        + (items if config.get("has_items") else "")
    )


def _data(report: Report, lineage: Report) -> str:
    data, protocol = lineage.get("data", {}), report.get("protocol", {})
    lines = [f"{_label(name)}: {_code(value)}" for name, value in data.items()]
    lines += [
        f"{_label(name)}: {_number(protocol[name])}"
        for name in (
            "first_event", "last_event", "users", "train_events", "catalogue", "repeat_share",
            "validation_contexts", "test_contexts",
        )
        if protocol.get(name) is not None
    ]  # fmt: skip
    rest = [
        f"{_label(name)} {_code(protocol[name])}"
        for name in ("split", "test_share", "test_from", "validation_from", "hold_out", "seed")
        if protocol.get(name) is not None
    ]
    if rest:
        lines.append("division: " + ", ".join(rest))
    return _list(lines)


def _parts(config: Report, report: Report) -> str:
    lines = [_part(name, about) for name, about in report.get("parts", {}).items()]
    encoder = config.get("encoder")
    if isinstance(encoder, Mapping) and encoder.get("name"):
        lines.append(
            f"texts are read by {_code(encoder['name'])} ({_text(encoder.get('pooling', ''))}, "
            f"{_text(encoder.get('cols', ''))} dimensions)"
        )
    if config.get("history_length") is not None:
        lines.append(f"the sequence model reads {_number(config['history_length'])} events")
    for name, value in config.get("network", {}).items():
        lines.append(f"{_label(name)}: {_number(value)}")
    if types := config.get("behavior_types"):
        lines.append("behavior types: " + ", ".join(_code(name) for name in types))
    return _list(lines)


def _part(name: str, about: Report) -> str:
    """A part: whether it is on, and the measures with and without it that decided."""
    title, key, measure = PARTS.get(name, (_label(name), "", ""))
    line = f"{title}: {'on' if about.get('on') else 'off'}"
    own, without = (about.get(side, {}).get(key) for side in ("validation", "without"))
    if own is None or without is None:
        return line
    return f"{line} (validation {measure} {_number(own)} with it, {_number(without)} without)"


def _measures(
    methods: Mapping[str, Report], columns: Sequence[tuple[str, str]], explained: str
) -> str:
    """The version in bold, then the baselines, on the same test targets."""
    shown = [
        (key, title)
        for key, title in columns
        if any(metrics.get(key) is not None for metrics in methods.values())
    ]
    if not shown:
        return ""
    rows = [["", *(title for _, title in shown)], ["---", *("---:" for _ in shown)]]
    for at, (name, metrics) in enumerate(methods.items()):
        cells = [_text(_label(name)), *(_number(metrics.get(key)) for key, _ in shown)]
        rows.append([f"**{cell}**" for cell in cells] if at == 0 else cells)
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    own = next(iter(methods.values()))
    counted = own.get("contexts", own.get("lines"))
    number = f" {_number(counted)} predictions were measured." if counted else ""
    return f"{table}\n\nOn the test part, the version in bold. {explained}{number}"


def _training(lineage: Report) -> str:
    lines = []
    if lineage.get("finished"):
        lines.append(f"finished: {_text(lineage['finished'])}")
    if lineage.get("seconds") is not None:
        lines.append(f"seconds, evaluation included: {_number(lineage['seconds'])}")
    if lineage.get("peak_memory_bytes"):
        lines.append(f"peak memory: {lineage['peak_memory_bytes'] / 2**20:,.0f} MiB")
    if lineage.get("device"):
        threads = f", {lineage['threads']} thread(s)" if lineage.get("threads") else ""
        lines.append(f"device: {_text(lineage['device'])}{threads}")
    libraries = lineage.get("libraries")
    if isinstance(libraries, Mapping):
        versions = [f"{_text(name)} {_text(number)}" for name, number in libraries.items()]
        lines.append("libraries: " + ", ".join(versions))
    return _list(lines)


def _limits(config: Report, report: Report) -> list[str]:
    """What one must know before relying on the version, from what was measured."""
    lines = []
    items, types = report.get("items") or {}, report.get("types") or {}
    own: Report = next(iter(items.values()), {})
    if 0 < own.get("contexts", 0) < FEW_CONTEXTS:
        error = own.get("hits_at_10_standard_error")
        spread = f"; one standard error of hits@10 is {_number(error)}" if error else ""
        lines.append(f"Only {_number(own['contexts'])} lists were measured{spread}.")
    lines += _beaten(items, "ndcg_at_10", "NDCG@10")
    lines += _beaten(types, "accuracy", "accuracy")
    if own.get("cold_targets"):
        lines.append(
            f"Items without events are found from their text alone: of "
            f"{_number(own['cold_targets'])} such targets a share of "
            f"{_number(own.get('cold_recall_at_10'))} was among the ten best."
        )
    if config.get("has_items"):
        lines.append("A user without history gets what is popular.")
    lines.append(
        "Measured on one division of one data set; other times, other users and another "
        "service may differ. Probabilities hold as long as users behave as in the validation part."
    )
    own_types: Report = next(iter(types.values()), {})
    if unknown := own_types.get("unknown_types"):
        lines.append(
            f"{_number(unknown)} of the tested events have a behavior type that training never saw."
        )
    return lines


def _beaten(methods: Mapping[str, Report], key: str, title: str) -> list[str]:
    """A sentence if a baseline is at least as good as the version."""
    values = {
        name: metrics[key] for name, metrics in methods.items() if metrics.get(key) is not None
    }
    if len(values) < 2 or next(iter(methods)) not in values:
        return []
    own, *others = values
    best = max(others, key=lambda name: float(values[name]))
    if values[best] < values[own]:
        return []
    return [
        f"The baseline {_label(best)} is at least as good in {title}: {_number(values[best])} "
        f"against {_number(values[own])}."
    ]


def _list(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _label(name: str) -> str:
    return name.replace("_", " ")


def _number(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return _text(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4f}" if abs(value) < 10 else f"{value:,.1f}"


def _text(value: Any) -> str:
    """A value from the user's data, so that it stays within its line and its table cell."""
    return " ".join(str(value).replace("|", "\\|").split())


def _code(value: Any) -> str:
    return f"`{' '.join(str(value).replace('`', '').replace('|', '').split())}`"
