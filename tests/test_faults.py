"""What goes wrong around a run: damaged model folders, a full disk, a Hub that cannot be reached, a death in mid-write."""

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import recon
from recon import models, study
from recon.cli import main
from recon.errors import ReconError
from recon.study import grid, read_record, run_study, write_record


@pytest.fixture(scope="module")
def spec(tiny_folder, tiny_text) -> recon.RunSpec:
    return recon.RunSpec(
        model=tiny_folder, text=tiny_text, samples=4, sequence_length=16, held_out_samples=0, granularity="none",
        evaluation_texts=(tiny_text,), evaluation_samples=2, evaluation_length=16, compute_dtype="float32",
    )  # fmt: skip


@pytest.fixture
def folder(tiny_folder, tmp_path) -> Path:
    """A copy of the tiny model's folder that a test may spoil."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "copy"))


def options(spec: recon.RunSpec, *more: str) -> list[str]:
    """The arguments of the command line for `spec`, where it differs from the defaults."""
    words = ["run"]
    for name, value in asdict(spec).items():
        if value != getattr(recon.RunSpec(), name):
            words += [f"--{name.replace('_', '-')}", *(map(str, value) if isinstance(value, tuple) else [str(value)])]
    return [*words, *more]


@contextlib.contextmanager
def room_for(size: int):
    """No file can grow beyond `size` bytes for a while, as on a disk that is nearly full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


# ---- damaged model folders


def truncate(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 5000)


def reshape(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.2.mlp.up_proj.weight"
    save_file(weights | {name: weights[name][:5].contiguous()}, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    "damage, said",
    [
        (truncate, "cannot be loaded"),
        (reshape, r"weights of other shapes than its config.json calls for: model.layers.2.mlp.up_proj.weight is \(5, 32\)"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "cannot be loaded"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "cannot be loaded"),
        (lambda folder: (folder / "config.json").write_text('{"model_type"'), "cannot be loaded.*not a valid JSON"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "abacus"}'), "cannot be loaded.*abacus"),
        (lambda folder: (folder / "model.safetensors").unlink(), "cannot be loaded"),
    ],
    ids=["truncated", "shape", "tokenizer", "tokenizer JSON", "config JSON", "unknown kind", "no weights"],
)
def test_a_damaged_model_folder_is_refused_by_name(folder, damage, said):
    damage(folder)
    with pytest.raises(ReconError, match=rf"(?s)model '{folder}' .*") as error:
        models.load(str(folder))
    assert error.match("(?s)" + said)


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))

    def unreachable(*args, **kwargs):
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", unreachable)


def test_a_hub_that_cannot_be_reached_is_said(spec, no_hub, capsys):
    with pytest.raises(SystemExit) as end:
        main(options(replace(spec, model="somebody/something", revision="v2")))
    errors = capsys.readouterr().err
    assert end.value.code == 2 and "Traceback" not in errors
    assert "model 'somebody/something' at revision 'v2' cannot be had from the Hub (ConnectionError: Name or service" in errors
    assert "smollm2-135m" in errors


def test_a_study_refuses_an_unknown_model_before_anything_runs(spec, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "run", lambda *args, **kwargs: pytest.fail("has begun to compute"))
    with pytest.raises(ReconError, match="unknown model 'nonsense'"):
        run_study([spec, replace(spec, model="nonsense")], tmp_path, progress=False)


# ---- a full disk


def test_a_record_for_which_there_is_no_room(spec, tmp_path):
    record = recon.run(spec, progress=False)
    with room_for(1000), pytest.raises(ReconError, match=r"record cannot be written to .*r\.json'.*File too large"):
        write_record(record, tmp_path / "full" / "r.json")
    assert list((tmp_path / "full").iterdir()) == []
    old = tmp_path / "full" / "r.json"
    write_record(record, old)
    before = old.read_bytes()
    with room_for(1000), pytest.raises(ReconError):
        write_record(replace(record, key="other"), old)
    assert old.read_bytes() == before and len(list((tmp_path / "full").iterdir())) == 1


@pytest.mark.parametrize("size", [100, 100_000], ids=["first file", "weights"])
def test_a_checkpoint_for_which_there_is_no_room(spec, tmp_path, size):
    """The safetensors library raises an exception of its own here."""
    with room_for(size), pytest.raises(ReconError, match=r"checkpoint cannot be written to '.*saved'.*File too large"):
        recon.run(spec, save=tmp_path / "saved", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_cannot_save_says_so_in_its_record(spec, tmp_path, capsys):
    record, saved = tmp_path / "r.json", tmp_path / "saved"
    with room_for(100_000), pytest.raises(SystemExit) as end:
        main(options(spec, "--record", str(record), "--save", str(saved)))
    errors = capsys.readouterr().err
    assert end.value.code == 2 and "Traceback" not in errors and str(saved) in errors
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]
    assert read_record(record).status == "failed" and str(saved) in read_record(record).error


# ---- death in mid-write, and damaged records


