"""Reconstruction: zeros stay, errors fall, every window gets the inputs and targets that its propagation says."""

import copy
import json
import logging

import pytest
import torch
from fixtures.models import FLOAT32
from torch.nn import functional as F
from torch.testing import assert_close

from recon.config import PruningConfig, ReconstructionConfig
from recon.errors import ReconError
from recon.evaluate.perplexity import drift
from recon.kernels.adapters import ADAPTERS
from recon.kernels.losses import LOSSES, channel_variance, position_weights, unexplained
from recon.methods import fit, propagation
from recon.methods.callbacks import Callback
from recon.methods.samples import ERROR_SAMPLES
from recon.methods.prune import prune
from recon.methods.reconstruct import GREW, NOT_FINITE, RECONSTRUCTED, one_after_another, reconstruct
from recon.model.decoder import Decoder
from recon.model.discovery import decompose
from recon.model.windows import Window
from recon.runtime.activations import Activations
from recon.runtime.execution import Execution

PROPAGATIONS, STARTS = ("dense", "sparse", "mixed"), ("pruned", "exact")
CALL = {"pruning", "masks", "held_out", "seed", "execution", "callbacks"}  # arguments of `reconstruct`; all others are options


@pytest.fixture(scope="module")
def dense(tiny):
    """A decoder whose model no test changes; two blocks."""
    return decompose(tiny("llama", num_hidden_layers=2))


@pytest.fixture
def pruned(dense, tokens):
    """Factory of pruned copies of `dense` (or of another decoder)."""

    def make(of=dense, pattern="0.5"):
        student = decompose(copy.deepcopy(of.model), like=of)
        prune(student, tokens(4, 16, seed=1), PruningConfig(pattern=pattern), execution=FLOAT32)
        return student

    return make


@pytest.fixture
def trained(monkeypatch):
    """What each window is trained on, and by which schedule: (inputs, targets, weights, schedule)."""
    seen, train = [], fit.train

    def record(loss, data, parameters, schedule, *rest):
        seen.append((*(tensor.clone() for tensor in data), schedule))
        return train(loss, data, parameters, schedule, *rest)

    monkeypatch.setattr(fit, "train", record)
    return seen


def run(student, teacher, samples, **options):
    """Reconstructs `student`, for two epochs unless `options` say otherwise."""
    call = {"execution": FLOAT32} | {name: options.pop(name) for name in CALL & options.keys()}
    return reconstruct(student, teacher, samples, ReconstructionConfig(**{"epochs": 2} | options), **call)


def state(decoder):
    return {name: p.detach().clone() for name, p in decoder.model.named_parameters()}


def epochs(report, count):
    """The mean loss of each of `count` epochs."""
    return torch.tensor(report.losses).view(count, -1).mean(1).tolist()


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


# ---- invariants


@pytest.mark.parametrize("loss", ["whitened", "mse", "cosine"])
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("propagation", PROPAGATIONS)
@pytest.mark.parametrize("granularity", ["matrix", "half-block", "block", "2-blocks", "quarter", "model"])
def test_zeros_stay_and_the_rest_is_untouched(dense, pruned, tokens, granularity, propagation, start, loss):
    student, teacher_before = pruned(), state(dense)
    before = state(student)
    train = {"pruned": "all", "exact": "matrices"}[start]
    options = {"granularity": granularity, "propagation": propagation, "start": start, "loss": loss, "train": train, "chunks": 1}
    reports = run(student, dense, tokens(3, 12), **options)
    assert [r.status for r in reports] == [RECONSTRUCTED] * len(dense.windows(granularity))
    after = state(student)
    for name in student.matrices():
        old, new = before[f"{name}.weight"], after[f"{name}.weight"]
        assert torch.equal(old == 0, new == 0)
        assert not torch.equal(old, new)
    trained = {name for window in dense.windows(granularity) for name in dense.trained(window, train)}
    assert any("norm" in name for name in trained) == (train == "all" and granularity != "matrix")
    for name in before:
        assert torch.equal(before[name], after[name]) == (name not in trained)
    assert "model.norm.weight" not in trained and "model.embed_tokens.weight" not in trained and "lm_head.weight" not in trained
    assert same(teacher_before, state(dense))
    for decoder in (dense, student):
        assert all(p.grad is None for p in decoder.model.parameters())


