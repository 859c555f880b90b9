"""The notebooks: their parameters, and executed through Papermill at a tiny size."""

import ast
import itertools
import json
import re
from pathlib import Path

import nbformat
import papermill
import pytest
from fixtures import made_up

from recon.paper import runner
from recon.study.studies import write_record

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SMALL = {
    "samples": 6,
    "epochs": 1,
    "sequence_length": 32,
    "held_out_samples": 2,
    "evaluation_samples": 2,
    "evaluation_length": 64,
}
FEW_STEPS = {"chunks": 1, "retrain_epochs": 1}
SMALL_BENCH = {"samples": 8, "sequence_length": 32, "evaluation_samples": 2, "evaluation_length": 64, "repeats": 1}
PROMISED = {  # parameters, figures, number of run records
    "0-quickstart": (
        SMALL | {"new_tokens": 4, "by_hand": "smollm2-135m"},
        ["quickstart-perplexity", "quickstart-error", "method"],
        1,
    ),
    "1-granularity": (
        {
            "fits": ["none", "matrix exact", "half-block"],
            "seeds": [0, 1],
            "more_patterns": ["2:4"],
            "more_fits": ["none", "half-block"],
            "more_seeds": [2],
        },
        ["granularity", "granularity-difference", "granularity-all"],
        8,
    ),
    "2-sample-efficiency": (
        {
            "counts": [4, 6],
            "retrain_counts": [4],
            "more_counts": [4],
            "methods": ["masklora"],
            "more_methods": ["lora"],
            "distilled": [],
            "rates": [3e-3, 1e-2],
        },
        ["learning-rates", "sample-efficiency", "sample-efficiency-pareto"],
        2 * 2 + 2 + 2 + 1 + 1 + 1,
    ),
    "3-criterion-convergence": ({"criteria": ["magnitude", "wanda"]}, ["criteria", "criteria-gap"], 4),
    "4-propagation-and-loss": (
        {"propagations": ["dense", "mixed"], "losses": ["whitened", "mse"]},
        ["propagation", "propagation-drift"],
        5,
    ),
    "5-what-reviewers-asked": (
        {
            "texts": [],
            "adapters": ["none", "masklora"],
            "adapter_rates": [1e-2, 3e-2],
            "fits": ["matrix", "half-block"],
        },
        ["asked", "loss-curves", "costs", "error-accumulation"],
        3 + 2 + 4 + 3,
    ),
}


def test_every_notebook_is_tried_here():
    assert set(PROMISED) <= {path.stem for path in NOTEBOOKS}


def execute(name: str, folder: Path, parameters: dict) -> Path:
    """Runs a notebook; returns the executed copy, in `folder`."""
    executed, notebooks = folder / "executed.ipynb", ROOT / "notebooks"
    papermill.execute_notebook(
        str(notebooks / f"{name}.ipynb"), str(executed), parameters, kernel_name="python3", cwd=str(notebooks), progress_bar=False
    )
    return executed


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in ("6-cost", "7-scale") else n for n in PROMISED])
def test_notebook_runs_top_to_bottom_and_leaves_what_it_promises(name, tmp_path, tiny_folder, tiny_text):
    own, figures, runs = PROMISED[name]
    places = {"model": tiny_folder, "text": tiny_text}
    parameters = own | {"output": str(tmp_path / "out")}
    if "samples" in own:
        parameters |= places
    if name.startswith("6"):
        parameters |= {"recipe_models": [tiny_folder]}
    if name.startswith("8"):  # it reads what there is
        for number, (criterion, seed) in enumerate(itertools.product(("magnitude", "wanda"), range(3))):
            record = made_up.record(0.3, seed=seed, criterion=criterion)
            record.metrics["perplexity"] = 30.0 + number
            write_record(record, tmp_path / "out/records" / f"{record.key}.json")
    elif "samples" not in own or name.startswith("6"):
        parameters["common"] = SMALL | FEW_STEPS | places | {"evaluation_texts": [tiny_text], "prune_samples": 6}
    parameters |= {"models": [tiny_folder]} if name.startswith("3") else {}
    parameters |= {"texts": [tiny_text, f"{tiny_folder}/other.txt"]} if "texts" in own else {}
    executed = execute(name, tmp_path, parameters)
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


def test_every_profile_has_its_file():
    assert {path.stem for path in (ROOT / "notebooks/profiles").glob("*.yaml")} == set(runner.PROFILES)


@pytest.mark.parametrize("profile", runner.PROFILES)
def test_profiles_name_only_parameters_that_notebooks_have(profile):
    parameters = runner.profile_parameters(profile)
    assert set(parameters) == {path.stem for path in NOTEBOOKS}
    assert all(values["profile"] == profile for values in parameters.values())


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_committed_without_outputs(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert code
    assert [cell for cell in code if cell["outputs"] or cell["execution_count"] is not None] == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_parameter_has_a_type_a_value_and_a_help_text(path):
    names = runner.parameter_names(path)
    cells = nbformat.read(path, as_version=4).cells
    [cell] = [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    lines = cell.source.splitlines()
    assert [re.match(r"\w+", line)[0] for line in lines] == names
    for line in lines:
        assert re.fullmatch(r"\w+: [\w\[\], |]+ = .+  # \S.*", line), line
        [statement] = ast.parse(line).body
        ast.literal_eval(statement.value)
