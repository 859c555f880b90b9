"""How far it scales: findings follow from what is drawn."""

import matplotlib

matplotlib.use("agg")

import pandas as pd
import pytest

from recon.paper.plots import scale

pytestmark = pytest.mark.usefixtures("style")


def test_the_largest_number_of_workers_is_held_against_the_clock():
    rows = [
        (what, count, 8 / count, 8 / count * ratio, count == 1)
        for what, ratio in (("study", 0.9), ("windows", 1.25))
        for count in (1, 2, 4)
    ]
    data = pd.DataFrame(rows, columns=["what", "workers", "measured", "predicted", "calibrates"])
    data["error"] = data["predicted"] / data["measured"] - 1
    said = "With 4 workers, the predicted time is 10 % too short for the study and 25 % too long for the windows."
    assert scale.check(data).finding == said
    assert "no prediction can be checked" in scale.check(data[data["calibrates"]]).finding


def test_what_gains_nothing_from_more_gpus_is_said():
    rows = [("runs", count, 64 / count, "runs") for count in (1, 2, 4)] + [
        ("windows", count, 3 / min(count, 2), "dense pass") for count in (1, 2, 4)
    ]
    plot = scale.carried_on(pd.DataFrame(rows, columns=["what", "GPUs", "hours", "bottleneck"]))
    assert plot.finding == "Predicted, not measured: with more GPUs, time falls up to 4 for runs, 2 for windows."
