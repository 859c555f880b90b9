import errno
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import recon
from recon.decoder import Decoder
from recon.errors import ReconError


@pytest.fixture(scope="module")
def spec(tiny_folder, tiny_text):
    return recon.RunSpec(
        model=str(tiny_folder),
        text=str(tiny_text),
        pattern="0.6",
        samples=6,
        sequence_length=32,
        held_out_samples=2,
        evaluation_texts=(str(tiny_text),),
        evaluation_samples=3,
        evaluation_length=64,
    )


@pytest.fixture(scope="module")
def saved(spec, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "repaired"
    record = recon.run(spec, save=folder, command="recon run --pattern 0.6", progress=False)
    return folder, record


def zeros(model) -> dict[str, torch.Tensor]:
    return {name: matrix.weight == 0 for name, matrix in Decoder(model).matrices().items()}


def test_it_loads_anywhere_with_the_same_perplexity(saved, spec):
    folder, record = saved
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    tokens = recon.sample_tokens(spec.evaluation_texts[0], "evaluation", tokenizer, 3, 64)
    assert recon.perplexity(model, tokens, progress=False).value == record.metrics["perplexity"]


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
    values = record.metrics["by_text"][spec.text]
    for said in (
        f"base_model: {spec.model}", "0.6", "wanda", f"{record.metrics['sparsity']:.4f}", record.protocol["calibration"],
        record.protocol["evaluation"], f"{values['perplexity']:.2f}", f"{values['dense_perplexity']:.2f}", "recon run --pattern 0.6",
    ):  # fmt: skip
        assert said in card
    assert not [path for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pkl", ".pth")]
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


@pytest.mark.parametrize("what", ["save_pretrained", "os.replace"])
def test_a_full_disk_names_the_folder_and_leaves_nothing(saved, spec, tmp_path, monkeypatch, what):
    def full(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    if what == "os.replace":
        monkeypatch.setattr("recon.checkpoint.os.replace", full)
    else:
        monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", full)
    with pytest.raises(ReconError, match=r"cannot be written to '.*repaired'.*No space left on device"):
        recon.run(spec, save=tmp_path / "repaired", progress=False)
    assert list(tmp_path.iterdir()) == []
