"""What it costs to ignore a finding: measured with two baselines that are fitted in a moment.

The data are divided as they were read. Then the events of a finding are taken out of the training
part and out of all histories, while the targets stay the same, line by line: the difference is
what the events do to predictions, and no figure gains from easier targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from foretell.errors import InvalidArgumentError
from foretell.importing import Target
from predictor.learning.data import Events, Targets, repeat_share, to_events
from predictor.learning.measures.baselines import popular
from predictor.learning.measures.evaluation import REPEATS, measure_types
from predictor.learning.measures.metrics import item_metrics
from predictor.learning.measures.type_baselines import decayed_shares
from predictor.learning.quality.findings import Finding, Mask
from predictor.learning.quality.inspection import Inspection
from predictor.learning.splits import Protocol, Split, split
from predictor.models.history import Ints

MEASURED_CONTEXTS = 2_000
"""Targets at most, evenly drawn: each ranks the whole catalogue twice a finding."""

LEAST_SHARE = 0.001
"""Of the training events: what touches less is not measured, for it can change little."""

FEW_CONTEXTS = 30
"""With fewer targets a difference would be chance."""

Measures = dict[str, float]


@dataclass(frozen=True)
class Cost:
    """Of one finding."""

    train_share: float
    """Of the training events: those that it touches."""
    target_share: float | None
    """Of the lines of the test targets; None: the targets are from a file."""
    ignored: Measures
    """Measures with its events; empty where they were not measured."""
    without: Measures
    """Measures on the same targets without its events in training and histories."""
    contexts: int
    """Targets to measure on: those that no event of the finding is part of, thinned."""


@dataclass(frozen=True)
class Changes:
    """What cleaning does to the test targets of the data as they were read."""

    lines: int
    """Of all targets: the events that are to be predicted."""
    lines_dropped: int
    contexts: int
    """Targets: baskets that are to be predicted at once."""
    contexts_dropped: int
    """Those that lose every line."""
    histories_changed: int
    """Targets that stay, whose history loses an event."""
    contexts_after: int
    """Targets of the division of the cleaned data, whose instants may lie elsewhere."""


@dataclass(frozen=True)
class Costs:
    """Of all findings of events, in the order of the findings."""

    by_finding: Sequence[Cost | None]
    """None: the finding is not of events."""
    changes: Changes | None
    """None: cleaning drops nothing, or the targets are from a file."""


def measure_costs(
    inspection: Inspection, protocol: Protocol, targets: Sequence[Target] | None
) -> Costs:
    """Measures all findings.

    Args:
        inspection: what was found.
        protocol: how training divides the data.
        targets: those of a file, if training has any.

    Raises:
        InvalidArgumentError: the data as they were read cannot be divided.
    """
    divided = _Divided(inspection, protocol, targets)
    costs = [
        None if finding.events is None else divided.cost(finding) for finding in inspection.findings
    ]
    return Costs(costs, divided.changes())


class _Divided:
    """The data as they were read, divided, with the rows that training and targets are made of."""

    def __init__(
        self, inspection: Inspection, protocol: Protocol, targets: Sequence[Target] | None
    ) -> None:
        columns = inspection.columns
        self._inspection, self._protocol, self._targets = inspection, protocol, targets
        # Rows stand in the place of behavior types, which no division looks at.
        rows = replace(columns, behavior_type=np.arange(len(columns)))
        part = split(to_events(rows, inspection.catalogue), protocol, targets)
        self._train_rows, self._past_rows = part.train.type, part.test.events.type
        self._target_rows: Ints | None = None if targets is not None else part.test.type
        self._part = _with_types(part, columns.behavior_type, self._target_rows)
        self._exclude = self._part.train.has_items and repeat_share(self._part.train) < REPEATS

    def cost(self, finding: Finding) -> Cost:
        """Of a finding of events."""
        assert finding.events is not None
        touched = finding.events
        train = touched[self._train_rows]
        test = self._part.test
        lines = None if self._target_rows is None else touched[self._target_rows]
        free = np.ones(len(test), np.bool_)
        if lines is not None:
            free[test.row[lines]] = False
        free = _thinned(free)
        ignored: Measures = {}
        without: Measures = {}
        worth = finding.noise and LEAST_SHARE <= train.mean() < 1
        if worth and free.sum() >= FEW_CONTEXTS:
            measured = test.subset(free)
            ignored = self._measure(self._part.train, measured)
            fewer = _without_past(measured, touched[self._past_rows])
            without = self._measure(self._part.train.subset(~train), fewer)
        return Cost(
            float(train.mean()),
            None if lines is None else float(lines.mean()),
            ignored,
            without,
            int(free.sum()),
        )

    def _measure(self, train: Events, test: Targets) -> Measures:
        found: Measures = {}
        if (test.item >= 0).any():
            everything = np.ones(len(train.item_ids), np.bool_)
            items = item_metrics(popular(train), test, everything, exclude_history=self._exclude)
            if items["contexts"]:
                found["popular NDCG@10"] = items["ndcg_at_10"]
        if len(train.behavior_types) > 1 and (test.type >= 0).any():
            types = measure_types(decayed_shares(train), test)
            found["decayed shares accuracy"] = types["accuracy"]
            found["decayed shares log loss"] = types["log_loss"]
        return found

    def changes(self) -> Changes | None:
        """What cleaning does to the targets."""
        dropped = self._inspection.droppable
        if self._target_rows is None or not dropped.any() or dropped.all():
            return None
        test = self._part.test
        lines = dropped[self._target_rows]
        left = np.bincount(test.row[~lines], minlength=len(test)) > 0
        fewer = _without_past(test, dropped[self._past_rows])
        shorter = (fewer.end - fewer.begin) < (test.end - test.begin)
        _, columns = self._inspection.cleaned()
        events = to_events(columns, self._inspection.catalogue)
        try:
            after = len(split(events, self._protocol).test)
        except InvalidArgumentError:  # too little is left: training itself says so
            after = 0
        return Changes(
            len(lines), int(lines.sum()), len(test), int((~left).sum()),
            int((shorter & left).sum()), after,
        )  # fmt: skip


def _with_types(part: Split, types: Ints, target_rows: Ints | None) -> Split:
    """The division with behavior types where it has rows."""
    test = part.test
    test = replace(
        test,
        events=replace(test.events, type=types[test.events.type]),
        # Targets from a file have types already.
        type=test.type if target_rows is None else types[target_rows],
    )
    return replace(part, train=replace(part.train, type=types[part.train.type]), test=test)


def _without_past(targets: Targets, touched: Mask) -> Targets:
    """The same targets, as of the same time, from histories without the touched events."""
    before = np.concatenate([[0], np.cumsum(~touched)])
    return replace(
        targets,
        events=targets.events.subset(~touched),
        begin=before[targets.begin],
        end=before[targets.end],
    )


def _thinned(chosen: Mask) -> Mask:
    """At most MEASURED_CONTEXTS of the chosen, at even distances."""
    places = np.flatnonzero(chosen)
    if len(places) <= MEASURED_CONTEXTS:
        return chosen
    thinned = np.zeros_like(chosen)
    thinned[places[np.linspace(0, len(places) - 1, MEASURED_CONTEXTS).astype(np.int64)]] = True
    return thinned
