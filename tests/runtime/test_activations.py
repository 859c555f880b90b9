"""The store on disk: what goes in comes out, within its bounds, and nothing is left behind."""

import logging
import os
import subprocess
import sys

import torch

from recon.runtime.activations import Activations


def test_what_goes_in_comes_out(tmp_path):
    store = Activations(folder=tmp_path)
    tensor = torch.randn(3, 4, 5).transpose(0, 2)
    kept = store.put("one", tensor)
    assert torch.equal(kept, tensor) and torch.equal(store.get("one"), tensor)
    assert kept.data_ptr() != tensor.data_ptr()
    assert store.put("one", torch.zeros(1)) is kept  # the first stays
    assert store.get("other") is None
    assert store.bytes == tensor.numel() * 4


def test_files_have_no_names_and_the_disk_gets_its_room_back(tmp_path):
    store = Activations(folder=tmp_path)
    kept = store.put("one", torch.ones(1000))
    assert list(tmp_path.iterdir()) == []
    mine = f"{tmp_path}/recon-"
    assert any(mine in line for line in open("/proc/self/maps"))
    del store, kept
    assert not any(mine in line for line in open("/proc/self/maps"))


def test_released_pages_are_read_again(tmp_path):
    def resident():
        return int(open("/proc/self/status").read().split("RssFile:")[1].split()[0]) // 1024  # MiB

    store, tensor = Activations(folder=tmp_path), torch.arange(2**24, dtype=torch.float32)
    before = resident()
    kept = store.put("one", tensor)
    assert resident() > before + 50
    store.release()
    assert resident() < before + 10
    assert torch.equal(kept, tensor)


def test_bounded(tmp_path):
    store = Activations(limit=100, folder=tmp_path)
    small, large = torch.ones(20), torch.ones(6)
    assert store.put("small", small) is not small
    assert store.put("large", large) is large and store.get("large") is None
    assert Activations(limit=0).put("small", small) is small


def test_a_full_disk_is_said_and_survived(tmp_path, monkeypatch, caplog):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    store, tensor = Activations(folder=tmp_path), torch.ones(3)
    with caplog.at_level(logging.WARNING, "recon"):
        assert store.put("one", tensor) is tensor
        assert store.put("two", tensor) is tensor
    assert [record.message for record in caplog.records] == [
        "activations are no longer kept on disk: [Errno 28] No space left on device"
    ]
    assert list(tmp_path.iterdir()) == []


def test_a_killed_process_leaves_nothing(tmp_path):
    code = f"""
import os, signal, torch
from recon.runtime.activations import Activations
store = Activations(folder={str(tmp_path)!r})
store.put("one", torch.ones(1000))
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    assert list(tmp_path.iterdir()) == []
