"""Models taken apart and put together again, family by family."""

import copy

import pytest
import torch
from fixtures.models import FAMILIES, PARALLEL, SEQUENTIAL, UNDIVIDED
from torch import nn
from torch.testing import assert_close
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.pytorch_utils import Conv1D

from recon.errors import ReconError
from recon.model.blocks import SHAPES
from recon.model.discovery import decompose
from recon.model.windows import Window

# How many matrices share an input, group by group, as they run through the first block.
GROUPS = {
    "phi3": [1, 1, 1, 1],  # one matrix for q, k, v; one for gate and up
    "glm4": [3, 1, 1, 1],
    "starcoder2": [3, 1, 1, 1],  # an MLP without a gate
    "opt": [3, 1, 1, 1],
    "gpt2": [1, 1, 1, 1],
    "gpt_neox": [1, 1, 1, 1],
    "falcon": [1, 1, 1, 1],
    "phi": [3, 1, 1, 1],
    "gptj": [3, 1, 1, 1],
}
GRANULARITIES = ["matrix", "half-block", "block", "2-blocks", "quarter", "model"]
LLAMA_ATTENTION = {
    "input_layernorm.weight",
    "self_attn.q_proj.weight",
    "self_attn.k_proj.weight",
    "self_attn.v_proj.weight",
    "self_attn.o_proj.weight",
}
LLAMA_MLP = {"post_attention_layernorm.weight", "mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"}


@pytest.fixture(scope="module")
def made(tiny):
    """Family -> its decoder, made once; tests that use it leave the weights as they are."""
    kept = {}

    def make(family):
        if family not in kept:
            kept[family] = decompose(tiny(family))
        return kept[family]

    return make


def own_logits(model, tokens):
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits


@torch.no_grad()
def run(decoder, tokens, granularity):
    hidden = decoder.embed(tokens)
    for window in decoder.windows(granularity):
        hidden = decoder.forward(window, hidden)
    return decoder.logits(tokens, hidden)


def assert_same_output(found, expected):
    assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def is_untouched(model):
    return not any("forward" in vars(module) for module in model.modules())


# ---- pieces give the model back


@pytest.mark.parametrize("family", FAMILIES | UNDIVIDED)
@pytest.mark.parametrize("granularity", ["block", "2-blocks", "model"])
def test_blocks_composed_are_the_model(made, tokens, family, granularity):
    decoder, batch = made(family), tokens(3, 13)
    assert_same_output(run(decoder, batch, granularity), own_logits(decoder.model, batch))
    assert is_untouched(decoder.model)


@pytest.mark.parametrize("family", SEQUENTIAL)
def test_sequential_halves_chain(made, tokens, family):
    decoder, batch = made(family), tokens(3, 13)
    assert {halves.layout for halves in decoder.halves} == {"sequential"}
    assert_same_output(run(decoder, batch, "half-block"), own_logits(decoder.model, batch))


@pytest.mark.parametrize("family", PARALLEL)
@torch.no_grad()
def test_increments_of_parallel_halves_add_up(made, tokens, family):
    decoder, batch = made(family), tokens(3, 13)
    assert {halves.layout for halves in decoder.halves} == {"parallel"}
    hidden, windows = decoder.embed(batch), decoder.windows("half-block")
    for attention, mlp in zip(windows[::2], windows[1::2], strict=True):
        hidden = decoder.forward(attention, hidden) + decoder.forward(mlp, hidden) - hidden
    assert_same_output(decoder.logits(batch, hidden), own_logits(decoder.model, batch))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_halves_mix_tokens_as_named(made, tokens, family):
    decoder = made(family)
    hidden = decoder.embed(tokens(2, 10))
    changed = hidden.clone()
    changed[:, 0] = changed[:, 0].flip(-1)
    for window in decoder.windows("half-block")[:2]:
        later = decoder.forward(window, hidden)[:, 1:], decoder.forward(window, changed)[:, 1:]
        assert torch.equal(*later) == (window.half == "mlp")


@torch.no_grad()
def test_llama_halves_by_hand(made, tokens):
    decoder = made("llama")
    hidden, block = decoder.embed(tokens(3, 13)), decoder.blocks[1]
    expected = hidden + block.mlp(block.post_attention_layernorm(hidden))
    assert_close(decoder.forward(Window(range(1, 2), half="mlp"), hidden), expected)
    positions = decoder.model.model.rotary_emb(hidden, torch.arange(13)[None])
    attention = block.self_attn(block.input_layernorm(hidden), position_embeddings=positions, attention_mask=None)[0]
    assert_close(decoder.forward(Window(range(1, 2), half="attention"), hidden), hidden + attention)


