"""The pruning pass: exact masks, nothing else touched, statistics against whole models; the forms that samples may have."""

import copy

import datasets
import numpy as np
import pytest
import torch
from fixtures.models import FLOAT32, copied, inputs_of, make_model, zeros_stay
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

from recon import Execution, PruningConfig, decompose, prune
from recon.kernels.criteria import CRITERIA
from recon.kernels.patterns import Pattern
from recon.methods.prune import Pruner
from recon.methods.samples import as_tokens
from recon.methods.statistics import gather
from recon.model.modules import distance, watched


@pytest.mark.parametrize("scope", ["row", "matrix", "auto"])
@pytest.mark.parametrize("pattern", ["0.5", "0.7", "2:4", "4:8"])
@pytest.mark.parametrize("criterion", [n for n, rule in CRITERIA.items() if not rule.structured and n != "none"])
def test_masks_are_exact_and_the_rest_is_untouched(dense, tokens, criterion, pattern, scope):
    decoder = copied(dense)
    before = {name: p.detach().clone() for name, p in decoder.model.named_parameters()}
    result = prune(decoder, tokens(4, 16), PruningConfig(criterion=criterion, pattern=pattern, scope=scope), execution=FLOAT32)
    assert set(result.masks) == set(decoder.matrices())
    rule, spec = CRITERIA[criterion], Pattern.parse(pattern)
    for name, matrix in decoder.matrices().items():
        mask = result.masks[name]
        assert mask.dtype == torch.bool and torch.equal(matrix.weight != 0, mask)
        assert not matrix.weight[~mask].signbit().any()  # zeros are plus zero
        by_row = (rule.scope if scope == "auto" else scope) == "row"
        size = spec.m or (mask.shape[1] if by_row else mask.numel())
        assert ((~mask).view(-1, size).sum(1) == round(spec.sparsity * size)).all()
        # Criteria without scores change what survives.
        assert torch.equal(matrix.weight, before[f"{name}.weight"] * mask) == bool(rule.scores)
    others = before.keys() - {f"{name}.weight" for name in result.masks}
    assert {"lm_head.weight", "model.embed_tokens.weight", "model.layers.1.input_layernorm.weight", "model.norm.weight"} <= others
    assert all(torch.equal(decoder.model.get_parameter(name), before[name]) for name in others)


@pytest.mark.parametrize("criterion", ["wanda", "sparsegpt"])
def test_a_model_in_half_precision_stays_in_it(tokens, criterion):
    model = make_model("llama").bfloat16()
    masks = prune(model, tokens(4, 16), PruningConfig(criterion), execution=FLOAT32).masks
    assert zeros_stay(decompose(model), masks) and {each.dtype for each in model.parameters()} == {torch.bfloat16}


def test_random_masks_follow_the_seed(dense):
    config, name = PruningConfig(criterion="random"), "model.layers.0.self_attn.q_proj"
    masks = [prune(copied(dense), None, config, seed=seed, execution=FLOAT32).masks for seed in (0, 0, 1)]
    assert torch.equal(masks[0][name], masks[1][name]) and not torch.equal(masks[0][name], masks[2][name])
    assert not torch.equal(masks[0][name], masks[0]["model.layers.1.self_attn.q_proj"])


@pytest.mark.parametrize("statistics", ["sparse", "dense"])
@pytest.mark.parametrize("criterion, kind", [("wanda", "norm"), ("sparsegpt", "gram")])
def test_statistics_are_those_of_the_model_that_is_asked_for(dense, tokens, criterion, kind, statistics, monkeypatch):
    """From whole forward passes, sample by sample."""
    decoder, samples, found, pruned = copied(dense), tokens(5, 12), {}, Pruner.pruned
    monkeypatch.setattr(Pruner, "pruned", lambda self, matrix, read, how: found.update(read) or pruned(self, matrix, read, how))
    prune(decoder, samples, PruningConfig(criterion=criterion, statistics=statistics), execution=FLOAT32)
    # Block 1 reads a model whose block 0 is pruned and which is dense from there on.
    partly, names = copy.deepcopy(dense.model), list(dense.matrices(dense.windows("block")[1]))
    partly.model.layers[0].load_state_dict(decoder.model.model.layers[0].state_dict())
    for which, model in {"sparse": partly, "dense": dense.model}.items():
        for name, x in inputs_of(model, names, samples).items():
            statistic = x.T @ x / len(x) if kind == "gram" else x.square().mean(0).sqrt()
            gap = distance(found[name].double(), statistic)
            assert gap < 1e-4 if which == statistics else gap > 1e-2


