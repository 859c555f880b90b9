"""The notebooks, executed through Papermill at a tiny size."""

import json
from pathlib import Path

import nbformat
import papermill
import pytest

ROOT = Path(__file__).resolve().parents[1]
SMALL = {
    "samples": 6,
    "sequence_length": 32,
    "held_out_samples": 2,
    "evaluation_samples": 2,
    "evaluation_length": 64,
}
SMALL_BENCH = {"samples": 8, "sequence_length": 32, "evaluation_samples": 2, "evaluation_length": 64, "repeats": 1}
PROMISED = {  # parameters, figures, number of run records
    "0-quickstart": ({"new_tokens": 4}, ["quickstart-perplexity", "quickstart-error"], 2),
    "1-granularity": (
        {
            "fits": ["none", "matrix exact", "half-block from exact"],
            "seeds": [0, 1],
            "patterns": ["0.5", "2:4"],
        },
        ["granularity", "granularity-cost"],
        12,
    ),
    "6-cost": ({"sections": ["products", "growth", "profile", "quality"]}, ["cost-quality", "cost-operations", "cost-growth"], 0),
}


def test_every_notebook_is_tried_here():
    assert sorted(PROMISED) == sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("name", PROMISED)
def test_notebook_runs_top_to_bottom_and_leaves_what_it_promises(name, tmp_path, tiny_folder, tiny_text):
    own, figures, runs = PROMISED[name]
    parameters = (
        (SMALL if runs else SMALL_BENCH)
        | own
        | {"model": str(tiny_folder), "text": str(tiny_text), "output": str(tmp_path / "out")}
    )
    if name == "1-granularity":
        parameters["evaluation_texts"] = [str(tiny_text)]
    executed = tmp_path / "executed.ipynb"
    papermill.execute_notebook(
        str(ROOT / "notebooks" / f"{name}.ipynb"),
        str(executed),
        parameters=parameters,
        kernel_name="python3",
        cwd=str(ROOT / "notebooks"),
        progress_bar=False,
    )
    records = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "out/records").glob("*.json")}
    assert len(records) == runs
    assert {record["status"] for record in records.values()} <= {"done"}
    for path in (tmp_path / "out/records/bench").glob("*.json"):
        measured = json.loads(path.read_text())
        records[measured["key"]] = measured
    for figure in figures:
        made = {path.suffix: path for path in (tmp_path / "out/figures").glob(f"{figure}.*")}
        assert sorted(made) == [".csv", ".json", ".pdf", ".png"]
        assert all(path.stat().st_size > 30 for path in made.values())
        provenance = json.loads(made[".json"].read_text())
        assert provenance["records"] and set(provenance["records"]) <= set(records)
    outputs = [output for cell in nbformat.read(executed, 4).cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == len(figures)
