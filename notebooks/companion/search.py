"""Ways to train a pruned model, by the names of `companion.frame.recipe_name`, and the search for their learning rates."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

import recon
from companion.frame import load


def recipe(
    base: recon.RunSpec, name: str, count: int, seed: int = 0, rates: Mapping[tuple[str, int], float] = {}
) -> recon.RunSpec:
    """The spec of a recipe on `count` samples; "dense, <retraining>" is the dense model retrained.

    rates: by part of a recipe ("reconstruction", or a way to retrain) and sample count; those of `base` if missing.
    """
    rest = name.removeprefix("dense, ")
    first, _, then = rest.partition(", then ")
    options: dict = {"seed": seed} | ({"criterion": "none"} if rest != name else {})
    if first == "reconstruction":
        options |= {"granularity": "half-block", "samples": count}
        options |= {"learning_rate": rates[first, count]} if (first, count) in rates else {}
    else:
        options["granularity"], then = "none", "" if first == "pruned" else first
    if then:
        method, _, distilled = then.partition(", ")
        options |= {"retrain": method, "retrain_samples": count} | ({"retrain_objective": "distil"} if distilled else {})
        options |= {"retrain_learning_rate": rates[then, count]} if (then, count) in rates else {}
    return base.replaced(**options)


def search(
    base: recon.RunSpec,
    counts: Mapping[str, Sequence[int]],
    rates: Sequence[float],
    seed: int,
    folder: Path,
    compute: bool = True,
) -> pd.DataFrame:
    """Searches every recipe in `counts`, at each of its sample counts on its own, for the rate that is best on held-out text.

    It begins with the rates that have records, or three in the middle. It tries the neighbours of the best until both have run.
    Returns the runs: recipe, samples, learning_rate, held_out_perplexity, key, and whether that rate is `chosen`.
    """
    rates, cells = sorted(rates), [(name, count) for name, own in counts.items() for count in own]
    grid = {(*cell, rate): recipe(base, *cell, seed, {cell: rate}) for cell in cells for rate in rates}
    asked: set = set()
    while True:
        runs = load(folder, grid.values())
        if len(runs):
            alone = runs["retrain"] == "none"
            runs = runs.assign(
                learning_rate=runs["learning_rate"].where(alone, runs["retrain_learning_rate"]), samples=runs["trained"]
            )
            runs = runs[["recipe", "samples", "learning_rate", "held_out_perplexity", "key"]].drop_duplicates(
                ["recipe", "samples", "learning_rate"]
            )
            runs["chosen"] = runs.index.isin(runs.groupby(["recipe", "samples"])["held_out_perplexity"].idxmin())
        best = {cell: rates.index(rate) for cell, rate in chosen(runs).items()}
        wanted = {
            key for key in grid if abs(rates.index(key[2]) - best.get(key[:2], len(rates) // 2)) <= 1 and key not in asked
        }  # fmt: skip
        if not (compute and wanted):
            return runs
        recon.run_study([grid[key] for key in grid if key in wanted], folder)
        asked |= wanted


def chosen(search: pd.DataFrame) -> dict[tuple[str, int], float]:
    """The learning rate of each recipe at each sample count, from what `search` gives."""
    best = search[search["chosen"]] if len(search) else search
    return dict(zip(zip(best["recipe"], best["samples"]), best["learning_rate"])) if len(best) else {}
