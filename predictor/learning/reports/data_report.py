"""data_report.md of a version: what was odd about its data, what was done, what ignoring it costs.

It names ids and behavior types, never a text.
"""

from __future__ import annotations

from collections.abc import Sequence

from foretell.errors import InvalidArgumentError
from foretell.importing import Summary, Target
from predictor.learning.quality.costs import (
    FEW_CONTEXTS,
    LEAST_SHARE,
    MEASURED_CONTEXTS,
    Changes,
    Cost,
    Costs,
    measure_costs,
)
from predictor.learning.quality.findings import Finding, counted, share
from predictor.learning.quality.inspection import Inspection, outline
from predictor.learning.sources import Dataset
from predictor.learning.splits import Protocol

METHOD = f"""\
Shares are of the events that training learns from and of the lines of the test targets, both as
the data were read and by the version's own division. What repeated, impossible, program-made,
single or overwhelming events do to predictions of others is measured where they are
{LEAST_SHARE:.1%} of the training events or more and leave {FEW_CONTEXTS} targets, with the two
baselines that are fitted in a moment: the popular items, and each user's decayed shares of the
behavior types. Both are fitted and asked twice: with all events, and with those of the finding
taken out of training and of all histories. The targets are the same in both, and no event of the
finding is one of them; at most {MEASURED_CONTEXTS:,} are measured, evenly drawn. On few targets a
difference may be chance; a model that learns more than a baseline may gain or lose more."""


def data_report(dataset: Dataset, protocol: Protocol) -> str | None:
    """The report as Markdown; None where nobody has inspected the data.

    Args:
        dataset: what training uses; the report is of it as it was read.
        protocol: how it is divided.
    """
    inspection = dataset.inspection
    return None if inspection is None else _report(inspection, protocol, dataset.targets)


def _report(inspection: Inspection, protocol: Protocol, targets: Sequence[Target] | None) -> str:
    try:
        costs = measure_costs(inspection, protocol, targets)
    except InvalidArgumentError as error:  # what is odd may be what cannot be divided
        costs = Costs([None] * len(inspection.findings), None)
        trouble = f"Nothing was measured: as read, {error.message}."
    else:
        trouble = ""
    sections = ["# Data report", f"As read: {outline(inspection.columns)}."]
    sections += [_file(name, summary) for name, summary in inspection.summaries.items()]
    sections.append("## Findings" if inspection.findings else "Nothing odd was found.")
    sections += [
        _finding(inspection, finding, cost)
        for finding, cost in zip(inspection.findings, costs.by_finding, strict=True)
    ]
    sections += ["## Cleaning", _cleaning(inspection, costs.changes)]
    sections += ["## How costs were measured", trouble or METHOD]
    return "\n\n".join(sections) + "\n"


def _file(name: str, summary: Summary) -> str:
    lines = str(summary).splitlines()
    return "\n".join([f"{_code(name)}: {lines[0]}", *(f"- {line.strip()}" for line in lines[1:])])


def _finding(inspection: Inspection, finding: Finding, cost: Cost | None) -> str:
    lines = [f"### {finding.name.replace('_', ' ').capitalize()}", "", f"- found: {finding.found}"]
    if finding.examples:
        lines.append(f"- examples: {', '.join(_code(example) for example in finding.examples)}")
    lines.append(f"- done: {inspection.done(finding)}")
    if cost is not None:
        lines.append(f"- touches: {_touches(cost)}")
        lines += _table(cost)
    return "\n".join(lines)


def _touches(cost: Cost) -> str:
    train = f"{share(cost.train_share)} of the training events"
    if cost.target_share is None:
        return train
    return f"{train}, {share(cost.target_share)} of the test targets' lines"


def _table(cost: Cost) -> list[str]:
    if not cost.ignored:
        return []
    return [
        f"- cost, on {cost.contexts:,} targets that it does not touch:",
        "",
        "| | ignored | without these events | difference |",
        "| --- | ---: | ---: | ---: |",
        *(
            f"| {name} | {value:.4f} | {cost.without[name]:.4f} "
            f"| {cost.without[name] - value:+.4f} |"
            for name, value in cost.ignored.items()
            if name in cost.without
        ),
    ]


def _cleaning(inspection: Inspection, changes: Changes | None) -> str:
    dropped = int(inspection.droppable.sum())
    if not dropped:
        return "There is nothing that cleaning would drop."
    events = counted(dropped, len(inspection.columns), "events")
    text = f"--clean dropped {events}." if inspection.clean else f"--clean would drop {events}."
    if changes is None:
        return text
    verb = "are" if inspection.clean else "would be"
    return (
        f"{text} Of the test targets of the data as read {verb} dropped: "
        f"{counted(changes.lines_dropped, changes.lines, 'lines')} and, with all their lines, "
        f"{counted(changes.contexts_dropped, changes.contexts, 'targets')}; "
        f"{changes.histories_changed:,} more have a shorter history. The cleaned data are divided "
        f"anew, into {changes.contexts_after:,} targets: figures of a version that was trained on "
        "them are comparable with others on the same cleaned data alone. `evaluate` without "
        "--clean measures it on the data as they are; with --test-from, behind all that the "
        "version has seen, since a division by shares may lie elsewhere."
    )


def _code(value: str) -> str:
    return f"`{' '.join(value.replace('`', '').replace('|', '').split())}`"
