"""Ways to train a pruned model, by the names of `companion.frame.method_name`, and the search for learning rates."""

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path

import pandas as pd

import recon
from companion.frame import load


def method(
    base: recon.RunSpec, name: str, count: int, seed: int = 0, rates: Mapping[tuple[str, int], float] = {}
) -> recon.RunSpec:
    """The spec of a method on `count` samples; "dense, <retraining>" is the dense model retrained.

    rates: by part of a method ("reconstruction", or a way to retrain) and sample count; those of `base` if missing.
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
        retraining, _, distilled = then.partition(", ")
        options |= {"retrain": retraining, "retrain_samples": count} | ({"retrain_objective": "distil"} if distilled else {})
        options |= {"retrain_learning_rate": rates[then, count]} if (then, count) in rates else {}
    return base.replaced(**options)


def search(
    cells: Mapping[Hashable, recon.RunSpec], rates: Sequence[float], folder: Path, compute: bool = True, **options
) -> pd.DataFrame:
    """For the spec of each cell on its own, the rate of `rates` that is best on held-out text, of retraining if that is all.

    It begins with the rates that have records, or three in the middle. It tries the neighbours of the best until both have run.
    Returns the runs: cell, learning_rate, held_out_perplexity, key, and whether that rate is `chosen`.

    options: in which the runs of the search differ from `cells`, such as the seed.
    """
    rates, asked = sorted(map(float, rates)), set()
    names = {
        cell: "learning_rate" if spec.reconstruction.granularity != "none" else "retrain_learning_rate"
        for cell, spec in cells.items()
    }
    grid = {(cell, rate): spec.replaced(**options, **{names[cell]: rate}) for cell, spec in cells.items() for rate in rates}
    of_key = {
        spec.replaced(compute_dtype=dtype).key(): place
        for place, spec in grid.items()
        for dtype in ("auto", "bfloat16", "float32")
    }
    while True:
        runs = load(folder, grid.values())
        if len(runs):
            runs = (
                runs[["held_out_perplexity", "key"]]
                .assign(cell=[of_key[key][0] for key in runs["key"]], learning_rate=[of_key[key][1] for key in runs["key"]])
                .drop_duplicates(["cell", "learning_rate"])
            )
            runs["chosen"] = runs.index.isin(runs.groupby("cell", sort=False)["held_out_perplexity"].idxmin())
        best = {cell: rates.index(rate) for cell, rate in chosen(runs).items()}
        wanted = {
            each for each in grid if abs(rates.index(each[1]) - best.get(each[0], len(rates) // 2)) <= 1 and each not in asked
        }
        if not (compute and wanted):
            return runs
        recon.run_study([grid[each] for each in grid if each in wanted], folder)
        asked |= wanted


def chosen(search: pd.DataFrame) -> dict[Hashable, float]:
    """The learning rate of each cell, from what `search` gives."""
    best = search[search["chosen"]] if len(search) else search
    return dict(zip(best["cell"], best["learning_rate"])) if len(best) else {}


def tuned(
    specs: Sequence[recon.RunSpec], rates: Sequence[float], folder: Path, compute: bool = True, **options
) -> list[recon.RunSpec]:
    """`specs`, each at the rate that `search` chooses for it; without `rates`, as they are.

    options: in which the runs of the search differ; specs that agree in all else share one search.
    """
    if not rates:
        return list(specs)
    specs = [spec.replaced(size_power=0.0, matrix_rate=1.0) for spec in specs]  # a rate is that of its window, by no rule
    fitted = [spec for spec in specs if spec.reconstruction.granularity != "none" and spec.reconstruction.solver == "adamw"]
    cells = {spec: spec.replaced(**options) for spec in fitted}
    best = chosen(search({cell: cell for cell in cells.values()}, rates, folder, compute))
    return [spec.replaced(learning_rate=best[cells[spec]]) if cells.get(spec) in best else spec for spec in specs]
