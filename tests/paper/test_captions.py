"""Words for captions."""

import pandas as pd

from recon.paper.captions import rate_words, seed_words


def test_seeds_in_words():
    runs = pd.DataFrame({"fit": [*"aaabbbcd"], "seed": [2, 1, 0, 0, 1, 2, 0, 0]})
    assert seed_words(runs, "fit") == "seeds 0, 1, 2 (seed 0 for c, d)"
    assert seed_words(runs.replace("d", "d, e"), "fit") == "seeds 0, 1, 2 (seed 0 for c, 'd, e')"
    assert seed_words(runs[runs["seed"] == 0], "fit") == "seed 0"


def test_learning_rates_in_words():
    assert rate_words(["a", "b", "a"], {"b": 1e-4}, 3e-3) == "0.003 for a, 0.0001 for b"