@torch.no_grad()
def test_embed_and_inputs_are_what_the_model_reads(made, tokens):
    decoder, batch, seen = made("llama"), tokens(3, 13), {}
    names = {"block": "model.layers.0", "q": "model.layers.0.self_attn.q_proj", "down": "model.layers.0.mlp.down_proj"}
    handles = [
        decoder.model.get_submodule(name).register_forward_pre_hook(lambda m, args, key=key: seen.update({key: args[0]}))
        for key, name in names.items()
    ]
    own_logits(decoder.model, batch)
    for handle in handles:
        handle.remove()
    hidden = decoder.embed(batch)
    assert torch.equal(hidden, seen["block"])
    for key in ("q", "down"):
        assert_close(decoder.inputs(Window(range(1), matrices=(names[key],)), hidden), seen[key])


@pytest.mark.parametrize("family", FAMILIES)
def test_inputs_of_matrices_keep_samples_apart(made, tokens, family):
    """Also in OPT, whose MLP reads all tokens of a batch in one row."""
    decoder, batch = made(family), tokens(3, 13)
    hidden = decoder.embed(batch)
    for window in decoder.windows("matrix")[: len(decoder.groups[0])]:
        width = decoder.matrices()[window.matrices[0]].weight.shape[1]
        x = decoder.inputs(window, hidden)
        assert x.shape == (3, 13, width)
        assert_close(decoder.inputs(window, hidden[1:2]), x[1:2])


def test_gradients_reach_the_window_alone(tiny, tokens):
    decoder = decompose(tiny("llama"))
    window = decoder.windows("half-block")[3]
    decoder.forward(window, decoder.embed(tokens(2, 9))).square().sum().backward()
    with_gradient = {name for name, p in decoder.model.named_parameters() if p.grad is not None and p.grad.any()}
    assert with_gradient == set(decoder.parameters(window))


# ---- what is in a window


def test_llama_parameters_of_halves(made):
    decoder = made("llama")
    attention, mlp = decoder.windows("half-block")[2:4]
    assert set(decoder.parameters(attention)) == {f"model.layers.1.{name}" for name in LLAMA_ATTENTION}
    assert set(decoder.parameters(mlp)) == {f"model.layers.1.{name}" for name in LLAMA_MLP}


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_windows_partition_the_blocks(made, family, granularity):
    decoder = made(family)
    windows = decoder.windows(granularity)
    trained = [name for window in windows for name in decoder.parameters(window)]
    assert len(trained) == len(set(trained))
    of_blocks = {f"{decoder.path}.{name}": p for name, p in decoder.blocks.named_parameters()}
    if granularity != "matrix":
        assert set(trained) == set(of_blocks)
    for window in windows:
        for name, parameter in decoder.parameters(window).items():
            assert parameter is of_blocks[name]
    matrices = [name for window in windows for name in decoder.matrices(window)]
    assert len(matrices) == len(set(matrices))
    assert set(matrices) == set(decoder.matrices())
    assert {f"{name}.weight" for name in matrices} <= set(trained)


@pytest.mark.parametrize("family", FAMILIES | UNDIVIDED)
def test_every_matrix_of_the_blocks_is_in_one_group(made, family):
    decoder = made(family)
    grouped = [name for groups in decoder.groups for group in groups for name in group]
    expected = [n for n, m in decoder.model.named_modules() if isinstance(m, nn.Linear | Conv1D) and n.startswith(decoder.path)]
    assert sorted(grouped) == sorted(expected)
    sizes = [len(group) for group in decoder.groups[0]]
    assert sizes == ([1, 1, 1, 1] if family in UNDIVIDED else GROUPS.get(family, [3, 1, 2, 1]))


def test_llama_groups_in_order(made):
    assert made("llama").groups[2] == [
        tuple(f"model.layers.2.self_attn.{name}_proj" for name in "qkv"),
        ("model.layers.2.self_attn.o_proj",),
        ("model.layers.2.mlp.gate_proj", "model.layers.2.mlp.up_proj"),
        ("model.layers.2.mlp.down_proj",),
    ]


