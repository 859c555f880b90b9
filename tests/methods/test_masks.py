"""Masks of a model: read from its zeros, checked, saved and loaded."""

import pytest
import torch
from fixtures.models import FLOAT32, make_model

import recon
from recon.config import PruningConfig


@pytest.fixture(scope="module", params=["llama", "gpt2", "mixtral"])
def pruned(request):
    """A pruned model, and its masks."""
    model = make_model(request.param)
    return model, recon.prune(model, None, PruningConfig(criterion="magnitude", pattern="2:4"), execution=FLOAT32).masks


def test_masks_come_back_from_a_file_as_they_were(pruned, tmp_path):
    _, masks = pruned
    recon.save_masks(masks, tmp_path / "deep" / "masks.safetensors")
    found = recon.load_masks(str(tmp_path / "deep" / "masks.safetensors"))
    assert found.keys() == masks.keys()
    for name, mask in masks.items():
        assert found[name].dtype == torch.bool and torch.equal(found[name], mask)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["masks.safetensors"]
