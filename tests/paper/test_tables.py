"""The paper's tables from made-up records whose truth is known, and from the committed ones by other code."""

import csv
import io
import json
import math
import re
import statistics
from pathlib import Path

import pytest
from fixtures.made_up import DAMAGE, seeds

from recon.paper import tables

ROOT = Path(__file__).resolve().parents[2]


def studies():
    records = seeds(0.4) + seeds(0.1, granularity="matrix") + seeds(0.42, granularity="block", count=1)
    records += seeds(0.2, granularity="none", retrain="masklora", retrain_samples=8)
    records += seeds(0.3, criterion="magnitude", damage=2.0) + seeds(0.41, propagation="dense", loss="mse")
    return records + seeds(0.5, pattern="2:4") + seeds(0.3, model="other-1b")


def test_cells_are_mean_spread_and_seeds_of_the_runs_they_name():
    records = studies()
    found = {table.name: table for table in tables.make(records)}
    assert list(found) == ["table-1", "table-3", "table-4", "appendix-b"]
    cells = found["table-3"].values.set_index(["row", "column"])
    half = seeds(0.4)
    perplexities = [math.exp(statistics.mean(r.metrics["by_text"]["wikipedia"]["nll_per_window"]["reconstructed"])) for r in half]
    cell = cells.loc[("half-block", "smollm2-135m, 0.5")]
    assert (cell["mean"], cell["std"], cell["seeds"]) == (
        pytest.approx(statistics.mean(perplexities)),
        pytest.approx(statistics.stdev(perplexities)),
        3,
    )
    dense, pruned = (cells.loc[(name, "smollm2-135m, 2:4")]["mean"] for name in ("dense", "pruned"))
    assert math.log(pruned / dense) == pytest.approx(DAMAGE, abs=1e-6)
    assert "other-1b, 0.5" in found["table-4"].columns and "smollm2-135m, 2:4" in found["table-4"].columns
    assert "8 samples, perplexity" in found["table-1"].columns


def test_the_best_is_bold_and_what_was_not_read_is_said():
    page = tables.texts(studies())
    rows = {line.split("|")[1].strip(): line for line in page["table-3.md"].splitlines() if line.startswith("| ")}
    assert list(rows)[1:] == ["---", "dense", "pruned", "matrix", "half-block", "block"]
    assert "**" not in rows["dense"] + rows["pruned"] + rows["matrix"]
    assert re.search(r"\*\*[\d.]+ \(1\)\*\*", rows["block"])  # one seed has no spread
    assert rows["matrix"].endswith("| not read |") and rows["half-block"].count("±") == 3
    assert page["table-3.tex"].count("\\textbf") == page["table-3.md"].count("**") // 2
    for text in page.values():
        assert "nan" not in text
    columns = list(csv.DictReader(io.StringIO(page["table-1.csv"])))
    assert {row["row"] for row in columns} == {"reconstruction", "masklora"}


def test_the_same_records_give_the_same_bytes():
    records = studies()
    assert tables.texts(records) == tables.texts(records[::-1])
    assert tables.texts([]) == {}


def test_committed_numbers_by_other_code():
    """Three central cells of the committed tables, from the JSON files of the committed records and nothing else."""
    folder = ROOT / "figures" / "tables"
    records = [json.loads(path.read_text(encoding="utf-8")) for path in (ROOT / "results" / "laptop").glob("*.json")]
    records = [record for record in records if "spec" in record]
    assert records
    plain = {"model": "smollm2-135m", "pattern": "0.5", "criterion": "wanda", "propagation": "mixed", "loss": "whitened"}
    plain |= {
        "retrain": "none",
        "adapter": "none",
        "start": "pruned",
        "solver": "adamw",
        "text": "wikipedia",
        "train": "matrices",
    }
    plain |= {"learning_rate": 0.01, "epochs": 0, "batch_size": 1, "samples": 32, "mask_refinement": 0, "chunks": 1}
    with open(folder / "table-3.csv", encoding="utf-8") as file:
        cells = {row["row"]: row for row in csv.DictReader(file) if row["column"] == "smollm2-135m, 0.5"}
    statistic = {record["spec"]["statistics"] for record in records}
    checked = 0
    for granularity in ("half-block", "block", "8-blocks"):
        choices = []
        for kind in statistic:
            wanted = plain | {"granularity": granularity, "statistics": kind}
            mine = [r for r in records if all(r["spec"].get(name) == value for name, value in wanted.items())]
            # A seed in two precisions counts once, in bfloat16.
            mine.sort(key=lambda r: r["environment"]["compute_dtype"], reverse=True)
            mine = {r["spec"]["seed"]: r for r in mine}
            nll = [r["metrics"]["by_text"]["wikipedia"]["nll_per_window"]["reconstructed"] for r in mine.values()]
            if nll:
                found = [math.exp(sum(windows) / len(windows)) for windows in nll]
                choices.append((sum(found) / len(found), len(found)))
        cell = cells[granularity]
        assert any(
            float(cell["mean"]) == pytest.approx(mean, rel=1e-5) and int(cell["seeds"]) == count for mean, count in choices
        )
        checked += 1
    assert checked == 3


def test_a_table_is_of_the_protocol_that_fills_most_of_it():
    one = seeds(0.4, 5, samples=64)  # more runs, but of one criterion
    all_three = [record for name in ("magnitude", "wanda", "sparsegpt") for record in seeds(0.3, 1, samples=32, criterion=name)]
    [table] = [table for table in tables.make(one + all_three) if table.name == "table-4"]
    assert {"magnitude, reconstructed", "sparsegpt, reconstructed"} <= set(table.values["row"])
    assert "32 x 512 tokens" in table.caption and "64 x" not in table.caption
