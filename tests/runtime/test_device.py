"""How much memory there is, as the machine and the control groups of a process tell it."""

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from recon.runtime.device import available_memory


def group(folder: Path, limit: object, used: int, files: tuple[int, int] = (0, 0)) -> None:
    """Writes what the system says of a control group."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text("anon 123\ninactive_file {}\nactive_file {}\n".format(*files))


@pytest.fixture
def within(tmp_path, monkeypatch):
    """What a process can use that is in these control groups, on a machine that has a million bytes left."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1_000_000))
    (tmp_path / "proc/self").mkdir(parents=True)

    def available(lines: str) -> int:
        (tmp_path / "proc/self/cgroup").write_text(lines)
        return available_memory(tmp_path)

    return available


def test_every_group_around_a_process_limits_it(tmp_path, within):
    """As SLURM nests them: the job's limit counts for each of its steps, and what other steps use of it as well."""
    home = tmp_path / "sys/fs/cgroup"
    group(home / "job_1/step_0", "max", 100)
    group(home / "job_1", 900_000, 700_000, (50_000, 20_000))
    assert within("1:name=systemd:/\n0::/job_1/step_0\n") == 900_000 - 700_000 + 70_000  # pages of files can be taken back
    group(home / "job_1/step_0", 300_000, 100_000)
    assert within("0::/job_1/step_0\n") == 200_000
    group(home / "job_1", 2_000_000, 100)
    group(home / "job_1/step_0", 2_000_000, 100)
    assert within("0::/job_1/step_0\n") == 1_000_000  # the machine itself has less


def test_without_groups_it_is_what_the_machine_has_and_in_a_container_the_root_is_a_group(tmp_path, within):
    assert within("0::/gone\n") == within("4:memory:/of-version-1\n") == available_memory(tmp_path / "nowhere") == 1_000_000
    group(tmp_path / "sys/fs/cgroup", 500_000, 100_000)
    assert within("0::/\n") == within("0::/../outside\n") == within("0::/docker/1234\n") == 400_000
    group(tmp_path / "sys/fs/cgroup", 500_000, 600_000)
    assert within("0::/\n") == 1  # nothing is left, which is not the same as not to know
