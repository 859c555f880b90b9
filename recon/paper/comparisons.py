"""The kinds of comparison: which runs enter, and what is computed from them.

An effect is a difference of log-perplexity, or of the divergence from the dense model, in nats per token. It is paired: both sides have
the same evaluation windows and seeds.
"""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from recon.paper.runs import Run, Seed, once, pick, short

# Two sides are equal within this share of the damage log(pruned / dense). For the scale: granularities in the paper are about 0.1 apart
# at a perplexity of 7.8 (LLaMA-3-8B at 50 %, dense 5.8, by a summary of it; pruned by Wanda 9.06, by the README of D2Prune).
MARGIN = 0.05
CLOSE = MARGIN / 2  # a second, stricter margin
PAPER_SPREAD = math.log((7.8 + 0.1) / 7.8) / math.log(9.06 / 5.8)
SEEDS = 3  # fewer say nothing about training noise
MODELS = 3  # of one family; fewer make no trend: two differ in more than their size
BUDGET = 0.15  # compute is equal within this share
COSTS = {"samples": "samples", "flops": "FLOPs"}
_SIZE = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)([mb])(?![a-z])", re.IGNORECASE)


@dataclass
class Evidence:
    """Which runs enter a comparison, and what is computed from their means."""

    runs: list[Run]
    parts: list[np.ndarray]
    """Mean negative log-likelihoods, (means, seeds, windows); parts are drawn independently of one another."""
    statistic: Callable[[np.ndarray], np.ndarray | tuple[np.ndarray, np.ndarray]]
    """From means (means of all parts, draws) to effects (draws,), or to lower and upper bounds of them."""
    unit: str = "nats per token"
    note: Callable[[np.ndarray], str] = lambda means: ""
    favours_other: bool = False
    """The claim's side had less compute: if it is worse, that proves nothing."""
    lacks: str = ""
    """Why this cannot be tested here, whatever the interval."""

    @property
    def seeds(self) -> int:
        return min(part.shape[1] for part in self.parts)


def _stack(sides: Sequence[tuple[dict[Seed, Run], str]], seeds: Sequence[Seed], measure: str = "own") -> np.ndarray:
    """What is measured, (sides, seeds, windows), of each side's runs in the state named; see `recon.paper.runs.MEASURES`."""
    return np.array([[runs[seed].measures[measure][state] for seed in seeds] for runs, state in sides])


def _used(sides: Iterable[dict[Seed, Run]], seeds: Sequence[Seed]) -> list[Run]:
    return list({run.key: run for side in sides for run in (side[seed] for seed in seeds)}.values())


def _common(*sides: dict[Seed, Run]) -> list[Seed]:
    return once(set.intersection(*map(set, sides)))


def better(runs: list[Run], claim) -> Evidence | None:
    """What is measured of the other side minus that of ours: above 0, ours is better."""
    mine = pick(runs, claim.ours)
    theirs, state = (mine, "pruned") if claim.other is None else (pick(runs, claim.other), "reconstructed")
    if not (seeds := _common(mine, theirs)):
        return None
    return _difference(mine, theirs, seeds, claim, state)


def _difference(
    mine: dict[Seed, Run], theirs: dict[Seed, Run], seeds: list[Seed], claim, state="reconstructed", **more
) -> Evidence:
    values = _stack([(mine, "reconstructed"), (theirs, state)], seeds, claim.measure)
    return Evidence(_used([mine, theirs], seeds), [values], lambda means: means[1] - means[0], **more)


def _share(mine: dict[Seed, Run], theirs: dict[Seed, Run], seeds: list[Seed], claim, **more) -> Evidence:
    def share(means: np.ndarray) -> np.ndarray:
        damage = means[3] - means[2]
        return (means[1] - means[0]) / np.where(damage > 0, damage, math.nan)

    sides = [(mine, "reconstructed"), (theirs, "reconstructed"), (mine, "dense"), (mine, "pruned")]
    return Evidence(_used([mine, theirs], seeds), [_stack(sides, seeds, claim.measure)], share, "of the damage", **more)


