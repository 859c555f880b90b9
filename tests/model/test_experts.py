"""Mixture-of-experts models: each expert's part of a fused parameter is a matrix, known by the tokens that are sent to it."""

import copy

import pytest
import torch
from fixtures.models import FLOAT32, copied, make_model, random_tokens
from torch.nn import functional as F
from torch.testing import assert_close

from recon import PruningConfig, ReconError, ReconstructionConfig, decompose, prune, reconstruct
from recon.methods.statistics import FEW, gather
from recon.model.experts import FusedProducts
from recon.model.modules import watched
from recon.model.structure import stored

# (experts, out, in); (experts, in, out) with biases; all experts in one product: whether stored as (in, out), share of tokens
FAMILIES = {"mixtral": (False, 0.5), "gpt_oss": (True, 0.5), "llama4": (True, 0.25)}


def experts_of(decoder, block=None):
    chosen = decoder.matrices(None if block is None else decoder.windows("block")[block])
    return {name: matrix for name, matrix in chosen.items() if matrix.expert is not None}


@torch.no_grad()
def slow_inputs(decoder, block, tokens):
    """Expert's matrix name -> what it reads, (tokens, in), of the whole model: routed and computed by hand in float64."""
    caught, inputs = {}, {}
    experts = next(iter(experts_of(decoder, block).values())).module
    with watched({"": experts}, lambda name, args, kwargs: caught.update(args=(*args, *kwargs.values()))):
        decoder.model(input_ids=tokens, use_cache=False)
    hidden, *routing = (a.double() if a.is_floating_point() else a for a in caught["args"])
    for name, matrix in experts_of(decoder, block).items():
        if not name.rpartition(".")[2].startswith("gate_up"):
            continue
        if routing:
            x = hidden.reshape(-1, hidden.shape[-1])[(routing[0] == matrix.expert).any(-1)]
        else:  # each expert gets every token, as zeros if it is not for it
            x = hidden.view(matrix.experts, -1, hidden.shape[-1])[matrix.expert]
            x = x[x.abs().sum(-1) > 0]
        both, bias = x @ matrix.weight.double().T, getattr(experts, matrix.bias_name.rpartition(".")[2], None)
        gate, up = both.chunk(2, -1)
        inner = experts.act_fn(gate) * up if bias is None else experts._apply_gate(both + bias[matrix.expert].double())
        inputs |= {name: x, name.replace("gate_up", "down"): inner}
    return inputs


@pytest.mark.parametrize("family", FAMILIES)
def test_each_expert_is_a_matrix(made, family):
    decoder, (transposed, share) = made(family), FAMILIES[family]
    inside = experts_of(decoder, 0)
    assert len(inside) == 8 and {(m.transposed, m.share) for m in inside.values()} == {(transposed, share)}
    assert {m.share for m in decoder.matrices().values() if m.expert is None} == {1.0}
    assert not any("router" in name or name.endswith("gate") for name in decoder.matrices())
    for name, matrix in inside.items():
        assert name == f"{matrix.parameter_name}[{matrix.expert}]" and matrix.experts == 4
        part = decoder.model.get_parameter(matrix.parameter_name)[matrix.expert]
        assert torch.equal(matrix.weight, part.T if transposed else part) and matrix.weight.data_ptr() == part.data_ptr()
    masks = {name: torch.rand(m.weight.shape) > 0.5 for name, m in inside.items()}
    for parameter, mask in stored(inside, masks, torch.device("cpu")):  # laid out as their parameters are
        own = {name: matrix for name, matrix in inside.items() if matrix.parameter is parameter}
        assert own and all(torch.equal(matrix.oriented(mask[matrix.expert]), masks[name]) for name, matrix in own.items())
    with pytest.raises(ReconError, match=r"matrix windows .* has experts, such as '.*gate_up_proj\[0\]'"):
        decoder.windows("matrix")