@pytest.mark.parametrize("propagation", PROPAGATIONS)
def test_exact_solver_keeps_zeros(dense, pruned, tokens, propagation):
    student = pruned()
    before = state(student)
    run(student, dense, tokens(3, 12), granularity="matrix", solver="exact", propagation=propagation)
    after = state(student)
    matrices = {f"{name}.weight" for name in student.matrices()}
    for name in before:
        assert torch.equal(before[name] == 0, after[name] == 0)
        assert torch.equal(before[name], after[name]) == (name not in matrices)


@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
def test_groups_of_m_stay(dense, pruned, tokens, pattern):
    student = pruned(pattern=pattern)
    run(student, dense, tokens(3, 12), start="exact")
    n, m = map(int, pattern.split(":"))
    for matrix in student.matrices().values():
        assert ((matrix.weight != 0).reshape(-1, m).sum(1) == n).all()


@pytest.mark.parametrize("family", ["gpt2", "opt", "gpt_neox", "falcon", "gemma2"])
@pytest.mark.parametrize("granularity", ["matrix", "half-block", "block"])
def test_other_families(tiny, pruned, tokens, family, granularity):
    dense = decompose(tiny(family))
    student = pruned(dense)
    masks = {name: matrix.weight != 0 for name, matrix in student.matrices().items()}
    batch = tokens(12, 16)
    before = drift(student, dense, batch, execution=FLOAT32)[0][-1]
    run(student, dense, batch, granularity=granularity, start="exact", learning_rate=1e-3, epochs=4)
    assert all(torch.equal(matrix.weight != 0, masks[name]) for name, matrix in student.matrices().items())
    assert drift(student, dense, batch, execution=FLOAT32)[0][-1] < before


def test_masks_are_read_from_zeros(dense, pruned, tokens):
    masks = {name: matrix.weight != 0 for name, matrix in pruned().matrices().items()}
    one, other = pruned(), pruned()
    run(one, dense, tokens(3, 12))
    run(other, dense, tokens(3, 12), masks=masks)
    assert same(state(one), state(other))


def test_given_masks_are_obeyed(dense, pruned, tokens):
    """Also where a kept weight happens to be zero, which may then grow."""
    student = pruned()
    masks = {name: matrix.weight != 0 for name, matrix in student.matrices().items()}
    name = "model.layers.0.mlp.up_proj"
    with torch.no_grad():
        student.matrices()[name].weight[masks[name]] = 0.0
    run(student, dense, tokens(3, 12), masks=masks)
    assert torch.equal(student.matrices()[name].weight != 0, masks[name])


# ---- exact solutions


def error_of(weight, target, x):
    return (x @ (weight - target).T).double().square().sum().item()


@torch.no_grad()
def test_exact_matrices_are_least_squares_solutions(dense, pruned, tokens):
    student, batch = pruned(), tokens(32, 32)
    start = state(student)
    run(student, dense, batch, granularity="matrix", solver="exact", propagation="dense")
    hidden = dense.embed(batch)
    for window in dense.windows("matrix")[:4]:
        x = dense.inputs(window, hidden).reshape(-1, dense.matrices()[window.matrices[0]].weight.shape[1])
        for name in window.matrices:
            target, found = dense.matrices()[name].weight, student.matrices()[name].weight
            best = torch.zeros_like(target)
            for row, support in enumerate(found != 0):
                best[row, support] = torch.linalg.lstsq(x[:, support].double(), (x @ target[row]).double()).solution.float()
            least = error_of(best, target, x)
            assert 0 < least < 0.9 * error_of(start[f"{name}.weight"], target, x)
            assert error_of(found, target, x) < 1.001 * least


@torch.no_grad()
def test_exact_matrices_under_mixed_propagation(tiny, pruned, tokens):
    """Least squares of the dense outputs on the reconstructed model's inputs, where these differ from the dense ones."""
    dense = decompose(tiny("qwen2", num_hidden_layers=1))
    student, batch = pruned(dense), tokens(32, 32)
    run(student, dense, batch, granularity="matrix", solver="exact", propagation="mixed")
    hidden = dense.embed(batch)
    for name in ("model.layers.0.self_attn.v_proj", "model.layers.0.mlp.down_proj"):  # the first has a bias
        window = Window(range(1), matrices=(name,))
        x, wanted = student.inputs(window, hidden).flatten(0, 1), dense.inputs(window, hidden).flatten(0, 1)
        matrix = dense.matrices()[name]
        wanted = F.linear(wanted, matrix.weight)
        found = student.matrices()[name].weight
        best = torch.zeros_like(found)
        for row, support in enumerate(found != 0):
            best[row, support] = torch.linalg.lstsq(x[:, support].double(), wanted[:, row].double()).solution.float()
        errors = [(x @ w.T - wanted).square().sum().item() for w in (found, best)]
        assert errors[0] < 1.01 * errors[1]


