"""Neurons in another order: the same function, N:M masks that keep more, and nearly the best order there is."""

import pytest
import torch
from fixtures.models import FLOAT32, copied

from recon import decompose
from recon.kernels.patterns import Pattern, keep_mask
from recon.methods.reorder import better_order, reorder_neurons
from recon.methods.statistics import gather
from recon.model.modules import distance, probe_tokens


def kept(scores, order, n, m):
    """The sum of the `n` largest of every `m` scores of each row, of columns in this order."""
    return sum(sorted(group)[-i - 1] for row in scores[:, order].tolist() for group in zip(*[iter(row)] * m) for i in range(n))


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 4), (1, 2)])
def test_the_order_comes_near_the_best_of_all(n, m):
    shares = []
    for seed in range(12):
        draw = torch.Generator().manual_seed(seed)
        scores = torch.rand(6, 8, generator=draw, dtype=torch.float64) * torch.rand(8, generator=draw) ** 2
        order = better_order(scores, Pattern(1 - n / m, n, m)).tolist()
        # So many draws meet all divisions into groups, of which there are 35 or 105.
        values = [kept(scores, torch.randperm(8, generator=draw), n, m) for _ in range(500)]
        assert sorted(order) == list(range(8))
        shares.append((kept(scores, order, n, m) - min(values)) / (max(values) - min(values)))
        assert kept(scores, order, n, m) >= kept(scores, list(range(8)), n, m) - 1e-9
    assert sum(share > 1 - 1e-9 for share in shares) >= 4 and sum(shares) / len(shares) > 0.9  # an order by lot: 0.5 to 0.7


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "phi3", "gpt_neox"])  # fused, transposed, biases, parallel
def test_the_model_computes_the_same_and_masks_keep_more(tiny, tokens, family):
    dense = decompose(tiny(family))
    with torch.no_grad():
        for name, parameter in dense.model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    samples, pattern, other, kept_scores = tokens(6, 20), Pattern.parse("2:4"), copied(dense), {}
    reorder_neurons(other, samples, pattern, FLOAT32)
    read = probe_tokens(dense.model)
    assert distance(other.model(read).logits, dense.model(read).logits) < 1e-5
    moved = [name for name, matrix in dense.matrices().items() if not torch.equal(matrix.weight, other.matrices()[name].weight)]
    for decoder in (dense, other):
        window = decoder.windows("block")[0]
        _, norms, _ = gather(FLOAT32, decoder, window, decoder.embed(samples), "norm")
        for name, norm in norms.items():
            scores = decoder.matrices()[name].weight.abs() * norm
            kept_scores.setdefault(name, []).append((scores * keep_mask(scores, pattern, "row")).sum().item())
    reader = [*dense.matrices(dense.windows("block")[0])][-1]
    assert reader in moved and len(moved) >= 2 * len(dense.blocks)  # what makes neurons, and what reads them
    before, after = kept_scores.pop(reader)
    assert after > 1.001 * before
    assert all(after == pytest.approx(before, rel=1e-4) for before, after in kept_scores.values())  # rows compete alone
