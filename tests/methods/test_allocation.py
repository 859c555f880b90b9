"""Sparsity by block, against whole forward passes of models of which one block alone is pruned."""

import copy

import pytest
import torch
from fixtures.models import FLOAT32, copied, inputs_of

from recon import PruningConfig, ReconError, prune
from recon.kernels import allocation as kernel
from recon.kernels.criteria import CRITERIA
from recon.kernels.patterns import Pattern


def block_of(name):
    return int(name.split(".")[2])


@torch.no_grad()
def by_hand(dense, samples, allocation, sparsity):
    """The sparsity of each of three blocks."""
    read = inputs_of(dense.model, list(dense.matrices()), samples if allocation == "dlp" else samples[:4])
    norms = {name: x.square().mean(0).sqrt() for name, x in read.items()}
    weights = {name: matrix.weight for name, matrix in dense.matrices().items()}
    sizes = torch.tensor([sum(w.numel() for name, w in weights.items() if block_of(name) == b) for b in range(3)]).double()
    if allocation == "dlp":
        scores = [[(w.abs() * norms[name]).flatten() for name, w in weights.items() if block_of(name) == b] for b in range(3)]
        return kernel.dlp(torch.stack([torch.cat(each).median() for each in scores]).double(), sizes, sparsity)
    wanted, losses = dense.model(samples[4:]).logits.log_softmax(-1), []
    for reach in (-kernel.spread(sparsity), kernel.spread(sparsity)):
        losses.append([])
        for block in range(3):
            model = copy.deepcopy(dense.model)
            for name in (name for name in norms if block_of(name) == block):
                weight = model.get_parameter(f"{name}.weight")
                weight.copy_(CRITERIA["wanda"].prune(weight, norms[name], Pattern(sparsity + reach), "row", None)[0])
            found = model(samples[4:]).logits.log_softmax(-1)
            losses[-1].append((wanted.exp() * (wanted - found)).sum(-1).mean())
    return kernel.by_curves(*torch.tensor(losses).double(), sizes, sparsity)


@pytest.mark.parametrize(("allocation", "sparsity"), [("dlp", 0.5), ("measured", 0.5), ("measured", 0.9)])
def test_blocks_are_as_sparse_as_their_importance_says(made, tokens, allocation, sparsity):
    samples, dense, student = tokens(8, 16), made("llama"), copied(made("llama"))
    config = PruningConfig(pattern=str(sparsity), scope="matrix", allocation=allocation)
    masks = prune(student, samples, config, execution=FLOAT32).masks
    shares = by_hand(dense, samples, allocation, sparsity).tolist()
    assert max(shares) - min(shares) > 0.01
    for name, mask in masks.items():
        assert abs((~mask).sum().item() - shares[block_of(name)] * mask.numel()) <= 1  # rounded
        matrix = student.matrices()[name].weight
        assert torch.equal(matrix, dense.matrices()[name].weight * mask)
    zeros, size = (sum(count(mask) for mask in masks.values()) for count in (lambda mask: (~mask).sum().item(), torch.numel))
    assert abs(zeros - sparsity * size) <= len(masks) / 2


@pytest.mark.parametrize("count, words", [(0, "allocation measured weighs activations"), (1, "is 'measured' with 1 calibration")])
def test_too_few_samples_are_refused(made, tokens, count, words):
    with pytest.raises(ReconError, match=words):
        prune(
            copied(made("llama")),
            tokens(1, 16) if count else None,
            PruningConfig("magnitude", allocation="measured"),
            execution=FLOAT32,
        )
