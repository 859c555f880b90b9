"""Claims judged on made-up records whose truth is known, and the pages that come of them."""

import math
import random
import time
from dataclasses import asdict

import numpy as np
import pytest

from recon import claims
from recon.claims import FAILS, HOLDS, UNSURE, judge
from recon.errors import ReconError
from recon.spec import RunRecord, RunSpec
from recon.study import write_record

WINDOWS, DAMAGE = 30, 0.8


def record(recovered=0.4, seed=0, noise=0.002, damage=DAMAGE, hash="w", text_seed=0, held_out=None, flops=None, **spec):
    """A record of a run that recovers this share of `damage`, in nats, up to `noise` per seed and per window."""
    spec = asdict(RunSpec()) | spec | {"seed": seed}
    draw = random.Random(repr((sorted(spec.items()), recovered)))  # noise differs between runs and is the same in every process
    dense = [3 + 0.3 * random.Random(f"{text_seed} {window}").gauss(0, 1) for window in range(WINDOWS)]
    shift = draw.gauss(0, noise)
    repaired = [nll + damage * (1 - recovered) + shift + draw.gauss(0, noise) for nll in dense]
    nll = {"dense": dense, "pruned": [value + damage for value in dense], "repaired": repaired}
    metrics = {"by_text": {spec["evaluation_texts"][0]: {"nll_per_window": nll}}}
    if held_out is not None:
        metrics["held_out_perplexity"] = held_out
    key = f"{draw.getrandbits(64):016x}"
    protocol = {"token_hashes": {f"evaluation {spec['evaluation_texts'][0]}": hash}}
    found = RunRecord(spec, key, "done", None, metrics, {"reconstruct": 1.0}, protocol=protocol)
    found.environment = {"compute_dtype": "bfloat16", "device": "cpu", "threads": 2}
    found.flops = flops or {}
    return found


def seeds(recovered=0.4, count=3, **options):
    return [record(recovered, seed=seed, **options) for seed in range(count)]


def verdict_on(claim, records, **options):
    [found] = [verdict for verdict in judge(records, **options) if verdict.claim == claim]
    return found


# ---- one kind of claim after the other


@pytest.mark.parametrize("matrix, verdict", [(0.2, HOLDS), (0.6, FAILS), (0.4, UNSURE)])
def test_better_is_decided_by_the_side_of_zero(matrix, verdict):
    found = verdict_on("3", seeds(0.4) + seeds(matrix, granularity="matrix"))
    assert found.verdict == verdict and found.seeds == 3
    assert found.effect == pytest.approx(DAMAGE * (0.4 - matrix), abs=0.01)
    assert found.low < found.effect < found.high and found.unit == "nats per token"
    assert found.low < DAMAGE * (0.4 - matrix) < found.high


@pytest.mark.parametrize(
    "block, noise, verdict",
    [(0.41, 0.002, HOLDS), (0.6, 0.002, FAILS), (0.2, 0.002, FAILS), (0.44, 0.02, UNSURE), (0.4, 0.05, UNSURE)],
)
def test_equivalence_takes_a_margin_of_the_damage(block, noise, verdict):
    records = seeds(0.4, noise=noise) + seeds(block, noise=noise, granularity="block")
    found = verdict_on("2.block", records)
    assert found.verdict == verdict and found.unit == "of the damage"
    assert found.low < 0.4 - block < found.high
    # A pattern that does ten times the harm has the same verdict: the margin is relative.
    if noise == 0.002:
        worse = [
            record(share, seed=s, damage=8.0, noise=0.02, granularity=g)
            for share, g in ((0.4, "half-block"), (block, "block"))
            for s in range(3)
        ]
        assert verdict_on("2.block", worse).verdict == verdict


def test_nothing_equals_anything_where_pruning_did_no_harm():
    found = verdict_on("2.block", seeds(damage=0.0) + seeds(damage=0.0, granularity="block"))
    assert found.verdict == UNSURE and "no harm" in found.reason and math.isnan(found.low)


