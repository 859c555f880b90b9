"""Mixture-of-experts models: each expert's part of a fused parameter is a matrix, known by the tokens that are sent to it."""

import copy
from functools import partial

import pytest
import torch
from fixtures.models import make_model, random_tokens
from torch.testing import assert_close

from recon import reconstruct
from recon.config import PruningConfig, ReconstructionConfig, RetrainingConfig
from recon.errors import ReconError
from recon.kernels.gradient_descent import trained
from recon.kernels.losses import channel_variance, get_loss
from recon.methods.adapters import check_adaptable
from recon.methods.prune import prune
from recon.methods.retrain import retrain
from recon.methods.statistics import FEW, gather
from recon.methods.training import train
from recon.model.discovery import decompose
from recon.model.experts import FusedProducts
from recon.model.matrices import stored
from recon.model.modules import requiring_gradients
from recon.runtime.execution import Execution
from recon.runtime.seeds import generator

FAMILIES = ["mixtral", "gpt_oss", "llama4"]  # (experts, out, in); (experts, in, out) with biases; all experts in one product


@pytest.fixture(scope="module")
def made():
    """Family -> its decoder, made once, and left as it is."""
    kept = {}

    def make(family):
        if family not in kept:
            kept[family] = decompose(make_model(family, num_hidden_layers=2))
        return kept[family]

    return make


@pytest.fixture
def fresh(made):
    """Family -> a copy of its decoder."""
    return lambda family: decompose(copy.deepcopy(made(family).model), like=made(family))


def experts_of(decoder, block=None):
    chosen = decoder.matrices(None if block is None else decoder.windows("block")[block])
    return {name: matrix for name, matrix in chosen.items() if matrix.expert is not None}


@torch.no_grad()
def slow_inputs(decoder, block, tokens):
    """Expert's matrix name -> what it reads, (tokens, in), of the model run as a whole: routed and computed by hand in float64."""
    caught = {}
    experts = decoder.blocks[block].get_submodule(
        next(iter(experts_of(decoder, block).values())).module_name.split(f".{block}.", 1)[1]
    )
    handle = experts.register_forward_pre_hook(
        lambda m, args, kwargs: caught.update(args=(*args, *kwargs.values())), with_kwargs=True
    )
    decoder.model(input_ids=tokens, use_cache=False)
    handle.remove()
    hidden, *routing = (a.double() if a.is_floating_point() else a for a in caught["args"])
    found = {}
    for name, matrix in experts_of(decoder, block).items():
        if not name.rpartition(".")[2].startswith("gate_up"):
            continue
        if routing:
            x = hidden.reshape(-1, hidden.shape[-1])[(routing[0] == matrix.expert).any(-1)]
        else:  # each expert gets every token, as zeros where it is not for it
            x = hidden.view(matrix.experts, -1, hidden.shape[-1])[matrix.expert]
            x = x[x.abs().sum(-1) > 0]
        found[name] = x
        both = x @ matrix.weight.double().T
        bias = getattr(experts, f"{matrix.attribute}_bias", None)
        if bias is not None:
            both = both + bias[matrix.expert].double()
        inner = experts._apply_gate(both) if hasattr(experts, "_apply_gate") and bias is not None else None
        if inner is None:
            gate, up = both.chunk(2, -1)
            inner = experts.act_fn(gate) * up
        found[name.replace("gate_up", "down")] = inner
    return found


# ---- what is found


@pytest.mark.parametrize("family, transposed", [("mixtral", False), ("gpt_oss", True), ("llama4", True)])
def test_each_expert_is_a_matrix(made, family, transposed):
    decoder = made(family)
    found = experts_of(decoder, 0)
    assert len(found) == 8 and {m.transposed for m in found.values()} == {transposed}
    for name, matrix in found.items():
        assert name == f"{matrix.parameter_name}[{matrix.expert}]" and matrix.experts == 4
        parameter = decoder.model.get_parameter(matrix.parameter_name)
        assert matrix.parameter is parameter
        part = parameter[matrix.expert]
        assert torch.equal(matrix.weight, part.T if transposed else part)
        assert matrix.weight.shape == ((128, 32) if "gate_up" in name else (32, 64))
        assert matrix.weight.data_ptr() == part.data_ptr()
    assert not any("router" in name or name.endswith("gate") for name in decoder.matrices())


