"""What control groups, ``ulimit`` and cores of several kinds leave, on machines made up."""

from pathlib import Path

import psutil
import pytest

from hybrid.errors import UsageError
from hybrid.machine import host, limits

GIB = 2**30
V2 = "30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"
V1 = (
    "31 23 0:27 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
    "32 23 0:28 {base} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
)


def write(root: Path, files: dict[str, object]) -> Path:
    """Put files below a root."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    return root


def test_the_tightest_of_nested_groups_counts(tmp_path):
    """A service's slice may be tighter than the service's own scope, and one of each may count."""
    group = "sys/fs/cgroup/user.slice/job.scope"
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/user.slice/job.scope",
            "proc/self/mountinfo": V2,
            f"{group}/cpu.max": "max 100000",
            f"{group}/memory.max": 8 * GIB,
            f"{group}/memory.current": GIB,
            "sys/fs/cgroup/user.slice/cpu.max": "150000 100000",
            "sys/fs/cgroup/user.slice/memory.max": 4 * GIB,
            "sys/fs/cgroup/user.slice/memory.high": "max",
            "sys/fs/cgroup/user.slice/memory.current": 3 * GIB,
            "sys/fs/cgroup/user.slice/memory.stat": f"anon 5\ninactive_file {GIB}\nactive_file 7",
        },
    )
    assert limits.cpu_limit(root) == (1.5, "control group sys/fs/cgroup/user.slice")
    assert limits.memory_limit(root) == (4 * GIB, "control group sys/fs/cgroup/user.slice")
    assert limits.memory_left(root).value == 2 * GIB + 7


@pytest.mark.parametrize("base", ["/", "/docker/1234"])
def test_groups_of_the_first_version_count(tmp_path, base):
    """A container sees its own group where the system's are mounted; -1 is no limit."""
    inside = "" if base != "/" else "docker/1234/"
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/docker/1234\n3:cpu,cpuacct:/docker/1234\n0::/",
            "proc/self/mountinfo": V1.format(base=base),
            f"sys/fs/cgroup/memory/{inside}memory.limit_in_bytes": 2 * GIB,
            f"sys/fs/cgroup/memory/{inside}memory.usage_in_bytes": GIB,
            f"sys/fs/cgroup/memory/{inside}memory.stat": "total_inactive_file 100\ncache 9",
            "sys/fs/cgroup/cpu,cpuacct/docker/1234/cpu.cfs_quota_us": 250000,
            "sys/fs/cgroup/cpu,cpuacct/docker/1234/cpu.cfs_period_us": 100000,
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": -1,
        },
    )
    assert limits.cpu_limit(root).value == 2.5
    assert limits.memory_limit(root).value == 2 * GIB
    assert limits.memory_left(root).value == GIB + 100


def test_a_group_outside_what_is_mounted_is_the_mounted_one(tmp_path):
    """With a namespace of its own a container is told of a path that it cannot see."""
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/../elsewhere",
            "proc/self/mountinfo": V2,
            "sys/fs/cgroup/memory.max": GIB,
            "sys/fs/cgroup/cpu.max": "50000 100000",
        },
    )
    assert limits.memory_limit(root).value == GIB
    assert limits.cpu_limit(root).value == 0.5


def test_no_group_is_no_limit(tmp_path):
    """Neither where nothing is told, nor where version 1 writes its largest number."""
    assert limits.cpu_limit(tmp_path) is None
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/",
            "proc/self/mountinfo": V1.format(base="/"),
            "sys/fs/cgroup/memory/memory.limit_in_bytes": 9223372036854771712,
        },
    )
    assert limits.memory_limit(root) is None


def test_ulimit_counts(monkeypatch, tmp_path):
    """``ulimit -v`` is a limit on memory, of which what is mapped is gone."""
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(
        resource,
        "getrlimit",
        lambda kind: (64 * GIB if kind == resource.RLIMIT_AS else resource.RLIM_INFINITY, -1),
    )
    assert limits.memory_limit(tmp_path) == (64 * GIB, "ulimit -v")
    assert 0 < limits.memory_left(tmp_path).value < 64 * GIB


def processors(root: Path, monkeypatch, cores: list[tuple[str, dict[str, object]]]) -> Path:
    """Make up processors, each with its core's siblings and what else the kernel tells."""
    monkeypatch.setattr(limits, "_allowed", lambda: set(range(len(cores))))
    for number, (siblings, told) in enumerate(cores):
        folder = f"sys/devices/system/cpu/cpu{number}"
        write(root, {f"{folder}/topology/thread_siblings_list": siblings})
        write(root, {f"{folder}/{name}": value for name, value in told.items()})
    return root


def test_slow_cores_that_all_would_wait_for_are_left_idle(tmp_path, monkeypatch):
    """Four big cores of capacity 1024 beside four of 250 (big.LITTLE) compute alone."""
    big, little = {"cpu_capacity": 1024}, {"cpu_capacity": 250}
    cores = [(str(n), big if n < 4 else little) for n in range(8)]
    speeds = limits.core_speeds(processors(tmp_path, monkeypatch, cores))
    assert speeds == [1024] * 4 + [250] * 4
    assert limits.fastest_number(speeds) == 4


def test_e_cores_take_part_where_there_are_enough(tmp_path, monkeypatch):
    """Six P cores of two threads at 5 GHz, with 2 or 8 E cores at 3.5 GHz: 6 and 14 threads."""
    fast, slow = {"cpufreq/cpuinfo_max_freq": 5000000}, {"cpufreq/cpuinfo_max_freq": 3500000}
    cores = [(f"{n // 2 * 2}-{n // 2 * 2 + 1}", fast) for n in range(12)]
    cores += [(str(n), slow) for n in range(12, 20)]
    root = processors(tmp_path, monkeypatch, cores)
    write(root, {"sys/devices/cpu_atom/cpus": "12-19"})
    speeds = limits.core_speeds(root)
    assert len(speeds) == 14
    assert speeds[-1] == pytest.approx(0.6 * 3500000)
    assert [limits.fastest_number(speeds[:8]), limits.fastest_number(speeds)] == [6, 6]
    assert limits.fastest_number([1.0] * 6 + [0.6] * 8) == 14


def test_two_threads_of_one_core_are_one_core(tmp_path, monkeypatch):
    """``taskset`` to both threads of a core leaves one core to keep busy."""
    root = processors(tmp_path, monkeypatch, [("0-1", {}), ("0-1", {})])
    speeds = limits.core_speeds(root)
    assert len(speeds) == 1
    monkeypatch.setattr(limits, "core_speeds", lambda: speeds)
    monkeypatch.setattr(limits, "cpu_limit", lambda: None)
    assert host.usable_cores() == 1


def test_a_limit_counts_in_every_question_about_memory(monkeypatch):
    """What is there in all, what is free and what may be asked for, with who set the limit."""
    total = psutil.virtual_memory().total
    monkeypatch.setattr(limits, "memory_limit", lambda: limits.Limit(GIB, "ulimit -v"))
    monkeypatch.setattr(limits, "memory_left", lambda: limits.Limit(4096, "ulimit -v"))
    assert (host.memory_bytes(), host.available_memory_bytes()) == (GIB, 4096)
    with pytest.raises(UsageError, match=r"this process \(ulimit -v\)"):
        host.checked_ram(2 * GIB)
    monkeypatch.setattr(limits, "memory_limit", lambda: limits.Limit(2 * total, "a group"))
    assert host.memory_bytes() == total
