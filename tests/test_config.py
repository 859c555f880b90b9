"""All options: each refuses what is wrong by name, and each choice is one that the code knows."""

import copy
from dataclasses import fields
from types import NoneType

import pytest
import torch
from fixtures.models import FLOAT32

import recon
from recon import config
from recon.config import PRESETS, PruningConfig, ReconstructionConfig, RetrainingConfig
from recon.errors import ReconError
from recon.kernels.adapters import ADAPTERS
from recon.kernels.criteria import CRITERIA
from recon.kernels.losses import LOSSES
from recon.model.windows import Window
from recon.options import NAMES, Options
from recon.runtime.device import COMPUTE_DTYPES
from recon.study.spec import RunSpec, options, place

CONFIGS = [kind for kind in vars(config).values() if isinstance(kind, type) and issubclass(kind, Options) and kind is not Options]
CHOOSING = [name for name, each in options().items() if each.metadata["choices"]]


def wrong_values(each) -> list:
    """Values that the option may not have: of another type, out of bounds, or not among its choices."""
    if each.type in (int, float):
        least, most, above = each.metadata["bounds"]
        outside = [bound + step for bound, step in ((least, -1), (most, 1), (above, 0)) if bound is not None]
        return [*outside, "1", True, None, float("nan"), float("inf")]
    return {bool: [1, "True", None], NAMES: [1, None, (1,)], str: ["no such name"] if each.metadata["choices"] else []}.get(
        each.type, [1]
    )


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        *((name, wrong) for name, each in options().items() for wrong in wrong_values(each)),
        *(("granularity", wrong) for wrong in ("layer", "0", "0-blocks", "1.5", "", None)),
        *(("pattern", wrong) for wrong in ("1", "-0.1", "4:2", "2:2", "half", "", None, float("nan"))),
    ],
)
def test_every_option_refuses_what_is_wrong_by_name(name, wrong):
    with pytest.raises(ReconError) as error:
        recon.RunSpec.of(**{name: wrong})
    said = str(error.value)
    assert name in said and str(wrong) in said and "allowed: " in said
    for choice in options()[name].metadata["choices"]:
        assert choice in said


@pytest.mark.parametrize("name", options())
def test_every_option_says_what_it_means_and_accepts_its_default(name):
    each = options()[name]
    assert each.metadata["help"].endswith(".") and each.type in (bool, int, float, str, str | NoneType, NAMES)
    assert recon.RunSpec.of(**{name: each.default}) == recon.RunSpec()
    least, most, _ = each.metadata["bounds"]
    for bound in (least, most):
        if bound is not None:
            assert recon.RunSpec.of(**{name: bound}).get(name) == bound


def test_flat_names_are_unique_and_lead_to_every_field_of_every_config():
    in_configs = [(kind, each.name) for kind in CONFIGS for each in fields(kind)]
    spec = recon.RunSpec()
    found = [(type(getattr(spec, concern)), attribute) for concern, attribute in map(place, options()) if concern]
    assert sorted(map(str, found)) == sorted(map(str, in_configs)) and len(set(found)) == len(found)
    assert spec.flat().keys() == options().keys() and recon.RunSpec.of(**spec.flat()) == spec


def test_unknown_names_are_refused():
    with pytest.raises(ReconError, match="'granularty'.*allowed: .*granularity, "):
        recon.RunSpec.of(granularty="block")
    for kind in CONFIGS:
        with pytest.raises(TypeError, match="granularty"):
            kind(granularty="block")


# ---- choices


def test_choices_are_those_that_the_code_registers():
    assert set(options()["criterion"].metadata["choices"]) == set(CRITERIA)
    assert set(options()["loss"].metadata["choices"]) == set(LOSSES)
    assert set(options()["adapter"].metadata["choices"]) == {"none", *ADAPTERS}
    assert set(options()["retrain"].metadata["choices"]) == {"none", "full", "norms", *ADAPTERS}
    assert set(options()["compute_dtype"].metadata["choices"]) == {"auto", *COMPUTE_DTYPES}


@pytest.fixture(scope="module")
def passes(tiny, tokens):
    """The three passes by config: each starts from the same tiny model, takes few steps, and gives the weights that it leaves."""
    dense, batch = tiny("llama", num_hidden_layers=2), tokens(6, 12)
    half = copy.deepcopy(dense)
    recon.prune(half, batch, PruningConfig(), execution=FLOAT32)

    def run(config: Options) -> torch.Tensor:
        model = copy.deepcopy(dense if isinstance(config, PruningConfig) else half)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("recon.config.STEPS", 4)
            if isinstance(config, PruningConfig):
                recon.prune(model, batch, config, execution=FLOAT32)
            elif isinstance(config, ReconstructionConfig):
                recon.reconstruct(model, dense, batch, config, execution=FLOAT32)
            else:
                recon.retrain(model, batch, config, dense=dense, execution=FLOAT32)
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    return run