def test_reconstruction_is_compared_with_its_own_pruned_model():
    assert verdict_on("1", seeds(0.4)).verdict == HOLDS
    assert verdict_on("1", seeds(-0.1)).verdict == FAILS
    assert verdict_on("1", seeds(0.0003, noise=0.02)).verdict == UNSURE


@pytest.mark.parametrize("gap_after, verdict", [(0.02, HOLDS), (0.3, FAILS), (0.1, UNSURE)])
def test_gap_between_criteria(gap_after, verdict):
    """Pruned models are 0.1 nats apart, reconstructed ones `gap_after`."""
    records = []
    for criterion, step in (("magnitude", 1), ("wanda", 0), ("sparsegpt", 0.5)):
        damage = DAMAGE + 0.1 * step
        records += seeds(1 - (0.4 + gap_after * step) / damage, damage=damage, criterion=criterion)
    found = verdict_on("7", records)
    assert found.verdict == verdict and found.effect == pytest.approx(0.1 - gap_after, abs=0.01)
    assert "magnitude, wanda, sparsegpt: gap 0.100 before" in found.reason
    assert verdict_on("7", [r for r in records if r.spec["criterion"] == "wanda"]).reason == "no records"


def test_noise_alone_makes_no_gap():
    """Criteria that are all the same are apart by noise, and then more so after reconstruction: that is no evidence."""
    verdicts = []
    for trial in range(40):
        records = [
            r for c in ("magnitude", "wanda", "sparsegpt") for r in seeds(0.4, noise=0.01, criterion=c, held_out_samples=trial)
        ]
        verdicts.append(verdict_on("7", records, resamples=400).verdict)
    assert verdicts.count(UNSURE) >= 33  # nine in ten: the worst and the best are chosen from the same data


def family(gaps, names=("a-100m", "b-0.4b", "c-1.6B")):
    records = []
    for (model, gap), text_seed in zip(zip(names, gaps), range(9)):
        for criterion, step in (("magnitude", 1), ("wanda", 0)):
            options = {"model": model, "text_seed": text_seed, "hash": model}  # every tokenizer has its own windows
            records += seeds(0.5 - gap * step / DAMAGE, criterion=criterion, **options)
    return records


@pytest.mark.parametrize("gaps, verdict", [((0.3, 0.2, 0.1), HOLDS), ((0.1, 0.2, 0.3), FAILS), ((0.2, 0.2, 0.2), UNSURE)])
def test_gap_against_model_size(gaps, verdict):
    records = family(gaps)
    found = verdict_on("8", records)
    assert found.verdict == verdict and found.model == ""
    # Two doublings from model to model.
    assert found.effect == pytest.approx((gaps[0] - gaps[1]) / 2, abs=0.01) and "doubling" in found.unit
    again = verdict_on("8", list(reversed(records)))
    assert (again.effect, again.low, again.high) == (found.effect, found.low, found.high)
    unnamed = verdict_on("8", family(gaps, ("x", "y", "z")))
    assert unnamed.verdict == verdict and unnamed.effect == pytest.approx(gaps[0] - gaps[1], abs=0.01)


def test_parameters_by_name():
    sizes = {"smollm2-135m": 135e6, "meta-llama/Llama-3.1-8B": 8e9, "Qwen/Qwen2.5-0.5B-Instruct": 5e8, "gemma-3-270m-it": 27e7}
    assert {name: claims.parameters(name) for name in sizes} == sizes
    assert [claims.parameters(name) for name in ("gpt2", "phi-2", "opt-125@8b")] == [None] * 3


# ---- ratios

COUNTS = (16, 32, 64, 128)


