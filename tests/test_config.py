"""Options: names, defaults, recipes and schedules; and every choice of an option does something of its own."""

import copy
import math
from dataclasses import fields
from typing import Literal, get_args, get_origin

import numpy as np
import pytest
import torch
from fixtures.models import FLOAT32

from recon import ComputeConfig, PruningConfig, ReconstructionConfig, RetrainingConfig, RunSpec, prune, reconstruct, retrain
from recon.config import PRESETS
from recon.kernels.criteria import CRITERIA
from recon.model.windows import Window
from recon.runtime.device import COMPUTE_DTYPES

CONFIGS = [type(part) for part in vars(RunSpec()).values() if hasattr(part, "__dataclass_fields__")]


def choices(kind: type) -> dict[str, tuple]:
    """The options of a config that have choices."""
    own = {"criterion": tuple(CRITERIA)} if kind is PruningConfig else {}
    return own | {each.name: get_args(each.type) for each in fields(kind) if get_origin(each.type) is Literal}


def test_the_names_of_options_are_unique_and_lead_there_and_back():
    names = [each.name for kind in (*CONFIGS, RunSpec) for each in fields(kind) if each.type not in CONFIGS]
    spec = RunSpec()
    assert len(names) == len(set(names)) and spec.flat().keys() == set(names) and RunSpec.of(**spec.flat()) == spec
    other = spec.replaced(seed=3, samples=5, retrain="full", tasks="analogies")
    assert (other.seed, other.calibration.samples, other.retraining.retrain) == (3, 5, "full")
    assert other.evaluation.tasks == ("analogies",)
    assert other.replaced(**spec.flat()) == spec and {type(other.replaced(warmup=1).reconstruction.warmup)} == {float}


SPELLINGS = {
    "granularity": {"1/2": "half-block", 1: "block", **dict.fromkeys(("1", "1-block", "1-blocks"), "block"), "2": "2-blocks"}
    | {name: name for name in ("none", "matrix", "half-block", "block", "16-blocks", "quarter", "model")},
    "pattern": {0.5: "0.5", ".5": "0.5", "0.50": "0.5", "2:4": "2:4"},
    "samples": {np.int64(8): 8}, "learning_rate": {np.float32(0.5): 0.5, 1: 1.0},
}  # fmt: skip


@pytest.mark.parametrize(("option", "alias"), [(option, alias) for option in SPELLINGS for alias in SPELLINGS[option]])
def test_a_value_has_one_spelling(option, alias):
    assert RunSpec.of(**{option: alias}).flat()[option] == SPELLINGS[option][alias]


@pytest.fixture(scope="module")
def passes(tiny, tokens):
    """The three passes by config: each starts from the same tiny model, takes few steps, and gives the weights that it leaves."""
    dense, batch = tiny("llama", num_hidden_layers=2), tokens(6, 12)
    half = copy.deepcopy(dense)
    prune(half, batch, PruningConfig(), execution=FLOAT32)

    def run(config) -> torch.Tensor:
        model = copy.deepcopy(dense if isinstance(config, PruningConfig) else half)
        if isinstance(config, PruningConfig):
            prune(model, batch, config, execution=FLOAT32)
        elif isinstance(config, ReconstructionConfig):
            reconstruct(model, dense, batch, config, execution=FLOAT32)
        else:
            retrain(model, batch, config, dense=dense, execution=FLOAT32)
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    return run


GIVEN = {  # options that the test of an option's choices gives as well
    PruningConfig: {"pattern": "0.3"},
    ReconstructionConfig: {"epochs": 1},
    RetrainingConfig: {"retrain_epochs": 1, "retrain": "full"},
}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in GIVEN for name in choices(kind)])
def test_every_choice_does_something_of_its_own(passes, kind, name):
    others = GIVEN[kind] | ({"granularity": "matrix"} if name == "solver" else {})
    given = [choice for choice in choices(kind)[name] if (name, choice) != ("retrain", "none")]
    weights = [passes(kind(**others | {name: choice})) for choice in given]
    assert all(each.isfinite().all() for each in weights)
    same = sum(torch.equal(one, other) for number, one in enumerate(weights) for other in weights[:number])
    assert same == (name == "scope")  # auto is one of the two


