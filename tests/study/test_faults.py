"""What goes wrong around a run: damaged folders, full disks and memories, no Hub, numbers that are none, a death in mid-write."""

import contextlib
import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fixtures.runs import options, record_of
from safetensors.torch import load_file, save_file

import recon
from recon.cli import main
from recon.data import models
from recon.errors import ReconError
from recon.methods.fit import WindowFit
from recon.methods.reconstruct import NOT_FINITE
from recon.study import studies
from recon.study.record import read_record
from recon.study.studies import grid, run_study, write_record


@pytest.fixture(scope="module")
def spec(tiny_folder, tiny_text) -> recon.RunSpec:
    return recon.RunSpec.of(
        model=tiny_folder, text=tiny_text, samples=4, epochs=1, sequence_length=16, held_out_samples=0, granularity="none",
        evaluation_texts=(tiny_text,), evaluation_samples=2, evaluation_length=16, compute_dtype="float32",
    )  # fmt: skip


@pytest.fixture(scope="module")
def record(spec):
    return record_of(spec)


@pytest.fixture
def folder(tiny_folder, tmp_path) -> Path:
    """A copy of the tiny model's folder that a test may spoil."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "copy"))


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
        main(options(spec.replaced(model="somebody/something", revision="v2")))
    errors = capsys.readouterr().err
    assert end.value.code == 2 and "Traceback" not in errors
    assert "model 'somebody/something' at revision 'v2' cannot be loaded: ConnectionError: Name or service" in errors
    assert "smollm2-135m" in errors


def test_a_study_refuses_an_unknown_model_before_anything_runs(spec, tmp_path, monkeypatch):
    monkeypatch.setattr(studies, "run", lambda *args, **kwargs: pytest.fail("has begun to compute"))
    with pytest.raises(ReconError, match="unknown model 'nonsense'"):
        run_study([spec, spec.replaced(model="nonsense")], tmp_path, progress=False)


# ---- a full disk


def test_a_record_for_which_there_is_no_room(record, tmp_path):
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
        record_of(spec, save=tmp_path / "saved")
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
from recon.study import studies
replace, calls = os.replace, []
def deadly(*paths):
    calls.append(paths)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(*paths)
os.replace = deadly
recon.run_study(recon.grid(recon.RunSpec.of(**{settings!r}), seed=range(3)), {folder!r}, progress=False)
"""


