"""Criteria against their formulas, written out entry by entry. Of those for whole units: `methods/test_structured.py`."""

import logging
import math
from dataclasses import replace

import pytest
import torch
from fixtures.models import problem
from torch.testing import assert_close

from recon.errors import ReconError
from recon.kernels.criteria import CRITERIA, Criterion, admm
from recon.kernels.criteria.structured import flap
from recon.kernels.patterns import Pattern, keep_all_but, keep_mask

PATTERNS = ["0", "0.3", "0.5", "0.9", "2:4", "1:8"]


STATISTICS = {  # of inputs (tokens, columns) to a weight of so many rows
    "none": lambda x, rows: None, "norm": lambda x, rows: x.square().mean(0).sqrt(), "gram": lambda x, rows: x.T @ x / len(x),
    "gradient": lambda x, rows: torch.cat([x.square().mean(0, keepdim=True).sqrt(), x[:rows].abs()]),  # any numbers will do
}  # fmt: skip


def prune(name, weight, inputs, pattern, scope="row", seed=0, **options):
    criterion = CRITERIA[name]
    statistics = STATISTICS[criterion.statistics](inputs, len(weight))
    generator = torch.Generator().manual_seed(seed)
    stored = weight.T.contiguous().T  # as GPT-2 has it
    return criterion.prune(stored, statistics, Pattern.parse(pattern), scope, generator, **options)


def norm(inputs, j):
    return math.sqrt(sum(token[j] ** 2 for token in inputs))


def ria_score(weight, inputs, i, j, a=0.5):
    column, row = sum(abs(row[j]) for row in weight), sum(abs(entry) for entry in weight[i])
    return (abs(weight[i][j]) / column + abs(weight[i][j]) / row) * norm(inputs, j) ** a


@pytest.mark.parametrize("scope", ["row", "matrix"])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name, score, options", [
    ("magnitude", lambda w, x, i, j: abs(w[i][j]), {}),
    ("wanda", lambda w, x, i, j: abs(w[i][j]) * norm(x, j), {}),
    ("wanda++", lambda w, x, i, j: abs(w[i][j]) * (norm(x, j) / math.sqrt(len(x)) + 100 * abs(x[i][j])), {}),
    ("ria", ria_score, {}), ("ria", ria_score, {"a": 1.0}),
])  # fmt: skip
def test_scores_follow_the_formula(name, score, options, pattern, scope):
    weight, inputs = problem()
    entries = weight.tolist(), inputs.tolist()
    expected = torch.tensor([[score(*entries, i, j, **options) for j in range(16)] for i in range(6)])
    pruned, mask = prune(name, weight, inputs, pattern, scope, **options)
    assert torch.equal(mask, keep_mask(expected, Pattern.parse(pattern), scope))
    assert torch.equal(pruned, torch.where(mask, weight, 0.0))


