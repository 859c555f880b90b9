"""The quickstart's figures: findings follow from what is drawn."""

from types import SimpleNamespace

import matplotlib

matplotlib.use("agg")

import numpy as np
import pandas as pd
import pytest
import torch
from fixtures.models import make_model

from recon.model.discovery import decompose
from recon.paper.plots import quickstart

pytestmark = pytest.mark.usefixtures("style")


@pytest.mark.parametrize(
    ("share", "said"),
    [(0.5, "50% of the damage (the rise in log-perplexity) is"), (-0.1, "none of the damage"), (None, "to 30.0.")],
)
def test_the_finding_says_what_is_recovered(share, said):
    metrics = {"dense_perplexity": 20.0, "pruned_perplexity": 45.0, "perplexity": 30.0, "share_recovered": share}
    plot = quickstart.perplexity(metrics)
    assert said in plot.finding and "from 20.0 to 45.0, reconstruction to 30.0" in plot.finding
    assert list(plot.data["perplexity"]) == [20.0, 45.0, 30.0]


@pytest.mark.parametrize("family, fits", [("llama", True), ("mixtral", False)])
def test_experts_do_not_fit_on_a_page(family, fits):
    assert quickstart.fits_on_a_page(decompose(make_model(family))) == fits


def test_windows_that_got_no_better_are_not_counted():
    def window(name, before, after):
        return {"name": name, "error_before": {"held_out": before}, "error_after": {"held_out": after}}

    windows = [window("block 0 attention", 0.2, 0.1), window("block 0 mlp", 0.4, 0.4)]
    plot = quickstart.errors(windows, [0.3, 0.6], [0.2, 0.25])
    assert (
        "of 1 of 2 windows" in plot.finding and "25% of the variance is unexplained, without reconstruction 60%" in plot.finding
    )
    assert list(plot.data["ratio"].dropna()) == [0.5, 1.0]
    whole = quickstart.errors([window("block 0-1", 0.2, 0.1)], [0.3, 0.6], [0.2, 0.25])  # no halves: one kind of mark
    assert "of 1 of 1 windows" in whole.finding


@pytest.mark.parametrize(
    ("end", "exact", "said"), [(0.05, 0.08, "lower its error from 0.100 to 0.0500"), (0.12, 5.0, "do not lower")]
)
def test_the_method_is_drawn_with_its_error(end, exact, said):
    dense = np.arange(1.0, 10.0).reshape(3, 3)
    mask = np.eye(3)
    curve = pd.DataFrame({"step": [0, 2, 4], "error": [0.1, 0.08, end]})
    plot = quickstart.method(
        {"dense": dense, "pruned": dense * mask, "reconstructed": 2 * dense * mask}, curve, exact, "block 0 mlp"
    )
    assert said in plot.finding and plot.finding.startswith("On held-out text, 4 steps")
    corners = plot.data[plot.data["panel"] == "weights"]
    zeros = corners[corners["value"] == 0].groupby("state").size()
    assert dict(zeros) == {"pruned": 6, "reconstructed": 6}
    assert list(plot.data.loc[plot.data["panel"] == "error", "value"]) == [0.1, 0.08, end, exact]


def test_sentences_are_what_follows_the_prompt():
    class Tokens(dict):
        input_ids = torch.tensor([[1, 2]])

        def to(self, device):
            return self

    def tokenizer(prompt, return_tensors):
        return Tokens(input_ids=Tokens.input_ids)

    tokenizer.eos_token_id, tokenizer.decode = 0, lambda tokens: " ".join(map(str, tokens.tolist()))
    model = SimpleNamespace(
        device="cpu", generate=lambda input_ids, max_new_tokens, **_: torch.cat([input_ids, input_ids[:, :max_new_tokens] + 7], 1)
    )
    found = quickstart.sentences({"dense": model, "pruned": model}, tokenizer, ["a", "b"], 1)
    assert list(found.index) == [("a", "dense"), ("a", "pruned"), ("b", "dense"), ("b", "pruned")]
    assert set(found["continuation"]) == {"8"}
