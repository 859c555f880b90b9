"""Masks of a model: read from its zeros, checked, saved and loaded."""

import pytest
import torch
from fixtures.models import FLOAT32, make_model
from safetensors.torch import save_file

import recon
from recon.config import PruningConfig, ReconstructionConfig
from recon.errors import ReconError
from recon.methods.masks import check_trainable, keep_masks
from recon.model.discovery import decompose


@pytest.fixture(scope="module", params=["llama", "gpt2", "mixtral"])
def pruned(request):
    """A pruned model, and its masks."""
    model = make_model(request.param)
    return model, recon.prune(model, None, PruningConfig(criterion="magnitude", pattern="2:4"), execution=FLOAT32).masks


def test_masks_are_read_from_zeros(pruned):
    model, masks = pruned
    found = keep_masks(decompose(model), None)
    assert found.keys() == masks.keys() and all(torch.equal(found[name], mask) for name, mask in masks.items())


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


def test_what_is_no_file_of_masks_is_refused_by_name(tmp_path):
    with pytest.raises(ReconError, match="gone"):
        recon.load_masks(tmp_path / "gone")
    (tmp_path / "text").write_text("not a mask")
    with pytest.raises(ReconError, match="text"):
        recon.load_masks(tmp_path / "text")
    save_file({"up": torch.ones(2, 3)}, tmp_path / "weights")
    with pytest.raises(ReconError, match="weights.*'up' is torch.float32.*bool"):
        recon.load_masks(tmp_path / "weights")


def test_masks_that_do_not_fit_are_refused_by_name():
    decoder = decompose(make_model("llama"))
    masks = keep_masks(decoder, None)
    name = "model.layers.1.mlp.down_proj"
    with pytest.raises(ReconError, match=rf"'{name}'.*\(3,\).*\(32, 64\)"):
        keep_masks(decoder, masks | {name: torch.ones(3, dtype=torch.bool)})
    with pytest.raises(ReconError, match=rf"'{name}'.*None.*\(32, 64\)"):
        keep_masks(decoder, {other: mask for other, mask in masks.items() if other != name})
    with pytest.raises(ReconError, match="'model.embed_tokens.weight' is torch.float16.*float32"):
        check_trainable(decompose(make_model("llama").half()))