@pytest.mark.parametrize("kind", ["llama", "mixtral"])  # a mixture's experts are slices of one parameter
def test_gradients_are_of_the_norm_of_each_samples_output(tiny, tokens, kind):
    decoder, seen = decompose(tiny(kind, num_hidden_layers=2)), []
    decoder.model.requires_grad_(False)
    window, samples = decoder.windows("block")[1], tokens(5, 60)
    stream = decoder.forward(decoder.windows("block")[0], decoder.embed(samples))
    _, found, _ = gather(FLOAT32, decoder, window, stream, "gradient", 3)
    _, norms, _ = gather(FLOAT32, decoder, window, stream, "norm", 3)
    assert not any(parameter.requires_grad for parameter in decoder.model.parameters())
    model, squares = copy.deepcopy(decoder.model).requires_grad_(), {}
    block = model.model.layers[1]
    block.register_forward_hook(lambda module, read, output: seen.append(output[0] if isinstance(output, tuple) else output))
    for sample in samples[:3]:
        block.zero_grad()
        model(sample[None])
        seen.pop().norm().backward()
        for name, parameter in block.named_parameters(prefix="model.layers.1"):
            squares[name] = squares.get(name, 0.0) + parameter.grad.square() / 3
    assert set(found) == set(decoder.matrices(window))
    for name, statistic in found.items():
        parameter, _, expert = name.removesuffix("]").partition("[")
        wanted = squares[parameter][int(expert)] if expert else squares[f"{name}.weight"]
        torch.testing.assert_close(statistic[1:], wanted.sqrt(), rtol=1e-4, atol=1e-7)
        tokens_seen = (statistic[0] / norms[name]).square()  # in a sample, on average
        assert (tokens_seen - (tokens_seen.mean() if expert else 60)).abs().max() < 0.1


@pytest.mark.parametrize("pattern", ["0.5", "2:4"])
@pytest.mark.parametrize("criterion", ["magnitude", "wanda", "random"])
def test_refined_masks_lower_the_error_of_every_matrix_by_as_many_exchanges_as_are_asked_for(dense, tokens, criterion, pattern):
    batch, errors, plain = tokens(16, 30), {}, {}
    _, grams, _ = gather(FLOAT32, dense, dense.windows("block")[0], dense.embed(batch), "gram")
    for steps in (0, 1, 30):
        decoder, config = copied(dense), PruningConfig(criterion, pattern, scope="row", mask_refinement=steps)
        result = prune(decoder, batch, config, execution=FLOAT32)
        assert all(2 * mask.sum() == mask.numel() for mask in result.masks.values())
        for name, gram in grams.items():
            difference = decoder.matrices()[name].weight - dense.matrices()[name].weight
            errors.setdefault(name, []).append(((difference @ gram) * difference).sum().item())
            assert torch.equal(decoder.matrices()[name].weight, dense.matrices()[name].weight * result.masks[name])
            changed = (plain.setdefault(name, result.masks[name]) != result.masks[name]).sum(1).max()  # in a row
            assert steps == 30 or changed == 2 * steps
    assert all(after < 0.98 * before for before, _, after in errors.values())


ROWS = torch.arange(3, 23).view(5, 4)
DATASET = datasets.Dataset.from_dict({"input_ids": ROWS.tolist(), "attention_mask": torch.ones(5, 4).tolist()})
FORMS = {
    "tensor": lambda: ROWS, "list of lists": lambda: ROWS.tolist(), "list of tensors": lambda: list(ROWS),
    "list of short integers": lambda: [row.numpy().astype(np.uint16) for row in ROWS],
    "mapping, as a tokenizer gives": lambda: {"input_ids": ROWS},
    "tuple of batches": lambda: (ROWS[:2], ROWS[2:]), "generator": lambda: (row for row in ROWS),
    "mappings": lambda: [{"input_ids": row.tolist(), "labels": None} for row in ROWS],
    "mappings of batches": lambda: [{"input_ids": ROWS[:3]}, {"input_ids": ROWS[3:]}],
    "DataLoader": lambda: DataLoader(ROWS, batch_size=2), "Dataset": lambda: DATASET,
    "DataLoader of mappings": lambda: DataLoader([{"input_ids": row} for row in ROWS], batch_size=2),
    "DataLoader of pairs": lambda: DataLoader(TensorDataset(ROWS, -ROWS), batch_size=2),
    "Dataset of tensors": lambda: DATASET.with_format("torch"),
}  # fmt: skip


@pytest.mark.parametrize("make", FORMS.values(), ids=FORMS)
def test_all_forms_give_the_same_tokens_in_order(make):
    found = as_tokens(make())
    assert torch.equal(found, ROWS) and found.dtype == torch.int64


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["norm", "moments", "gram"])
@torch.no_grad()
def test_statistics_are_those_of_all_batches_in_any_precision(dense, tokens, monkeypatch, kind, dtype):
    """Of what the matrices read, in float64."""
    monkeypatch.setattr("recon.runtime.execution.TOKENS", 5 * 60)  # 16 samples in four batches
    execution, window, seen = Execution("cpu", dtype, progress=False), dense.windows("block")[0], {}
    stream = execution.embed(dense, tokens(16, 60))
    modules = {name: matrix.module for name, matrix in dense.matrices(window).items()}
    with watched(modules, lambda name, args, kwargs: seen.setdefault(name, []).append(args[0].flatten(0, 1).double())):
        _, found, _ = gather(execution, dense, window, stream, kind, 13)
    for name, parts in seen.items():
        x = torch.cat(parts)[: 13 * 60]
        moments = torch.stack([x.mean(0), x.var(0, correction=0)])
        wanted = {"norm": x.square().mean(0).sqrt(), "moments": moments, "gram": x.T @ x / len(x)}
        assert found[name].dtype == torch.float32
        assert_close(found[name].double(), wanted[kind], rtol=1e-5, atol=1e-6)
