"""What a container engine would read: checked against the compose schema and the real commands."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from embedder.settings import EmbedderSettings
from predictor.settings import PredictorSettings
from serving.security import check_binding, read_tokens
from serving.settings import ServiceSettings, load

ROOT = Path(__file__).parents[1]
COMPOSE = ROOT / "docker-compose.yml"
KINDS: dict[str, type[ServiceSettings]] = {
    "embedder": EmbedderSettings,
    "predictor": PredictorSettings,
}


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(COMPOSE.read_text())
    return loaded


@pytest.fixture(scope="module")
def services(compose: dict[str, Any]) -> dict[str, Any]:
    loaded: dict[str, Any] = compose["services"]
    return loaded


def test_compose_file_follows_the_schema() -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    done = subprocess.run([*command, COMPOSE], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


def test_commands_are_ones_that_the_services_understand(services: dict[str, Any]) -> None:
    watching = {"prometheus", "grafana"}
    assert set(services) == {"embedder", "embedder-gpu", "predictor"} | watching
    for name, service in services.items():
        if name in watching:
            continue
        module, *arguments = service["command"]
        settings = load(KINDS[module], arguments, module)
        assert (settings.host, str(settings.data_dir)) == ("0.0.0.0", "/data"), name  # type: ignore[attr-defined]
        assert service["ports"] == [f"127.0.0.1:{settings.port}:{settings.port}"]
        assert service["healthcheck"]["test"][-1] == f"127.0.0.1:{settings.port}"
        assert int(service["stop_grace_period"].removesuffix("s")) > settings.grace_s
        check_binding(settings)


def test_secrets_are_the_files_that_readme_makes(compose: dict[str, Any], tmp_path: Path) -> None:
    readme = (ROOT / "README.md").read_text()
    steps = re.search(r"<!-- the secrets.*?-->\n```bash\n(.*?)```", readme, re.DOTALL)
    assert steps
    subprocess.run(["bash", "-euc", steps[1]], cwd=tmp_path, check=True, timeout=30)
    files = {name: tmp_path / secret["file"] for name, secret in compose["secrets"].items()}
    for service in compose["services"].values():
        words = [*service.get("command", ()), *service.get("environment", {}).values()]
        named = {Path(word).name for word in words if "/run/secrets/" in word}
        assert named == set(service.get("secrets", ())) <= files.keys()
    mine = (tmp_path / "secrets/token").read_text().strip()
    shown = files["embedder-token"].read_text().strip()
    known = {entry.name: entry.token for entry in read_tokens(files["embedder-tokens"])}
    assert known == {"me": mine, "predictor": shown}
    assert [entry.token for entry in read_tokens(files["predictor-tokens"])] == [mine]
    assert len(files["grafana-password"].read_text().strip()) == 32
    assert {file.stat().st_mode & 0o077 for file in files.values()} == {0}


def test_prometheus_reads_the_services_and_grafana_reads_it(services: dict[str, Any]) -> None:
    metrics = {name: load(kind, services[name]["command"][1:], name).metrics_port
               for name, kind in KINDS.items()}  # fmt: skip
    config = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())
    targets = {job["job_name"]: job["static_configs"][0]["targets"] for job in
               config["scrape_configs"]}  # fmt: skip
    assert targets == {name: [f"{name}:{port}"] for name, port in metrics.items()}
    # The page has neither TLS nor token: it is not for this host's network.
    published = [port for service in services.values() for port in service["ports"]]
    assert not [port for port in published if port.rsplit(":", 1)[1] in map(str, metrics.values())]
    mounts = mounted(services["prometheus"])
    flag = next(one for one in services["prometheus"]["command"] if "--config.file" in one)
    file = Path(flag.split("=")[1])
    assert (ROOT / mounts[str(file.parent)] / file.name).is_file()

    grafana = mounted(services["grafana"])
    provisioning = ROOT / grafana["/etc/grafana/provisioning"]
    (source,) = read(provisioning / "datasources" / "prometheus.yml")["datasources"]
    assert source["url"] == f"http://prometheus:{port_of(services['prometheus'])}"
    (provider,) = read(provisioning / "dashboards" / "foretell.yml")["providers"]
    assert (ROOT / grafana[provider["options"]["path"]] / "foretell.json").is_file()


def test_every_container_restarts_is_probed_and_keeps_its_data(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        assert service["restart"] == "unless-stopped", name
        probe = service["healthcheck"]["test"]
        assert port_of(service) in probe[-1], name
        kept = [one.split(":")[0] for one in service["volumes"] if not one.startswith(".")]
        assert len(kept) == 1, name
        assert kept[0] in compose["volumes"], name
        if "image" in service:
            assert re.search(r":v?\d+\.\d+\.\d+$", service["image"]), name


def mounted(service: dict[str, Any]) -> dict[str, str]:
    """Path in the container to path in the repository."""
    pairs = (one.split(":") for one in service["volumes"])
    return {pair[1]: pair[0] for pair in pairs if pair[0].startswith("./")}


def port_of(service: dict[str, Any]) -> str:
    (port,) = service["ports"]
    return str(port).rsplit(":", 1)[1]


def read(file: Path) -> Any:
    return yaml.safe_load(file.read_text())


def test_only_the_gpu_profile_reserves_a_gpu(services: dict[str, Any]) -> None:
    reserving = [name for name, service in services.items() if "deploy" in service]
    assert reserving == ["embedder-gpu"]
    assert services["embedder-gpu"]["profiles"] == ["gpu"]
    assert services["embedder"]["profiles"] == ["cpu"]


def test_image_copies_what_the_packages_are_built_from() -> None:
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    copied = {word for line in lines if line.startswith("COPY ") for word in line.split()[1:-1]}
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().split() if line[0] == "!"}
    assert {"client", "serving", "embedder", "predictor", "constraints.txt"} <= copied & kept
    assert all((ROOT / name).exists() for name in kept)


MANIFESTS = sorted((ROOT / "deploy" / "kubernetes" / "base").glob("*.yaml"))


@pytest.fixture(scope="module")
def resources() -> list[dict[str, Any]]:
    """All that the kustomization applies."""
    listed = yaml.safe_load(MANIFESTS[0].with_name("kustomization.yaml").read_text())["resources"]
    files = [MANIFESTS[0].with_name(name) for name in listed]
    return [one for file in files for one in yaml.safe_load_all(file.read_text())]


def test_manifests_follow_the_schemas_of_kubernetes(resources: list[dict[str, Any]]) -> None:
    assert {one["kind"] for one in resources} == {"Namespace", "Service", "StatefulSet"}
    for one in resources:
        kubernetes_validate.validate(one, "1.37", strict=True)


def test_pods_run_what_the_services_understand(resources: list[dict[str, Any]]) -> None:
    pods = [one["spec"]["template"]["spec"] for one in resources if one["kind"] == "StatefulSet"]
    assert len(pods) == 2
    for pod in pods:
        (container,) = pod["containers"]
        module, *arguments = container["args"]
        settings = load(KINDS[module], arguments, module)
        check_binding(settings)
        assert module == "embedder" or settings.processes == 2  # type: ignore[attr-defined]
        pages = range(getattr(settings, "processes", 1))
        assert {one["name"]: one["containerPort"] for one in container["ports"]} == {
            "grpc": settings.port,
            **{f"metrics-{n}" if n else "metrics": settings.metrics_port + n for n in pages},
        }
        assert container["readinessProbe"]["grpc"]["port"] == settings.port
        assert pod["terminationGracePeriodSeconds"] > settings.grace_s + settings.drain_s
        mounted = {one["mountPath"] for one in container["volumeMounts"]}
        assert {"/data", str(settings.tokens_file.parent)} <= mounted  # type: ignore[union-attr]
        assert f"--uid {pod['securityContext']['runAsUser']} " in (ROOT / "Dockerfile").read_text()


def test_a_breaking_change_of_the_contracts_is_refused(tmp_path: Path) -> None:
    for name in ("protos", "third_party"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / "buf.yaml", tmp_path)
    buf = str(Path(sys.executable).with_name("buf"))
    command = [buf, "breaking", "protos", "--against", "protos/released.binpb"]
    file = tmp_path / "protos" / "foretell" / "predictor" / "v1" / "event_service.proto"
    for before, after, status in (("", "", 0), ("behavior_type = 2;", "behavior_type = 9;", 100)):
        file.write_text(file.read_text().replace(before, after) if before else file.read_text())
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path)
        assert done.returncode == status, done.stdout
