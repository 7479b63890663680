"""Both distributions build; the client's installs in an empty environment, without torch."""

import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("wheels")
    for project in (ROOT / "client", ROOT):
        run(
            *(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"),
            *("--no-build-isolation", "--wheel-dir", folder, project),
        )
    return {path.name.split("-")[0]: path for path in folder.glob("*.whl")}


def names(wheel: Path) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


def test_services_wheel_holds_the_services_and_what_they_read(wheels: dict[str, Path]) -> None:
    files = names(wheels["foretell_services"])
    assert {"embedder/__main__.py", "predictor/__main__.py", "serving/server.py"} <= files
    assert "serving/demo/report.html.j2" in files
    assert "predictor/learning/reports/comparison.html.j2" in files
    assert not [name for name in files if name.startswith(("foretell/", "tests/", "client/"))]


def test_client_wheel_holds_stubs_and_types(wheels: dict[str, Path]) -> None:
    files = names(wheels["foretell"])
    assert {"foretell/py.typed", "foretell/embedder/v1/embedder_service_pb2.py"} <= files
    assert not [name for name in files if not name.startswith(("foretell/", "foretell-"))]


@pytest.mark.timeout(300)
def test_client_installs_in_an_empty_environment_without_torch(
    wheels: dict[str, Path], tmp_path: Path
) -> None:
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    constraints = ROOT / "constraints.txt"
    run(python, "-m", "pip", "install", "--quiet", "-c", constraints, wheels["foretell"])
    installed = run(python, "-m", "pip", "list", "--format=freeze").lower()
    assert "grpcio==" in installed
    assert not [
        line for line in installed.splitlines() if line.startswith(("torch", "faiss", "pandas"))
    ]
    # The fake of both services answers with nothing else installed.
    script = (
        "import foretell, foretell.testing\n"
        "with foretell.testing.FakeServices() as fakes:\n"
        "    with foretell.Client(fakes.embedder_address, fakes.predictor_address) as client:\n"
        "        client.upsert_items([foretell.Item('tea', 'green tea')])\n"
        "        print(client.search(texts=['tea']).hits[0].ids)\n"
    )
    assert run(python, "-c", script).strip() == "('tea',)"
    assert "usage" in run(tmp_path / "venv" / "bin" / "foretell", "--help")
