"""Words for captions."""

import pandas as pd
from fixtures.made_up import record

from recon.paper.captions import dense_words, evaluation_words, method_words, protocol_words, rate_words, seed_words
from recon.study.record import RunRecord


def test_seeds_in_words():
    runs = pd.DataFrame({"fit": [*"aaabbbcd"], "seed": [2, 1, 0, 0, 1, 2, 0, 0]})
    assert seed_words(runs, "fit") == "seeds 0, 1, 2 (seed 0 for c, d)"
    assert seed_words(runs.replace("d", "d, e"), "fit") == "seeds 0, 1, 2 (seed 0 for c, 'd, e')"
    assert seed_words(runs[runs["seed"] == 0], "fit") == "seed 0"


def test_learning_rates_in_words():
    assert rate_words(["a", "b", "a"], {"b": 1e-4}, 3e-3) == "0.003 for a, 0.0001 for b"


def test_only_names_that_occur_are_explained():
    assert method_words(["reconstruction", "masklora"]) == ""
    assert method_words(pd.Series(["dense, masklora"])) == '"dense, ...": the dense model, retrained likewise. '


def test_what_dense_is_in_words():
    def of(model, **protocol):
        return RunRecord({"model": model}, "key", protocol={"evaluation": "perplexity: on text"} | protocol)

    quantised, folder, old = of("a", dense="dequantised from X"), of("/some/b", dense="bfloat16"), of("c")
    assert dense_words([quantised, quantised, folder, old]) == "Dense weights: a dequantised from X; b bfloat16."
    assert dense_words([old]) == ""


def test_the_protocol_of_runs_in_words():
    runs = pd.DataFrame({"model": ["a", "a", "b"], "pattern": ["0.5", "0.5", "2:4"], "seed": [0, 1, 0]})
    seeds = "Seeds 0, 1 (seed 0 for b 2:4)."
    said = "8 x 64 tokens of wikipedia, whole samples, pruned on 8 (dense statistics); perplexity on 40 x 128 tokens of wikipedia, bfloat16 products"
    made = {"samples": 8, "sequence_length": 64, "evaluation_samples": 40, "evaluation_length": 128}
    fitted = f"{said}; mixed propagation, whitened loss"
    assert evaluation_words([record(**made)]) == f"{fitted}."
    assert protocol_words(runs, [record(**made)]) == f"{seeds} {fitted}."
    losses = [record(**made), record(**made, loss="mse")]  # they differ in what is compared
    assert protocol_words(runs, losses) == f"{seeds} {said}; mixed propagation."
    assert "whole" not in evaluation_words([record(**made | {"chunks": 4})])
    two = protocol_words(runs, [record(**made, model="a"), record(**made | {"samples": 4}, model="b", pattern="2:4")])
    other = fitted.replace("8 x", "4 x").replace("on 8", "on 4")
    assert two == f"{seeds} a 0.5: {fitted}. b 2:4: {other}."