def curve(best, counts, noise=0.0005, flops=None, **options):
    """Three seeds at each count; `best` recovered at 128, 0.08 less per halving."""
    return [
        record(best - 0.08 * (7 - math.log2(n)), seed=s, noise=noise, flops=flops and flops(n), **options, **spec)
        for n in counts
        for spec in [{"samples": 64, "then_samples": n} if "then" in options else {"samples": n, "prune_samples": 64}]
        for s in range(3)
    ]


@pytest.mark.parametrize("doublings, verdict, tenfold", [(5, HOLDS, HOLDS), (2, HOLDS, FAILS), (-1, FAILS, FAILS)])
def test_ratio_of_samples_at_equal_quality(doublings, verdict, tenfold):
    counts = [2**power for power in range(2, 15)]
    records = curve(0.5, COUNTS) + curve(0.5 - 0.08 * doublings, counts, granularity="none", then="masklora")
    found = verdict_on("5.masklora.samples.1", records)
    assert found.verdict == verdict and verdict_on("5.masklora.samples.10", records).verdict == tenfold
    assert found.low < 2.0**doublings < found.high and found.effect == pytest.approx(2.0**doublings, rel=0.05)
    assert found.bound == "" and found.high / found.low < 1.2


def test_ratio_that_is_only_known_to_be_above():
    """Retraining never gets there: all that its largest run shows is a bound."""
    records = curve(0.9, COUNTS) + curve(0.1, [128, 1024], granularity="none", then="masklora")
    found = verdict_on("5.masklora.samples.1", records)
    bound = 1024 / math.sqrt(32 * 64)  # the median over four counts
    assert (found.bound, found.effect, found.high) == (">", pytest.approx(bound), math.inf) and found.low == pytest.approx(bound)
    assert found.verdict == HOLDS and verdict_on("5.masklora.samples.10", records).verdict == HOLDS
    assert "128: > 8" in found.reason and "> 22.6 [22.6, ∞]" in claims.to_markdown([found])
    # With fewer samples tried, the bound is too low to say that it is ten times: that is no evidence against it either.
    few = [r for r in records if r.spec["then_samples"] != 1024]
    assert verdict_on("5.masklora.samples.10", few).verdict == UNSURE
    assert verdict_on("5.masklora.samples.1", few).verdict == HOLDS


def test_ratio_that_is_only_known_to_be_below():
    """Retraining is better from its first run on."""
    records = curve(0.3, COUNTS) + curve(0.9, [32, 128], granularity="none", then="masklora")
    found = verdict_on("5.masklora.samples.1", records)
    bound = 32 / math.sqrt(32 * 64)
    assert (found.bound, found.effect, found.low) == ("<", pytest.approx(bound), 0.0) and found.verdict == FAILS


def test_methods_that_tie_have_ratio_one_and_no_verdict():
    tied = [seeds(share, samples=n, noise=0.0) for n, share in zip(COUNTS, (0.1, 0.2, 0.3, 0.4))]
    other = [
        seeds(share, samples=n, noise=0.0, granularity="none", then="masklora") for n, share in zip(COUNTS, (0.1, 0.2, 0.3, 0.4))
    ]
    found = verdict_on("5.masklora.samples.1", sum(tied + other, []))
    assert (found.effect, found.bound, found.verdict) == (pytest.approx(1.0), "", UNSURE)
    better = verdict_on("3", seeds(noise=0.0) + seeds(noise=0.0, granularity="matrix"))
    assert better.effect == pytest.approx(0.0, abs=1e-12) and better.verdict == UNSURE


def test_ratio_of_compute():
    reconstruction = curve(0.5, COUNTS, flops=lambda n: {"prune": 1e9, "reconstruct": 3e9 * n})
    cost = {"granularity": "none", "then": "lora", "flops": lambda n: {"prune": 1e9, "retrain": 6e9 * n}}
    retraining = curve(0.5, (8, *COUNTS, 256), **cost)
    found = verdict_on("5.lora.flops.1", reconstruction + retraining)
    assert found.verdict == HOLDS and found.effect == pytest.approx(2.0, rel=0.05) and found.low < 2 < found.high
    assert verdict_on("5.lora.samples.1", reconstruction + retraining).effect == pytest.approx(1.0, rel=0.05)
    assert verdict_on("5.lora.flops.10", reconstruction + retraining).verdict == FAILS
    assert not [v for v in judge(reconstruction) if v.claim.startswith("5.lora")]  # optional: not listed without records