@pytest.mark.parametrize("propagation", PROPAGATIONS)
def test_exact_never_raises_the_error(dense, pruned, tokens, propagation):
    reports = run(pruned(), dense, tokens(4, 48), granularity="matrix", solver="exact", propagation=propagation)
    for report in reports:
        assert report.error_after["calibration"] <= 1.02 * report.error_before["calibration"]
        assert report.losses == []
    total = [sum(getattr(r, when)["calibration"] for r in reports) for when in ("error_before", "error_after")]
    assert total[1] < 0.8 * total[0]


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("propagation", PROPAGATIONS)
def test_half_blocks_lower_the_error_on_unseen_samples(dense, pruned, tokens, start, propagation):
    held_out = tokens(4, 16, seed=9)
    schedule = {"learning_rate": 1e-2, "epochs": 4, "batch_size": 2, "chunks": 4}
    for r in run(pruned(), dense, tokens(32, 16), **schedule, start=start, propagation=propagation, held_out=held_out):
        assert r.error_after["held_out"] < r.error_before["held_out"]
        assert epochs(r, 4)[-1] < epochs(r, 4)[0]
        assert len(r.losses) == 4 * 32 / 2 * (4 if r.name.endswith("mlp") else 1)  # chunks


def test_exact_start_begins_lower(dense, pruned, tokens):
    reports = [run(pruned(), dense, tokens(16, 16), batch_size=16, epochs=1, start=start) for start in ("pruned", "exact")]
    assert reports[1][0].losses[0] < 0.9 * reports[0][0].losses[0]


@pytest.mark.parametrize("family", ["gpt_neox", "phi"])
@pytest.mark.parametrize("propagation", PROPAGATIONS)
def test_parallel_half_blocks_lower_the_drift(tiny, pruned, tokens, family, propagation):
    dense = decompose(tiny(family))
    student, unseen = pruned(dense), tokens(4, 16, seed=9)
    before = drift(student, dense, unseen, execution=FLOAT32)[0]
    run(student, dense, tokens(32, 16), epochs=3, propagation=propagation)
    after = drift(student, dense, unseen, execution=FLOAT32)[0]
    assert all(b < 0.9 * a for a, b in zip(before, after, strict=True))


def test_fitting_a_parallel_mlp_half_does_not_spoil_attention(tiny, pruned, tokens):
    dense = decompose(tiny("phi", num_hidden_layers=1))  # one norm feeds both halves
    student, batch = pruned(dense), tokens(8, 16)
    reports = run(student, dense, batch, learning_rate=1e-2, epochs=3)
    window, hidden = dense.windows("half-block")[0], dense.embed(batch)
    with torch.no_grad():
        targets = dense.forward(window, hidden)
        now = unexplained(student.forward(window, hidden)[:ERROR_SAMPLES], targets[:ERROR_SAMPLES], channel_variance(targets))
    assert now == pytest.approx(reports[0].error_after["calibration"], rel=1e-5)


def test_a_matrix_group_is_fitted_as_if_each_alone(dense, pruned, tokens):
    def matrix_by_matrix(reconstruction, windows):
        single = [
            Window(w.blocks, matrices=(name,), ends_block=w.ends_block and name == w.matrices[-1])
            for w in windows
            for name in w.matrices
        ]
        return one_after_another(reconstruction, single)

    together, alone = pruned(), pruned()
    before = state(together)
    # All samples in one step: the order of samples depends on the window's name.
    options = {"granularity": "matrix", "epochs": 40, "batch_size": 8, "chunks": 1}
    run(together, dense, tokens(8, 12), **options)
    execution = Execution("cpu", "float32", progress=False, loop=matrix_by_matrix)
    assert len(run(alone, dense, tokens(8, 12), execution=execution, **options)) == 14
    one, other = state(together), state(alone)
    for name in (f"{name}.weight" for name in dense.matrices()):
        moved = (one[name] - before[name]).norm()
        assert moved > 0.01
        assert (one[name] - other[name]).norm() < 1e-3 * moved


# ---- propagation


