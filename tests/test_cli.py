import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from recon.cli import main
from recon.config import PROTOCOLS
from recon.data import assets
from recon.kernels import criteria
from recon.study.spec import options


@pytest.fixture
def small(tiny_folder, tiny_text):
    options = {
        "model": tiny_folder, "text": tiny_text, "samples": 8, "epochs": 1, "sequence-length": 32, "held-out-samples": 2,
        "evaluation-texts": tiny_text, "evaluation-samples": 2, "evaluation-length": 64, "learning-rate": "3e-3", "seed": 0,
    }  # fmt: skip
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def refuse(arguments, capsys) -> str:
    """What a call that must fail says on stderr, on one line."""
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    said = capsys.readouterr()
    assert "Traceback" not in said.err + said.out
    return " ".join(said.err.replace("│", " ").split())


def test_run_writes_a_record_and_a_checkpoint(small, tmp_path, capsys):
    record, saved = tmp_path / "deep" / "out.json", tmp_path / "saved"
    words = [
        "--criterion",
        "wanda",
        "--pattern",
        "0.5",
        "--granularity",
        "half-block",
        "--record",
        str(record),
        "--save",
        str(saved),
    ]
    main(["run", *small, *words])
    found = json.loads(record.read_text())
    assert found["status"] == "done" and found["spec"]["granularity"] == "half-block"
    said = capsys.readouterr().out
    assert f"reconstructed {found['metrics']['perplexity']:.2f}" in said
    assert f"dense weights: {found['protocol']['dense']}\n" in said
    assert (saved / "model.safetensors").is_file() and (saved / "README.md").is_file()


@pytest.mark.parametrize("stream", ["no", "yes"])
def test_the_same_command_again_finds_that_all_is_done(small, stream, tmp_path, capsys, caplog, monkeypatch):
    """As machines that are taken away and given back repeat it; anything else than the same command does not pass for it."""
    record, saved = tmp_path / "out.json", tmp_path / "saved"
    words = ["--granularity", "none", "--stream", stream, "--record", str(record), "--save", str(saved)]
    main(["run", *small, *words])
    said, before = capsys.readouterr().out, record.read_text()
    assert json.loads((saved / "record.json").read_text()) == json.loads(before)
    files = {path: path.read_bytes() for path in saved.iterdir()}
    monkeypatch.setattr("recon.study.run._Run.execute", lambda *_: pytest.fail("runs again"))
    monkeypatch.setattr("recon.study.plan.check", lambda *_: pytest.fail("plans what is done"))
    main(["run", *small, *words])
    record.unlink()
    main(["run", *small, *words])
    assert capsys.readouterr().out == said + said and record.read_text() == before
    assert f"done already: the model and its record are in '{saved}'" in caplog.text
    hashes, shard = saved / "SHA256SUMS", sorted(saved.glob("*.safetensors"))[0]
    for file, content, which in (
        (hashes, files[hashes] + b"\n", "SHA256SUMS is not what was written"),
        (shard, files[shard][:-1], f"'{shard.name}'"),
        (shard, files[shard][:-1] + bytes([files[shard][-1] ^ 1]), f"'{shard.name}' is damaged"),
    ):
        file.write_bytes(content)
        complaint = refuse(["run", *small, *words], capsys)
        assert f"save folder '{saved}' holds the model of this very run, damaged: " in complaint and which in complaint
        file.write_bytes(files[file])
    assert record.read_text() == before  # which a failure of the very same run does not replace
    for other in (["--seed", "1"], ["--save-dtype", "bfloat16"]):
        assert "exists and is not an empty folder" in refuse(["run", *small, *words, *other], capsys)
    assert {path: path.read_bytes() for path in saved.iterdir()} == files
    main(["run", *small, *words])
    assert record.read_text() == before


