"""Threads follow the quotas of cgroups and the cores that a process is bound to, on made-up file systems."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cpu_quota import CpuShare, chosen_threads, cpu_share

from tools.paths import MODEL_REPOSITORY

V1 = "32 31 0:30 {mounted} /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct"
V2 = "32 31 0:30 {mounted} /sys/fs/cgroup rw,relatime - cgroup2 cgroup2 rw"
# As V2, beside version 1: it has no CPU controller there.
HYBRID = "33 31 0:31 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw"
SIXTY_FOUR = range(64)


def machine(root: Path, mounts: str, group: str, **files: str) -> Path:
    """A file system with cgroups. Names of ``files`` are paths with ``__`` for each slash."""
    proc = root / "proc" / "self"
    proc.mkdir(parents=True)
    (proc / "mountinfo").write_text(f"23 1 0:20 / / rw - ext4 /dev/vda rw\n{mounts}\n")
    (proc / "cgroup").write_text(f"12:name=systemd:/elsewhere\n{group}\n")
    for name, content in files.items():
        file = root / "sys" / "fs" / "cgroup" / name.replace("__", "/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{content}\n")
    return root


def first(root: Path, quota: str, period: str = "100000", group: str = "/", mounted: str = "/", at: str = "") -> Path:
    folder = f"cpu,cpuacct__{at}"
    files = {f"{folder}cpu.cfs_quota_us": quota, f"{folder}cpu.cfs_period_us": period}
    return machine(root, V1.format(mounted=mounted), f"4:cpu,cpuacct:{group}", **files)


@pytest.mark.parametrize(
    ("quota", "period", "cores"),
    [
        ("400000", "100000", 4),
        ("50000", "100000", 0.5),
        ("250000", "100000", 2.5),
        ("20000", "10000", 2),
        ("-1", "100000", math.inf),
        ("max", "100000", math.inf),
    ],
)
@pytest.mark.parametrize("version", [1, 2])
def test_a_quota_is_read_in_cores(tmp_path, version, quota, period, cores):
    if version == 1:
        root = first(tmp_path, quota, period)
    else:
        root = machine(tmp_path, V2.format(mounted="/"), "0::/", **{"cpu.max": f"{quota} {period}"})
    assert cpu_share(root, SIXTY_FOUR) == CpuShare(64, cores)


@pytest.mark.parametrize(
    ("cores", "quota", "threads"),
    [(64, 4, 4), (64, 0.5, 1), (64, 2.5, 2), (2, 4, 2), (8, math.inf, 8), (4, 1.99, 1)],
)
def test_there_are_as_many_threads_as_whole_cores_and_at_least_one(cores, quota, threads):
    assert CpuShare(cores, quota).threads == threads


def test_the_smallest_quota_of_all_levels_counts(tmp_path):
    files = {"a.slice__cpu.max": "300000 100000", "a.slice__b.service__cpu.max": "max 100000"}
    root = machine(tmp_path, V2.format(mounted="/"), "0::/a.slice/b.service", **files, **{"a.slice__c__cpu.max": "1 1"})
    assert cpu_share(root, SIXTY_FOUR).quota == 3
    (tmp_path / "sys/fs/cgroup/a.slice/b.service/cpu.max").write_text("150000 100000")
    assert cpu_share(root, SIXTY_FOUR).quota == 1.5


def test_a_container_of_version_1_that_is_told_its_path_on_the_machine_reads_its_own_quota(tmp_path):
    own = "/kubepods/burstable/pod1/container2"
    root = first(tmp_path, "200000", group=own, mounted=own)
    assert cpu_share(root, SIXTY_FOUR).quota == 2


@pytest.mark.parametrize(("mounted", "group"), [("/", "/../../other"), ("/own", "/other")])
def test_a_group_outside_what_is_mounted_leaves_what_is_mounted(tmp_path, mounted, group):
    root = machine(tmp_path, V2.format(mounted=mounted), f"0::{group}", **{"cpu.max": "200000 100000"})
    assert cpu_share(root, SIXTY_FOUR).quota == 2


def test_version_1_with_version_2_beside_it(tmp_path):
    files = {"cpu,cpuacct__a__cpu.cfs_quota_us": "100000", "cpu,cpuacct__a__cpu.cfs_period_us": "100000"}
    mounts = "\n".join([V1.format(mounted="/"), HYBRID])
    root = machine(tmp_path, mounts, "4:cpu,cpuacct:/a\n0::/init.scope", **files)
    assert cpu_share(root, SIXTY_FOUR).quota == 1


def test_without_cgroups_there_is_no_quota(tmp_path):
    assert cpu_share(tmp_path, range(3)) == CpuShare(3, math.inf)
    assert str(cpu_share(tmp_path, range(3))) == "3 cores"
    assert str(CpuShare(64, 2.5)) == "64 cores, of which a quota allows 2.5"


def test_two_hyperthreads_are_one_core(tmp_path):
    for cpu, siblings in enumerate(["0,2", "1,3", "0,2", "1,3"]):
        folder = tmp_path / f"sys/devices/system/cpu/cpu{cpu}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{siblings}\n")
    assert cpu_share(tmp_path, range(4)).cores == 2
    assert cpu_share(tmp_path, {0, 2}).cores == 1


def test_a_process_that_is_bound_to_a_core_has_one():
    """In a process of its own, on this machine."""
    program = (
        f"import os, sys; sys.path.append({str(MODEL_REPOSITORY / 'integrated_gradients' / '1')!r})\n"
        f"os.sched_setaffinity(0, {{{min(os.sched_getaffinity(0))}}})\n"
        "from cpu_quota import cpu_share; print(cpu_share().threads)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout == "1\n"


def test_the_setting_is_a_number():
    assert chosen_threads({}) is chosen_threads({"OMP_NUM_THREADS": ""}) is None
    assert chosen_threads({"OMP_NUM_THREADS": "3"}) == chosen_threads({"OMP_NUM_THREADS": "3,2"}) == 3
    for value in ("0", "many", "-1", "2.5"):
        with pytest.raises(ValueError, match="OMP_NUM_THREADS must be a whole number above 0"):
            chosen_threads({"OMP_NUM_THREADS": value})
