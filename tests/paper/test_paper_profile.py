"""The profile `paper`, from its first command to its pages, on stand-ins for the Hub's models and texts."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from fixtures.models import make_model
from transformers import AutoTokenizer

ROOT = Path(__file__).resolve().parents[2]
# Run when a notebook's kernel starts: the Hub's texts are local folders in the same format.
STAND_IN = """
import os
from dataclasses import replace
from recon.data import text

folder = os.environ["STAND_IN_TEXTS"]
text.HUB["c4"] = text.HubText(folder, data_files={"train": "train.jsonl", "validation": "validation.jsonl"})
text.HUB["wikitext2"] = text.HubText(folder, data_files={p: f"{p}.jsonl" for p in ("train", "validation", "test")})
"""
SMALL = {  # what makes the paper's sizes small, by the name of the parameter or field
    "samples": 6, "prune_samples": 4, "sequence_length": 32, "evaluation_samples": 2, "evaluation_length": 64, "seeds": [0],
    "counts": [4, 6], "retrain_counts": [6], "more_counts": [6], "tasks": ["analogies"], "task_limit": 4, "blocks": 2, "repeats": 1,
    "patterns": ["0.5", "2:4"], "more_patterns": ["0.6"], "more_fits": ["none", "half-block"], "methods": ["masklora"],
    "more_methods": ["lora"], "more_seeds": [0],
}  # fmt: skip


def shrunk(values: object) -> object:
    """The profile with its sizes made small, and only the first of many models, patterns and learning rates."""
    if isinstance(values, dict):
        return {name: SMALL[name] if name in SMALL else shrunk(value) for name, value in values.items()}
    if isinstance(values, list) and values and (isinstance(values[0], float) or "/" in str(values[0])):
        return values[:2]
    return values


def cache(hub: Path, name: str, folder: Path) -> None:
    """Puts a model where the Hub's cache would hold it."""
    place = hub / f"models--{name.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("0" * 40)
    shutil.copytree(folder, place / "snapshots" / ("0" * 40))


def names(values: object) -> set[str]:
    """The Hub ids in a profile."""
    if isinstance(values, str):
        return {values} if values.count("/") == 1 else set()
    each = values.values() if isinstance(values, dict) else values if isinstance(values, list) else ()
    return set().union(*map(names, each))


def committed() -> dict[Path, int]:
    """What lies where the real paper profile writes, with the times of the last change."""
    return {path: path.stat().st_mtime_ns for folder in ("figures/paper", "results/paper") for path in (ROOT / folder).rglob("*")}


@pytest.mark.slow
def test_paper_profile_runs_from_end_to_end(tmp_path, tiny_folder):
    profile = yaml.safe_load((ROOT / "notebooks/profiles/paper.yaml").read_text())
    small = shrunk(profile)
    small["6-cost"]["sections"] = ["products", "quality"]  # "large" needs a GPU
    root, hub = tmp_path / "root", tmp_path / "hub"
    # A checkout of its own: what it writes as the paper profile's must never come to lie among real records.
    for part in ("notebooks", "recon"):
        shutil.copytree(ROOT / part, root / part, ignore=shutil.ignore_patterns("__pycache__"))
    (root / "notebooks/profiles/paper.yaml").write_text(yaml.safe_dump(small))
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    model = make_model("llama", vocab_size=len(tokenizer), num_hidden_layers=8, max_position_embeddings=256)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    for name in names(small):
        cache(hub, name, tmp_path / "model")
    lines = [json.dumps({"text": part}) for part in (Path(tiny_folder) / "tiny_text.txt").read_text().split("\n\n")]
    texts = tmp_path / "texts"
    texts.mkdir()
    for part in ("train", "validation", "test"):
        (texts / f"{part}.jsonl").write_text("\n".join(lines))
    (tmp_path / "start").mkdir()
    (tmp_path / "start" / "sitecustomize.py").write_text(STAND_IN)
    environment = os.environ | {
        "PYTHONPATH": f"{tmp_path / 'start'}{os.pathsep}{root}",
        "STAND_IN_TEXTS": str(texts),
        "HF_HUB_CACHE": str(hub),
        "HF_HUB_OFFLINE": "1",
    }
    # The notebooks of the paper; 7-scale, beyond it, measures the bundled model on this machine whatever the profile.
    code = f"import sys; from recon.paper import runner; print(runner.execute('paper', {sorted(profile)}, stdout=sys.stdout))"
    before = committed()
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=root, capture_output=True, text=True)
    assert committed() == before
    assert done.stdout.count("status='finished'") == len(profile), done.stdout[-3000:] + done.stderr[-3000:]
    # Time, memory and disk are said before a study begins.
    said = "".join(path.read_text() for path in (root / "build/paper/notebooks").glob("*.log"))
    assert "on this machine" in said and "GiB of disk while it runs" in said
    records = [json.loads(path.read_text()) for path in (root / "results/paper").glob("*.json")]
    assert len(records) > 40 and {record["status"] for record in records} == {"done"}
    assert {record["spec"]["model"] for record in records} <= names(small)
    page = (root / "figures/paper/README.md").read_text()
    assert "The paper's claims" in page and "](sample-efficiency.png)" in page and "](granularity.png)" in page
    assert "`./run_all.sh paper 1-granularity`" in page
    assert (root / "build/paper/html/index.html").is_file()
