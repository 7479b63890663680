import os
from pathlib import Path

import pytest

from serving import cpus


@pytest.mark.parametrize(
    ("limit", "expected"), [("max 100000", 8), ("150000 100000", 2), ("50000 100000", 1), ("?", 8)]
)
def test_the_containers_quota_counts(
    limit: str, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "cpu.max"
    file.write_text(limit + "\n")
    monkeypatch.setattr(cpus, "_CGROUP_LIMIT", file)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert cpus.available() == expected


def test_without_a_container_the_affinity_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpus, "_CGROUP_LIMIT", tmp_path / "none")
    assert cpus.available() == len(os.sched_getaffinity(0))
