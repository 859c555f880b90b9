import copy

import pytest
import torch
from fixtures.models import make_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from recon.config import PruningConfig, ReconstructionConfig, RetrainingConfig
from recon.experiment import estimate
from recon.experiment.config import RunSpec
from recon.methods.prune import prune
from recon.methods.reconstruct import reconstruct
from recon.methods.retrain import retrain
from recon.model.discovery import take_apart
from recon.runtime.execution import Execution


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
COMMON = {"samples": 96, "sequence_length": 12, "held_out_samples": 0}  # so short that attention hardly counts


@pytest.mark.parametrize(
    "options",
    [
        {"granularity": "none", "criterion": "wanda"},
        {"granularity": "none", "criterion": "wanda", "statistics": "dense"},
        {"granularity": "half-block"},
        {"granularity": "half-block", "epochs": 3},
        {"granularity": "half-block", "train": "all"},
        {"granularity": "half-block", "propagation": "sparse"},
        {"granularity": "half-block", "propagation": "mixed"},
        {"granularity": "half-block", "adapter": "masklora"},
        {"granularity": "block"},
        {"granularity": "model"},
        {"granularity": "matrix"},
        {"granularity": "matrix", "propagation": "sparse"},
        {"granularity": "matrix", "propagation": "mixed"},
        {"granularity": "none", "retrain": "full"},
        {"granularity": "none", "retrain": "masklora"},
        {"granularity": "none", "retrain": "scalelora", "retrain_objective": "distil"},
        {"granularity": "none", "retrain": "lora", "rank": 4},
        {"granularity": "none", "retrain": "norms"},
        {"granularity": "none", "retrain": "masklora", "retrain_checkpointing": True},
    ],
    ids=lambda options: " ".join(map(str, options.values())),
)
def test_closed_form_agrees_with_what_is_counted(options, tokens):
    """Nearly: errors are measured on two samples more, and the counter does not see into the attention kernel."""
    spec = RunSpec.of(**{**COMMON, **options})
    dense = make_model("llama", **SIZES)
    teacher, model, batch = (
        take_apart(dense),
        copy.deepcopy(dense),
        tokens(spec.calibration.samples, spec.calibration.sequence_length),
    )
    phase = (
        "prune"
        if spec.reconstruction.granularity == "none" and spec.retraining.method == "none"
        else "retrain"
        if spec.retraining.method != "none"
        else "reconstruct"
    )
    common = {"compute_dtype": "float32", "progress": False}
    if phase != "prune":
        masks = prune(model, PruningConfig(criterion="magnitude"), execution=Execution(progress=False)).masks
    with Counter() as counter:
        if phase == "prune":
            prune(
                take_apart(model, like=teacher),
                batch,
                PruningConfig(criterion=spec.pruning.criterion, statistics=spec.pruning.statistics),
                **common,
            )
        elif phase == "retrain":
            retrain(take_apart(model, like=teacher), batch, RetrainingConfig(method=spec.retraining.method, objective=spec.retraining.objective, **vars(spec.then_schedule), rank=spec.reconstruction.rank, checkpointing=spec.retraining.checkpointing), masks=masks, dense=teacher, **common)  # fmt: skip
        else:
            reconstruct(take_apart(model, like=teacher), teacher, batch, ReconstructionConfig(granularity=spec.reconstruction.granularity, propagation=spec.reconstruction.propagation, **vars(spec.schedule), train=spec.reconstruction.train, adapter=spec.reconstruction.adapter, rank=spec.reconstruction.rank), masks=masks, **common)  # fmt: skip
    assert estimate.flops(spec, teacher)[phase] == pytest.approx(counter.flops, rel=0.07)


def test_gram_matrices_and_exact_solutions_are_counted(tokens):
    dense = make_model("llama", **SIZES)
    teacher, batch = take_apart(dense), tokens(32, 48)
    spec = RunSpec.of(
        samples=32, sequence_length=48, held_out_samples=0, granularity="matrix", solver="exact", exact_iterations=4
    )
    model = copy.deepcopy(dense)
    masks = prune(model, PruningConfig(criterion="magnitude"), execution=Execution(progress=False)).masks
    with Counter() as counter:
        reconstruct(take_apart(model, like=teacher), teacher, batch, ReconstructionConfig(granularity="matrix", solver="exact", TODO=spec.exact), masks=masks, execution=Execution(compute_dtype="float32", progress=False))  # fmt: skip
    assert estimate.flops(spec, teacher)["reconstruct"] == pytest.approx(counter.flops, rel=0.15)


def test_what_is_not_done_costs_nothing():
    found = estimate.flops(RunSpec.of(granularity="none", criterion="magnitude"), take_apart(make_model("llama")))
    assert (found["prune"], found["reconstruct"], found["retrain"]) == (0, 0, 0) and found["evaluate"] > 0


def test_twice_the_samples_cost_twice():
    decoder = take_apart(make_model("llama"))
    one, two = (estimate.flops(RunSpec.of(samples=n, retrain="norms"), decoder) for n in (16, 32))
    for phase in ("prune", "retrain"):
        assert two[phase] == 2 * one[phase]
    assert 1.8 * one["reconstruct"] < two["reconstruct"] < 2 * one["reconstruct"]  # errors are measured on the same few samples
    assert one["evaluate"] == two["evaluate"]


def test_the_head_is_known_even_where_it_is_the_embedding():
    decoder = take_apart(make_model("llama", tie_word_embeddings=True))
    assert estimate._Model(decoder).head == 99 * 32
    assert torch.is_tensor(decoder.head_weights()[0])
