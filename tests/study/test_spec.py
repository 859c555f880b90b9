"""What a run is asked for and how it is carried out: keys of runs, and what is refused."""

import hashlib
import json
import shutil
from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import get_args

import pytest
import torch
from fixtures.models import make_model
from fixtures.runs import largest, smallest

from recon import ReconError, RunSpec
from recon.data import text
from recon.kernels.criteria import CRITERIA, Criterion


@pytest.fixture
def spec(tiny_folder, tiny_text):
    return RunSpec.of(model=tiny_folder, text=tiny_text, samples=6, sequence_length=32, evaluation_texts=tiny_text)


def another(name: str, value: object) -> object:
    """An allowed value of an option other than `value`."""
    fixed = {
        "pattern": "2:4", "granularity": "block", "evaluation_texts": ("news",), "text": "news", "tasks": ("analogies",),
        "device": "cpu", "revision": "main", "pruned_revision": "v1", "chunks": 2, "criterion": "ria",
    }  # fmt: skip
    kinds = {each.name: each.type for part in vars(RunSpec()).values() if is_dataclass(part) for each in fields(part)}
    choices = get_args(kinds.get(name, int))
    if name in fixed or choices and isinstance(choices[0], str):
        return fixed.get(name) or next(choice for choice in reversed(choices) if choice != value)
    return not value if isinstance(value, bool) else value + 1 if isinstance(value, int) else value / 2 or 0.1


def test_the_key_depends_on_everything_that_can_change_the_numbers(spec, tmp_path, tiny_text):
    assert spec.replaced().key() == spec.key()
    asked = {"solver": {"granularity": "matrix", "solver": "exact"}}
    asked["reorder_neurons"] = {"pattern": "4:8", "reorder_neurons": True}
    names = spec.flat().keys() - {"model", "pruned", "preset"}  # which are hashed by content, or stand for others
    changed = {name: spec.replaced(**asked.get(name, {name: another(name, spec.flat()[name])})) for name in names}
    assert len({spec.key(), *(other.key() for other in changed.values())}) == len(names) + 1
    moved = shutil.copytree(spec.model.model, tmp_path / "model"), shutil.copy(tiny_text, tmp_path / "moved.txt")
    moved = {name: str(path) for name, path in zip(("model", "text", "evaluation_texts"), (*moved, moved[1]))}
    assert spec.replaced(**moved).key() == spec.key()
    other = tmp_path / "text.txt"
    other.write_text(Path(tiny_text).read_text() + "\n\nOne more paragraph.")
    assert spec.replaced(text=str(other)).key() != spec.key()
    assert text.fingerprint(str(other)) != text.fingerprint(tiny_text)


def test_a_criterion_of_ones_own_is_known_by_its_code(spec, monkeypatch):
    keys = []
    for score in (largest, smallest, largest):
        monkeypatch.setitem(CRITERIA, "wanda", Criterion("wanda", "none", "row", "", "", score))
        keys.append(spec.key())
    monkeypatch.undo()
    assert keys[0] == keys[2] and len({*keys, spec.key()}) == 3


SCALE = 1.0


class Scaled:
    """A score with a state, which calls a function that reads a global value."""

    def __init__(self, by):
        self.by = by

    @property
    def first(self):
        return self.by[0]

    def __call__(self, weight, statistics, generator):
        return scaled(weight) * self.first


def scaled(weight):
    return weight.abs() * SCALE


def test_and_by_all_that_its_code_uses(spec, monkeypatch):
    """Objects, partial functions, large tensors, global values; and alike in every process, so by no address in memory."""

    def content(score):
        return Criterion("own", "none", "row", "", "", score).source_code

    values = torch.zeros(2000)
    other = values.clone()
    other[1000] = 1
    scores = [Scaled(values), Scaled(other), Scaled(values).__call__, partial(largest, 1), partial(largest, 2), largest]
    found = [content(score) for score in scores]
    assert len({*found}) == len(found) and found == [content(score) for score in scores]
    assert found[0] == content(Scaled(values.clone())) and not any(" at 0x" in each for each in found)
    monkeypatch.setitem(globals(), "SCALE", 2.0)
    now = [content(score) for score in scores]
    assert [a != b for a, b in zip(now, found)] == [True] * 3 + [False] * 3


@pytest.mark.parametrize(("changes", "said"), [
    ({"scope": "rows"}, "scope is 'rows'; allowed: row, matrix, half-block, model"),
    ({"statistics": "norms"}, "statistics is 'norms'; allowed: none, norm, gram, moments, gradient"),
    ({"score": None}, "either a score or a method"), ({"method": largest}, "either a score or a method"),
])  # fmt: skip
def test_what_a_criterion_may_not_say(changes, said):
    with pytest.raises(ReconError, match=said):
        Criterion(**vars(Criterion("own", "none", "row", "", "", largest)) | changes)


def test_as_many_samples_said_in_another_way_are_the_same_run(spec):
    spec = spec.replaced(retrain="full")
    said = spec.replaced(prune_samples=6, retrain_samples=6)
    assert said.key() == spec.key()
    # What was said stands when another number of samples is asked for.
    assert said.replaced(samples=4).samples_by_phase == {"prune": 6, "reconstruct": 4, "retrain": 6}
    assert spec.replaced(prune_samples=6, samples=4).samples_by_phase == {"prune": 6, "reconstruct": 4, "retrain": 4}
    assert spec.replaced(granularity="none", retrain="none").samples_by_phase == {"prune": 6, "reconstruct": 0, "retrain": 0}


@pytest.mark.parametrize(("model", "changes", "lengths"), [
    ("llama", {"max_position_embeddings": 256}, (256, 256)),
    ("llama", {"max_position_embeddings": 8192}, (512, 256)),
    ("gpt2", {"n_positions": 128}, (128, 128)),
    ("bart", {"max_position_embeddings": 64}, (128, 128)),  # half for the encoder, half for the decoder
    ("t5", {}, (512, 256)),  # it does not tell
])  # fmt: skip
def test_lengths_that_are_not_given_fit_the_model(spec, config_folder, model, changes, lengths):
    asked = RunSpec.of(model=config_folder(make_model(model, **changes).config.to_dict()), text="news", evaluation_texts="news")
    found = asked.resolved()
    assert (found.calibration.sequence_length, found.evaluation.evaluation_length) == lengths
    assert found == asked.replaced(sequence_length=lengths[0], evaluation_length=lengths[1]) == found.resolved()
    assert asked.key() == found.key() != asked.replaced(evaluation_length=lengths[1] - 1).key()
    # What is given stands, even where it is too long: the run refuses it.
    assert asked.replaced(sequence_length=4000).resolved().calibration.sequence_length == 4000


def test_options_at_their_defaults_are_left_out_of_the_key(spec):
    """So an option added later does not disown old records."""
    files = spec.sources()
    (text,) = files["texts"].values()
    given = {"samples", "sequence_length", "evaluation_length"}
    values = {name: value for name, value in spec.resolved().flat().items() if name in given}
    values |= {"model": files["model"], "text": text, "evaluation_texts": [text]}
    files["texts"] = {text: text}
    expected = hashlib.sha256(json.dumps({"spec": values, **files}, sort_keys=True).encode()).hexdigest()[:16]
    assert spec.key() == expected
    pruned = spec.replaced(granularity="none")
    assert pruned.key() == pruned.replaced(propagation="dense", epochs=3).key() != pruned.replaced(retrain_epochs=3).key()
