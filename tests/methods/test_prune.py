"""The pruning pass: exact masks, nothing else touched, and statistics against a slow loop over whole models."""

import copy

import pytest
import torch
from torch.testing import assert_close

import recon.runtime.execution
from recon.config import PruningConfig
from recon.errors import ReconError
from recon.kernels.criteria import CRITERIA, Structured
from recon.kernels.moments import add_gram, mirrored
from recon.kernels.patterns import Pattern
from recon.methods import prune as pruning
from recon.methods.prune import prune
from recon.methods.statistics import gather
from recon.model.discovery import take_apart
from recon.runtime.execution import Execution


@pytest.fixture(scope="module")
def dense(tiny):
    """A decoder whose model no test changes; two blocks."""
    return take_apart(tiny("llama", num_hidden_layers=2))


@pytest.fixture
def fresh(dense):
    """Factory of copies of `dense`."""
    return lambda: take_apart(copy.deepcopy(dense.model), like=dense)


def weights(decoder):
    return {name: matrix.weight.detach().clone() for name, matrix in decoder.matrices().items()}


# ---- masks


@pytest.mark.parametrize("scope", ["row", "matrix", "auto"])
@pytest.mark.parametrize("pattern", ["0.5", "0.7", "2:4", "4:8"])
@pytest.mark.parametrize(
    "criterion", [name for name, rule in CRITERIA.items() if not isinstance(rule, Structured) and name != "none"]
)
def test_masks_are_exact_and_the_rest_is_untouched(fresh, tokens, criterion, pattern, scope):
    decoder = fresh()
    before = {name: p.detach().clone() for name, p in decoder.model.named_parameters()}
    result = prune(
        decoder,
        tokens(4, 16),
        PruningConfig(criterion=criterion, pattern=pattern, scope=scope),
        execution=Execution(compute_dtype="float32", progress=False),
    )
    assert set(result.masks) == set(result.sparsity) == set(decoder.matrices())
    rule, spec = CRITERIA[criterion], Pattern.parse(pattern)
    for name, matrix in decoder.matrices().items():
        mask = result.masks[name]
        rows, columns = mask.shape
        assert mask.dtype == torch.bool
        assert torch.equal(matrix.weight != 0, mask)
        if spec.m:
            assert (mask.view(-1, spec.m).sum(1) == spec.n).all()
        elif (rule.scope if scope == "auto" else scope) == "row":
            assert ((~mask).sum(1) == round(spec.sparsity * columns)).all()
        else:
            assert (~mask).sum() == round(spec.sparsity * rows * columns)
        assert result.sparsity[name] == pytest.approx((~mask).float().mean().item())
        if criterion != "sparsegpt":  # which alone changes what survives
            assert torch.equal(matrix.weight, before[f"{name}.weight"] * mask)
        else:
            assert not torch.equal(matrix.weight, before[f"{name}.weight"] * mask)
    pruned = {f"{name}.weight" for name in result.masks}
    others = {name for name in before if name not in pruned}
    assert {
        "lm_head.weight",
        "model.embed_tokens.weight",
        "model.layers.1.input_layernorm.weight",
        "model.norm.weight",
    } <= others
    for name in others:
        assert torch.equal(decoder.model.get_parameter(name), before[name])


def test_scopes_differ(fresh, tokens):
    masks = [
        prune(
            fresh(),
            tokens(4, 16),
            PruningConfig(criterion="wanda", pattern="0.5", scope=scope),
            execution=Execution(progress=False),
        ).masks
        for scope in ("row", "matrix", "auto")
    ]
    assert any(not torch.equal(masks[0][name], masks[1][name]) for name in masks[0])
    assert all(torch.equal(masks[0][name], masks[2][name]) for name in masks[0])


def test_total_sparsity_counts_weights(fresh):
    result = prune(fresh(), PruningConfig(criterion="magnitude", pattern="0.7"), execution=Execution(progress=False))
    zeros = sum(int((~mask).sum()) for mask in result.masks.values())
    assert result.total_sparsity == pytest.approx(zeros / sum(mask.numel() for mask in result.masks.values()))
    assert result.total_sparsity == pytest.approx(0.7, abs=1e-3)


