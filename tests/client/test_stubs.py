"""The documented commands make stubs of other languages."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BIN = ROOT / "client" / "node" / "node_modules" / ".bin"


@pytest.mark.external
@pytest.mark.parametrize(
    ("language", "plugin", "made"),
    [
        ("go", "protoc-gen-go-grpc", "go/foretell/predictor/v1/prediction_service_grpc.pb.go"),
        ("java", "grpc_java_plugin", "java/com/foretell/predictor/v1/PredictionServiceGrpc.java"),
        ("typescript", "protoc-gen-es", "ts/foretell/predictor/v1/prediction_service_pb.ts"),
    ],
)
def test_stubs_are_generated(language: str, plugin: str, made: str, tmp_path: Path) -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), str(BIN), os.environ["PATH"]])
    found = shutil.which(plugin, path=path)
    if found is None:
        pytest.skip(f"no {plugin}: make deps-external")
    if language == "java":  # Debian's name of it is another
        (tmp_path / "protoc-gen-grpc-java").symlink_to(found)
    buf = Path(sys.executable).with_name("buf")
    command = [buf, "generate", "--template", f"client/stubs/{language}.yaml", "-o", tmp_path]
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{path}"}
    done = subprocess.run(
        list(map(str, command)),
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "Predict" in (tmp_path / "gen" / made).read_text()
