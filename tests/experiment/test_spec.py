"""What a run is asked for and how it is carried out: keys of runs, and what is refused."""

from pathlib import Path

import pytest

import recon
from recon.data import text
from recon.errors import ReconError
from recon.experiment import config
from recon.experiment.config import options


@pytest.fixture
def spec(tiny_folder, tiny_text):
    return recon.RunSpec.of(model=tiny_folder, text=tiny_text, samples=6, sequence_length=32, evaluation_texts=tiny_text)


def another(name: str, value: object) -> object:
    """An allowed value of an option other than `value`."""
    fixed = {
        "pattern": "2:4", "granularity": "block", "evaluation_texts": ("news",), "text": "news", "tasks": ("analogies",), "device": "cpu",
        "revision": "main", "pruned_revision": "v1", "chunks": 2,
    }  # fmt: skip
    choices = tuple(options()[name].metadata["choices"])
    if name in fixed or choices:
        return fixed.get(name) or next(choice for choice in reversed(choices) if choice != value)
    return not value if isinstance(value, bool) else value + 1 if isinstance(value, int) else value / 2 or 0.1


def test_the_key_depends_on_everything_that_can_change_the_numbers(spec, tmp_path, tiny_text):
    assert spec.replaced().key() == spec.key()
    asked = {"solver": {"granularity": "matrix", "solver": "exact"}, "criterion": {"criterion": "ria"}}
    names = options().keys() - {"model", "pruned"}  # which are hashed by content: see below
    changed = {name: spec.replaced(**asked.get(name, {name: another(name, spec.get(name))})) for name in names}
    assert len({spec.key(), *(other.key() for other in changed.values())}) == len(names) + 1
    other = tmp_path / "text.txt"
    other.write_text(Path(tiny_text).read_text() + "\n\nOne more paragraph.")
    assert spec.replaced(text=str(other)).key() != spec.key()
    assert text.fingerprint(str(other)) != text.fingerprint(tiny_text)


def test_as_many_samples_said_in_another_way_are_the_same_run(spec):
    said = spec.replaced(prune_samples=6, retrain_samples=6)
    assert said.key() == spec.key()
    # What was said stands when another number of samples is asked for.
    assert said.replaced(samples=4).samples_by_phase == {"prune": 6, "reconstruct": 4, "retrain": 6}
    assert spec.replaced(prune_samples=6, samples=4).samples_by_phase == {"prune": 6, "reconstruct": 4, "retrain": 4}


def test_an_option_added_later_does_not_disown_old_records(spec, monkeypatch):
    """A key is a hash of what differs from the defaults."""
    before, known = spec.key(), options()
    value = {"new": known["seed"].default}
    monkeypatch.setattr(config, "options", lambda: known | {"new": known["seed"]})
    monkeypatch.setattr(recon.RunSpec, "decisive", lambda self: self.flat() | value)
    monkeypatch.setattr(recon.RunSpec, "flat", lambda self: {name: self.get(name) for name in known})
    assert spec.key() == before
    value["new"] = 1
    assert spec.key() != before


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"stream": "maybe"}, ["stream is 'maybe'", "auto, yes, no"]),
        ({"save_dtype": "int8", "save": "there"}, ["save_dtype is 'int8'", "float32, bfloat16, float16"]),
        ({"save_dtype": "float16"}, ["save_dtype is 'float16'", "no folder to save to"]),
        ({"executor": "dask"}, ["'dask'", "serial, ray"]),
        ({"force": "yes"}, ["force is 'yes'"]),
    ],
)
def test_how_a_run_is_carried_out_is_checked(wrong, words):
    with pytest.raises(ReconError) as error:
        recon.RunOptions(**wrong)
    assert all(word in str(error.value) for word in words)


def test_a_place_to_save_may_be_a_string():
    assert recon.RunOptions(save="there").save == Path("there")