@pytest.mark.parametrize("pattern", ["0.5", "2:4"])
@pytest.mark.parametrize("criterion", ["magnitude", "wanda", "ria"])
def test_equal_weights_leave_exact_sparsity(fresh, tokens, criterion, pattern):
    decoder = fresh()
    with torch.no_grad():
        for matrix in decoder.matrices().values():
            matrix.weight.fill_(0.25)
    result = prune(
        decoder, tokens(4, 16), PruningConfig(criterion=criterion, pattern=pattern), execution=Execution(progress=False)
    )
    assert set(result.sparsity.values()) == {0.5}


def test_gpt2_rows_are_output_neurons(tiny, tokens):
    model = tiny("gpt2", n_layer=1)
    prune(model, tokens(4, 16), PruningConfig(criterion="wanda", pattern="0.5", scope="row"), execution=Execution(progress=False))
    stored = model.transformer.h[0].mlp.c_fc.weight  # Conv1D: (in 32, out 128)
    assert ((stored == 0).sum(0) == 16).all()
    assert not ((stored == 0).sum(1) == 64).all()


def test_gpt2_groups_of_m_run_along_inputs(tiny):
    model = tiny("gpt2", n_layer=1)
    prune(model, PruningConfig(criterion="magnitude", pattern="2:4"), execution=Execution(progress=False))
    stored = model.transformer.h[0].attn.c_attn.weight
    assert ((stored.T.reshape(-1, 4) == 0).sum(1) == 2).all()
    assert not ((stored.reshape(-1, 4) == 0).sum(1) == 2).all()


def test_a_model_is_as_good_as_its_decoder(fresh, tokens):
    decoder = fresh()
    model = copy.deepcopy(decoder.model)
    one, other = (prune(given, tokens(4, 16), execution=Execution(progress=False)).masks for given in (decoder, model))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_random_masks_follow_the_seed(fresh):
    masks = [
        prune(fresh(), PruningConfig(criterion="random"), seed=seed, execution=Execution(progress=False)).masks
        for seed in (0, 0, 1)
    ]
    name = "model.layers.0.self_attn.q_proj"
    assert torch.equal(masks[0][name], masks[1][name])
    assert not torch.equal(masks[0][name], masks[2][name])
    assert not torch.equal(masks[0][name], masks[0]["model.layers.1.self_attn.q_proj"])


# ---- statistics


@torch.no_grad()
def slow_statistics(models, samples, kind):
    """Matrix name -> statistic, from whole forward passes sample by sample; block i is read in `models[i]`."""
    found = {}
    for index, model in enumerate(models):
        names = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and f"layers.{index}." in n]
        seen = {name: [] for name in names}
        handles = []
        for name, inputs in seen.items():

            def keep(module, args, inputs=inputs):
                inputs.append(args[0][0].double())

            handles.append(model.get_submodule(name).register_forward_pre_hook(keep))
        for sample in samples:
            model(input_ids=sample[None], use_cache=False)
        for handle in handles:
            handle.remove()
        for name, inputs in seen.items():
            x = torch.cat(inputs)
            found[name] = x.T @ x / len(x) if kind == "gram" else (x.square().sum(0) / len(x)).sqrt()
    return found


@pytest.mark.parametrize("propagation", ["sparse", "dense"])
@pytest.mark.parametrize("criterion, kind", [("wanda", "norm"), ("sparsegpt", "gram")])
def test_statistics_are_those_of_the_propagation(dense, fresh, tokens, monkeypatch, criterion, kind, propagation):
    decoder, samples, used = fresh(), tokens(5, 12), {}
    original = pruning._prune_matrix

    def record(matrix, statistics, *rest):
        used[matrix.name] = statistics.clone()
        return original(matrix, statistics, *rest)

    monkeypatch.setattr(pruning, "_prune_matrix", record)
    prune(
        decoder,
        samples,
        PruningConfig(criterion=criterion, statistics=propagation),
        execution=Execution(compute_dtype="float32", progress=False),
    )
    # Block 1 reads a model whose block 0 is pruned and which is dense from there on.
    partly = copy.deepcopy(dense.model)
    partly.model.layers[0].load_state_dict(decoder.model.model.layers[0].state_dict())
    sparse, plain = ([dense.model, m] for m in (partly, dense.model))
    expected = slow_statistics(sparse if propagation == "sparse" else plain, samples, kind)
    other = slow_statistics(plain if propagation == "sparse" else sparse, samples, kind)
    assert set(used) == set(expected)
    for name, statistic in used.items():
        assert statistic.dtype == torch.float32
        assert_close(statistic.double(), expected[name], rtol=1e-3, atol=1e-4)
    last = "model.layers.1.mlp.down_proj"
    assert not torch.allclose(used[last].double(), other[last], rtol=1e-2)


