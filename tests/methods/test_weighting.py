"""Weights of rows: against the gradients of the whole model, taken at once; and masks of matrices whose rows are multiplied."""

from functools import partial

import pytest
import torch
from fixtures.models import FLOAT32, copied, inputs_of

from recon import PruningConfig, prune
from recon.kernels.criteria import CRITERIA
from recon.kernels.patterns import Pattern
from recon.methods.weighting import row_weights
from recon.model.modules import watched
from recon.runtime.seeds import generator


def by_hand(dense, samples, seed, monkeypatch):
    """The weights by name, from one backward pass through the whole model for each sample."""
    given, squares, draw, matrices = {}, {}, generator(seed, "weigh"), dense.matrices()
    modules = {(name,): matrix.module for name, matrix in matrices.items() if matrix.expert is None}
    experts = {name: matrix.weight.data_ptr() for name, matrix in matrices.items() if matrix.expert is not None}

    def noted(multiply, x, weight, *bias):
        output, start = multiply(x, weight, *bias), weight.data_ptr()
        if names := tuple(name for name, place in experts.items() if start <= place < start + weight.nbytes):
            given[names] = output
        return output

    monkeypatch.setattr(torch.nn.functional, "linear", partial(noted, torch.nn.functional.linear))
    monkeypatch.setattr(torch, "bmm", partial(noted, torch.bmm))
    multiply = torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda x, weight: noted(multiply, x, weight))
    dense.model.requires_grad_()
    for sample in samples:
        given.clear()
        with watched(modules, after=lambda names, args, kwargs, output: given.update({names: output})):
            log_p = dense.run(sample[None]).logits[0].log_softmax(-1)
        drawn = torch.multinomial(log_p.detach().exp(), 1, generator=draw)
        slopes = torch.autograd.grad(log_p.gather(1, drawn).sum(), list(given.values()), materialize_grads=True)
        for names, slope in zip(given, slopes):
            for name, own in zip(names, slope.reshape(len(names), -1, slope.shape[-1])):
                squares[name] = squares.get(name, 0.0) + own.square().sum(0)
    return {name: each**0.25 / (each**0.25).mean() for name, each in squares.items()}


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "mixtral", "gpt_oss", "llama4", "t5"])
def test_one_pass_back_through_the_blocks_is_one_through_the_whole_model(made, tokens, family, monkeypatch):
    dense, samples = copied(made(family)), tokens(3, 16)
    found, expected = row_weights(dense, samples, 1, FLOAT32), by_hand(dense, samples, 1, monkeypatch)
    assert found.keys() == expected.keys() == dense.matrices().keys()
    for name, weights in found.items():
        torch.testing.assert_close(weights, expected[name].clamp_min(1e-3), rtol=1e-3, atol=1e-4)
    assert max(weights.max() / weights.min() for weights in found.values()) > 2


@pytest.mark.parametrize("criterion", ["wanda", "admm"])
def test_rows_compete_as_if_multiplied_by_their_weights(made, tokens, criterion):
    dense, student, samples = made("llama"), copied(made("llama")), tokens(4, 16)
    weights = row_weights(dense, samples, 0, FLOAT32)
    config = PruningConfig(criterion, "0.6", weighting="fisher")
    masks = prune(student, samples, config, execution=FLOAT32).masks
    rule = CRITERIA[criterion]
    for name, x in inputs_of(dense.model, list(dense.matrices()), samples).items():
        read = x.T @ x / len(x) if rule.statistics == "gram" else x.square().mean(0).sqrt()
        matrix, rows = dense.matrices()[name].weight, weights[name][:, None]
        pruned, mask = rule.prune(matrix * rows, read.to(matrix), Pattern(0.6), "matrix", None)
        assert (masks[name] == mask).float().mean() > 0.999
        expected = matrix * mask if rule.scores else pruned / rows
        same = masks[name] == mask
        torch.testing.assert_close(student.matrices()[name].weight[same], expected[same], rtol=1e-3, atol=1e-4)
    assert all(abs((~mask).float().mean() - 0.6) < 1 / mask.numel() for mask in masks.values())
