"""Claims judged on made-up records whose truth is known; pages and tables of them; the article, in which no number is typed."""

import functools
import json
import math
import re

import numpy as np
import pandas as pd
import pytest
from fixtures.made_up import GAP, everything, record, seeds, verdict_on
from scipy import stats

from companion import article, frame, judge, tables
from companion.judge import FAILS, HOLDS, NOT_RUN, UNSURE
from companion.publish import ROOT


@pytest.mark.parametrize("matrix, verdict", [(0.2, HOLDS), (0.6, FAILS), (0.4, UNSURE)])
def test_better_is_decided_by_the_side_of_zero(matrix, verdict):
    row = verdict_on("3", seeds(0.4) + seeds(matrix, granularity="matrix"))
    assert row["verdict"] == verdict and row["seeds"] == 3
    assert row["effect"] == pytest.approx(GAP * (0.4 - matrix), abs=0.01)
    assert row["low"] < GAP * (0.4 - matrix) < row["high"] and row["unit"] == "nats per token"


@pytest.mark.parametrize("block, noise, verdict", [
    (0.41, 0.002, HOLDS), (0.6, 0.002, FAILS), (0.2, 0.002, FAILS), (0.44, 0.02, UNSURE), (0.4, 0.05, UNSURE),
])  # fmt: skip
def test_equivalence_takes_a_margin_of_the_perplexity_gap(block, noise, verdict):
    row = verdict_on("2.block", seeds(0.4, noise=noise) + seeds(block, noise=noise, granularity="block"))
    assert row["verdict"] == verdict and row["unit"] == "of the perplexity gap" and row["low"] < 0.4 - block < row["high"]
    if noise == 0.002:  # a pattern that does ten times the harm has the same verdict: the margin is relative
        worse = seeds(0.4, gap=8.0, noise=0.02) + seeds(block, gap=8.0, noise=0.02, granularity="block")
        assert verdict_on("2.block", worse)["verdict"] == verdict


def test_nothing_equals_anything_if_pruning_did_no_harm():
    row = verdict_on("2.block", seeds(gap=0.0) + seeds(gap=0.0, granularity="block"))
    assert row["verdict"] == UNSURE and "no harm" in row["reason"] and math.isnan(row["low"])


def test_a_bound_that_two_bootstraps_would_place_on_either_side_of_the_margin_decides_nothing():
    runs = frame.table(seeds(0.42, noise=0.02) + seeds(0.4, noise=0.02, granularity="block"))
    [claim] = [each for each in judge.claims() if each["id"] == "2.block"]
    first = judge.judge(runs, [claim]).iloc[0]
    farthest = max(abs(first["low"]), abs(first["high"]))
    borderline, clear = (judge.judge(runs, [claim | {"margin": margin * farthest}]).iloc[0] for margin in (1.0001, 1.5))
    assert (borderline["verdict"], clear["verdict"]) == (UNSURE, HOLDS) and "borderline" in borderline["reason"]


@pytest.mark.parametrize("count", [1, 2])
def test_few_seeds_say_nothing_about_noise(count):
    rows = judge.judge(frame.table(everything(count))).query("seeds > 0").set_index("claim")
    assert set(rows["group"]) == {*judge.GROUPS} - {"5d"}  # made-up runs have no memory
    assert set(rows.index[rows["verdict"] != UNSURE]) <= {"1.wanda.own", "1.sparsegpt.own", "1.magnitude.own", "8", "8m"}
    assert rows["reason"].drop(["8", "8m"]).str.contains(f"fewer than 3 seeds ({count})", regex=False).all()


def test_three_seeds_decide_and_every_claim_has_a_row_or_says_not_run(verdicts):
    first = verdicts.drop_duplicates("claim").set_index("claim")
    decided = """1.wanda.own 2.block 3 4 5a.masklora.8.own 5b.masklora.32.own 5b.masklora.samples 6.masklora.reconstruction.flops
        7.magnitude 9.mixed.whitened 9.mixed.mse 10.cosine.mixed 10.whitened.mixed 11.masklora""".split()
    assert set(first.loc[decided, "verdict"]) == {HOLDS}
    assert {claim["id"] for claim in judge.claims() if not claim["optional"]} <= set(first.index)
    assert set(verdicts.loc[verdicts["keys"].map(len) == 0, "verdict"]) == {NOT_RUN}


def test_claims_are_well_formed():
    claims = judge.claims()
    assert len({claim["id"] for claim in claims}) == len(claims) and {claim["group"] for claim in claims} == set(judge.GROUPS)
    for claim in claims:
        assert "{" not in repr(claim).replace("{'", "") and claim["test"] in judge.compare.KINDS and judge.comparison(claim)
        assert set(claim["left"]) | set(claim["right"] or {}) <= set(frame.DEFAULTS)


