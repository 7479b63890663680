"""The command against the fake of both services."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import foretell
from foretell import cli
from foretell._output import Progress, table
from foretell.testing import FakeServices

Run = Callable[..., tuple[int, str, str]]

ITEMS = (
    "item_id,text,brand\ntea,green tea,acme\ncup,<b>tea cup</b>,\n,nothing,\ntea,black tea,acme\n"
)
EVENTS = (
    "user_id,behavior_type,item_id,timestamp\n"
    "ann,view,tea,2024-05-01\nann,buy,tea,2024-05-02\nbob,view,cup,soon\nbob,view,cup,2024-05-01\n"
)


@pytest.fixture
def fakes() -> Iterator[FakeServices]:
    with FakeServices() as services:
        yield services


@pytest.fixture
def run(
    fakes: FakeServices, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Run:
    monkeypatch.setenv("FORETELL_EMBEDDER", fakes.embedder_address)
    monkeypatch.setenv("FORETELL_PREDICTOR", fakes.predictor_address)

    def run(*arguments: object) -> tuple[int, str, str]:
        status = cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "items.csv").write_text(ITEMS)
    (tmp_path / "events.csv").write_text(EVENTS)
    return tmp_path


@pytest.fixture
def filled(run: Run, files: Path, fakes: FakeServices) -> Run:
    assert run("import-items", files / "items.csv")[0] == 0
    assert run("import-events", files / "events.csv")[0] == 0
    fakes.register_model("first", behavior_types=["buy", "view"], metrics={"hits@10": 0.5})
    return run


def answer(run: Run, *arguments: object) -> Any:
    status, out, err = run(*arguments, "--json")
    assert (status, err) == (0, "")
    return json.loads(out)


def test_import_items(run: Run, files: Path) -> None:
    rejects = files / "rejects.csv"
    status, out, err = run("import-items", files / "items.csv", "--rejects", rejects)
    assert (status, err) == (0, "")
    assert out.splitlines() == [
        "4 rows read, 2 kept (1 of them mended), 2 refused",
        "  mended: HTML: 1",
        "  refused: item_id is empty: 1",
        "  refused: a later row has the same item_id: 1",
        "2 items stored",
        f"refused rows are in {rejects}",
    ]
    assert rejects.read_text().splitlines() == [
        "rejected_row,rejected_reason,item_id,text,brand",
        "3,item_id is empty,,nothing,",
        "1,a later row has the same item_id,tea,green tea,acme",
    ]


def test_import_events(run: Run, files: Path) -> None:
    assert answer(run, "import-events", files / "events.csv") == {
        "file": str(files / "events.csv"),
        "rows": 4,
        "kept": 3,
        "mended_rows": 0,
        "mended": {},
        "refused": {"timestamp cannot be read": 1},
        "noted": {},
        "sent": 3,
        "written": 3,
        "duplicates": 0,
        "failed": 0,
        "failures": [],
    }


def test_events_without_times_are_in_the_order_of_the_file(
    run: Run, fakes: FakeServices, tmp_path: Path
) -> None:
    path = tmp_path / "events.csv"
    path.write_text(
        "user_id,behavior_type,behavior_text\n" + "".join(f"a,t,text {i}\n" for i in range(20))
    )
    assert run("import-events", path)[0] == 0
    with foretell.Client(predictor=fakes.predictor_address) as client:
        events = client.list_events("a").elements
    assert [event.text for event in events] == [f"text {i}" for i in reversed(range(20))]
    assert len({event.timestamp for event in events}) == 20


def test_known_events_are_counted(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "events.csv"
    path.write_text("user_id,behavior_type,item_id,event_id\na,t,i,e1\na,t,i,e2\n")
    assert run("import-events", path)[1].endswith("2 events stored\n")
    assert run("import-events", path)[1].endswith("0 events stored, 2 known already\n")


def test_what_the_service_refuses_is_an_error(run: Run, tmp_path: Path) -> None:
    # The server has its own limit on behavior types: here each of two files is within it.
    for number in range(2):
        path = tmp_path / f"events{number}.csv"
        path.write_text(
            "user_id,behavior_type,item_id\n"
            + "".join(f"a,type {number} {i},i\n" for i in range(600))
        )
    assert run("import-events", tmp_path / "events0.csv")[0] == 0
    status, out, err = run("import-events", tmp_path / "events1.csv")
    assert status == 1
    assert out.endswith("400 events stored\n")
    assert err.startswith("foretell: the service refused 200 events:\n  events 400: ")
    assert len(err.splitlines()) == 1 + cli.SHOWN_FAILURES


def test_predict(filled: Run) -> None:
    status, out, err = filled("predict", "ann", "-k", 1)
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "ann: 2 events, model (none active)"
    assert lines[1] in {"next: buy", "next: view"}
    assert lines[3].split() == ["next", "behavior", "probability"]
    assert {line.split()[0] for line in lines[4:6]} == {"buy", "view"}
    assert lines[4].split()[0] == lines[1].removeprefix("next: ")
    assert lines[7].split() == ["item", "interest", "probability", "by", "text"]
    assert lines[8].split()[0] in {"tea", "cup"}
    assert lines[8].endswith(("black tea", "tea cup"))
    assert "the items are not the model's: no_model" in out


def test_predict_as_json_and_without_repeats(filled: Run) -> None:
    prediction = answer(filled, "predict", "ann", "--repeats", "excluded")
    assert [item["item_id"] for item in prediction["items"]] == ["cup"]
    assert sum(entry["probability"] for entry in prediction["behavior_types"]) == pytest.approx(1)
    assert prediction["shortfall_reason"] == "filtered"
    assert prediction["history_events"] == 2


def test_predict_without_an_embedder_shows_no_texts(
    filled: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORETELL_EMBEDDER", "127.0.0.1:1")
    status, out, err = filled("predict", "ann")
    assert status == 0
    assert "tea" in out
    assert "black tea" not in out
    assert err.startswith("foretell: no texts of the items: ")


def test_search(filled: Run) -> None:
    status, out, err = filled("search", "black tea", "-k", 1)
    assert (status, err) == (0, "")
    header, hit = out.splitlines()
    assert header.split() == ["item", "score", "text"]
    assert hit.split() == ["tea", "1.0000", "black", "tea"]
    hits = answer(filled, "search", "tea cup")["hits"]
    assert [(hit["id"], hit["text"]) for hit in hits] == [("cup", "tea cup"), ("tea", "black tea")]


@pytest.mark.parametrize(
    ("where", "found"),
    [
        (["brand=a=c<me"], ["2"]),
        (["brand!=acme"], ["2", "3"]),
        (["size<=10", "size>-1"], ["1", "2"]),
        (["size>=10"], ["2"]),
        (["size<10", "brand=acme"], ["1"]),
        (["brand="], ["3"]),
        (["brand=nobody"], []),
    ],
)
def test_search_with_conditions(
    run: Run, fakes: FakeServices, where: list[str], found: list[str]
) -> None:
    items = [
        foretell.Item("1", "tea", {"brand": "acme", "size": "9.5"}),
        foretell.Item("2", "tea", {"brand": "a=c<me", "size": "1e1"}),
        foretell.Item("3", "tea", {"brand": "", "size": "10 OZ"}),
    ]
    with foretell.Client(fakes.embedder_address) as client:
        client.upsert_items(items)
    flags = [part for one in where for part in ("--where", one)]
    assert [hit["id"] for hit in answer(run, "search", "tea", *flags)["hits"]] == found


@pytest.mark.parametrize(
    ("where", "message"), [("brand", "no comparison"), ("size<ten", "'ten' is no number")]
)
def test_bad_conditions_are_wrong_usage(
    run: Run, capsys: pytest.CaptureFixture[str], where: str, message: str
) -> None:
    with pytest.raises(SystemExit) as exit_status:
        run("search", "tea", "--where", where)
    assert exit_status.value.code == 2
    assert message in capsys.readouterr().err


def test_models_and_activate(run: Run, filled: Run, fakes: FakeServices) -> None:
    assert filled("activate", "first")[1] == "first answers now\n"
    fakes.register_model("second", behavior_types=["buy"])
    assert filled("activate", "second")[1] == "second answers now in place of first\n"
    filled("activate", "first")
    out = filled("models")[1]
    assert [line.split()[:2] for line in out.splitlines()[1:3]] == [
        ["second", "no"],
        ["first", "yes"],
    ]
    assert out.endswith("metrics of first\n  metric    value\n  hits@10  0.5000\n")
    models = answer(filled, "models")["models"]
    assert [(m["version"], m["active"]) for m in models] == [("second", False), ("first", True)]
    assert answer(filled, "activate", "second")["previous_version"] == "first"


def test_no_models(run: Run) -> None:
    assert run("models")[1] == "no model is registered\n"
    assert answer(run, "models") == {"models": []}


def test_delete_user(filled: Run) -> None:
    status, out, _ = filled("delete-user", "ann")
    assert status == 0
    assert out.startswith("2 events of ann deleted (")
    assert answer(filled, "delete-user", "ann")["deleted_events"] == 0


def test_info(filled: Run, fakes: FakeServices) -> None:
    out = filled("info")[1]
    assert f"embedder at {fakes.embedder_address}" in out
    assert f"predictor at {fakes.predictor_address}" in out
    assert "events              3" in out
    info = answer(filled, "info")
    assert info["predictor"]["users"] == 2
    assert {"items", "behaviors"} <= {one["name"] for one in info["collections"]}


def test_info_of_one_service(run: Run) -> None:
    status, out, err = run("info", "--predictor", "127.0.0.1:1", "--json")
    assert status == 1
    assert json.loads(out)["predictor"]["error"]["code"] == "UNAVAILABLE"
    assert json.loads(out)["embedder"]["cols"] == 384
    assert err.startswith("foretell: predictor: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("activate", "none"), "none"),
        (("search", ""), "empty"),
        (("search", "tea", "-k", "0"), "k is 0; 1 to 1,000 are allowed"),
        (("search", "tea", "-k", "-1"), "cannot be sent"),
        (("search", "tea", "--collection", "nowhere"), "nowhere"),
        (("import-items", "missing.csv"), "missing.csv: No such file or directory"),
        (("import-items", "{events}"), "the columns item_id, text are missing"),
        (
            ("models", "--predictor", "127.0.0.1:1"),
            "the predictor at 127.0.0.1:1 cannot be reached",
        ),
        (
            ("import-items", "{items}", "--embedder", "127.0.0.1:1"),
            "embedder at 127.0.0.1:1 cannot",
        ),
        (("delete-user", "a\ud800"), "cannot be sent"),
    ],
)
def test_errors_are_one_line(
    run: Run, files: Path, arguments: tuple[str, ...], message: str
) -> None:
    (files / "bad.csv").write_text("user_id,behavior_type\n")
    paths = {"{events}": str(files / "bad.csv"), "{items}": str(files / "items.csv")}
    status, out, err = run(*(paths.get(argument, argument) for argument in arguments))
    assert (status, out) == (1, "")
    assert err.startswith("foretell: ")
    assert err.count("\n") == 1
    assert message in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: COMMAND"),
        (["unknown"], "invalid choice: "),
        (["predict"], "required: USER"),
        (["predict", "ann", "--repeats", "maybe"], "argument --repeats: invalid"),
        (["models", "--timeout", "0"], "'0' is no number of seconds greater than 0"),
        (["models", "--timeout", "soon"], "'soon' is no number of seconds greater than 0"),
    ],
)
def test_wrong_usage(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert "usage: foretell" in err
    assert message in err


def test_interruption_is_no_stack_trace(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(foretell.Client, "list_models", interrupt)
    assert run("models") == (130, "", "")


# --- How it looks ---------------------------------------------------------------------------------


def test_table_aligns_and_cuts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "24")
    assert table(
        ("name", "n", "text"), [("a", 1, "short"), ("longer", 1_000, "a long text\nof lines")]
    ).splitlines() == [
        "  name        n  text",
        "  a           1  short",
        "  longer  1,000  a long…",
    ]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_for_terminals() -> None:
    terminal, pipe = Terminal(), io.StringIO()
    for stream in (terminal, pipe):
        bar = Progress("items", lambda: 0.5, stream)
        bar.update(1_500)
        bar.close()
    assert pipe.getvalue() == ""
    assert "items [###############               ]  50%  1,500" in terminal.getvalue()
    assert terminal.getvalue().endswith("\r\x1b[K")


@pytest.mark.parametrize(
    ("command", "absent"),
    [("load-test", "hdrh"), ("load-test", "rich"), ("top", "rich"), ("top", "prometheus_client")],
)
def test_tools_that_are_not_installed_are_named(
    run: Run, monkeypatch: pytest.MonkeyPatch, command: str, absent: str
) -> None:
    for name in [name for name in sys.modules if name.startswith(("foretell.load_test.", absent))]:
        if name != "foretell.load_test.command":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, absent, None)
    status, out, err = run(command, *(["127.0.0.1:1"] if command == "top" else []))
    assert (status, out) == (1, "")
    assert f"foretell {command} needs {absent}" in err
    assert "pip install 'foretell[tools]'" in err