def samples(runs: list[Run], claim) -> Evidence | None:
    """As `better`, where our side trains on `claim.count` samples, and the other on `claim.times` as many: at least, if that is over 1.

    With a margin, the difference is a share of the damage, as in `equal`. Learning rates were searched on both sides. The note says what the other side's training does to the dense model, which it cannot
    repair: what adapting to this kind of text alone is worth.
    """
    mine, theirs = points(runs, claim.ours, "samples"), points(runs, claim.other, "samples")
    wanted = claim.count * claim.times
    enough = sorted(trained for _, trained in theirs if trained == wanted or 1 < claim.times and trained > wanted)
    mine = _best_supported(mine, claim.count)
    theirs = _best_supported(theirs, enough[0]) if enough else {}
    if not (seeds := _common(mine, theirs)):
        return None
    control = _best_supported(points(runs, claim.other | {"criterion": "none"}, "samples"), enough[0])

    def note(means: np.ndarray) -> str:
        said = f"{claim.count} samples against {enough[0]}"
        if not control:
            return said
        moved = _stack([(control, "dense"), (control, "reconstructed")], sorted(control), claim.measure).mean((1, 2))
        return f"{said}; the same retraining moves the dense model by {moved[1] - moved[0]:+.3f} nats"

    return (_share if claim.margin else _difference)(mine, theirs, seeds, claim, note=note)


def _best_supported(points: dict[tuple[int, int], dict[Seed, Run]], trained: int) -> dict[Seed, Run]:
    """Of the points trained on so many samples, the one with the most seeds, then with the most samples to prune by."""
    fitting = {key: found for key, found in points.items() if key[1] == trained}
    return fitting[max(fitting, key=lambda key: (len(fitting[key]), key[0]))] if fitting else {}


def equal(runs: list[Run], claim) -> Evidence | None:
    """The same difference as a share of the damage log(pruned / dense): within the margin, both are equal."""
    tuned = "adapter" in claim.ours  # their rates are searched, and those of full weights with them
    mine, theirs = pick(runs, claim.ours, tuned), pick(runs, claim.other, tuned)
    if not (seeds := _common(mine, theirs)):
        return None

    return _share(mine, theirs, seeds, claim)


def points(runs: list[Run], options: dict, cost: str) -> dict[tuple[int, int], dict[Seed, Run]]:
    """The runs of one method whose cost is known, by samples (for pruning and reconstruction, for the last training) and seed."""
    groups: dict[tuple[int, int], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.samples, run.trained_samples), []).append(run)
    picked = {count: pick(group, options, tuned=True) for count, group in sorted(groups.items())}
    picked = {count: {seed: run for seed, run in found.items() if run.cost(cost) > 0} for count, found in picked.items()}
    return {count: found for count, found in picked.items() if found}


def _curve(runs: list[Run], options: dict, cost: str) -> list[dict[Seed, Run]]:
    """One point per number of samples trained on."""
    found = points(runs, options, cost)
    return [_best_supported(found, trained) for trained in dict.fromkeys(trained for _, trained in found)]


