"""`python -m predictor compare`: which version is best, by how much, and beyond chance?"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from foretell.errors import InvalidArgumentError
from predictor.learning import leaks, training
from predictor.learning.measures import comparison
from predictor.learning.measures.bootstrap import Resampled, holm, resample
from predictor.learning.measures.side_by_side import BASELINE, Task, side_by_side
from predictor.learning.options import add_data, dataset_of, protocol_of
from predictor.learning.reports.model_card import ITEM_COLUMNS, TYPE_COLUMNS
from predictor.learning.sources import Dataset
from predictor.learning.splits import Protocol
from predictor.models import model_dir
from predictor.models.version import Version

Report = dict[str, Any]

TITLES = {
    "items": "Next items",
    "types": "Next behavior type",
    "known_item_types": "Behavior type, the item known",
}
"""Of the tasks in a report."""

COLUMNS = {"items": ITEM_COLUMNS, "types": TYPE_COLUMNS, "known_item_types": TYPE_COLUMNS}

SORT = {"items": "ndcg_at_10", "types": "f1", "known_item_types": "f1"}
"""The usual measure to sort each task by."""

LOWER_IS_BETTER = ("mse", "log_loss", "ece")

SORTABLE = [name for name, _ in (*ITEM_COLUMNS, *TYPE_COLUMNS) if name != "calibration_ratio"]

FEWEST_USERS = 2
"""To draw from: one alone has no spread."""


def add(commands: Any) -> None:
    """Adds the command to the parser's."""
    command = commands.add_parser(
        "compare", help="measure several versions side by side", description=compare.__doc__
    )
    command.add_argument("versions", type=Path, nargs="+", metavar="MODEL_DIR",
                         help="version directories")  # fmt: skip
    command.add_argument("--sort", choices=SORTABLE, metavar="METRIC", help="the best by it come "
                         f"first: {', '.join(SORTABLE)} (default: ndcg_at_10 for items, f1 for "
                         "behavior types)")  # fmt: skip
    command.add_argument("--against", metavar="NAME", help="line of the table, or directory, that "
                         "all others are tested against (default: the best version)")  # fmt: skip
    command.add_argument("--out", type=Path, metavar="DIR", help="write report.html, its pictures "
                         "and comparison.json there")  # fmt: skip
    add_data(command)
    command.set_defaults(run=compare, show=show)


def compare(options: argparse.Namespace) -> Report:
    """Measures several versions and the baselines on the same targets, with 95 % intervals and
    paired tests (bootstrap over users). The split and whether items of the history are left out
    are the first version's, unless the options say otherwise; a version that has learned from the
    test part is refused.
    """
    if options.out is not None:
        _open(options.out)
    versions = _load(options.versions)
    against = _against(options, versions)
    if not options.targets and not _split_given(options):
        leaks.check_one_division(versions)
    first = next(iter(versions.values()))
    protocol = protocol_of(options, leaks.trained_by(first))
    exclude = first.config.repeats == "excluded"
    datasets = _read(options, versions)
    dataset = next(iter(datasets.values()))
    part = training.divide(dataset, protocol)
    protocol = replace(protocol, split=part.kind)
    checked = leaks.check_unseen(versions, dataset, part, protocol)
    tasks = side_by_side(
        versions, datasets, part, exclude_history=exclude,
        progress=lambda method: _tell(f"measure {method}"),
    )  # fmt: skip
    if not tasks:
        raise InvalidArgumentError(
            "the test part has no item and no behavior type that a version could have predicted",
            reason="NO_TARGETS",
            field="targets",
        )
    _check_lines(options, against, tasks)
    _tell("draw users for the intervals")
    report: Report = {
        "versions": {
            name: _about(version, path) | {"checked": checked[name]}
            for (name, version), path in zip(versions.items(), options.versions, strict=True)
        },
        "protocol": training.describe(part, protocol, exclude_history=exclude),
    }
    for title, task in tasks.items():
        report[title] = _tested(title, task, list(versions), options.sort, against, protocol.seed)
    if options.out is not None:
        _write(options.out, report, tasks)
    return report