STUDY = """
import os, signal
import recon
from recon import study
replace, calls = os.replace, []
def deadly(*paths):
    calls.append(paths)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(*paths)
os.replace = deadly
recon.run_study(study.grid(recon.RunSpec(**{settings!r}), seed=range(3)), {folder!r}, progress=False)
"""


def test_a_study_killed_while_it_writes_a_record_goes_on(spec, tmp_path, monkeypatch):
    records, specs = tmp_path / "records", grid(spec, seed=range(3))
    code = STUDY.format(settings=asdict(spec), folder=str(records))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    [whole] = records.glob("*.json")
    [half] = [file for file in records.iterdir() if file.name.startswith(".") and ".json" in file.name]  # under another name
    before, ran = whole.stat(), []
    monkeypatch.setattr(study, "run", lambda spec, *a, **k: ran.append(spec) or recon.run(spec, *a, **k))
    assert list(run_study(specs, records, progress=False).status) == ["done"] * 3
    assert len(ran) == 2 and not half.exists()
    assert (whole.stat().st_ino, whole.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


@pytest.mark.parametrize("name", ["spec", "metrics", "seconds", "peak_memory_bytes_by_phase"])
@pytest.mark.parametrize("value", [None, [], 3, "done"])
def test_a_record_with_a_field_of_the_wrong_kind_is_computed_anew(spec, tmp_path, caplog, name, value):
    path = tmp_path / f"{spec.key()}.json"
    record = recon.run(spec, progress=False)
    path.write_text(json.dumps(record.to_dict() | {name: value}))
    found = run_study([spec], tmp_path, progress=False)
    assert f"not a record: {name} is {type(value).__name__}" in caplog.text and "set aside" in caplog.text
    assert found.perplexity[0] == record.metrics["perplexity"]
    assert path.with_suffix(".corrupt").is_file()


def test_rows_are_the_same_whether_measured_or_read_from_disk(spec, tmp_path):
    measured = run_study([spec], tmp_path, progress=False).to_dict("records")
    read = run_study([spec], tmp_path, progress=False).to_dict("records")
    assert measured == read
    assert isinstance(read[0]["evaluation_texts"], tuple)  # hashable: frames can be grouped by it


def test_a_failure_leaves_no_trace_in_the_runs_after_it(spec, tmp_path, monkeypatch):
    specs = grid(replace(spec, granularity="block"), seed=[0, 1])
    prune, calls = recon.prune, []

    def fail_once(*args, **kwargs):
        calls.append(prune(*args, **kwargs))
        if len(calls) == 1:
            raise RuntimeError("out of pencils")
        return calls[-1]

    monkeypatch.setattr("recon.pruning.prune", fail_once)
    found = run_study(specs, tmp_path, progress=False)
    assert list(found.status) == ["failed", "done"]
    assert found.perplexity[1] == recon.run(specs[1], progress=False).metrics["perplexity"]


# ---- settings of the wrong kind


def test_one_evaluation_text_may_be_given_bare(spec, tiny_text):
    assert replace(spec, evaluation_texts=tiny_text) == spec


@pytest.mark.parametrize(
    "name, value", [("learning_rate", True), ("learning_rate", "1e-3"), ("warmup", "none"), ("warmup", True)]
)
def test_numbers_are_numbers(name, value):
    with pytest.raises(ReconError, match=f"{name} is {value!r}; allowed: a number"):
        recon.RunSpec(**{name: value})


def test_key_is_the_same_in_another_process(spec):
    code = f"import recon; print(recon.RunSpec(**{asdict(spec)!r}).key())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == spec.key()


def test_key_changes_with_the_weights_and_with_the_text(spec, folder):
    spec = replace(spec, model=str(folder), text=str(folder / "tiny_text.txt"))
    keys = [spec.key(), spec.key()]
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] += 1e-3
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    keys.append(spec.key())
    (folder / "tiny_text.txt").write_text((folder / "tiny_text.txt").read_text() + " More.")
    keys.append(spec.key())
    assert keys[0] == keys[1] and len(set(keys)) == 3


@pytest.mark.parametrize(
    "change, reused",
    [
        ({"criterion": "magnitude"}, ["model", "dense"]),
        ({"pattern": "2:4"}, ["model", "dense"]),
        ({"scope": "matrix"}, ["model", "dense"]),
        ({"samples": 3}, ["model", "dense"]),
        ({"prune_propagation": "dense"}, ["model", "dense"]),
        ({"evaluation_length": 32}, ["model"]),
        ({"granularity": "block", "learning_rate": 1e-3, "loss": "cosine"}, ["model", "dense", "pruned"]),
    ],
)
def test_a_session_shares_only_what_a_change_leaves_alone(spec, change, reused):
    session = recon.Session()
    recon.run(spec, session, progress=False)
    shared = recon.run(replace(spec, **change), session, progress=False)
    assert shared.shared == reused
    assert shared.metrics == recon.run(replace(spec, **change), progress=False).metrics
