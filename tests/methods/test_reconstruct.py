"""Reconstruction: zeros stay, errors fall, every window gets the inputs and targets that its propagation says."""

import copy
import itertools
import logging
from unittest.mock import Mock

import pytest
import torch
from fixtures.models import FLOAT32, copied, least_squares, zeros_stay
from torch.nn import functional as F
from torch.testing import assert_close

from recon import Callback, Execution, PruningConfig, ReconstructionConfig, RetrainingConfig, prune, reconstruct, retrain
from recon.evaluate.perplexity import drift
from recon.kernels.adapters import ADAPTERS
from recon.kernels.losses import channel_variance, unexplained
from recon.methods import reconstruct as reconstruction
from recon.methods.reconstruct import GREW, NOT_FINITE, RECONSTRUCTED
from recon.model.modules import watched
from recon.model.windows import Window

PROPAGATIONS, STARTS = ("dense", "sparse", "mixed"), ("pruned", "exact")
CALL = {"pruning", "masks", "held_out", "seed", "execution", "callbacks"}  # arguments of `reconstruct`; all others are options


@pytest.fixture
def pruned(dense, tokens):
    """Factory of pruned copies of `dense` (or of another decoder)."""

    def make(of=dense, pattern="0.5"):
        student = copied(of)
        prune(student, tokens(4, 16, seed=1), PruningConfig(pattern=pattern), execution=FLOAT32)
        return student

    return make


def looking(seen, change=lambda number, X, Y: (X, Y)):
    """An execution whose loop over windows notes in `seen` the inputs and targets of each, which `change` may replace."""

    def loop(reconstruction, windows):
        for number, f in enumerate(windows):
            X, Y, statistics = reconstruction.streams.task(reconstruction.config.propagation, f)
            seen.append((X.clone(), Y.clone()))
            with reconstruction.student.loaded(f):
                report = reconstruction.fit(f, *change(number, X, Y), statistics)
                reconstruction.streams.advance(f)
                yield reconstruction.finish(f, report, 0.0)

    return Execution("cpu", "float32", progress=False, loop=loop)


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


@pytest.mark.parametrize("start", [*STARTS, "solver exact"])
@pytest.mark.parametrize("propagation, loss", [("dense", "mse"), ("sparse", "cosine"), ("mixed", "whitened")])
@pytest.mark.parametrize("granularity", ["matrix", "half-block", "2-blocks", "quarter", "model"])
def test_zeros_stay_and_the_rest_is_untouched(dense, pruned, tokens, granularity, propagation, start, loss):
    student, teacher_before = pruned(pattern="2:4"), state(dense)
    before, train = state(student), {"pruned": "all"}.get(start, "matrices")
    options = {"granularity": granularity, "propagation": propagation, "loss": loss, "train": train, "chunks": 1, "start": start}
    if start == "solver exact":
        options |= {"granularity": "matrix", "solver": "exact", "loss": "mse", "start": "pruned"}
    reports = run(student, dense, tokens(3, 12), **options)
    windows = dense.windows(options["granularity"])
    assert [r.status for r in reports] == [RECONSTRUCTED] * len(windows)
    after, trained = state(student), {name for window in windows for name in dense.trained(window, train)}
    assert all(torch.equal(before[f"{name}.weight"] == 0, after[f"{name}.weight"] == 0) for name in student.matrices())
    assert any("norm" in name for name in trained) == (train == "all" and granularity != "matrix")
    assert all(torch.equal(before[name], after[name]) == (name not in trained) for name in before)
    assert not {"model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"} & trained
    assert same(teacher_before, state(dense))
    assert all(p.grad is None for decoder in (dense, student) for p in decoder.model.parameters())