def _tell(line: str) -> None:
    sys.stderr.write(f"{line}\n")


def _load(paths: Sequence[Path]) -> dict[str, Version]:
    """Versions by name; those that have the same one by the ends of their paths."""
    whole = [path.resolve() for path in paths]
    twice = next((path for path in whole if whole.count(path) > 1), None)
    if twice is not None:
        raise InvalidArgumentError(f"{twice} is given twice", field="versions")
    versions = [model_dir.load(path) for path in paths]
    names = [version.name for version in versions]
    labels = []
    for name, path in zip(names, whole, strict=True):
        rivals = [other for other, own in zip(whole, names, strict=True) if own == name]
        parts = 1
        while sum(other.parts[-parts:] == path.parts[-parts:] for other in rivals) > 1:
            parts += 1
        labels.append(name if len(rivals) == 1 else "/".join(path.parts[-max(2, parts) :]))
    return dict(zip(labels, versions, strict=True))


def _read(options: argparse.Namespace, versions: Mapping[str, Version]) -> dict[str, Dataset]:
    """The data by version, with vectors of its encoder, items in the order of the first one's.

    Where the options name no encoder, a version that reads texts in another way gets an embedder
    of its own, if its encoder is at hand: a folder, or the usual one with another pooling.
    """
    item_ids = next(iter(versions.values())).item_ids
    with dataset_of(options) as found:
        read = {found.encoder: found.in_order(item_ids)}
    named = options.embedder or options.encoder or options.pooling
    for version in versions.values():
        wanted = version.config.encoder
        if wanted in read:
            continue
        usual = wanted.name == found.encoder.name
        if named or not (usual or Path(wanted.name).is_dir()):
            comparison.check_encoder(version, found)
        other = {"encoder": None if usual else wanted.name, "pooling": wanted.pooling}
        with dataset_of(argparse.Namespace(**vars(options) | other)) as again:
            comparison.check_encoder(version, again)
            read[wanted] = again.in_order(item_ids)
    return {name: read[version.config.encoder] for name, version in versions.items()}


def _split_given(options: argparse.Namespace) -> bool:
    names = {field.name for field in fields(Protocol)} - {"validation_from"}
    return any(getattr(options, name) is not None for name in names)


def _against(options: argparse.Namespace, versions: Mapping[str, Version]) -> str | None:
    """The line to test against that the options name; None: the best version."""
    if options.against is None:
        return None
    given = dict(zip((path.resolve() for path in options.versions), versions, strict=True))
    line = given.get(Path(options.against).resolve(), options.against)
    if line not in versions and not line.startswith(BASELINE):
        raise InvalidArgumentError(
            f"--against {line}: there are {', '.join(versions)}, and baselines ({BASELINE}NAME)",
            field="against",
        )
    return str(line)


def _check_lines(
    options: argparse.Namespace, against: str | None, tasks: Mapping[str, Task]
) -> None:
    """That what was asked for was measured."""
    metrics = dict.fromkeys(name for title in tasks for name, _ in COLUMNS[title])
    if options.sort not in (None, *metrics):
        raise InvalidArgumentError(
            f"--sort {options.sort}: these targets have no such measure, but {', '.join(metrics)}",
            field="sort",
        )
    lines = dict.fromkeys(line for task in tasks.values() for line in task.methods)
    if against not in (None, *lines):
        raise InvalidArgumentError(
            f"--against {against}: there is no such line; there are {', '.join(lines)}",
            field="against",
        )


def _about(version: Version, path: Path) -> Report:
    """What a version is, for people."""
    config = version.config
    told = version.reports.get("lineage.json")
    lineage = told if isinstance(told, dict) else {}
    return {
        "version": config.version,
        "path": str(path),
        "model": _model(lineage) or config.network.model_type,
        "encoder": f"{config.encoder.name} ({config.encoder.pooling})",
        "parts": [name for name in model_dir.PARTS if getattr(version, name, None) is not None],
        "behavior_types": len(config.behavior_types),
        "items": len(version.item_ids),
        "train_s": lineage.get("seconds"),
    }


