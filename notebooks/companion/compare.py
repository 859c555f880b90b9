"""Compares two sides: selects the runs of each, and computes the effect between them with a bootstrap interval.

An effect is a difference of log-perplexity, or of the KL divergence from the dense model, in nats per token. Some effects are
shares of what pruning adds (mean of both sides), such as the perplexity gap, log(pruned / dense). Effects on cost are log2 of a
ratio. Effects are paired: both sides have the same seeds and evaluation windows.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pandas as pd
from scipy import stats

from companion.frame import DEFAULTS, MEMORY, METHOD, SEARCH, TUNING, setting

MARGIN = 0.05  # two sides count as equal within this share of the perplexity gap: our choice, not the paper's
CLOSE = MARGIN / 2  # a second, stricter margin
SEEDS = 3  # with fewer, training noise is unknown
MODELS = 3  # sizes of one family that a trend needs: two models differ in more than size
BUDGET = 0.15  # compute counts as equal within this share
_SIZE = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)([mb])(?![a-z])", re.IGNORECASE)

# --- the interval -----------------------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def _draws(count: int, resamples: int, seed: int, stream: int) -> np.ndarray:
    """Weights (resamples, count) of `count` items drawn with replacement."""
    # RandomState: its stream is frozen, so that the committed page does not depend on numpy's version.
    drawn = np.random.RandomState([seed, stream]).randint(0, count, (resamples, count))
    flat = (drawn + np.arange(resamples)[:, None] * count).ravel()
    return np.bincount(flat, minlength=resamples * count).reshape(resamples, count) / count


@lru_cache(maxsize=1024)
def student(freedom: int, level: float) -> float:
    """The two-sided quantile of Student's t with `freedom` degrees of freedom, divided by that of the normal distribution."""
    return float(stats.t.ppf((1 + level) / 2, freedom) / stats.norm.ppf((1 + level) / 2))


def wider(count: int, level: float) -> float:
    """The factor that widens the bootstrap's spread over `count` seeds or windows; infinite for one."""
    return math.sqrt(count / (count - 1)) * student(count - 1, level) if count > 1 else math.inf


def _weights(count: int, level: float, *draws: int) -> np.ndarray:
    """Weights (resamples, count) of drawn seeds or windows, widened; a single item always has weight 1."""
    drawn = _draws(count, *draws)
    return 1 / count + wider(count, level) * (drawn - 1 / count) if count > 1 else drawn


