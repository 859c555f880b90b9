"""The notebooks: their cells are plain, and they run through Papermill at a tiny size."""

import ast
import json
import re
import shutil
from pathlib import Path

import nbformat
import papermill
import pytest
import yaml
from transformers import AutoModelForCausalLM

from companion import run
from companion.publish import PROFILES, drawn, notebooks

ROOT = Path(__file__).resolve().parents[2]
SMALL = {
    "samples": 6, "epochs": 1, "sequence_length": 32, "held_out_samples": 2, "evaluation_samples": 2, "evaluation_length": 64
}  # fmt: skip
COMMON = {"chunks": 1, "retrain_epochs": 1, "prune_samples": 6}
TINY = {  # parameters beside model and text, number of run records; slow ones are marked
    "0-quickstart": (SMALL | {"new_tokens": 4}, 1),
    "1-granularity": ({"fits": ["none", "matrix exact", "half-block"], "rates": [3e-3, 1e-2]}, 5),
    "2-sample-efficiency": (
        {"counts": [4, 5, 6], "retrain_counts": [4], "more_counts": [4], "methods": ["masklora"], "more_methods": [], "both": [],
         "distilled": [], "controls": [], "rates": [3e-3, 1e-2]}, 13,
    ),
    "3-criterion-convergence": ({"criteria": ["magnitude", "wanda"], "recipes": ["default", "paper"]}, 8),
    "4-propagation-and-loss": ({"propagations": ["dense", "mixed"], "losses": ["whitened", "mse"]}, 5),
    "5-what-reviewers-asked": (
        {"adapters": ["none", "masklora"], "rates": [3e-3, 1e-2], "fits": ["matrix", "half-block"], "tasks": ["last_word"],
         "task_criteria": ["wanda"], "task_methods": ["masklora"]}, None,
    ),
    "6-cost": ({"samples": 4, "sequence_length": 32, "repeats": 1}, 2),
    "8-frontier": (
        {"more_fits": {"best": {"preset": "best"}}, "fitted": ["admm"], "more_seeds": [1], "repeated": [["admm", "best"]],
         "timed": ["2:4"]}, 8,
    ),
    "10-open-questions": ({"networks": {"CNN": 40}, "windows": ["block", "model"], "blocks": [0, 1]}, 0),
    "7-scale": ({"samples": 4, "sequence_length": 32, "evaluation_samples": 2, "evaluation_length": 64, "workers": [1]}, 0),
    "9-ladder": ({"counts": [6], "rates": [3e-3, 1e-2], "beside": "tests"}, 54),
}  # fmt: skip
SLOW = ("5", "6", "7", "8", "9", "10")


def parameters(path: Path) -> str:
    """The source of the one cell of a notebook that is tagged "parameters"."""
    [cell] = [cell for cell in nbformat.read(path, as_version=4).cells if "parameters" in cell.metadata.get("tags", [])]
    return cell.source


@pytest.mark.parametrize("path", notebooks(), ids=lambda path: path.stem)
def test_cells_are_plain(path):
    """Committed without outputs; no functions; every parameter has a type, a value and a help text."""
    assert path.stem in TINY
    code = [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert code and [cell for cell in code if cell["outputs"] or cell["execution_count"] is not None] == []
    for cell in code:
        defined = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        assert not [node for node in ast.walk(ast.parse("".join(cell["source"]))) if isinstance(node, defined)]
    for line in parameters(path).splitlines():
        assert re.fullmatch(r"\w+: [\w\[\], |]+ = .+  # \S.*", line), line
        [statement] = ast.parse(line).body
        ast.literal_eval(statement.value)


@pytest.mark.parametrize("profile", PROFILES)
def test_profiles_name_only_parameters_that_notebooks_have(profile):
    values = run.parameters(profile)
    assert set(yaml.safe_load((ROOT / "notebooks" / "profiles" / f"{profile}.yaml").read_text())) <= set(values)
    for path in notebooks():
        assert set(values[path.stem]) <= set(re.findall(r"^\w+", parameters(path), re.MULTILINE))


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n.startswith(SLOW) else n for n in TINY])
def test_notebook_runs_top_to_bottom_and_leaves_what_it_promises(name, tmp_path, tiny_folder, tiny_text):
    (given, runs), source = TINY[name], ROOT / "notebooks" / f"{name}.ipynb"
    names = re.findall(r"^\w+", parameters(source), re.MULTILINE)
    places = {"model": tiny_folder, "text": tiny_text, "evaluation_texts": [tiny_text]}
    values = places | {"by_hand": tiny_folder, "models": [tiny_folder], "recipe_models": [tiny_folder], "texts": [tiny_text]}
    values |= {"common": SMALL | COMMON | places, "output": str(tmp_path)}
    values = {key: value for key, value in values.items() if key in names} | given
    if name == "9-ladder":  # of one family, with sizes in their names
        values["models"] = [str(shutil.copytree(tiny_folder, tmp_path / f"tiny-{size}m")) for size in (1, 2, 3)]
        for size, folder in enumerate(values["models"], 1):  # other weights: the same content would be the same runs
            model = AutoModelForCausalLM.from_pretrained(folder)
            model.get_input_embeddings().weight.data.mul_(size)
            model.save_pretrained(folder)
    executed, how = tmp_path / "executed.ipynb", {"kernel_name": "python3", "progress_bar": False}
    papermill.execute_notebook(str(source), str(executed), values, cwd=str(source.parent), **how)
    folder = tmp_path / "records"
    records = [json.loads(path.read_text()) for path in (*folder.glob("*.json"), *folder.glob("ladder/*.json"))]
    assert {record["status"] for record in records} <= {"done"} and len(records) == (len(records) if runs is None else runs)
    keys = {record["key"] for record in records} | {"bench/cost", "bench/workers"}
    keys |= {f"probes/{path.stem}" for path in (folder / "probes").glob("*.json")}
    figures = [each for each in drawn(source) if each != "ladder-legs"]  # of models trained here
    for figure in figures:
        assert {path.suffix for path in (tmp_path / "figures").glob(f"{figure}.*")} == {".csv", ".json", ".pdf", ".png"}
        origin = json.loads((tmp_path / "figures" / f"{figure}.json").read_text())
        assert origin["records"] and set(origin["records"]) <= keys
    outputs = [out for cell in nbformat.read(executed, as_version=4).cells for out in cell.get("outputs", [])]
    assert sum("image/png" in out.get("data", {}) for out in outputs) == len(figures)
    assert not [out for out in outputs if out.output_type == "error"]
    assert name != "0-quickstart" or "no records yet" not in str(outputs)
