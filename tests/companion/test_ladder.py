"""The ladder: its text is split by file, its training goes on where it was stopped, its slopes are those of a straight line."""

import json
import math
import random
import shutil
import subprocess
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from fixtures.made_up import seeds
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

import recon
from companion import compare, frame, ladder

RUNG = ladder.Rung(1, 32, 6)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder for a ladder of a made-up text of 80 files."""
    files = [" ".join(random.Random(file).choices(["one", "two", "three", "more", "words"], k=600)) for file in range(80)]
    monkeypatch.setattr(ladder, "_files", lambda: iter(files + files[:3]))
    monkeypatch.setattr(ladder, "VOCABULARY", 300)
    return tmp_path / "ladder"


def test_no_file_is_seen_in_training_and_held_out(folder):
    place = ladder.text(folder)
    rows = {name: [json.loads(line)["text"] for line in (place / f"{name}.jsonl").open()] for name in ("training", "held-out")}
    assert len(rows["training"]) + len(rows["held-out"]) == len(set(rows["training"])) + len(set(rows["held-out"])) == 80
    assert rows["held-out"] and not [each for each in rows["held-out"] if any(each in other for other in rows["training"])]
    assert ladder.samples(20, folder).shape == (20, ladder.LENGTH) and ladder.text(folder) == place
    with pytest.raises(ValueError, match="fewer than"):
        ladder.samples(10**6, folder)


def test_another_archive_is_refused(tmp_path, monkeypatch):
    def download(command, **_):
        Path(command[command.index("--dest") + 1], "sympy.whl").write_bytes(b"another")

    monkeypatch.setattr(subprocess, "run", download)
    with pytest.raises(ValueError, match="sympy.whl has sha256"):
        ladder.text(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_stopped_training_goes_on_and_gives_the_same_model(folder, monkeypatch):
    place, plain = ladder.train(RUNG, folder), ladder.rate
    whole, losses = load_file(place / "model.safetensors"), (place / "losses.csv").read_text()
    assert len(losses.split()) == 1 + RUNG.steps and recon.load(str(place))[1]("a").input_ids[0] == 0
    shutil.rmtree(place)

    def stopped(rung, step):
        if step == 4:
            raise KeyboardInterrupt
        return plain(rung, step)

    monkeypatch.setattr(ladder, "SAVED", 0)
    monkeypatch.setattr(ladder, "rate", stopped)
    with pytest.raises(KeyboardInterrupt):
        ladder.train(RUNG, folder)
    assert not place.exists()
    monkeypatch.setattr(ladder, "rate", lambda rung, step: plain(rung, step) / (step > 3))  # earlier steps are not taken again
    ladder.train(RUNG, folder)
    again = load_file(place / "model.safetensors")
    assert all((again[name] == values).all() for name, values in whole.items())
    assert (place / "losses.csv").read_text() == losses
    assert sorted(each.name for each in folder.iterdir()) == [RUNG.name, "text"]


@pytest.mark.parametrize("blocks, channels", [(1, 32), (2, 64), (3, 32)])
def test_the_name_states_the_parameters_of_the_blocks(blocks, channels):
    rung = ladder.Rung(blocks, channels, 8, seed=3)
    layers = LlamaForCausalLM(rung.config).model.layers
    assert rung.parameters == sum(each.numel() for each in layers.parameters())
    assert compare.parameters(rung.name) == pytest.approx(rung.parameters, abs=500)
    assert compare.family(rung.name) == ("ladder-8" if channels == 32 * blocks else "shape-8")
    assert ladder.compute(rung.name) == pytest.approx(rung.parameters * rung.tokens, rel=0.1)


def runs(gains, models, **options):
    records = []
    for model, gain in zip(models, gains):
        for granularity, recovered in (("half-block", 0.4), ("block", 0.4 + gain)):
            records += seeds(recovered, 4, model=model, granularity=granularity, **options)
    table = frame.table(records)
    return table[table["fit"] == "block"], table[table["fit"] == "half-block"]


def test_slopes_are_those_of_least_squares_and_training_scatter_widens_them():
    models, gains = ["a-1m-s0", "a-3m-s0", "a-10m-s0", "a-30m-s0", "b-100m"], [0.0, 0.05, 0.1, 0.15, 0.9]
    lines = {("panel", "line"): runs(gains, models, noise=0.001)}
    figure, data, marks, finding, slopes = ladder.over_size(lines, "our\nlead", share=True)
    assert "Stars: other families (b-100m)" in marks
    at, line = np.log10([compare.parameters(model) for model in models]), slopes.iloc[0]
    assert line["slope"] == pytest.approx(np.polyfit(at[:4], gains[:4], 1)[0], abs=0.01)
    assert line["low"] < line["slope"] < line["high"] and line["trend"] == "rises"
    assert finding == "Our lead, and its trend per tenfold parameters: line 0.00 to 0.15, rises by 0.10."
    assert len(data) == 20 and data.groupby("model")["value"].mean()[models].to_list() == pytest.approx(gains, abs=0.01)
    twins = runs([*gains[:4], 0.3], [*models[:4], "a-1m-s1"], noise=0.001)
    figure, data, marks, finding, wider = ladder.over_size({("panel", "line"): twins}, "", share=True)
    assert "Stars" not in marks and "line 0.05 to 0.15" in finding  # twins are one mark
    [wider] = wider.to_dict("records")
    assert wider["high"] - wider["low"] > 5 * (line["high"] - line["low"])
    assert wider["slope"] == pytest.approx(np.polyfit([*at[:4], at[0]], [*gains[:4], 0.3], 1)[0], abs=0.01)
    two = ladder.over_size({("panel", "line"): runs(gains, models[:2])}, "", share=True)[-1].iloc[0]
    assert math.isnan(two["low"]) and two["trend"] == "has too few sizes"
    plt.close("all")
