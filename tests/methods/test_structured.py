"""Whole heads and neurons: all or nothing in the masks, gone from the function, and chosen as slow references choose."""

import copy

import pytest
import torch
from fixtures.models import FLOAT32, copied, inputs_of, zeros_stay

from recon import PruningConfig, ReconstructionConfig, decompose, prune, reconstruct
from recon.kernels.criteria import CRITERIA
from recon.methods.structured import find_units
from recon.model.modules import distance

STRUCTURED = [name for name, rule in CRITERIA.items() if rule.structured]
# family -> changes, units of attention, rows of each unit in the parts that each matrix that makes them is fused of, reader
ATTENTION = {
    "llama": ({}, 2, {"q_proj": [16], "k_proj": [8], "v_proj": [8]}, "o_proj"),
    "gpt2": ({}, 4, {"c_attn": [8, 8, 8]}, "attn.c_proj"),
    "opt": ({}, 4, {"q_proj": [8], "k_proj": [8], "v_proj": [8]}, "out_proj"),
    "phi3": ({}, 2, {"qkv_proj": [16, 8, 8]}, "o_proj"),
    "gpt_neox": ({"num_key_value_heads": None}, 4, {"query_key_value": [24]}, "attention.dense"),
    "phi": ({}, 2, {"q_proj": [16], "k_proj": [8], "v_proj": [8]}, "self_attn.dense"),
    "falcon": ({}, 2, {}, "dense"),  # one key/value head, fused with the queries of all: its rows stay
    "olmo2": ({}, 2, {"v_proj": [8]}, "o_proj"),  # a norm over all heads reads the rows of q and k
}


def pruned(decoder, tokens, criterion, pattern="0.3", **options):
    return prune(decoder, tokens(8, 20), PruningConfig(criterion=criterion, pattern=pattern, **options), execution=FLOAT32)


def lines(mask, dim):
    """Which lines of `mask` along `dim` are kept; each must be all or nothing."""
    assert torch.equal(mask.any(dim), mask.all(dim))
    return mask.any(dim)


@pytest.mark.parametrize("criterion", STRUCTURED)
@pytest.mark.parametrize("family", ATTENTION)
def test_key_value_groups_go_with_all_their_heads_or_stay(tiny, tokens, family, criterion):
    changes, units, makers, reader = ATTENTION[family]
    decoder = decompose(tiny(family, **changes))
    assert [half.count for half in find_units(decoder)][::2] == [units] * 3
    masks, gone = pruned(decoder, tokens, criterion, "0.5").masks, 0
    for index in range(3):
        [name] = [name for name in masks if f".{index}." in name and name.endswith(reader)]
        kept = lines(masks[name], 0).view(units, -1)
        assert torch.equal(kept.any(1), kept.all(1))
        gone += int((~kept.any(1)).sum())
        attention = [h.window for h in find_units(decoder) if h.window.blocks[0] == index and h.window.half == "attention"][0]
        for name in [*decoder.matrices(attention)][:-1]:
            rows, sizes = lines(masks[name], 1), makers.get(name.rpartition(".")[2])
            if sizes is None:
                assert rows.all()
                continue
            parts = [part.view(units, -1) for part in rows.split([size * units for size in sizes])]  # that are fused
            assert all(torch.equal(part, kept.any(1, keepdim=True).expand_as(part)) for part in parts)
    assert 0 < gone < 3 * units


@pytest.mark.parametrize("criterion", STRUCTURED)
@pytest.mark.parametrize("family", [*ATTENTION, "cohere", "gemma3", "glm4", "gptj", "starcoder2"])
@torch.no_grad()
def test_the_model_is_the_dense_one_with_units_silenced(tiny, tokens, family, criterion):
    decoder = decompose(tiny(family))
    model, batch = copy.deepcopy(decoder.model), tokens(8, 20)
    masks = pruned(decoder, tokens, criterion).masks
    readers = [half.reader.name for half in find_units(decompose(model))]
    means = {name: x.mean(0).float() for name, x in inputs_of(model, readers, batch).items()}
    before = model(input_ids=batch, use_cache=False).logits
    for name in readers:

        def silence(module, args, kept=lines(masks[name], 0), mean=means[name]):
            return torch.where(kept, args[0], mean if criterion == "flap" else torch.zeros_like(mean))

        model.get_submodule(name).register_forward_pre_hook(silence)
    expected = model(input_ids=batch, use_cache=False).logits
    assert distance(decoder.model(input_ids=batch, use_cache=False).logits, expected) < 1e-5
    assert distance(expected, before) > 1e-2  # which is what makes this a test


