"""Words for captions."""

import pandas as pd

from recon.experiment.record import RunRecord
from recon.paper.captions import dense_words, evaluation_words, rate_words, seed_words


def test_seeds_in_words():
    runs = pd.DataFrame({"fit": [*"aaabbbcd"], "seed": [2, 1, 0, 0, 1, 2, 0, 0]})
    assert seed_words(runs, "fit") == "seeds 0, 1, 2 (seed 0 for c, d)"
    assert seed_words(runs.replace("d", "d, e"), "fit") == "seeds 0, 1, 2 (seed 0 for c, 'd, e')"
    assert seed_words(runs[runs["seed"] == 0], "fit") == "seed 0"


def test_learning_rates_in_words():
    assert rate_words(["a", "b", "a"], {"b": 1e-4}, 3e-3) == "0.003 for a, 0.0001 for b"


def test_what_dense_is_in_words():
    def record(model, **protocol):
        return RunRecord({"model": model}, "key", protocol={"evaluation": "perplexity: on text"} | protocol)

    quantised, folder, old = record("a", dense="dequantised from X"), record("/some/b", dense="bfloat16"), record("c")
    assert dense_words([quantised, quantised, folder, old]) == "Dense weights: a dequantised from X; b bfloat16."
    assert evaluation_words([quantised]) == "Perplexity: on text. Dense weights: a dequantised from X."
    assert dense_words([old]) == "" and evaluation_words([old]) == "Perplexity: on text."