@pytest.mark.parametrize(
    ("kind", "name", "others", "same"),
    [
        (PruningConfig, "criterion", {"pattern": "0.3"}, {}),
        (PruningConfig, "scope", {}, {"auto": "row"}),
        (PruningConfig, "statistics", {}, {}),
        (ReconstructionConfig, "preset", {}, {}),
        (ReconstructionConfig, "propagation", {}, {}),
        (ReconstructionConfig, "solver", {"granularity": "matrix"}, {}),
        (ReconstructionConfig, "start", {}, {}),
        (ReconstructionConfig, "train", {}, {}),
        (ReconstructionConfig, "adapter", {}, {}),
        (ReconstructionConfig, "loss", {}, {}),
        (ReconstructionConfig, "rate", {}, {}),
        (RetrainingConfig, "method", {}, {}),
        (RetrainingConfig, "objective", {"method": "full"}, {}),
        (RetrainingConfig, "rate", {"method": "full"}, {}),
    ],
)
def test_every_choice_is_known_and_does_something_of_its_own(passes, kind, name, others, same):
    """same: choices that mean another one here."""
    (each,) = (each for each in fields(kind) if each.name == name)
    found = {
        choice: passes(kind(**others, **{name: choice}))
        for choice in each.metadata["choices"]
        if (kind, name, choice) != (RetrainingConfig, "method", "none")  # which is no pass
    }
    for choice, weights in found.items():
        assert weights.isfinite().all()
        for other in found.keys() - {choice}:
            assert torch.equal(weights, found[other]) == (same.get(choice) == other or same.get(other) == choice)


def test_the_test_above_covers_every_option_with_choices():
    covered = {"preset", "criterion", "scope", "statistics", "propagation", "solver", "start", "train", "adapter", "loss", "rate"}
    assert {*CHOOSING} == covered | {"retrain", "retrain_objective", "retrain_rate", "evaluation_protocol", "compute_dtype"}


# ---- what has no meaning together


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"solver": "exact"}, "solver exact.*granularity 'half-block'.*matrix"),
        ({"solver": "exact", "granularity": "matrix", "loss": "cosine"}, "solver exact.*loss 'cosine'"),
        ({"adapter": "lora", "solver": "exact", "granularity": "matrix"}, "adapter 'lora'.*solver adamw"),
        ({"adapter": "lora", "train": "all"}, "adapter 'lora'.*train matrices"),
        ({"criterion": "sparsegpt", "mask_refinement": 3}, "mask_refinement is 3.*'sparsegpt'.*magnitude, random, wanda, ria$"),
        ({"evaluation_texts": ()}, "evaluation_texts is empty"),
        *(
            ({"criterion": criterion, **given}, f"{name} is .*{criterion}.*{suited}")
            for criterion in ("wanda-sp", "flap")
            for name, given, suited in (
                ("pattern", {"pattern": "2:4"}, "such as 0.2"),
                ("scope", {"scope": "row"}, "allowed: auto"),
                ("mask_refinement", {"mask_refinement": 3}, "magnitude, random, wanda, ria$"),
            )
        ),
    ],
)
def test_what_has_no_meaning_together_is_refused(given, words):
    with pytest.raises(ReconError, match=words):
        recon.RunSpec.of(**given)


@pytest.mark.parametrize(
    ("alias", "name"), [("1/2", "half-block"), ("1", "block"), (1, "block"), ("2", "2-blocks"), ("1-blocks", "block")]
)
def test_granularities_have_one_spelling(alias, name):
    assert ReconstructionConfig(granularity=alias) == ReconstructionConfig(granularity=name)


@pytest.mark.parametrize(("alias", "name"), [(0.5, "0.5"), (".5", "0.5"), ("0.50", "0.5"), ("2:4", "2:4")])
def test_patterns_have_one_spelling(alias, name):
    assert PruningConfig(pattern=alias).pattern == name


@pytest.mark.parametrize("kind", [ReconstructionConfig, lambda **given: RetrainingConfig(method="full", **given)])
def test_the_schedule_is_made_of_the_options(kind):
    given = {"learning_rate": 0.02, "rate": "absolute", "epochs": 3, "batch_size": 2, "accumulation": 4, "warmup": 0.3}
    assert vars(kind(**given).schedule(7)).items() >= given.items()


@pytest.mark.parametrize("kind", [ReconstructionConfig, RetrainingConfig])
@pytest.mark.parametrize(
    "samples, batch_size, epochs", [(1, 1, 32), (4, 1, 8), (5, 1, 7), (32, 1, 1), (64, 2, 1), (64, 4, 2), (1000, 1, 1)]
)
def test_few_samples_are_passed_over_until_there_are_enough_steps(kind, samples, batch_size, epochs):
    config = kind(batch_size=batch_size)
    assert config.schedule(samples).epochs == epochs and config.schedule(samples).steps(samples) >= 32
    assert kind(batch_size=batch_size, epochs=2).schedule(samples).epochs == 2


def test_the_paper_recipe_is_the_published_one():
    """As the authors' code has it: dense propagation, mean squared error, one absolute rate for every size of window, whole samples."""
    spec = RunSpec.of(preset="paper")
    assert spec.pruning.statistics == "sparse" and spec.pruning.on(32).sparsegpt_block_size == 32
    how = spec.reconstruction
    assert (how.propagation, how.loss, how.skip_first, how.train, how.rate) == ("dense", "mse", False, "all", "absolute")
    assert (how.batch_size, how.epochs, how.chunks, how.roll_back) == (2, 1, 1, False)
    assert {how.pace(Window((0,), matrices=("q",))), how.pace(Window((0,))), how.pace(Window((0, 1, 2, 3)))} == {1.0}
    assert RunSpec.of(preset="paper", learning_rate=3e-3).reconstruction.learning_rate == 3e-3


def test_a_preset_sets_what_is_at_its_default():
    best = ReconstructionConfig(preset="best")
    assert best == ReconstructionConfig(**PRESETS["best"]) and best != ReconstructionConfig()
    assert ReconstructionConfig(preset="best", epochs=5) == ReconstructionConfig(**(PRESETS["best"] | {"epochs": 5}))
    assert RunSpec.of(preset="fast").flat() == RunSpec.of(**PRESETS["fast"]).flat()
