"""The paper's claims as data, and a verdict on each from run records: `python -m recon.claims`.

An effect is a difference of log-perplexity in nats per token, paired: both sides have the same evaluation windows and the same
seeds. Only records of one protocol are compared. Intervals are bootstrap percentiles over seeds and evaluation windows.
"""

import argparse
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd

from recon.errors import ReconError
from recon.spec import RunRecord, RunSpec
from recon.study import read_records

ROOT = Path(__file__).resolve().parents[1]
RECORDS, PAGE, README = ROOT / "results" / "laptop", ROOT / "figures" / "claims.md", ROOT / "README.md"
HOLDS, FAILS, UNSURE = "holds", "does not hold here", "not enough evidence"
MARKS = {HOLDS: "✓", FAILS: "✗", UNSURE: "?"}
MARGIN = 0.05  # of the damage log(pruned / dense); differences within the paper's own tables are smaller
SEEDS = 3  # fewer say nothing about training noise
MODELS = 3  # fewer make no trend: two differ in more than their size
BUDGET = 0.15  # compute is equal within this share
_COSTS = {"samples": "samples", "flops": "FLOPs", "seconds": "seconds"}
START, END = "<!-- claims -->", "<!-- /claims -->"

# Group -> what it is about, and where the paper (arXiv 2510.14444) says so.
GROUPS = {
    "1": ("Reconstruction repairs", "abstract"),
    "2": ("From half a block up, the size of the window hardly matters", "abstract; Figure 1, Table 3"),
    "3": ("Single matrices are worse", "abstract; Figure 1, Table 3"),
    "4": ("Single matrices are worse even at their exact optimum", "abstract; Figure 1, Table 3"),
    "5": (
        "Retraining needs many times the samples and compute for the same quality",
        "abstract (over an order of magnitude); Table 1, Figure 3 (131,072 samples against 2,048; 13.6 to 130 times the time)",
    ),
    "6": ("Reconstruction followed by retraining is better than either alone at equal compute", "Table 1, Figure 3"),
    "7": ("With reconstruction, the pruning criterion matters less", "abstract; Table 4, Figure 5"),
    "8": ("After reconstruction, the gap between criteria shrinks with model size", "abstract; Table 4, Figure 5"),
    "9": ("Propagation does not matter", "Appendix B"),
    "10": ("The loss does not matter", "Appendix B"),
    "11": ("Adapters inside the window are enough", "abstract"),
}


@dataclass(frozen=True)
class Claim:
    """One comparison. `ours` and `other` are the fields of `RunSpec` that differ from its defaults on either side; a tuple of
    values stands for several runs, and `other` None for the same runs before reconstruction."""

    id: str
    """Group, then what tells it from the others of that group: "2.block"."""
    statement: str
    kind: str
    """better, equal, ratio, combined, gap or trend: see the function of that name."""
    ours: dict
    other: dict | None = None
    cost: str = ""
    """What a ratio is of: samples, flops or seconds."""
    above: float = 0.0
    """What the effect has to exceed."""
    margin: float = 0.0
    """Of an equivalence, as a share of the damage."""
    noise: bool = True
    """Whether training noise could decide it: then it takes several seeds."""
    optional: bool = False
    """Not listed where there are no records."""

    @property
    def group(self) -> str:
        return self.id.partition(".")[0]

    @property
    def comparison(self) -> str:
        """Which runs against which, in words."""
        other = "the same before reconstruction" if self.other is None else _words(self.other)
        return {
            "ratio": f"{_COSTS.get(self.cost)} with which {other} reaches the quality of {_words(self.ours)}",
            "gap": f"gap between criteria: {_words(self.ours)}, against {other}",
            "trend": f"gap between criteria against model size: {_words(self.ours)}",
        }.get(self.kind, f"{_words(self.ours)} against {other}")


def _words(options: dict) -> str:
    return ", ".join(f"{name} {' / '.join(value) if isinstance(value, tuple) else value}" for name, value in options.items())


def _claims() -> Iterator[Claim]:
    half, alone = {"granularity": "half-block"}, {"granularity": "none"}
    yield Claim("1", "Half-blocks reconstructed are better than the pruned model", "better", half, noise=False)
    for coarse in ("block", "2-blocks", "4-blocks", "8-blocks", "quarter", "model"):
        yield Claim(f"2.{coarse}", f"Half-block equals {coarse}", "equal", half, {"granularity": coarse}, margin=MARGIN)
    yield Claim("3", "Half-block is better than single matrices (AdamW)", "better", half, {"granularity": "matrix"})
    exact = {"granularity": "matrix", "solver": "exact"}
    yield Claim("4", "Half-block is better than single matrices solved exactly", "better", half, exact)
    for then in ("masklora", "lora", "scalelora", "full", "norms"):
        for cost in ("samples", "flops", "seconds"):
            for times in (1, 10):
                more = f"more than {times} times the" if times > 1 else "more"
                yield Claim(
                    f"5.{then}.{cost}.{times}", f"Retraining ({then}) needs {more} {_COSTS[cost]} for the quality of reconstruction",
                    "ratio", half, alone | {"then": then}, cost, times, optional=then != "masklora",
                )  # fmt: skip
    for then in ("masklora", "lora", "scalelora", "full", "norms"):
        both, rest = half | {"then": then}, {"optional": then != "masklora", "cost": "flops"}
        said = f"Reconstruction, then retraining ({then}), is better than"
        yield Claim(f"6.{then}.reconstruction", f"{said} reconstruction alone", "combined", both, half, **rest)
        yield Claim(f"6.{then}.retraining", f"{said} retraining alone", "combined", both, alone | {"then": then}, **rest)
    criteria = half | {"criterion": ("magnitude", "wanda", "sparsegpt")}
    yield Claim("7", "The gap between criteria is smaller after reconstruction than before", "gap", criteria)
    yield Claim("8", "The gap between criteria after reconstruction shrinks with model size", "trend", criteria)
    for propagation in ("sparse", "mixed"):
        ours, other = half | {"propagation": propagation}, half | {"propagation": "dense"}
        yield Claim(f"9.{propagation}", f"Propagation {propagation} equals dense", "equal", ours, other, margin=MARGIN)
    ours, other = half | {"loss": "cosine"}, half | {"loss": "mse"}
    yield Claim("10", "Cosine loss equals mean squared error", "equal", ours, other, margin=MARGIN)
    for adapter in ("masklora", "lora", "scalelora"):
        ours, other = half | {"adapter": adapter}, half | {"adapter": "none"}
        said = f"Windows trained through {adapter} equal windows trained in full"
        yield Claim(f"11.{adapter}", said, "equal", ours, other, margin=MARGIN, optional=adapter != "masklora")


