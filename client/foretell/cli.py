"""The command `foretell`: import data, ask for predictions, look after models."""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import operator
import os
import re
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from foretell import limits, top, types
from foretell._channel import ClientSettings
from foretell._output import Progress, pairs, table, to_json
from foretell._security import Security
from foretell._sync_client import Client
from foretell.conditions import Condition, attribute
from foretell.errors import ForetellError, UnavailableError
from foretell.importing import EventReader, ItemReader, Reader
from foretell.load_test import command as load_test
from foretell.texts import number_of

EMBEDDER = "127.0.0.1:50051"
PREDICTOR = "127.0.0.1:50052"

SHOWN_FAILURES = 10
"""Refused items or events that an import prints."""

_COMPARISON = re.compile(r"([^=!<>]+)(=|!=|<=|>=|<|>)(.*)", re.DOTALL)

_SIGNS: dict[str, Callable[..., Condition]] = {
    "=": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


_SECURITY = {
    "ca_file": "PEM file of who may have signed the services' certificates; turns TLS on",
    "certificate_file": "PEM file of a certificate to show to the services",
    "key_file": "PEM file of its key",
    "server_name": "name in the services' certificates, where it is not the address's",
    "token_file": "file with the token to show to the services",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; its exit status: 0 good, 1 an error, 2 wrong usage (by argparse)."""
    options = _parser().parse_args(arguments)
    try:
        options.settings = settings = ClientSettings(security=_security(options))
        with Client(
            options.embedder, options.predictor, settings=settings, timeout_s=options.timeout
        ) as client:
            status: int = options.run(client, options)
            return status
    except ForetellError as error:
        _complain(error, options)
        return 1
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    group = common.add_argument_group("common options")
    group.add_argument(
        "--embedder",
        metavar="HOST:PORT[,...]",
        default=os.environ.get("FORETELL_EMBEDDER") or EMBEDDER,
        help=f"the embedder (environment: FORETELL_EMBEDDER; default: {EMBEDDER})",
    )
    group.add_argument(
        "--predictor",
        metavar="HOST:PORT[,...]",
        default=os.environ.get("FORETELL_PREDICTOR") or PREDICTOR,
        help=f"the predictor (environment: FORETELL_PREDICTOR; default: {PREDICTOR})",
    )
    group.add_argument(
        "--timeout", metavar="SECONDS", type=_seconds, help="deadline of each call to a service"
    )
    group.add_argument("--json", action="store_true", help="print one JSON object")
    for name, what in _SECURITY.items():
        variable = f"FORETELL_{name.upper()}"
        group.add_argument(
            f"--{name.replace('_', '-')}",
            metavar="NAME" if name == "server_name" else "FILE",
            default=os.environ.get(variable, ""),
            help=f"{what} (environment: {variable})",
        )

    parser = argparse.ArgumentParser(
        prog="foretell", description="Import data, ask for predictions, look after models."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, help_text: str, run: Callable[..., int], service: str) -> Any:
        sub = commands.add_parser(
            name, help=help_text, description=help_text[0].upper() + help_text[1:], parents=[common]
        )
        sub.set_defaults(run=run, service=service)
        return sub

    for name, what, run, service in (
        ("import-items", "items (columns item_id, text)", _import_items, "embedder"),
        (
            "import-events",
            "events (columns user_id, behavior_type, behavior_text and/or item_id)",
            _import_events,
            "predictor",
        ),
    ):
        sub = command(name, f"clean and send a CSV or Parquet file of {what}", run, service)
        sub.add_argument("file", metavar="FILE")
        sub.add_argument("--rejects", metavar="FILE", help="write refused rows here, as CSV")

    sub = command("predict", "say what a user will do next", _predict, "predictor")
    sub.add_argument("user", metavar="USER")
    _add_k(sub)
    sub.add_argument(
        "--repeats",
        type=types.Repeats,
        choices=list(types.Repeats),
        help="whether items that the user had may be answered (default: the model's)",
    )
    sub = command("search", "find the items nearest to a text", _search, "embedder")
    sub.add_argument("text", metavar="TEXT")
    _add_k(sub)
    sub.add_argument("--collection", default="items", help="what is searched (default: items)")
    sub.add_argument(
        "--where",
        metavar="CONDITION",
        type=_comparison,
        action="append",
        default=[],
        help="only items with such an attribute: KEY=TEXT, KEY!=TEXT, or KEY<NUMBER and likewise "
        "<=, >, >=; of several all must hold",
    )
    command("models", "list the registered models", _models, "predictor")
    sub = command("activate", "make a model the one that answers", _activate, "predictor")
    sub.add_argument("version", metavar="VERSION")
    sub = command("delete-user", "delete a user's events", _delete_user, "predictor")
    sub.add_argument("user", metavar="USER")
    command("info", "say what runs", _info, "")
    load_test.add_arguments(command("load-test", load_test.HELP, load_test.run, ""))
    top.add_arguments(command("top", top.HELP, top.run, ""))
    return parser


def _security(options: argparse.Namespace) -> Security:
    return Security(**{name: getattr(options, name) for name in _SECURITY})


def _add_k(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-k", type=int, help=f"how many items (default: {limits.K_DEFAULT}, at most {limits.K:,})"
    )


def _seconds(text: str) -> float:
    with contextlib.suppress(ValueError):
        seconds = float(text)
        if 0 < seconds < float("inf"):
            return seconds
    raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds greater than 0")


def _comparison(text: str) -> Condition:
    """A condition as it is written on the command line."""
    found = _COMPARISON.fullmatch(text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no comparison such as KEY=TEXT")
    key, sign, value = found.groups()
    if sign in ("=", "!="):
        return _SIGNS[sign](attribute(key), value)
    number = number_of(value)
    if number is None:
        raise argparse.ArgumentTypeError(f"{value!r} is no number")
    return _SIGNS[sign](attribute(key), number)


def _complain(error: ForetellError, options: argparse.Namespace) -> None:
    message = " ".join(error.message.split())
    if isinstance(error, UnavailableError) and options.service:
        address = getattr(options, options.service)
        message = f"the {options.service} at {address} cannot be reached: {message}"
    print(f"foretell: {message}", file=sys.stderr)


def _show(options: argparse.Namespace, value: Any, text: str) -> None:
    print(json.dumps(to_json(value), ensure_ascii=False, indent=2) if options.json else text)


# --- Imports --------------------------------------------------------------------------------------


def _import_items(client: Client, options: argparse.Namespace) -> int:
    reader = ItemReader(options.file, rejects=options.rejects)
    client.embedder_info()  # fails at once where a write would wait for the service
    bar = Progress("items", reader.fraction)
    try:
        result = client.import_items(reader, progress=bar.update)
    finally:
        bar.close()
    return _imported(options, "items", reader, result)


def _import_events(client: Client, options: argparse.Namespace) -> int:
    # Where the file has no times, the order of its rows must become the order of the events.
    reader = EventReader(options.file, rejects=options.rejects, start=datetime.now(UTC))
    client.predictor_info()
    bar = Progress("events", reader.fraction)
    try:
        result = client.import_events(reader, progress=bar.update)
    finally:
        bar.close()
    return _imported(options, "events", reader, result)


def _imported(
    options: argparse.Namespace, what: str, reader: Reader[Any], result: types.ImportResult
) -> int:
    lines = [str(reader.summary), f"{result.written:,} {what} stored"]
    if result.duplicates:
        lines[-1] += f", {result.duplicates:,} known already"
    if options.rejects and reader.summary.refused:
        lines.append(f"refused rows are in {options.rejects}")
    answer = {"file": str(reader.path), **to_json(reader.summary), **to_json(result)}
    _show(options, answer, "\n".join(lines))
    if not result.failed:
        return 0
    print(f"foretell: the service refused {result.failed:,} {what}:", file=sys.stderr)
    for failure in result.failures[:SHOWN_FAILURES]:
        print(f"  {what} {failure.index:,}: {failure.error.message}", file=sys.stderr)
    return 1


# --- Questions ------------------------------------------------------------------------------------


def _outlook(prediction: types.Prediction) -> str:
    """What comes next, in a line."""
    text = f"next: {prediction.predicted_behavior_type or 'nothing is known'}"
    if prediction.expected_gap_s:
        wait = timedelta(seconds=round(prediction.expected_gap_s))
        text += f", about {wait} after the last event"
    return text


def _predict(client: Client, options: argparse.Namespace) -> int:
    prediction = client.predict(options.user, k=options.k, repeats=options.repeats)
    ids = [item.item_id for item in prediction.items]
    texts = {} if options.json else _texts(client, ids)
    lines = [
        f"{options.user}: {prediction.history_events:,} events, "
        f"model {prediction.model_version or '(none active)'}",
        _outlook(prediction),
        "",
        table(
            ("next behavior", "probability"),
            [(entry.behavior_type, entry.probability) for entry in prediction.behavior_types],
        ),
        "",
        table(
            ("item", "interest", "probability", "by", "text"),
            [
                (
                    item.item_id,
                    item.interest_score,
                    item.probability,
                    item.method,
                    texts.get(item.item_id, ""),
                )
                for item in prediction.items
            ],
        ),
    ]
    if prediction.fallback_reason:
        lines.append(f"\nthe items are not the model's: {prediction.fallback_reason}")
    if prediction.shortfall_reason:
        lines.append(f"\nthere are no more items: {prediction.shortfall_reason}")
    _show(options, prediction, "\n".join(lines))
    return 0


def _search(client: Client, options: argparse.Namespace) -> int:
    result = client.search(
        texts=[options.text],
        k=options.k,
        collection=options.collection,
        where=functools.reduce(operator.and_, options.where) if options.where else None,
    )
    for failure in result.failures:
        raise failure.error
    (hits,) = result.hits
    scored = list(zip(hits.ids, map(float, hits.scores), strict=True))
    texts = _texts(client, hits.ids, options.collection)
    answer = {
        "hits": [{"id": i, "score": score, "text": texts.get(i, "")} for i, score in scored],
        "timings": result.timings,
    }
    rows = [(i, score, texts.get(i, "")) for i, score in scored]
    _show(options, answer, table(("item", "score", "text"), rows))
    return 0


def _texts(client: Client, ids: Sequence[str], collection: str = "items") -> dict[str, str]:
    """Texts to show beside ids; none where the embedder does not answer: they are an extra."""
    if not ids:
        return {}
    try:
        found = client.get_items(ids, collection=collection)
    except ForetellError as error:
        print(f"foretell: no texts of the items: {error.message}", file=sys.stderr)
        return {}
    return {item.id: item.text for item in found.items}


# --- Looking after --------------------------------------------------------------------------------


def _models(client: Client, options: argparse.Namespace) -> int:
    models: list[types.Model] = []
    token = ""
    while True:
        page = client.list_models(page_size=limits.PAGE, page_token=token)
        models += page.elements
        token = page.next_page_token
        if not token:
            break
    text = table(
        ("version", "active", "model", "registered", "behavior types", "items"),
        [
            (
                m.version,
                m.active,
                " + ".join((m.model_type, *m.parts)),
                m.registered_at,
                len(m.behavior_types),
                m.items,
            )
            for m in models
        ],
    )
    for model in models:
        if model.active and model.metrics:
            text += f"\n\nmetrics of {model.version}\n"
            text += table(("metric", "value"), sorted(model.metrics.items()))
    _show(options, {"models": models}, text if models else "no model is registered")
    return 0


def _activate(client: Client, options: argparse.Namespace) -> int:
    result = client.activate_model(options.version)
    before = f" in place of {result.previous_version}" if result.previous_version else ""
    _show(options, result, f"{result.model.version} answers now{before}")
    return 0


def _delete_user(client: Client, options: argparse.Namespace) -> int:
    result = client.delete_user(options.user)
    text = f"{result.deleted_events:,} events of {options.user} deleted ({result.deletion_id})"
    _show(options, result, text)
    return 0


def _info(client: Client, options: argparse.Namespace) -> int:
    """Both services; one that does not answer does not hide the other."""
    answer: dict[str, Any] = {}
    texts: list[str] = []
    status = 0
    for service, ask in (("embedder", client.embedder_info), ("predictor", client.predictor_info)):
        texts.append(f"{service} at {getattr(options, service)}")
        try:
            answer[service] = to_json(ask())
            if service == "embedder" and answer[service]["has_store"]:
                answer["collections"] = to_json(client.list_collections())
        except ForetellError as error:
            answer[service] = {"error": to_json(error)}
            print(f"foretell: {service}: {' '.join(error.message.split())}", file=sys.stderr)
            texts.append("  does not answer")
            status = 1
            continue
        texts.append(pairs(answer[service]))
        if service == "embedder" and "collections" in answer:
            texts.append(
                table(
                    ("collection", "kind", "items", "dims", "index"),
                    [
                        (one["name"], one["kind"], one["items"], one["cols"], one["index"])
                        for one in answer["collections"]
                    ],
                )
            )
    _show(options, answer, "\n".join(texts))
    return status


if __name__ == "__main__":
    sys.exit(main())