@pytest.mark.parametrize("family, share", [("mixtral", 0.5), ("gpt_oss", 0.5), ("llama4", 0.25)])
def test_the_share_of_tokens_is_that_of_the_router(made, family, share):
    assert {matrix.share for matrix in experts_of(made(family)).values()} == {share}
    dense = {m.share for m in made(family).matrices().values() if m.expert is None}
    assert dense == {1.0}


@torch.no_grad()
def test_products_are_seen_whatever_way_they_are_written():
    parameter, x = torch.nn.Parameter(torch.randn(3, 4, 5)), torch.randn(2, 5)
    seen = []
    with FusedProducts({"w": parameter}, lambda name, product: seen.append((product.expert, product.transposed, product.x))):
        torch.nn.functional.linear(x, parameter[torch.tensor(2)])
        x @ parameter[1].T
        x[:, :4] @ parameter[0]
        torch.nn.functional.linear(x[:, :4], parameter.transpose(1, 2)[1])
        torch.bmm(torch.stack([x, x * 0, x]), parameter.transpose(1, 2))
        x @ torch.randn(5, 4)
        torch.nn.functional.linear(x, parameter[0, :2])  # a part of a matrix
    assert [entry[:2] for entry in seen] == [(2, False), (1, False), (0, True), (1, True), (0, False), (1, False), (2, False)]
    assert [len(entry[2]) for entry in seen] == [2, 2, 2, 2, 2, 0, 2]


# ---- statistics


@pytest.mark.parametrize("kind", ["norm", "gram"])
@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_are_those_of_the_tokens_sent_there(made, family, kind):
    decoder, tokens = made(family), random_tokens(16, 20)
    window = decoder.windows("block")[0]
    execution = Execution("cpu", "float32")
    _, found = gather(execution, decoder, window, execution.run(decoder.embed, tokens), kind)
    expected = slow_inputs(decoder, 0, tokens)
    assert set(expected) == set(experts_of(decoder, 0))
    assert len({len(x) for x in expected.values()}) > 1  # experts differ in what they get
    for name, x in expected.items():
        assert (name in found) == (len(x) >= FEW)
        if name in found:
            statistic = x.T @ x / len(x) if kind == "gram" else x.square().mean(0).sqrt()
            assert_close(found[name].double(), statistic, rtol=1e-3, atol=1e-4 * statistic.abs().max().item())


