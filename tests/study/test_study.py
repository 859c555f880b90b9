import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fixtures.processes import heed_interrupts

import recon
from recon.errors import ReconError
from recon.study import studies
from recon.study.record import read_record
from recon.study.studies import fit_name, fit_options, grid, recipe_name, run_study

SCRIPT = """
import sys
import recon
base = recon.RunSpec.of(
    model=sys.argv[1], text=sys.argv[2], samples=4, epochs=1, sequence_length=32, held_out_samples=2,
    evaluation_texts=(sys.argv[2],), evaluation_samples=2, evaluation_length=64,
)
print("ready", flush=True)
runs = recon.run_study(recon.grid(base, granularity=["none", "half-block", "block", "model"], seed=[0, 1]), sys.argv[3], progress=False)
print(*runs["status"])
"""


@pytest.fixture
def base(tiny_folder, tiny_text):
    return recon.RunSpec.of(
        model=str(tiny_folder),
        text=str(tiny_text),
        samples=4,
        epochs=1,
        sequence_length=32,
        held_out_samples=2,
        evaluation_texts=(str(tiny_text),),
        evaluation_samples=2,
        evaluation_length=64,
    )


@pytest.fixture
def counted(monkeypatch):
    """The specs that are really run."""
    done = []

    def run(spec, *args, **options):
        done.append(spec)
        return recon.run(spec, *args, **options)

    monkeypatch.setattr(studies, "run", run)
    return done


def test_without_computing_what_is_missing_is_said(base, counted, tmp_path):
    specs = grid(base, granularity=["none", "block"])
    run_study(specs[:1], tmp_path, progress=False)
    found = run_study(specs, tmp_path, progress=False, compute=False)
    assert list(found["status"]) == ["done", "missing"] and "no record" in found["error"][1]
    assert len(counted) == 1 and len(list(tmp_path.glob("*.json"))) == 1


def test_lengths_that_are_not_given_and_the_same_given_are_one_run(base, counted, tmp_path):
    base = base.replaced(granularity="none", criterion="magnitude", held_out_samples=0, samples=1)
    found = run_study(grid(base, evaluation_length=[0, 256], sequence_length=[0]), tmp_path, progress=False)
    assert len(counted) == 1 and len(set(found["key"])) == 1
    assert list(found["evaluation_length"]) == list(found["sequence_length"]) == [256, 256]
    missing = run_study([base.replaced(evaluation_length=0, seed=7)], tmp_path, progress=False, compute=False)
    assert list(missing["evaluation_length"]) == [256]


def test_a_study_says_how_long_it_takes_once_per_model(base, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "recon"):
        run_study(grid(base, granularity=["none", "block"]), tmp_path, progress=False)
    said = [message for message in caplog.messages if message.startswith("study: ")]
    assert len(said) == 1 and "2 runs, at most" in said[0]


def test_records_are_read_in_the_order_asked_for(base, tmp_path):
    specs = grid(base, granularity=["none", "block"])
    keys = list(run_study(specs, tmp_path, progress=False)["key"])
    assert [record.key for record in studies.read_records(tmp_path, keys[::-1])] == keys[::-1]
    assert {record.key for record in studies.read_records(tmp_path)} == set(keys)
    with pytest.raises(ReconError, match="gone"):
        studies.read_records(tmp_path, ["gone"])
    with pytest.raises(ReconError, match="does not exist"):
        studies.read_records(tmp_path / "nowhere")


def test_grid_has_every_combination(base):
    specs = grid(base, granularity=["block", "model"], seed=[0, 1, 2])
    assert [(spec.reconstruction.granularity, spec.seed) for spec in specs] == [
        (g, s) for g in ("block", "model") for s in (0, 1, 2)
    ]
    assert {spec.calibration.samples for spec in specs} == {4}
    with pytest.raises(ReconError, match="unknown option 'sed'; allowed: model, revision"):
        grid(base, sed=[1])


@pytest.mark.parametrize("fit", ["none", "matrix", "matrix exact", "half-block", "half-block from exact", "2-blocks", "model"])
def test_short_names_go_both_ways(base, fit):
    [spec] = grid(base, **fit_options(fit))
    assert fit_name(spec.flat()) == fit
    assert (spec.reconstruction.solver == "exact") == (fit == "matrix exact") and (
        spec.reconstruction.start == "exact"
    ) == fit.endswith("from exact")


def test_what_is_done_is_not_done_again_and_rows_are_in_order(base, counted, tmp_path):
    specs = grid(base, granularity=["block", "none"], seed=[1, 0])
    first = run_study(specs[:1], tmp_path, progress=False)
    assert len(counted) == 1 and list(first["status"]) == ["done"]
    runs = run_study(specs, tmp_path, progress=False)
    assert len(counted) == 4
    assert list(zip(runs["granularity"], runs["seed"], strict=True)) == [("block", 1), ("block", 0), ("none", 1), ("none", 0)]
    assert list(runs["key"]) == [spec.key() for spec in specs]
    assert run_study(specs, tmp_path, progress=False)["perplexity"].equals(runs["perplexity"]) and len(counted) == 4