def test_runs_on_other_machines_are_not_timed_against_each_other():
    reconstruction = curve(0.5, COUNTS)
    retraining = curve(0.1, COUNTS, granularity="none", then="masklora")
    for found in retraining:
        found.seconds = {"reconstruct": 0.0, "retrain": 50.0}
    assert verdict_on("5.masklora.seconds.10", reconstruction + retraining).verdict == HOLDS
    for found in retraining:
        found.environment["threads"] = 64
    assert verdict_on("5.masklora.seconds.10", reconstruction + retraining).reason == "no records"
    assert verdict_on("5.masklora.samples.1", reconstruction + retraining).records


def test_points_without_enough_seeds_do_not_spoil_a_ratio():
    records = curve(0.5, COUNTS) + curve(0.34, [16, 64, 256, 1024], granularity="none", then="masklora")
    records.append(record(0.9, granularity="none", then="masklora", then_samples=4096))
    found = verdict_on("5.masklora.samples.1", records)
    assert found.seeds == 3 and found.effect == pytest.approx(4, rel=0.05)


def test_reach_agrees_with_a_search_point_by_point():
    draw = np.random.default_rng(0)
    at, curve_, targets = np.arange(5.0), draw.normal(size=(5, 200)), draw.normal(size=(3, 200))
    lower, upper = claims._reach(targets, curve_, at)
    for k in range(200):
        best = np.minimum.accumulate(curve_[:, k])
        for i, target in enumerate(targets[:, k]):
            fine = np.linspace(0, 4, 40001)
            hits = fine[np.interp(fine, at, best) <= target]
            if not len(hits):
                assert (lower[i, k], upper[i, k]) == (4, np.inf)
            elif hits[0] == 0:
                assert (lower[i, k], upper[i, k]) == (-np.inf, 0)
            else:
                assert lower[i, k] == upper[i, k] == pytest.approx(hits[0], abs=2e-4)


# ---- reconstruction, then retraining


def budgeted(recovered, flops, **spec):
    return seeds(recovered, flops={"prune": 1e12, "reconstruct": flops / 2, "retrain": flops / 2}, **spec)


def test_combination_is_compared_at_equal_compute():
    both = {"then": "masklora", "then_samples": 32}
    equal = budgeted(0.5, 1.0e9, **both) + budgeted(0.4, 1.1e9) + budgeted(0.9, 9e9, samples=512)
    found = verdict_on("6.masklora.reconstruction", equal)
    assert found.verdict == HOLDS and found.effect == pytest.approx(0.1 * DAMAGE, abs=0.01)
    assert verdict_on("6.masklora.retraining", equal).reason == "no records"
    worse = budgeted(0.3, 1.0e9, **both) + budgeted(0.4, 1.1e9)
    assert verdict_on("6.masklora.reconstruction", worse).verdict == FAILS


def test_combination_with_less_compute_may_win_but_not_lose():
    both = {"then": "masklora", "then_samples": 32}
    win = verdict_on("6.masklora.reconstruction", budgeted(0.5, 1e9, **both) + budgeted(0.4, 5e9))
    lose = verdict_on("6.masklora.reconstruction", budgeted(0.3, 1e9, **both) + budgeted(0.4, 5e9))
    assert win.verdict == HOLDS and "less compute" in win.reason
    assert lose.verdict == UNSURE and "but with less compute" in lose.reason
    more = verdict_on("6.masklora.reconstruction", budgeted(0.5, 9e9, **both) + budgeted(0.4, 5e9))
    assert more.reason == "no records"