@pytest.mark.parametrize("criterion", ["wanda", "sparsegpt"])
def test_under_calibrated_experts_are_pruned_by_magnitude_and_named(made, fresh, caplog, criterion):
    decoder, tokens = fresh("mixtral"), random_tokens(4, 16)
    result = prune(
        decoder,
        tokens,
        PruningConfig(criterion=criterion, pattern="0.5", scope="row", statistics="dense"),
        execution=Execution(compute_dtype="float32", progress=False),
    )
    counts = {name: len(x) for block in range(2) for name, x in slow_inputs(made("mixtral"), block, tokens).items()}
    assert set(result.under_calibrated) == {name for name, count in counts.items() if count < FEW}
    assert 0 < len(result.under_calibrated) < len(counts)
    assert f"{len(result.under_calibrated)} of {len(result.masks)} matrices belong to experts" in caplog.text
    assert result.under_calibrated[0] in caplog.text
    for name, mask in result.masks.items():
        dense = made("mixtral").matrices()[name].weight
        smallest = dense.abs().argsort(1)[:, : mask.shape[1] // 2]
        assert (not mask.gather(1, smallest).any()) == (name in result.under_calibrated)


def test_few_tokens_in_all_are_enough_for_what_reads_them_all(fresh):
    result = prune(fresh("mixtral"), random_tokens(1, 8), execution=Execution(progress=False))
    assert result.under_calibrated and all(name.endswith("]") for name in result.under_calibrated)


# ---- masks and reconstruction


@pytest.mark.parametrize("pattern", ["0.5", "2:4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_pruned_reconstructed_and_saved_zeros_stay(made, fresh, tmp_path, family, pattern):
    decoder, tokens = fresh(family), random_tokens(24, 16)
    result = prune(decoder, tokens, PruningConfig(criterion="wanda", pattern=pattern), execution=Execution(progress=False))
    assert result.total_sparsity == 0.5
    untouched = {name: p.clone() for name, p in decoder.model.named_parameters() if "router" in name or "gate.weight" in name}
    assert untouched
    for name, matrix in experts_of(decoder).items():
        if pattern == "2:4":  # along what an output neuron reads
            assert (result.masks[name].view(-1, 4).sum(1) == 2).all()
        assert torch.equal(matrix.weight, made(family).matrices()[name].weight * result.masks[name])
    reports = reconstruct(
        decoder,
        made(family),
        tokens,
        ReconstructionConfig(granularity="half-block", start="exact", epochs=1, chunks=1),
        masks=result.masks,
        execution=Execution(compute_dtype="float32", progress=False),
    )
    assert all(next(iter(r.error_after.values())) < next(iter(r.error_before.values())) for r in reports)
    for name, before in untouched.items():
        assert torch.equal(decoder.model.get_parameter(name), before)
    decoder.model.save_pretrained(tmp_path)
    again = type(decoder.model).from_pretrained(tmp_path, dtype=torch.float32)
    again = decompose(again.eval(), like=made(family))
    for name, matrix in again.matrices().items():
        assert torch.equal(matrix.weight, decoder.matrices()[name].weight)
        assert not matrix.weight[~result.masks[name]].any()
        if matrix.expert is not None and name not in result.under_calibrated:
            assert not torch.equal(matrix.weight, made(family).matrices()[name].weight * result.masks[name])


def test_exact_solutions_lower_the_error_of_each_expert(made, fresh):
    """Exact masked least squares on an expert's own tokens, against the error counted on them by hand."""
    decoder, tokens, dense = fresh("mixtral"), random_tokens(24, 16), made("mixtral")
    masks = prune(
        decoder, tokens, PruningConfig(criterion="wanda", pattern="0.5", statistics="dense"), execution=Execution(progress=False)
    ).masks
    pruned = {name: matrix.weight.clone() for name, matrix in decoder.matrices().items()}
    reconstruct(
        decoder,
        dense,
        tokens,
        ReconstructionConfig(granularity="half-block", start="exact", learning_rate=1e-30),
        masks=masks,
        execution=Execution(compute_dtype="float32", progress=False),
    )
    for name, x in slow_inputs(dense, 0, tokens).items():
        wanted = x @ dense.matrices()[name].weight.double().T
        before, after = ((x @ w.double().T - wanted).square().sum() for w in (pruned[name], decoder.matrices()[name].weight))
        assert after < (0.95 * before if len(x) >= FEW else 1.001 * before)


@torch.no_grad()
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_experts_are_multiplied_by_what_is_given_instead(made, family):
    decoder = made(family)
    window = decoder.windows("half-block")[1]
    hidden = decoder.embed(random_tokens(2, 12))
    parts = {name: matrix.part for name, matrix in experts_of(decoder, 0).items()}
    whole = decoder.forward(window, hidden)
    with decoder.using(window, parts):
        assert torch.equal(decoder.forward(window, hidden), whole)
    with decoder.using(window, {name: 2 * part for name, part in parts.items()}):
        assert not torch.allclose(decoder.forward(window, hidden), whole, rtol=1e-2)


def whitened_loss(decoder, window, variance, x, y):
    return get_loss("whitened")(decoder.forward(window, x), y, variance)[:, 1:].mean()


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_are_trained_as_the_parameter_that_holds_them_all_would_be(made, fresh, family):
    """Against plain descent on that parameter; no step leaves an expert without tokens, so that AdamW does the same for each."""
    dense, tokens = made(family), random_tokens(6, 64)
    ours, theirs = fresh(family), fresh(family)
    masks = [
        prune(decoder, config=PruningConfig(criterion="magnitude"), execution=Execution(progress=False)).masks
        for decoder in (ours, theirs)
    ][0]
    # Of a relative rate each expert has its own; this one parameter has one.
    config = ReconstructionConfig(learning_rate=1e-3, rate="absolute", propagation="dense", chunks=1)
    reports = reconstruct(
        ours,
        dense,
        tokens,
        config,
        masks=masks,
        execution=Execution(compute_dtype="float32", progress=False),
    )
    execution, stream = Execution("cpu", "float32"), dense.embed(tokens)
    for window, report in zip(dense.windows("half-block"), reports, strict=True):
        with torch.no_grad():
            target = dense.forward(window, stream)
        parameters = list(theirs.trained(window, "matrices").values())
        with requiring_gradients(theirs.model.parameters(), False), requiring_gradients(parameters):
            kept = stored(theirs.matrices(window), masks, torch.device("cpu"))
            random = generator(0, "shuffle", window.name)
            loss = partial(whitened_loss, theirs, window, channel_variance(target))
            losses = train(
                loss, [stream, target], trained(parameters, dict(kept)), config.schedule(len(stream)), random, execution
            )
        assert_close(report.losses, losses, rtol=1e-4, atol=1e-7)
        stream = target
    for name, matrix in theirs.matrices().items():
        assert_close(ours.matrices()[name].weight, matrix.weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", [0, 1])
def test_an_expert_that_no_token_but_the_first_is_sent_to_is_left_alone(made, fresh, seed):
    """With one of the seeds an expert gets none at all, with the other one gets the first, which losses leave out."""
    dense, student = made("mixtral"), fresh("mixtral")
    masks = prune(student, config=PruningConfig(criterion="magnitude"), execution=Execution(progress=False)).masks
    before = {name: matrix.weight.clone() for name, matrix in student.matrices().items()}
    tokens = random_tokens(1, 3, seed)
    first = slow_inputs(dense, 0, tokens[:, :1])
    sent = {name for name, x in slow_inputs(dense, 0, tokens).items() if len(x) > len(first[name])}
    execution = Execution(compute_dtype="float32", progress=False)
    reconstruct(student, dense, tokens, ReconstructionConfig(propagation="dense"), masks=masks, execution=execution)
    names = experts_of(student, 0)
    assert 0 < len(sent) < len(names)
    for name, matrix in names.items():
        assert torch.equal(matrix.weight, before[name]) == (name not in sent)


def test_retraining_keeps_the_zeros(fresh):
    decoder = fresh("gpt_oss")
    masks = prune(decoder, config=PruningConfig(criterion="magnitude"), execution=Execution(progress=False)).masks
    before = {name: m.weight.clone() for name, m in decoder.matrices().items()}
    retrain(
        decoder,
        random_tokens(4, 12),
        RetrainingConfig(retrain="full", retrain_learning_rate=0.001, retrain_rate="absolute"),
        masks=masks,
        execution=Execution(progress=False),
    )
    for name, matrix in decoder.matrices().items():
        assert not matrix.weight[~masks[name]].any()
        assert not torch.equal(matrix.weight, before[name])


def test_masks_are_stored_as_their_parameters_are(made):
    matrices = experts_of(made("gpt_oss"), 0)
    masks = {name: torch.rand(m.weight.shape) > 0.5 for name, m in matrices.items()}
    found = stored(matrices, masks, torch.device("cpu"))
    assert len(found) == 2
    for parameter, mask in found:
        assert mask.shape == parameter.shape
    for name, matrix in matrices.items():
        mask = next(mask for parameter, mask in found if parameter is matrix.parameter)
        assert torch.equal(mask[matrix.expert].T, masks[name])


# ---- the user's configuration


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm", "eager"])
def test_the_configuration_is_left_as_it_was_and_the_bits_do_not_depend_on_it(made, implementation):
    model, tokens = copy.deepcopy(made("mixtral").model), random_tokens(2, 12)
    model.set_experts_implementation(implementation)
    before, ran = model.config.to_dict(), []
    decoder = decompose(model)
    for block in decoder.blocks:
        block.register_forward_pre_hook(lambda *args: ran.append(model.config._experts_implementation))
    found = decoder.run(tokens).logits
    for window in decoder.windows("half-block"):
        decoder.forward(window, decoder.embed(tokens))
    with pytest.raises(RuntimeError):
        decoder.forward(decoder.windows("block")[0], torch.zeros(2, 12, 31))
    assert ran and set(ran) == {"eager"}
    assert model.config._experts_implementation == implementation and model.config.to_dict() == before
    assert torch.equal(found, made("mixtral").run(tokens).logits)


def test_blocks_that_run_again_in_the_backward_pass_run_in_the_same_way(made):
    """As checkpointed ones do, whatever the model's configuration says."""
    found = []
    for checkpointing in (False, True):
        model = copy.deepcopy(made("mixtral").model)
        model.set_experts_implementation("batched_mm")
        masks = prune(model, config=PruningConfig(criterion="magnitude"), execution=Execution(progress=False)).masks
        config = RetrainingConfig(retrain="full", retrain_checkpointing=checkpointing)
        retrain(model, random_tokens(4, 12), config, masks=masks, execution=Execution(compute_dtype="float32", progress=False))
        found.append(model.lm_head.weight)
        assert model.config._experts_implementation == "batched_mm"
    assert torch.equal(*found)


# ---- costs and refusals


def test_single_matrices_and_adapters_are_refused(made, fresh):
    decoder = made("mixtral")
    with pytest.raises(
        ReconError,
        match=r"matrix windows .* MixtralForCausalLM has experts, such as '.*gate_up_proj\[0\]'",
    ):
        decoder.windows("matrix")
    for call in (
        lambda: check_adaptable(decoder),
        lambda: reconstruct(
            fresh("mixtral"),
            decoder,
            random_tokens(2, 8),
            ReconstructionConfig(adapter="lora"),
            execution=Execution(progress=False),
        ),
        lambda: retrain(
            fresh("mixtral"), random_tokens(2, 8), RetrainingConfig(retrain="masklora"), execution=Execution(progress=False)
        ),
    ):
        with pytest.raises(ReconError, match=r"gate_up_proj\[0\]' is one expert's part of a parameter that holds those of 4"):
            call()
    with pytest.raises(ReconError, match=r"gate_up_proj\[0\]' is an expert's; whole heads and neurons are not removed"):
        prune(
            fresh("mixtral"),
            random_tokens(2, 8),
            PruningConfig(criterion="wanda-sp", pattern="0.2"),
            execution=Execution(progress=False),
        )


# ---- experts that are modules


class Apart(torch.nn.Module):
    """A mixture of experts with the weights of another, each expert a module of its own."""

    def __init__(self, fused):
        super().__init__()
        experts = fused.experts
        self.gate, self.top_k, self.act = torch.nn.Linear(32, experts.num_experts, bias=False), fused.top_k, experts.act_fn
        self.gate.weight = fused.gate.weight
        self.experts = torch.nn.ModuleList()
        for up, down in zip(experts.gate_up_proj, experts.down_proj, strict=True):
            expert = torch.nn.Module()
            expert.up, expert.down = torch.nn.Linear(32, 128, bias=False), torch.nn.Linear(64, 32, bias=False)
            expert.up.weight, expert.down.weight = torch.nn.Parameter(up.detach()), torch.nn.Parameter(down.detach())
            self.experts.append(expert)

    def forward(self, hidden):
        flat = hidden.flatten(0, 1)
        weights, chosen = self.gate(flat).softmax(-1).topk(self.top_k)
        weights = weights / weights.sum(-1, keepdim=True)
        output = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            token, place = (chosen == number).nonzero(as_tuple=True)
            if len(token):
                gate, up = expert.up(flat[token]).chunk(2, -1)
                output.index_add_(0, token, expert.down(self.act(gate) * up) * weights[token, place, None])
        return output.view_as(hidden)


def test_experts_that_are_modules_are_as_those_in_one_parameter(made):
    fused, tokens = made("mixtral"), random_tokens(16, 20)
    model = copy.deepcopy(fused.model)
    for block in model.model.layers:
        block.mlp = Apart(block.mlp)
    decoder, execution = decompose(model), Execution("cpu", "float32")
    assert decoder.dense_modules == []  # although the probe does not reach every expert
    assert not any(name.endswith("gate") for name in decoder.matrices())
    assert {m.share for name, m in decoder.matrices().items() if "experts" in name} == {0.5}
    gathered = []
    for each in (fused, decoder):
        window = each.windows("block")[0]
        gathered.append(gather(execution, each, window, execution.run(each.embed, tokens), "gram"))
    assert_close(gathered[0][0], gathered[1][0])
    for expert in range(4):
        for theirs, ours in (("gate_up_proj", "up"), ("down_proj", "down")):
            expected = gathered[0][1].get(f"model.layers.0.mlp.experts.{theirs}[{expert}]")
            found = gathered[1][1].get(f"model.layers.0.mlp.experts.{expert}.{ours}")
            assert (found is None) == (expected is None)
            if found is not None:
                assert_close(found, expected)
    with pytest.raises(ReconError, match=r"has experts, such as 'model.layers.0.mlp.experts.\d.up'"):
        decoder.windows("matrix")


def test_experts_that_the_probe_does_not_reach_are_in_a_half_too():
    model = make_model("mixtral", num_local_experts=32)
    for block in model.model.layers:
        block.mlp = Apart(block.mlp)
    decoder = decompose(model)
    halves = [decoder.matrices(window) for window in decoder.windows("half-block")]
    assert sorted(name for half in halves for name in half) == sorted(decoder.matrices())  # each in one
    assert all((".mlp." in name) == (number % 2 == 1) for number, half in enumerate(halves) for name in half)