def test_effects_are_judged_on_the_second_text_too_and_counted_once():
    runs = seeds(0.4, other=0.4) + seeds(0.2, granularity="matrix", other=0.6)
    verdicts = judge.judge(frame.table(runs), [claim for claim in judge.claims() if claim["id"] in ("3", "3.other")])
    assert list(verdicts["claim"]) == ["3", "3.other"] and list(verdicts["verdict"]) == [HOLDS, FAILS]
    assert "1 of 1 comparisons are decided (100%): 1 hold, 0 do not." in (said := judge.count_words(verdicts))
    assert "On the second text, 0 of 1 have the same verdict." in said
    assert "second text: ✗ −" in judge.headlines(verdicts) and judge.summary(verdicts).count("(1 of 1)") == 1


def test_the_protocol_with_most_records_is_taken_and_named():
    small = seeds() + seeds(0.2, granularity="matrix")
    large = seeds(samples=128, count=4) + seeds(0.1, granularity="matrix", samples=128, count=4)
    alone = seeds(samples=256, count=9)  # more records, but nothing to compare them with
    row = verdict_on("3", small + large + alone)
    assert row["protocol"].startswith("128 x 512 tokens of wikipedia, mixed propagation") and "48 x 1024" in row["protocol"]
    assert sorted(row["keys"]) == sorted(r["key"] for r in large)


def test_runs_in_different_precisions_are_no_pairs_and_a_seed_counts_once():
    matrices, others = seeds(0.2, granularity="matrix"), [record(0.2, seed=seed, granularity="matrix") for seed in (3, 4, 5)]
    other_machine = [record(0.4, seed=seed) for seed in range(5)]
    for run in (*other_machine[2:], *others):
        run["environment"]["compute_dtype"] = "float32"
    row = verdict_on("3", other_machine + matrices + others)
    # Seeds 0 and 1 ran on one machine, 3 and 4 on the other; at seed 2 the two sides ran on different ones.
    assert row["seeds"] == 4 and "bfloat16 or float32 products" in row["protocol"]
    again = [record(share, compute_dtype="float32", **o) for share, o in ((0.9, {}), (0.1, {"granularity": "matrix"}))]
    for run in again:
        run["environment"]["compute_dtype"] = "float32"
    assert verdict_on("3", seeds() + matrices + again)["seeds"] == 3  # the first of them by name, bfloat16
    assert verdict_on("3", again + seeds() + matrices)["effect"] == verdict_on("3", seeds() + matrices)["effect"]


@pytest.mark.parametrize("count, judged", [(3, {"default"}), (1, {"default", "first-skipped"})])
def test_an_earlier_default_is_judged_until_todays_is(count, judged):
    pairs = [seeds(share, n, granularity=size, first_position=first) for n, first in ((count, "scaled"), (3, "skipped"))
             for share, size in ((0.4, "half-block"), (0.2, "matrix"))]  # fmt: skip
    rows = judge.judge(frame.table([run for each in pairs for run in each]))
    assert set(rows.loc[rows["claim"] == "3", "recipe"]) == judged


def test_failed_runs_are_left_out_and_diverged_ones_prove_nothing():
    records = [*seeds(), *seeds(0.2, granularity="matrix"), {"status": "failed"}]
    assert verdict_on("3", records)["verdict"] == HOLDS
    records[-2]["metrics"]["by_text"]["wikipedia"]["nll_per_window"]["reconstructed"][3] = math.nan
    row = verdict_on("3", records)
    assert row["verdict"] == UNSURE and "diverged" in row["reason"] and judge.effect_words(row) == ""


def test_a_third_text_makes_no_older_protocol_and_another_second_one_does():
    common = article.settings("laptop")["1-granularity"]["common"]
    for texts, older in ((["wikipedia", "news"], False), (["wikipedia", "news", "code"], False), (["wikipedia", "code"], True)):
        runs = pd.DataFrame([common | {"evaluation_texts": tuple(texts)}])
        assert judge._older(runs, {"notebook": "1-granularity"}, "laptop") == older