CLAIMS = tuple(_claims())


@dataclass(frozen=True)
class Verdict:
    """What records say about a claim on one model and pattern."""

    claim: str
    statement: str
    source: str
    comparison: str
    model: str
    """Empty where there are no records, and where models are compared."""
    pattern: str
    effect: float
    """Positive is as claimed; of an equivalence, positive: the first side is better. NaN where there is none."""
    low: float
    high: float
    unit: str
    seeds: int
    verdict: str
    """HOLDS, FAILS or UNSURE."""
    reason: str
    protocol: str
    records: tuple[str, ...]
    """Keys."""
    bound: str = ""
    """">" or "<" where the effect is only known to be above or below `effect`."""


# ---- records, read by the name of their fields

_DEFAULTS = {field.name: field.default for field in fields(RunSpec)}
_TUNING = (
    "learning_rate", "batch_size", "pieces", "accumulation", "warmup",
    "then_learning_rate", "then_epochs", "then_batch_size", "then_accumulation",
)  # fmt: skip
_ELSEWHERE = (  # in the protocol, in what is judged one by one, or without influence on what is compared
    "model", "revision", "pattern", "seed", "text", "samples", "prune_samples", "then_samples", "sequence_length", "evaluation_texts",
    "evaluation_samples", "evaluation_length", "held_out_samples", "tasks", "task_limit", "then_checkpointing", "device",
    "compute_dtype",
)  # fmt: skip
_SETTING = [name for name in _DEFAULTS if name not in (*_TUNING, *_ELSEWHERE)]
_IDLE = (  # fields that change nothing in a run where another has a certain value
    (("propagation", "solver", "start", "loss", "adapter"), lambda spec: spec["granularity"] == "none"),
    (("exact_samples", "exact_iterations"), lambda spec: "exact" not in (spec["solver"], spec["start"])),
    (("sparsegpt_block_size", "sparsegpt_damping"), lambda spec: spec["criterion"] != "sparsegpt"),
    (
        ("objective", "then_learning_rate", "then_epochs", "then_batch_size", "then_accumulation"),
        lambda spec: spec["then"] == "none",
    ),
    (("learning_rate", "batch_size", "pieces", "accumulation"), lambda spec: spec["granularity"] == "none"),
)


class _Run:
    """A finished record, with what comparisons ask of it."""

    def __init__(self, record: RunRecord):
        spec = _DEFAULTS | record.spec
        for names, idle in _IDLE:
            if idle(spec):
                spec.update({name: _DEFAULTS[name] for name in names})
        self.record, self.spec, self.seed = record, spec, spec["seed"]
        self.key, self.pattern = record.key, spec["pattern"]
        self.model = spec["model"] + (f"@{spec['revision']}" if spec["revision"] else "")
        self.samples = spec["samples"]
        self.trained_samples = (spec["then_samples"] or spec["samples"]) if spec["then"] != "none" else spec["samples"]
        self.setting = {name: spec[name] for name in _SETTING}
        self.tuning = tuple((name, spec[name]) for name in _TUNING)
        texts = spec["evaluation_texts"]
        self.evaluated = texts if isinstance(texts, str) else texts[0]
        try:
            nll = record.metrics["by_text"][self.evaluated]["nll_per_window"]
            self.nll = {state: np.array(nll[state], float) for state in ("dense", "pruned", "repaired")}
        except (KeyError, TypeError, ValueError) as error:
            raise ReconError(f"record {self.key}: no nll_per_window of {self.evaluated!r} to judge by: {error!r}") from error
        if len({values.shape for values in self.nll.values()}) > 1 or self.nll["dense"].ndim != 1 or not self.nll["dense"].size:
            raise ReconError(
                f"record {self.key}: nll_per_window has {[v.shape for v in self.nll.values()]} values; they must agree"
            )
        self.dtype = record.environment.get("compute_dtype", "")
        self.machine = (record.environment.get("device", ""), record.environment.get("threads", 0))
        tokens = record.protocol.get("token_hashes", {}).get(f"evaluation {self.evaluated}", "")
        self.windows = (tokens, self.nll["dense"].size)
        self.protocol = (
            spec["text"], spec["sequence_length"], spec["prune_samples"] or spec["samples"], self.evaluated, spec["evaluation_samples"], spec["evaluation_length"], self.dtype,
        )  # fmt: skip

    def cost(self, kind: str) -> float:
        """Samples trained on last, or the flops or seconds of all training; NaN where the record does not say."""
        if kind == "samples":
            return self.trained_samples
        if kind == "seconds" and "activations" in self.record.shared:
            return math.nan  # the dense model's part was had for nothing
        spent = (getattr(self.record, "flops", None) if kind == "flops" else self.record.seconds) or {}
        return sum(spent.get(phase) or 0.0 for phase in ("reconstruct", "retrain")) or math.nan


