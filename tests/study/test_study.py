"""Studies: what is missing is run and what is done is not; a run that fails fails alone."""

import json
import shutil
from pathlib import Path
from unittest.mock import Mock

import pytest
from fixtures.runs import comparable, record_of

import recon
from recon.study import run, studies
from recon.study.record import read_record


@pytest.fixture
def counted(monkeypatch):
    """Runs as studies do, and counts what is really run."""
    run = Mock(wraps=recon.run)
    monkeypatch.setattr(studies, "run", run)
    return run


def test_grid_has_every_combination(tiny_spec):
    specs = recon.grid(tiny_spec, granularity=["block", "model"], seed=[0, 1])
    wanted = [("block", 0), ("block", 1), ("model", 0), ("model", 1)]
    assert [(spec.reconstruction.granularity, spec.seed) for spec in specs] == wanted
    assert {spec.calibration.samples for spec in specs} == {4}
    assert len(set(recon.grid(tiny_spec, preset=["paper"], propagation=["mixed", "dense"]))) == 2  # given values go first
    with pytest.raises(recon.ReconError, match="unknown option 'sed'; allowed: model, revision"):
        recon.grid(tiny_spec, sed=[1])
    with pytest.raises(recon.ReconError, match="values of criterion are 'wanda'; allowed: a list of values"):
        recon.grid(tiny_spec, criterion="wanda")


def test_what_is_done_is_not_done_again_what_failed_is_and_rows_are_in_order(tiny_spec, counted, tmp_path):
    """Lengths that are not given, and the same given, are one run; so are runs of one model at two places."""
    specs = recon.grid(tiny_spec.replaced(evaluation_length=0), granularity=["block", "9-blocks"], seed=[1, 0])
    given = [spec.replaced(evaluation_length=256) for spec in specs]
    first = recon.run_study(specs[:1], tmp_path, progress=False)
    assert counted.call_count == 1 and list(first["status"]) == ["done"]
    found = recon.run_study(specs, tmp_path, progress=False, compute=False)
    assert list(found["status"]) == ["done"] + ["missing"] * 3 and "no record" in found["error"][1]
    assert counted.call_count == 1 and len(list(tmp_path.glob("*.json"))) == 1 and set(found["evaluation_length"]) == {256}
    runs = recon.run_study(specs, tmp_path, progress=False)
    assert counted.call_count == 4 and list(runs["key"]) == [spec.key() for spec in given]
    assert [*zip(runs["granularity"], runs["seed"])] == [("block", 1), ("block", 0), ("9-blocks", 1), ("9-blocks", 0)]
    assert list(runs["status"]) == ["done", "done", "failed", "failed"] and "the model has 4" in runs["error"][2]
    assert recon.run_study(given, tmp_path, progress=False)["perplexity"].equals(runs["perplexity"]) and counted.call_count == 6
    moved = shutil.copytree(tiny_spec.model.model, tmp_path / "moved")
    again = recon.run_study(specs[0].replaced(model=str(moved)), tmp_path, progress=False, compute=False)
    assert again["perplexity"][0] == runs["perplexity"][0] and again["model"][0] == str(moved)


@pytest.mark.parametrize("criterion", ["wanda", "sparsegpt", "flap"])
def test_a_study_fits_windows_once_for_all_that_retrain_them(tiny_spec, tmp_path, monkeypatch, criterion):
    fits = Mock(wraps=run.reconstruct.reconstruct)
    monkeypatch.setattr(run.reconstruct, "reconstruct", fits)
    base = tiny_spec.replaced(criterion=criterion, train="all")
    specs = recon.grid(base, granularity=["model", "block"], retrain=["full", "none"])
    found = recon.run_study(specs, tmp_path, progress=False)
    assert fits.call_count == 2 and list(found["status"]) == ["done"] * 4
    for spec in specs:
        assert comparable(read_record(tmp_path / f"{spec.key()}.json")) == comparable(record_of(spec))


def test_a_run_whose_model_is_gone_fails_alone(tiny_spec, tiny_folder, tmp_path, monkeypatch):
    """Not even its key can be had any more; and one whose model has changed since the study began is not taken for it."""
    gone, changed = (str(shutil.copytree(tiny_folder, tmp_path / name)) for name in ("gone", "changed"))
    for number, model in enumerate((gone, changed), 1):  # equal ones would be one run
        with (Path(model) / "config.json").open("a") as config:
            config.write(number * "\n")
    wanted = [tiny_spec.replaced(model=model, granularity="none") for model in (gone, changed, tiny_folder)]
    wanted.append(wanted[-1].replaced(seed=1))
    plain_run = studies.run

    def run(spec, *args, **options):
        if Path(gone).exists():
            shutil.rmtree(gone)
            config = Path(changed) / "config.json"
            config.write_text(config.read_text() + "\n")
        if spec.seed:
            raise RuntimeError("a bug")
        return plain_run(spec, *args, **options)

    monkeypatch.setattr(studies, "run", run)
    runs = recon.run_study(wanted, tmp_path / "records", progress=False)
    assert list(runs["status"]) == ["failed", "failed", "done", "failed"]
    said = {0: "unknown model", 1: "reads have changed", 3: "RuntimeError: a bug"}
    assert all(words in runs["error"][number] for number, words in said.items())
    assert {path.stem for path in (tmp_path / "records").glob("*.json")} == set(runs["key"])


def test_a_failure_replaces_no_finished_record(tiny_spec, counted, tmp_path, monkeypatch):
    path = tmp_path / "record.json"
    for effect, status in ((None, "done"), (OSError("disk"), "failed")):
        counted.side_effect = effect
        assert studies.run_to_record(tiny_spec, path, recon.RunOptions(progress=False))[0].status == status
    counted.side_effect = None
    assert json.loads(path.read_text())["status"] == "done"
    # On a cluster: another study finishes the run while the worker that has it is lost.
    key = tiny_spec.resolved().key()

    def lost(*given):
        shutil.copy(path, tmp_path / f"{key}.json")
        yield RuntimeError("a worker is gone")

    monkeypatch.setattr(studies, "spread", lost)
    found = recon.run_study([tiny_spec], tmp_path, progress=False, executor=recon.Ray())
    assert [*found["status"]] == ["failed"] and json.loads((tmp_path / f"{key}.json").read_text())["status"] == "done"


def test_a_folder_that_cannot_be_written_is_refused_first(tiny_spec, counted, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(recon.ReconError, match="record folder: folder '.*file/records' cannot be written"):
        recon.run_study([tiny_spec], tmp_path / "file" / "records", progress=False)
    assert not counted.called


def test_a_study_of_nothing_has_the_columns_of_any_other(tmp_path):
    nothing = recon.run_study([], tmp_path)
    assert nothing.empty and {*recon.RunSpec().flat(), "peak_memory_bytes", "key", "status", "error"} <= set(nothing)