@pytest.mark.slow
def test_a_study_killed_while_it_writes_a_record_goes_on(spec, tmp_path, monkeypatch):
    records, specs = tmp_path / "records", grid(spec, seed=range(3))
    code = STUDY.format(settings=spec.flat(), folder=str(records))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    [whole] = records.glob("*.json")
    [half] = [file for file in records.iterdir() if file.name.startswith(".") and ".json" in file.name]  # under another name
    before, ran = whole.stat(), []
    monkeypatch.setattr(studies, "run", lambda spec, *a, **k: ran.append(spec) or recon.run(spec, *a, **k))
    assert list(run_study(specs, records, progress=False).status) == ["done"] * 3
    assert len(ran) == 2 and not half.exists()
    assert (whole.stat().st_ino, whole.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


KILLED = """
import os, resource, signal, sys
from recon import cli
from recon.study import studies
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[1] == "record":  # the checkpoint has its name, and nothing is known of the record
    studies.write_record = die
else:  # the system kills whoever writes more than that to one file, in the middle of it
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
cli.main(sys.argv[2:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("stream", ["no", "yes"])
@pytest.mark.parametrize("place", ["record", "30000"], ids=["before the record", "in mid-write"])
def test_a_run_that_is_killed_ends_with_its_record_when_it_is_repeated(stream, place, spec, tmp_path, monkeypatch):
    """As if nothing had happened; the checkpoint is whole, and where it was there already, it is not touched."""
    record, saved = tmp_path / "r.json", tmp_path / "saved"
    spec = spec.replaced(granularity="block", held_out_samples=2)
    command = options(spec, "--stream", stream, "--record", str(record), "--save", str(saved))
    done = subprocess.run([sys.executable, "-c", KILLED, place, *command], capture_output=True, text=True, timeout=120)
    assert done.returncode == -(signal.SIGKILL if place == "record" else signal.SIGXFSZ), done.stderr
    assert saved.exists() == (place == "record") and not record.exists()
    assert any(path.suffix in (".part", ".unfinished") for path in tmp_path.iterdir()) == (stream == "yes" or place != "record")
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in saved.rglob("*")}
    if place == "record":
        monkeypatch.setattr("recon.study.run._Run.execute", lambda *_: pytest.fail("computed anew"))
    main(command)
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.json", "saved"]
    assert not before or {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in saved.rglob("*")} == before
    assert read_record(record).metrics == record_of(spec).metrics
    assert read_record(record) == read_record(saved / "record.json") and models.load(str(saved))


@pytest.mark.parametrize("name, value", [("spec", None), ("metrics", []), ("seconds", 3), ("peak_memory_bytes_by_phase", "done")])
def test_a_record_with_a_field_of_the_wrong_kind_is_computed_anew(spec, record, tmp_path, caplog, name, value):
    path = tmp_path / f"{spec.key()}.json"
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
    specs = grid(spec.replaced(granularity="block"), seed=[0, 1])
    reconstruct, calls = recon.reconstruct, []

    def fail_once(*args, **kwargs):
        calls.append(reconstruct(*args, **kwargs))
        if len(calls) == 1:
            raise RuntimeError("out of pencils")
        return calls[-1]

    monkeypatch.setattr("recon.study.run.reconstruct", fail_once)
    found = run_study(specs, tmp_path, progress=False)
    assert list(found.status) == ["failed", "done"]
    assert found.perplexity[1] == record_of(specs[1]).metrics["perplexity"]


# ---- keys, and what runs share


def test_key_changes_with_the_weights_and_with_the_text(spec, folder):
    spec = spec.replaced(model=str(folder), text=str(folder / "tiny_text.txt"))
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
        ({"statistics": "sparse"}, ["model", "dense"]),
        ({"evaluation_length": 32}, ["model", "pruned"]),
        ({"granularity": "block", "learning_rate": 1e-3, "loss": "cosine"}, ["model", "dense", "pruned", "measure pruned"]),
    ],
)
def test_a_session_shares_only_what_a_change_leaves_alone(spec, change, reused):
    session = recon.Session()
    record_of(spec, session)
    shared = record_of(spec.replaced(**change), session)
    assert shared.shared == reused
    assert shared.metrics == record_of(spec.replaced(**change)).metrics


# ---- out of memory, and numbers that are none


@pytest.mark.parametrize("propagation", ["dense", "mixed"])
def test_a_streamed_run_that_is_short_of_memory_has_the_bits_of_one_that_is_not_streamed(spec, propagation, monkeypatch, caplog):
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    forward = LlamaDecoderLayer.forward

    def run_out(block, hidden, *args, **options):
        if hidden.shape[1] == spec.calibration.sequence_length and len(hidden) > (1 if torch.is_grad_enabled() else 2):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(block, hidden, *args, **options)

    spec, records, said = spec.replaced(granularity="block", batch_size=4, propagation=propagation), [], []
    for stream in ("no", "yes"):
        with monkeypatch.context() as patch:
            patch.setattr(LlamaDecoderLayer, "forward", run_out)
            caplog.clear()
            records.append(record_of(spec, stream=stream))
        said.append([record.message for record in caplog.records if "out of memory" in record.message])
    assert records[0].metrics == records[1].metrics and [window["micro_batch"] for window in records[1].windows] == [1] * 4
    assert said[0] == said[1] and any("4 samples at a time: 2 from here on (CUDA out of memory.)" in each for each in said[0])
    assert record_of(spec).metrics["perplexity"] == pytest.approx(records[1].metrics["perplexity"], rel=1e-3)


@pytest.mark.parametrize("stream", ["no", "yes"])
@pytest.mark.parametrize("broken", ["weights", "losses", "activations"])
def test_a_window_of_a_run_that_breaks_is_as_pruning_left_it(spec, folder, broken, stream, tmp_path, monkeypatch, caplog):
    """In the record, in what is said, and in what is saved; windows before it are reconstructed, and so are those after it, if they can be."""
    spec = spec.replaced(model=str(folder), criterion="magnitude", granularity="block", evaluation_samples=1)
    first = 2
    if broken == "activations":  # overflow from there on
        weights = load_file(folder / "model.safetensors")
        weights["model.layers.2.mlp.down_proj.weight"] *= 1e38
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    record_of(spec.replaced(granularity="none"), save=tmp_path / "pruned")
    fit, calls = WindowFit.__call__, []

    def breaks(self, window, task, parameters):
        count, losses = fit(self, window, task, parameters)
        calls.append(1)
        if len(calls) == first + 1 and broken == "weights":
            with torch.no_grad():
                next(iter(parameters.values())).view(-1)[3] = torch.nan
        return count, [torch.inf] if len(calls) == first + 1 and broken == "losses" else losses

    monkeypatch.setattr(WindowFit, "__call__", breaks)
    record = record_of(spec, save=tmp_path / "saved", stream=stream)
    rolled_back = [2, 3] if broken == "activations" else [2]
    assert [window["status"] == NOT_FINITE for window in record.windows] == [number in rolled_back for number in range(4)]
    assert "window 'block 2'" in caplog.text and broken in caplog.text
    pruned, saved = (models.load(str(tmp_path / name))[0].state_dict() for name in ("pruned", "saved"))
    for number in range(4):
        name = f"model.layers.{number}.mlp.up_proj.weight"
        assert torch.equal(pruned[name], saved[name]) == (number in rolled_back)


# ---- interrupted, or nowhere to write


@pytest.mark.parametrize("stream", ["no", "yes"])
@pytest.mark.parametrize(
    "where",
    ["recon.methods.prune.Pruner.prune", "recon.methods.fit.WindowFit.__call__", "recon.study.checkpoint.write_card"],
)
def test_an_interrupted_run_leaves_nothing_behind_but_what_it_goes_on_from(spec, tmp_path, capsys, monkeypatch, where, stream):
    spec = spec.replaced(granularity="block")
    command = options(spec, "--stream", stream, "--save", str(tmp_path / "saved"), "--record", str(tmp_path / "r.json"))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # it may be ignored where tests run in the background
    try:
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
            patch.setattr(where, lambda *args, **kwargs: signal.raise_signal(signal.SIGINT))
            main(command)
    finally:
        signal.signal(signal.SIGINT, before)
    errors = capsys.readouterr().err
    assert end.value.code == 130 and "recon: interrupted" in errors and "Traceback" not in errors
    assert [path.name for path in tmp_path.iterdir()] == ["saved.unfinished"] * (stream == "yes")
    if stream == "yes":
        main(command)
        found = read_record(tmp_path / "r.json")
        assert found.environment["resumed"] == 1 and found.metrics == record_of(spec).metrics
        assert sorted(path.name for path in tmp_path.iterdir()) == ["r.json", "saved"]


@pytest.mark.parametrize(
    "place, stream", [("study", "no"), *((p, s) for p in ("save", "record") for s in ("no", "yes")), ("cache", "yes")]
)
def test_a_read_only_place_is_refused_before_anything_runs(spec, tmp_path, capsys, monkeypatch, place, stream):
    def read_only(**kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("recon.runtime.storage.tempfile.TemporaryFile", read_only)
    monkeypatch.setenv("RECON_CACHE", str(tmp_path))
    for name in ("load", "skeleton"):
        monkeypatch.setattr(f"recon.data.models.{name}", lambda *args, **kwargs: pytest.fail("loaded before it was checked"))
    with pytest.raises((SystemExit, ReconError)) as end:
        if place == "study":
            run_study([spec], tmp_path, progress=False)
        else:
            main(options(spec, "--stream", stream, *([f"--{place}", str(tmp_path / "out")] if place != "cache" else [])))
    said = str(end.value) + capsys.readouterr().err
    where = tmp_path / "unfinished" if place == "cache" else tmp_path
    assert f"cannot write to '{where}' (Read-only file system)" in said and "Traceback" not in said


@pytest.mark.parametrize("where", ["recon.data.files.write_hashes", "recon.runtime.storage.os.replace"])
def test_a_disk_that_is_full_when_a_model_is_saved(spec, tmp_path, monkeypatch, where):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(where, full)
    with pytest.raises(ReconError, match=r"checkpoint cannot be written to '.*saved'.*No space left on device"):
        record_of(spec, save=tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "where, said",
    [
        ("recon.study.checkpoint._index", "checkpoint cannot be written to '{saved}'"),
        ("recon.study.checkpoint.write_card", "checkpoint cannot be written to '{saved}'"),
        ("recon.study.checkpoint.rename", "checkpoint cannot be moved to '{saved}'"),
        ("recon.runtime.storage.os.replace", "saved.unfinished' cannot be written"),
        ("recon.study.studies.write_json", "record cannot be written to '{record}'"),
    ],
)
def test_a_disk_that_is_full_when_a_streamed_run_ends_loses_nothing(spec, tmp_path, capsys, monkeypatch, where, said):
    """In every step of its end; with room again, the same command goes on."""
    record, saved = tmp_path / "r.json", tmp_path / "saved"

    def full(*args, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    command = options(spec, "--stream", "yes", "--record", str(record), "--save", str(saved))
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(where, full)
        main(command)
    errors = capsys.readouterr().err
    assert end.value.code == 2 and "Traceback" not in errors
    assert said.format(saved=saved, record=record) in errors and "No space left on device" in errors
    main(command)
    assert read_record(record).metrics == record_of(spec).metrics and models.load(str(saved))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.json", "saved"]


@pytest.mark.parametrize("size", [100, 3_000, 20_000, 50_000])
def test_a_streamed_run_that_runs_out_of_room_goes_on_where_it_was(spec, tmp_path, size):
    """Wherever a file could not grow beyond so many bytes: the journal, masks, activations, weights."""
    spec = spec.replaced(granularity="block", held_out_samples=2)
    with room_for(size), pytest.raises(ReconError, match=r"saved.unfinished' cannot be written: .*File too large"):
        record_of(spec, save=tmp_path / "saved", stream="yes")
    found = record_of(spec, save=tmp_path / "saved", stream="yes")
    assert found.metrics == record_of(spec).metrics and models.load(str(tmp_path / "saved"))


def test_what_a_killed_process_left_of_a_model_is_removed(spec, tmp_path):
    """And nothing else that has a similar name."""
    for name in (".saved.x7k2.part", ".saved.backup", ".other.x7k2.part"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"half of it")
    record_of(spec, save=tmp_path / "saved")
    assert {path.name for path in tmp_path.iterdir()} == {"saved", ".saved.backup", ".other.x7k2.part"}


def test_a_bit_that_flips_in_what_was_saved_is_found(spec, tmp_path):
    record_of(spec, save=tmp_path / "saved")
    models.load(str(tmp_path / "saved"))
    with open(tmp_path / "saved" / "model.safetensors", "r+b") as file:
        file.seek(-100, os.SEEK_END)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 4]))
    with pytest.raises(ReconError, match=r"saved' cannot be loaded: 'model.safetensors' is damaged"):
        models.load(str(tmp_path / "saved"))