# ---- what may be compared with what


def everything(count=3):
    """Records for every kind of claim."""
    records = (
        seeds(0.4, count) + seeds(0.2, count, granularity="matrix") + seeds(0.25, count, granularity="matrix", solver="exact")
    )
    for options in ({"granularity": "block"}, {"propagation": "mixed"}, {"loss": "cosine"}, {"adapter": "masklora"}):
        records += seeds(0.401, count, **options)
    records += seeds(0.39, count, criterion="magnitude", damage=1.2) + seeds(0.4, count, criterion="sparsegpt")
    cost = {"reconstruct": 1e9}
    records += [r for n in (16, 256) for r in seeds(0.4, count, samples=n, prune_samples=64, flops=cost)]
    records += seeds(0.1, count, granularity="none", then="masklora", then_samples=1024, flops={"retrain": 1e9})
    records += seeds(0.6, count, then="masklora", flops=cost)
    records += seeds(0.4, count, model="other-1b") + seeds(0.401, count, model="other-1b", criterion="magnitude")
    return records


@pytest.mark.parametrize("count", [1, 2])
def test_few_seeds_say_nothing_about_noise(count):
    found = {verdict.claim: verdict for verdict in judge(everything(count)) if verdict.records}
    assert {claim.partition(".")[0] for claim in found} == set(claims.GROUPS)
    assert {name for name, verdict in found.items() if verdict.verdict != UNSURE} <= {"1"}
    assert all(f"fewer than 3 seeds ({count})" in verdict.reason for name, verdict in found.items() if name != "8")


def test_three_seeds_decide_the_same_comparisons():
    found = {verdict.claim: verdict.verdict for verdict in judge(everything()) if verdict.model in ("smollm2-135m", "")}
    decided = (
        "1",
        "2.block",
        "3",
        "4",
        "5.masklora.samples.1",
        "6.masklora.reconstruction",
        "7",
        "9.mixed",
        "10",
        "11.masklora",
    )
    assert {name: found[name] for name in decided} == dict.fromkeys(decided, HOLDS)


@pytest.mark.parametrize(
    "other",
    [
        {"samples": 128},
        {"sequence_length": 256},
        {"text": "news"},
        {"evaluation_texts": ("news",)},
        {"evaluation_samples": 8},
        {"evaluation_length": 512},
        {"hash": "other windows"},
        {"pattern": "2:4"},
        {"model": "another"},
        {"revision": "v2"},
        {"swaps": 3},
        {"epochs": 2},
        {"criterion": "magnitude"},
        {"prune_propagation": "dense"},
    ],
    ids=lambda other: "-".join(other),
)
def test_protocols_are_not_mixed(other):
    assert verdict_on("3", seeds() + seeds(0.2, granularity="matrix")).records
    assert verdict_on("3", seeds() + seeds(0.2, granularity="matrix", **other)).reason == "no records"


def test_other_windows_under_the_same_name_are_refused():
    records = seeds() + seeds(0.2, granularity="matrix", text_seed=1)
    with pytest.raises(ReconError, match="records [0-9a-f]{16} and [0-9a-f]{16} state the same model and protocol, but"):
        judge(records)


def test_the_protocol_with_most_records_is_taken_and_printed():
    small = seeds() + seeds(0.2, granularity="matrix")
    large = seeds(samples=128, count=4) + seeds(0.1, granularity="matrix", samples=128, count=4)
    alone = seeds(samples=256, count=9)  # more records, but nothing to compare them with
    found = verdict_on("3", small + large + alone)
    assert found.protocol.startswith("128 x 512 tokens of wikipedia, pruned on 128; perplexity on 40 x 1024 tokens of wikipedia")
    assert sorted(found.records) == sorted(r.key for r in large) and found.protocol in claims.to_markdown([found])


