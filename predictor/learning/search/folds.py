"""Folds of cross-validation: the same settings are measured on several divisions of the data.

Only what `train` calls training and validation is divided; the test part of the protocol is never
seen, so that what `train` measures on it afterwards has not been searched for.

- `time`, a rolling origin (Tashman, 2000, "Out-of-sample tests of forecasting accuracy"): each fold
  trains on all that lies before its cut and is measured on what follows up to the next fold's. The
  last fold is the division of `train` itself, where that cuts by time. It estimates how well users
  whose past is known are predicted in a period to come, by a model that is trained again and again;
  early folds train on less, and so say less of the final model.
- `user`: users fall into folds by a hash of their ids and the seed. A fold trains on the whole
  behavior of the other folds' users, and is measured on the last baskets of its own, whose earlier
  events are their histories. It estimates how well users are predicted of whom training saw nothing
  (in serving: all who came since), within the same period; it does not say how a model ages, and is
  the more favorable, since others' behavior after the target's moment is known.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal, get_args

import numpy as np

from foretell.errors import InvalidArgumentError
from predictor.learning.data import Events
from predictor.learning.splits import Protocol, Split, split_at, split_users
from predictor.models.history import Ints

FoldKind = Literal["time", "user"]
FOLD_KINDS: tuple[FoldKind, ...] = get_args(FoldKind)


@dataclass(frozen=True)
class Fold:
    """One of the divisions."""

    name: str
    """For people: from when on it is measured, and how many predictions of users."""
    part: Split
    """What to train on, and under `validation` what to measure on; `test` is empty."""


def default_folds(events: Events) -> FoldKind:
    """time where there are times, else user."""
    return "time" if events.has_times else "user"


def make_folds(final: Split, protocol: Protocol, kind: FoldKind, count: int) -> list[Fold]:
    """Divides what `train` would not test on.

    Args:
        final: the division of `train`.
        protocol: the one that it is by.
        kind: by what to fold.
        count: of the folds.

    Raises:
        InvalidArgumentError: the data does not give as many folds.
    """
    # Training and validation lie together behind the targets of the validation part.
    events = final.validation.events
    if kind == "user":
        found = _by_user(events, protocol.seed, count)
    else:
        found = _by_time(events, protocol, "every" if final.kind == "every" else "time", count)
    return [Fold(fold.name, _known_types(fold.part)) for fold in found]


def _by_time(
    events: Events, protocol: Protocol, kind: Literal["time", "every"], count: int
) -> Iterator[Fold]:
    if not events.has_times:
        raise InvalidArgumentError(
            "the events have no timestamps: fold them by user", reason="NO_TIMES", field="folds_by"
        )
    times = np.sort(events.timestamp)
    last = protocol.validation_from
    if last is None:
        last = int(times[int(len(times) * (1 - protocol.test_share))])
    bounds = [*_cuts(times, last, count), int(times[-1]) + 1]
    for number in range(count):
        begin, end = bounds[number : number + 2]
        if not times[0] < begin < end:
            raise _too_few(f"the times of {len(times)} events do not give", count)
        part = split_at(events.subset(events.timestamp < end), begin, kind)
        yield Fold(f"from {_moment(begin)}: {len(part.validation):,} predictions", part)


def _cuts(times: Ints, last: int, count: int) -> list[int]:
    """From when on each fold is measured, ascending up to `last`.

    Each is measured on as many events as the last one, but the first trains on at least half of
    what lies before `last`.
    """
    before = int(np.searchsorted(times, last))
    step = min(len(times) - before, before // (2 * max(1, count - 1)))
    return [*(int(times[before - back * step]) for back in range(count - 1, 0, -1)), last]


def _moment(time: int) -> str:
    return f"{datetime.fromtimestamp(time / 1_000_000, UTC):%Y-%m-%d %H:%M:%S}"


def _by_user(events: Events, seed: int, count: int) -> Iterator[Fold]:
    if count < 2:
        raise InvalidArgumentError("users are divided into two folds at least", field="folds")
    of_user = np.array([_place(seed, user_id, count) for user_id in events.user_ids], np.int64)
    fold = of_user[events.user]
    for number in range(count):
        apart = fold == number
        if apart.all() or not apart.any():
            users = len(np.unique(events.user))
            raise _too_few(f"{users} users do not give", count)
        part = split_users(events, apart)
        yield Fold(f"users {number + 1}: {len(part.validation):,} predictions", part)


def _place(seed: int, user_id: str, count: int) -> int:
    """The fold of a user, which does not change when others come or go."""
    digest = hashlib.blake2b(f"{seed} {user_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % count


def _known_types(part: Split) -> Split:
    """With the behavior types that this fold's training part knows."""
    train = part.train
    seen = np.unique(train.type[train.type >= 0])
    return part.with_types([train.behavior_types[code] for code in seen])


def _too_few(what: str, count: int) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"{what} {count} folds that can be learned from and measured", reason="TOO_FEW_EVENTS",
        field="folds",
    )  # fmt: skip