def _pick(runs: Iterable[_Run], options: dict, tuned: bool = False) -> dict[int, _Run]:
    """The runs that differ from the defaults by `options` alone, by seed, all with the same learning rates.

    Where there are several rates: those nearest the default ones, so that no side of a comparison is tuned more than the
    other; if `tuned`, where every side had its rates chosen, those with the lowest held-out perplexity, mean over the seeds
    that all have. Never chosen by evaluation text.
    """
    wanted = {name: {**_DEFAULTS, **options}[name] for name in _SETTING}
    choices: dict[tuple, dict[int, _Run]] = {}
    for run in runs:
        if run.setting == wanted:
            choices.setdefault(run.tuning, {}).setdefault(run.seed, run)
    if not choices:
        return {}

    def distance(tuning: tuple) -> tuple:
        return *(abs(math.log(value / _DEFAULTS[name])) for name, value in tuning), repr(tuning)

    shared = set.intersection(*(set(found) for found in choices.values()))
    held_out = {
        tuning: [found[seed].record.metrics.get("held_out_perplexity") for seed in shared] for tuning, found in choices.items()
    }
    if tuned and shared and not any(value is None for values in held_out.values() for value in values):
        # A run that diverged has no finite perplexity, and is not chosen.
        return choices[min(choices, key=lambda t: (np.nan_to_num(np.mean(held_out[t]), nan=math.inf), *distance(t)))]
    return choices[min(choices, key=distance)]


# ---- evidence: which runs enter a comparison, and what is computed from their means


@dataclass
class _Evidence:
    runs: list[_Run]
    parts: list[np.ndarray]
    """Mean negative log-likelihoods, (means, seeds, windows); parts are drawn independently of one another."""
    statistic: Callable[[np.ndarray], np.ndarray | tuple[np.ndarray, np.ndarray]]
    """From means (means of all parts, draws) to effects (draws,), or to lower and upper bounds of them."""
    unit: str = "nats per token"
    note: Callable[[np.ndarray], str] = lambda means: ""
    favours_other: bool = False
    """The claim's side was at a disadvantage: that it is behind proves nothing."""
    lacks: str = ""
    """What is missing for a verdict, whatever the interval."""

    @property
    def seeds(self) -> int:
        return min(part.shape[1] for part in self.parts)


def _stack(sides: Sequence[tuple[dict[int, _Run], str]], seeds: Sequence[int]) -> np.ndarray:
    """Negative log-likelihoods (sides, seeds, windows) of each side's runs in the state named."""
    return np.array([[runs[seed].nll[state] for seed in seeds] for runs, state in sides])


def _used(sides: Iterable[dict[int, _Run]], seeds: Sequence[int]) -> list[_Run]:
    return list({run.key: run for side in sides for run in (side[seed] for seed in seeds)}.values())


def _common(*sides: dict[int, _Run]) -> list[int]:
    return sorted(set.intersection(*map(set, sides)))


def better(claim: Claim, runs: list[_Run]) -> _Evidence | None:
    """Log-perplexity of the other side minus ours: above 0, ours is better."""
    ours = _pick(runs, claim.ours)
    other, state = (ours, "pruned") if claim.other is None else (_pick(runs, claim.other), "repaired")
    if not (seeds := _common(ours, other)):
        return None
    values = _stack([(ours, "repaired"), (other, state)], seeds)
    return _Evidence(_used([ours, other], seeds), [values], lambda means: means[1] - means[0])


def equal(claim: Claim, runs: list[_Run]) -> _Evidence | None:
    """The same difference as a share of the damage log(pruned / dense): within the margin, both are equal."""
    tuned = "adapter" in claim.ours  # their rates are searched, and those of full weights with them
    ours, other = _pick(runs, claim.ours, tuned), _pick(runs, claim.other, tuned)
    if not (seeds := _common(ours, other)):
        return None

    def share(means: np.ndarray) -> np.ndarray:
        damage = means[3] - means[2]
        return (means[1] - means[0]) / np.where(damage > 0, damage, math.nan)

    values = _stack([(ours, "repaired"), (other, "repaired"), (ours, "dense"), (ours, "pruned")], seeds)
    return _Evidence(_used([ours, other], seeds), [values], share, "of the damage")


def _points(runs: list[_Run], options: dict, cost: str) -> dict[tuple[int, int], dict[int, _Run]]:
    """The runs of one method by samples (for pruning, trained on last) and seed, as far as their cost is known."""
    groups: dict[tuple[int, int], list[_Run]] = {}
    for run in runs:
        groups.setdefault((run.samples, run.trained_samples), []).append(run)
    points = {count: _pick(group, options, tuned=True) for count, group in sorted(groups.items())}
    points = {count: {seed: run for seed, run in found.items() if run.cost(cost) > 0} for count, found in points.items()}
    return {count: found for count, found in points.items() if found}


