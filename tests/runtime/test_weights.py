"""Weights read one by one are those that `from_pretrained` reads."""

from pathlib import Path

import pytest
import torch
from fixtures.families import small_model
from fixtures.models import ENCODER_DECODERS, EXPERTS, FAMILIES, UNDIVIDED, make_model, random_tokens
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from recon.errors import ReconError
from recon.model.discovery import decompose
from recon.model.skeleton import Lazy, auto_class, is_placeholder, max_length, second, skeleton
from recon.runtime.device import resident
from recon.runtime.weights import open_model


def opened(folder: Path):
    return open_model(folder, AutoConfig.from_pretrained(folder), folder=folder / "work")


def whole_in(folder: Path):
    return auto_class(AutoConfig.from_pretrained(folder)).from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", [*FAMILIES, *UNDIVIDED, "mixtral", "marian (encoder-decoder)"])
def test_what_is_read_is_what_transformers_reads(family, tied, tmp_path):
    """Positions that marian computes are in no file."""
    model = small_model(family) if "marian" in family else make_model(family, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    whole, (model, weights) = whole_in(tmp_path), opened(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2 and not weights.surplus
    lazy = Lazy(model, weights.read)
    assert list(lazy.parameters) == [name for name, _ in whole.named_parameters()]
    assert all(is_placeholder(parameter) for parameter in model.parameters() if parameter.numel() > 1)
    with lazy.present(model.parameters()):
        for name, tensor in (*whole.state_dict().items(), *whole.named_buffers()):
            assert torch.equal(model.get_parameter_or_buffer(name), tensor), name


@pytest.mark.parametrize("stored", ["lm_head.weight", "model.embed_tokens.weight", "both", "two values"])
def test_what_is_tied_may_be_stored_under_any_of_its_names(stored, tmp_path):
    make_model("llama", tie_word_embeddings=True).save_pretrained(tmp_path)
    entries = load_file(file := tmp_path / "model.safetensors")
    embedding = entries.pop("model.embed_tokens.weight")
    names = ("model.embed_tokens.weight", "lm_head.weight") if " " in stored or stored == "both" else (stored,)
    entries |= {name: embedding + number * (stored == "two values") for number, name in enumerate(names)}
    save_file(entries, file, metadata={"format": "pt"})
    whole, (model, weights) = whole_in(tmp_path), opened(tmp_path)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == (names == (stored,))
    with Lazy(model, weights.read).present(model.parameters()):
        assert all(torch.equal(value, whole.state_dict()[name]) for name, value in model.state_dict().items())


def test_parameters_are_there_while_somebody_needs_them(tmp_path):
    make_model("llama").save_pretrained(tmp_path)
    model, weights = opened(tmp_path)
    lazy = Lazy(model, weights.read)
    head, norm = model.lm_head.weight, model.model.norm.weight
    with lazy.present([head]):
        with lazy.present([head, norm]):
            head.data.add_(1)
        assert not is_placeholder(head) and is_placeholder(norm)
    assert is_placeholder(head) and head.untyped_storage().nbytes() == 4
    with lazy.present([head]):  # what was done to it is gone, and the file is as it was
        assert torch.equal(head, load_file(tmp_path / "model.safetensors")["lm_head.weight"])
    others = [parameter for name, parameter in model.named_parameters() if "layers.1.mlp.up_proj" not in name]
    with lazy.present(others):  # what is not there is seen
        assert model(torch.tensor([[5, 6, 7]])).logits.isnan().all()


def test_the_longest_sequence_is_found_by_what_configs_call_it():
    found = {kind: max_length(AutoConfig.for_model(kind)) for kind in ("llama", "t5", "mpt", "whisper")}
    assert found == {"llama": 2048, "t5": None, "mpt": 2048, "whisper": 2 * 448}  # whisper: an encoder-decoder
    with pytest.raises(ReconError, match="no language model can be made of ViTConfig: Unrecognized"):
        skeleton(AutoConfig.for_model("vit"))


def test_made_up_weights_take_no_memory_and_differ():
    model = skeleton(AutoConfig.for_model("mixtral", hidden_size=64, num_hidden_layers=1, num_local_experts=4))
    lazy = Lazy(model, lambda names: iter(()))
    with lazy.made_up(), lazy.present(model.parameters()):
        for name, parameter in model.named_parameters():
            assert parameter.isfinite().all() and parameter.std() > 0
            small = parameter.ndim == 2 and not name.endswith("mlp.gate.weight")  # the router is a module of its own
            assert not small or parameter.untyped_storage().nbytes() <= 4 * sum(parameter.shape), name
        experts = model.model.layers[0].mlp.experts.down_proj
        assert not torch.equal(experts[0], experts[1])


LONGER = {"t5": {"num_layers": 4}, "bart": {"encoder_layers": 4, "decoder_layers": 3}}  # with several blocks of one kind in a row


@pytest.mark.parametrize("family", [*FAMILIES, *EXPERTS, *ENCODER_DECODERS])
def test_a_skeleton_is_taken_apart_like_the_model(family, tmp_path):
    """With made-up weights, and one block of each kind: the structure is the same, and so are the bits of every window."""
    whole = make_model(family, **LONGER.get(family, {}))
    whole.save_pretrained(tmp_path)
    model, weights = opened(tmp_path)
    expected, found = decompose(whole), decompose(model, lazy=Lazy(model, weights.read))
    assert family in ENCODER_DECODERS or found.halves == expected.halves  # whose blocks are not divided
    shapes = [{name: (m.weight.shape, m.share) for name, m in each.matrices().items()} for each in (expected, found)]
    assert found.groups == expected.groups and shapes[0] == shapes[1]
    tokens = random_tokens(2, 11)
    assert torch.equal(found.embed(tokens), hidden := expected.embed(tokens))
    with torch.no_grad():
        for window in expected.windows("block" if family in ENCODER_DECODERS else "half-block"):
            assert list(found.parameters(window)) == list(expected.parameters(window))
            with found.loaded(window):
                assert torch.equal(found.forward(window, hidden), expected.forward(window, hidden))
        tokens, hidden = expected.predicted(tokens), expected.predicted(hidden)
        assert torch.equal(found.logits(tokens, hidden), expected.logits(tokens, hidden))
    assert all(is_placeholder(parameter) for parameter in model.parameters() if parameter.numel() > 1)


def test_a_second_skeleton_takes_no_memory():
    model = skeleton(AutoConfig.for_model("llama", num_hidden_layers=1, tie_word_embeddings=True))
    model.tie_weights()
    Lazy(model, lambda names: iter(()))
    before = resident(anonymous=True)
    copy = second(model)
    assert sum(parameter.numel() for parameter in copy.parameters()) > 3e8
    assert resident(anonymous=True) < before + 2**27
    assert copy.lm_head.weight is copy.model.embed_tokens.weight is not model.lm_head.weight
    assert all(is_placeholder(parameter) for parameter in copy.parameters())
