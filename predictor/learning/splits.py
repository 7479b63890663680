"""The division of events into training, validation and test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from foretell.errors import InvalidArgumentError
from foretell.importing import Target
from predictor.learning.data import Events, Targets, given_targets, targets_of
from predictor.models.history import Ints, asked_at

SplitKind = Literal["time", "leave-one-out", "random", "every"]
SPLITS: tuple[SplitKind, ...] = get_args(SplitKind)

HORIZON_QUANTILE = 0.99
"""Of the times between users' last events and the cut: longer absences count as this long."""

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Protocol:
    """How a data set is divided."""

    split: SplitKind | None = None
    """None: `default_split`.

    time: all before an instant is for training; a user's target is their first basket from there
        on, their history what they did before the instant.
    every: all before an instant is for training; every event from there on is a target, its
        history all that the user truly did before it.
    leave-one-out: a user's last basket is the target.
    random: a share of all rows are targets, each from its user's true earlier rows; they are
        neither inputs nor targets in training.
    """
    test_share: float = 0.2
    """Of the events, where the split is not leave-one-out."""
    seed: int = 42
    test_from: int | None = None
    """The instant of a time or every split, in microseconds since 1970; None: by test_share."""
    validation_from: int | None = None
    """The same for the validation part, which is cut from what is left before the test part."""
    hold_out: float = 0.0
    """Share of the items, drawn by the seed, without any event in training or validation: in the
    test part they are cold. Their events stay in the histories of the test."""


@dataclass(frozen=True)
class Split:
    """Events to learn from and targets to measure on. Nothing in `train` is a target below."""

    kind: SplitKind
    train: Events
    validation: Targets
    test: Targets
    horizon: int
    """Microseconds: see `asked_at`."""
    held_out: Mask
    """(items,) items that were taken out of training."""

    def with_types(self, names: Sequence[str]) -> Split:
        """The same division with this vocabulary of behavior types."""
        return replace(
            self,
            train=self.train.with_types(names),
            validation=self.validation.with_types(names),
            test=self.test.with_types(names),
        )


def default_split(events: Events) -> SplitKind:
    """random without items (the form of the seed article), else time where there are times."""
    if not events.has_items:
        return "random"
    return "time" if events.has_times else "leave-one-out"


def split(events: Events, protocol: Protocol, targets: Sequence[Target] | None = None) -> Split:
    """Divides events into training, validation and test; the first two are cut alike.

    With `targets` all events are history, and only validation is cut.

    Raises:
        InvalidArgumentError: nothing is left to train on or to measure on.
    """
    kind = protocol.split or default_split(events)
    rest = events
    test = None
    if targets is None:
        kept, target, cut = _masks(events, kind, protocol, protocol.test_from, protocol.seed)
        _require(events, kept, target, kind, "test")
        rest, test = events.subset(kept), _as_of(targets_of(events, target), kind, cut)
    held_out = _held_out(events, protocol)
    kept, target, cut = _masks(rest, kind, protocol, protocol.validation_from, protocol.seed + 1)
    if held_out.any():
        # The last element stands for the negative indices: no item, or an unknown one.
        seen = ~np.append(held_out, False)[rest.item]
        kept, target, rest = (kept & seen)[seen], (target & seen)[seen], rest.subset(seen)
    _require(rest, kept, target, kind, "validation")
    validation = _as_of(targets_of(rest, target), kind, cut)
    horizon = _horizon(validation)
    if test is None:
        end = int(events.timestamp.max()) if kind == "time" else None
        test = _as_of(given_targets(events, targets or ()), kind, end)
    return Split(
        kind,
        rest.subset(kept),
        _within(validation, horizon),
        _within(test, horizon),
        horizon,
        held_out,
    )


def _masks(
    events: Events, kind: SplitKind, protocol: Protocol, at: int | None, seed: int
) -> tuple[Mask, Mask, int | None]:
    """Events to keep, targets among them or beside them, and the instant between, if any."""
    match kind:
        case "leave-one-out":
            return *_leave_one_out(events), None
        case "random":
            target = np.random.default_rng(seed).random(len(events)) < protocol.test_share
            return ~target, target, None
        case "time" | "every":
            cut = _instant(events, protocol.test_share) if at is None else at
            before = events.timestamp < cut
            return before, ~before if kind == "every" else _first_baskets(events, before), cut


