"""The benchmark: its floors are counted for the model at hand, and the loop beside ours is a fair one. No timing is judged."""

import copy
import json

import pytest
import torch
from fixtures.models import saved_model

from recon import Execution, PruningConfig, ReconError, ReconstructionConfig, cli, decompose, prune, reconstruct
from recon.evaluate.perplexity import drift
from recon.study import bench


def test_the_command_times_each_phase_beside_its_floor(tiny_folder, tiny_text, tmp_path, capsys):
    words = ["--model", tiny_folder, "--text", tiny_text, "--samples", "4", "--sequence-length", "16", "--repeats", "1"]
    cli.main(["bench", *words, "--blocks", "2", "--output", str(tmp_path / "bench.json")])
    results = json.loads((tmp_path / "bench.json").read_text())
    both = {(row["phase"], row["loop"]) for row in results["rows"]}
    assert {phase for phase, _ in both} == set(results["floor_seconds"]) and all(row["seconds"] > 0 for row in results["rows"])
    assert len(results["rows"]) == len(both) and "git_commit" in results["environment"]
    [took] = (row["seconds"] for row in results["rows"] if (row["phase"], row["loop"]) == ("evaluate", "ours"))
    found = bench.table(results).loc["evaluate", "ours / floor"]
    assert found == pytest.approx(took / results["floor_seconds"]["evaluate"])
    assert "prune and reconstruct" in capsys.readouterr().out


def test_the_subject_is_the_first_blocks_of_the_model(tiny_spec, tmp_path):
    spec = tiny_spec.replaced(samples=2, sequence_length=8, evaluation_length=8)
    (short, _, tokens), (whole, *_) = (bench.subject(spec, blocks, tmp_path / str(blocks)) for blocks in (2, 99))
    assert (len(short.blocks), len(whole.blocks)) == (2, 4)
    hidden = whole.embed(tokens)
    assert torch.equal(short.forward(short.windows("2-blocks")[0], hidden), whole.forward(whole.windows("2-blocks")[0], hidden))


def test_what_the_plain_loop_does_not_know_is_refused(tiny_folder, tiny_spec, tmp_path):
    for family in ("mixtral", "t5"):
        spec = tiny_spec.replaced(model=saved_model(family, tiny_folder, tmp_path / family))
        with pytest.raises(ReconError, match="has experts or an encoder"):
            bench.subject(spec, 1, tmp_path / "short")


def test_the_reference_loop_prunes_and_reconstructs_like_ours(tiny, tokens):
    """Same windows, inputs, loss, steps and learning rates: it ends near where ours does, zeros included."""
    dense, samples, unseen, quiet = decompose(tiny("llama")), tokens(32, 16), tokens(8, 16, seed=9), Execution(progress=False)
    theirs, ours, pruned = (decompose(copy.deepcopy(dense.model), like=dense) for _ in range(3))
    assert all(seconds > 0 for seconds in bench.reference(theirs, dense, samples).values())
    masks = prune(pruned, samples, PruningConfig(statistics="sparse"), execution=quiet).masks
    kept = {name: matrix.weight != 0 for name, matrix in theirs.matrices().items()}
    alike = torch.cat([(kept[name] == mask).flatten() for name, mask in masks.items()])
    assert alike.float().mean() > 0.95  # rounding may decide between weights that are as good
    for name, matrix in ours.matrices().items():
        matrix.weight.data.mul_(kept[name])
        assert not hasattr(theirs.matrices()[name].module, "weight_orig")
    own = {"propagation": "dense", "train": "all", "loss": "mse", "learning_rate": bench.RATE, "rate": "absolute", "epochs": 1}
    reconstruct(ours, dense, samples, ReconstructionConfig(**own, batch_size=2), masks=kept, execution=quiet)
    errors = [drift(student, dense, unseen)[0][-1] for student in (theirs, ours, pruned)]
    assert errors[0] == pytest.approx(errors[1], rel=0.05) and errors[0] < 0.95 * errors[2]