def test_a_matrix_group_gives_outputs_side_by_side(made):
    decoder = made("llama")
    window = decoder.windows("matrix")[0]
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    weights = [matrix.weight for matrix in decoder.matrices(window).values()]
    assert_close(decoder.forward(window, x), torch.cat([x @ w.T for w in weights], -1))
    assert [w.ends_block for w in decoder.windows("matrix")] == 3 * [False, False, False, True]


def test_conv1d_matrices_are_out_by_in_views(tiny):
    decoder = decompose(tiny("gpt2"))
    matrix = decoder.matrices()["transformer.h.0.mlp.c_fc"]
    assert tuple(matrix.weight.shape) == (128, 32)
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    assert_close(matrix.module(x), x @ matrix.weight.T + matrix.module.bias)
    with torch.no_grad():
        matrix.weight[3, 4] = 77.0
    assert matrix.module.weight[4, 3] == 77.0
    assert torch.equal(matrix.oriented(matrix.weight), matrix.module.weight)


# ---- a decoder made like another


def test_a_decoder_is_returned_as_it_is(made):
    assert decompose(made("llama"), like=made("gpt2")) is made("llama")


def test_like_takes_the_structure_and_its_own_weights(tiny, tokens):
    dense = decompose(tiny("llama"))
    model = copy.deepcopy(dense.model)
    with torch.no_grad():
        for p in model.model.layers.parameters():
            p.zero_()  # nothing could be found out from this
    student, batch = decompose(model, like=dense), tokens(3, 13)
    assert student.groups == dense.groups and student.halves == dense.halves
    for granularity in ("half-block", "block"):
        assert_same_output(run(student, batch, granularity), own_logits(model, batch))
    window = student.windows("half-block")[0]
    for name, parameter in student.parameters(window).items():
        assert parameter is model.get_parameter(name)
    for name, matrix in student.matrices().items():
        assert matrix.module is model.get_submodule(name)
    assert_same_output(run(dense, batch, "half-block"), own_logits(dense.model, batch))


# ---- the model is left as it was


@pytest.mark.parametrize("family, norms", [("llama", 2), ("gemma3", 4), ("gpt2", 2), ("gpt_neox", 2), ("phi", 0)])
def test_norms_that_make_no_difference_to_a_half_do_not_run(made, tokens, family, norms):
    decoder = decompose(copy.deepcopy(made(family).model), like=made(family))
    hidden, idle = decoder.embed(tokens(2, 9)), decoder.halves[0].idle
    assert sum(map(len, idle.values())) == norms  # a norm that both halves read (phi) is in none
    for half, names in idle.items():
        expected = decoder.forward(Window(range(1), half=half), hidden)
        for name in names:
            torch.nn.init.constant_(decoder.blocks[0].get_submodule(name).weight, torch.nan)
        assert torch.equal(decoder.forward(Window(range(1), half=half), hidden), expected)
        for name in names:
            torch.nn.init.constant_(decoder.blocks[0].get_submodule(name).weight, 1.0)


@pytest.mark.parametrize("half", [None, "attention", "mlp"])
def test_forwards_are_restored_after_an_exception(tiny, tokens, half):
    decoder, batch = decompose(tiny("llama")), tokens(2, 9)
    before = own_logits(decoder.model, batch)
    with pytest.raises(RuntimeError):
        decoder.forward(Window(range(1), half=half), torch.zeros(2, 9, 31))  # hidden size is 32
    with pytest.raises(IndexError):
        decoder.embed(batch + 1000)
    with pytest.raises(RuntimeError):
        decoder.logits(batch, torch.zeros(2, 9, 31))
    assert is_untouched(decoder.model)
    assert torch.equal(own_logits(decoder.model, batch), before)


def test_a_forward_set_on_a_module_is_put_back(tiny, tokens):
    """As where a hook of accelerate moves a block to its device."""
    model, batch = tiny("llama"), tokens(2, 9)
    block = model.model.layers[1]
    wrapped, calls = block.forward, []

    def forward(*args, **kwargs):
        calls.append(1)
        return wrapped(*args, **kwargs)

    block.forward = forward
    decoder = decompose(model)
    run(decoder, batch, "block")
    calls.clear()
    own_logits(model, batch)
    assert block.forward is forward and calls == [1]


def test_no_hooks_and_no_gradients_are_left(made):
    for family in ("llama", "gpt2", "gpt_neox"):
        model = made(family).model
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        assert all(p.grad is None for p in model.parameters())


