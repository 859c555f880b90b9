"""Known numbers of the bundled model, so that a change that spoils them does not go unseen."""

import pytest
from fixtures.runs import record_of

from recon import Execution, RunSpec, Session, load, perplexity, sample_tokens

pytestmark = pytest.mark.slow


def test_dense_perplexity():
    """Four windows of 512 tokens of held-out Wikipedia. bfloat16 rounds differently on different processors."""
    model, tokenizer = load("smollm2-135m")
    tokens = sample_tokens("wikipedia", "evaluation", tokenizer, samples=4, sequence_length=512)
    for dtype, golden in (("float32", 20.54), ("bfloat16", 20.57)):
        found = perplexity(model, tokens, execution=Execution("cpu", dtype))
        assert (found.tokens, found.value) == (4 * 511, pytest.approx(golden, rel=0.01)), dtype


def test_reconstructing_the_bundled_model():
    """The paper's picture, small: half-block windows recover a share, whole blocks about as well, single matrices worse."""
    base, session = RunSpec.of(samples=32, sequence_length=256, evaluation_samples=6), Session()

    def share(**changes) -> float:
        record = record_of(base.replaced(**changes), session)
        assert record.metrics["sparsity"] == 0.5
        assert record.metrics["held_out_error"] < record.metrics["held_out_error_pruned"] or changes["granularity"] == "matrix"
        return record.metrics["share_recovered"]

    half = share(granularity="half-block")
    assert half > 0.15
    assert share(granularity="block") == pytest.approx(half, abs=0.08)
    assert share(granularity="matrix") < half - 0.03
    assert share(granularity="half-block", criterion="magnitude") > half
