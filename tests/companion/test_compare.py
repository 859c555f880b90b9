"""Intervals; which made-up records enter a comparison, and its effect, as the verdict on a claim says."""

import math

import numpy as np
import pytest
from fixtures.made_up import GAP, record, seeds, verdict_on

from companion import compare, frame
from companion.compare import MARGIN, interval
from companion.frame import SEARCH
from companion.judge import FAILS, HOLDS, UNSURE, UNTESTABLE, effect_words

COUNTS = (16, 32, 64, 128)


@pytest.mark.parametrize("level", [0.95, 0.90])
@pytest.mark.parametrize("seed_spread, window_spread", [(1.0, 0.3), (0.1, 1.0), (0.5, 3.0)])
@pytest.mark.parametrize("count", [3, 5])
def test_intervals_cover_the_truth(count, seed_spread, window_spread, level):
    """With crossed seed and window effects and noise, the interval holds the true mean at least about as often as it says."""
    draw, hits, widths, trials = np.random.default_rng(1), 0, [], 300
    for _ in range(trials):
        noise = ((seed_spread, (count, 1)), (window_spread, (1, 30)), (0.3, (count, 30)))
        values = 2.0 + sum(draw.normal(0, spread, shape) for spread, shape in noise)
        low, high = interval([values[None]], lambda means: means[0], level, 400)
        hits += low <= 2.0 <= high
        widths.append(high - low)
    assert level - 0.04 <= hits / trials <= 1
    # It is not too wide: at most about Student's t with the true spread of seeds, plus the spread of windows.
    t = {3: {0.95: 4.303, 0.90: 2.920}, 5: {0.95: 2.776, 0.90: 2.132}}[count][level]
    assert np.mean(widths) < 2 * 1.25 * (t * math.sqrt((seed_spread**2 + 0.1) / count) + 2 * math.sqrt(window_spread**2 / 30))


def test_interval_of_one_seed_is_that_of_windows():
    values = np.random.default_rng(0).normal(5.0, 2.0, (1, 1, 400))
    low, high = interval([values], lambda means: means[0], 0.95, 4000)
    error = 1.96 * values.std() / 20
    assert (low, high) == (pytest.approx(values.mean() - error, abs=0.03), pytest.approx(values.mean() + error, abs=0.03))


OTHER_PROTOCOLS = {
    "samples": 128, "sequence_length": 256, "text": "news", "evaluation_texts": ("news",), "evaluation_samples": 8,
    "evaluation_length": 512, "kl_windows": 3, "evaluation_protocol": "joined", "hash": "other windows", "pattern": "2:4",
    "model": "another", "revision": "v2", "mask_refinement": 3, "epochs": 2, "rate": "absolute", "criterion": "magnitude",
    "statistics": "sparse",
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER_PROTOCOLS)
def test_protocols_are_not_mixed(name):
    assert verdict_on("3", seeds() + seeds(0.2, granularity="matrix"))["keys"]
    other = seeds(0.2, granularity="matrix", **{name: OTHER_PROTOCOLS[name]})
    assert verdict_on("3", seeds() + other)["reason"] == "no records"


def test_the_same_seeds_are_on_both_sides_and_no_run_of_a_search():
    matrix = [record(0.2, seed=seed, granularity="matrix") for seed in (2, 3, 4, 5)]
    ours = [record(0.4, seed=seed) for seed in (0, 1, 2, 3, 4)]
    searches = [record(0.9, seed=SEARCH + n, **o) for n in range(5) for o in ({}, {"granularity": "matrix"})]
    row = verdict_on("3", ours + matrix + searches)
    assert row["seeds"] == 3 and sorted(row["keys"]) == sorted(r["key"] for r in ours[2:] + matrix[:3])
    assert row.equals(verdict_on("3", ours + matrix))


