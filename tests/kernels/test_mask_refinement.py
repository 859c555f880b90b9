"""Exchanges of pruned and kept weights: each is the best of all that lower the error and keep the counts."""

import pytest
import torch

from recon.kernels import mask_refinement
from recon.kernels.criteria import CRITERIA
from recon.kernels.mask_refinement import refine
from recon.kernels.patterns import Pattern


def problem(rows=6, columns=12, tokens=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, columns, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(columns, columns, generator=generator, dtype=torch.float64)  # inputs that go together
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64), x.T @ x / tokens


def error(weight, mask, gram):
    difference = weight * ~mask
    return ((difference @ gram) * difference).sum(1)


def best_exchange(weight, mask, gram, group):
    """Tries every exchange in each row, by the errors before and after."""
    mask = mask.clone()
    for row in range(len(mask)):
        kept, pruned = mask[row].nonzero()[:, 0].tolist(), (~mask[row]).nonzero()[:, 0].tolist()
        pairs = [(i, j) for i in kept for j in pruned if i // group == j // group]
        masks = mask[row].repeat(len(pairs) + 1, 1)  # the last: none
        for number, (i, j) in enumerate(pairs):
            masks[number, i], masks[number, j] = False, True
        mask[row] = masks[error(weight[row], masks, gram).argmin()]
    return mask


@pytest.mark.parametrize("pattern, group", [("0.5", None), ("0.75", None), ("2:4", 4), ("4:8", 8), ("1:3", 3)])
@pytest.mark.parametrize("levels, first, pairs", [(8, 8, 2**22), (2, 1, 64)])
def test_every_exchange_is_the_best_of_all_until_none_lowers_the_error(pattern, group, levels, first, pairs, monkeypatch):
    for name, value in {"LEVELS": levels, "FIRST": first, "PAIRS": pairs}.items():
        monkeypatch.setattr(mask_refinement, name, value)
    weight, gram = problem(columns=24, rows=8, seed=5)
    mask = CRITERIA["wanda"].prune(weight, gram.diagonal().sqrt(), Pattern.parse(pattern), "row", None)[1]
    wanted = [mask]
    while not torch.equal(after := best_exchange(weight, wanted[-1], gram, group or 24), wanted[-1]):
        wanted.append(after)
    assert len(wanted) > 3
    for steps, expected in enumerate([*wanted, wanted[-1]]):
        assert torch.equal(refine(weight, mask, gram, steps, group), expected)


def test_nothing_kept_or_nothing_pruned():
    weight, gram = problem()
    for mask in (torch.ones_like(weight, dtype=torch.bool), torch.zeros_like(weight, dtype=torch.bool)):
        assert torch.equal(refine(weight, mask, gram, 5), mask)
