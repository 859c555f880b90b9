import errno
import gc
import json
import shutil

import pytest
import torch
from fixtures.runs import Death, Killed, record_of
from transformers import AutoModelForCausalLM, AutoTokenizer

import recon
from recon.data import files, models
from recon.errors import ReconError
from recon.model.discovery import decompose
from recon.study.record import read_record


@pytest.fixture(scope="module")
def spec(tiny_folder, tiny_text):
    return recon.RunSpec.of(
        model=str(tiny_folder),
        text=str(tiny_text),
        pattern="0.6",
        samples=6,
        epochs=1,
        sequence_length=32,
        held_out_samples=2,
        evaluation_texts=(str(tiny_text),),
        evaluation_samples=3,
        evaluation_length=64,
    )


@pytest.fixture(scope="module")
def saved(spec, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "reconstructed"
    record = record_of(spec, save=folder, command="recon run --pattern 0.6")
    return folder, record


def zeros(model) -> dict[str, torch.Tensor]:
    return {name: matrix.weight == 0 for name, matrix in decompose(model).matrices().items()}


def test_it_loads_anywhere_with_the_same_perplexity(saved, spec):
    folder, record = saved
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    tokens = recon.sample_tokens(spec.evaluation.evaluation_texts[0], "evaluation", tokenizer, 3, 64)
    assert recon.perplexity(model, tokens).value == record.metrics["perplexity"]


def test_zeros_survive_casts_and_saving_again(saved, tmp_path):
    folder, record = saved
    before = zeros(AutoModelForCausalLM.from_pretrained(folder))
    total = sum(int(mask.sum()) for mask in before.values()) / sum(mask.numel() for mask in before.values())
    assert total == record.metrics["sparsity"] == pytest.approx(0.6, abs=0.02)
    for dtype in (torch.bfloat16, torch.float16):
        AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).save_pretrained(tmp_path / str(dtype))
        after = zeros(AutoModelForCausalLM.from_pretrained(tmp_path / str(dtype)))
        assert all((after[name] >= mask).all() for name, mask in before.items())


def test_the_card_says_what_it_is_and_nothing_is_pickled(saved, spec):
    folder, record = saved
    card = (folder / "README.md").read_text()
    values = record.metrics["by_text"][spec.calibration.text]
    for said in (
        f"base_model: {spec.model.model}", "0.6", "wanda", f"{record.metrics['sparsity']:.4f}", record.protocol["calibration"],
        f"| {record.protocol['dense']} |",
        record.protocol["evaluation"], f"{values['perplexity']:.2f}", f"{values['dense_perplexity']:.2f}", "recon run --pattern 0.6",
    ):  # fmt: skip
        assert said in card
    assert not [path for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pkl", ".pth")]
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


@pytest.mark.parametrize(
    "what", ["PreTrainedModel", "PreTrainedTokenizerBase", "study.home.write_json", "runtime.storage.os.replace"]
)
def test_a_full_disk_names_the_folder_and_leaves_nothing(saved, spec, tmp_path, monkeypatch, what):
    def full(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    def full_in_rust(*args, **options):  # as the tokenizers library says it
        raise Exception("No space left on device (os error 28)")

    names = {name: f"transformers.{name}.save_pretrained" for name in ("PreTrainedModel", "PreTrainedTokenizerBase")}
    monkeypatch.setattr(names.get(what, f"recon.{what}"), full_in_rust if "Tokenizer" in what else full)
    with pytest.raises(ReconError, match=r"cannot be written to '.*reconstructed'.*No space left on device"):
        record_of(spec, save=tmp_path / "reconstructed")
    assert list(tmp_path.iterdir()) == []


def test_killed_at_any_moment_the_folder_is_there_with_its_record_or_not_at_all(spec, tmp_path, monkeypatch):
    """Between any two things that are put on the disk for good, or deleted; the same call then ends with the record."""
    spec, folder, session = spec.replaced(granularity="none"), tmp_path / "reconstructed", recon.Session()
    record_of(spec, session)  # what is not written is done once
    left, record, states, before = 0, None, [], None
    while record is None:
        left += 2
        assert left < 100
        with monkeypatch.context() as patch:
            death = Death(patch, left)
            try:
                record = record_of(spec, session, save=folder, stream="no")
            except Killed:
                gc.collect()
        assert record is not None or death.dead
        states.append(folder.exists())
        if folder.exists():
            written = read_record(folder / files.RECORD)
            assert files.shards(folder) and written.key == spec.key() and written.seconds["total"] > written.seconds["save"] > 0
        if folder.exists() and before is None:
            before, left = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in folder.iterdir()}, 0
            monkeypatch.setattr("recon.study.run._Run.execute", lambda *_: pytest.fail("computed anew"))
    assert states.count(False) > 6 and states.count(True) > 1
    assert record.to_dict() == written.to_dict()
    assert {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["reconstructed"]


def test_the_record_does_not_tell_a_checkpoint_from_another_that_is_the_same(saved, tmp_path):
    """How long a run took goes into no key of what reads its model."""
    folder = shutil.copytree(saved[0], tmp_path / "copy")
    before = models.fingerprint(str(folder))
    (folder / files.RECORD).unlink()
    assert models.fingerprint(str(folder)) == before == models.fingerprint(str(saved[0]))