@pytest.mark.parametrize("pattern", ["0", "0.1", "0.2", "0.37", "0.5", "0.8"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gpt_neox"])
def test_sparsity_is_as_close_as_whole_units_allow(tiny, tokens, family, pattern):
    neuron = {"llama": 3, "gpt2": 2, "opt": 2, "gpt_neox": 2}[family] * 32  # weights
    for criterion, off in [("flap", neuron / 2), ("wanda-sp", 3 * neuron / 2)]:  # the same number in each of three blocks
        masks = pruned(decompose(tiny(family, **ATTENTION[family][0])), tokens, criterion, pattern).masks
        kept, total = sum(int(mask.sum()) for mask in masks.values()), sum(mask.numel() for mask in masks.values())
        assert abs(total - kept - float(pattern) * total) <= off + 1e-6


@pytest.mark.parametrize("statistics", ["sparse", "dense"])
def test_flap_compares_over_the_whole_dense_model(made, tokens, statistics):
    dense = made("llama")
    masks = pruned(copied(dense), tokens, "flap", "0.5", statistics=statistics).masks
    scores, kept = {}, {}
    for kind, units in (("o_proj", 2), ("down_proj", 64)):  # in each block
        inputs = inputs_of(dense.model, [name for name in masks if name.endswith(kind)], tokens(8, 20))
        columns = [x.var(0) * dense.matrices()[name].weight.double().square().sum(0) for name, x in inputs.items()]
        scores[kind] = torch.cat([((each - each.mean()) / each.std()).view(units, -1).mean(1) for each in columns])
        kept[kind] = torch.cat([lines(masks[name], 0).view(units, -1)[:, 0] for name in inputs])
        assert scores[kind][~kept[kind]].max() < scores[kind][kept[kind]].min()  # over all blocks
    # Heads and neurons are weighed against one another too, but for the last few that fill up the target.
    highest = scores["down_proj"][~kept["down_proj"]].max()
    assert (scores["o_proj"][kept["o_proj"]] > highest).sum() >= kept["o_proj"].sum() - 1
    assert scores["o_proj"][~kept["o_proj"]].max() < scores["down_proj"][kept["down_proj"]].min()


@pytest.mark.parametrize("granularity, train", [("half-block", "matrices"), ("block", "all"), ("matrix", "matrices")])
@pytest.mark.parametrize("criterion", STRUCTURED)
def test_reconstruction_keeps_units_gone_and_trains_the_new_biases(made, tokens, criterion, granularity, train):
    dense, student, samples = made("llama"), copied(made("llama")), tokens(16, 20, seed=1)
    masks = pruned(student, tokens, criterion).masks
    biases = {name: p.detach().clone() for name, p in student.model.named_parameters() if name.endswith("bias")}
    assert bool(biases) == (criterion == "flap")
    config = ReconstructionConfig(granularity=granularity, train=train, learning_rate=0.003, epochs=2)
    reports = reconstruct(student, dense, samples, config, masks=masks, execution=FLOAT32)
    before, after = (sum(r[kind]["calibration"] for r in map(vars, reports)) for kind in ("error_before", "error_after"))
    assert after < before and zeros_stay(student, masks)
    assert not any(torch.equal(student.model.get_parameter(name), bias) for name, bias in biases.items())


def test_no_neuron_of_as_many_as_opt_30b_has_is_silent_behind_a_relu(tiny):
    mlp = find_units(decompose(tiny("opt", ffn_dim=28672, num_hidden_layers=1)))[1]
    assert {name.rpartition(".")[2]: owner.tolist() for name, owner in mlp.rows.items()} == {"fc1": [*range(28672)]}


@pytest.mark.parametrize("statistics", ["sparse", "dense"])
def test_wanda_sp_reads_the_model_that_is_asked_for(made, tokens, statistics):
    dense = made("llama")
    student, model = copied(dense), copy.deepcopy(dense.model)
    masks = pruned(student, tokens, "wanda-sp", "0.5", statistics=statistics).masks
    for index in range(2) if statistics == "sparse" else ():  # the last block reads what is pruned so far
        model.model.layers[index].load_state_dict(student.model.model.layers[index].state_dict())
    counts = {half.reader.name: half.count for half in find_units(dense)[-2:]}
    for name, x in inputs_of(model, list(counts), tokens(8, 20)).items():
        products = dense.matrices()[name].weight.abs() * x.square().mean(0).sqrt()
        scores = products.sum(0).view(counts[name], -1).mean(1)
        kept = lines(masks[name], 0).view(counts[name], -1)[:, 0]
        assert scores[kept].min() > scores[~kept].max()
