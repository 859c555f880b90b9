"""Weights read one by one are those that `from_pretrained` reads; what is not read is seen; files are whole or not there."""

import errno
import os
from pathlib import Path

import pytest
import torch
from fixtures.families import small_model
from fixtures.models import ENCODER_DECODERS, EXPERTS, FAMILIES, UNDIVIDED, make_model, random_tokens
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.core_model_loading import revert_weight_conversion

from recon.errors import ReconError
from recon.model.discovery import decompose
from recon.model.skeleton import Lazy, is_placeholder, made_up, second, skeleton
from recon.runtime import weights
from recon.runtime.device import resident_anonymous
from recon.runtime.storage import write_safetensors


def opened(folder: Path):
    return weights.open_model(AutoConfig.from_pretrained(folder), sorted(Path(folder).glob("*.safetensors")))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", [*FAMILIES, *UNDIVIDED, "mixtral"])
def test_what_is_read_is_what_transformers_reads(family, tied, tmp_path):
    make_model(family, tie_word_embeddings=tied).save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    whole = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    model, checkpoint = opened(tmp_path)
    lazy = Lazy(model, checkpoint.read)
    assert list(lazy.parameters) == [name for name, _ in whole.named_parameters()]
    assert all(is_placeholder(parameter) for parameter in model.parameters() if parameter.numel() > 1)
    with lazy.present(model.parameters()):
        for name, tensor in whole.state_dict().items():
            assert torch.equal(model.state_dict()[name], tensor), name
        stored = revert_weight_conversion(model, {name: p.data for name, p in lazy.parameters.items()})
    for name, tensor in whole.named_buffers():
        assert torch.equal(model.get_buffer(name), tensor), name
    expected = {}
    for file in tmp_path.glob("*.safetensors"):
        expected |= load_file(file)
    parameters = {name for name in expected if name in stored}
    assert parameters == set(stored) and all(torch.equal(expected[name], stored[name]) for name in parameters)


def test_a_checkpoint_with_two_values_for_what_its_configuration_ties(tmp_path):
    make_model("llama", tie_word_embeddings=True).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    entries = load_file(file)
    for head in (entries["model.embed_tokens.weight"].clone(), torch.randn(99, 32)):
        save_file(entries | {"lm_head.weight": head}, file, metadata={"format": "pt"})
        whole = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        model, checkpoint = opened(tmp_path)
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == (
            whole.lm_head.weight is whole.model.embed_tokens.weight
        )
        with Lazy(model, checkpoint.read).present([model.lm_head.weight]):
            assert torch.equal(model.lm_head.weight, whole.lm_head.weight)


def test_parameters_that_are_computed_are_in_no_file(tmp_path):
    small_model("marian (encoder-decoder)").save_pretrained(tmp_path)
    whole = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, dtype=torch.float32)
    model, checkpoint = opened(tmp_path)
    assert set(checkpoint.computed) == {f"model.{half}.embed_positions.weight" for half in ("encoder", "decoder")}
    with Lazy(model, checkpoint.read).present(model.parameters()):
        for name, tensor in whole.state_dict().items():
            assert torch.equal(model.state_dict()[name], tensor), name