def _model(lineage: Mapping[str, Any]) -> str | None:
    """What `train --model` was asked for: the network alone does not tell classic models apart."""
    fit = lineage.get("fit")
    model = fit.get("model_type") if isinstance(fit, dict) else None
    return model if isinstance(model, str) else None


def _tested(
    title: str,
    task: Task,
    versions: Sequence[str],
    sort: str | None,
    against: str | None,
    seed: int,
) -> Report:
    """A task's table, sorted, with intervals and differences."""
    methods = {name: task.metrics(name) for name in task.methods}
    by = sort if sort is not None and sort in dict(COLUMNS[title]) else SORT[title]

    def worse(name: str) -> tuple[bool, float]:
        value = methods[name].get(by)
        return value is None, 0 if value is None else value if by in LOWER_IS_BETTER else -value

    order = sorted(methods, key=worse)
    reference = against if against in methods else next(n for n in order if n in versions)
    measures = {
        (name, metric): measure for name in order for metric, measure in task.measures(name).items()
    }
    drawn = resample(measures, task.users, seed)
    users = next(iter(drawn.values())).users
    if users >= FEWEST_USERS:
        for name in order:
            methods[name]["intervals"] = {
                metric: found.interval for (own, metric), found in drawn.items() if own == name
            }
    return {
        "sorted_by": by,
        "against": reference,
        "users": users,
        "draws": {
            metric: min(len(drawn[name, metric].draws) for name in order)
            for metric in dict.fromkeys(metric for _, metric in drawn)
        },
        "methods": {name: methods[name] for name in order},
        "differences": _differences(drawn, order, reference) if users >= FEWEST_USERS else {},
    }


def _differences(
    drawn: Mapping[tuple[str, str], Resampled], order: Sequence[str], reference: str
) -> dict[str, Report]:
    """Of each method but the reference, by metric: value, low, high, p and p_holm."""
    out: dict[str, Report] = {name: {} for name in order if name != reference}
    for metric in dict.fromkeys(metric for _, metric in drawn):
        own = drawn[reference, metric]
        found = {name: drawn[name, metric].minus(own) for name in out}
        together = holm({name: difference.p for name, difference in found.items()})
        for name, difference in found.items():
            out[name][metric] = difference._asdict() | {"p_holm": together[name]}
    return out


def show(report: Report) -> str:
    """The report as plain text."""
    tasks = {title: report[title] for title in TITLES if title in report}
    parts = [comparison.tables({title: task["methods"] for title, task in tasks.items()})]
    for title, task in tasks.items():
        differences: Report = task["differences"]
        if differences:
            drawn = list(next(iter(differences.values())))
            metric = task["sorted_by"] if task["sorted_by"] in drawn else SORT[title]
            rows = {name: of[metric] for name, of in differences.items()}
            head = f"{TITLES[title]}: {metric} less that of {task['against']}, paired over users"
            parts.append(comparison.text_table(head, ("value", "low", "high", "p", "p_holm"), rows))
    parts += [f"{name}: {about['checked']}" for name, about in report["versions"].items()]
    return "\n\n".join(parts)


def _open(folder: Path) -> None:
    """Tells before all the work that the report cannot be written."""
    # Of extras, which --json alone does without; here, so that what is missing is missed at once.
    from predictor.learning.reports import comparison_page  # noqa: F401

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidArgumentError(f"--out {folder}: {error.strerror}", field="out") from None


def _write(folder: Path, report: Report, tasks: Mapping[str, Task]) -> None:
    from predictor.learning.reports import comparison_page, comparison_plots

    pictures = comparison_plots.draw(report, tasks)
    for picture in pictures:
        (folder / picture.file).write_bytes(picture.png)
    text = json.dumps(report, ensure_ascii=False, indent=1)
    (folder / "comparison.json").write_text(text + "\n", encoding="utf-8")
    page = comparison_page.page(report, pictures)
    (folder / "report.html").write_text(page, encoding="utf-8")
