"""The blocks of docs/recipes.md run as they stand, recipe by recipe, against real services."""

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from foretell import Client
from serving.process import started

TEXT = (Path(__file__).parents[1] / "docs" / "recipes.md").read_text()
PREAMBLE, *SECTIONS = re.split(r"^## ", TEXT, flags=re.MULTILINE)
RECIPES = {section.split("\n", 1)[0]: section for section in SECTIONS}
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
ADDRESSES = {"embedder": "127.0.0.1:50051", "predictor": "127.0.0.1:50052"}


class Kitchen:
    """Both services, and a folder in which the blocks run."""

    def __init__(self, folder: Path, addresses: dict[str, str]) -> None:
        self.folder = folder
        self.addresses = addresses

    def run(self, name: str) -> None:
        """Runs the blocks of a recipe; what they print goes to the standard output."""
        names: dict[str, Any] = {}
        for language, block in BLOCK.findall(PREAMBLE) + BLOCK.findall(RECIPES[name]):
            if language == "python":
                exec(compile(self._here(block), name, "exec"), names)
            else:
                self._shell(block)
        names["client"].close()

    def _here(self, block: str) -> str:
        for service, address in ADDRESSES.items():
            block = block.replace(address, self.addresses[service])
        return block

    def _shell(self, block: str) -> None:
        environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "FORETELL_EMBEDDER": self.addresses["embedder"],
            "FORETELL_PREDICTOR": self.addresses["predictor"],
            "OMP_NUM_THREADS": "1",
        }
        done = subprocess.run(
            ["bash", "-euc", block], cwd=self.folder, env=environment,
            capture_output=True, text=True, timeout=240,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr

    def clear(self) -> None:
        """Deletes all items, which the next recipe's users would get as popular ones."""
        with Client(self.addresses["embedder"]) as client:
            items = client.list_items(page_size=1_000).elements
            if items:
                client.delete_items([item.id for item in items])


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("embedder")
    flags = ["--port", "0", "--data-dir", str(folder / "data")]
    with started("embedder", flags, log=folder / "log") as service:
        yield service.address


@contextlib.contextmanager
def opened(folder: Path, embedder: str) -> Iterator[Kitchen]:
    flags = ["--port", "0", "--data-dir", str(folder / "data" / "predictor")]
    flags += ["--embedder", embedder, "--heartbeat-s", "0.2"]
    with started("predictor", flags, log=folder / "predictor.log") as predictor:
        yield Kitchen(folder, {"embedder": embedder, "predictor": predictor.address})


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, embedder: str) -> Iterator[Kitchen]:
    with opened(tmp_path_factory.mktemp("recipes"), embedder) as kitchen:
        yield kitchen


@pytest.fixture
def kitchen(shared: Kitchen, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kitchen]:
    monkeypatch.chdir(shared.folder)
    yield shared
    shared.clear()


@pytest.fixture
def kitchen_of_its_own(
    tmp_path: Path, embedder: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Kitchen]:
    """For a recipe with a version, which would answer the others' users too."""
    monkeypatch.chdir(tmp_path)
    with opened(tmp_path, embedder) as kitchen:
        yield kitchen
        kitchen.clear()


def test_every_recipe_has_a_test() -> None:
    assert list(RECIPES) == [
        "A shop", "A social feed", "A course platform", "A media site", "A health service",
        "A supply chain",
    ]  # fmt: skip


def test_shop(kitchen: Kitchen, capsys: pytest.CaptureFixture[str]) -> None:
    kitchen.run("A shop")
    start, page = capsys.readouterr().out.splitlines()
    assert start.startswith("start page: ['")
    assert "'milk'" in start
    assert "razor" not in start
    assert page == "category page: ['oat-drink', 'razor']"


def test_feed(kitchen: Kitchen, capsys: pytest.CaptureFixture[str]) -> None:
    kitchen.run("A social feed")
    assert capsys.readouterr().out == "feed: ['post-3', 'post-4']\n"


def test_media(kitchen: Kitchen, capsys: pytest.CaptureFixture[str]) -> None:
    kitchen.run("A media site")
    cleo, dan, visitor = capsys.readouterr().out.splitlines()
    assert cleo.startswith("cleo ['film-")
    assert "film-1" not in cleo
    assert "film-3" not in dan
    assert visitor == "visitor: film-4"


def test_health(kitchen: Kitchen, capsys: pytest.CaptureFixture[str]) -> None:
    kitchen.run("A health service")
    missed, left = capsys.readouterr().out.splitlines()
    percent = re.fullmatch(r"missed: (\d+)%, from 5 events", missed)
    assert percent is not None
    assert int(percent[1]) > 20
    assert left == "left: 0"


def test_supply_chain(kitchen: Kitchen, capsys: pytest.CaptureFixture[str]) -> None:
    kitchen.run("A supply chain")
    rows = [re.split(r" {2,}", line) for line in capsys.readouterr().out.splitlines()]
    expected = {row[0]: float(row[1].split(",")[0]) for row in rows}
    assert list(expected) == ["bolt", "nut", "washer", "crane", "steel bolt"]
    assert 120 < expected["bolt"] < 180 > expected["nut"] > expected["washer"] > expected["crane"]
    assert rows[-1][-1].startswith("no events yet")


@pytest.mark.timeout(300)
def test_courses(kitchen_of_its_own: Kitchen, capsys: pytest.CaptureFixture[str]) -> None:
    kitchen_of_its_own.run("A course platform")
    first, *types = capsys.readouterr().out.splitlines()
    assert first in ("next: conditions by courses-1", "next: loops by courses-1")
    assert {line.split()[0] for line in types} >= {"start", "finish", "fail"}