@torch.no_grad()
def activations(model, batch):
    """Window name -> (input, output), from one plain forward pass of a two-block Llama."""
    seen, handles = {}, []

    def on(name, module, key):
        handles.append(module.register_forward_hook(lambda m, args, out: seen.update({name: (args[0], out)[key].clone()})))

    for index, layer in enumerate(model.model.layers):
        on(f"in {index}", layer, 0)
        on(f"middle {index}", layer.post_attention_layernorm, 0)  # the residual stream between the halves
        on(f"out {index}", layer, 1)
        for name, module in layer.named_modules():
            if isinstance(module, torch.nn.Linear):
                on(f"x model.layers.{index}.{name}", module, 0)
                on(f"y model.layers.{index}.{name}", module, 1)
    model(input_ids=batch, use_cache=False)
    for handle in handles:
        handle.remove()
    pairs = {}
    for i in range(2):
        pairs[f"block {i}"] = seen[f"in {i}"], seen[f"out {i}"]
        pairs[f"block {i} attention"] = seen[f"in {i}"], seen[f"middle {i}"]
        pairs[f"block {i} mlp"] = seen[f"middle {i}"], seen[f"out {i}"]
        for group in (
            "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
            "self_attn.o_proj",
            "mlp.gate_proj mlp.up_proj",
            "mlp.down_proj",
        ):
            names = [f"model.layers.{i}.{name}" for name in group.split()]
            pairs["+".join(names)] = seen[f"x {names[0]}"], torch.cat([seen[f"y {name}"] for name in names], -1)
    pairs["block 0-1"] = seen["in 0"], seen["out 1"]
    return pairs


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("propagation", PROPAGATIONS)
@pytest.mark.parametrize("granularity", ["matrix", "half-block", "block", "model"])
def test_each_window_gets_the_inputs_and_targets_of_the_propagation(
    dense, pruned, tokens, trained, granularity, propagation, start
):
    student, batch = pruned(), tokens(5, 12)

    held_out = tokens(3, 12, seed=7)
    options = {"granularity": granularity, "propagation": propagation, "start": start, "chunks": 4}
    run(student, dense, batch, held_out=held_out, **options)
    windows = dense.windows(granularity)
    assert len(trained) == len(windows)
    theirs = activations(dense.model, batch)
    ours = activations(student.model, batch)  # what precedes a window was reconstructed before it, and has not changed since
    for window, (inputs, targets, weights, _) in zip(windows, trained, strict=True):
        inputs, targets = (tensor.reshape(5, 12, -1) for tensor in (inputs, targets))  # of chunks, where tokens are not mixed
        assert_close(weights.reshape(5, 12), position_weights(5, 12))
        hybrid = copy.deepcopy(student.model)  # all reconstructed but for this window, which is the dense model's
        for name, parameter in dense.parameters(window).items():
            hybrid.get_parameter(name).data.copy_(parameter)
        expected = {
            "dense": theirs[window.name],
            "sparse": (ours[window.name][0], activations(hybrid, batch)[window.name][1]),
            "mixed": (ours[window.name][0], theirs[window.name][1]),
        }
        assert_close(inputs, expected[propagation][0], rtol=1e-4, atol=1e-4)
        assert_close(targets, expected[propagation][1], rtol=1e-4, atol=1e-4)
        if window.name in ("block 1", "block 1 mlp", "model.layers.1.mlp.down_proj"):  # late enough for all to differ
            for other in {"dense", "sparse", "mixed"} - {propagation}:
                differs = [
                    not torch.allclose(a, b, rtol=1e-2, atol=1e-2)
                    for a, b in zip((inputs, targets), expected[other], strict=True)
                ]
                assert any(differs)