def test_learning_rates_are_chosen_on_held_out_text_never_on_evaluation_text():
    plain = seeds(0.2)
    tempting = seeds(0.9, adapter="masklora", learning_rate=3e-2, held_out=40.0)
    chosen = seeds(0.5, adapter="masklora", learning_rate=3e-3, held_out=30.0)
    default = seeds(0.4, adapter="masklora", held_out=35.0)
    assert verdict_on("11.masklora", plain + tempting + chosen + default)["effect"] == pytest.approx(0.3, abs=0.01)
    # The mean over seeds decides, not the best of them.
    luck = {"adapter": "masklora", "learning_rate": 3e-1}
    lucky = [record(0.8, seed=seed, held_out=held, **luck) for seed, held in enumerate((20, 60, 60))]
    assert verdict_on("11.masklora", plain + lucky + chosen + default)["effect"] == pytest.approx(0.3, abs=0.01)
    # A rate tried with one seed alone is compared on that seed, and the winner keeps its other seeds.
    trial = [record(0.9, adapter="masklora", learning_rate=3e-2, held_out=40.0)]
    row = verdict_on("11.masklora", plain + trial + chosen)
    assert row["seeds"] == 3 and row["effect"] == pytest.approx(0.3, abs=0.01)


def test_no_side_is_tuned_if_the_others_are_not():
    """Rates of half-blocks were searched for another claim: here they do not help against matrices, which had one rate."""
    matrix, default = seeds(0.2, granularity="matrix"), seeds(0.4, held_out=35.0)
    tuned, chunks = seeds(0.5, learning_rate=3e-3, held_out=30.0), seeds(0.6, chunks=64, held_out=20.0)
    for other in (tuned, chunks, seeds(0.4, warmup=0.0)):  # nor do recipes that make more steps; warm-up is a choice as any
        assert verdict_on("3", matrix + other + default)["effect"] == pytest.approx(0.2 * GAP, abs=0.01)
    # Not even if rates were chosen on every side.
    adapters = seeds(0.5, adapter="masklora", held_out=30.0)
    assert verdict_on("11.masklora", adapters + chunks + default + tuned)["effect"] == pytest.approx(0.0, abs=0.01)


def test_records_older_than_a_field_did_what_its_default_says():
    records = seeds() + seeds(0.2, granularity="matrix")
    new = verdict_on("3", records)
    for run in records:
        for name in ("retrain", "retrain_objective", "adapter", "mask_refinement"):
            del run["spec"][name]
    assert verdict_on("3", records).equals(new)


def test_options_that_do_nothing_do_not_divide():
    """A half-block run does not depend on SparseGPT's options: it does not use them."""
    matrix = seeds(0.2, granularity="matrix", sparsegpt_damping=0.1, exact_iterations=3, retrain_objective="distil", device="cpu")
    assert verdict_on("3", seeds() + matrix)["verdict"] == HOLDS
    exact = seeds(0.2, granularity="matrix", solver="exact", exact_iterations=3)
    assert verdict_on("4", seeds() + exact)["reason"] == "no records"


def test_reconstruction_is_compared_with_its_own_pruned_model_by_measures_that_records_have():
    assert verdict_on("1.wanda.kl", seeds())["reason"] == "no records"
    assert verdict_on("1.wanda.kl", seeds(kl=0.3))["effect"] == pytest.approx(0.3 * GAP, abs=0.01)
    assert verdict_on("1.wanda.other", seeds(0.4, other=0.2))["effect"] == pytest.approx(0.2 * GAP, abs=0.01)


@pytest.mark.parametrize("gap_after, verdict", [(0.02, HOLDS), (0.3, FAILS), (0.1, UNSURE)])
def test_gap_between_two_criteria(gap_after, verdict):
    """Models pruned by magnitude are 0.1 nats worse than by SparseGPT, and `gap_after` once reconstructed."""
    records = []
    for criterion, step in (("magnitude", 1), ("sparsegpt", 0)):
        gap = GAP + 0.1 * step
        records += seeds(1 - (0.4 + gap_after * step) / gap, gap=gap, criterion=criterion)
    row = verdict_on("7.magnitude", records)
    assert row["verdict"] == verdict and row["effect"] == pytest.approx(0.1 - gap_after, abs=0.01)
    assert "gap 0.100 before" in row["reason"]
    left = float(row["reason"].split("after, ")[1].split("%")[0]) / 100
    assert left == pytest.approx(gap_after / 0.1, abs=0.1)
    assert verdict_on("7.wanda", records)["reason"] == "no records"


def family(gaps, names=("a-100m", "a-0.4b", "a-1.6B"), **common):
    records = []
    for (model, gap), text_seed in zip(zip(names, gaps), range(9)):
        for criterion, step in (("magnitude", 1), ("wanda", 0), ("sparsegpt", 0)):
            options = common | {"model": model, "text_seed": text_seed, "hash": model}  # every tokenizer has its own windows
            records += seeds(0.5 - gap * step / GAP, criterion=criterion, **options)
    return records


