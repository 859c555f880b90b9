"""Learning rates are chosen on held-out text."""

import pandas as pd

from recon.paper.tuning import best
from recon.study.studies import run_study


def test_the_best_is_chosen_on_held_out_text():
    runs = pd.DataFrame({"a": ["x", "x", "y", "y"], "held_out_perplexity": [3.0, 2.0, None, 9.0], "perplexity": [1, 5, 0, 7]})
    assert list(best(runs, "a").index) == [1, 3]
    assert best(runs[["a"]], "a").empty


def test_of_a_study_of_nothing_nothing_is_best(tmp_path):
    assert best(run_study([], tmp_path), "adapter").empty