def interval(
    parts: Sequence[np.ndarray], statistic: Callable, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple:
    """Bootstrap percentile interval of `statistic` of the means of `parts`, each (means, seeds, windows).

    Seeds are drawn with replacement, then windows; all seeds share their windows, so one draw of windows serves them all
    (the "pigeonhole" bootstrap: Owen, Annals of Applied Statistics 2007). Few items make a bootstrap too narrow. So deviations of
    drawn seeds, and of drawn windows, from their mean are multiplied by sqrt(n / (n - 1)) and by `student` (expanded percentile
    interval: Hesterberg, The American Statistician 2015). With one seed, only windows are drawn. `statistic` gives effects
    (draws,), or lower and upper bounds of them. Returns the interval's two ends; NaN if the statistic is NaN in any draw.
    """
    means = []
    for index, values in enumerate(parts):
        seeds, windows = values.shape[1:]
        by_seed = values @ _weights(windows, level, resamples, seed, 2 * index + 1).T
        means.append(np.einsum("bs,ksb->kb", _weights(seeds, level, resamples, seed, 2 * index), by_seed))
    lower, upper = _bounds(statistic(np.concatenate(means)))
    if np.isnan(lower).any() or np.isnan(upper).any():
        return math.nan, math.nan
    # No interpolation between draws: a ratio may be infinite.
    low = np.quantile(lower, (1 - level) / 2, method="lower")
    return float(low), float(np.quantile(upper, (1 + level) / 2, method="higher"))


def _bounds(effects: np.ndarray | tuple) -> tuple:
    """Lower and upper bounds of effects; for effects known exactly, both are the effect."""
    return effects if isinstance(effects, tuple) else (effects, effects)


# --- sides: frames of runs, by unit (a seed in one precision) -------------------------------------------------------------


@dataclass
class Evidence:
    """The runs that enter a comparison, and the statistic of their means."""

    runs: pd.DataFrame
    parts: list[np.ndarray]
    """What is measured, (means, seeds, windows); parts are drawn independently of one another."""
    statistic: Callable[[np.ndarray], np.ndarray | tuple]
    """From means (means of all parts, draws) to effects (draws,), or to lower and upper bounds of them."""
    unit: str = "nats per token"
    note: str = ""
    favours_other: bool = False
    """The claim's side had less compute: if it is worse, that proves nothing."""
    lacks: str = ""
    """Why this cannot be tested here, whatever the interval."""
    models: str = ""
    """Which models are compared with one another, if several are."""

    @property
    def seeds(self) -> int:
        return min(part.shape[1] for part in self.parts)

    def estimate(self, level: float) -> tuple[float, float, float, float]:
        """Lower and upper bound of the effect, and the interval's ends; all NaN if a run diverged."""
        if not all(np.isfinite(part).all() for part in self.parts):
            return (math.nan,) * 4
        lower, upper = _bounds(self.statistic(np.concatenate([part.mean((1, 2)) for part in self.parts])[:, None]))
        return float(lower[0]), float(upper[0]), *interval(self.parts, self.statistic, level)

    def error(self, level: float) -> float:
        """The standard deviation of the interval's ends over five bootstraps, the larger of both; infinite ends are left out."""
        ends = np.array([interval(self.parts, self.statistic, level, seed=seed) for seed in range(1, 6)])
        return max((float(end.std(ddof=1)) for end in ends.T if np.isfinite(end).all()), default=0.0)


def studies(runs: pd.DataFrame, measure: str, *shared: str) -> list[tuple[tuple[str, str, str], dict]]:
    """Groups of runs that agree in `shared`, by (model, pattern, recipe), defaults first; model is "" unless in `shared`."""
    if runs.empty:
        return []
    scopes: dict[tuple, dict] = {}
    used = runs[runs[f"{measure}_pruned"].notna() & (runs["seed"] < SEARCH)]
    cells = used["model"] + " " + used["pattern"]
    alone = (used["recipe"] == "default") & (used["granularity"] == "none") & cells.isin(cells[used["recipe"] == "first-skipped"])
    used = pd.concat([used, used[alone].assign(recipe="first-skipped", first_position="skipped")])  # the same without windows
    for name, group in used.groupby([*shared, "pattern", "recipe"]):
        first = group.iloc[0]
        scope = first["model"] if "model" in shared else "", first["pattern"], first["recipe"]
        scopes.setdefault(scope, {})[repr(name)] = group
    usual = ("", DEFAULTS["model"]), (DEFAULTS["pattern"],), ("default", "first-skipped")
    return sorted(scopes.items(), key=lambda each: [(value not in first, value) for value, first in zip(each[0], usual)])


def of_method(runs: pd.DataFrame, options: dict) -> pd.DataFrame:
    """The runs whose method differs from their recipe's in exactly `options`. runs: all under one recipe."""
    return runs[runs["setting"] == setting(options, runs["recipe"].iloc[0])] if len(runs) else runs


def pick(runs: pd.DataFrame, options: dict, tuned: bool = False) -> pd.DataFrame:
    """The runs whose method differs from their recipe's in exactly `options`, all with one tuning, indexed by unit.

    Of several tunings, it takes the one with the most units; on a tie, the one nearest the recipe's, so that no side is tuned
    more than the other. `tuned`: learning rates were searched for both sides; of several rates, it takes those with the lowest
    held-out perplexity (mean over the units that all have). Evaluation text never decides. ValueError for an unknown option.
    """
    unknown = set(options) - {*METHOD, *TUNING}
    if unknown:
        raise ValueError(f"no option of a method: {', '.join(sorted(unknown))}")
    runs = of_method(runs, options)
    if runs.empty:
        return pd.DataFrame()
    for name in set(options) & set(TUNING):
        runs = runs[runs[name] == options[name]]
    if len(runs):
        runs = _nearest(runs, "tuning")
        if tuned and runs["rates"].nunique() > 1:
            held_out = runs.pivot_table(index="rates", columns="unit", values="held_out_perplexity").dropna(axis=1)
            runs = runs[runs["rates"] == held_out.mean(axis=1).idxmin()] if held_out.size else runs
        runs = _nearest(runs, "rates")
    return runs.drop_duplicates("unit").set_index("unit")


def _nearest(runs: pd.DataFrame, name: str) -> pd.DataFrame:
    """The runs with the `name` ("tuning" or "rates") that the most units have; on a tie, with the one nearest the recipe's."""
    units = runs.groupby(name)["unit"].transform("nunique")
    return runs[runs[name] == runs.at[(runs[f"{name}_detour"] - 1e6 * units).idxmin(), name]]


def points(runs: pd.DataFrame, options: dict) -> dict[tuple[int, int], pd.DataFrame]:
    """The runs of one method at the rates searched for it, by (samples, samples of the last training)."""
    groups = of_method(runs, options).groupby(["samples", "trained"])
    sides = {count: pick(group, options, tuned=True) for count, group in groups}
    return {count: side for count, side in sides.items() if len(side)}


def best_supported(points: dict[tuple[int, int], pd.DataFrame]) -> pd.DataFrame:
    """The point with the most seeds; on a tie, the one with the most calibration samples. Empty if there is none."""
    return max(points.items(), key=lambda point: (len(point[1]), point[0]), default=(0, pd.DataFrame()))[1]


def curve(runs: pd.DataFrame, options: dict) -> list[pd.DataFrame]:
    """One point for each number of samples that the method was last trained on."""
    return [best_supported(points(group, options)) for _, group in of_method(runs, options).groupby("trained")]


def once(units: Sequence[str]) -> list[str]:
    """Sorted units, one per seed: of several precisions only the first counts, because their runs are hardly independent."""
    return sorted({unit.split()[0]: unit for unit in sorted(units, reverse=True)}.values())


def common(*sides: pd.DataFrame) -> list[str]:
    """The units that all sides have."""
    return once(set.intersection(*(set(side.index) for side in sides)))


def _stack(sides: Sequence[tuple[pd.DataFrame, str]], units: list[str], measure: str = "own") -> np.ndarray:
    """The measure (sides, units, windows) of each side's runs in the state named."""
    return np.array([[side.at[unit, f"{measure}_{state}"] for unit in units] for side, state in sides], float)


def _used(sides: Sequence[pd.DataFrame], units: list[str]) -> pd.DataFrame:
    return pd.concat([side.loc[units].reset_index() for side in sides]).drop_duplicates("key")


def pair(mine: pd.DataFrame, theirs: pd.DataFrame, measure="own", share=False, state="reconstructed", **more) -> Evidence | None:
    """The other side's measure minus ours: above 0, ours is better. `share`: as a share of the gap that pruning opens.

    mine, theirs: each the runs of one setting, indexed by unit. state: of theirs. None if no unit is common to both.
    """
    if not (units := common(mine, theirs)):
        return None

    def difference(means: np.ndarray) -> np.ndarray:
        gap = (means[3] + means[4]) / 2 - means[2]
        return (means[1] - means[0]) / (np.where(gap > 0, gap, math.nan) if share else 1.0)

    sides = [(mine, "reconstructed"), (theirs, state), (mine, "dense"), (mine, "pruned"), (theirs, "pruned")]
    values = _stack(sides, units, measure)
    unit = ("of the KL that pruning adds" if measure == "kl" else "of the perplexity gap") if share else "nats per token"
    return Evidence(_used([mine, theirs], units), [values], difference, unit, **more)


def paired(mine: pd.DataFrame, theirs: pd.DataFrame, measure: str = "own", share: bool = True, level: float = 0.90) -> dict:
    """The effect of `pair` for a figure: difference, low, high, seeds. Without a common unit, `seeds` is 0 and the rest NaN."""
    sides = [side.drop_duplicates("unit").set_index("unit") for side in (mine, theirs)]
    evidence = pair(*sides, measure, share)
    effect, _, low, high = evidence.estimate(level) if evidence else (math.nan,) * 4
    return {"difference": effect, "low": low, "high": high, "seeds": evidence.seeds if evidence else 0}


# --- the kinds of comparison: from the runs of one protocol and a claim to evidence, or None -----------------------------


def better(runs: pd.DataFrame, claim: dict) -> Evidence | None:
    """Ours is better than the other side; without one, than the pruned model."""
    mine = pick(runs, claim["left"])
    if claim["right"] is None:
        return pair(mine, mine, claim["measure"], state="pruned")
    return pair(mine, pick(runs, claim["right"]), claim["measure"])


def equal(runs: pd.DataFrame, claim: dict) -> Evidence | None:
    """Both sides are the same within the margin, as a share of the perplexity gap."""
    tuned = bool({"adapter", "criterion"} & claim["left"].keys())  # for these, rates are searched on both sides
    return pair(pick(runs, claim["left"], tuned), pick(runs, claim["right"], tuned), claim["measure"], share=True)


def samples(runs: pd.DataFrame, claim: dict) -> Evidence | None:
    """As `better`, but our side trains on `count` samples and the other on `times` as many (or more, if `times` is over 1).

    With a margin, the difference is a share of the perplexity gap. Learning rates were searched on both sides. The note says how
    far the other side's training moves the dense model: the effect of adapting to such text, without pruning.
    """
    measure, wanted = claim["measure"], claim["count"] * claim["times"]
    trained = of_method(runs, claim["right"])["trained"]
    enough = trained[(trained == wanted) | ((claim["times"] > 1) & (trained > wanted))].min()
    if math.isnan(enough):
        return None
    ours, other = runs[runs["trained"] == claim["count"]], runs[runs["trained"] == enough]
    mine, theirs = best_supported(points(ours, claim["left"])), best_supported(points(other, claim["right"]))
    note = f"{claim['count']} samples against {enough}"
    control = best_supported(points(other, claim["right"] | {"criterion": "none"}))
    if len(control):
        moved = np.diff(_stack([(control, "dense"), (control, "reconstructed")], list(control.index), measure).mean((1, 2)))[0]
        note += f"; the same retraining moves the dense model by {moved:+.3f} nats"
    return pair(mine, theirs, measure, share=bool(claim["margin"]), note=note)


def combined(runs: pd.DataFrame, claim: dict) -> Evidence | None:
    """As `better`, for two points with FLOPs equal within BUDGET or, if there are none, with fewer FLOPs on our side.

    Of the pairs with the most seeds (up to SEEDS), it takes the equal pair with the most FLOPs or, if none is equal, the nearest.
    """
    pairs = []
    for count, mine in points(runs, claim["left"]).items():
        for their_count, theirs in points(runs, claim["right"]).items():
            if units := common(mine, theirs):
                spent, they_spent = (side.loc[units, "flops"].mean() for side in (mine, theirs))
                fair = spent >= (1 - BUDGET) * they_spent
                rank = min(len(units), SEEDS), fair, spent * fair, -abs(math.log(spent / they_spent)), count, their_count
                pairs += [(rank, mine, theirs, spent / they_spent)] if spent <= (1 + BUDGET) * they_spent else []
    if not pairs:
        return None
    (_, fair, *_, count, their_count), mine, theirs, times = max(pairs, key=lambda each: each[0])
    ours = " then ".join(map(str, dict.fromkeys(count)))
    note = f"{times:.2f} times the FLOPs; samples: {ours} against {their_count[1]}"
    return pair(mine, theirs, claim["measure"], share=bool(claim["margin"]), note=note, favours_other=not fair)


def memory(runs: pd.DataFrame, claim: dict) -> Evidence | None:
    """The other side's measured peak of added memory over ours, as log2, at equal numbers of samples."""
    ours, other = ({count: point for (_, count), point in points(runs, claim[side]).items()} for side in ("left", "right"))
    pairs = [(common(ours[count], other[count]), count) for count in ours.keys() & other.keys()]
    units, count = max(pairs, key=lambda pair: (min(len(pair[0]), SEEDS), pair[1]), default=([], None))
    if not units:
        return None
    mine, theirs = ours[count], other[count]
    values = np.log2([[[side.at[unit, MEMORY]] for unit in units] for side in (mine, theirs)])
    if not np.isfinite(values).all():
        return None
    sizes = " against ".join(f"{2**value:.2f} GiB" for value in values.mean((1, 2))) + f"; samples: {count}"
    return Evidence(_used([mine, theirs], units), [values], lambda means: means[1] - means[0], "times the memory", sizes)


def ratio(runs: pd.DataFrame, claim: dict) -> Evidence | None:
    """The other side's cost over ours at equal quality, as log2: the median over our sample counts.

    The other side's quality is its best so far (in its favour), interpolated linearly over log2 of its cost. If it never reaches
    our quality, its last point gives a lower bound of the ratio. If its first point is already better, that point gives an
    upper bound. The interval runs from the low end of the lower bounds to the high end of the upper bounds.
    """
    cost = {"samples": "trained", "flops": "flops"}[claim["cost"]]
    curves = [curve(runs, claim[side]) for side in ("left", "right")]
    if not (units := _most_shared(*curves)):
        return None
    mine, theirs = ([point for point in curve if set(units) <= set(point.index)] for curve in curves)
    theirs.sort(key=lambda point: np.log2(point.loc[units, cost]).mean())
    at, their_at = (np.array([np.log2(point.loc[units, cost]).mean() for point in side]) for side in (mine, theirs))
    values = _stack([(point, "reconstructed") for point in (*mine, *theirs)], units, claim["measure"])

    def each(means: np.ndarray) -> list[np.ndarray]:
        return [reached - at[:, None] for reached in _reach(means[: len(at)], means[len(at) :], their_at)]

    def statistic(means: np.ndarray) -> tuple:
        return tuple(np.median(bound, axis=0) for bound in each(means))

    bounds = zip(*(np.exp2(bound[:, 0]) for bound in each(values.mean((1, 2))[:, None])))
    said = [f"{point['samples'].iloc[0]}: {bounded(*pair)}" for point, pair in zip(mine, bounds)]
    note = "ratio by samples of reconstruction: " + ", ".join(said)
    return Evidence(_used([*mine, *theirs], units), [values], statistic, f"times the {claim['cost_words']}", note)


def _most_shared(mine: list[pd.DataFrame], theirs: list[pd.DataFrame]) -> list[str]:
    """The units at which two curves are compared: a set of at least SEEDS if there is one, then the set that most points have.

    So a point that lacks some of these seeds is left out, if enough other points have them.
    """

    def rank(units: tuple) -> tuple:
        having = [sum(set(units) <= set(point.index) for point in side) for side in (mine, theirs)]
        return min(len(units), SEEDS), sum(having), len(units), units

    choices = {tuple(common(a, b)) for a in mine for b in theirs}
    choices |= {tuple(common(*mine, *theirs))} if choices else set()
    return list(max(filter(None, choices), key=rank, default=()))


def bounded(lower: float, upper: float) -> str:
    """A value in words, given its bounds: "2" if they are equal, "> 2", "< 2", or "?" without any."""
    if lower == upper:
        return f"{lower:.3g}"
    return f"> {lower:.3g}" if lower > 0 else f"< {upper:.3g}" if math.isfinite(upper) else "?"


def _reach(targets: np.ndarray, curve: np.ndarray, at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where `curve` (points, draws) over `at` (points,), ascending, first falls to `targets` (targets, draws).

    Returns lower and upper bounds (targets, draws). They are equal, except that the upper is inf if the curve never
    falls to the target, and the lower is -inf if the curve starts below it.
    """
    curve = np.minimum.accumulate(curve, axis=0)
    draws = zip(targets.T, curve[::-1].T)  # np.interp needs ascending levels
    reached = np.transpose([np.interp(wanted, level, at[::-1]) for wanted, level in draws])
    never, early = targets < curve[-1], targets > curve[0]
    return np.where(early, -np.inf, reached), np.where(never, np.inf, reached)


def _by_criterion(runs: pd.DataFrame, claim: dict) -> tuple[list[pd.DataFrame], list[str]]:
    """The runs of each of a claim's criteria, and the units that all of them have."""
    sides = [pick(runs, claim["left"] | {"criterion": name}, tuned=True) for name in claim["left"]["criterion"]]
    return sides, common(*sides)


def _contrast(values: np.ndarray) -> np.ndarray:
    """Weights (criteria,) of the gap between the means of `values` (criteria, seeds, windows): 1 for the worst, -1 for the best.

    Both are chosen once, not in every bootstrap draw: the range of a draw is never negative, so noise alone would make a gap.
    As they are chosen on the same data, the gap is still slightly too large if criteria hardly differ.
    """
    order = values.mean((1, 2)).argsort(kind="stable")
    return (np.arange(len(values)) == order[-1]) * 1.0 - (np.arange(len(values)) == order[0])


def gap(runs: pd.DataFrame, claim: dict) -> Evidence | None:
    """Gap between two criteria (larger minus smaller log-perplexity) after pruning, minus that after reconstruction."""
    sides, units = _by_criterion(runs, claim)
    if not units:
        return None
    states = [_stack([(side, state) for side in sides], units, claim["measure"]) for state in ("pruned", "reconstructed")]
    before, after = (_contrast(part) for part in states)
    sizes = [float(weights @ part.mean((1, 2))) for weights, part in zip((before, after), states)]
    left = f", {sizes[1] / sizes[0]:.0%} of it" if sizes[0] > 0 else ""
    note = f"gap {sizes[0]:.3f} before, {sizes[1]:.3f} after{left}"
    worst = [claim["left"]["criterion"][weights.argmax()] for weights in (before, after)]
    note += f"; worst before: {worst[0]}, after: {worst[1]}" * (worst[0] != worst[1])
    shrinks = np.concatenate([before, -after])
    return Evidence(_used(sides, units), [np.concatenate(states)], lambda means: shrinks @ means, note=note)


def trend(runs: pd.DataFrame, claim: dict) -> Evidence | None:
    """Minus the slope over model size of our lead; without another side, of the gap between criteria after reconstruction."""
    evidence = {}
    for model, group in runs.groupby("model"):
        group = group[group["windows"] == group["windows"].mode()[0]]  # shared within a model only: tokenizers differ
        if claim["right"]:
            found = pair(pick(group, claim["left"]), pick(group, claim["right"]), claim["measure"], share=True)
        else:
            found = _after(group, claim)
        evidence |= {model: found} if found else {}
    return sloped(evidence, "lead" if claim["right"] else f"gap between {', '.join(claim['left']['criterion'])}", -1.0)


def _after(runs: pd.DataFrame, claim: dict) -> Evidence | None:
    """Gap between all the claim's criteria after reconstruction."""
    sides, units = _by_criterion(runs, claim)
    if not units:
        return None
    values = _stack([(side, "reconstructed") for side in sides], units, claim["measure"])
    weights = _contrast(values)
    return Evidence(_used(sides, units), [values], lambda means: weights @ means)


def sloped(evidence: dict[str, Evidence], words: str = "", sign: float = 1.0, size: Callable | None = None) -> Evidence | None:
    """The slope of the models' effects over log10 of their size, times `sign`. None if no model has a size.

    size: maps a model's name to its size; default: the parameters that the name states. By default, only the family with the most
    models counts: models of several families differ in more than size. The bootstrap also draws, for every model, a residual from
    the straight line (models scatter as their training does), widened by `student` for the few degrees of freedom.
    """
    families, size = {}, size or parameters
    for model in sorted(filter(size, evidence), key=lambda name: (size(name), name)):  # whatever order they come in
        families.setdefault(family(model) if size is parameters else "", []).append(model)
    if not families:
        return None
    models = max(families.values(), key=len)
    each, sizes = [evidence[model] for model in models], np.log10([size(model) for model in models])
    parts, at = [part for own in each for part in own.parts], sign * (sizes - sizes.mean())
    ends = np.cumsum([sum(len(part) for part in own.parts) for own in each])[:-1]

    def effects(means: np.ndarray) -> np.ndarray:
        return np.array([own.statistic(mine) for own, mine in zip(each, np.split(means, ends))])

    found = effects(np.concatenate([part.mean((1, 2)) for part in parts])[:, None])[:, 0]
    freedom, slope = max(len(found) - 2, 1), at @ found / max(at @ at, 1e-30)
    apart = (found - found.mean() - at * slope) * math.sqrt(len(found) / freedom) * student(freedom, 0.95)
    scatter = np.random.RandomState(0)  # one for all bootstraps, so that they differ in these draws, too

    def statistic(means: np.ndarray) -> np.ndarray:
        values = effects(means)
        drawn = scatter.choice(apart, values.shape) if values.shape[1] > 1 else 0.0
        return at @ (values + drawn) / max(at @ at, 1e-30)

    note = f"{words}: {', '.join(f'{_name(model)} {effect:.3f}' for model, effect in zip(models, found))}"
    runs, unit, count = pd.concat([own.runs for own in each]), f"{each[0].unit} per tenfold size", len(set(sizes))
    if count < MODELS:
        few = f"it takes {MODELS} models of one family, and the records have {count}"
        return Evidence(runs, parts, statistic, unit, note, lacks=few)
    others = [sign * np.polyfit(sizes[sizes != size], found[sizes != size], 1)[0] for size in set(sizes)]
    note += f"; without one of the sizes, between {min(others):+.3f} and {max(others):+.3f}"
    span = f"{count} sizes from {10 ** sizes.min():,.0f} to {10 ** sizes.max():,.0f} parameters"
    return Evidence(runs, parts, statistic, unit, note, models=span)


def parameters(model: str) -> float | None:
    """The number of parameters that a model's name states ("smollm2-135m", "Llama-3.1-8B"); None if it states none."""
    stated = _SIZE.findall(_name(model))
    return float(stated[-1][0]) * {"m": 1e6, "b": 1e9}[stated[-1][1].lower()] if stated else None


def family(model: str) -> str:
    """The part of a model's name before its size, without a minor version: "llama-3" for "meta-llama/Llama-3.1-8B"."""
    return _SIZE.split(_name(model))[0].partition(".")[0].strip("-_").lower()


def _name(model: str) -> str:
    return model.partition("@")[0].rpartition("/")[2]


KINDS = {kind.__name__: kind for kind in (better, samples, equal, ratio, combined, memory, gap, trend)}
