"""Ways to train a pruned model, by the names of `companion.frame.method_name`, the search for learning rates, and studies."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

import pandas as pd
from IPython.display import display

import recon
from companion.frame import DEFAULTS, RECIPES, load, named
from companion.publish import MissingRecords


def method(base: recon.RunSpec, name: str, count: int, seed: int = 0) -> recon.RunSpec:
    """The spec of a method on `count` samples; "dense, <retraining>" is the dense model retrained."""
    rest = name.removeprefix("dense, ")
    first, _, then = rest.partition(", then ")
    if first != "reconstruction":
        then = first.removeprefix("pruned")
    retraining, _, distilled = then.partition(", ")
    return base.replaced(
        seed=seed,
        samples=count,
        granularity="half-block" if first == "reconstruction" else "none",
        criterion=base.pruning.criterion if rest == name else "none",
        retrain=retraining or "none",
        retrain_objective="distil" if distilled else "labels",
    )


def searched(spec: recon.RunSpec, **options) -> dict[str, recon.RunSpec]:
    """The rates of `spec` that a search can choose, each with the spec that it is searched with, which differs in `options`.

    Reconstruction is searched without retraining after it, and retraining by itself: there all recipes are one.
    """
    cells = {}
    if spec.reconstruction.granularity != "none" and spec.reconstruction.solver == "adamw":
        cells["learning_rate"] = replace(spec, retraining=recon.RetrainingConfig()).replaced(**options)
    if spec.retraining.retrain != "none":
        masks = {name: DEFAULTS[name] for name in vars(spec.pruning) if RECIPES["paper"][name] != DEFAULTS[name]}
        alone = replace(spec, pruning=replace(spec.pruning, **masks), reconstruction=recon.ReconstructionConfig())
        cells["retrain_learning_rate"] = alone.replaced(granularity="none", **options)
    return cells


def search(cells: Mapping[recon.RunSpec, str], rates: Sequence[float], folder: Path, compute: bool = True) -> pd.DataFrame:
    """For each cell, a spec and the name of its learning rate, that of `rates` which is best on held-out text.

    A cell begins with the rates that have records; without any, with the median of what other cells chose, or of all rates, the
    next lower one, and the next but one above it, as rates that are too low differ by chance alone. Then the neighbours of its
    best rate are tried, and the next one above the highest, until that is worse than the one below it.
    Returns the runs (see `companion.frame.load`) with their cell and rate, and whether that is `chosen`.
    """
    rates, asked = sorted(map(float, rates)), set()
    grid = {(cell, rate): cell.replaced(**{name: rate}) for cell, name in cells.items() for rate in rates}
    of_key = named(grid)
    while True:
        runs, best = load(folder, grid.values()), {}
        if len(runs):
            runs = runs.assign(cell=[of_key[key][0] for key in runs["key"]], rate=[of_key[key][1] for key in runs["key"]])
            runs = runs.drop_duplicates(["cell", "rate"])
            runs["chosen"] = runs.index.isin(runs.groupby("cell", sort=False)["held_out_perplexity"].idxmin())
            best = {cell: rates.index(rate) for cell, rate in chosen(runs).items()}
        usual = round(median(best.values())) if best else len(rates) // 2
        places = {cell: {place - 1, place, place + 1} for cell, place in best.items()}
        for cell, own in runs.sort_values("rate").groupby("cell", sort=False) if best else ():
            if len(own) > 1 and own["held_out_perplexity"].iloc[-1] < own["held_out_perplexity"].iloc[-2]:
                places[cell].add(rates.index(own["rate"].iloc[-1]) + 1)
        begin = usual - 1, usual, min(usual + 2, len(rates) - 1)
        wanted = {each for each in grid if rates.index(each[1]) in places.get(each[0], begin) and each not in asked}
        if not (compute and wanted):
            return runs
        recon.run_study([grid[each] for each in grid if each in wanted], folder)
        asked |= wanted


def chosen(runs: pd.DataFrame) -> dict[recon.RunSpec, float]:
    """The learning rate of each cell, from what `search` gives."""
    best = runs[runs["chosen"]] if len(runs) else runs
    return dict(zip(best["cell"], best["rate"])) if len(best) else {}


def tuned(
    specs: Sequence[recon.RunSpec], rates: Sequence[float], folder: Path, compute: bool = True, **options
) -> tuple[list[recon.RunSpec], pd.DataFrame]:
    """`specs`, each at the rates that a search chooses for it, and the runs of `search`; without `rates`, as they are.

    options: in which the runs of the search differ; specs that agree in all else share one search.
    """
    if not rates:
        return list(specs), pd.DataFrame()
    specs = [spec.replaced(size_power=0.0, matrix_rate=1.0) for spec in specs]  # a rate is that of its window, by no rule
    cells = [searched(spec, **options) for spec in specs]
    runs = search({cell: name for own in cells for name, cell in own.items()}, rates, folder, compute)
    best = chosen(runs)
    known = [{name: best[cell] for name, cell in own.items() if cell in best} for own in cells]
    return [spec.replaced(**own) for spec, own in zip(specs, known)], runs


def finished(
    study: pd.DataFrame, specs: Sequence[recon.RunSpec], folder: Path, profile: str, notebook: str, least: float = 1 / 4
) -> pd.DataFrame:
    """The finished runs of `specs`, by `companion.frame.load`; what failed in their `study` is shown.

    Raises `MissingRecords` if they are less than this share: a figure of so few would mislead.
    """
    failed = study[~study["status"].isin(["done", "missing"])]
    print(f"{(study['status'] == 'done').sum()} of {len(study)} runs done")
    if len(failed):
        varied = [name for name in DEFAULTS if failed[name].astype(str).nunique() > 1]
        display(failed[[*varied, "status", "error"]])
    if len(found := load(folder, specs)) < least * len(specs):
        raise MissingRecords(profile, notebook)
    return found