def test_pages_are_written_between_marks_and_checked(tmp_path):
    places = ["--records", tmp_path / "records", "--page", tmp_path / "figures/claims.md", "--readme", tmp_path / "README.md"]
    arguments = list(map(str, places))
    (tmp_path / "records").mkdir()
    for run in everything():
        (tmp_path / "records" / f"{run['key']}.json").write_text(json.dumps(run))
    for name in ("README.md", "ARTIFACT.md"):
        marks = [f"<!-- {block} -->\nstale words\n<!-- /{block} -->\n" for block in ("answers", "claims")]
        (tmp_path / name).write_text(f"before\n{''.join(marks)}after\n")
    assert judge.main([*arguments, "--check"]) == 1 and not (tmp_path / "figures").exists()
    assert judge.main(arguments) == 0 and judge.main([*arguments, "--check"]) == 0
    for name in ("README.md", "ARTIFACT.md"):
        text = (tmp_path / name).read_text()
        assert text.startswith("before\n") and text.endswith("\nafter\n") and "✓" in text
        assert text.count("stale words") == (name == "ARTIFACT.md")
    page = (tmp_path / "figures/claims.md").read_text()
    assert all(f"## {group}. " in page for group in judge.GROUPS)
    assert "### Table 1" in (tmp_path / "figures/README.md").read_text()
    assert {path.name for path in (tmp_path / "figures/tables").iterdir()} >= {"table-1.md", "table-3.tex", "appendix-b.csv"}


def test_tables_hold_means_over_seeds_and_the_best_in_bold():
    data, used = tables.cells(frame.table(everything()), "table-3")
    cell = data[(data["row"] == "half-block") & (data["column"] == "smollm2-135m, 0.5, default")].iloc[0]
    assert cell["mean"] == pytest.approx(math.exp(3 + GAP * 0.6), rel=0.1) and cell["seeds"] == 3
    texts = tables.texts(frame.table(everything()))
    line = next(line for line in texts["table-3.md"].splitlines() if line.startswith("| block |"))
    assert "**" in line and "(3)" in line and "within about 0.1 of half-block" in line
    assert "**smollm2-135m, 0.5, default**" in texts["table-1.md"] and "| masklora, 512 samples |" in texts["table-1.md"]
    assert r"\textbf{" in texts["table-3.tex"] and texts == tables.texts(frame.table(everything()))


def test_committed_verdicts_are_what_committed_records_give():
    assert judge.main(["--check"]) == 0


SAID = re.compile(r"\{\{.*?\}\}|\]\(.*?\)")  # what records give, and addresses


def test_no_number_is_typed():
    text = SAID.sub("", article.TEMPLATE.read_text(encoding="utf-8")).replace("3BASiL", "")  # a name
    assert not re.findall(r".{0,20}\d.{0,20}", text)
    assert not re.findall(r"\b(?:one|two|three|four|five|ten|hundred)\b (?:of|per cent|times)", text)


@pytest.mark.parametrize("stem", ["9-ladder", "10-open-questions"])
def test_the_article_tells_what_notebooks_have_learnt_without_a_number(stem, tmp_path):
    told = article.told(tmp_path, stem)
    settings = r"^\*\*Experiment\.\*\*.*$"  # what was run, which no record has to tell
    words = re.sub(rf"^\*[A-Z].*not drawn yet.*$|^### .*$|{settings}", "", told, flags=re.MULTILINE)
    assert told.count("### ") == told.count("**Hypothesis.**") == told.count("**Learnt.**") > 4
    assert not re.findall(r".{0,20}\d.{0,20}", words)


@pytest.fixture(scope="module")
def verdicts():
    return judge.worded(judge.judge(frame.table(everything())))


def test_headlines_have_each_answer_in_its_column(verdicts):
    found, places = {}, []
    for line in judge.headlines(verdicts).splitlines():
        statement, *cells = line.removeprefix("| ").removesuffix(" |").split(" | ")
        places = cells if line.startswith("|  |") else places
        found |= {(statement.partition(" (")[0], place): cell for place, cell in zip(places, cells)}
    for claim in ("2.block", "7.magnitude"):
        row = verdicts[(verdicts["claim"] == claim) & (verdicts["pattern"] == "0.5") & (verdicts["recipe"] == "default")].iloc[0]
        cell = found[row["statement"], f"{row['model']}, default"]
        assert cell.startswith(judge.MARKS[row["verdict"]]) and f"{row['effect']:+.3f}".replace("-", "−") in cell


def test_a_central_row_is_of_the_main_pattern_and_there_of_the_default_with_enough_seeds():
    one = [record(0.4), record(0.2, granularity="matrix")]
    old, high = (
        [*seeds(0.4, **own), *seeds(0.2, granularity="matrix", **own)]
        for own in ({"first_position": "skipped"}, {"pattern": "0.7"})
    )
    for records, wanted in ((one + high, ("default", "0.5", 1)), (one + high + old, ("first-skipped", "0.5", 3))):
        found = judge.central(judge.judge(frame.table(records))).query("claim == '3'")
        assert [*zip(found["recipe"], found["pattern"], found["seeds"])] == [wanted]


