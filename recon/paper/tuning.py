"""Learning rates chosen by model, on held-out text."""

from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from recon.config import EvaluationConfig
from recon.experiment.config import RunSpec
from recon.experiment.study import run_study


def best(runs: pd.DataFrame, by: str) -> pd.DataFrame:
    """Of the finished runs of each value of the column `by`, the one with the lowest perplexity on held-out text."""
    if "held_out_perplexity" not in runs:
        return runs.iloc[:0]
    known = runs.dropna(subset="held_out_perplexity")
    return known.loc[known.groupby(by)["held_out_perplexity"].idxmin()]


def tuned_rates(base: RunSpec, rates: dict[str, Iterable[float]], folder: Path | str, compute: bool = True) -> dict[str, float]:
    """By model, the one of its learning rates in `rates` after which half-blocks predict held-out text best.

    What is too fast depends on the size of a model's weights, which differs by an order of magnitude between models. All else is as in
    `base`, but for evaluation text, of which one window is read: that makes a protocol of its own, so these runs never mix with those
    that they choose for. Their records are in `folder` too. Models none of whose runs are done are left out.
    """
    base = base.replaced(granularity="half-block", evaluation_samples=1, tasks=(), task_limit=EvaluationConfig().task_limit)
    specs = [base.replaced(model=model, learning_rate=float(rate)) for model, candidates in rates.items() for rate in candidates]
    found = best(run_study(specs, folder, compute=compute), "model")
    return dict(zip(found["model"], found["learning_rate"]))


def at_rates(specs: Iterable[RunSpec], rates: dict[str, float]) -> list[RunSpec]:
    """`specs` with the learning rate of their model in `rates`, where it is there and they reconstruct by gradient descent."""

    def descends(spec: RunSpec) -> bool:
        return spec.reconstruction.granularity != "none" and spec.reconstruction.solver == "adamw"

    return [
        spec.replaced(learning_rate=rates[spec.model.model]) if spec.model.model in rates and descends(spec) else spec
        for spec in specs
    ]