@torch.no_grad()
def test_products_are_seen_whatever_way_they_are_written():
    parameter, x, seen = torch.nn.Parameter(torch.randn(3, 4, 5)), torch.randn(2, 5), []
    with FusedProducts({"w": parameter}, lambda product: seen.append((product.name, product.transposed, len(product.x)))):
        torch.nn.functional.linear(x, parameter[torch.tensor(2)])
        x @ parameter[1].T
        x[:, :4] @ parameter[0]
        torch.nn.functional.linear(x[:, :4], parameter.transpose(1, 2)[1])
        torch.bmm(torch.stack([x, x * 0, x]), parameter.transpose(1, 2))
        x @ torch.randn(5, 4)
        torch.nn.functional.linear(x, parameter[0, :2])  # a part of a matrix
    expected = [(2, False, 2), (1, False, 2), (0, True, 2), (1, True, 2), (0, False, 2), (1, False, 0), (2, False, 2)]
    assert seen == [(f"w[{expert}]", *rest) for expert, *rest in expected]


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_bits_do_not_depend_on_the_implementation_that_a_model_comes_with(made, implementation):
    model, tokens = copy.deepcopy(made("mixtral").model), random_tokens(2, 12)
    model.set_experts_implementation(implementation)
    assert torch.equal(decompose(model).run(tokens).logits, made("mixtral").run(tokens).logits)


@pytest.mark.parametrize("kind", ["norm", "gram"])
@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_are_those_of_the_tokens_sent_there(made, family, kind):
    decoder, tokens = made(family), random_tokens(16, 20)
    _, gathered, _ = gather(FLOAT32, decoder, decoder.windows("block")[0], FLOAT32.run(decoder.embed, tokens), kind)
    expected = slow_inputs(decoder, 0, tokens)
    assert set(expected) == set(experts_of(decoder, 0))
    assert len({len(x) for x in expected.values()}) > 1  # experts differ in what they get
    for name, x in expected.items():
        assert (name in gathered) == (len(x) >= FEW)
        if name in gathered:
            statistic = x.T @ x / len(x) if kind == "gram" else x.square().mean(0).sqrt()
            assert_close(gathered[name].double(), statistic, rtol=1e-3, atol=1e-4 * statistic.abs().max().item())


