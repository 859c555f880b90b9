"""How much memory there is, as the machine and the control groups of a process tell it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from recon.runtime.device import available_memory

UNLIMITED_1 = 9223372036854771712  # what version 1 says where there is no limit


def group(folder: Path, limit: object, used: int, files: tuple[int, int] = (0, 0), version: int = 2) -> None:
    """Writes what the system says of a control group."""
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    for name, value in zip(names, (limit, used)):
        (folder / name).write_text(f"{value}\n")
    rows = [f"{kind}_file {size}\n" for kind, size in zip(("inactive", "active"), files)]
    # In version 1, the group's own come first, and those of all below it in "total".
    own = ["inactive_file 0\n", "active_file 0\n", *(f"total_{row}" for row in rows)] if version == 1 else rows
    (folder / "memory.stat").write_text("anon 123\n" + "".join(own))


@pytest.fixture
def root(tmp_path):
    """A system of 1000 KiB available, and where its control groups of versions 2 and 1 are."""
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 4000 kB\nMemAvailable:   1000 kB\nBuffers: 1 kB\n")
    return tmp_path


def within(root: Path, lines: str) -> int:
    (root / "proc/self/cgroup").write_text(lines)
    return available_memory(root)


def test_without_groups_it_is_what_the_machine_has(root):
    assert available_memory(root) == 1000 * 1024
    assert available_memory(root / "nowhere") == 0
    assert within(root, "0::/gone\n") == 1000 * 1024


def test_every_group_around_a_process_limits_it(root):
    """As SLURM nests them: the job's limit counts for each of its steps, and what other steps use of it as well."""
    home = root / "sys/fs/cgroup"
    group(home / "job_1/step_0", "max", 100)
    group(home / "job_1", 900_000, 700_000, (50_000, 20_000))
    assert within(root, "0::/job_1/step_0\n") == 900_000 - 700_000 + 70_000  # pages of files can be taken back
    group(home / "job_1/step_0", 300_000, 100_000)
    assert within(root, "0::/job_1/step_0\n") == 200_000
    group(home / "job_1", 2_000_000, 100)
    group(home / "job_1/step_0", 2_000_000, 100)
    assert within(root, "0::/job_1/step_0\n") == 1000 * 1024  # the machine itself has less


def test_in_a_container_the_root_is_its_own_group(root):
    group(root / "sys/fs/cgroup", 500_000, 100_000)
    assert within(root, "0::/\n") == within(root, "0::/../outside\n") == within(root, "0::/docker/1234\n") == 400_000
    group(root / "sys/fs/cgroup", 500_000, 600_000)
    assert within(root, "0::/\n") == 1  # nothing is left, which is not the same as not to know


def test_groups_of_version_1(root):
    lines = "9:name=systemd:/\n5:cpu,cpuacct:/job\n4:hugetlb,memory:/job/task\n0::/\n"
    home = root / "sys/fs/cgroup/memory"
    group(home, UNLIMITED_1, 10, version=1)
    group(home / "job", 400_000, 300_000, (30_000, 1_000), version=1)
    group(home / "job/task", UNLIMITED_1, 10, version=1)
    assert within(root, lines) == 131_000


@pytest.mark.parametrize("own, kept", [({}, "16"), ({"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "7", "LRU_CACHE_CAPACITY": "7"}, "7")])
def test_few_compiled_products_are_kept_unless_somebody_says_otherwise(own, kept):
    """Of experts, no two products have one shape; the memory that it saves is in the slow tests of `test_plan.py`."""
    names = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
    environment = {name: value for name, value in os.environ.items() if name not in names} | own
    code = f"""
import os
before = dict(os.environ)
import recon
assert dict(os.environ) == before
from recon.runtime.device import limit_compiled_shapes
assert all(os.environ.get(name) == before.get(name) for name in {names})
limit_compiled_shapes()
print(*(os.environ[name] for name in {names}))
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [kept, kept]