@pytest.mark.parametrize("family", ["gpt2", "opt", "gpt_neox", "falcon", "gemma2", "phi"])
@pytest.mark.parametrize("granularity", ["matrix", "half-block", "block"])
def test_other_families(made, pruned, tokens, family, granularity):
    dense, batch = made(family), tokens(12, 16)
    student = pruned(dense)
    masks = {name: matrix.weight != 0 for name, matrix in student.matrices().items()}
    before = drift(student, dense, batch, execution=FLOAT32)[0][-1]
    run(student, dense, batch, granularity=granularity, start="exact", learning_rate=1e-3, epochs=4)
    assert all(torch.equal(matrix.weight != 0, masks[name]) for name, matrix in student.matrices().items())
    assert drift(student, dense, batch, execution=FLOAT32)[0][-1] < before


def test_given_masks_are_obeyed(dense, pruned, tokens):
    """Also where a kept weight happens to be zero, which may then grow."""
    student = pruned()
    masks = {name: matrix.weight != 0 for name, matrix in student.matrices().items()}
    name = "model.layers.0.mlp.up_proj"
    with torch.no_grad():
        student.matrices()[name].weight[masks[name]] = 0.0
    whole = copied(dense)
    run(student, dense, tokens(3, 12), masks={name: mask.float() for name, mask in masks.items()})
    assert torch.equal(student.matrices()[name].weight != 0, masks[name])
    run(whole, dense, tokens(3, 12), masks=masks, learning_rate=3.0, held_out=tokens(2, 12, seed=1))  # rolled back
    assert zeros_stay(whole, masks)


def error_of(weight, x, wanted):
    return (x @ weight.T - wanted).double().square().sum().item()


@pytest.mark.parametrize("propagation", ["dense", "mixed"])
@torch.no_grad()
def test_exact_matrices_are_least_squares_solutions(made, pruned, tokens, propagation):
    """Of the dense outputs, without biases, on the dense model's inputs; under mixed propagation on the reconstructed model's."""
    dense = made("qwen2", num_hidden_layers=2)  # of whose matrices some have biases
    student, batch, hidden = pruned(dense), tokens(32, 32), dense.embed(tokens(32, 32))
    start, read = state(student), dense if propagation == "dense" else student
    run(student, dense, batch, granularity="matrix", solver="exact", propagation=propagation)
    for window in dense.windows("matrix")[:4]:
        theirs, x = (decoder.inputs(window, hidden).flatten(0, 1) for decoder in (dense, read))
        for name in window.matrices:
            wanted, found = F.linear(theirs, dense.matrices()[name].weight), student.matrices()[name].weight
            least = error_of(least_squares(x, wanted, found != 0).float(), x, wanted)
            assert 0 < least < 0.9 * error_of(start[f"{name}.weight"], x, wanted)
            assert error_of(found, x, wanted) < 1.001 * least


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("propagation", PROPAGATIONS)
def test_half_blocks_lower_the_error_on_unseen_samples(dense, pruned, tokens, start, propagation):
    held_out = tokens(4, 16, seed=9)
    schedule = {"learning_rate": 1e-2, "epochs": 4, "batch_size": 2, "chunks": 4}
    for r in run(pruned(), dense, tokens(32, 16), **schedule, start=start, propagation=propagation, held_out=held_out):
        assert r.error_after["held_out"] < r.error_before["held_out"] and epochs(r, 4)[-1] < epochs(r, 4)[0]


