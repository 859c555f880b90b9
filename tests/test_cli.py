"""The command line: what it takes, prints and leaves. What it refuses: `test_refusals`."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import recon
from recon.cli import main
from recon.config import PRESETS, SOURCES
from recon.data import assets
from recon.kernels import criteria

ROOT = Path(__file__).resolve().parents[1]


def test_run_writes_a_record_and_a_checkpoint(small, tmp_path, capsys):
    record, saved = tmp_path / "deep" / "out.json", tmp_path / "saved"
    words = "--preset paper --criterion magnitude --pattern 2:4 --granularity matrix --solver exact --reorder-neurons"
    main(["run", *small, *words.split(), "--record", str(record), "--save", str(saved)])
    written = json.loads(record.read_text())
    asked = {"criterion": "magnitude", "pattern": "2:4", "granularity": "matrix", "solver": "exact", "reorder_neurons": True}
    assert written["status"] == "done" and asked.items() <= written["spec"].items() and written["metrics"]["sparsity"] == 0.5
    said = capsys.readouterr().out
    assert f"reconstructed {written['metrics']['perplexity']:.2f}" in said
    assert f"dense weights: {written['protocol']['dense']}\n" in said
    card = (saved / "README.md").read_text()
    assert (saved / "model.safetensors").is_file() and "pruned 2:4 with magnitude, reconstructed at matrix" in card
    with pytest.raises(SystemExit):
        main(["run", *small, "--record", str(record)])
    assert "of another run" in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert json.loads(record.read_text()) == written
    assert f"|---|---|---|---|\n| {written['spec']['text']} | {written['metrics']['dense_perplexity']:.2f} |" in card


def test_reconstruct_reads_the_mask_of_a_pruned_model(small, tmp_path, capsys):
    pruned, record, (_, model, *rest) = tmp_path / "pruned", tmp_path / "out.json", small
    main(["run", *small, "--granularity", "none", "--save", str(pruned)])
    main(["reconstruct", "--dense", model, "--pruned", str(pruned), *rest, "--granularity", "block", "--record", str(record)])
    spec = json.loads(record.read_text())["spec"]
    assert (spec["model"], spec["pruned"], spec["granularity"], spec["samples"]) == (model, str(pruned), "block", 8)
    assert "pattern of the mask: 0.5" in capsys.readouterr().out
    main(["plan", "--dense", model, "--pruned", str(pruned), *rest])
    assert "fits" in capsys.readouterr().out


def test_lists_name_everything(capsys):
    main(["models"])
    said = capsys.readouterr().out
    assert all(f"{name}\n    {model['description']}\n" in said for name, model in assets.BUNDLED_MODELS.items())
    done = subprocess.run([sys.executable, "-m", "recon.cli", "criteria"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout and criterion.source in done.stdout for name, criterion in criteria.CRITERIA.items())
    main(["presets"])
    said = " ".join(capsys.readouterr().out.split())
    assert SOURCES.keys() == PRESETS.keys() and all(f"({source})" in said for source in SOURCES.values())
    assert all(f"{option} {value}" in said for values in PRESETS.values() for option, value in values.items())


def test_help_says_what_every_option_means(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["run", "--help"])
    said, defaults = capsys.readouterr().out, recon.RunSpec().flat()
    lines = [line.strip("│╰─╯ ") for line in said.splitlines()]
    assert stop.value.code == 0
    for name in (*defaults, "save", "save_dtype", "save_format", "stream", "executor", "force", "record", "address"):
        flag = f"--{name.replace('_', '-')}"
        (number,) = (number for number, line in enumerate(lines) if re.split("[ ,]", line)[0] == flag)
        after = next(n for n in range(number + 1, len(lines)) if lines[n].startswith("--") or not lines[n])
        words = " ".join(lines[number:after]).removeprefix(flag)
        assert "(default: " in words and len(words.split("(default")[0].split()) > 3, name


QUIET = """
import os
before = dict(os.environ)
import recon
for name in recon.__all__:
    getattr(recon, name)
from transformers.utils import logging
assert dict(os.environ) == before, set(os.environ.items()) ^ set(before.items())
assert logging.is_progress_bar_enabled()
"""
HELP = """
import contextlib
from recon.cli import main
for words in (["--help"], ["run", "--help"], ["bench", "--help"]):
    with contextlib.suppress(SystemExit):
        main(words)
"""
SLOW = {"accelerate", "datasets", "lm_eval", "matplotlib", "pandas", "ray", "scipy", "seaborn", "transformers"}


@pytest.mark.parametrize("code, slow", [("import recon", SLOW | {"torch", "tyro"}), (HELP, SLOW), (QUIET, set())])
def test_what_is_slow_to_import_waits_until_it_is_used_and_nothing_global_changes(code, slow):
    code += "\nimport sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert not slow & set(done.stdout.splitlines()[-1].split())