def test_a_folder_with_a_record_that_is_none_is_somebody_elses(small, tmp_path, capsys):
    (tmp_path / "record.json").write_text("{}")
    assert "exists and is not an empty folder" in refuse(["run", *small, "--save", str(tmp_path)], capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["record.json"]


@pytest.mark.parametrize("words, fields", [
    (["--granularity", "none"], {"granularity": "none"}),
    (["--pattern", "2:4", "--granularity", "block"], {"pattern": "2:4", "granularity": "block"}),
    (["--criterion", "sparsegpt", "--granularity", "matrix", "--solver", "exact"], {"criterion": "sparsegpt", "solver": "exact"}),
])  # fmt: skip
def test_run_takes_its_options(small, tmp_path, words, fields):
    main(["run", *small, *words, "--record", str(tmp_path / "out.json")])
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["metrics"]["sparsity"] == 0.5 and fields.items() <= found["spec"].items()


@pytest.mark.parametrize(
    "words, message",
    [
        (["--criterion", "magic"], "'magic' for argument '--criterion'. Expected one of ('magnitude', 'none', 'random', 'wanda'"),
        (["--pattern", "2:5"], "do not divide into the groups of 5"),
        (["--pattern", "4:2"], "'4:2'"),
        (["--pattern", "1.5"], "'1.5'"),
        (["--pattern", "-0.1"], "-0.1"),
        (["--pattern", "abc"], "'abc'"),
        (["--granularity", "thirds"], "granularity is 'thirds'; allowed: none, matrix, half-block"),
        (["--samples", "100000"], "100000 samples of 32 tokens are more than the calibration split"),
        (["--samples", "many"], "many"),
        (["--model", "gpt-17"], "unknown model 'gpt-17'; bundled: smollm2-135m"),
        (["--text", "no-such.txt"], "no-such.txt"),
        (["--sequence-length", "300", "--samples", "2"], "sequence length 300 is more than the 256 tokens"),
        (["--sample", "3"], "--sample"),
        (
            ["--address", "10.0.0.1:6379"],
            "address '10.0.0.1:6379' is that of a Ray cluster",
        ),
        (["--executor", "ray", "--propagation", "mixed"], "side by side under mixed propagation"),
    ],
)
def test_bad_input_ends_with_one_clear_message(small, words, message, capsys, tmp_path):
    assert message in refuse(["run", *small, *words], capsys)


@pytest.mark.parametrize("option", ["--record", "--save"])
def test_a_place_that_cannot_be_written_is_refused_before_anything_is_computed(small, option, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("recon.data.models.load", lambda *a, **k: pytest.fail("loaded before it was checked"))
    (tmp_path / "file").write_text("")
    assert "cannot write to" in refuse(["run", *small, option, str(tmp_path / "file" / "inside" / "out")], capsys)


def test_a_save_folder_that_holds_something_is_refused(small, tmp_path, capsys):
    (tmp_path / "precious").write_text("keep")
    assert "exists and is not an empty folder" in refuse(["run", *small, "--save", str(tmp_path)], capsys)
    assert (tmp_path / "precious").read_text() == "keep"


def test_a_failed_run_leaves_a_record_that_says_how(small, tmp_path, capsys):
    refuse(["run", *small, "--pattern", "2:5", "--record", str(tmp_path / "out.json")], capsys)
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["status"] == "failed" and "groups of 5" in found["error"]


def test_lists_name_everything(capsys):
    main(["models"])
    said = capsys.readouterr().out
    assert all(f"{name}\n    {description}\n" in said for name, description in assets.BUNDLED_MODELS.items())
    assert all(f"{name}: {meaning}" in said for name, meaning in PROTOCOLS.items())
    main(["criteria"])
    said = capsys.readouterr().out
    assert all(name in said and criterion.source in said for name, criterion in criteria.CRITERIA.items())


@pytest.mark.parametrize(
    "words, fetched",
    [([], ["smollm2-135m"]), (["--models", "gemma3-270m"], ["gemma3-270m"]), (["--models", "all"], list(assets.BUNDLED_MODELS))],
)
def test_assets_fetches_the_models_asked_for(words, fetched, capsys, monkeypatch):
    calls = []
    monkeypatch.setattr(assets, "bundled_model", lambda name: calls.append(name) or f"folder of {name}")
    monkeypatch.setattr("recon.data.text.documents", lambda name, split: [""])
    main(["assets", *words])
    assert calls == fetched and len(fetched) == len(set(fetched))
    said = capsys.readouterr().out
    assert all(f"{name}: folder of {name}\n" in said for name in fetched) and "news: 3 documents" in said


def test_assets_refuses_an_unknown_model_before_it_fetches_any(capsys, monkeypatch):
    monkeypatch.setattr(assets, "bundled_model", lambda name: pytest.fail("fetched before it was checked"))
    said = refuse(["assets", "--models", "smollm2-135m", "gpt-17"], capsys)
    assert "'gpt-17'" in said and "smollm2-135m, gemma3-270m" in said


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["run", "--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    for name in options().keys() - {"pruned", "pruned_revision"}:
        assert f"--{'no-' * (options()[name].default is True)}{name.replace('_', '-')}" in said
    assert "--record" in said and "--save" in said


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


def test_importing_the_package_changes_nothing_global():
    """No environment variable, and nobody's progress bars."""
    here = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", QUIET], capture_output=True, text=True, cwd=here)
    assert done.returncode == 0, done.stderr


HELP = """
import contextlib
from recon.cli import main
for words in (["--help"], ["run", "--help"], ["bench", "--help"]):
    with contextlib.suppress(SystemExit):
        main(words)
"""
SLOW = {"accelerate", "datasets", "lm_eval", "matplotlib", "pandas", "ray", "scipy", "seaborn", "transformers"}


@pytest.mark.parametrize("code, slow", [("import recon", SLOW | {"torch", "tyro"}), (HELP, SLOW)], ids=["package", "help"])
def test_what_is_slow_to_import_waits_until_it_is_used(code, slow):
    here = Path(__file__).resolve().parents[1]
    code += "\nimport sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=here)
    assert done.returncode == 0, done.stderr
    assert not slow & set(done.stdout.splitlines()[-1].split())


def test_an_unknown_command_is_refused_with_the_list(capsys):
    said = refuse(["walk"], capsys)
    assert "walk" in said and all(word in said for word in ("run", "models", "criteria", "assets"))


def test_the_module_runs_as_a_process():
    here = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, "-m", "recon.cli", "criteria"], capture_output=True, text=True, cwd=here, env=dict(os.environ)
    )
    assert done.returncode == 0 and "sparsegpt" in done.stdout