@pytest.mark.parametrize("propagation", PROPAGATIONS)
def test_parallel_halves_both_read_the_blocks_input(tiny, pruned, tokens, trained, propagation):
    dense = decompose(tiny("gpt_neox", num_hidden_layers=2))
    student, batch = pruned(dense), tokens(5, 12)

    run(student, dense, batch, propagation=propagation)

    @torch.no_grad()
    def second_block(model):
        """Input of the second block, and its two increments."""
        layer, seen = model.gpt_neox.layers[1], {}
        handles = [
            layer.register_forward_pre_hook(lambda m, args: seen.update(input=args[0])),
            layer.attention.register_forward_hook(lambda m, args, out: seen.update(attention=out[0])),
            layer.mlp.register_forward_hook(lambda m, args, out: seen.update(mlp=out)),
        ]
        model(input_ids=batch, use_cache=False)
        for handle in handles:
            handle.remove()
        return seen

    theirs, ours = second_block(dense.model), second_block(student.model)
    hybrid = copy.deepcopy(student.model)
    hybrid.gpt_neox.layers[1].load_state_dict(dense.model.gpt_neox.layers[1].state_dict())
    for half, (inputs, targets, *_) in zip(("attention", "mlp"), trained[2:], strict=True):
        source = theirs if propagation == "dense" else ours
        goal = second_block(hybrid) if propagation == "sparse" else theirs
        assert_close(inputs.reshape(5, 12, -1), source["input"], rtol=1e-4, atol=1e-4)
        assert_close(targets.reshape(5, 12, -1), goal["input"] + goal[half], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"start": "exact"}, {"granularity": "matrix", "solver": "exact"}])
def test_held_out_samples_decide_only_what_is_kept(dense, pruned, tokens, options):
    models = [pruned() for _ in range(3)]
    reports = [
        run(model, dense, tokens(4, 12), held_out=held, propagation="dense", **options)  # where no window reads another
        for model, held in zip(models, (None, tokens(2, 12, seed=5), tokens(3, 12, seed=6)), strict=True)
    ]
    before, fitted = state(pruned()), state(models[0])
    for model, found in zip(models[1:], reports[1:], strict=True):
        for window, report in zip(dense.windows(options.get("granularity", "half-block")), found, strict=True):
            expected = {RECONSTRUCTED: fitted, GREW: before}[report.status]
            for name, weight in model.trained(window, "matrices").items():
                # Batches are cut at other places, so rounding may differ; what is learned may not.
                assert_close(weight, expected[name], rtol=1e-4, atol=1e-5)
    assert set(reports[0][0].error_before) == {"calibration"}
    assert set(reports[1][0].error_before) == set(reports[1][0].error_after) == {"held_out"}
    assert reports[1][0].error_before["held_out"] != reports[2][0].error_before["held_out"]


# ---- cheaper ways


