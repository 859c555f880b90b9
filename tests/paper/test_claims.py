"""Claims judged on made-up records whose truth is known, and the pages that come of them."""

import math
import random
import time

import matplotlib.pyplot as plt
import pytest
from fixtures.made_up import DAMAGE, record, seeds, verdict_on

from recon.errors import ReconError
from recon.paper import claims, tables
from recon.paper.claims import judge
from recon.paper.plots.claims import CENTRAL, forest, save
from recon.paper.verdicts import FAILS, HOLDS, NOT_RUN, UNSURE, UNTESTABLE
from recon.study.record import RunRecord
from recon.study.studies import write_record

# ---- verdicts


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


def everything(count=3):
    """Records for every kind of claim."""
    records = (
        seeds(0.4, count) + seeds(0.2, count, granularity="matrix") + seeds(0.25, count, granularity="matrix", solver="exact")
    )
    for options in (
        {"granularity": "block"},
        {"propagation": "dense"},
        {"loss": "mse"},
        {"loss": "cosine"},
        {"propagation": "dense", "loss": "mse"},
        {"adapter": "masklora"},
    ):
        records += seeds(0.401, count, **options)
    records += seeds(0.39, count, criterion="magnitude", damage=1.2) + seeds(0.4, count, criterion="sparsegpt")
    cost = {"reconstruct": 1e9}
    records += [r for n in (8, 32) for r in seeds(0.4, count, samples=n, prune_samples=64, flops=cost)]
    for n, share in ((8, 0.05), (32, 0.1), (512, 0.3)):
        spent = {"retrain": 1e9}
        records += seeds(share, count, granularity="none", retrain="masklora", retrain_samples=n, flops=spent)
    records += seeds(0.6, count, retrain="masklora", flops=cost)
    records += seeds(0.4, count, model="other-1b") + seeds(0.401, count, model="other-1b", criterion="magnitude")
    return records


@pytest.mark.parametrize("count", [1, 2])
def test_few_seeds_say_nothing_about_noise(count):
    found = {verdict.claim: verdict for verdict in judge(everything(count)) if verdict.records}
    assert {claim.partition(".")[0] for claim in found} == set(claims.GROUPS)
    assert {name for name, verdict in found.items() if verdict.verdict != UNSURE} <= {"1.own", "8"}
    assert all(f"fewer than 3 seeds ({count})" in verdict.reason for name, verdict in found.items() if name != "8")


def test_three_seeds_decide_the_same_comparisons():
    found = {verdict.claim: verdict.verdict for verdict in judge(everything()) if verdict.model in ("smollm2-135m", "")}
    decided = (
        "1.own",
        "2.block",
        "3",
        "4",
        "5a.masklora.8.own",
        "5b.masklora.32.own",
        "5b.masklora.samples",
        "6.masklora.reconstruction.flops",
        "7.magnitude",
        "9.mixed.whitened",
        "9.mixed.mse",
        "10.cosine.mixed",
        "10.whitened.mixed",
        "11.masklora",
    )
    assert {name: found[name] for name in decided} == dict.fromkeys(decided, HOLDS)


def test_the_protocol_with_most_records_is_taken_and_printed():
    small = seeds() + seeds(0.2, granularity="matrix")
    large = seeds(samples=128, count=4) + seeds(0.1, granularity="matrix", samples=128, count=4)
    alone = seeds(samples=256, count=9)  # more records, but nothing to compare them with
    found = verdict_on("3", small + large + alone)
    assert found.protocol.startswith(
        "128 x 512 tokens of wikipedia, whole samples, pruned on 128 (dense statistics); perplexity on 40 x 1024 tokens of wikipedia"
    )
    assert sorted(found.records) == sorted(r.key for r in large) and found.protocol in claims.to_markdown([found])


def test_runs_in_different_precisions_are_no_pairs():
    matrices, others = seeds(0.2, granularity="matrix"), [record(0.2, seed=seed, granularity="matrix") for seed in (3, 4, 5)]
    other_machine = [record(0.4, seed=seed) for seed in range(5)]
    for run in (*other_machine[2:], *others):
        run.environment["compute_dtype"] = "float32"
    found = verdict_on("3", other_machine + matrices + others)
    # Seeds 0 and 1 of the one machine, 3 and 4 of the other; at seed 2, both sides are of different ones.
    assert found.seeds == 4 and "bfloat16 or float32 products" in found.protocol


def test_a_seed_in_two_precisions_counts_once():
    ours, theirs = seeds(), seeds(0.2, granularity="matrix")
    again = [
        record(level, seed=0, compute_dtype="float32", **options)
        for level, options in ((0.4, {}), (0.2, {"granularity": "matrix"}))
    ]
    for run in again:
        run.environment["compute_dtype"] = "float32"
    found = verdict_on("3", ours + theirs + again)
    assert found.seeds == len(ours) and not {run.key for run in again} & set(found.records)


def test_failed_runs_are_left_out_and_diverged_ones_prove_nothing():
    records = seeds() + seeds(0.2, granularity="matrix")
    records.append(RunRecord(records[-1].spec | {"seed": 9}, "f" * 16, "failed", "no"))
    assert verdict_on("3", records).verdict == HOLDS
    records[-2].metrics["by_text"]["wikipedia"]["nll_per_window"]["reconstructed"][3] = math.nan
    found = verdict_on("3", records)
    assert (
        found.verdict == UNSURE and found.reason == f"not finite: {records[-2].key}" and "nan" not in claims.to_markdown([found])
    )


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


# ---- the forest