# ---- refusals


@pytest.mark.parametrize("family, kind", [("bloom", "BloomBlock"), ("mpt", "MptBlock")])
def test_half_blocks_are_refused_where_the_residual_is_added_inside(made, family, kind):
    with pytest.raises(
        ReconError,
        match=rf"half-block windows do not fit .* block 0 \({kind}\) does not divide .*use granularity block",
    ):
        made(family).windows("half-block")


def test_a_model_that_is_not_causal_is_refused(tiny):
    with pytest.raises(ReconError, match="BertLMHeadModel is not a causal language model"):
        decompose(tiny("bert"))


def test_fused_weights_that_are_in_no_product_are_refused_by_name(tiny):
    model = tiny("llama")
    model.model.layers[1].mlp.spare = nn.Parameter(torch.zeros(3, 4, 5))
    with pytest.raises(ReconError, match=r"LlamaDecoderLayer holds the fused weight 'model.layers.1.mlp.spare' of shape"):
        decompose(model)


def test_a_model_without_blocks_is_refused():
    with pytest.raises(ReconError, match="Linear cannot be taken apart: .* it has no such list"):
        decompose(nn.Linear(3, 3))


def test_lists_that_will_not_do_are_described(tiny):
    model = tiny("llama")
    twice = model.model.forward
    model.model.forward = lambda **kwargs: [twice(**kwargs), twice(**kwargs)][0]
    with pytest.raises(
        ReconError,
        match=r"each of its blocks has to run once .*'model.layers', 3 x LlamaDecoderLayer, [\d,]+ parameters, run 6 times",
    ):
        decompose(model)


def test_a_list_that_does_not_run_is_passed_over(tiny, tokens):
    """As that of an image encoder is, where there is text alone."""
    model = tiny("llama")
    model.vision = nn.ModuleList([nn.Linear(500, 500)])
    assert decompose(model).path == "model.layers"


def test_blocks_that_share_weights_are_refused(tiny):
    model = tiny("llama")
    model.model.layers[2].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    with pytest.raises(
        ReconError,
        match=r"blocks of LlamaForCausalLM share weights: 'model.layers.0.mlp.up_proj.weight' is 'model.layers.2.mlp.up_proj",
    ):
        decompose(model)


def test_modules_whose_input_is_not_seen_stay_dense_and_are_named(tiny, caplog):
    decoder = decompose(tiny("llama"))
    assert decoder.dense_modules == [] and not caplog.records
    model = tiny("llama")
    model.model.layers[1].mlp.spare = nn.Linear(32, 32)
    decoder = decompose(model)
    assert decoder.dense_modules == ["model.layers.1.mlp.spare"] and "model.layers.1.mlp.spare" in caplog.text
    assert set(decoder.matrices()) == set(decompose(tiny("llama")).matrices())


def test_a_model_that_works_between_its_blocks_is_refused(tiny):
    model = tiny("llama")
    inner = model.model

    def forward(input_ids, **kwargs):
        hidden = inner.embed_tokens(input_ids)
        positions = inner.rotary_emb(hidden, torch.arange(input_ids.shape[1])[None])
        for layer in inner.layers:
            hidden = 0.5 * layer(hidden, position_embeddings=positions, attention_mask=None)
        return BaseModelOutputWithPast(last_hidden_state=inner.norm(hidden))

    inner.forward = forward
    with pytest.raises(
        ReconError,
        match=r"LlamaForCausalLM cannot be taken apart: its 3 blocks at 'model.layers' \(LlamaDecoderLayer\), run one after another, do not give",
    ):
        decompose(model)


def test_too_large_windows_are_refused(made):
    with pytest.raises(ReconError, match="windows of 4 blocks, but the model has 3"):
        made("llama").windows("4")


def test_aliases_of_the_paper(made):
    decoder = made("llama")
    for alias, name in (("1/2", "half-block"), ("1", "block"), ("2", "2-blocks")):
        assert decoder.windows(alias) == decoder.windows(name)


@torch.no_grad()
def test_what_blocks_are_called_with_is_known_for_so_many_shapes(tiny):
    decoder = decompose(tiny("llama", num_hidden_layers=1))
    for length in range(1, SHAPES + 10):
        decoder.forward(decoder.windows("block")[0], torch.zeros(1, length, 32))
    assert len(decoder.calls) == SHAPES