def test_the_same_seeds_are_on_both_sides():
    matrix = [record(0.2, seed=seed, granularity="matrix") for seed in (2, 3, 4, 5)]
    ours = [record(0.4, seed=seed) for seed in (0, 1, 2, 3, 4)]
    found = verdict_on("3", ours + matrix)
    assert found.seeds == 3 and sorted(found.records) == sorted(r.key for r in ours[2:] + matrix[:3])


def test_learning_rates_are_chosen_on_held_out_text_never_on_evaluation_text():
    plain = seeds(0.2)
    tempting = seeds(0.9, adapter="masklora", learning_rate=1e-2, held_out=40.0)
    chosen = seeds(0.5, adapter="masklora", learning_rate=1e-3, held_out=30.0)
    default = seeds(0.4, adapter="masklora", held_out=35.0)
    assert verdict_on("11.masklora", plain + tempting + chosen + default).effect == pytest.approx(0.3, abs=0.01)
    default[0].metrics.pop("held_out_perplexity")  # no longer known for all
    assert verdict_on("11.masklora", plain + tempting + chosen + default).effect == pytest.approx(0.2, abs=0.01)
    # A rate tried with one seed alone is compared on that seed, and the winner keeps its other seeds.
    trial = [record(0.9, adapter="masklora", learning_rate=1e-2, held_out=40.0)]
    found = verdict_on("11.masklora", plain + trial + chosen)
    assert found.seeds == 3 and found.effect == pytest.approx(0.3, abs=0.01)


def test_no_side_is_tuned_where_the_others_are_not():
    """Rates of half-blocks were searched for another claim: here they do not help it against matrices, which had one."""
    matrix, default = seeds(0.2, granularity="matrix"), seeds(0.4, held_out=35.0)
    tuned = seeds(0.5, learning_rate=1e-3, held_out=30.0)
    assert verdict_on("3", matrix + tuned + default).effect == pytest.approx(0.2 * DAMAGE, abs=0.01)
    # Nor do recipes that make more steps.
    pieces = seeds(0.6, pieces=4, held_out=20.0)
    assert verdict_on("3", matrix + pieces + default).effect == pytest.approx(0.2 * DAMAGE, abs=0.01)


def test_two_models_make_no_trend():
    found = verdict_on("8", family((0.3, 0.1), ("a-100m", "b-1b")))
    assert found.verdict == UNSURE and found.effect > 0 and "2 models make no trend" in found.reason


def test_records_older_than_a_field_did_what_its_default_says():
    records = seeds() + seeds(0.2, granularity="matrix")
    new = verdict_on("3", records)
    for found in records:
        for name in ("then", "objective", "adapter", "pieces", "swaps"):
            del found.spec[name]
    assert verdict_on("3", records) == new


def test_options_that_do_nothing_do_not_divide():
    """A half-block run is the same whatever SparseGPT's options, which it does not use, were."""
    matrix = seeds(0.2, granularity="matrix", sparsegpt_damping=0.1, exact_iterations=3, objective="distil", device="cpu")
    assert verdict_on("3", seeds() + matrix).verdict == HOLDS
    assert verdict_on("4", seeds() + seeds(0.2, granularity="matrix", solver="exact", exact_iterations=3)).reason == "no records"


def test_failed_runs_are_left_out_and_diverged_ones_prove_nothing():
    records = seeds() + seeds(0.2, granularity="matrix")
    records.append(RunRecord(records[-1].spec | {"seed": 9}, "f" * 16, "failed", "no"))
    assert verdict_on("3", records).verdict == HOLDS
    records[-2].metrics["by_text"]["wikipedia"]["nll_per_window"]["repaired"][3] = math.nan
    found = verdict_on("3", records)
    assert (
        found.verdict == UNSURE and found.reason == f"not finite: {records[-2].key}" and "nan" not in claims.to_markdown([found])
    )


