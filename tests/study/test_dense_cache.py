"""What is measured of dense models from one process to the next."""

import pytest
from fixtures.runs import comparable, record_of

import recon
from recon.study import dense_cache


@pytest.fixture
def spec(tiny_folder, tiny_text, tmp_path, monkeypatch):
    monkeypatch.setattr(dense_cache, "LEAST", 0)
    monkeypatch.setenv("RECON_CACHE", str(tmp_path))
    monkeypatch.setattr("recon.study.environment.commit", lambda: {"git_commit": "one", "git_dirty": False})
    return recon.RunSpec.of(
        model=tiny_folder, text=tiny_text, samples=4, sequence_length=32, held_out_samples=2, granularity="none",
        evaluation_texts=(tiny_text,), evaluation_samples=3, evaluation_length=32, compute_dtype="bfloat16",
    )  # fmt: skip


@pytest.mark.parametrize("stream", ["no", "yes"])
def test_the_next_process_measures_the_dense_model_no_more(spec, stream):
    first = record_of(spec, stream=stream)
    again, same = record_of(spec.replaced(pattern="0.6", seed=1), stream=stream), record_of(spec, stream=stream)
    assert comparable(same) == comparable(first)
    assert (first.shared, again.shared) == ([], ["dense"])
    assert again.metrics["dense_perplexity"] == first.metrics["dense_perplexity"]


@pytest.mark.parametrize(
    "change", [{"evaluation_length": 16}, {"evaluation_samples": 2}, {"held_out_samples": 0}, {"compute_dtype": "float32"}]
)
def test_whatever_decides_it_keeps_it_apart(spec, change):
    record_of(spec)
    assert record_of(spec.replaced(**change)).shared == []


def test_of_code_that_is_not_committed_nothing_is_kept(spec, tmp_path, monkeypatch):
    monkeypatch.setattr("recon.study.environment.commit", lambda: {"git_commit": "one", "git_dirty": True})
    record_of(spec)
    assert not list((tmp_path / "derived").glob("dense-*"))
