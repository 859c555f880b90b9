"""What is measured of dense models from one process to the next."""

import pytest
from fixtures.runs import comparable, record_of

import recon
from recon.study import dense_cache
from recon.study.measure import Measurement


@pytest.fixture
def spec(tiny_folder, tiny_text, tmp_path, monkeypatch):
    monkeypatch.setenv("RECON_CACHE", str(tmp_path))
    monkeypatch.setattr(dense_cache, "LEAST", 0)
    own = dense_cache.environment
    monkeypatch.setattr(dense_cache, "environment", lambda *given: own(*given) | {"git_dirty": False})
    return recon.RunSpec.of(
        model=tiny_folder, text=tiny_text, samples=4, sequence_length=32, held_out_samples=2, granularity="none",
        evaluation_texts=(tiny_text,), evaluation_samples=3, evaluation_length=32,
    )  # fmt: skip


def kept(folder):
    return sorted((folder / "derived").glob("dense-*"))


@pytest.mark.parametrize("stream", ["no", "yes"])
def test_the_next_process_measures_the_dense_model_no_more(spec, stream, monkeypatch):
    first = record_of(spec, stream=stream)
    monkeypatch.setattr(Measurement, "of_dense", lambda *given: pytest.fail("measured again"))
    again = record_of(spec.replaced(pattern="0.6"), stream=stream)
    same = record_of(spec, stream=stream)
    assert comparable(same) == comparable(first)
    assert (first.shared, again.shared) == ([], ["dense"])
    assert again.metrics["dense_perplexity"] == first.metrics["dense_perplexity"]


@pytest.mark.parametrize(
    "change", [{"evaluation_length": 16}, {"evaluation_samples": 2}, {"held_out_samples": 0}, {"compute_dtype": "float32"}]
)
def test_whatever_decides_it_keeps_it_apart(spec, change):
    base = spec.replaced(compute_dtype="bfloat16")
    record_of(base)
    assert record_of(base.replaced(**change)).shared == []


def test_a_damaged_file_is_measured_again(spec, tmp_path, caplog):
    first, (folder,) = record_of(spec), kept(tmp_path)
    states = folder / dense_cache.STATES
    states.write_bytes(states.read_bytes()[:-1] + b"x")
    again = record_of(spec)
    assert again.shared == [] and comparable(again) == comparable(first)
    assert "damaged" in caplog.text
    assert record_of(spec).shared == ["dense"]


def test_room_is_bounded_and_the_oldest_go(spec, tmp_path, monkeypatch):
    record_of(spec)
    (oldest,) = kept(tmp_path)
    monkeypatch.setattr(dense_cache, "ROOM", 1.5 * sum(file.stat().st_size for file in oldest.iterdir()))
    record_of(spec.replaced(evaluation_samples=2))
    (left,) = kept(tmp_path)
    assert left != oldest
    assert record_of(spec.replaced(evaluation_samples=2)).shared == ["dense"]


def test_of_code_that_is_not_committed_nothing_is_kept(spec, tmp_path, monkeypatch):
    monkeypatch.setattr(dense_cache, "environment", lambda *given: {"git_dirty": True})
    record_of(spec)
    assert kept(tmp_path) == []


def test_tiny_models_are_measured_anew(spec, tmp_path, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv("RECON_CACHE", str(tmp_path))
    record_of(spec)
    assert kept(tmp_path) == []