@pytest.mark.parametrize("gaps, verdict", [((0.3, 0.2, 0.1), HOLDS), ((0.1, 0.2, 0.3), FAILS), ((0.2, 0.2, 0.2), UNSURE)])
def test_gap_against_model_size(gaps, verdict):
    records = family(gaps)
    row = verdict_on("8", records)
    assert row["verdict"] == verdict and row["model"] == "3 sizes from 100,000,000 to 1,600,000,000 parameters"
    decades = math.log10(4)  # from model to model
    assert row["effect"] == pytest.approx((gaps[0] - gaps[1]) / decades, abs=0.02) and "tenfold" in row["unit"]
    again = verdict_on("8", list(reversed(records)))
    assert (again.effect, again.low, again.high) == (row["effect"], row["low"], row["high"])


@pytest.mark.parametrize("names", [("a-100m", "a-1b"), ("a-100m", "b-0.4b", "c-1.6B"), ("a-100m", "a-0.4b", "b-1.6B")])
def test_models_of_several_families_make_no_trend(names):
    row = verdict_on("8", family((0.3, 0.2, 0.1)[: len(names)], names))
    assert row["verdict"] == UNTESTABLE and "it takes 3 models of one family" in row["reason"]
    assert verdict_on("8", family((0.3, 0.2, 0.1), ("x", "y", "z")))["reason"] == "no records"  # whose names state no size


def test_sizes_as_far_apart_as_it_says_decide_a_trend():
    """The slope stays, and so does the noise: only sizes lie further apart."""

    def trend(times):
        names = [f"a-{1e3 * 2 ** (step * times):.0f}m" for step in range(6)]
        return verdict_on("8", family([0.5 - 0.005 * step * times for step in range(6)], names, noise=0.02))

    row = trend(1)
    times = float(row["reason"].split("over about ")[1].split()[0])
    assert row["verdict"] == UNSURE and 1 < times < 10
    assert trend(0.5 * times)["verdict"] == UNSURE and trend(2 * times)["verdict"] == HOLDS


def test_what_models_leave_of_a_straight_line_widens_a_trend():
    powers = range(1, 7)
    line = [0.8 - 0.1 * power for power in powers]
    off = [gap + 0.2 * (-1) ** power for power, gap in zip(powers, line)]
    straight, crooked = (verdict_on("8", family(gaps, [f"a-{10**power}m" for power in powers])) for gaps in (line, off))
    assert straight["verdict"] == HOLDS and crooked["verdict"] == UNSURE
    assert crooked["effect"] == pytest.approx(-np.polyfit(powers, np.abs(off), 1)[0], abs=0.02)


def test_parameters_by_name():
    sizes = {"smollm2-135m": 135e6, "meta-llama/Llama-3.1-8B": 8e9, "Qwen/Qwen2.5-0.5B-Instruct": 5e8, "gemma-3-270m-it": 27e7}
    assert {name: compare.parameters(name) for name in sizes} == sizes
    assert [compare.parameters(name) for name in ("gpt2", "phi-2", "opt-125@8b")] == [None] * 3
    assert [compare.family(name) for name in sizes] == ["smollm2", "llama-3", "qwen2", "gemma-3"]


def curve(best, counts, noise=0.0005, flops=None, **options):
    """Three seeds at each count; `best` recovered at 128, 0.08 less per halving."""
    return [
        record(best - 0.08 * (7 - math.log2(n)), seed=s, noise=noise, flops=flops and flops(n), **options, **spec)
        for n in counts
        for spec in [{"samples": 64, "retrain_samples": n} if "retrain" in options else {"samples": n, "prune_samples": 64}]
        for s in range(3)
    ]


@pytest.mark.parametrize("doublings, verdict", [(5, HOLDS), (2, FAILS), (-1, FAILS)])
def test_ratio_of_samples_at_equal_quality_by_points_with_enough_seeds(doublings, verdict):
    counts, other = [2**power for power in range(2, 15)], {"granularity": "none", "retrain": "masklora"}
    records = [*curve(0.5, COUNTS), *curve(0.5 - 0.08 * doublings, counts, **other), record(0.9, retrain_samples=3000, **other)]
    row = verdict_on("5b.masklora.samples", records)
    assert row["verdict"] == verdict and row["seeds"] == 3
    assert row["low"] < 2.0**doublings < row["high"] and row["effect"] == pytest.approx(2.0**doublings, rel=0.05)
    assert row["bound"] == "" and row["high"] / row["low"] < 1.2


