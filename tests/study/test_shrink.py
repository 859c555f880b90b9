"""Shrunk checkpoints: ordinary, smaller, with the masked model's logits; what cannot be cut stays and is said."""

import pytest
import torch
from fixtures.models import FLOAT32, make_model, saved_model
from safetensors.torch import load_file
from test_refusals import refuse
from transformers import AutoModelForCausalLM

import recon
from recon.cli import main
from recon.methods.structured import find_units
from recon.model.modules import distance
from recon.study import shrink

BIASED = {"attention_bias": True, "mlp_bias": True}
WHOLE = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "intermediate_size": 32}
# family -> its configuration's fields after half of its units are gone; where heads have no fields, neurons alone go
CUT = dict.fromkeys(("llama", "qwen2", "gemma3", "phi3", "phi"), WHOLE) | {
    "opt": {"num_attention_heads": 4, "ffn_dim": 32}, "gpt2": {"n_head": 4, "n_inner": 64},
    **dict.fromkeys(("gpt_neox", "olmo2"), {"num_attention_heads": 4, "intermediate_size": 32}),  # olmo2: a norm over all heads
}  # fmt: skip


@pytest.fixture
def saved(tiny_folder, tmp_path):
    """Factory of checkpoints of models, each with the model and the folder's name."""
    return lambda model, name="model": saved_model(model, tiny_folder, tmp_path / name)


def pruned(model, tokens, criterion="wanda-sp", pattern="0.5"):
    recon.prune(model, tokens(8, 20), recon.PruningConfig(criterion=criterion, pattern=pattern), execution=FLOAT32)
    return model


def opened(folder, **options):
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(report.values())
    return model.eval()


@torch.no_grad()
def gap(model, other, tokens):
    return distance(*(each(input_ids=tokens(4, 30, seed=3)).logits for each in (model, other)))


@pytest.mark.parametrize("family", CUT)
def test_the_smaller_model_is_the_masked_one(tiny, tokens, saved, tmp_path, family):
    fields, model = CUT[family], pruned(tiny(family), tokens)
    said = recon.shrink(saved(model), tmp_path / "small")
    small = opened(tmp_path / "small")
    assert gap(small, model, tokens) < 1e-4
    assert {name: getattr(small.config, name) for name in fields} == fields
    assert ("stay as zeros" in said[0]) == (len(fields) == 2) and "stay" not in said[1]
    # Nothing that is left is zero as a whole, but for heads that have to stay and neurons that fill up to 32.
    for half in find_units(recon.decompose(small)):
        kept = (half.reader.weight != 0).view(len(half.reader.weight), half.count, -1).any(2).any(0)
        assert kept.all() or len(fields) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_unequal_layers_are_as_wide_as_the_widest_and_biases_survive(tiny, tokens, saved, tmp_path, dtype):
    model = tiny("llama", intermediate_size=160, num_attention_heads=8, num_key_value_heads=4, **BIASED, tie_word_embeddings=True)
    model = pruned(model, tokens, "flap", "0.4").to(dtype)
    halves = find_units(recon.decompose(tiny("llama", intermediate_size=160, num_attention_heads=8, num_key_value_heads=4)))
    weights = [model.get_submodule(half.reader.name).weight for half in halves]
    kept = [int((w != 0).view(len(w), half.count, -1).any(2).any(0).sum()) for w, half in zip(weights, halves)]
    assert len(set(kept[::2])) > 1 and len(set(kept[1::2])) > 1  # which is what makes this a test
    recon.shrink(folder := saved(model), tmp_path / "small")
    small = opened(tmp_path / "small", dtype="auto")
    assert small.dtype == dtype
    assert small.config.intermediate_size == -(-max(kept[1::2]) // 32) * 32 < 160
    groups = max(kept[::2]) if max(kept[::2]) != 3 else 4  # 6 heads do not divide the hidden size, which Llama asks for
    assert small.config.num_key_value_heads == groups and small.config.num_attention_heads == 2 * groups
    assert gap(*(opened(path, dtype=torch.float32) for path in (folder, tmp_path / "small")), tokens) < 1e-4
    for name in ("o_proj", "down_proj"):
        found = [{n: b for n, b in each.named_parameters() if n.endswith(f"{name}.bias")} for each in (model, small)]
        assert found[0] and all(torch.equal(bias, found[1][n]) for n, bias in found[0].items())


def test_what_cannot_be_made_smaller_is_refused_and_says_why(tiny, tokens, saved, tmp_path, capsys):
    out, model = str(tmp_path / "small"), pruned(tiny("llama"), tokens, "wanda")
    assert "would be as large as before: no key/value heads are zeros as a whole" in refuse(["shrink", saved(model), out], capsys)
    model = tiny("llama")
    model.model.layers[1].mlp.down_proj.weight.data[:, :60] = 0.0
    said = refuse(["shrink", saved(model, "one"), out], capsys)
    assert "layers keep 64 4 64 of 64 neurons, and they stay as zeros: all have to be as wide as the widest" in said
    assert "experts" in refuse(["shrink", saved(make_model("mixtral"), "experts"), out], capsys)
    assert not (tmp_path / "small").exists()


@pytest.mark.parametrize("criterion", ["wanda-sp", "flap"])
def test_a_run_is_shrunk_packed_and_loaded(small, tmp_path, capsys, criterion):
    """FLAP's biases get a place in the configuration."""
    run = ["--criterion", criterion, "--pattern", "0.5", "--save", str(tmp_path / "run"), "--save-format", "packed"]
    main(["run", *small, *run])
    main(["shrink", str(tmp_path / "run"), str(tmp_path / "small")])
    assert "of 64 neurons; the configuration has intermediate_size 32" in capsys.readouterr().out
    (whole, _), (less, tokenizer) = (recon.load(str(tmp_path / name)) for name in ("run", "small"))
    batch = tokenizer("Ba de fi go", return_tensors="pt")["input_ids"]
    assert distance(less(input_ids=batch).logits, whole(input_ids=batch).logits) < 1e-4
    assert "cut out" in (tmp_path / "small" / "README.md").read_text()
    assert set(load_file(tmp_path / "small" / "model.safetensors")) <= set(whole.state_dict())


def test_logits_that_would_be_others_are_refused(tiny, tokens, saved, tmp_path, monkeypatch):
    right = shrink._cuts
    monkeypatch.setattr(shrink, "_cuts", lambda decoder, halves, kept: right(decoder, halves, [each.flip(0) for each in kept]))
    with pytest.raises(recon.ReconError, match="gives other logits"):
        recon.shrink(saved(pruned(tiny("llama"), tokens)), tmp_path / "small")
    assert not (tmp_path / "small").exists()