def test_records_without_windows_are_named():
    [broken] = seeds(count=1)
    del broken.metrics["by_text"]["wikipedia"]["nll_per_window"]["pruned"]
    with pytest.raises(ReconError, match=f"record {broken.key}: no nll_per_window of 'wikipedia'.*pruned"):
        judge([broken])
    broken.metrics["by_text"]["wikipedia"]["nll_per_window"]["pruned"] = [1.0]
    with pytest.raises(ReconError, match=f"record {broken.key}: nll_per_window has"):
        judge([broken])


# ---- intervals


@pytest.mark.parametrize("level", [0.95, 0.90])
@pytest.mark.parametrize("seed_spread, window_spread", [(1.0, 0.3), (0.1, 1.0), (0.5, 3.0)])
@pytest.mark.parametrize("count", [3, 5])
def test_intervals_cover_the_truth(count, seed_spread, window_spread, level):
    """Crossed seed and window effects and noise: the interval holds the true mean about as often as it says, or a bit more often."""
    draw, hits, widths, trials = np.random.default_rng(1), 0, [], 300
    for _ in range(trials):
        values = (
            2.0
            + draw.normal(0, seed_spread, (count, 1))
            + draw.normal(0, window_spread, (1, WINDOWS))
            + draw.normal(0, 0.3, (count, WINDOWS))
        )
        low, high = claims.interval([values[None]], lambda means: means[0], level, 400)
        hits += low <= 2.0 <= high
        widths.append(high - low)
    assert level - 0.04 <= hits / trials <= 1
    # Not by being wide without need: Student's t with the true spread, if only seeds mattered, plus that of windows.
    t = {3: {0.95: 4.303, 0.90: 2.920}, 5: {0.95: 2.776, 0.90: 2.132}}[count][level]
    assert np.mean(widths) < 2 * 1.25 * (
        t * math.sqrt((seed_spread**2 + 0.1) / count) + 2 * math.sqrt(window_spread**2 / WINDOWS)
    )


def test_interval_of_one_seed_is_that_of_windows():
    values = np.random.default_rng(0).normal(5.0, 2.0, (1, 1, 400))
    low, high = claims.interval([values], lambda means: means[0], 0.95, 4000)
    error = 1.96 * values.std() / 20
    assert (low, high) == (pytest.approx(values.mean() - error, abs=0.03), pytest.approx(values.mean() + error, abs=0.03))


def test_interval_may_be_infinite():
    low, high = claims.interval([np.zeros((1, 3, 5))], lambda means: (means[0] - np.inf, means[0] + np.inf))
    assert (low, high) == (-np.inf, np.inf)


def test_judgement_is_quick_and_the_same_every_time():
    patterns = ("0.5", "0.6", "2:4", "4:8")
    records = [
        r
        for pattern in patterns
        for model in ("a-1b", "b-2b")
        for granularity in ("half-block", "block", "matrix", "model")
        for criterion in ("magnitude", "wanda", "sparsegpt")
        for r in seeds(0.4, pattern=pattern, model=model, granularity=granularity, criterion=criterion)
    ]
    began = time.perf_counter()
    first = judge(records)
    assert len(records) == 288 and time.perf_counter() - began < 20
    random.Random(0).shuffle(records)
    assert repr(judge(records)) == repr(first)
    assert repr(judge(records, seed=1)) != repr(first)


# ---- pages


@pytest.fixture
def places(tmp_path):
    """A folder of records, and where the page and the README are."""
    for found in everything():
        write_record(found, tmp_path / "records" / f"{found.key}.json")
    readme = tmp_path / "README.md"
    readme.write_text("# Title\n\n<!-- claims -->\noutdated\n<!-- /claims -->\n\nrest\n", encoding="utf-8")
    return tmp_path / "records", tmp_path / "figures" / "claims.md", readme