@pytest.mark.parametrize("criterion", ["wanda", "ria", "sparsegpt"])
def test_batches_do_not_change_masks(fresh, tokens, monkeypatch, criterion):
    runs = []
    for size in (1, 2, 5):
        monkeypatch.setattr(recon.runtime.execution, "TOKENS", 16 * size)
        runs.append(
            prune(
                fresh(),
                tokens(5, 16),
                PruningConfig(criterion=criterion),
                execution=Execution(compute_dtype="float32", progress=False),
            )
        )
    for name, mask in runs[0].masks.items():
        assert torch.equal(mask, runs[1].masks[name])
        assert torch.equal(mask, runs[2].masks[name])


@pytest.mark.parametrize("pattern", ["0.5", "2:4"])
@pytest.mark.parametrize("criterion", ["magnitude", "wanda", "random"])
def test_swaps_lower_the_error_of_every_matrix(dense, fresh, tokens, criterion, pattern):
    batch, errors = tokens(16, 30), {}
    _, grams = gather(Execution("cpu", "float32"), dense, dense.windows("block")[0], dense.embed(batch), "gram")
    for swaps in (0, 30):
        decoder = fresh()
        result = prune(
            decoder,
            batch,
            PruningConfig(criterion=criterion, pattern=pattern, scope="row", mask_refinement=swaps),
            execution=Execution(compute_dtype="float32", progress=False),
        )
        assert result.total_sparsity == 0.5
        for name, gram in grams.items():
            difference = decoder.matrices()[name].weight - dense.matrices()[name].weight
            errors.setdefault(name, []).append(((difference @ gram) * difference).sum().item())
            assert torch.equal(decoder.matrices()[name].weight, dense.matrices()[name].weight * result.masks[name])
    assert all(after < 0.98 * before for before, after in errors.values())


def test_swaps_need_samples_and_a_criterion_that_scores(fresh, tokens):
    with pytest.raises(ReconError, match="choosing by 'magnitude' with swaps weighs activations"):
        prune(fresh(), None, PruningConfig(criterion="magnitude", mask_refinement=3))
    with pytest.raises(ReconError, match="criterion 'sparsegpt' adapts weights to its own mask"):
        prune(fresh(), tokens(2, 8), PruningConfig(criterion="sparsegpt", mask_refinement=3))


@pytest.mark.parametrize("width", [1, 255, 256, 257, 1536, 1537])
def test_the_upper_triangle_makes_the_gram_matrix(width):
    parts = torch.randn(3, 40, width, generator=torch.Generator().manual_seed(0)).double()
    total = torch.zeros(width, width, dtype=torch.float64)
    for x in parts:
        add_gram(total, x)
    x = parts.flatten(0, 1)
    assert_close(mirrored(total), x.T @ x)


@torch.no_grad()
def test_gram_accumulates_in_float32_under_autocast(dense, tokens):
    name, seen = "model.layers.0.self_attn.q_proj", []
    handle = dense.model.get_submodule(name).register_forward_pre_hook(lambda m, args: seen.append(args[0].reshape(-1, 32)))
    try:
        execution = Execution("cpu", "bfloat16")
        stream = execution.run(dense.embed, tokens(16, 60))
        _, statistics = gather(execution, dense, dense.windows("block")[0], stream, "gram")
    finally:
        handle.remove()
    x = torch.cat(seen)
    exact = x.double().T @ x.double() / len(x)
    formed_in_bfloat16 = sum((b.bfloat16().T @ b.bfloat16() for b in seen), torch.zeros(32, 32).bfloat16()) / len(x)

    def error(gram):
        return ((gram.double() - exact).norm() / exact.norm()).item()

    assert statistics[name].dtype == torch.float32
    assert error(formed_in_bfloat16) > 1e-3  # what this guards against
    assert error(statistics[name]) < 1e-5