def test_ratio_of_compute_in_which_more_passes_are_another_method_and_no_tuning():
    """A slightly better recipe at ten times the cost must not stand for the cost of the method."""
    other, counts = {"granularity": "none", "retrain": "masklora"}, (8, *COUNTS, 256)
    records = curve(0.5, COUNTS, flops=lambda n: {"prune": 1e9, "reconstruct": 3e9 * n}, held_out=30)
    records += curve(0.5, counts, flops=lambda n: {"prune": 1e9, "retrain": 6e9 * n}, held_out=30, **other)
    records += curve(0.51, counts, flops=lambda n: {"retrain": 6e10 * n}, held_out=29, retrain_epochs=10, **other)
    row = verdict_on("5b.masklora.flops", records)
    assert row["verdict"] == FAILS and row["effect"] == pytest.approx(2.0, rel=0.05) and row["low"] < 2 < row["high"]
    assert verdict_on("5b.masklora.samples", records)["effect"] == pytest.approx(1.0, rel=0.05)


def test_ratio_of_which_only_a_bound_is_known():
    """Retraining never reaches the quality, or is better from its first run on: its largest or smallest run gives the bound."""
    records = curve(0.9, COUNTS) + curve(0.1, [128, 1024], granularity="none", retrain="masklora")
    row, bound = verdict_on("5b.masklora.samples", records), pytest.approx(1024 / math.sqrt(32 * 64))  # median of four counts
    assert (row["bound"], row["low"], row["effect"], row["high"], row["verdict"]) == (">", bound, bound, math.inf, HOLDS)
    assert "128: > 8" in row["reason"] and "> 22.6 [22.6, ∞]" in effect_words(row)
    # With fewer samples tried, the bound is too low to say that it is ten times: that is no evidence against it either.
    few = [r for r in records if r["spec"]["retrain_samples"] != 1024]
    assert verdict_on("5b.masklora.samples", few)["verdict"] == UNSURE
    records = curve(0.3, COUNTS) + curve(0.9, [32, 128], granularity="none", retrain="masklora")
    row, bound = verdict_on("5b.masklora.samples", records), pytest.approx(32 / math.sqrt(32 * 64))
    assert (row["bound"], row["low"], row["effect"], row["verdict"]) == ("<", 0.0, bound, FAILS)


def test_combination_is_compared_at_equal_compute_or_with_less_which_may_win_but_not_lose():
    def budgeted(recovered, flops, **spec):
        return seeds(recovered, flops={"prune": 1e12, "reconstruct": flops / 2, "retrain": flops / 2}, **spec)

    def on(claim, recovered, flops, *alone):
        return verdict_on(claim, sum(alone, budgeted(recovered, flops, retrain="masklora", retrain_samples=32)))

    claim, equal, costly = "6.masklora.reconstruction.flops", budgeted(0.4, 1.1e9), budgeted(0.4, 5e9)
    row = on(claim, 0.5, 1e9, equal, budgeted(0.9, 9e9, samples=512))
    assert row["verdict"] == HOLDS and row["effect"] == pytest.approx(0.1 * GAP, abs=0.01)
    assert on("6.masklora.retraining.flops", 0.5, 1e9, equal)["reason"] == "no records"
    assert on(claim, 0.3, 1e9, equal)["verdict"] == FAILS
    win, lose, more = (on(claim, recovered, flops, costly) for recovered, flops in ((0.5, 1e9), (0.3, 1e9), (0.5, 9e9)))
    assert win["verdict"] == HOLDS and "0.20 times the FLOPs" in win["reason"]
    assert lose["verdict"] == UNSURE and "but with less compute" in lose["reason"]
    assert more["reason"] == "no records"