def test_pages_are_written_once_and_watched(places):
    records, page, readme = places
    assert len(claims.stale(*places)) == 2
    assert claims.write(*places) == [page, readme] and claims.stale(*places) == []
    assert claims.write(*places) == []
    text = readme.read_text(encoding="utf-8")
    assert text.startswith("# Title\n\n<!-- claims -->\n| claim |") and text.endswith("<!-- /claims -->\n\nrest\n")
    assert "outdated" not in text and "| Half-block equals block | ✓ holds |" in text
    readme.write_text(text.replace("✓ holds", "✗ fails", 1), encoding="utf-8")
    assert [message for message in claims.stale(*places) if str(readme) in message and "python -m recon.claims" in message]
    readme.write_text(text + "A word outside of the section.\n", encoding="utf-8")
    assert claims.stale(*places) == []
    next(records.iterdir()).unlink()
    assert claims.stale(*places)


def test_pages_hold_every_claim_and_say_where_records_lack():
    verdicts = judge(everything())
    page = claims.to_markdown(verdicts)
    for claim in claims.CLAIMS:
        assert (f" {claim.statement} |" in page) == (not claim.optional)
    assert (
        "| ? not enough evidence | Half-block equals quarter | granularity half-block against granularity quarter |  |  |  | no records |  |"
        in page
    )
    nothing = judge([])
    assert {verdict.reason for verdict in nothing} == {"no records"} and {verdict.verdict for verdict in nothing} == {UNSURE}
    assert len(nothing) == sum(not claim.optional for claim in claims.CLAIMS)
    assert claims.to_markdown(nothing) and claims.to_summary(nothing).startswith("No records yet for")


def test_summary_counts_over_models():
    records = everything() + seeds(0.9, model="other-1b", granularity="block")
    line = next(line for line in claims.to_summary(judge(records)).splitlines() if "equals block" in line)
    assert "✓ holds (1 of 2), ✗ does not hold here (1 of 2)" in line and "smollm2-135m, 0.5" in line


def test_no_path_of_this_machine_is_on_the_page(tmp_path):
    text = str(tmp_path / "my.txt")
    options = {"model": str(tmp_path / "my-model"), "text": text, "evaluation_texts": (text,)}
    page = claims.to_markdown(judge(seeds(**options) + seeds(0.2, granularity="matrix", **options)))
    assert str(tmp_path) not in page and "my-model" in page and "tokens of my.txt" in page


def test_readme_without_markers_and_folders_that_do_not_exist_are_refused(places):
    records, page, readme = places
    readme.write_text("# Title\n", encoding="utf-8")
    with pytest.raises(ReconError, match="README.*must hold <!-- claims -->"):
        claims.write(*places)
    assert not page.exists()
    with pytest.raises(ReconError, match="record folder .*nowhere.* does not exist"):
        claims.write(records / "nowhere", page, readme)


def test_command_line(places, capsys):
    records, page, readme = places
    options = ["--records", str(records), "--page", str(page), "--readme", str(readme)]
    assert claims.main(["--check", *options]) == 1 and "is not what the records" in capsys.readouterr().out and not page.exists()
    assert claims.main(options) == 0 and page.exists()
    assert claims.main(["--check", *options]) == 0
    with pytest.raises(SystemExit) as exit:
        claims.main(["--records", str(records / "nowhere")])
    assert exit.value.code == 2 and "recon.claims: record folder" in capsys.readouterr().err


def test_table_for_notebooks():
    verdicts = judge(everything())
    table = claims.show(verdicts, ["2", "3"]).data
    assert [row for row in table["claim"]] == [v.statement for v in verdicts if v.claim.split(".")[0] in ("2", "3")]
    assert len(claims.show(verdicts, "2.block").data) == 1
    assert "✓ holds" in claims.show(verdicts, ["3"]).to_html()
    with pytest.raises(ReconError, match="unknown claim '12'; allowed: 1, 2, "):
        claims.show(verdicts, ["12"])


def test_committed_page_and_readme_are_what_the_committed_records_give():
    assert claims.stale() == []
