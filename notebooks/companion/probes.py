"""Small measurements that are not runs of `recon`: each JSON file holds a row for each cell. Figures draw them like runs."""

import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from companion.frame import SEARCH
from companion.publish import commit, whole

LEAST = 0.1  # nats, see `harmed`


def grid(**axes: Iterable) -> list[dict]:
    """A cell, a dict of arguments, for each combination of their values."""
    return [dict(zip(axes, values)) for values in itertools.product(*axes.values())]


def joined(cell: dict, other: dict) -> dict:
    """`cell` with the arguments of `other`; where an argument is a dict of options, `cell` keeps its other options."""
    return cell | {name: cell[name] | value if isinstance(value, dict) else value for name, value in other.items()}


def measured(
    path: Path, measure: Callable[..., dict], cells: Sequence[dict], compute: bool = True, rates: Sequence[float] = ()
) -> pd.DataFrame:
    """A row for each of `cells`, at the learning rate that `searched` finds in `rates`: its arguments, and `measure`'s results.

    path: the JSON file of results; it is written whole after every cell, and a cell that is in it is not measured again.
    compute: if False, cells that are not in it are left out. Columns own_<state> are arrays, as in `companion.frame.load`.
    """

    def read() -> dict:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    keys = {json.dumps(cell, sort_keys=True): cell for cell in searched(path, measure, cells, rates, compute)}
    known = read()
    for key, cell in keys.items():
        if key not in known and compute:
            row = {"commit": commit(), **measure(**cell)}
            known |= read() | {key: row}  # another process may have written to it meanwhile
            with whole(path) as part:
                part.write_text(json.dumps(known, indent=0, default=float), encoding="utf-8")
    there = [key for key in keys if key in known]
    cells = pd.json_normalize([keys[key] for key in there]).rename(columns=lambda name: name.rpartition(".")[2])
    data = pd.concat([pd.DataFrame({"key": there}), cells, pd.DataFrame([known[key] for key in there])], axis=1)
    for name in data.filter(like="own_"):
        data[name] = data[name].map(np.array)
    if "own_reconstructed" in data:  # a pair needs one network, not one trained anew elsewhere
        unit = data["seed"].astype(str) + data["own_dense"].map(lambda nats: f" {nats.mean():.2f}")
        data = data.assign(unit=unit, perplexity=data["own_reconstructed"].map(lambda nats: np.exp(nats.mean())))
    return data


def lost(runs: pd.DataFrame, state: str) -> pd.Series:
    """For each run, by how much the mean nats of a state ("pruned", "reconstructed") exceed those of the dense network."""
    return runs[f"own_{state}"].map(np.mean) - runs["own_dense"].map(np.mean)


def harmed(runs: pd.DataFrame) -> pd.DataFrame:
    """The rows of networks and sparsities for which pruning costs more than `LEAST` nats, with the share of it recovered."""
    before, after = lost(runs, "pruned"), lost(runs, "reconstructed")
    gap = before.groupby([runs["kind"], runs["pattern"]]).transform("mean")
    return runs.assign(**{"share recovered": (before - after) / before})[gap > LEAST]


def searched(path: Path, measure: Callable, cells: Sequence[dict], rates: Sequence[float], compute: bool = True) -> list[dict]:
    """`cells`, each at the learning rate with the fewest nats on held-out data; without `rates`, as they are.

    Nats are the mean over two seeds that no verdict uses. Cells that differ only in the seed share one search. It begins at the
    middle rate, and ends when both neighbours of the best rate have been tried.
    """
    if not rates:
        return list(cells)
    rates, best, tuned = sorted(rates), {}, []
    for cell in cells:
        base = joined(cell, {"split": "held_out", "seed": SEARCH})
        if (name := json.dumps(base)) not in best:
            nats, middle = {}, len(rates) // 2
            while wanted := [rate for rate in rates[max(0, middle - 1) : middle + 2] if rate not in nats]:
                trials = grid(seed=range(SEARCH, SEARCH + 2), reconstruction=[{"learning_rate": rate} for rate in wanted])
                found = measured(path, measure, [joined(base, trial) for trial in trials], compute)
                if found.empty:
                    break
                nats |= found["own_reconstructed"].map(np.mean).groupby(found["learning_rate"]).mean().fillna(np.inf).to_dict()
                middle = rates.index(min(nats, key=nats.get))
            best[name] = float(rates[middle])
        tuned.append(joined(cell, {"reconstruction": {"learning_rate": best[name]}}))
    return tuned
