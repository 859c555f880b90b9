import copy

import pytest
import torch
from fixtures.models import make_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from recon.config import LENGTHS, PruningConfig
from recon.methods.prune import prune
from recon.methods.reconstruct import reconstruct
from recon.methods.retrain import retrain
from recon.model.discovery import decompose
from recon.runtime.activations import Activations
from recon.runtime.execution import Execution
from recon.study import cost
from recon.study.measure import Measurement
from recon.study.spec import RunSpec
from recon.study.texts import Texts


class Counter(TorchDispatchMode):
    """Floating-point operations of every product that runs inside."""

    flops = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        packet = function._overloadpacket
        packet = torch.ops.aten.addmm if packet is torch.ops.aten.addmm_ else packet  # in place: the registry forgets it
        if packet in flop_registry:
            self.flops += flop_registry[packet](*args, **(kwargs or {}), out_val=out)
        return out


SIZES = {"hidden_size": 64, "intermediate_size": 192, "max_position_embeddings": 64}
COMMON = {
    "samples": 96, "sequence_length": 12, "held_out_samples": 0,  # so short that attention hardly counts
    "epochs": 1, "batch_size": 16, "retrain_epochs": 1, "retrain_batch_size": 16,  # the same products in fewer calls
}  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        {"granularity": "none", "criterion": "wanda"},
        {"granularity": "none", "criterion": "wanda", "statistics": "dense"},
        {"granularity": "half-block", "propagation": "dense"},
        {"granularity": "half-block", "propagation": "dense", "epochs": 3},
        {"granularity": "half-block", "train": "all"},
        {"granularity": "half-block", "propagation": "sparse"},
        {"granularity": "half-block", "propagation": "mixed"},
        {"granularity": "half-block", "adapter": "masklora"},
        {"granularity": "block"},
        {"granularity": "2-blocks"},
        {"granularity": "model"},
        {"granularity": "matrix", "propagation": "dense"},
        {"granularity": "matrix", "propagation": "sparse"},
        {"granularity": "matrix", "propagation": "mixed"},
        {"granularity": "none", "retrain": "full"},
        {"granularity": "none", "retrain": "masklora"},
        {"granularity": "none", "retrain": "scalelora", "retrain_objective": "distil"},
        {"granularity": "none", "retrain": "lora", "retrain_rank": 4},
        {"granularity": "none", "retrain": "norms"},
        {"granularity": "none", "retrain": "masklora", "retrain_checkpointing": True, "retrain_batch_size": 1},
    ],
    ids=lambda options: " ".join(map(str, options.values())),
)
def test_closed_form_agrees_with_what_is_counted(options, tokens):
    """Nearly: errors are measured on two samples more, and the counter does not see into the attention kernel."""
    spec = RunSpec.of(**{**COMMON, **options})
    dense, samples = make_model("llama", **SIZES), spec.calibration.samples
    teacher, model, batch = decompose(dense), copy.deepcopy(dense), tokens(samples, spec.calibration.sequence_length)
    retrained, fitted = spec.retraining.retrain != "none", spec.reconstruction.granularity != "none"
    phase = "retrain" if retrained else "reconstruct" if fitted else "prune"
    execution = Execution(compute_dtype="float32", progress=False)
    if phase != "prune":
        masks = prune(model, config=PruningConfig(criterion="magnitude"), execution=Execution(progress=False)).masks
    student = decompose(model, like=teacher)
    with Counter() as counter:
        if phase == "prune":
            prune(student, batch, spec.pruning, execution=execution)
        elif phase == "retrain":
            retrain(student, batch, spec.retraining, masks=masks, dense=teacher, execution=execution)
        else:
            reconstruct(student, teacher, batch, spec.reconstruction, masks=masks, execution=execution)
    assert cost.flops(spec, teacher)[phase] == pytest.approx(counter.flops, rel=0.07)


def test_gram_matrices_and_exact_solutions_are_counted(tokens):
    dense = make_model("llama", **SIZES)
    teacher, batch = decompose(dense), tokens(32, 48)
    spec = RunSpec.of(
        samples=32, sequence_length=48, held_out_samples=0, granularity="matrix", solver="exact", exact_iterations=4,
        propagation="dense",
    )  # fmt: skip
    model = copy.deepcopy(dense)
    masks = prune(model, config=PruningConfig(criterion="magnitude"), execution=Execution(progress=False)).masks
    with Counter() as counter:
        execution = Execution(compute_dtype="float32", progress=False)
        reconstruct(decompose(model, like=teacher), teacher, batch, spec.reconstruction, masks=masks, execution=execution)
    assert cost.flops(spec, teacher)["reconstruct"] == pytest.approx(counter.flops, rel=0.15)


@pytest.mark.parametrize("granularity", ["none", "block"])
@pytest.mark.parametrize("held_out", [0, 6])
def test_all_that_evaluation_measures_is_counted(granularity, held_out, tokens):
    spec = RunSpec.of(
        granularity=granularity, sequence_length=12, held_out_samples=held_out, evaluation_samples=9, evaluation_length=16
    )  # fmt: skip
    dense, execution = decompose(make_model("llama", **SIZES)), Execution(compute_dtype="float32", progress=False)
    texts = Texts(tokens(1, 12), tokens(held_out, 12) if held_out else None, {"wikipedia": tokens(9, 16)})
    measurement = Measurement(spec.evaluation, texts, None, dense, Activations(limit=0))
    with Counter() as counter:
        _, states = measurement.of_dense(execution)
        for name in ["pruned"] + ["reconstructed"] * (granularity != "none"):
            measurement.of(decompose(copy.deepcopy(dense.model), like=dense), name, states, execution)
    expected = cost.flops(spec, dense)["evaluate"] + cost.beside_perplexity(spec, dense)
    assert expected == pytest.approx(counter.flops, rel=0.1)  # the last token of a window predicts nothing


def test_what_is_not_done_costs_nothing():
    found = cost.flops(RunSpec.of(granularity="none", criterion="magnitude", **LENGTHS), decompose(make_model("llama")))
    assert (found["prune"], found["reconstruct"], found["retrain"]) == (0, 0, 0) and found["evaluate"] > 0


def test_twice_the_samples_cost_twice():
    decoder = decompose(make_model("llama"))
    one, two = (cost.flops(RunSpec.of(samples=n, retrain="norms", **LENGTHS), decoder) for n in (32, 64))
    for phase in ("prune", "retrain"):
        assert two[phase] == 2 * one[phase]
    assert 1.8 * one["reconstruct"] < two["reconstruct"] < 2 * one["reconstruct"]  # errors are measured on the same few samples
    assert one["evaluate"] == two["evaluate"]


def test_the_head_is_known_even_where_it_is_the_embedding():
    decoder = decompose(make_model("llama", tie_word_embeddings=True))
    assert cost._Model(decoder).head == 99 * 32
    assert torch.is_tensor(decoder.head_weights()[0])
