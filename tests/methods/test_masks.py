"""Masks in files; and a pruned model from elsewhere: its zeros are the mask, its weights the start, and what is refused."""

from types import SimpleNamespace

import pytest
import torch
from fixtures.models import FLOAT32, copied, make_model
from fixtures.runs import record_of, result_of
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from recon import Execution, PruningConfig, ReconError, RunSpec, Session, load_masks, prune, save_masks
from recon.data import models
from recon.kernels.losses import channel_variance, unexplained
from recon.methods.masks import take_over
from recon.study.measure import Texts

UP = "model.layers.2.mlp.up_proj.weight"
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def spec(tiny_spec) -> RunSpec:
    return tiny_spec.replaced(sequence_length=16, evaluation_length=16, compute_dtype="float32")


@pytest.fixture(scope="module")
def pruned_here(spec):
    """The tiny model pruned by SparseGPT, which also updates what survives: the spec of that, the model and the dense one."""
    only, session = spec.replaced(criterion="sparsegpt", pattern="2:4", granularity="none"), Session()
    model = result_of(only, session).model
    dense, tokenizer = session.load(*only.loaded_by)
    return only, SimpleNamespace(model=model, dense=dense, tokenizer=tokenizer)


@pytest.fixture
def spoilt(pruned_here, tmp_path):
    """Factory of checkpoints of the pruned model, in one file, with some tensors replaced (None: left out)."""

    def make(**changes) -> str:
        folder = tmp_path / "spoilt"
        pruned_here[1].model.save_pretrained(folder)
        weights = load_file(folder / "model.safetensors") | changes
        kept = {name: tensor for name, tensor in weights.items() if tensor is not None}
        save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
        return str(folder)

    return make


@pytest.mark.parametrize("changes", [
    {}, {"granularity": "matrix", "solver": "exact", "propagation": "mixed"}, {"granularity": "model", "retrain": "masklora"},
    {"granularity": "2-blocks", "propagation": "sparse", "learning_rate": 3e-4}, {"granularity": "none", "retrain": "full"},
])  # fmt: skip
def test_a_run_from_an_external_mask_is_that_of_the_criterion_that_made_it(spec, pruned_here, tmp_path, changes):
    pruned_here[1].model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()  # in several shards
    made = record_of(pruned_here[0].replaced(**{"granularity": "half-block"} | changes))
    found = record_of(spec.replaced(pruned=str(tmp_path), **changes))
    assert found.protocol["dense"] == found.protocol["pruned"] == "float32"
    assert found.metrics["pattern"] == "2:4" and found.metrics["sparsity"] == 0.5
    for name in ("dense_perplexity", "pruned_perplexity", "perplexity", "sparsity_by_matrix", "drift"):
        assert found.metrics[name] == made.metrics[name], name
    assert [w["losses"] for w in found.windows] == [w["losses"] for w in made.windows]
    assert found.tokens["prune"] == 0 and found.metrics["perplexity"] != found.metrics["pruned_perplexity"]


def test_everything_else_comes_from_the_pruned_model_too(spec, pruned_here, spoilt):
    """Norms and embeddings that changed since; a window then reads what the pruned model's embedding gives."""
    state, dense = pruned_here[1].model.state_dict(), pruned_here[1].dense
    changes = {"model.norm.weight": state["model.norm.weight"] * 2, EMBEDDING: state[EMBEDDING] + 0.1}
    folder, session = spoilt(**changes), Session()
    run = spec.replaced(pruned=folder, granularity="block", propagation="mixed")
    for _ in range(2):  # the second starts from what the session kept
        record, model = result_of(run.replaced(granularity="none"), session)
        found = model.state_dict()
        assert all(torch.equal(found[name], value) for name, value in (state | changes).items() if name != "lm_head.weight")
    record = record_of(run, session)
    texts, student, window = Texts.draw(run, pruned_here[1].tokenizer), copied(dense), dense.windows("block")[0]
    take_over(student, models.load_pruned(folder, dense.model), FLOAT32)
    with Execution("cpu", "float32").autocast(), torch.no_grad():
        output = student.forward(window, student.embed(texts.held_out))
        target = dense.forward(window, dense.embed(texts.held_out))
        variance = channel_variance(dense.forward(window, dense.embed(texts.calibration)))
    assert_close(record.windows[0]["error_before"]["held_out"], unexplained(output, target, variance))


@pytest.mark.parametrize("name, make, said", [
    (UP, lambda w: w[:5].contiguous(), rf"weight '{UP}' is \(5, 32\), not \(64, 32\)"),
    (UP, lambda w: None, f"it lacks .*{UP}"),
    ("model.layers.9.mlp.up_proj.weight", lambda w: torch.ones(3), "it has 'model.layers.9.mlp.up_proj.weight', which the"),
    (UP, lambda w: w.fill_(torch.nan), f"'{UP}' holds 2048 NaN or infinite values of 2048"),
    ("model.norm.weight", lambda w: w * torch.inf, "'model.norm.weight' holds 32 NaN or infinite values of 32"),
    ("lm_head.weight", lambda w: torch.ones(400, 32), f"'lm_head.weight' differs from '{EMBEDDING}'"),
    ("matrices", torch.ones_like, "0.00% of its matrices is zero; a mask is read from zeros"),
    ("matrices", torch.zeros_like, "100.00% of its matrices is zero.*not all"),
])  # fmt: skip
@pytest.mark.parametrize("stream", ["no", "yes"])
def test_what_does_not_fit_is_refused_by_name(spec, pruned_here, spoilt, tmp_path, monkeypatch, name, make, said, stream):
    state = pruned_here[1].model.state_dict()
    names = [matrix.parameter_name for matrix in pruned_here[1].dense.matrices().values()] if name == "matrices" else [name]
    known = {each: state[each].clone() for each in names if each in state and each != "lm_head.weight"}
    folder = spoilt(**{each: make(known.get(each)) for each in names})
    monkeypatch.setattr("recon.evaluate.perplexity.perplexity", lambda *a, **k: pytest.fail("has begun to compute"))
    with pytest.raises(ReconError, match=f"pruned model.*{said}"):
        record_of(spec.replaced(pruned=folder), save=tmp_path / "saved", stream=stream)
    assert [path.name for path in tmp_path.iterdir()] == ["spoilt"]


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_masks_come_back_from_a_file_as_they_were(family, tmp_path):
    masks = prune(make_model(family), None, PruningConfig("magnitude", "2:4"), execution=FLOAT32).masks
    save_masks(masks, tmp_path / "deep" / "masks.safetensors")
    found = load_masks(str(tmp_path / "deep" / "masks.safetensors"))
    assert found.keys() == masks.keys()
    assert all(found[name].dtype == torch.bool and torch.equal(found[name], mask) for name, mask in masks.items())
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["masks.safetensors"]