def test_choices_that_the_test_above_leaves_out_are_tested_elsewhere():
    assert {name for kind in set(CONFIGS) - set(GIVEN) for name in choices(kind)} == {"evaluation_protocol", "compute_dtype"}
    assert set(choices(ComputeConfig)["compute_dtype"]) == {"auto", *COMPUTE_DTYPES}


@pytest.mark.parametrize(("kind", "prefix"), [(ReconstructionConfig, ""), (RetrainingConfig, "retrain_")])
def test_schedules_follow_the_options_and_pass_over_few_samples_until_there_are_enough_steps(kind, prefix):
    for samples, batch_size, epochs in ((1, 1, 32), (4, 1, 8), (5, 1, 7), (32, 1, 1), (64, 2, 1), (64, 4, 2), (1000, 1, 1)):
        config = kind(**{f"{prefix}batch_size": batch_size})
        assert config.schedule(samples).epochs == epochs and epochs * math.ceil(samples / batch_size) >= 32
    assert kind(**{f"{prefix}epochs": 2}).schedule(4).epochs == 2
    given = {"learning_rate": 0.02, "rate": "absolute", "epochs": 3, "batch_size": 2, "accumulation": 4, "warmup": 0.3}
    given |= {} if prefix else {"weight_decay": 0.5}
    assert vars(kind(**{prefix + name: value for name, value in given.items()}).schedule(7)).items() >= given.items()


def test_the_learning_rate_of_a_window_follows_its_size():
    config, half = ReconstructionConfig(learning_rate=0.1, matrix_rate=0.2, size_power=0.5), Window(range(1), "mlp")
    windows = half, Window(range(2)), Window(range(1), "mlp", matrices=("q",))
    assert [config.schedule(9, window).learning_rate for window in windows] == pytest.approx([0.1, 0.05, 0.02])


def test_recipes_are_the_published_ones():
    """The paper's and its rivals', as their authors' code has them."""
    spec = RunSpec.of(preset="paper")
    assert spec.pruning.statistics == "sparse" and spec.pruning.on(32).sparsegpt_block_size == 32
    how = spec.reconstruction
    assert (how.propagation, how.loss, how.first_position, how.train, how.rate) == ("dense", "mse", "full", "all", "absolute")
    assert (how.batch_size, how.epochs, how.chunks, how.roll_back) == (2, 1, 1, False)
    windows = Window(range(1), matrices=("q",)), Window(range(1)), Window(range(4))
    assert {how.schedule(8, window).learning_rate for window in windows} == {1e-4}
    for name, criterion in {"alps": "admm", "sparsegpt": "sparsegpt", "wanda": "wanda"}.items():
        assert RunSpec.of(preset=name) == RunSpec.of(criterion=criterion, statistics="sparse", granularity="none")
    for name, rate, epochs in (("ebft", 2e-4, 10), ("3basil-tm", 2e-5, 20)):
        how = RunSpec.of(preset=name).reconstruction
        assert (how.granularity, how.propagation, how.loss, how.train) == ("block", "sparse", "mse", "all")
        assert (*vars(how.schedule(128, Window(range(1)))).values(),)[:4] == (rate, "absolute", epochs, 8)


def test_a_preset_sets_what_is_at_its_default():
    assert RunSpec.of(preset="best") == RunSpec.of(**PRESETS["best"]) != RunSpec()
    assert RunSpec.of(preset="best", epochs=5) == RunSpec.of(**PRESETS["best"] | {"epochs": 5})
    for rate in (3e-3, RunSpec().reconstruction.learning_rate):  # what is given is kept, the default value as well
        assert RunSpec.of(preset="paper", learning_rate=rate).reconstruction.learning_rate == rate
    assert RunSpec.of(preset="fast").flat()["preset"] == "default"  # a record says what it stood for
    masked = RunSpec.of(preset="paper", pruned="there")
    assert masked.pruning == PruningConfig() and masked.reconstruction == RunSpec.of(preset="paper").reconstruction
