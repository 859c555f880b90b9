"""Scores of whole units against their formulas, and which units go."""

import pytest
import torch
from torch.testing import assert_close

from recon.kernels.criteria import scores
from recon.kernels.criteria.structured import flap, keep_globally, wanda_sp


@pytest.mark.parametrize("seed", range(5))
def test_units_go_in_order_until_the_target_is_met(seed):
    draw = torch.Generator().manual_seed(seed)
    scores = [torch.rand(n, generator=draw) for n in (3, 40, 3, 40)]
    weights, target = [100, 7, 100, 7], 300
    kept = keep_globally(scores, weights, target)
    removed = sum(int((~k).sum()) * w for k, w in zip(kept, weights, strict=True))
    assert abs(removed - target) <= 3.5
    for size in (100, 7):
        of_size = [i for i, w in enumerate(weights) if w == size]
        all_scores, all_kept = torch.cat([scores[i] for i in of_size]), torch.cat([kept[i] for i in of_size])
        assert all_kept.all() or all_scores[~all_kept].max() < all_scores[all_kept].min()
    assert all(k.all() for k in keep_globally(scores, weights, 0))


def test_scores_follow_their_formulas():
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 12, generator=draw, dtype=torch.float64)
    x = torch.randn(200, 12, generator=draw, dtype=torch.float64) * torch.rand(12, generator=draw, dtype=torch.float64) + 3
    norm = x.square().mean(0).sqrt()
    assert_close(wanda_sp(weight, norm), scores.wanda(weight, norm, None).sum(0))
    fluctuation = torch.stack([sum((t[j] - x[:, j].mean()) ** 2 for t in x) * weight[:, j].norm() ** 2 for j in range(12)])
    standard = (fluctuation - fluctuation.mean()) / fluctuation.std(correction=0)
    assert_close(flap(weight, torch.stack([x.mean(0), x.var(0)])), standard)
    assert flap(weight, torch.zeros(2, 12, dtype=torch.float64)).eq(0).all()  # inputs that never change
