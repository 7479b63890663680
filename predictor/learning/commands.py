"""`python -m predictor train` and the other commands for versions: see _parser.

Results go to the standard output (with --json one object, nothing else), progress and everything
else to the standard error. Exit status: 0 good, 1 an error, 2 wrong usage or unusable data.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

from foretell.errors import ForetellError, InvalidArgumentError
from predictor.database import open_database
from predictor.learning import comparing, leaks, training
from predictor.learning.classic.recipe import CLASSIC, FEATURES
from predictor.learning.forecasting.command import add_forecast
from predictor.learning.measures import comparison
from predictor.learning.options import add_data, dataset_of, positive, protocol_of
from predictor.learning.reports.data_report import data_report
from predictor.learning.search.command import add_search
from predictor.learning.sequence import config_file
from predictor.learning.sources import Dataset
from predictor.learning.splits import Protocol
from predictor.models import model_dir
from predictor.models.sequence.encoders import model_types
from predictor.registry import register
from predictor.settings import PredictorSettings

TRAIN = ("matplotlib", "pyarrow", "sklearn")
"""What the extra `train` installs; `toolbox` the other optional libraries."""


def main(arguments: Sequence[str]) -> int:
    """Runs one of the commands and returns its exit status."""
    options = _parser().parse_args(arguments)
    try:
        with _terminable():
            result: dict[str, Any] = options.run(options)
    except InvalidArgumentError as error:
        return _complain(error, 2)
    except ForetellError as error:
        return _complain(error, 1)
    except ModuleNotFoundError as error:
        extra = "train" if error.name in TRAIN else "toolbox"
        sys.stderr.write(f"error: {error.name} is missing: install foretell-services[{extra}]\n")
        return 1
    except KeyboardInterrupt as stopped:
        sys.stderr.write(f"\ninterrupted: {stopped or 'nothing was written'}\n")
        return 130
    if not result:
        return 0
    text = json.dumps(result, ensure_ascii=False) if options.json else options.show(result)
    sys.stdout.write(text + "\n")
    return 0


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does, so that an embedder that it started is stopped."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _complain(error: ForetellError, status: int) -> int:
    sys.stderr.write(f"error: {error.message}\n")
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m predictor",
        description="Trains, evaluates and registers versions; without a command it serves.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_train(commands)
    _add_evaluate(commands)
    comparing.add(commands)
    _add_register(commands)
    add_forecast(commands)
    add_search(commands)
    return parser


Commands = Any  # argparse keeps the type of subparsers private


def _add_train(commands: Commands) -> None:
    command = commands.add_parser(
        "train", help="train a model and write a version directory", description=train.__doc__
    )
    command.add_argument("--out", type=Path, required=True, metavar="DIR",
                         help="directory to write; its name is the version's")  # fmt: skip
    add_data(command)
    command.add_argument("--model", choices=(*model_types(), *CLASSIC), help="encoder of the "
                         "sequence model, or a classic model (default: by the data)")  # fmt: skip
    command.add_argument("--features", choices=FEATURES, help="what a classic model keeps of a "
                         "text vector: all, the first --dims, principal components, those that "
                         "tell types apart, or keywords and phrases instead (default: pca; "
                         "content: all)")  # fmt: skip
    command.add_argument("--epochs", type=positive, metavar="N", help="at most; it ends early "
                         "where validation stops improving (default: by the data)")  # fmt: skip
    command.add_argument("--dims", type=positive, metavar="N", help="of item and query vectors, "
                         "or of what --features keeps (default: by the data)")  # fmt: skip
    command.add_argument("--clock", action="store_true", default=None,
                         help="read the hour and weekday (UTC) of events")  # fmt: skip
    command.add_argument("--sentiment", action="store_true", default=None,
                         help="read the sentiment of texts as an axis of its own")  # fmt: skip
    command.add_argument("--config", type=Path, metavar="FILE", help="more settings, in TOML, as "
                         "`search` writes them; options win over it")  # fmt: skip
    command.set_defaults(run=train, show=_show_train)


def _add_evaluate(commands: Commands) -> None:
    command = commands.add_parser(
        "evaluate", help="measure a version beside the baselines", description=evaluate.__doc__
    )
    command.add_argument("version", type=Path, metavar="MODEL_DIR", help="a version directory")
    command.add_argument("--out", type=Path, metavar="DIR", help="write the data report there, and "
                         "pictures: confusion matrix, ROC, calibration, ...")  # fmt: skip
    add_data(command)
    command.set_defaults(run=evaluate, show=comparison.tables)


def _add_register(commands: Commands) -> None:
    command = commands.add_parser(
        "register", help="bring a version directory to a predictor", description=register_.__doc__
    )
    command.add_argument("version", type=Path, metavar="MODEL_DIR", help="a version directory")
    command.add_argument(
        "--data-dir", type=Path, metavar="DIR",
        help="the predictor's data directory (default: as for serving)",
    )  # fmt: skip
    command.add_argument("--json", action="store_true", help="print one JSON object")
    command.set_defaults(run=register_, show=lambda result: f"registered {result['version']}")


def train(options: argparse.Namespace) -> dict[str, Any]:
    """Trains a model on files or on a predictor's event store, evaluates it beside the baselines,
    and writes a version directory, which `register` brings to a predictor.
    """
    model_dir.check_absent(options.out)
    model_dir.check_version_name(options.out.name)
    config, lineage = config_file.given(
        options.config,
        model_type=options.model,
        features=options.features,
        epochs=options.epochs,
        dims=options.dims,
        clock=options.clock,
        sentiment=options.sentiment,
    )
    with dataset_of(options) as dataset:
        trained = training.train(
            replace(dataset, lineage=dataset.lineage | lineage),
            options.out,
            protocol=protocol_of(options, Protocol()),
            config=config,
            progress=True,
            cache_dir=options.cache_dir,
        )
    if not trained.report:
        return {}  # the first of several processes tells
    return {"version": trained.version, "path": str(trained.path), **trained.report}


def _show_train(result: dict[str, Any]) -> str:
    parts = [comparison.tables(result)]
    if "own_text_types" in result:
        measures = ("accuracy", "f1", "log_loss", "lines")
        parts.append(comparison.text_table("Own text", measures, result["own_text_types"]))
    if "own_text" in result:
        columns = ("train_accuracy", "validation_accuracy", "majority_accuracy", "f1", "log_loss")
        for name in ("own_text", "next_type"):
            confusion = comparison.confusion_text(
                result[name]["confusion_matrix"], result[name]["behavior_types"]
            )
            parts.append(comparison.text_table(name, columns, {name: result[name]}))
            parts.append(confusion)
    parts.append(f"version {result['version']} in {result['path']}")
    return "\n\n".join(parts)


def evaluate(options: argparse.Namespace) -> dict[str, Any]:
    """Measures a version beside the baselines with the code that training uses. Where no split is
    given, it is the one that the version was trained with. Items that the version does not know are
    read by their texts; those of its items that are not among the data's are not answered.
    """
    version = model_dir.load(options.version)
    protocol = protocol_of(options, leaks.trained_by(version))
    with dataset_of(options) as found:
        dataset = found.in_order(version.item_ids)
        part = training.divide(dataset, protocol)
        measured = comparison.evaluate_version(version, dataset, part)
        exclude = version.config.repeats == "excluded"
        described = training.describe(part, protocol, exclude_history=exclude)
        if options.out is not None:
            _draw(options.out, measured, dataset)
            if report := data_report(dataset, protocol):
                (options.out / "data_report.md").write_text(report, encoding="utf-8")
    return {"version": version.config.version, "protocol": described, **measured.report}


def _draw(folder: Path, found: comparison.Comparison, dataset: Dataset) -> None:
    """Writes the pictures into a folder."""
    # Of the extra `train`, which --json alone does without.
    from predictor.learning.reports import drawing

    folder.mkdir(parents=True, exist_ok=True)
    for name, png in drawing.draw(found, dataset).items():
        (folder / name).write_bytes(png)


def register_(options: argparse.Namespace) -> dict[str, Any]:
    """Checks a version directory and copies it into the predictor's data directory, where
    `foretell activate` (or ActivateModel) finds it.
    """
    data_dir = options.data_dir or PredictorSettings().data_dir
    with contextlib.closing(open_database(data_dir)) as db:
        return {"version": register(db, data_dir, options.version)}
