"""Specs of methods, named as by `companion.frame.method_name`; the search for learning rates; finished runs of a study."""

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
    """The spec of the method called `name`, on `count` samples; "dense, <retraining>" retrains the dense model."""
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
    """For each learning rate that `spec` uses, by option name, the spec to search it with: a variant of it with `options`.

    Reconstruction is searched without retraining; retraining without reconstruction, on the same masks for all recipes.
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
    """Searches, for each cell (a spec, and the option to set), the rate of `rates` with the lowest held-out perplexity.

    A cell begins with the rates that have records. Without any, it begins with three: the median of the other cells' choices (or
    the middle rate), the rate below, and the second above: rates that are too low differ only by chance. Then the neighbours of
    its best rate are tried, and the rate above the highest tried, until the highest is no better than the one below it.
    Returns the runs (see `companion.frame.load`) with their cell, their rate, and whether it is `chosen`.
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
    """The learning rate chosen for each cell, from the runs that `search` returns."""
    best = runs[runs["chosen"]] if len(runs) else runs
    return dict(zip(best["cell"], best["rate"])) if len(best) else {}


def tuned(
    specs: Sequence[recon.RunSpec], rates: Sequence[float], folder: Path, compute: bool = True, **options
) -> tuple[list[recon.RunSpec], pd.DataFrame]:
    """`specs` with the learning rates that `search` chooses, and the runs of the search. Without `rates`, `specs` as they are.

    options: set in the runs of the search; specs that differ only in them share one search.
    """
    if not rates:
        return list(specs), pd.DataFrame()
    specs = [spec.replaced(size_power=0.0, matrix_rate=1.0) for spec in specs]  # rates are not scaled by the window's size
    cells = [searched(spec, **options) for spec in specs]
    runs = search({cell: name for own in cells for name, cell in own.items()}, rates, folder, compute)
    best = chosen(runs)
    known = [{name: best[cell] for name, cell in own.items() if cell in best} for own in cells]
    return [spec.replaced(**own) for spec, own in zip(specs, known)], runs


def finished(
    study: pd.DataFrame, specs: Sequence[recon.RunSpec], folder: Path, profile: str, notebook: str, least: float = 1 / 4
) -> pd.DataFrame:
    """The finished runs of `specs`, by `companion.frame.load`; displays the runs that failed in their `study`.

    Raises `MissingRecords` if less than the share `least` is finished: a figure of so few runs would mislead.
    """
    failed = study[~study["status"].isin(["done", "missing"])]
    print(f"{(study['status'] == 'done').sum()} of {len(study)} runs done")
    if len(failed):
        varied = [name for name in DEFAULTS if failed[name].astype(str).nunique() > 1]
        display(failed[[*varied, "status", "error"]])
    if len(found := load(folder, specs)) < least * len(specs):
        raise MissingRecords(profile, notebook)
    return found