def test_the_forest_has_a_row_per_central_claim_and_model(tmp_path):
    records = everything() + seeds(pattern="2:4")
    verdicts = judge(records)
    fig, drawn, finding = forest(verdicts)
    plt.close(fig)
    assert set(CENTRAL) <= {claim.id for claim in claims.CLAIMS}
    shown = {(v.claim, v.model): v for v in reversed(verdicts) if v.claim in CENTRAL and not math.isnan(v.low)}
    assert {tuple(row) for row in drawn[["claim", "model"]].to_numpy()} == set(shown) and set(drawn["pattern"]) == {"0.5"}
    for row in drawn.itertuples():
        assert (row.effect, row.verdict) == (shown[row.claim, row.model].effect, shown[row.claim, row.model].verdict)
    holds = drawn["verdict"] == HOLDS
    tenfold = drawn["claim"].str.startswith("5b")
    assert 0 < holds[tenfold].sum() < tenfold.sum() and holds[drawn["claim"] == "1.own"].all()
    assert finding.startswith("Holds: recovery, ")
    assert f"Holds in part: retraining on ten times the samples ({holds[tenfold].sum()} of {tenfold.sum()})" in finding
    assert forest(judge([])) is None
    save(verdicts, tmp_path, records)
    assert (tmp_path / "claims.png").is_file()


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
    beside = [readme, readme.with_name("ARTIFACT.md"), readme.with_name("ro-crate-metadata.json")]
    written = [page, *(page.parent / "tables" / name for name in tables.texts(claims.read_records(records))), *beside]
    assert len(claims.stale(*places)) == len(written) > 4
    assert claims.write(*places) == written and claims.stale(*places) == []
    assert claims.write(*places) == []
    text = readme.read_text(encoding="utf-8")
    assert text.startswith("# Title\n\n<!-- claims -->\n| the paper's claim |") and text.endswith("<!-- /claims -->\n\nrest\n")
    assert "outdated" not in text and "| Single matrices are worse | ✓ holds (1 of 1) |" in text
    readme.write_text(text.replace("✓ holds", "✗ fails", 1), encoding="utf-8")
    assert [message for message in claims.stale(*places) if str(readme) in message and "python -m recon.paper.claims" in message]
    readme.write_text(text + "A word outside of the section.\n", encoding="utf-8")
    assert claims.stale(*places) == []
    next(records.iterdir()).unlink()
    assert claims.stale(*places)


def test_pages_hold_every_claim_and_say_where_records_lack():
    verdicts = judge(everything())
    page = claims.to_markdown(verdicts)
    for claim in claims.CLAIMS:
        assert (f" {claim.statement} |" in page) == (not claim.optional)
    assert "| ○ not run | Half-block equals quarter |  |  |  |  |" in page
    nothing = judge([])
    assert {verdict.reason for verdict in nothing} == {"no records"} and {verdict.verdict for verdict in nothing} == {NOT_RUN}
    assert len(nothing) == sum(not claim.optional for claim in claims.CLAIMS)
    assert claims.to_markdown(nothing) and claims.to_summary(nothing).startswith(
        "Comparisons that were not run: 3 of *reconstruction recovers quality*; "
    )


def test_of_protocols_with_as_many_seeds_that_of_the_largest_study_is_taken():
    others = [r for count in (8, 128) for r in seeds(0.9, samples=count, prune_samples=64)]
    found = verdict_on("1.own", [*others, *seeds(0.4), *seeds(0.2, granularity="matrix")])
    assert found.effect == pytest.approx(0.4 * DAMAGE, abs=0.01) and found.protocol.startswith("64 x ")


def test_the_readme_leaves_out_what_the_paper_does_not_centre_on(places):
    records, page, readme = places
    for run in seeds(0.1, granularity="none", retrain="lora", flops={"retrain": 1e9}):
        write_record(run, records / f"{run.key}.json")
    claims.write(*places)
    assert "| LoRA needs more than 10 times" in page.read_text()
    assert "LoRA" not in readme.read_text().replace("MaskLoRA", "")


def test_summary_counts_over_models_and_patterns():
    records = everything() + seeds(0.9, model="other-1b", granularity="block") + seeds(0.2, pattern="2:4", granularity="matrix")
    lines = claims.to_summary(judge(records)).splitlines()
    line = next(line for line in lines if "hardly matters" in line)
    assert "✓ holds (1 of 2), ✗ does not hold here (1 of 2)" in line and "smollm2-135m, 0.5, 3 seeds" in line
    # The page has a row for each model, and its other patterns in it.
    page = claims.to_markdown(judge(records + seeds(pattern="2:4")))
    [row] = [
        line for line in page.splitlines() if line.startswith("| ✓ holds | Half-block is better than single matrices (AdamW)")
    ]
    assert row.endswith("| ✓ 2:4 |")


def test_verdicts_are_counted():
    others = (
        seeds(0.395, granularity="matrix", noise=0.02, pattern="2:4") + seeds(pattern="2:4") + seeds(0.9, granularity="model")
    )
    verdicts = judge(everything() + others)
    judged = [verdict for verdict in verdicts if verdict.records]
    counts = {state: sum(v.verdict == state for v in judged) for state in (HOLDS, FAILS, UNSURE, UNTESTABLE)}
    decided = counts[HOLDS] + counts[FAILS]
    assert all(counts.values())
    page = claims.to_markdown(verdicts)
    assert f"{decided} of {decided + counts[UNSURE]} comparisons are decided" in page
    assert f" {len(verdicts) - len(judged)} more were not run." in page


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
    assert exit.value.code == 2 and "recon.paper.claims: record folder" in capsys.readouterr().err


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