@pytest.mark.parametrize("damage", ["truncated", "not a record", "another run's", "not text"])
def test_a_corrupt_record_is_reported_set_aside_and_computed_anew(base, counted, tmp_path, caplog, damage):
    [row] = run_study([base], tmp_path, progress=False).to_dict("records")
    path = tmp_path / f"{row['key']}.json"
    whole = path.read_bytes()
    path.write_bytes(
        {
            "truncated": whole[:200],
            "not a record": b"{}",
            "another run's": whole.replace(row["key"].encode(), b"0" * 16),
            "not text": b"\xff\xfe\x00",
        }[damage]
    )
    spoilt = path.read_bytes()
    with caplog.at_level(logging.WARNING, "recon"):
        [again] = run_study([base], tmp_path, progress=False).to_dict("records")
    assert path.name in caplog.text and "set aside" in caplog.text
    assert len(counted) == 2 and again["perplexity"] == row["perplexity"]
    assert path.with_suffix(".corrupt").read_bytes() == spoilt
    assert read_record(path).status == "done"


def test_a_run_whose_model_is_gone_fails_alone(base, tiny_folder, tmp_path, monkeypatch):
    """Not even its key can be had any more; and one whose model has changed since the study began is not taken for it."""
    gone, changed = (str(shutil.copytree(tiny_folder, tmp_path / name)) for name in ("gone", "changed"))
    wanted = [base.replaced(model=model, granularity="none") for model in (gone, changed, base.model.model)]
    plain_run = studies.run

    def run(spec, *args, **options):
        if Path(gone).exists():
            shutil.rmtree(gone)
            config = Path(changed) / "config.json"
            config.write_text(config.read_text() + "\n")
        return plain_run(spec, *args, **options)

    monkeypatch.setattr(studies, "run", run)
    runs = run_study(wanted, tmp_path / "records", progress=False)
    assert sorted(runs["status"]) == ["done", "failed", "failed"] and runs["status"].iloc[2] == "done"
    assert "unknown model" in runs["error"].iloc[0]
    assert "reads have changed" in runs["error"].iloc[1]
    assert {path.stem for path in (tmp_path / "records").glob("*.json")} == set(runs["key"])


def test_a_failed_run_says_how_and_the_others_go_on(base, counted, tmp_path):
    bad = grid(base, granularity=["9-blocks"])[0]
    runs = run_study([bad, base], tmp_path, progress=False)
    assert list(runs["status"]) == ["failed", "done"]
    assert "the model has 4" in runs["error"][0]
    assert json.loads((tmp_path / f"{bad.key()}.json").read_text())["status"] == "failed"
    run_study([bad, base], tmp_path, progress=False)
    assert [spec.reconstruction.granularity for spec in counted].count("9-blocks") == 2 and len(counted) == 3


def test_an_unexpected_exception_leaves_its_traceback(base, tmp_path, monkeypatch):
    def broken(*args, **options):
        raise RuntimeError("out of memory, say")

    monkeypatch.setattr(studies, "run", broken)
    [row] = run_study([base], tmp_path, progress=False).to_dict("records")
    assert row["status"] == "failed" and "RuntimeError: out of memory, say" in row["error"] and "Traceback" in row["error"]


def test_a_folder_that_cannot_be_written_is_refused_first(base, counted, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ReconError, match="record folder.*: cannot write to .*file/records"):
        run_study([base], tmp_path / "file" / "records", progress=False)
    assert not counted


def start(folder, tiny_folder, tiny_text):
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tiny_folder), str(tiny_text), str(folder)],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=heed_interrupts,
    )  # fmt: skip
    assert process.stdout.readline() == "ready\n"
    return process


def wait_for_records(folder, count, process, limit=120):
    until = time.monotonic() + limit
    while len(list(folder.glob("*.json"))) < count:
        assert process.poll() is None and time.monotonic() < until, "the study ended or hung before it was to be killed"
        time.sleep(0.002)


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["killed", "interrupted"])
def test_a_study_that_is_stopped_loses_nothing_and_does_nothing_twice(tmp_path, tiny_folder, tiny_text, how):
    folder = tmp_path / "records"
    seen: dict[str, tuple] = {}
    for count in (1, 3):
        process = start(folder, tiny_folder, tiny_text)
        wait_for_records(folder, count, process)
        process.send_signal(how)
        assert process.wait(timeout=300) != 0
        for path in folder.glob("*.json"):
            assert read_record(path).status == "done"  # whole, or not there
            state = (path.stat().st_ino, path.stat().st_mtime_ns)
            assert seen.setdefault(path.name, state) == state
    process = start(folder, tiny_folder, tiny_text)
    assert process.communicate(timeout=600)[0].split() == ["done"] * 8
    assert len(list(folder.glob("*.json"))) == 8
    for name, state in seen.items():
        assert ((folder / name).stat().st_ino, (folder / name).stat().st_mtime_ns) == state


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"granularity": "none"}, "pruned"),
        ({}, "reconstruction"),
        ({"granularity": "none", "retrain": "lora"}, "lora"),
        ({"retrain": "masklora", "retrain_objective": "distil"}, "reconstruction, then masklora, distilled"),
        ({"granularity": "none", "criterion": "none", "retrain": "full"}, "dense, full"),
    ],
)
def test_recipes_have_names(changes, name):
    assert recipe_name(recon.RunSpec.of(**changes).flat()) == name


def test_a_study_of_nothing_has_the_columns_of_any_other(tmp_path):
    nothing = run_study([], tmp_path)
    assert nothing.empty and {*recon.RunSpec().flat(), "fit", "recipe", "key", "status", "error"} <= set(nothing)
