"""The benchmark: its floors are counted for the model at hand, and the loop beside ours is a fair one. No timing is judged."""

import copy
import json

import pytest
import torch

from recon import cli
from recon.config import PruningConfig, ReconstructionConfig
from recon.evaluate.perplexity import drift
from recon.methods.prune import prune
from recon.methods.reconstruct import reconstruct
from recon.model.discovery import decompose
from recon.runtime.execution import Execution
from recon.study import bench


def test_the_command_times_each_phase_beside_its_floor(tiny_folder, tiny_text, tmp_path, capsys):
    words = ["--model", tiny_folder, "--text", tiny_text, "--samples", "4", "--sequence-length", "16", "--repeats", "2"]
    cli.main(["bench", *words, "--blocks", "2", "--output", str(tmp_path / "bench.json")])
    results = json.loads((tmp_path / "bench.json").read_text())
    both = {(row["phase"], row["loop"]) for row in results["rows"]}
    assert {phase for phase, _ in both} == set(results["floor_seconds"]) and all(row["seconds"] > 0 for row in results["rows"])
    assert len(results["rows"]) == 2 * len(both) and "git_commit" in results["environment"]
    table = bench.table(results)
    mean = sum(row["seconds"] for row in results["rows"] if (row["phase"], row["loop"]) == ("evaluate", "ours")) / 2
    assert table.loc["evaluate", "ours / floor"] == pytest.approx(mean / results["floor_seconds"]["evaluate"])
    assert "prune and reconstruct" in capsys.readouterr().out


def test_the_subject_is_the_first_blocks_of_the_model(tiny_folder, tiny_text):
    short, tokens = bench.subject(tiny_folder, tiny_text, 2, 8, 2)
    whole, _ = bench.subject(tiny_folder, tiny_text, 2, 8, 99)
    assert (len(short.blocks), len(whole.blocks)) == (2, 4)
    hidden = whole.embed(tokens)
    assert torch.equal(short.forward(short.windows("2-blocks")[0], hidden), whole.forward(whole.windows("2-blocks")[0], hidden))


def test_the_reference_prunes_as_ours_does_on_the_sparse_model(tiny, tokens):
    dense, samples = decompose(tiny("llama")), tokens(8, 16)
    theirs, ours = bench.copied(dense, {}), bench.copied(dense, {})
    found = bench.reference_prune(theirs, samples)
    masks = prune(ours, samples, PruningConfig(statistics="sparse"), execution=Execution("cpu", progress=False)).masks
    assert all(torch.equal(matrix.weight != 0, found[name]) for name, matrix in theirs.matrices().items())
    alike = torch.cat([(found[name] == mask).flatten() for name, mask in masks.items()])
    assert alike.float().mean() > 0.95  # rounding may decide between weights that are as good


def test_the_reference_loop_reconstructs_like_ours(tiny, tokens):
    """Same windows, inputs, loss, steps and learning rates: it ends near where ours does, zeros included."""
    dense, samples, unseen = decompose(tiny("llama")), tokens(32, 16), tokens(8, 16, seed=9)
    masks = prune(copy.deepcopy(dense.model), samples, execution=Execution(progress=False)).masks
    theirs, ours, pruned = (bench.copied(dense, masks) for _ in range(3))
    bench.reference_reconstruct(theirs, dense, samples, masks)
    config = ReconstructionConfig(
        propagation="dense", train="all", loss="mse", learning_rate=bench.RATE, rate="absolute", epochs=1, batch_size=2
    )
    reconstruct(ours, dense, samples, config, masks=masks, execution=Execution(progress=False))
    errors = [drift(student, dense, unseen)[0][-1] for student in (theirs, ours, pruned)]
    assert errors[0] == pytest.approx(errors[1], rel=0.05) and errors[0] < 0.95 * errors[2]
    for name, matrix in theirs.matrices().items():
        assert torch.equal(matrix.weight != 0, masks[name]) and not hasattr(matrix.module, "weight_orig")