@torch.no_grad()
def test_halves_that_read_one_input_mend_its_error_once(made, tokens):
    """Under mixed propagation, an MLP that meets its target makes the block give what the dense block gives, whatever attention
    and the blocks before it left."""
    dense, seen = made("gpt_neox"), []
    student, batch = copied(dense), tokens(5, 12)
    prune(student, config=PruningConfig("magnitude", "0.7"), execution=FLOAT32)
    run(student, dense, batch, execution=looking(seen), propagation="mixed")
    theirs, ours = residuals(dense, batch), residuals(student, batch)
    for index, (X, Y) in enumerate(seen[1::2]):  # MLP halves
        assert_close(X, ours[index], rtol=1e-4, atol=1e-4)
        attention = student.forward(Window(range(index, index + 1), "attention", parallel=True), X) - X
        assert_close(attention + Y, theirs[index + 1], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def residuals(decoder, batch):
    """The residual stream before each block and after the last."""
    blocks = decoder.windows("block")
    return [*itertools.accumulate(blocks, lambda hidden, f: decoder.forward(f, hidden), initial=decoder.embed(batch))]


def activations(model, batch):
    """Window name -> (input, output), from one plain forward pass of a two-block Llama."""
    seen, modules = {}, {}
    for index, layer in enumerate(model.model.layers):
        modules |= {str(index): layer, f"half {index}": layer.post_attention_layernorm}  # which reads what is between the halves
        linear = {name: module for name, module in layer.named_modules() if isinstance(module, torch.nn.Linear)}
        modules |= {f"model.layers.{index}.{name}": module for name, module in linear.items()}
    with watched(modules, after=lambda name, args, kwargs, out: seen.update({name: (args[0].clone(), out.clone())})):
        model(input_ids=batch, use_cache=False)
    pairs = {}
    for i in range(2):
        (before, after), (middle, _) = seen[str(i)], seen[f"half {i}"]
        pairs |= {f"block {i}": (before, after), f"block {i} attention": (before, middle), f"block {i} mlp": (middle, after)}
        for group in ("self_attn.q self_attn.k self_attn.v", "self_attn.o", "mlp.gate mlp.up", "mlp.down"):
            names = [f"model.layers.{i}.{name}_proj" for name in group.split()]
            pairs["+".join(names)] = seen[names[0]][0], torch.cat([seen[name][1] for name in names], -1)
    pairs["block 0-1"] = seen["0"][0], seen["1"][1]
    return pairs


@pytest.mark.parametrize("propagation", PROPAGATIONS)
@pytest.mark.parametrize("granularity", ["matrix", "half-block", "block", "model"])
def test_each_window_gets_the_inputs_and_targets_of_the_propagation(dense, pruned, tokens, granularity, propagation):
    student, batch, seen, windows = pruned(), tokens(5, 12), [], dense.windows(granularity)
    options = {"granularity": granularity, "propagation": propagation, "held_out": tokens(3, 12, seed=7)}
    run(student, dense, batch, execution=looking(seen), **options)
    theirs = activations(dense.model, batch)
    ours = activations(student.model, batch)  # what precedes a window was reconstructed before it, and has not changed since
    for window, (X, Y) in zip(windows, seen, strict=True):
        inputs, targets = X[:5], Y[:5]
        hybrid = copy.deepcopy(student.model)  # all reconstructed but for this window, which is the dense model's
        for name, parameter in dense.parameters(window).items():
            hybrid.get_parameter(name).data.copy_(parameter)
        (mine, _), whole = ours[window.name], theirs[window.name]
        expected = {"dense": whole, "sparse": (mine, activations(hybrid, batch)[window.name][1]), "mixed": (mine, whole[1])}
        assert_close((inputs, targets), expected.pop(propagation), rtol=1e-4, atol=1e-4)
        if window.name in ("block 1", "block 1 mlp", "model.layers.1.mlp.down_proj"):  # late enough for all to differ
            for other in expected.values():
                assert not all(torch.allclose(a, b, rtol=1e-2, atol=1e-2) for a, b in zip((inputs, targets), other))


@pytest.mark.parametrize("granularity, steps", [("half-block", [3, 12, 3, 12]), ("block", [3, 3]), ("matrix", [12] * 8)])
def test_chunks_are_taken_where_tokens_are_not_mixed(dense, pruned, tokens, granularity, steps):
    options = {"chunks": 4, "epochs": 1, "granularity": granularity}
    assert [len(report.losses) for report in run(pruned(), dense, tokens(3, 12), **options)] == steps
    assert [len(report.losses) for report in run(pruned(), dense, tokens(3, 11), **options)] == [3] * len(steps)  # 11 is prime


@pytest.mark.parametrize("propagation, granularity, start", [
    ("mixed", "half-block", "exact"), ("dense", "matrix", "exact"), ("mixed", "matrix", "pruned"), ("dense", "model", "pruned"),
])  # fmt: skip
@pytest.mark.parametrize("how", [
    {"criterion": "wanda"}, {"criterion": "sparsegpt", "allocation": "measured", "weighting": "fisher"},
    {"criterion": "magnitude"}, {"criterion": "magnitude", "allocation": "dlp"},
], ids=str)  # fmt: skip
def test_one_pass_gives_what_pruning_and_then_reconstructing_gives(dense, tokens, how, propagation, granularity, start):
    samples, held_out, told = tokens(6, 48), tokens(2, 48, seed=1), Mock(Callback)
    options = {"propagation": propagation, "granularity": granularity, "start": start, "epochs": 1, "held_out": held_out}
    config, one, two = PruningConfig(**how, sparsegpt_block_size=0), copied(dense), copied(dense)
    masks = prune(two, samples, config, execution=FLOAT32).masks
    run(two, dense, samples, masks=masks, **options)
    run(one, dense, samples, pruning=config, callbacks=[told], **options)
    assert same(state(one), state(two))
    found = told.on_pruned.call_args.args[0].masks
    assert found.keys() == masks.keys() and same(found, masks)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_window_that_breaks_is_rolled_back(dense, pruned, tokens, caplog, value, start):
    student = pruned()
    before = state(student)
    execution = looking([], lambda number, X, Y: (X, Y.index_fill(1, torch.tensor(3), value) if number == 1 else Y))
    with caplog.at_level(logging.WARNING, "recon"):
        reports = run(student, dense, tokens(4, 12), start=start, execution=execution)
    assert [r.status for r in reports] == [RECONSTRUCTED, NOT_FINITE, RECONSTRUCTED, RECONSTRUCTED]
    after, windows = state(student), dense.windows("half-block")
    changed = {name for number in (0, 2, 3) for name in dense.trained(windows[number], "matrices")}
    assert all(torch.equal(before[name], after[name]) == (name not in changed) for name in before)
    assert [r.levelname for r in caplog.records if "'block 0 mlp'" in r.message and "rolled back" in r.message] == ["WARNING"]


@pytest.mark.parametrize("roll_back", [True, False])
def test_a_window_that_gets_worse_on_held_out_text_is_rolled_back_where_asked_for(dense, pruned, tokens, caplog, roll_back):
    student, options = pruned(), {"learning_rate": 3.0, "epochs": 1, "held_out": tokens(2, 12, seed=1)}
    before = state(student)
    reports = run(student, dense, tokens(2, 12), roll_back=roll_back, **options)
    assert {report.status for report in reports} == {GREW if roll_back else RECONSTRUCTED}
    said = "4 of 4 windows got worse and were rolled back: the learning rate, 3, is too high"
    assert (said in caplog.text) == same(state(student), before) == roll_back
    assert all(report.error_after == report.error_before for report in reports) == roll_back
    assert any(report.error_after["held_out"] > report.error_before["held_out"] for report in reports) != roll_back
    run(pruned(), dense, tokens(1, 12), granularity="matrix", solver="exact", held_out=options["held_out"])
    assert "windows got worse and were rolled back: samples are too few" in caplog.text


@pytest.mark.parametrize("propagation", ["dense", "sparse", "mixed"])
@pytest.mark.parametrize("granularity, how", [("matrix", {"solver": "exact"}), ("half-block", {"start": "exact", "epochs": 1})])
def test_nothing_is_fitted_on_held_out_samples(made, pruned, tokens, granularity, how, propagation):
    dense = made("qwen2", num_hidden_layers=2)  # of whose matrices some have biases
    options = {"granularity": granularity, "propagation": propagation, "roll_back": False, **how}
    one, other = pruned(dense), pruned(dense)
    run(one, dense, tokens(6, 12), **options)
    run(other, dense, tokens(6, 12), held_out=tokens(2, 12, seed=1), **options)
    assert same(state(one), state(other))


@pytest.mark.parametrize(
    "position, first, counts", [(0, "skipped", False), (0, "full", True), (0, "scaled", True), (3, "skipped", True)]
)
def test_the_first_position_of_samples_alone_is_skipped(dense, pruned, tokens, position, first, counts):
    """A target there changes nothing, if it is to be skipped; 3 is the first position of the second chunk."""
    found = []
    for shift in (0.0, 1.0):
        student, change = pruned(), torch.full((4, 1, 32), shift)
        execution = looking([], lambda number, X, Y, by=change: (X, Y.index_add(1, torch.tensor([position]), by)))
        run(student, dense, tokens(4, 12), propagation="dense", first_position=first, epochs=1, execution=execution)
        found.append(student.model.get_parameter("model.layers.0.mlp.up_proj.weight"))
    assert torch.equal(*found) != counts


@pytest.mark.parametrize("held_out", [True, False])
@torch.no_grad()
def test_errors_are_of_the_first_samples(dense, pruned, tokens, held_out):
    student, seen = pruned(), []
    before, f, unseen = copied(student), dense.windows("half-block")[0], tokens(5, 12, seed=1)
    report = run(student, dense, tokens(6, 12), execution=looking(seen), held_out=unseen if held_out else None)[0]
    measured = slice(6, 8) if held_out else slice(2)
    X, Y = seen[0]
    expected = unexplained(before.forward(f, X[measured]), Y[measured], channel_variance(Y[:6]))
    assert report.error_before == {"held_out" if held_out else "calibration": pytest.approx(expected, rel=1e-5)}


def test_a_mean_that_weights_make_up_for_is_in_no_bias(made, tokens):
    """FLAP puts the mean of what it removes into new biases; exact weights are fitted to the product alone."""
    dense, student = made("llama"), copied(made("llama"))
    prune(student, tokens(8, 20), PruningConfig("flap", "0.3"), execution=FLOAT32)
    added = [parameter for name, parameter in student.model.named_parameters() if name.endswith("bias")]
    assert added and any(bias.any() for bias in added)
    run(student, dense, tokens(16, 20), granularity="matrix", solver="exact", propagation="dense")
    assert not any(bias.any() for bias in added)


@pytest.mark.parametrize("kind, samples", [("none", 6), *((kind, 1) for kind in ADAPTERS)])  # of one sample, nothing is shuffled
def test_same_seed_same_weights_which_fit_better_keep_zeros_and_have_the_rank_asked_for(dense, pruned, tokens, kind, samples):
    fitted, retrained = [pruned() for _ in range(3)], [pruned() for _ in range(3)]
    masks = {name: matrix.weight != 0 for name, matrix in pruned().matrices().items()}
    sizes = sum(sum(mask.shape) for mask in masks.values())
    config = RetrainingConfig("full" if kind == "none" else kind, retrain_rank=3)
    for seed, one, other in zip((0, 0, 1), fitted, retrained, strict=True):
        torch.manual_seed(int(torch.randint(1000, ())))  # the global state is none of its business
        reports = run(one, dense, tokens(samples, 12), adapter=kind, rank=2, chunks=1, epochs=4, seed=seed)
        assert all(epochs(report, 4)[-1] < epochs(report, 4)[0] for report in reports) and zeros_stay(one, masks)
        report = retrain(other, tokens(samples, 12), config, seed=seed, execution=FLOAT32)
        assert kind == "none" or (sum(each.parameters for each in reports), report.parameters) == (2 * sizes, 3 * sizes)
    for first, again, another in (fitted, retrained):
        assert same(state(first), state(again)) and not same(state(first), state(another))


@pytest.mark.parametrize("granularity", ["matrix", "half-block", "2-blocks"])
def test_windows_are_trained_by_the_schedule_of_their_size(dense, pruned, tokens, monkeypatch, granularity):
    seen, config = [], ReconstructionConfig(granularity=granularity)
    monkeypatch.setattr(reconstruction, "train", lambda loss, data, trained, schedule, *rest: seen.append(schedule) or [])
    reconstruct(pruned(), dense, tokens(3, 12), config, execution=FLOAT32)
    assert seen == [config.schedule(3, window) for window in dense.windows(granularity)]
