"""Models decomposed and put together again; what is in their windows; what is refused. See test_families for all families."""

import copy
import functools

import pytest
import torch
from fixtures.models import FAMILIES, UNDIVIDED, composed
from torch import nn
from torch.testing import assert_close
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.pytorch_utils import Conv1D

from recon import ReconError, decompose
from recon.model.modules import distance
from recon.model.skeleton import Lazy
from recon.model.windows import Window, partition

# How many matrices share an input, group by group, as they run through the first block; [3, 1, 2, 1] for all others. Some have an
# MLP without a gate, phi3 one matrix for q, k and v, and one for gate and up.
GROUPS = dict.fromkeys(["glm4", "starcoder2", "opt", "phi", "gptj"], [3, 1, 1, 1])
GROUPS |= dict.fromkeys(["phi3", "gpt2", "gpt_neox", "falcon", *UNDIVIDED], [1, 1, 1, 1])


@pytest.mark.parametrize("family", FAMILIES | UNDIVIDED)
def test_matrices_are_in_one_group_and_one_half_each(made, family):
    decoder = made(family)
    [path] = decoder.structure.stacks
    linear = [n for n, m in decoder.model.named_modules() if isinstance(m, nn.Linear | Conv1D) and n.startswith(path)]
    assert sorted(name for groups in decoder.groups for group in groups for name in group) == sorted(linear)
    assert [len(group) for group in decoder.groups[0]] == GROUPS.get(family, [3, 1, 2, 1])
    for granularity in ["matrix"] + ["half-block"] * (family in FAMILIES) + ["block"]:
        windows = decoder.windows(granularity)
        assert sorted(name for window in windows for name in decoder.matrices(window)) == sorted(linear)
        names = [name for window in windows for name in decoder.parameters(window)]
        assert len(names) == len(set(names)) and {f"{name}.weight" for name in linear} <= set(names)
    assert names == [name for name, _ in decoder.model.named_parameters() if name.startswith(f"{path}.")]  # all is in a block


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_halves_mix_tokens_as_named_and_matrices_keep_samples_apart(made, tokens, family):
    decoder = made(family)
    hidden = decoder.embed(tokens(3, 10))
    changed = hidden.clone()
    changed[:, 0] = changed[:, 0].flip(-1)
    for window in decoder.windows("half-block")[:2]:
        later = decoder.forward(window, hidden)[:, 1:], decoder.forward(window, changed)[:, 1:]
        assert torch.equal(*later) == (window.half == "mlp")
    for window in decoder.windows("matrix")[:4]:  # also in OPT, whose MLP reads all tokens of a batch in one row
        x, weights = decoder.inputs(window, hidden), [matrix.weight for matrix in decoder.matrices(window).values()]
        assert x.shape == (3, 10, weights[0].shape[1])
        assert_close(decoder.inputs(window, hidden[1:2]), x[1:2])
        biases = [getattr(matrix.module, "bias", None) for matrix in decoder.matrices(window).values()]
        expected = [x @ w.T + (0 if bias is None else bias) for w, bias in zip(weights, biases, strict=True)]
        assert_close(decoder.forward(window, x), torch.cat(expected, -1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("blocks", [*range(1, 9), 30, 80])
def test_partitions_cover_every_block_once_in_order(blocks):
    for granularity, size in (("block", 1), ("2-blocks", 2), ("3-blocks", 3), ("quarter", 0), ("model", blocks)):
        if size > blocks:
            with pytest.raises(ReconError, match=f"windows of {size} blocks, but the model has {blocks}"):
                partition(granularity, blocks)
            continue
        runs = partition(granularity, blocks)
        assert [index for run in runs for index in run] == list(range(blocks))
        sizes = [len(run) for run in runs]
        assert set(sizes[:-1]) <= {size} if size else len(sizes) == min(4, blocks) and max(sizes) - min(sizes) <= 1


def test_like_takes_the_structure_and_its_own_weights(tiny, made, tokens):
    dense = decompose(tiny("llama"))
    assert decompose(dense, like=made("gpt2")) is dense
    model, batch = copy.deepcopy(dense.model), tokens(3, 13)
    for parameter in model.model.layers.parameters():
        parameter.data.zero_()  # nothing could be found out from this
    student = decompose(model.train(), like=dense)
    assert student.groups == dense.groups and student.halves == dense.halves and not student.model.training
    own = student.parameters(student.windows("half-block")[0]).items()
    assert all(parameter is model.get_parameter(name) for name, parameter in own)
    for decoder in (student, dense):
        assert distance(composed(decoder, batch, "half-block"), decoder.run(batch).logits) < 1e-4
    # Rotary embeddings of a model in half precision are not those of its copy in float32.
    copied, rounded = copy.deepcopy(dense.model).float(), decompose(dense.model.bfloat16())
    composed(rounded, batch, "half-block")
    decoder = decompose(copied, like=rounded)
    assert distance(composed(decoder, batch, "half-block"), decoder.run(batch).logits) < 1e-4


@pytest.mark.parametrize("half", [None, "attention", "mlp"])
def test_forwards_and_hooks_are_restored_also_after_an_exception(tiny, tokens, half):
    """Also a forward that is set on a module, as by a hook of accelerate that moves a block to its device."""
    model, batch = tiny("llama"), tokens(2, 9)
    set_on = model.model.layers[1]
    set_on.forward = forward = functools.partial(set_on.forward)
    decoder = decompose(model)
    before = decoder.run(batch).logits
    for index in range(2):
        with pytest.raises(RuntimeError):
            decoder.forward(Window(range(index, index + 1), half=half), torch.zeros(2, 9, 31))  # hidden size is 32
    with pytest.raises(IndexError):
        decoder.embed(batch + 1000)
    with pytest.raises(RuntimeError):
        decoder.logits(batch, torch.zeros(2, 9, 31))
    for granularity in ("block", "half-block"):
        composed(decoder, batch, granularity)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert [m for m in model.modules() if "forward" in vars(m)] == [set_on] and set_on.forward is forward
    assert torch.equal(decoder.run(batch).logits, before)


def runs_twice(model):
    once = model.model.forward
    model.model.forward = lambda **kwargs: [once(**kwargs), once(**kwargs)][0]


def looped(model, step):
    """Replaces the model's loop over its blocks; step: runs one."""
    inner = model.model

    def forward(input_ids, **kwargs):
        hidden = inner.embed_tokens(input_ids)
        positions = inner.rotary_emb(hidden, torch.arange(input_ids.shape[1])[None])
        for layer in inner.layers:
            hidden = step(layer, hidden, position_embeddings=positions, attention_mask=None)
        return BaseModelOutputWithPast(last_hidden_state=inner.norm(hidden))

    inner.forward = forward


@pytest.mark.parametrize("spoil, said", [
    (lambda m: m.model.layers.__delitem__(slice(None)), "it has no such list"),
    (runs_twice, "'model.layers', 3 modules, run 6 times"),
    (lambda m: looped(m, lambda layer, hidden, **rest: 0.5 * layer(hidden, **rest)),
     "its 3 blocks at 'model.layers', run one after another, do not give the model's own output"),
    (lambda m: setattr(m.model.layers[1].mlp, "spare", nn.Parameter(torch.zeros(3, 4, 5))), r"'.*1\.mlp\.spare' of shape"),
    (lambda m: looped(m, lambda layer, hidden, **rest: layer(hidden_states=hidden, **rest)),
     "is not given hidden states as its first argument"),
    (lambda m: setattr(m.model.layers[2].mlp.up_proj, "weight", m.model.layers[0].mlp.up_proj.weight),
     "share weights: 'model.layers.0.mlp.up_proj.weight' is 'model.layers.2.mlp.up_proj.weight'"),
])  # fmt: skip
def test_models_that_cannot_be_decomposed_are_refused(tiny, spoil, said):
    model = tiny("llama")
    spoil(model)
    with pytest.raises(ReconError, match=f"Llama.*{said}"):
        decompose(model)


def test_what_does_not_run_is_passed_over_or_stays_dense(tiny, caplog):
    """A list that does not run, as that of an image encoder; and a matrix, which is named."""
    model = tiny("llama")
    expected = set(decompose(model).matrices())
    assert not caplog.records
    model.vision = nn.ModuleList([nn.Linear(500, 500)])
    model.model.layers[1].mlp.spare = nn.Linear(32, 32)
    decoder = decompose(model)
    assert decoder.structure.stacks == ("model.layers",) and set(decoder.matrices()) == expected
    assert "1 matrices of LlamaForCausalLM" in caplog.text and "model.layers.1.mlp.spare" in caplog.text
    assert decompose(model, lazy=Lazy(model, lambda names: iter(()))).structure.stacks == ("model.layers",)
