"""Words for captions."""

import pandas as pd

from recon.experiment.record import RunRecord
from recon.paper.captions import dense_words, evaluation_words, protocol_words, rate_words, seed_words


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


def test_the_protocol_of_runs_in_words():
    def record(model="a", texts=("wikipedia",), samples=8, pattern="0.5"):
        spec = {"text": "wikipedia", "samples": samples, "sequence_length": 64, "learning_rate": 0.01, "rate": "relative"}
        spec |= {"model": model, "pattern": pattern, "evaluation_texts": texts}
        return RunRecord(spec, "key", protocol={"evaluation": "perplexity: on text"})

    runs = pd.DataFrame({"model": ["a", "a", "b"], "pattern": ["0.5", "0.5", "2:4"], "seed": [0, 1, 0]})
    seeds = "Seeds 0, 1 (seed 0 for b 2:4)."
    said = "Calibration: 8 x 64 tokens of wikipedia. Learning rate: 0.01 (relative). Perplexity: on text."
    assert protocol_words(runs, [record(), record("b")]) == f"{seeds} {said}"
    assert protocol_words(runs, [record(texts=("wikipedia", "news"))]) == f"{seeds} {said} Of these texts, wikipedia is drawn."
    two = protocol_words(runs, [record(), record(), record("b", samples=4, pattern="2:4")])
    other = said.replace("8 x", "4 x").replace("Cal", "cal")
    assert two == f"{seeds} a 0.5: {said.replace('Cal', 'cal')} b 2:4: {other}"
