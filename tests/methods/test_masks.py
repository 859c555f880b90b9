"""Masks of a model: read from its zeros, checked, saved and loaded."""

import pytest
import torch
from fixtures.models import FLOAT32, make_model

import recon
from recon.config import PruningConfig, ReconstructionConfig


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


def test_loaded_masks_are_obeyed(tokens, tmp_path):
    dense, model = make_model("llama"), make_model("llama")
    masks = recon.prune(model, tokens(4, 12), PruningConfig(), execution=FLOAT32).masks
    recon.save_masks(masks, tmp_path / "masks")
    name = "model.layers.0.mlp.up_proj"
    with torch.no_grad():
        model.get_submodule(name).weight[masks[name]] = 0.0  # kept, and zero for now
    config = ReconstructionConfig(granularity="block")
    recon.reconstruct(model, dense, tokens(4, 12), config, masks=recon.load_masks(tmp_path / "masks"), execution=FLOAT32)
    assert torch.equal(model.get_submodule(name).weight != 0, masks[name])