def ratio(runs: list[Run], claim) -> Evidence | None:
    """Cost at which the other side reaches the quality that ours has at each of its sample counts, over the cost of ours; the median.

    The other side's quality is interpolated piecewise linearly over log2 of its cost, through its running best (in favour of the other
    side). Where it never reaches our quality, the ratio is above what its last point gives; where its first point is better already, it
    is below what that gives. The interval runs from that of the lower to that of the upper bounds.
    """
    cost = claim.cost
    if not (found := _at_common_seeds(_curve(runs, claim.ours, cost), _curve(runs, claim.other, cost))):
        return None
    seeds, mine, theirs = found

    def log_cost(point: dict[Seed, Run]) -> float:
        return np.mean([math.log2(point[seed].cost(cost)) for seed in seeds])

    theirs = sorted(theirs, key=log_cost)
    at, their_at = (np.array([log_cost(point) for point in side]) for side in (mine, theirs))

    def bounds(means: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        lower, upper = _reach(means[: len(at)], means[len(at) :], their_at)
        return lower - at[:, None], upper - at[:, None]

    def statistic(means: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        lower, upper = bounds(means)
        return np.median(lower, axis=0), np.median(upper, axis=0)

    def note(means: np.ndarray) -> str:
        pairs = zip(*(np.exp2(bound[:, 0]) for bound in bounds(means)))
        each = [f"{point[seeds[0]].samples}: {_bounded(*pair)}" for point, pair in zip(mine, pairs)]
        return "ratio by samples of reconstruction: " + ", ".join(each)

    values = _stack([(point, "reconstructed") for point in (*mine, *theirs)], seeds, claim.measure)
    return Evidence(_used([*mine, *theirs], seeds), [values], statistic, f"times the {COSTS[cost]}", note)


def _at_common_seeds(mine: list[dict[Seed, Run]], theirs: list[dict[Seed, Run]]) -> tuple[list[Seed], list, list] | None:
    """Seeds, and the points of both curves that have them all; None where there are none.

    Of several sets of seeds: one with at least SEEDS, then the one with the most points, so that a point that lacks seeds is left out
    where enough of the others have them.
    """
    if not (mine and theirs):
        return None
    choices = {frozenset(_common(a, b)) for a in mine for b in theirs} | {frozenset(_common(*mine, *theirs))}

    def having(points: list[dict[Seed, Run]], seeds: frozenset) -> list[dict[Seed, Run]]:
        return [point for point in points if seeds <= set(point)]

    def rank(seeds: frozenset) -> tuple:
        return min(len(seeds), SEEDS), len(having(mine, seeds)) + len(having(theirs, seeds)), len(seeds), sorted(seeds)

    choices = [seeds for seeds in choices if seeds and having(mine, seeds) and having(theirs, seeds)]
    if not choices:
        return None
    best = max(choices, key=rank)
    return sorted(best), having(mine, best), having(theirs, best)


def _bounded(lower: float, upper: float) -> str:
    if lower == upper:
        return f"{lower:.3g}"
    return f"> {lower:.3g}" if lower > 0 else f"< {upper:.3g}" if math.isfinite(upper) else "?"


def _reach(targets: np.ndarray, curve: np.ndarray, at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where `curve` (points, draws) over `at` (points,), ascending, first falls to `targets` (targets, draws).

    Returns lower and upper bounds (targets, draws): the same, but inf above where it never does, -inf below where it
    starts lower.
    """
    curve = np.minimum.accumulate(curve, axis=0)
    there = curve[None] <= targets[:, None]
    index = there.argmax(1)
    before = np.maximum(index - 1, 0)
    high, low = (np.take_along_axis(curve, where, 0) for where in (before, index))
    share = np.where(high > low, (high - targets) / np.where(high > low, high - low, 1.0), 1.0)
    found = at[before] + share * (at[index] - at[before])
    never, early = ~there.any(1), (index == 0) & (curve[0] < targets)
    lower = np.where(never, at[-1], np.where(early, -np.inf, found))
    return lower, np.where(never, np.inf, np.where(early, at[0], found))


def combined(runs: list[Run], claim) -> Evidence | None:
    """As `better`, at compute equal within BUDGET or, where no pair of runs has that, with less on our side.

    Of several pairs: the one with the most seeds (up to SEEDS), then equal compute, then the most compute.
    """
    cost, pairs = claim.cost, []
    for count, mine in points(runs, claim.ours, cost).items():
        for their_count, theirs in points(runs, claim.other, cost).items():
            if not (seeds := _common(mine, theirs)):
                continue
            spent, they_spent = (sum(side[seed].cost(cost) for seed in seeds) / len(seeds) for side in (mine, theirs))
            if spent <= (1 + BUDGET) * they_spent:
                fair = spent >= (1 - BUDGET) * they_spent
                closeness = -abs(math.log(spent / they_spent))
                pairs.append(((min(len(seeds), SEEDS), fair, spent, closeness, count, their_count), mine, theirs, seeds))
    if not pairs:
        return None
    (_, fair, spent, _, count, their_count), mine, theirs, seeds = max(pairs, key=lambda pair: pair[0])
    they_spent = sum(theirs[seed].cost(cost) for seed in seeds) / len(seeds)
    note = (
        f"{COSTS[cost]} {spent:.3g} (samples {count[0]}, then {count[1]}) against {they_spent:.3g} (samples {their_count[1]})"
        + ("" if fair else ": less compute on the combination's side")
    )
    return _difference(mine, theirs, seeds, claim, note=lambda _: note, favours_other=not fair)


def _by_criterion(runs: list[Run], options: dict) -> dict[str, dict[Seed, Run]]:
    found = {name: pick(runs, options | {"criterion": name}) for name in options["criterion"]}
    return {name: side for name, side in found.items() if side}


def _contrast(values: np.ndarray) -> np.ndarray:
    """Weights (criteria,) of the gap between the means of `values` (criteria, seeds, windows): 1 for the worst, -1 for the best.

    They are chosen once, not in every bootstrap draw: the range of a draw is never negative, so noise alone would make a gap. Chosen
    from the same data, the gap is still slightly too large where criteria hardly differ.
    """
    means, weights = values.mean((1, 2)), np.zeros(len(values))
    weights[means.argmax()] += 1
    weights[means.argmin()] -= 1
    return weights


def gap(runs: list[Run], claim) -> Evidence | None:
    """Gap between two criteria (larger minus smaller log-perplexity) after pruning, minus that after reconstruction."""
    found = _by_criterion(runs, claim.ours)
    if len(found) < 2 or not (seeds := _common(*found.values())):
        return None
    parts = [_stack([(side, state) for side in found.values()], seeds, claim.measure) for state in ("pruned", "reconstructed")]
    before, after = (_contrast(part) for part in parts)

    def note(means: np.ndarray) -> str:
        sizes = before @ means[: len(found), 0], after @ means[len(found) :, 0]
        left = f", {sizes[1] / sizes[0]:.0%} of it" if sizes[0] > 0 else ""
        return f"gap {sizes[0]:.3f} before, {sizes[1]:.3f} after{left}"

    return Evidence(
        _used(found.values(), seeds),
        [np.concatenate(parts)],
        lambda means: np.concatenate([before, -after]) @ means,
        note=note,
    )


def trend(runs: list[Run], claim) -> Evidence | None:
    """Minus the slope of the gap between criteria after reconstruction, per doubling of the parameters that models' names state.

    Models of different families differ in more than their size, so only those of one family make a trend: that with the most models.
    """
    groups: dict[str, dict[tuple, list[Run]]] = {}
    for run in runs:
        groups.setdefault(run.model, {}).setdefault(run.windows, []).append(run)
    # Windows are shared within a model only: tokenizers differ.
    found = {model: _by_criterion(max(windows.values(), key=len), claim.ours) for model, windows in groups.items()}
    found = {model: sides for model, sides in found.items() if parameters(model) and len(sides) > 1 and _common(*sides.values())}
    families: dict[str, list[str]] = {}
    for model in sorted(found, key=parameters):
        families.setdefault(family(model), []).append(model)
    if not families:
        return None
    models = max(families.values(), key=len)
    names = [name for name in claim.ours["criterion"] if all(name in found[model] for model in models)]
    if len(names) < 2:
        return None
    at = np.log2([parameters(model) for model in models])
    at -= at.mean()
    sides = {model: [found[model][name] for name in names] for model in models}
    seeds = {model: _common(*sides[model]) for model in models}
    parts = [_stack([(side, "reconstructed") for side in sides[model]], seeds[model], claim.measure) for model in models]
    contrasts = np.concatenate([_contrast(part) for part in parts])

    def gaps(means: np.ndarray) -> np.ndarray:
        return (contrasts[:, None] * means).reshape(len(parts), len(names), -1).sum(1)

    def note(means: np.ndarray) -> str:
        each = [f"{short(model)} {size:.3f}" for model, size in zip(models, gaps(means)[:, 0])]
        return f"gap between {', '.join(names)}: {', '.join(each)}"

    return Evidence(
        [run for model in models for run in _used(sides[model], seeds[model])],
        parts,
        lambda means: -(at @ gaps(means)) / max(at @ at, 1e-30),
        "nats per token and doubling",
        note,
        lacks=f"it takes {MODELS} models of one family, and the records have {len(models)}" if len(models) < MODELS else "",
    )


def parameters(model: str) -> float | None:
    """The number of parameters that a model's name states ("smollm2-135m", "Llama-3.1-8B"); None where it states none."""
    found = _SIZE.findall(_name(model))
    return float(found[-1][0]) * {"m": 1e6, "b": 1e9}[found[-1][1].lower()] if found else None


def family(model: str) -> str:
    """What a model's name says before its size, without a minor version: "llama-3" for "meta-llama/Llama-3.1-8B"."""
    return _SIZE.split(_name(model))[0].partition(".")[0].strip("-_").lower()


def _name(model: str) -> str:
    return Path(model.partition("@")[0]).name


KINDS = {
    "better": better, "samples": samples, "equal": equal, "ratio": ratio, "combined": combined, "gap": gap, "trend": trend
}  # fmt: skip
