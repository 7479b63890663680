"""The README is true: its settings are the services' own, and its steps work as they stand."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from embedder.settings import EmbedderSettings
from predictor.settings import PredictorSettings
from serving.settings import ServiceSettings

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()

ITEMS = """item_id,text,kind
tea,green tea with lemon,drink
juice,fresh orange juice,drink
coffee,ground coffee,drink
bread,rye bread,food
cheese,mild cheese,food
soap,hand soap,home
"""


def settings_table(*kinds: type[ServiceSettings]) -> str:
    """The README's table of settings, made from the classes."""
    lines = ["| setting | service | default | what it is |", "|---|---|---|---|"]
    for kind in kinds:
        service = kind.model_config["env_prefix"].split("_")[1].lower()
        for name, field in kind.model_fields.items():
            shared = name in ServiceSettings.model_fields and all(
                other.model_fields[name].default == field.default for other in kinds
            )
            if shared and kind is not kinds[0]:
                continue
            default = getattr(field.default, "value", field.default)
            text = " ".join((field.description or "").split())
            who = "both" if shared else service
            shown = "" if default in (None, "") else f"`{default}`"
            lines.append(f"| `{name}` | {who} | {shown} | {text} |")
    return "\n".join(lines)


def test_settings_are_those_of_the_services() -> None:
    assert settings_table(EmbedderSettings, PredictorSettings) in README


def write_data(folder: Path) -> None:
    (folder / "items.csv").write_text(ITEMS)
    rows = ["user_id,behavior_type,item_id,timestamp"]
    cycle = ["tea", "bread", "juice", "cheese", "coffee", "soap"]
    for user in ["anna", *(f"user-{number}" for number in range(30))]:
        for day in range(1, 13):
            kind = "buy" if day % 3 else "view"
            rows.append(f"{user},{kind},{cycle[(day + len(user)) % 6]},2026-01-{day:02}T10:00:00Z")
    (folder / "events.csv").write_text("\n".join(rows))


@pytest.mark.timeout(300)
def test_own_data_step_by_step(tmp_path: Path, free_ports: tuple[int, int]) -> None:
    """Runs the block as it stands in the README, on free ports."""
    match = re.search(r"<!-- the steps.*?-->\n```bash\n(.*?)```", README, re.DOTALL)
    assert match is not None
    script = match[1].replace("source .venv/bin/activate", "")
    write_data(tmp_path)
    embedder, predictor = free_ports
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "FORETELL_EMBEDDER_PORT": str(embedder),
        "FORETELL_PREDICTOR_PORT": str(predictor),
        "FORETELL_PREDICTOR_EMBEDDER": f"127.0.0.1:{embedder}",
        "FORETELL_EMBEDDER": f"127.0.0.1:{embedder}",
        "FORETELL_PREDICTOR": f"127.0.0.1:{predictor}",
    }
    done = subprocess.run(
        ["bash", "-euc", f"trap 'kill $(jobs -p); wait' EXIT\n{script}"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    answer = done.stdout.rsplit("ready at", 1)[1]
    assert "buy" in answer
    assert "Traceback" not in done.stderr
    searched = answer[answer.rindex("juice") :] if "juice" in answer else ""
    assert searched, answer
    assert (tmp_path / "rejected-items.csv").read_text().count("\n") <= 1


def test_python_example_runs(tmp_path: Path) -> None:
    """The ten lines, against the fake services."""
    match = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert match is not None
    script = match[1].replace(
        'foretell.Client(embedder="127.0.0.1:50051", predictor="127.0.0.1:50052")',
        "foretell.testing.FakeServices() as fakes, "
        "foretell.Client(fakes.embedder_address, fakes.predictor_address)",
    )
    done = subprocess.run(
        [sys.executable, "-c", f"import foretell.testing\n{script}"],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "buy" in done.stdout
    assert "tea-1" in done.stdout
