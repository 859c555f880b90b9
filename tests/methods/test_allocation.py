"""Sparsity by block: against models of which one block alone is pruned, DLP's formula, and all splits of the total."""

import copy
import itertools
import math

import pytest
import torch
from fixtures.models import FLOAT32, copied, inputs_of

from recon import PruningConfig, prune
from recon.kernels.allocation import by_losses, dlp, spread
from recon.kernels.criteria import CRITERIA
from recon.kernels.patterns import Pattern


def block_of(name):
    return int(name.split(".")[2])


@torch.no_grad()
def by_hand(dense, samples, allocation, sparsity):
    """The sparsity of each of three blocks."""
    read = inputs_of(dense.model, list(dense.matrices()), samples if allocation == "dlp" else samples[:-2])
    norms = {name: x.square().mean(0).sqrt() for name, x in read.items()}
    weights = {name: matrix.weight for name, matrix in dense.matrices().items()}
    sizes = torch.tensor([sum(w.numel() for name, w in weights.items() if block_of(name) == b) for b in range(3)]).double()
    if allocation == "dlp":
        scores = [[(w.abs() * norms[name]).flatten() for name, w in weights.items() if block_of(name) == b] for b in range(3)]
        return dlp(torch.stack([torch.cat(each).median() for each in scores]).double(), sizes, sparsity)
    probes = samples[-2:, :12]
    wanted, losses = dense.model(probes).logits.log_softmax(-1), []
    for block in range(3):
        model = copy.deepcopy(dense.model)
        for name in (name for name in norms if block_of(name) == block):
            weight = model.get_parameter(f"{name}.weight")
            weight.copy_(CRITERIA["wanda"].prune(weight, norms[name], Pattern(sparsity + spread(sparsity)), "row", None)[0])
        found = model(probes).logits.log_softmax(-1)
        losses.append((wanted.exp() * (wanted - found)).sum(-1)[:, [2, 5, 8, 11]].mean())
    return by_losses(torch.tensor(losses).double(), sizes, sparsity)


@pytest.mark.parametrize(("allocation", "sparsity"), [("dlp", 0.5), ("measured", 0.5), ("measured", 0.9)])
def test_blocks_are_as_sparse_as_their_importance_says(made, tokens, allocation, sparsity, monkeypatch):
    for name, value in {"NORMS": 48, "PROBES": 2, "LENGTH": 12, "EVERY": 3}.items():
        monkeypatch.setattr(f"recon.methods.allocation.{name}", value)
    samples, dense, student = tokens(8, 16), made("llama"), copied(made("llama"))
    config = PruningConfig(pattern=str(sparsity), scope="matrix", allocation=allocation)
    masks = prune(student, samples, config, execution=FLOAT32).masks
    shares = by_hand(dense, samples if allocation == "dlp" else samples[-5:], allocation, sparsity).tolist()
    assert max(shares) - min(shares) > 0.01
    for name, mask in masks.items():
        assert abs((~mask).sum().item() - shares[block_of(name)] * mask.numel()) <= 1  # rounded
        matrix = student.matrices()[name].weight
        assert torch.equal(matrix, dense.matrices()[name].weight * mask)
    zeros, size = (sum(count(mask) for mask in masks.values()) for count in (lambda mask: (~mask).sum().item(), torch.numel))
    assert abs(zeros - sparsity * size) <= len(masks) / 2


SIZES = torch.tensor([30.0, 10, 20], dtype=torch.float64)


@pytest.mark.parametrize("sparsity", [0.05, 0.5, 0.7, 0.95])
def test_dlp_follows_the_formula(sparsity):
    medians = torch.tensor([1.0, 4, 5], dtype=torch.float64)
    importance = [1 - 0.1, 1 - 0.4, 1 - 0.5]
    scaled = [2 * spread(sparsity) * (each - 0.5) / 0.4 for each in importance]
    mean = (30 * scaled[0] + 10 * scaled[1] + 20 * scaled[2]) / 60
    found = dlp(medians, SIZES, sparsity)
    torch.testing.assert_close(found.tolist(), [sparsity + mean - each for each in scaled])
    assert (found * SIZES).sum().item() == pytest.approx(60 * sparsity, abs=1e-12) and 0 <= found.min() <= found.max() < 1
    torch.testing.assert_close(dlp(0 * medians, SIZES, sparsity).tolist(), [sparsity] * 3)  # more than half zeros already


@pytest.mark.parametrize("sparsity", [0.1, 0.6, 0.9])
@pytest.mark.parametrize("losses", [[4, 9, 20], [2, 900, 1.5], [0.001, 5, 3]])
def test_no_other_split_of_the_total_costs_less(losses, sparsity):
    """Tried: all splits on a fine grid. Losses grow as the error of pruning normally distributed weights does, counted here."""
    reach, found = spread(sparsity), by_losses(torch.tensor(losses, dtype=torch.float64), SIZES, sparsity)
    assert (found * SIZES).sum().item() == pytest.approx(60 * sparsity, abs=1e-9)
    weights = torch.erfinv((torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000)  # magnitudes, smallest first
    low, high = (weights[: round(200_000 * (sparsity + end))].square().sum().log().item() for end in (-reach, reach))

    def cost(split):
        return sum(loss * math.exp((high - low) / (2 * reach) * s) for s, loss in zip(split, losses, strict=True))

    grid = [sparsity - reach + 2 * reach * step / 60 for step in range(61)]
    splits = [(a, b, (60 * sparsity - 30 * a - 10 * b) / 20) for a, b in itertools.product(grid, grid)]
    least = min(cost(split) for split in splits if sparsity - reach <= split[2] <= sparsity + reach)
    assert cost(found.tolist()) <= least * (1 + 1e-5)
