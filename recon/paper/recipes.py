"""Ways to train a pruned model, by the names that `recon.study.studies.recipe_name` gives them, and their search for learning rates.

Each recipe is searched at every sample count on its own, among the same rates as every other and by the same rule, and judged on
held-out text. The rate found at one seed serves all.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import pandas as pd

from recon.paper import tuning
from recon.runtime.device import COMPUTE_DTYPES
from recon.study.spec import RunSpec


def spec(base: RunSpec, recipe: str, count: int, seed: int = 0, rates: Mapping[tuple[str, int], float] = {}) -> RunSpec:
    """The run of `recipe` on `count` samples.

    recipe: "pruned", "reconstruction", a way to retrain ("masklora"; "masklora, distilled"), "reconstruction, then masklora", or
        "dense, masklora" for the dense model retrained.
    rates: by recipe and sample count, of "reconstruction" and of ways to retrain, which recipes made of them share; where there is none, the base's.
    """
    rest = recipe.removeprefix("dense, ")
    first, _, then = rest.partition(", then ")
    options: dict = {"seed": seed} | ({"criterion": "none"} if rest != recipe else {})
    if first == "reconstruction":
        rate = rates.get((first, count), base.reconstruction.learning_rate)
        options |= {"granularity": "half-block", "samples": count, "learning_rate": rate}
    else:
        options["granularity"], then = "none", "" if first == "pruned" else first
    if then:
        method, _, distilled = then.partition(", ")
        rate = rates.get((then, count), base.retraining.learning_rate)
        options |= {"retrain": method, "retrain_samples": count, "retrain_learning_rate": rate}
        options |= {"retrain_objective": "distil"} if distilled else {}
    return base.replaced(**options)


def search(
    base: RunSpec,
    counts: Mapping[str, Iterable[int]],
    rates: Sequence[float],
    seed: int,
    study: Callable[..., pd.DataFrame],
    compute: bool = True,
) -> pd.DataFrame:
    """Searches every recipe in `counts`, at each of its sample counts, for the best of `rates`. Returns what `searched` gives.

    It begins with the rates that have records, or with three in the middle. Then it tries one more beside the best, until there is
    one on both sides of it, or rates end.

    study: runs specs, as `recon.run_study` does in a folder; takes `compute`.
    """
    rates = sorted(rates)
    cells = {
        (recipe, count): [spec(base, recipe, count, seed, {(recipe, count): rate}) for rate in rates]
        for recipe, own in counts.items()
        for count in own
    }
    there = set(searched(study([each for row in cells.values() for each in row], compute=False))["key"])
    tried = {
        cell: {index for index, each in enumerate(row) if each.key() in there} or _beside(len(row) // 2, row)
        for cell, row in cells.items()
    }
    while True:
        found = searched(study([row[index] for cell, row in cells.items() for index in sorted(tried[cell])], compute=compute))
        wanted = {cell: _beside(rates.index(best), rates) for cell, best in chosen(found).items()}
        if all(wanted[cell] <= tried[cell] for cell in wanted):
            return found
        tried = {cell: indices | wanted.get(cell, set()) for cell, indices in tried.items()}


def _beside(index: int, row: Sequence) -> set[int]:
    """`index` and its neighbours, where `row` has them."""
    return set(range(len(row))) & {index - 1, index, index + 1}


def searched(runs: pd.DataFrame) -> pd.DataFrame:
    """The finished runs of a search: recipe, samples, learning_rate, held_out_perplexity, key, and whether that rate is `chosen`."""
    columns = ["recipe", "samples", "learning_rate", "held_out_perplexity", "key"]
    done = runs[runs["status"] == "done"].copy()
    if done.empty:
        return pd.DataFrame(columns=[*columns, "chosen"])
    alone = done["retrain"] == "none"
    done["learning_rate"] = done["learning_rate"].where(alone, done["retrain_learning_rate"])
    done["samples"] = done["samples"].where(alone | (done["retrain_samples"] == 0), done["retrain_samples"])
    best = tuning.best(done, ["recipe", "samples"])
    return done[columns].assign(chosen=done.index.isin(best.index))


def chosen(search: pd.DataFrame) -> dict[tuple[str, int], float]:
    """The learning rate of each recipe at each sample count, from what `searched` gives."""
    best = search[search["chosen"].astype(bool)]
    return dict(zip(zip(best["recipe"], best["samples"]), best["learning_rate"]))


def in_any_precision(specs: Iterable[RunSpec]) -> list[RunSpec]:
    """`specs`, and each with the precision of its products named: the same run, if that is what the machine would take."""
    return list(dict.fromkeys(spec.replaced(compute_dtype=name) for spec in specs for name in ("auto", *COMPUTE_DTYPES)))


def finished(runs: pd.DataFrame, specs: Iterable[RunSpec]) -> pd.DataFrame:
    """The rows of `runs`, as `recon.run_study` gives them, that are finished runs of `specs`, in the order of these."""
    done = runs[runs["status"] == "done"].drop_duplicates("key").set_index("key", drop=False)
    return done.loc[[key for key in dict.fromkeys(spec.key() for spec in specs) if key in done.index]]