def test_chunks_are_taken_where_tokens_are_not_mixed(dense, pruned, tokens, trained):
    batch, options = tokens(3, 12), {"chunks": 4, "epochs": 1, "propagation": "dense"}
    for granularity, steps in {"half-block": [3, 12, 3, 12], "block": [3, 3], "matrix": [12] * 8}.items():
        reports = run(pruned(), dense, batch, granularity=granularity, **options)
        assert [len(report.losses) for report in reports] == steps
    for found, expected in zip(trained[1][:2], activations(dense.model, batch)["block 0 mlp"], strict=True):
        assert found.shape == (12, 3, 32)
        assert_close(found.reshape(3, 12, 32), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("length, chunks", [(12, 4), (10, 2), (11, 1)])
def test_chunks_are_as_many_as_divide_the_samples(dense, pruned, tokens, length, chunks):
    reports = run(pruned(), dense, tokens(3, length), epochs=1, chunks=4)
    assert [len(report.losses) for report in reports] == [3, 3 * chunks] * 2


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize(
    ("propagation", "granularity"), [("mixed", "half-block"), ("dense", "matrix"), ("mixed", "matrix"), ("dense", "model")]
)
@pytest.mark.parametrize("criterion", ["wanda", "sparsegpt", "magnitude"])
def test_one_pass_gives_what_pruning_and_then_reconstructing_gives(dense, tokens, criterion, propagation, granularity, start):
    samples, held_out, found = tokens(6, 48), tokens(2, 48, seed=1), []
    options = {"propagation": propagation, "granularity": granularity, "start": start, "epochs": 1, "held_out": held_out}

    class Found(Callback):
        def on_pruned(self, pruning):
            found.append(pruning)

    config, (one, two) = PruningConfig(criterion), (decompose(copy.deepcopy(dense.model), like=dense) for _ in range(2))
    masks = prune(two, samples, config, execution=FLOAT32).masks
    run(two, dense, samples, masks=masks, **options)
    run(
        one, dense, samples, pruning=config, callbacks=[Found()], execution=Execution("cpu", "float32", progress=False), **options
    )
    assert same(state(one), state(two))
    assert found[0].masks.keys() == masks.keys() and all(torch.equal(found[0].masks[name], masks[name]) for name in masks)


@pytest.mark.parametrize(
    ("pruning", "options", "message"),
    [
        ({"statistics": "sparse"}, {}, "statistics sparse.*recon.prune"),
        ({"criterion": "wanda-sp", "pattern": "0.2"}, {}, "'wanda-sp' weighs heads and neurons"),
        ({}, {"propagation": "sparse"}, "sparse propagation"),
        ({"prune_samples": 3}, {}, r"other samples \(3\) than reconstruction \(4\)"),
        ({}, {"masks": {}}, "both masks and pruning"),
    ],
)
def test_what_cannot_be_pruned_in_one_pass_is_refused(dense, tokens, pruning, options, message):
    student = decompose(copy.deepcopy(dense.model), like=dense)
    with pytest.raises(ReconError, match=message):
        run(student, dense, tokens(4, 48), pruning=PruningConfig(**pruning), **options)


def test_exact_iterations_reach_the_solver(dense, pruned, tokens):
    options = {"granularity": "matrix", "solver": "exact"}
    errors = [
        sum(r.error_after["calibration"] for r in run(pruned(), dense, tokens(4, 48), exact_iterations=n, **options))
        for n in (1, 3, 30)
    ]
    assert errors[0] > 1.05 * errors[1] and errors[1] > 1.01 * errors[2]


# ---- what passes share


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
@pytest.mark.parametrize("propagation", ["dense", "mixed"])
def test_shared_activations_change_no_bit(tiny, pruned, tokens, monkeypatch, family, propagation):
    dense, batch, held_out = decompose(tiny(family)), tokens(5, 12), tokens(3, 12, seed=7)
    cases = [
        {"granularity": "block"}, {"granularity": "half-block", "start": "exact"}, {"granularity": "matrix"},
        {"granularity": "matrix", "solver": "exact"}, {"granularity": "model"}, {"granularity": "half-block", "chunks": 4},
        {"granularity": "half-block", "start": "exact"},
    ]  # fmt: skip
    sharing_them, ran = Execution("cpu", "float32", progress=False, cache=Activations()), []
    forward = Decoder.forward

    def counting(self, window, hidden):
        ran.append(self is dense)
        return forward(self, window, hidden)

    monkeypatch.setattr(Decoder, "forward", counting)
    for number, options in enumerate(cases):
        alone, sharing = pruned(dense), pruned(dense)
        options = {"held_out": held_out, "propagation": propagation, "epochs": 1, "chunks": 1} | options
        run(alone, dense, batch, **options)
        ran.clear()
        run(sharing, dense, batch, execution=sharing_them, **options)
        assert same(state(alone), state(sharing))
        if propagation == "dense" and number >= 4:
            assert not any(ran)  # all that is asked of the dense model is known by now


def test_the_exact_solver_runs_the_dense_block_once(dense, pruned, tokens, monkeypatch):
    ran, forward = [], Decoder.forward

    def counting(self, window, hidden):
        if self is dense and not window.matrices:
            ran.append(len(hidden))
        return forward(self, window, hidden)

    monkeypatch.setattr(Decoder, "forward", counting)
    run(pruned(), dense, tokens(16, 12), granularity="matrix", solver="exact", propagation="dense")
    # Per block: once for the Gram matrices and the output; once for the inputs of the few samples that errors are measured on.
    assert ran == [16, ERROR_SAMPLES] * 2


# ---- seeds


@pytest.mark.parametrize("granularity", ["matrix", "half-block"])
def test_same_seed_same_weights(dense, pruned, tokens, granularity):
    runs = [pruned() for _ in range(3)]
    for model, seed in zip(runs, (0, 0, 1), strict=True):
        torch.manual_seed(int(torch.randint(1000, ())))  # the global state is none of its business
        run(model, dense, tokens(6, 12), granularity=granularity, seed=seed)
    assert same(state(runs[0]), state(runs[1]))
    assert not same(state(runs[0]), state(runs[2]))


# ---- what goes wrong


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_window_that_breaks_is_rolled_back(dense, pruned, tokens, monkeypatch, caplog, value, start):
    calls, train = [], fit.train

    def breaks(loss, data, parameters, *rest):
        losses = train(loss, data, parameters, *rest)
        calls.append(1)
        if len(calls) == 2:
            with torch.no_grad():
                parameters[0].parameter.view(-1)[3] = value
        return losses

    monkeypatch.setattr(fit, "train", breaks)
    student = pruned()
    before = state(student)
    with caplog.at_level(logging.WARNING, "recon"):
        reports = run(student, dense, tokens(4, 12), start=start)
    assert [r.status for r in reports] == [RECONSTRUCTED, NOT_FINITE, RECONSTRUCTED, RECONSTRUCTED]
    assert reports[1].error_after == reports[1].error_before
    after, windows = state(student), dense.windows("half-block")
    changed = {name for number in (0, 2, 3) for name in dense.trained(windows[number], "matrices")}
    for name in before:
        assert torch.equal(before[name], after[name]) == (name not in changed)
    assert [r.levelname for r in caplog.records if "'block 0 mlp'" in r.message and "rolled back" in r.message] == ["WARNING"]


def test_an_absurd_learning_rate_is_survived(dense, pruned, tokens):
    student = pruned()
    before = state(student)
    reports = run(student, dense, tokens(4, 12), learning_rate=1e38)
    assert {r.status for r in reports} == {NOT_FINITE}
    assert same(before, state(student))


def test_windows_that_do_not_fit_are_refused_before_anything_changes(dense, pruned, tokens):
    student = pruned()
    before = state(student)
    for options, words in (
        ({"granularity": "none"}, "granularity none"),
        ({"granularity": "3"}, "windows of 3 blocks, but the model has 2"),
        ({"masks": {}}, r"'model.layers.0.self_attn.q_proj'.* None.*\(32, 32\)"),
    ):
        with pytest.raises(ReconError, match=words):
            run(student, dense, tokens(2, 8), **options)
    assert same(before, state(student))
    with pytest.raises(ReconError, match="'model.embed_tokens.weight' is torch.bfloat16.*float32"):
        run(decompose(copy.deepcopy(student.model).bfloat16()), dense, tokens(2, 8))


def test_samples_of_another_length_are_refused(dense, pruned, tokens):
    with pytest.raises(ReconError, match="sequence length 65 is more than the 64 tokens"):
        run(pruned(), dense, tokens(2, 65))
    with pytest.raises(ReconError, match="held-out samples of 8 tokens are not as long as calibration samples, 16"):
        run(pruned(), dense, tokens(2, 16), held_out=tokens(2, 8))


def test_half_blocks_of_undivided_models_are_refused(tiny, pruned, tokens):
    dense = decompose(tiny("bloom"))
    with pytest.raises(ReconError, match="half-block windows do not fit this model"):
        run(pruned(dense), dense, tokens(2, 8))
    run(pruned(dense), dense, tokens(2, 8), granularity="block")


# ---- the call itself


def test_models_and_iterables_are_as_good_as_decoders_and_tensors(dense, pruned, tokens):
    one, other, held_out = pruned(), pruned(), tokens(3, 12, seed=7)
    reports = run(one, dense, tokens(4, 12), held_out=held_out)
    again = run(other.model, dense.model, tokens(4, 12).tolist(), held_out=({"input_ids": row} for row in held_out))
    assert same(state(one), state(other))
    assert [r.error_after for r in reports] == [r.error_after for r in again]


def test_callbacks_are_told_of_every_window_as_soon_as_it_is_done(dense, pruned, tokens):
    student, told = pruned(), []
    before = state(student)

    class Watch(Callback):
        def on_window(self, report):
            changed = {name for name, value in state(student).items() if not torch.equal(value, before[name])}
            told.append((report, len(changed)))

    reports = run(student, dense, tokens(4, 12), callbacks=[Watch(), Watch()])
    assert [report for report, _ in told] == [report for report in reports for _ in range(2)]
    assert [changed for _, changed in told] == [4, 4, 7, 7, 11, 11, 14, 14]  # matrices of the windows so far


def test_reports_are_plain_data_in_order(dense, pruned, tokens):
    plain = [vars(report) for report in run(pruned(), dense, tokens(4, 12))]
    assert [r["name"] for r in plain] == ["block 0 attention", "block 0 mlp", "block 1 attention", "block 1 mlp"]
    assert all(r["seconds"] > 0 for r in plain)
    expected = [sum(p.numel() for p in dense.trained(w, "matrices").values()) for w in dense.windows("half-block")]
    assert [r["parameters"] for r in plain] == expected
    json.dumps(plain)


# ---- what the loss sees


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("granularity", ["matrix", "half-block", "model"])
def test_what_is_to_be_matched_at_the_first_position_does_not_matter(dense, pruned, tokens, monkeypatch, granularity, loss):
    variance, found = propagation.channel_variance, []
    for size in (0.0, 1e3):

        def spoilt(targets, size=size):
            targets[:, 0] += size
            return variance(targets)

        monkeypatch.setattr(propagation, "channel_variance", spoilt)
        student = pruned()
        # Calibration samples alone: the next window is to read the same. Chunks: the first of them is all that differs.
        reports = run(student, dense, tokens(3, 12), propagation="sparse", chunks=4, granularity=granularity, loss=loss)
        found.append((state(student), [(report.losses, report.error_before, report.error_after) for report in reports]))
    assert same(found[0][0], found[1][0]) and found[0][1] == found[1][1]


def test_where_one_channel_is_massive_the_whitened_loss_explains_more_of_all_of_them(dense, pruned, tokens):
    """On unseen text: more than before the fit, and than by the squared error, which follows that channel alone."""
    teacher, student, found = decompose(copy.deepcopy(dense.model)), pruned(), {}
    with torch.no_grad():
        for layer in (*teacher.model.model.layers, *student.model.model.layers):
            layer.mlp.down_proj.weight[7] *= 30.0
    for loss in ("whitened", "mse"):
        model, held_out = decompose(copy.deepcopy(student.model), like=teacher), tokens(4, 16, seed=9)
        reports = run(model, teacher, tokens(32, 16), loss=loss, propagation="dense", chunks=4, held_out=held_out)
        found[loss] = {report.name: report for report in reports}
    for name, report in found["whitened"].items():
        after = report.error_after["held_out"]
        assert after < 0.8 * report.error_before["held_out"]
        if name.endswith("mlp"):
            assert after < 0.95 * found["mse"][name].error_after["held_out"]


def test_size_of_activations_does_not_matter(dense, pruned, tokens):
    """The loss is taken relative to the targets' variance, so that AdamW's epsilon means the same at any size."""
    found = []
    for size in (1.0, 1e-3, 1e3):
        teacher = decompose(copy.deepcopy(dense.model))
        with torch.no_grad():
            teacher.model.model.layers[0].input_layernorm.weight.mul_(size)
        student = decompose(copy.deepcopy(teacher.model), like=teacher)
        with torch.no_grad():
            for name, matrix in pruned().matrices().items():
                student.matrices()[name].weight.copy_(matrix.weight)
        reports = run(student, teacher, tokens(4, 12), granularity="matrix")
        found.append((reports[0].losses, student.matrices()["model.layers.0.self_attn.q_proj"].weight.detach()))
    for losses, weight in found[1:]:
        assert_close(losses, found[0][0], rtol=1e-3, atol=1e-5)
        assert_close(weight, found[0][1], rtol=1e-3, atol=1e-4)


# ---- adapters; windows that get worse


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_lower_the_loss_and_keep_zeros(dense, pruned, tokens, kind):
    student, batch = pruned(), tokens(16, 12)
    before = state(student)
    reports = run(student, dense, batch, learning_rate=3e-2, epochs=4, adapter=kind, rank=4)
    full = sum(p.numel() for p in student.weights())
    assert sum(report.parameters for report in reports) < full
    assert all(epochs(report, 4)[-1] < epochs(report, 4)[0] for report in reports)
    for name, matrix in student.matrices().items():
        assert not matrix.weight[before[f"{name}.weight"] == 0].any()


def test_a_window_that_gets_worse_on_held_out_text_is_rolled_back(dense, pruned, tokens, caplog):
    student = pruned()
    before = state(student)
    reports = run(student, dense, tokens(2, 12), learning_rate=3.0, epochs=1, held_out=tokens(2, 12, seed=1))
    assert {report.status for report in reports} == {GREW}
    assert (
        "4 of 4 windows got worse on held-out text" in caplog.text and "the learning rate, 3, is probably too high" in caplog.text
    )
    assert all(report.error_after == report.error_before and report.movement == 0 for report in reports)
    assert same(state(student), before)


@pytest.mark.parametrize(
    "granularity, share", [("matrix", 0.1), ("half-block", 1), ("block", 2**-0.75), ("2-blocks", 4**-0.75), ("model", 4**-0.75)]
)
def test_larger_windows_and_single_matrices_take_smaller_steps(dense, pruned, tokens, trained, granularity, share):
    run(pruned(), dense, tokens(4, 16), learning_rate=0.5, granularity=granularity)
    assert {schedule.learning_rate for *_, schedule in trained} == {0.5 * share}
