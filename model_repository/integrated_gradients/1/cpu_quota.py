"""How many threads to compute with: as many as there are cores that this process may use.

PyTorch starts a thread for each core of the machine. In a container that may use a few of them, the kernel then stops
all threads for most of the time. This module reads the quotas of cgroups (`docker run --cpus`, Kubernetes' limits,
systemd's `CPUQuota`), of both versions and of all levels, and the cores that the process is bound to.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

# The setting that replaces the choice: PyTorch, MKL and OpenMP themselves read it.
THREADS_VARIABLE = "OMP_NUM_THREADS"


@dataclass(frozen=True)
class CpuShare:
    """The share of the machine that this process may use.

    Attributes:
        cores: physical cores that it may run on.
        quota: cores that its cgroups let it use, a fraction perhaps; infinite without a quota.
    """

    cores: int
    quota: float

    @property
    def threads(self) -> int:
        """Threads to compute with. A part of a core gets none: at each layer's end all threads wait for the slowest."""
        return max(1, math.floor(min(self.cores, self.quota)))

    def __str__(self) -> str:
        return f"{self.cores} cores" + ("" if math.isinf(self.quota) else f", of which a quota allows {self.quota:g}")


def cpu_share(root: Path = Path("/"), cpus: Collection[int] | None = None) -> CpuShare:
    """The share of the machine that this process may use.

    Args:
        root: of the file system that ``proc`` and ``sys`` are read from.
        cpus: numbers of the CPUs that it may run on; None: asks the kernel.
    """
    allowed = os.sched_getaffinity(0) if cpus is None else cpus
    return CpuShare(_physical_cores(root, allowed), min(_quotas(root), default=math.inf))


def chosen_threads(settings: Mapping[str, str] = os.environ) -> int | None:
    """The threads that OMP_NUM_THREADS asks for; None if it is absent or empty.

    Raises:
        ValueError: it is not a whole number above 0, or several with commas, for nested loops.
    """
    value = settings.get(THREADS_VARIABLE)
    if not value:
        return None
    if not re.fullmatch(r"0*[1-9]\d*(,\d+)*", value):
        raise ValueError(f"{THREADS_VARIABLE} must be a whole number above 0, not {value!r}")
    return int(value.partition(",")[0])


def threads() -> int:
    """The threads that OMP_NUM_THREADS asks for, else those of this process's share.

    Raises:
        ValueError: OMP_NUM_THREADS is malformed.
    """
    return chosen_threads() or cpu_share().threads


def _physical_cores(root: Path, cpus: Collection[int]) -> int:
    """The cores of some CPUs: two hyperthreads share one, and one thread computes as fast as two."""
    topology = root / "sys" / "devices" / "system" / "cpu"
    return len({_read(topology / f"cpu{cpu}" / "topology" / "thread_siblings_list") or str(cpu) for cpu in cpus})


def _quotas(root: Path) -> Iterator[float]:
    """The quota of each cgroup around this process that has one, in cores."""
    for line in _read(root / "proc" / "self" / "mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        where, kind = before.split(), after.split()
        if len(where) < 5 or len(kind) < 3:
            continue
        is_first = kind[0] == "cgroup" and "cpu" in kind[2].split(",")
        if not is_first and kind[0] != "cgroup2":
            continue
        mount = root / where[4].lstrip("/")
        group = mount / _below(_own_group(root, is_first), where[3])
        for folder in (group, *group.parents):
            quota = _first_version(folder) if is_first else _second_version(folder)
            if quota is not None:
                yield quota
            if folder == mount:
                break


def _own_group(root: Path, is_first: bool) -> str:
    """This process's cgroup, in the hierarchy of the first version's CPU controller or in the second version's."""
    for line in _read(root / "proc" / "self" / "cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if "cpu" in controllers.split(",") if is_first else number == "0" and not controllers:
            return group
    return "/"


def _below(group: str, mounted: str) -> PurePosixPath:
    """A cgroup's path from the one that is mounted. A container mounts its own and is told its path on the machine."""
    path = PurePosixPath(group)
    if ".." in path.parts or not path.is_relative_to(mounted):
        return PurePosixPath()
    return path.relative_to(mounted)


def _first_version(folder: Path) -> float | None:
    return _cores(_read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us"))


def _second_version(folder: Path) -> float | None:
    quota, _, period = _read(folder / "cpu.max").partition(" ")
    return _cores(quota, period)


def _cores(quota: str, period: str) -> float | None:
    """Cores, of microseconds in each period; None for ``max`` and -1, which are no quota."""
    if not quota.isdecimal() or not period.isdecimal() or 0 in (int(quota), int(period)):
        return None
    return int(quota) / int(period)


def _read(file: Path) -> str:
    """Content of a file, without spaces at its ends; empty if it cannot be read."""
    try:
        return file.read_text().strip()
    except OSError:
        return ""