@pytest.mark.parametrize("criterion", ["wanda", "sparsegpt"])
def test_under_calibrated_experts_are_pruned_by_magnitude_and_named(made, caplog, criterion):
    dense, decoder, tokens = made("mixtral"), copied(made("mixtral")), random_tokens(4, 16)
    config = PruningConfig(criterion=criterion, pattern="0.5", scope="row", statistics="dense")
    result = prune(decoder, tokens, config, execution=FLOAT32)
    counts = {name: len(x) for block in range(3) for name, x in slow_inputs(dense, block, tokens).items()}
    assert set(result.under_calibrated) == {name for name, count in counts.items() if count < FEW}
    assert 0 < len(result.under_calibrated) < len(counts)
    assert f"{len(result.under_calibrated)} of {len(result.masks)} matrices belong to experts" in caplog.text
    for name, mask in result.masks.items():
        smallest = dense.matrices()[name].weight.abs().argsort(1)[:, : mask.shape[1] // 2]
        assert (not mask.gather(1, smallest).any()) == (name in result.under_calibrated)


def test_exact_solutions_lower_the_error_of_each_expert(made):
    """Exact masked least squares on an expert's own tokens, against the error counted on them by hand."""
    dense, decoder, tokens = made("mixtral"), copied(made("mixtral")), random_tokens(12, 32)
    masks = prune(decoder, tokens, PruningConfig(criterion="wanda", statistics="dense"), execution=FLOAT32).masks
    pruned = {name: matrix.weight.clone() for name, matrix in decoder.matrices().items()}
    config = ReconstructionConfig(granularity="half-block", start="exact", learning_rate=1e-30, epochs=1)
    reconstruct(decoder, dense, tokens, config, masks=masks, execution=FLOAT32)
    for name, x in slow_inputs(dense, 0, tokens).items():
        wanted = x @ dense.matrices()[name].weight.double().T
        before, after = ((x @ w.double().T - wanted).square().sum() for w in (pruned[name], decoder.matrices()[name].weight))
        assert after < (0.95 * before if len(x) >= FEW else 1.001 * before)


@pytest.mark.parametrize("seed", [0, 1])
def test_an_expert_that_no_token_but_the_first_is_sent_to_is_left_alone(made, seed):
    """With one of the seeds an expert gets none at all, with the other one gets the first, which the loss skips."""
    dense, student, tokens = made("mixtral"), copied(made("mixtral")), random_tokens(1, 3, seed)
    masks = prune(student, config=PruningConfig(criterion="magnitude"), execution=FLOAT32).masks
    before = {name: matrix.weight.clone() for name, matrix in student.matrices().items()}
    first = slow_inputs(dense, 0, tokens[:, :1])
    sent = {name for name, x in slow_inputs(dense, 0, tokens).items() if len(x) > len(first[name])}
    how = ReconstructionConfig(propagation="dense", first_position="skipped", epochs=1)
    reconstruct(student, dense, tokens, how, masks=masks, execution=FLOAT32)
    names = experts_of(student, 0)
    assert 0 < len(sent) < len(names)
    assert all(torch.equal(matrix.weight, before[name]) == (name not in sent) for name, matrix in names.items())


class Apart(torch.nn.ModuleList):
    """Experts with the weights of others, each a module of its own."""

    def __init__(self, fused):
        super().__init__()
        for up, down in zip(fused.gate_up_proj, fused.down_proj, strict=True):
            expert = {"up": torch.nn.Linear(32, 128, bias=False), "down": torch.nn.Linear(64, 32, bias=False)}
            expert["up"].weight.data, expert["down"].weight.data = up.detach().clone(), down.detach().clone()
            self.append(torch.nn.ModuleDict(expert))

    def forward(self, hidden, chosen, weights):
        output = torch.zeros_like(hidden)
        for number, expert in enumerate(self):
            token, place = (chosen == number).nonzero(as_tuple=True)
            if len(token):
                gate, up = expert["up"](hidden[token]).chunk(2, -1)
                output.index_add_(0, token, expert["down"](F.silu(gate) * up) * weights[token, place, None])
        return output


def apart(model):
    model = copy.deepcopy(model)
    for block in model.model.layers:
        block.mlp.experts = Apart(block.mlp.experts)
    return decompose(model)


def test_experts_that_are_modules_are_reconstructed_as_those_in_one_parameter(made, caplog):
    tokens, results = random_tokens(8, 20), []
    config = ReconstructionConfig(granularity="half-block", learning_rate=1e-3, rate="absolute", chunks=1, epochs=1)
    fused = made("mixtral")
    for dense, student in ((fused, copied(fused)), (apart(fused.model), apart(fused.model))):
        masks = prune(student, tokens, PruningConfig(criterion="wanda"), execution=FLOAT32).masks
        reconstruct(student, dense, tokens, config, masks=masks, execution=FLOAT32)
        results.append({name: matrix.weight for name, matrix in student.matrices().items()})
    assert "stay dense" not in caplog.text  # although the probe does not reach every expert
    assert {m.share for name, m in student.matrices().items() if "experts" in name} == {0.5}
    assert len(results[0]) == len(results[1]) and not any(name.endswith("gate") for name in results[1])
    for name, weight in results[1].items():
        path, _, rest = name.partition(".experts.")
        expert, _, which = rest.partition(".")
        name = f"{path}.experts.{'gate_up' if which == 'up' else 'down'}_proj[{expert}]" if rest else name
        assert_close(weight, results[0][name], rtol=1e-3, atol=1e-4)
    with pytest.raises(ReconError, match=r"has experts, such as 'model.layers.0.mlp.experts.\d.up'"):
        student.windows("matrix")


def test_experts_that_the_probe_does_not_reach_are_in_a_half_too():
    decoder = apart(make_model("mixtral", num_local_experts=32))
    halves = [decoder.matrices(window) for window in decoder.windows("half-block")]
    assert sorted(name for half in halves for name in half) == sorted(decoder.matrices())  # each in one
    assert all((".mlp." in name) == (number % 2 == 1) for number, half in enumerate(halves) for name in half)