def test_answers_say_the_verdict_of_each_model_and_link_to_its_row(verdicts):
    said, page = article.answers(verdicts, "2.block", "8"), judge.page(verdicts)
    mine = verdicts[verdicts["claim"] == "2.block"]
    assert all(judge.effect_words(row) in said and row["verdict"] in said for _, row in mine.iterrows())
    headings = {re.sub(r"[^\w -]", "", each).lower().replace(" ", "-") for each in re.findall(r"^## (.*)$", page, re.M)}
    assert set(re.findall(r"claims\.md#([\w-]+)", said)) <= headings


def test_figures_that_are_not_drawn_are_named_with_their_command(verdicts, tmp_path):
    said = article.article(verdicts, pd.DataFrame({"model": ["m"], "dense": ["float32"]}), tmp_path, "counted", "in short")
    parts = "`./run_all.sh laptop 1-granularity` draws it", "m (float32)", "by cost: in short"
    assert all(part in said for part in parts) and "{{" not in said


# Central numbers of the committed verdicts, computed once more from raw records by other code: plain loops and one bootstrap.
RECORDS = ROOT / "results" / "laptop"


@functools.cache
def committed():
    return judge.judge(frame.load(RECORDS), [claim for claim in judge.claims() if claim["id"] in CASES]).query("seeds > 1")


def matrix(row, wanted, state, measure="nll"):
    """Nats (seeds, windows) of the runs of a verdict whose spec has the options `wanted`, by seed."""
    runs = {}
    for key in row["keys"]:
        record = json.loads((RECORDS / f"{key}.json").read_text())
        if all(record["spec"][name] == value for name, value in wanted.items()):
            text = record["metrics"]["by_text"][record["spec"]["evaluation_texts"][0]]
            runs[record["spec"]["seed"]] = text[f"{measure}_per_window"][state]
    return np.array([runs[seed] for seed in sorted(runs)])


def bootstrap(sides, statistic, level, draws=1500):
    """The interval's ends: seeds and windows drawn with replacement, deviations between seeds widened for their small number."""
    seeds, windows = sides[0].shape
    widened = math.sqrt(seeds / (seeds - 1)) * stats.t.ppf((1 + level) / 2, seeds - 1) / stats.norm.ppf((1 + level) / 2)
    random, found = np.random.default_rng(1), []
    for _ in range(draws):
        rows, columns = random.integers(seeds, size=seeds), random.integers(windows, size=windows)
        means = [side[:, columns].mean(1) for side in sides]
        found.append(statistic(*(mean.mean() + widened * (mean[rows].mean() - mean.mean()) for mean in means)))
    return np.quantile(found, [(1 - level) / 2, (1 + level) / 2])


HALF, PLAIN = {"granularity": "half-block", "retrain": "none"}, (lambda mine, theirs: theirs - mine)
BLOCK = {"granularity": "block"}
ENDS = [(HALF, "dense"), (HALF, "pruned"), (BLOCK, "pruned")]  # of the two sides, equal but for the rounding of two machines


def share(mine, theirs, dense, *pruned):
    return (theirs - mine) / (sum(pruned) / 2 - dense)


CASES = {  # claim -> sides (options, state), statistic of their means, level
    "3": ([(HALF, "reconstructed"), ({"granularity": "matrix"}, "reconstructed")], PLAIN, 0.95),
    "2.block": ([(HALF, "reconstructed"), (BLOCK, "reconstructed"), *ENDS], share, 0.90),
    "7.magnitude": (
        [({**HALF, "criterion": name}, state) for state in ("pruned", "reconstructed") for name in ("magnitude", "sparsegpt")],
        lambda before, best, after, other: before - best - (after - other), 0.95,
    ),
}  # fmt: skip


@pytest.mark.parametrize("claim", CASES)
def test_effects_and_intervals_are_those_of_other_code(claim):
    (sides, statistic, level), mine = CASES[claim], committed()[committed()["claim"] == claim]
    row = mine.iloc[0]
    values = [matrix(row, wanted, state) for wanted, state in sides]
    assert len(values[0]) == row["seeds"]
    assert statistic(*(side.mean() for side in values)) == pytest.approx(row["effect"], abs=1e-9)
    ends, width = bootstrap(values, statistic, level), row["high"] - row["low"]
    assert ends == pytest.approx([row["low"], row["high"]], abs=0.1 * width)