def first_baskets_from(events: Events, cut: int, horizon: int) -> Targets:
    """The targets of a time split at `cut`: each user's first basket from there on."""
    target = _first_baskets(events, events.timestamp < cut)
    return _within(_as_of(targets_of(events, target), "time", cut), horizon)


def split_at(events: Events, cut: int, kind: Literal["time", "every"]) -> Split:
    """A division by time without a test part: trains before `cut`, validates from there on.

    Raises:
        InvalidArgumentError: nothing is left to train on or to measure on.
    """
    before = events.timestamp < cut
    target = ~before if kind == "every" else _first_baskets(events, before)
    _require(events, before, target, kind, "validation")
    return _validated(kind, events.subset(before), _as_of(targets_of(events, target), kind, cut))


def split_users(events: Events, apart: Mask) -> Split:
    """A division by users without a test part: validates on the last baskets of some of them.

    Args:
        events: of all.
        apart: (events,) those of the users whom training does not see; a user with a single basket
            has no history, and is no target.

    Raises:
        InvalidArgumentError: nothing is left to train on or to measure on.
    """
    others = events.subset(apart)
    _, target = _leave_one_out(others)
    _require(others, ~apart, target, "leave-one-out", "validation")
    return _validated("leave-one-out", events.subset(~apart), targets_of(others, target))


def _validated(kind: SplitKind, train: Events, validation: Targets) -> Split:
    horizon = _horizon(validation)
    nothing = validation.subset(np.zeros(len(validation), np.bool_))
    held_out = np.zeros(len(train.item_ids), np.bool_)
    return Split(kind, train, _within(validation, horizon), nothing, horizon, held_out)


def _require(events: Events, kept: Mask, target: Mask, kind: SplitKind, part: str) -> None:
    if not target.any() or not kept.any():
        left = "targets" if kept.any() else "events to train on"
        raise InvalidArgumentError(
            f"a {kind} split leaves no {left} for the {part} part: "
            f"{len(events)} events of {len(np.unique(events.user))} users are too few",
            reason="TOO_FEW_EVENTS",
            field="events",
        )


def _instant(events: Events, share: float) -> int:
    at = min(int(len(events) * (1 - share)), len(events) - 1)
    return int(np.partition(events.timestamp, at)[at])


def _first_baskets(events: Events, before: Mask) -> Mask:
    """Events of each user's first basket behind those that are `before`."""
    first = events.first_of_basket[:-1]
    user_first = events.first_of_user[events.user[first]]
    # A basket is its user's first from the cut on, if the event before it is not.
    target = ~before[first] & ((first == user_first) | before[first - 1])
    return np.repeat(target, np.diff(events.first_of_basket))


def _leave_one_out(events: Events) -> tuple[Mask, Mask]:
    """Masks of all but users' last baskets, and of these, where a user has two or more."""
    first = events.first_of_basket
    last = first[1:] == events.first_of_user[events.user[first[:-1]] + 1]
    alone = first[:-1] == events.first_of_user[events.user[first[:-1]]]
    target = np.repeat(last & ~alone, np.diff(first))
    return ~target, target


def _held_out(events: Events, protocol: Protocol) -> Mask:
    chosen = np.zeros(len(events.item_ids), np.bool_)
    count = round(protocol.hold_out * len(chosen))
    chosen[np.random.default_rng(protocol.seed).permutation(len(chosen))[:count]] = True
    return chosen


def _as_of(targets: Targets, kind: SplitKind, cut: int | None) -> Targets:
    """In a time split a prediction is asked for at the cut; else right after the last event."""
    if kind != "time" or cut is None:
        return targets
    return replace(targets, as_of=np.maximum(targets.last_times(), cut))


def _horizon(targets: Targets) -> int:
    some = targets.end > targets.begin
    if not some.any():
        return 0
    away: Ints = (targets.as_of - targets.last_times())[some]
    return int(np.quantile(away, HORIZON_QUANTILE))


def _within(targets: Targets, horizon: int) -> Targets:
    return replace(targets, as_of=asked_at(targets.as_of, targets.last_times(), horizon))