@pytest.mark.parametrize("dtype, close", [("bfloat16", False), ("float32", True)])
def test_compute_dtype_reaches_the_activations(dense, fresh, tokens, monkeypatch, dtype, close):
    used, original = {}, pruning._prune_matrix

    def record(matrix, statistics, *rest):
        used[matrix.name] = statistics.clone()
        return original(matrix, statistics, *rest)

    monkeypatch.setattr(pruning, "_prune_matrix", record)
    prune(
        fresh(),
        tokens(8, 30),
        PruningConfig(criterion="sparsegpt", statistics="dense"),
        execution=Execution(compute_dtype=dtype, progress=False),
    )
    expected = slow_statistics([dense.model] * 2, tokens(8, 30), "gram")
    for name, gram in used.items():
        error = ((gram - expected[name]).norm() / expected[name].norm()).item()
        assert error < 1e-2
    assert (error < 1e-5) == close  # of the last matrix


# ---- options and refusals


@pytest.mark.parametrize("criterion", [name for name, rule in CRITERIA.items() if rule.statistics == "none"])
def test_criteria_without_statistics_need_no_samples(fresh, criterion):
    expected = 0.0 if criterion == "none" else 0.5
    assert prune(
        fresh(), PruningConfig(criterion=criterion), execution=Execution(progress=False)
    ).total_sparsity == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("criterion", [name for name, rule in CRITERIA.items() if rule.statistics != "none"])
def test_criteria_with_statistics_refuse_to_run_without_samples(fresh, criterion):
    with pytest.raises(ReconError, match=f"{criterion!r} weighs activations and needs calibration samples"):
        prune(fresh(), PruningConfig(criterion=criterion), execution=Execution(progress=False))


def test_options_reach_the_criterion(fresh, tokens):
    small, large = (
        prune(
            fresh(),
            tokens(4, 16),
            PruningConfig(criterion="sparsegpt", sparsegpt_block_size=b),
            execution=Execution(progress=False),
        ).masks
        for b in (4, 128)
    )
    assert any(not torch.equal(small[name], large[name]) for name in small)


@pytest.mark.parametrize(
    "given, message",
    [
        (
            {"criterion": "wandas"},
            "'wandas' is unknown; choose one of magnitude, none, random, wanda, ria, sparsegpt, wanda-sp, flap",
        ),
        ({"propagation": "mixed"}, "unknown pruning propagation 'mixed'; allowed: sparse, dense"),
        ({"pattern": "3:2"}, "pattern '3:2'"),
        ({"scope": "column"}, "scope 'column' is unknown"),
        ({"pattern": "3:5"}, "model.layers.0.self_attn.q_proj has 32 input columns"),
        ({"compute_dtype": "float16"}, "unknown compute dtype 'float16'; allowed: auto, bfloat16, float32"),
    ],
)
def test_bad_options_are_refused_before_anything_changes(fresh, tokens, given, message):
    decoder = fresh()
    before = weights(decoder)
    with pytest.raises(ReconError, match=message):
        prune(decoder, tokens(2, 8), **given, execution=Execution(progress=False))
    assert all(torch.equal(matrix.weight, before[name]) for name, matrix in decoder.matrices().items())


@pytest.mark.parametrize("early", [True, False])
def test_nan_weights_are_refused_by_name(tiny, fresh, early):
    decoder = fresh()
    with torch.no_grad():
        decoder.model.model.layers[1].mlp.up_proj.weight[3, 5] = torch.nan
    given = decoder.model if early else decoder  # the structure is found with the NaN, or without it
    with pytest.raises(ReconError, match=r"'model.layers.1.mlp.up_proj': .*1 of 2048 entries of the weight are NaN"):
        prune(given, PruningConfig(criterion="magnitude"), execution=Execution(progress=False))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("criterion", ["wanda", "sparsegpt"])
def test_nan_activations_are_refused_by_name(fresh, tokens, criterion, value):
    decoder = fresh()
    with torch.no_grad():
        decoder.model.model.layers[0].post_attention_layernorm.weight[2] = value
    with pytest.raises(ReconError, match=r"input of 'model.layers.0.mlp.gate_proj' holds NaN or infinite activations"):
        prune(decoder, tokens(2, 8), PruningConfig(criterion=criterion), execution=Execution(progress=False))