def _curve(runs: list[_Run], options: dict, cost: str) -> list[dict[int, _Run]]:
    """One point per number of samples trained on: the one with the most seeds, then with most samples to prune by."""
    best: dict[int, tuple[int, int]] = {}
    points = _points(runs, options, cost)
    for samples, trained in points:
        rank = len(points[samples, trained]), samples
        if trained not in best or rank > (len(points[best[trained]]), best[trained][0]):
            best[trained] = samples, trained
    return [points[count] for count in best.values()]


def ratio(claim: Claim, runs: list[_Run]) -> _Evidence | None:
    """Cost at which the other side reaches the quality that ours has at each of its sample counts, over the cost of ours.

    The median over these counts. Quality of the other side is interpolated against log2 of its cost, piecewise linearly
    through its running best (which is in favour of the other side). Where that never reaches our quality the ratio is
    above what its last point gives, where its first point is better already it is below what that gives: bounds, and the
    interval runs from that of the lower to that of the upper ones.
    """
    ours, other = _curve(runs, claim.ours, claim.cost), _curve(runs, claim.other, claim.cost)
    # Points that lack seeds are left out where enough of the others have them.
    choices = {frozenset(a) & frozenset(b) for a in ours for b in other}
    if ours and other:
        choices.add(frozenset(_common(*ours, *other)))

    def having(points: list[dict[int, _Run]], seeds: frozenset) -> list[dict[int, _Run]]:
        return [point for point in points if seeds <= set(point)]

    def rank(seeds: frozenset) -> tuple:
        return min(len(seeds), SEEDS), len(having(ours, seeds)) + len(having(other, seeds)), len(seeds), sorted(seeds)

    choices = [seeds for seeds in choices if seeds and having(ours, seeds) and having(other, seeds)]
    if not choices:
        return None
    best = max(choices, key=rank)
    seeds, ours, other = sorted(best), having(ours, best), having(other, best)

    def costs(points: list[dict[int, _Run]]) -> np.ndarray:
        return np.array([np.mean([math.log2(point[seed].cost(claim.cost)) for seed in seeds]) for point in points])

    at, other_at = costs(ours), costs(other)
    order = np.argsort(other_at, kind="stable")
    other, other_at = [other[index] for index in order], other_at[order]

    def bounds(means: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        lower, upper = _reach(means[: len(at)], means[len(at) :], other_at)
        return lower - at[:, None], upper - at[:, None]

    def note(means: np.ndarray) -> str:
        lower, upper = (np.exp2(bound[:, 0]) for bound in bounds(means))
        each = [f"{point[seeds[0]].samples}: {_bounded(*pair)}" for point, pair in zip(ours, zip(lower, upper))]
        return "ratio by samples of reconstruction: " + ", ".join(each)

    values = _stack([(point, "repaired") for point in (*ours, *other)], seeds)

    def statistic(means: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        lower, upper = bounds(means)
        return np.median(lower, axis=0), np.median(upper, axis=0)

    return _Evidence(_used([*ours, *other], seeds), [values], statistic, f"times the {_COSTS[claim.cost]}", note)


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


def combined(claim: Claim, runs: list[_Run]) -> _Evidence | None:
    """`better`, at equal compute within BUDGET; if there is no such pair, with less compute on our side.

    Of several pairs of budgets: the one with the most seeds (up to SEEDS), then equal compute, then the largest budget.
    """
    pairs = []
    for count, ours in _points(runs, claim.ours, claim.cost).items():
        for other_count, other in _points(runs, claim.other, claim.cost).items():
            if not (seeds := _common(ours, other)):
                continue
            spent, others = (sum(side[seed].cost(claim.cost) for seed in seeds) / len(seeds) for side in (ours, other))
            if spent <= (1 + BUDGET) * others:
                fair = spent >= (1 - BUDGET) * others
                closeness = -abs(math.log(spent / others))
                pairs.append(((min(len(seeds), SEEDS), fair, spent, closeness, count, other_count), ours, other, seeds))
    if not pairs:
        return None
    (_, fair, spent, closeness, count, other_count), ours, other, seeds = max(pairs, key=lambda pair: pair[0])
    others = sum(other[seed].cost(claim.cost) for seed in seeds) / len(seeds)
    note = (
        f"{_COSTS[claim.cost]} {spent:.3g} (samples {count[0]}, then {count[1]}) against {others:.3g} (samples {other_count[1]})"
        + ("" if fair else ": less compute on the combination's side")
    )
    values = _stack([(ours, "repaired"), (other, "repaired")], seeds)
    return _Evidence(
        _used([ours, other], seeds), [values], lambda means: means[1] - means[0], note=lambda _: note, favours_other=not fair
    )


def _by_criterion(claim: Claim, runs: list[_Run]) -> dict[str, dict[int, _Run]]:
    found = {name: _pick(runs, claim.ours | {"criterion": name}) for name in claim.ours["criterion"]}
    return {name: side for name, side in found.items() if side}


def _contrast(values: np.ndarray) -> np.ndarray:
    """Weights (criteria,) that give the gap of means, from `values` (criteria, seeds, windows): 1 for the worst, -1 for the best.

    Which they are is not asked anew in every draw: the largest minus the smallest of a draw is never below zero, so that noise
    alone would make a gap, and an interval that excludes none. Chosen from the same data, the gap is still a little too large
    where criteria hardly differ.
    """
    means, weights = values.mean((1, 2)), np.zeros(len(values))
    weights[means.argmax()] += 1
    weights[means.argmin()] -= 1
    return weights


def gap(claim: Claim, runs: list[_Run]) -> _Evidence | None:
    """Gap between criteria (largest minus smallest log-perplexity) after pruning, minus that after reconstruction."""
    found = _by_criterion(claim, runs)
    if len(found) < 2 or not (seeds := _common(*found.values())):
        return None
    parts = [_stack([(side, state) for side in found.values()], seeds) for state in ("pruned", "repaired")]
    before, after = (_contrast(part) for part in parts)

    def note(means: np.ndarray) -> str:
        sizes = before @ means[: len(found), 0], after @ means[len(found) :, 0]
        return f"{', '.join(found)}: gap {sizes[0]:.3f} before, {sizes[1]:.3f} after"

    return _Evidence(
        _used(found.values(), seeds),
        [np.concatenate(parts)],
        lambda means: np.concatenate([before, -after]) @ means,
        note=note,
    )


def trend(claim: Claim, runs: list[_Run]) -> _Evidence | None:
    """Minus the slope of the gap between criteria after reconstruction, per doubling of the parameters that models' names
    state; where one does not, per step in the order in which models are given."""
    models: dict[str, dict[tuple, list[_Run]]] = {}
    for run in runs:
        models.setdefault(run.model, {}).setdefault(run.windows, []).append(run)
    # Windows are the same within a model only: tokenizers differ.
    found = {model: _by_criterion(claim, max(groups.values(), key=len)) for model, groups in models.items()}
    found = {model: sides for model, sides in found.items() if len(sides) > 1 and _common(*sides.values())}
    names = [name for name in claim.ours["criterion"] if all(name in sides for sides in found.values())]
    if len(found) < 2 or len(names) < 2:
        return None
    known = len({parameters(model) for model in found} - {None}) == len(found)
    found = {model: found[model] for model in (sorted(found, key=parameters) if known else found)}
    at = np.log2([parameters(model) for model in found]) if known else np.arange(len(found), dtype=float)
    at = at - at.mean()
    seeds = {model: _common(*(sides[name] for name in names)) for model, sides in found.items()}
    found = {model: {name: sides[name] for name in names} for model, sides in found.items()}
    parts = [_stack([(side, "repaired") for side in sides.values()], seeds[model]) for model, sides in found.items()]
    contrasts = np.concatenate([_contrast(part) for part in parts])

    def gaps(means: np.ndarray) -> np.ndarray:
        return (contrasts[:, None] * means).reshape(len(parts), len(names), -1).sum(1)

    def note(means: np.ndarray) -> str:
        each = [f"{_short(model)} {size:.3f}" for model, size in zip(found, gaps(means)[:, 0])]
        return f"gap between {', '.join(names)}: {', '.join(each)}"

    return _Evidence(
        [run for model, sides in found.items() for run in _used(sides.values(), seeds[model])],
        parts,
        lambda means: -(at @ gaps(means)) / (at @ at),
        "nats per token and doubling" if known else "nats per token and step",
        note,
        lacks=f"{len(found)} models make no trend" if len(found) < MODELS else "",
    )


def parameters(model: str) -> float | None:
    """The number of parameters that a model's name states ("smollm2-135m", "Llama-3.1-8B"); None where it states none."""
    found = re.findall(r"(?<![\w.])(\d+(?:\.\d+)?)([mb])(?![a-z])", Path(model.partition("@")[0]).name, re.IGNORECASE)
    return float(found[-1][0]) * {"m": 1e6, "b": 1e9}[found[-1][1].lower()] if found else None


KINDS = {"better": better, "equal": equal, "ratio": ratio, "combined": combined, "gap": gap, "trend": trend}


# ---- intervals

# Quantiles of Student's t, 1 to 9 degrees of freedom, over those of the normal distribution.
_T = {
    0.95: np.array([12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262]) / 1.960,
    0.90: np.array([6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833]) / 1.645,
}


@lru_cache(maxsize=64)
def _draws(count: int, resamples: int, seed: int, stream: int) -> np.ndarray:
    """Weights (resamples, count) of things drawn with replacement."""
    # RandomState: its stream is frozen, so that the committed page does not depend on numpy's version.
    drawn = np.random.RandomState([seed, stream]).randint(0, count, (resamples, count))
    flat = (drawn + np.arange(resamples)[:, None] * count).ravel()
    return np.bincount(flat, minlength=resamples * count).reshape(resamples, count) / count


def interval(
    parts: Sequence[np.ndarray], statistic: Callable, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Bootstrap percentile interval of `statistic` of the means of `parts`, each (means, seeds, windows); level 0.95 or 0.9.

    Seeds are drawn with replacement, then windows; all seeds share their windows, so one draw of windows serves them all
    (the "pigeonhole" bootstrap: Owen, Annals of Applied Statistics 2007). The bootstrap understates the spread of few
    seeds, so that deviations of drawn seeds from their mean are widened by sqrt(n / (n - 1)) and by Student's t over normal
    (as Hesterberg's expanded percentile interval does: The American Statistician 2015). With one seed only windows are drawn.
    NaN where the statistic is NaN in any draw.
    """
    means = []
    for index, values in enumerate(parts):
        seeds, windows = values.shape[1:]
        of_seeds = _draws(seeds, resamples, seed, 2 * index)
        if seeds > 1:
            wider = math.sqrt(seeds / (seeds - 1)) * _T[level][min(seeds - 1, 9) - 1]
            of_seeds = 1 / seeds + wider * (of_seeds - 1 / seeds)
        by_seed = values @ _draws(windows, resamples, seed, 2 * index + 1).T
        means.append(np.einsum("bs,ksb->kb", of_seeds, by_seed))
    lower, upper = _both(statistic(np.concatenate(means)))
    if np.isnan(lower).any() or np.isnan(upper).any():
        return math.nan, math.nan
    # No arithmetic between draws: a ratio may be infinite.
    low = np.quantile(lower, (1 - level) / 2, method="lower")
    return float(low), float(np.quantile(upper, (1 + level) / 2, method="higher"))


def _both(effects: np.ndarray | tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    return effects if isinstance(effects, tuple) else (effects, effects)


# ---- verdicts


def judge(records: Iterable[RunRecord], resamples: int = 2000, seed: int = 0) -> list[Verdict]:
    """A verdict on every claim, for each model and pattern that records allow to compare; the same for any order of records
    (but for models whose names do not state their size).

    "A is better than B" holds if the 95 % interval is above 0, and does not hold here if it is below; "equal" holds if the
    90 % interval is within the margin (two one-sided tests at 5 %), and does not if it is outside; a ratio as "better", with
    its own bound. All else is not enough evidence, and so is what fewer than three seeds say where training noise could
    decide. Where several protocols allow a comparison, the one with the most records is taken. Failed runs are left out.

    Raises:
        ReconError: a record has nothing to judge by, or two records that state one protocol and model were not evaluated
            on the same windows.
    """
    runs = [_Run(record) for record in records if record.status == "done"]
    order = {model: index for index, model in enumerate(dict.fromkeys(run.model for run in runs))}
    runs.sort(key=lambda run: (order[run.model], run.key))
    _check_windows(runs)
    # The default model and pattern are what the other claims start from, so they come first.
    default = (_DEFAULTS["model"], _DEFAULTS["pattern"])
    verdicts = []
    for claim in CLAIMS:
        scopes: dict[tuple[str, str], dict[tuple, list[_Run]]] = {}
        for run in runs:
            scope = ("" if claim.kind == "trend" else run.model, run.pattern)
            scopes.setdefault(scope, {}).setdefault(_protocol(claim, run), []).append(run)
        found = []
        for scope in sorted(scopes, key=lambda s: (s[0] not in ("", default[0]), s[0], s[1] != default[1], s[1])):
            candidates = [(KINDS[claim.kind](claim, group), key) for key, group in scopes[scope].items()]
            candidates = [(evidence, key) for evidence, key in candidates if evidence is not None]
            if candidates:
                evidence, _ = max(candidates, key=lambda pair: (len(pair[0].runs), pair[0].seeds, repr(pair[1])))
                found.append(_verdict(claim, *scope, evidence, resamples, seed))
        if not found and not claim.optional:
            found.append(_without(claim))
        verdicts += found
    return verdicts


def _protocol(claim: Claim, run: _Run) -> tuple:
    """What runs have to share to be compared for a claim."""
    shared = run.protocol
    if claim.kind not in ("ratio", "combined"):
        shared += (run.samples,)
    if claim.kind != "trend":  # tokenizers differ between models, and so do windows
        shared += run.windows
    if claim.cost == "seconds":
        shared += run.machine
    return shared


def _check_windows(runs: list[_Run]) -> None:
    """Raises `ReconError` if the dense model's negative log-likelihoods differ where windows and model are said to be the same."""
    first: dict[tuple, _Run] = {}
    for run in runs:
        known = first.setdefault((run.model, run.protocol, run.windows), run)
        # Kernels of other machines differ by far less than this, other windows by far more.
        if not np.allclose(known.nll["dense"], run.nll["dense"], rtol=0, atol=0.02, equal_nan=True):
            raise ReconError(
                f"records {known.key} and {run.key} state the same model and protocol, but the dense model's negative "
                "log-likelihoods differ: they were not evaluated on the same windows; keep them in folders of their own"
            )


def _without(claim: Claim) -> Verdict:
    nothing = math.nan
    return Verdict(
        claim.id, claim.statement, GROUPS[claim.group][1], claim.comparison, "", "", nothing, nothing, nothing, "", 0,
        UNSURE, "no records", "", (),
    )  # fmt: skip


def _verdict(claim: Claim, model: str, pattern: str, evidence: _Evidence, resamples: int, seed: int) -> Verdict:
    level = 0.90 if claim.kind == "equal" else 0.95
    means = np.concatenate([part.mean((1, 2)) for part in evidence.parts])[:, None]
    lower = upper = low = high = math.nan
    if np.isfinite(means).all():
        lower, upper = (float(bound[0]) for bound in _both(evidence.statistic(means)))
        low, high = interval(evidence.parts, evidence.statistic, level, resamples, seed)
        if claim.kind == "ratio":
            lower, upper, low, high = (float(np.exp2(value)) for value in (lower, upper, low, high))
        verdict, reason = _rule(claim, evidence, low, high)
        if note := evidence.note(means):
            reason += f"; {note}"
    else:
        diverged = [run.key for run in evidence.runs if not all(np.isfinite(values).all() for values in run.nll.values())]
        verdict, reason = UNSURE, f"not finite: {', '.join(diverged)}"
    effect, bound = lower, ""
    if lower != upper:  # a ratio of which bounds are known, perhaps only one
        effect, bound = math.sqrt(lower * upper), ""
        if math.isinf(upper):
            effect, bound = (lower, ">") if lower > 0 else (math.nan, "")
        elif lower == 0:
            effect, bound = upper, "<"
    return Verdict(
        claim.id, claim.statement, GROUPS[claim.group][1], claim.comparison, model, pattern, effect, low, high, evidence.unit,
        evidence.seeds, verdict, reason, _protocol_words(evidence.runs), tuple(sorted(run.key for run in evidence.runs)), bound,
    )  # fmt: skip


def _rule(claim: Claim, evidence: _Evidence, low: float, high: float) -> tuple[str, str]:
    """The verdict, and why, from the interval."""
    if math.isnan(low):
        return UNSURE, "pruning did no harm that could be measured by"
    if claim.kind == "equal":
        inside, outside = -claim.margin < low and high < claim.margin, low > claim.margin or high < -claim.margin
        what = f"90 % interval {{}} ±{claim.margin:g} of the damage"
        verdict, reason = (
            (HOLDS, what.format("within")) if inside else (FAILS, what.format("outside")) if outside
            else (UNSURE, what.format("reaches across"))
        )  # fmt: skip
    else:
        verdict = HOLDS if low > claim.above else FAILS if high < claim.above else UNSURE
        where = {HOLDS: "above", FAILS: "below", UNSURE: "includes"}[verdict]
        reason = f"95 % interval {where} {claim.above:g}"
    if evidence.lacks:
        return UNSURE, f"{reason}; {evidence.lacks}"
    if verdict == FAILS and evidence.favours_other:
        return UNSURE, f"{reason}, but with less compute"
    if evidence.seeds < SEEDS:
        reason += f"; fewer than {SEEDS} seeds ({evidence.seeds})"
        if claim.noise:
            return UNSURE, f"{reason}: training noise unknown"
    return verdict, reason


def _protocol_words(runs: list[_Run]) -> str:
    text, length, pruned_on, evaluated, windows, evaluation_length, dtype = runs[0].protocol
    counts = sorted({count for run in runs for count in (run.samples, run.trained_samples)})
    samples = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return (
        f"{samples} x {length} tokens of {_short(text)}, pruned on {pruned_on}; perplexity on {windows} x {evaluation_length} tokens of "
        f"{_short(evaluated)}" + (f", {dtype} products" if dtype else "")
    )


# ---- pages


def _short(name: str) -> str:
    """A model or text by its name; a folder or file anywhere on this machine by its last part."""
    return Path(name).name if Path(name).is_absolute() else name


def _bounded(lower: float, upper: float) -> str:
    if lower == upper:
        return f"{lower:.3g}"
    return f"> {lower:.3g}" if lower > 0 else f"< {upper:.3g}" if math.isfinite(upper) else "?"


def _effect(verdict: Verdict) -> str:
    """The effect with its interval and unit; empty where there is none."""
    if math.isnan(verdict.low):
        return ""
    form = "{:.3g}" if verdict.unit.startswith("times") else "{:+.3f}"
    effect, low, high = (form.format(value).replace("inf", "∞") for value in (verdict.effect, verdict.low, verdict.high))
    effect = "?" if math.isnan(verdict.effect) else f"{verdict.bound} {effect}".strip()
    return f"{effect} [{low}, {high}] {verdict.unit}"


def _where(verdict: Verdict) -> str:
    return ", ".join(part for part in (_short(verdict.model), verdict.pattern) if part)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in line)} |" for line in lines]


def to_markdown(verdicts: Sequence[Verdict]) -> str:
    """A page with a table per group of claims, and under it the protocols of what was compared."""
    lines = [
        "# Do the paper's claims hold?",
        "",
        "Every claim of arXiv 2510.14444 that run records can judge. Written by `python -m recon.claims`; `recon/claims.py` states",
        "the claims, which runs each compares, and the rules.",
        "",
        f"{MARKS[HOLDS]} {HOLDS}, {MARKS[FAILS]} {FAILS}, {MARKS[UNSURE]} {UNSURE}. Effects are differences of log-perplexity between "
        "runs with the same evaluation windows and seeds; positive is as claimed. In brackets, a bootstrap interval over seeds and "
        "windows: 95 %, for equivalences 90 % (two one-sided tests). Two sides are equal within "
        f"{MARGIN:g} of the damage log(pruned / dense); differences within the paper's own tables are smaller. With fewer than "
        f"{SEEDS} seeds, what training noise could decide is {UNSURE}. \"Here\" is the model and protocol of the row.",
    ]  # fmt: skip
    for group, (title, source) in GROUPS.items():
        mine = [verdict for verdict in verdicts if verdict.claim.partition(".")[0] == group]
        if not mine:
            continue
        protocols = {text: i for i, text in enumerate(dict.fromkeys(v.protocol for v in mine if v.protocol), 1)}
        rows = [
            (
                f"{MARKS[v.verdict]} {v.verdict}",
                v.statement,
                v.comparison,
                _where(v),
                _effect(v),
                v.seeds or "",
                v.reason,
                protocols.get(v.protocol, ""),
            )
            for v in mine
        ]
        lines += ["", f"## {group}. {title}", "", f"Paper: {source}.", ""]
        lines += _table(("verdict", "claim", "comparison", "model, pattern", "effect", "seeds", "why", "protocol"), rows)
        for text, number in protocols.items():
            count = len({key for v in mine if v.protocol == text for key in v.records})
            lines += ["", f"Protocol {number}: {text}; {count} record{'s' * (count > 1)}."]
    return "\n".join(lines) + "\n"


def to_summary(verdicts: Sequence[Verdict]) -> str:
    """A short table: a row per claim with the effect at the first model and pattern, and verdicts counted over all."""
    claims: dict[str, list[Verdict]] = {}
    for verdict in verdicts:
        claims.setdefault(verdict.claim, []).append(verdict)
    rows = []
    for mine in claims.values():
        if not mine[0].records:
            continue
        counts = [(state, sum(v.verdict == state for v in mine)) for state in MARKS]
        each = [f"{MARKS[state]} {state}" + (f" ({n} of {len(mine)})" if len(mine) > 1 else "") for state, n in counts if n]
        rows.append((mine[0].statement, ", ".join(each), f"{_effect(mine[0])} ({_where(mine[0])})".strip(), mine[0].seeds))
    lines = _table(("claim", "verdict", "effect", "seeds"), rows) if rows else []
    if missing := [mine[0] for mine in claims.values() if not mine[0].records]:
        groups = dict.fromkeys(verdict.claim.partition(".")[0] for verdict in missing)
        each = [f"{GROUPS[group][0][0].lower()}{GROUPS[group][0][1:]}" for group in groups]
        lines += ["", f"No records yet for {len(missing)} comparisons under: {'; '.join(each)}."]
    return "\n".join(lines).strip() + "\n"


def show(verdicts: Sequence[Verdict], ids: Iterable[str]) -> "pd.io.formats.style.Styler":
    """The verdicts on the claims called `ids` ("2.block", or "2" for its whole group) as a table for a notebook.

    Raises `ReconError` for an id that is no claim.
    """
    ids = [ids] if isinstance(ids, str) else list(ids)
    known = {name for claim in CLAIMS for name in (claim.id, claim.group)}
    if unknown := [name for name in ids if name not in known]:
        raise ReconError(f"unknown claim {unknown[0]!r}; allowed: {', '.join([*GROUPS, *(claim.id for claim in CLAIMS)])}")
    rows = [
        {
            "verdict": f"{MARKS[v.verdict]} {v.verdict}",
            "claim": v.statement,
            "model, pattern": _where(v),
            "effect": _effect(v),
            "seeds": v.seeds,
            "why": v.reason,
        }
        for v in verdicts
        if v.claim in ids or v.claim.partition(".")[0] in ids
    ]
    table = pd.DataFrame(rows, columns=["verdict", "claim", "model, pattern", "effect", "seeds", "why"])
    return table.style.hide(axis="index").set_properties(**{"text-align": "left"})


def _pages(records_folder: Path | str, page: Path | str, readme: Path | str | None) -> dict[Path, str]:
    """What the page and, where one is given, the README should hold."""
    verdicts = judge(read_records(records_folder))
    pages = {Path(page): to_markdown(verdicts)}
    if readme is None:
        return pages
    readme = Path(readme)
    try:
        text = readme.read_text(encoding="utf-8")
    except OSError as error:
        raise ReconError(f"README {str(readme)!r} cannot be read: {error.strerror}") from error
    if text.count(START) != 1 or text.count(END) != 1 or text.index(START) > text.index(END):
        raise ReconError(
            f"README {str(readme)!r} must hold {START} and, after it, {END}, once each: the section goes between them"
        )
    head, tail = text.split(START)[0], text.split(END)[1]
    return pages | {readme: f"{head}{START}\n{to_summary(verdicts)}{END}{tail}"}


def write(records_folder: Path | str = RECORDS, page: Path | str = PAGE, readme: Path | str | None = README) -> list[Path]:
    """Writes the page, and the README's section between `<!-- claims -->` and `<!-- /claims -->` (None: no README); returns what changed.

    Raises `ReconError` as `judge` does, and for a README without these markers.
    """
    changed = []
    for path, text in _pages(records_folder, page, readme).items():
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            changed.append(path)
    return changed


def stale(records_folder: Path | str = RECORDS, page: Path | str = PAGE, readme: Path | str = README) -> list[str]:
    """A message for each of the page and the README that is not what the records give; empty if both are."""
    return [
        f"{path} is not what the records in {records_folder} give; run: python -m recon.claims"
        for path, text in _pages(records_folder, page, readme).items()
        if not path.is_file() or path.read_text(encoding="utf-8") != text
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status: 0, 1 with --check if something is not current, 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m recon.claims", description="Judge the paper's claims from run records.")
    parser.add_argument("--check", action="store_true", help="write nothing; say what is not current")
    parser.add_argument("--records", type=Path, default=RECORDS, help="folder of records (default: results/laptop)")
    parser.add_argument("--page", type=Path, default=PAGE, help="page to write (default: figures/claims.md)")
    parser.add_argument("--readme", type=Path, default=README, help="file with the markers (default: README.md)")
    given = parser.parse_args(arguments)
    try:
        if given.check:
            messages = stale(given.records, given.page, given.readme)
            print("\n".join(messages) or "current")
            return int(bool(messages))
        changed = write(given.records, given.page, given.readme)
    except ReconError as error:
        parser.exit(2, f"recon.claims: {error}\n")
    print("\n".join(f"written: {path}" for path in changed) or "current")
    return 0


if __name__ == "__main__":
    sys.exit(main())