def test_memory_is_compared_at_equal_samples_and_compute_at_the_nearest():
    def taking(gib, flops, count, **spec):
        more = {
            "added_memory_bytes_by_phase": {"retrain": gib * 2**30},
            "flops": {"reconstruct": flops / 2, "retrain": flops / 2},
        }
        return [each | more for each in seeds(0.4, samples=count, prune_samples=64, **spec)]

    retraining = {"granularity": "none", "retrain": "masklora"}
    records = taking(0.5, 5e9, 8) + taking(1, 20e9, 32) + taking(4, 80e9, 128)
    records += taking(3, 8e9, 8, **retraining) + taking(4, 10e9, 32, **retraining) + taking(4, 60e9, 512, **retraining)
    row, compute = verdict_on("5d.masklora", records), verdict_on("5c.masklora.own", records)
    assert row["effect"] == pytest.approx(4) and row["note"] == "1.00 GiB against 4.00 GiB; samples: 32"
    assert compute["note"] == "0.62 times the FLOPs; samples: 8 against 8"


def test_samples_are_compared_count_by_count():
    """Retraining with as many samples is worse, and with sixteen times as many better."""
    other = {"granularity": "none", "retrain": "masklora", "samples": 64}
    records = seeds(0.4, samples=8, prune_samples=64, kl=0.6, other=0.5)
    for count, share in ((4, 0.1), (8, 0.3), (64, 0.9), (128, 0.5), (512, 0.7)):
        records += seeds(share, retrain_samples=count, prune_samples=64, kl=share, other=share, **other)
    same, tenfold = (verdict_on(f"{group}.masklora.8.own", records) for group in ("5a", "5b"))
    assert same["verdict"] == HOLDS and same["effect"] == pytest.approx(0.1, abs=0.01)  # of the perplexity gap
    assert tenfold["verdict"] == FAILS and tenfold["effect"] == pytest.approx(-0.1, abs=0.01)  # 128: the fewest that suffice
    assert "8 samples against 128" in tenfold["reason"] and "moves the dense" not in tenfold["reason"]
    # By the divergence from the dense model it is the other way round.
    assert verdict_on("5b.masklora.8.kl", records)["effect"] == pytest.approx(0.1, abs=0.01)
    assert verdict_on("5b.masklora.8.other", records)["verdict"] == HOLDS  # on both sides half of it
    assert verdict_on("5a.masklora.32.own", records)["reason"] == "no records"
    # The reason says how the same retraining moves the dense model.
    records += seeds(1.05, retrain_samples=128, prune_samples=64, criterion="none", **other)
    moved = float(verdict_on("5b.masklora.8.own", records)["reason"].split("moves the dense model by ")[1].split()[0])
    assert moved == pytest.approx(-0.05 * GAP, abs=0.01)


def test_as_good_is_not_worse_by_more_than_the_margin():
    def compared(recovered):
        retrained = seeds(0.4, granularity="none", retrain="masklora", samples=64, retrain_samples=8, prune_samples=64)
        return verdict_on("5a.masklora.8.own", retrained + seeds(recovered, samples=8, prune_samples=64))

    worse, little_worse, better = (compared(0.4 + MARGIN * times) for times in (-2, -0.5, 1))
    assert (worse["verdict"], little_worse["verdict"], better["verdict"]) == (FAILS, HOLDS, HOLDS)
    assert "90 % interval above -0.05 of the perplexity gap" in little_worse["reason"]
    assert "above 0" in better["reason"] and "above 0" not in little_worse["reason"]


def test_as_many_seeds_as_it_says_decide():
    """Undecided with three seeds; with the number that it asks for, decided most of the time."""
    row = verdict_on("3", seeds(0.4, noise=0.02) + seeds(0.37, noise=0.02, granularity="matrix"))
    assert row["verdict"] == UNSURE
    needed = int(row["reason"].split("it would take about ")[1].split()[0])
    assert needed > 3
    more = [seeds(share, 2 * needed, noise=0.02, **o) for share, o in ((0.4, {}), (0.37, {"granularity": "matrix"}))]
    assert verdict_on("3", sum(more, []))["verdict"] == HOLDS


def test_a_third_text_is_not_taken_for_the_divergence():
    made = record(0.4, other=0.3)
    made["metrics"]["by_text"]["a third"] = made["metrics"]["by_text"]["another text"]
    made["spec"]["evaluation_texts"].append("a third")
    row = frame.table([made]).iloc[0]
    assert len(row["other_pruned"]) and np.isnan(row["kl_pruned"])
