"""Adapters around the matrices of a model: nothing changes until they are trained, and merging loses no zero."""

import pytest
import torch
from fixtures.models import make_model
from torch.nn.utils import parametrize

from recon.kernels.adapters import ADAPTERS, ALPHA
from recon.methods.training import adapted
from recon.model.discovery import decompose
from recon.runtime.seeds import generator


def pruned(family: str):
    decoder = decompose(make_model(family))
    masks = {}
    random = torch.Generator().manual_seed(0)
    for name, matrix in decoder.matrices().items():
        masks[name] = torch.rand(matrix.weight.shape, generator=random) > 0.5
        with torch.no_grad():
            matrix.weight.mul_(masks[name])
    return decoder, masks


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_nothing_changes_until_it_is_trained(family, kind, tokens):
    decoder, masks = pruned(family)
    parameters, batch = dict(decoder.model.named_parameters()), tokens(2, 9)
    before = decoder.model(batch).logits
    with adapted(decoder.matrices().values(), masks, kind, 4, generator(0, "test")) as trained:
        torch.testing.assert_close(decoder.model(batch).logits, before)
        assert all(each.parameter.is_leaf and each.parameter.requires_grad for each in trained)
    assert torch.equal(decoder.model(batch).logits, before)
    after = dict(decoder.model.named_parameters())
    assert after.keys() == parameters.keys() and all(after[name] is parameters[name] for name in parameters)
    assert not any(parametrize.is_parametrized(module) for module in decoder.model.modules())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_merging_gives_the_formula_and_loses_no_zero(family, kind):
    decoder, masks = pruned(family)
    matrices = decoder.matrices()
    before = {name: matrix.weight.detach().clone() for name, matrix in matrices.items()}
    with adapted(matrices.values(), masks, kind, 4, generator(0, "test")) as trained:
        with torch.no_grad():
            for each in trained:
                each.parameter.normal_(generator=torch.Generator().manual_seed(each.parameter.numel()))
            low_rank = {name: b.parameter @ a.parameter for name, a, b in zip(matrices, trained[::2], trained[1::2], strict=True)}
    for name, matrix in matrices.items():
        product = ALPHA * matrix.oriented(low_rank[name])
        grown = before[name] * (1 + product) if kind == "scalelora" else before[name] + product
        torch.testing.assert_close(matrix.weight, grown * masks[name])
        assert not matrix.weight[~masks[name]].any() and not torch.equal(matrix.weight, before[name])


def test_an_error_inside_leaves_plain_modules():
    decoder, masks = pruned("llama")
    with (
        pytest.raises(RuntimeError, match="inside"),
        adapted(decoder.matrices().values(), masks, "masklora", 2, generator(0, "t")),
    ):
        raise RuntimeError("inside")
    assert not any(parametrize.is_parametrized(module) for module in decoder.model.modules())
