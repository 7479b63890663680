"""`python -m predictor search`: finds a configuration file for `train`."""

from __future__ import annotations

import argparse
import math
import shlex
import sys
from pathlib import Path
from typing import Any

from predictor.learning.classic.recipe import CLASSIC
from predictor.learning.options import add_data, dataset_of, positive, protocol_of
from predictor.learning.sequence import config_file
from predictor.learning.splits import Protocol
from predictor.models.sequence.encoders import model_types

# Optuna is of the extra `toolbox`: what imports it is imported where it is needed.


def add_search(commands: Any) -> None:
    """Adds the command to the subparsers."""
    command = commands.add_parser(
        "search", help="find the settings of a model by cross-validation",
        description=search_.__doc__,
    )  # fmt: skip
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory to "
                         "write: best.toml, search.json, plots; with the same options it is "
                         "continued")  # fmt: skip
    command.add_argument("--trials", type=positive, default=20, metavar="N", help="trials to run, "
                         "those of earlier runs among them (default: %(default)s)")  # fmt: skip
    command.add_argument("--sampler", choices=("tpe", "random"), default="tpe", help="whether to "
                         "choose by what was measured so far (default: %(default)s)")  # fmt: skip
    command.add_argument("--folds", type=positive, default=3, metavar="N",
                         help="divisions to measure on (default: %(default)s)")  # fmt: skip
    command.add_argument("--folds-by", choices=("time", "user"), help="default: time; user "
                         "without timestamps")  # fmt: skip
    command.add_argument("--budget-s", type=_seconds, metavar="S", help="begin no trial after so "
                         "many seconds (default: no limit)")  # fmt: skip
    command.add_argument("--model", nargs="+", choices=(*model_types(), *CLASSIC), default=[],
                         help="models to choose from, all of them sequence models or all classic "
                         "models of behavior types (default: by the data)")  # fmt: skip
    command.add_argument("--tune", nargs="+", metavar="FIELD", help="settings to choose "
                         "(default: all with an effect, but clock and sentiment)")  # fmt: skip
    command.add_argument("--config", type=Path, metavar="FILE", help="settings that are not "
                         "searched, as for train")  # fmt: skip
    command.add_argument("--epochs", type=positive, metavar="N", help="of a fit, at most "
                         "(default: by the data)")  # fmt: skip
    add_data(command)
    command.set_defaults(run=search_, show=_show)


def search_(options: argparse.Namespace) -> dict[str, Any]:
    """Tries settings of a model, each measured by cross-validation on the training and validation
    parts, and writes the best as a configuration file for `train --config`. The test part is not
    looked at. A search that was ended, by whatever, is continued by the same command.
    """
    from predictor.learning.search.searching import Plan, search
    from predictor.learning.search.space import models_of

    fixed, _ = config_file.given(options.config, epochs=options.epochs)
    plan = Plan(
        trials=options.trials,
        sampler=options.sampler,
        folds=options.folds,
        folds_by=options.folds_by,
        models=tuple(dict.fromkeys(options.model)),
        tune=options.tune,
        budget_s=options.budget_s,
    )
    models_of(fixed, plan.models)  # a fault in them is told before the data are read
    with dataset_of(options) as dataset:
        return search(
            dataset,
            options.out,
            plan=plan,
            protocol=protocol_of(options, Protocol()),
            fixed=fixed,
            command=f"python -m predictor {shlex.join(sys.argv[1:])}",
            progress=True,
        )


def _show(result: dict[str, Any]) -> str:
    from predictor.learning.search.results import table

    return f"{table(result)}\n\nthe best settings are in {result['config']}"


def _seconds(text: str) -> float:
    number = float(text)
    if not (0 < number < math.inf):
        raise argparse.ArgumentTypeError("must be above 0")
    return number
