"""Blocks of the shape of a 7B Llama, streamed: memory depends on the size of a block, not on their number."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fixtures.large import write_random_llama
from safetensors import safe_open

from recon.data import files
from recon.study.record import read_record

pytestmark = pytest.mark.slow
LAYERS = 3  # 32 make 13 GB of weights, and take half an hour


def anonymous(process: subprocess.Popen) -> int:
    """Bytes of resident memory that is not mapped from files."""
    try:
        return 1024 * int(Path(f"/proc/{process.pid}/status").read_text().split("RssAnon:")[1].split()[0])
    except (OSError, IndexError):
        return 0


def test_four_gibibytes_are_enough(tmp_path):
    write_random_llama(tmp_path / "model", num_hidden_layers=LAYERS)
    saved, record = tmp_path / "saved", tmp_path / "record.json"
    command = [
        sys.executable, "-m", "recon.cli", "run", "--model", str(tmp_path / "model"), "--stream", "yes", "--samples", "2",
        "--sequence-length", "128", "--held-out-samples", "0", "--evaluation-samples", "1", "--evaluation-length", "128",
        "--learning-rate", "1e-4", "--save", str(saved), "--record", str(record),
    ]  # fmt: skip
    peak = 0
    for killed_after in (3, 7, None):  # windows: on the way, and never
        process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, env=os.environ, text=True)
        work = tmp_path / "saved.unfinished"
        while process.poll() is None:
            time.sleep(0.02)
            peak = max(peak, anonymous(process))
            if killed_after and len(list(work.glob("*/?????.safetensors"))) >= killed_after:
                process.send_signal(signal.SIGKILL)
                break
        _, complaint = process.communicate()
        assert process.returncode == (-signal.SIGKILL if killed_after else 0), complaint
    assert 0 < peak < 4 * 2**30
    found = read_record(record)
    assert found.environment["resumed"] and found.metrics["sparsity"] == pytest.approx(0.5, abs=1e-4)
    assert abs(found.peak_memory_bytes - peak) < 2**29
    zeros = total = 0
    for path in saved.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                if "_proj." in name:
                    tensor = file.get_tensor(name)
                    zeros, total = zeros + tensor.numel() - int(tensor.count_nonzero()), total + tensor.numel()
    assert zeros / total == pytest.approx(found.metrics["sparsity"])
    assert len(json.loads((saved / files.INDEX).read_text())["weight_map"]) == 9 * LAYERS + 3
