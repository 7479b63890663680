"""How many CPUs this process may use."""

import math
import os
from pathlib import Path

_CGROUP_LIMIT = Path("/sys/fs/cgroup/cpu.max")


def available() -> int:
    """CPUs by affinity and by the container's quota (cgroup v2), at least 1.

    A container's quota does not show in `os.cpu_count()`; a thread per CPU of the host would
    then fight over a few CPUs' time.
    """
    cpus = len(os.sched_getaffinity(0))
    try:
        quota, period = _CGROUP_LIMIT.read_text().split()
        if quota != "max":
            cpus = min(cpus, math.ceil(int(quota) / int(period)))
    except (OSError, ValueError):  # no cgroup v2: no quota to respect
        pass
    return max(1, cpus)
