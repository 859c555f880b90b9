"""Patterns, and masks against sorting by hand."""

import pytest
import torch

from recon.kernels.patterns import Pattern, found_pattern, keep_mask


def random_scores(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("levels", [None, 3], ids=["distinct", "tied"])
@pytest.mark.parametrize("text", ["0", "0.01", "0.3", "0.5", "0.77", "0.99", "1:2", "2:4", "1:4", "3:5", "4:8"])
@pytest.mark.parametrize("scope", ["row", "matrix"])
def test_masks_are_those_of_sorting_each_group(scope, text, levels):
    pattern = Pattern.parse(text)
    scores = random_scores(7, 40 if pattern.m else 31)
    scores = (scores * levels).floor() if levels else scores
    groups = scores.reshape(-1, pattern.m or (31 if scope == "row" else 7 * 31)).tolist()
    zeros = pattern.m - pattern.n if pattern.m else round(float(text) * len(groups[0]))
    dropped = [{place for _, place in sorted(zip(group, range(len(group))))[:zeros]} for group in groups]  # of equals, the first
    expected = [[place not in gone for place in range(len(group))] for group, gone in zip(groups, dropped)]
    assert keep_mask(scores, pattern, scope).flatten().tolist() == sum(expected, [])


@pytest.mark.parametrize("text", ["1:2", "2:4", "1:4", "4:8", "5:8", "0.5", "0.7", "0.3333"])
def test_the_pattern_of_masks_is_found(text):
    pattern = Pattern.parse(text)
    masks = [keep_mask(random_scores(30, 64, seed), pattern, "matrix") for seed in range(3)]
    found = found_pattern([*masks, torch.ones(4, 5, dtype=torch.bool)])  # what is not pruned has no part in it
    assert str(found) == text if pattern.m else abs(found.sparsity - pattern.sparsity) < 5e-4 and found.m is None
    # One group that keeps more makes it unstructured; a few zeros more do not.
    masks[1][0] = False
    assert found_pattern(masks).m is None or pattern.m
    masks[1][0] = True
    assert found_pattern(masks).m is None
    masks[1] = keep_mask(random_scores(30, 64, 1), pattern, "matrix")
    masks[1][:5] = False  # too many more zeros for chance
    assert found_pattern(masks).m is None


def test_the_pattern_of_masks_that_drop_nothing_or_no_whole_groups():
    assert found_pattern([torch.ones(3, 4, dtype=torch.bool)]) == Pattern(0.0)
    odd = torch.tensor([[True, False, True, False, True, False]])  # 1:2, but no 2:4: six columns
    assert str(found_pattern([odd])) == "1:2"
    mixed = [keep_mask(random_scores(8, 16, seed), Pattern.parse(text), "row") for seed, text in enumerate(("2:4", "4:8"))]
    assert str(found_pattern(mixed)) == "4:8"