@pytest.mark.parametrize("stored", ["lm_head.weight", "model.embed_tokens.weight"])
def test_what_is_tied_may_be_stored_under_any_of_its_names(stored, tmp_path):
    made = make_model("llama", tie_word_embeddings=True)
    made.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    entries = load_file(file)
    entries[stored] = entries.pop("model.embed_tokens.weight")
    save_file(entries, file, metadata={"format": "pt"})
    model, checkpoint = opened(tmp_path)
    with Lazy(model, checkpoint.read).present(model.parameters()):
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert all(torch.equal(value, made.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda w: w.to(torch.float8_e4m3fn), "is stored as F8_E4M3; allowed: F64, F32, BF16, F16"),
        (lambda w: (w * 100).to(torch.int8), "is stored as I8; allowed"),
        ("config", r"weights are quantised \(fp8\)"),
    ],
    ids=["float8", "int8", "configuration"],
)
def test_quantised_weights_are_refused(change, said, tmp_path):
    make_model("llama").save_pretrained(tmp_path)
    file, name = tmp_path / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    entries = load_file(file) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}  # which old files have
    save_file(entries, file, metadata={"format": "pt"})
    opened(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    if change == "config":
        config.quantization_config = {"quant_method": "fp8"}
    else:
        entries |= {name: change(entries[name])}
    save_file(entries, file, metadata={"format": "pt"})
    with pytest.raises(ReconError, match=said):
        weights.open_model(config, [file])


def test_half_precision_becomes_float32(tmp_path):
    make_model("llama").bfloat16().save_pretrained(tmp_path)
    model, checkpoint = opened(tmp_path)
    [(_, found)] = checkpoint.read(["lm_head.weight"])
    assert found.dtype == torch.float32
    assert torch.equal(found.bfloat16(), load_file(tmp_path / "model.safetensors")["lm_head.weight"])


def test_parameters_are_there_while_somebody_needs_them(tmp_path):
    make_model("llama").save_pretrained(tmp_path)
    model, checkpoint = opened(tmp_path)
    reads = []

    def read(names):
        reads.extend(names)
        return checkpoint.read(names)

    lazy = Lazy(model, read)
    head, norm = model.lm_head.weight, model.model.norm.weight
    with lazy.present([head]):
        with lazy.present([head, norm]):
            head.data.add_(1)
        assert not is_placeholder(head) and is_placeholder(norm)
    assert reads == ["lm_head.weight", "model.norm.weight"]
    assert is_placeholder(head) and head.untyped_storage().nbytes() == 4
    with lazy.present([head]):  # what was done to it is gone, and the file is as it was
        assert torch.equal(head, load_file(tmp_path / "model.safetensors")["lm_head.weight"])


def test_what_is_not_there_is_seen(tmp_path):
    make_model("llama").save_pretrained(tmp_path)
    model, checkpoint = opened(tmp_path)
    lazy = Lazy(model, checkpoint.read)
    with lazy.present(p for name, p in model.named_parameters() if "layers.1.mlp.up_proj" not in name):
        assert model(torch.tensor([[5, 6, 7]])).logits.isnan().all()


@pytest.mark.parametrize("change", ["missing", "shape"])
def test_weights_that_do_not_fit_are_named(change, tmp_path):
    make_model("llama").save_pretrained(tmp_path)
    entries, name = load_file(tmp_path / "model.safetensors"), "model.layers.1.mlp.up_proj.weight"
    wrong = {key: value for key, value in entries.items() if key != name} | (
        {name: torch.ones(3, 32)} if change == "shape" else {}
    )
    save_file(wrong, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ReconError, match=rf"{name}.*(\(3, 32\), not \(64, 32\))?"):
        model, checkpoint = opened(tmp_path)
        list(checkpoint.read([name]))


def test_a_damaged_file_is_named(tmp_path):
    make_model("llama").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ReconError, match=r"model\.safetensors' is not a whole safetensors file"):
        opened(tmp_path)


def test_made_up_weights_take_no_memory_and_differ(tmp_path):
    model = skeleton(AutoConfig.for_model("mixtral", hidden_size=64, num_hidden_layers=1, num_local_experts=4))
    lazy = Lazy(model, lambda names: made_up(lazy.parameters)(names))
    with lazy.present(model.parameters()):
        for name, parameter in model.named_parameters():
            assert parameter.isfinite().all() and parameter.std() > 0
            assert parameter.ndim != 2 or parameter.untyped_storage().nbytes() <= 4 * sum(parameter.shape), name
        experts = model.model.layers[0].mlp.experts.down_proj
        assert not torch.equal(experts[0], experts[1])


def test_a_file_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    file, old, new = tmp_path / "a.safetensors", {"x": torch.zeros(3)}, {"x": torch.ones(3)}
    write_safetensors(file, old)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="No space left"):
            write_safetensors(file, new)
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
    with safe_open(file, framework="pt") as opened_file:
        assert torch.equal(opened_file.get_tensor("x"), old["x"])
    write_safetensors(file, new)
    assert torch.equal(load_file(file)["x"], new["x"])


LONGER = {"t5": {"num_layers": 4}, "bart": {"encoder_layers": 4, "decoder_layers": 3}}  # with several blocks of one kind in a row


@pytest.mark.parametrize("family", [*FAMILIES, *EXPERTS, *ENCODER_DECODERS])
def test_a_skeleton_is_taken_apart_like_the_model(family, tmp_path):
    """With made-up weights, and one block of each kind: the structure is the same, and so are the bits of every window."""
    whole = make_model(family, **LONGER.get(family, {}))
    whole.save_pretrained(tmp_path)
    model, checkpoint = opened(tmp_path)
    lazy = Lazy(model, checkpoint.read)
    expected, found = decompose(whole), decompose(model, lazy=lazy)
    assert found.groups == expected.groups
    assert family in ENCODER_DECODERS or found.halves == expected.halves  # whose blocks are not divided
    shapes = [{name: (m.weight.shape, m.share) for name, m in each.matrices().items()} for each in (expected, found)]
    assert shapes[0] == shapes[1]
    tokens = random_tokens(2, 11)
    hidden = expected.embed(tokens)
    assert torch.equal(found.embed(tokens), hidden)
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
    before = resident_anonymous()
    copy = second(model)
    assert sum(parameter.numel() for parameter in copy.parameters()) > 3e8
    assert resident_anonymous() < before + 2**27
    assert copy.lm_head.weight is copy.model.embed_tokens.weight is not model.lm_head.weight
    assert all(is_placeholder(parameter) for parameter in copy.parameters())