def sparsegpt_reference(weight, gram, pattern, scope, block_size, damping):
    """Algorithm 1 without its short cuts: a fresh inverse per column, and every update made at once."""
    weight, mask = weight.clone(), torch.ones_like(weight, dtype=torch.bool)
    rows, columns = weight.shape
    hessian = gram + damping * gram.diagonal().mean() * torch.eye(columns, dtype=gram.dtype)
    inverses = [torch.linalg.inv(hessian[j:, j:]) for j in range(columns)]
    pivots = torch.stack([inverse[0, 0] for inverse in inverses])
    width = pattern.m or block_size
    for j in range(columns):
        if j % width == 0:
            stop = min(j + width, columns)
            costs, together = weight[:, j:stop] ** 2 / pivots[j:stop], 1 if pattern.m or scope == "row" else rows
            zeros = pattern.zeros(together * stop) - pattern.zeros(together * j)
            mask[:, j:stop] = keep_all_but(costs.reshape(rows // together, -1), zeros).view_as(costs)
        for i in range(rows):
            if not mask[i, j]:
                weight[i, j:] -= weight[i, j].clone() / pivots[j] * inverses[j][0]
                weight[i, j] = 0.0
    return weight, mask


@pytest.mark.parametrize("scope", ["row", "matrix"])
@pytest.mark.parametrize("block_size", [1, 5, 16, 128])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_sparsegpt_follows_the_algorithm(pattern, block_size, scope):
    weight, inputs = problem(columns=48)
    gram = inputs.T @ inputs / len(inputs)
    expected = sparsegpt_reference(weight, gram, Pattern.parse(pattern), scope, block_size, damping=0.02)
    pruned, mask = prune("sparsegpt", weight, inputs, pattern, scope, block_size=block_size, damping=0.02)
    assert torch.equal(mask, expected[1])
    torch.testing.assert_close(pruned, expected[0], rtol=1e-9, atol=1e-10)


def test_sparsegpt_raises_the_damping_until_it_can_factorise_and_refuses_what_is_no_gram_matrix(caplog):
    weight, inputs = problem(rows=8, columns=32, tokens=4, dtype=torch.float32)  # a Gram matrix of rank 4
    with caplog.at_level(logging.WARNING, logger="recon"):
        pruned, mask = prune("sparsegpt", weight, inputs, "0.5", damping=1e-12)
    assert caplog.messages[0] == "SparseGPT: the Hessian is not positive definite at damping 1e-12; trying 1e-11"
    assert len(caplog.messages) > 1
    assert pruned.isfinite().all() and mask.sum(1).tolist() == [16] * 8
    with pytest.raises(ReconError, match="at any damping up to 1e.07"):
        CRITERIA["sparsegpt"].prune(torch.ones(2, 4), -torch.eye(4), Pattern.parse("0.5"), "row", None)


def admm_reference(weight, gram, pattern, scope):
    """The rounds as the page has them, V unscaled; then the exact weights of each row's survivors."""
    s, identity = gram.diagonal().sqrt(), torch.eye(len(gram), dtype=gram.dtype)
    H, B = gram / torch.outer(s, s) + 0.01 * identity, weight * s
    D, V = B, torch.zeros_like(B)
    for t in range(-1, 9):
        rho = 0.2 * 2 ** (max(t, 0) // 3)
        X = (B @ H - V + rho * D) @ torch.linalg.inv(H + rho * identity)
        over = 1.5 * X - 0.5 * D
        Z = over + V / rho
        mask = keep_mask(Z.abs(), pattern, scope)
        D = Z * mask
        V = V + rho * (over - D)
    best = torch.zeros_like(B)
    for i, kept in enumerate(mask):
        best[i, kept] = torch.linalg.solve(H[kept][:, kept], (B @ H)[i, kept])
    return D / s, best / s, mask


@pytest.mark.parametrize("scope", ["row", "matrix"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_admm_follows_the_equations(pattern, scope, monkeypatch):
    weight, inputs = problem(columns=24)
    last, best, mask = admm_reference(weight, inputs.T @ inputs / len(inputs), Pattern.parse(pattern), scope)
    plain = prune("admm", weight, inputs, pattern, scope)[0]  # by as many iterations as are taken
    assert pattern == "0" or (plain - best).norm() < 0.5 * (last - best).norm()
    for iterations, expected in ((0, last), (50, best)):
        monkeypatch.setattr(admm, "ITERATIONS", iterations)
        pruned, found = prune("admm", weight, inputs, pattern, scope)
        assert torch.equal(found, mask)
        torch.testing.assert_close(pruned, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("scope", ["row", "matrix"])
@pytest.mark.parametrize("pattern", ["0.25", "0.5", "2:4"])
@pytest.mark.parametrize("name, options", [("sparsegpt", {"block_size": 8}), ("admm", {})])
def test_inputs_that_are_always_zero_go_first(name, options, pattern, scope):
    (weight, inputs), dead = problem(), [0, 5, 6, 11]
    inputs[:, dead] = 0.0
    pruned, mask = prune(name, weight, inputs, pattern, scope, **options)
    assert_close(prune(name, weight, inputs / 2**10, pattern, scope, **options), (pruned, mask))  # their unit does not matter
    assert (pruned[:, dead] == 0).all()
    assert int((~mask).sum()) == Pattern.parse(pattern).zeros(weight.numel())
    assert pattern != "0.5" or not mask[:, dead].any()


def test_a_criterion_of_ones_own_reads_moments_and_must_score_each_weight():
    weight, moments = problem()[0], torch.rand(2, 16)
    own = Criterion("own", "moments", "row", "", "", lambda w, m, g: w.abs() * m[1].sqrt())
    mask = own.prune(weight, moments, Pattern.parse("0.5"), "row", None)[1]
    assert torch.equal(mask, keep_mask(weight.abs() * moments[1].sqrt(), Pattern.parse("0.5"), "row"))
    for score in (lambda *_: None, lambda w, *_: w[0], lambda w, *_: w > 0):
        with pytest.raises(ReconError, match="'own': its score is .*; allowed: a number for each weight"):
            replace(own, score=score).prune(weight, moments, Pattern.parse("0.5"), "row", None)
    moments[1, 2] = torch.nan
    with pytest.raises(ReconError, match="6 of 96 scores are NaN"):
        own.prune(weight, moments, Pattern.parse("0.5"), "row", None)


def test_units_whose_inputs_never_change_score_alike():
    weight, _ = problem()
    assert flap(weight, torch.zeros(2, 16, dtype=torch.float64)).eq(0).all()


def test_weights_compete_within_what_the_authors_compare_within():
    scopes = {"magnitude": "matrix", "wanda": "row", "wanda++": "row", "ria": "matrix", "sparsegpt": "matrix", "admm": "matrix"}
    scopes |= {"wanda-sp": "half-block", "flap": "model"}
    assert scopes == {name: each.scope for name, each in CRITERIA.items() if name not in ("none", "random")}


@pytest.mark.parametrize("sparsity", [0.5, 0.7])
def test_admm_chooses_by_a_fair_sample_of_many_weights(monkeypatch, sparsity):
    weight, inputs = problem(24, 128, 512)
    weight = weight[weight.norm(dim=1).argsort()] * torch.logspace(-1, 1, 24, dtype=torch.float64)[:, None]  # sorted by size
    gram, errors = inputs.T @ inputs / len(inputs), []
    for many in (2**16, 0):
        monkeypatch.setattr(admm, "MANY", many)
        difference = weight - prune("admm", weight, inputs, str(sparsity), "matrix")[0]
        errors.append(((difference @ gram) * difference).sum().item())
    assert errors[1] == pytest.approx(errors[0], rel=0.05)
