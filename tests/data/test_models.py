"""Loading by name or folder, and what tells one set of weights from another."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.utils import logging

from recon.data import assets, gguf, models
from recon.errors import ReconError
from recon.study import streaming
from recon.study.spec import RunSpec


@pytest.fixture
def folder(tiny_folder, tmp_path):
    """A copy of the tiny model's folder that a test may spoil."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "copy"))


def change(folder: Path, name: str, value: float, keep: slice = slice(0, 1)) -> None:
    file = folder / "model.safetensors"
    weights = load_file(file)
    weights[name].view(-1)[keep] = value
    save_file(weights, file, metadata={"format": "pt"})


# ---- loading


def test_a_folder_is_loaded_in_float32_for_evaluation(tiny_folder):
    model, tokenizer = models.load(tiny_folder)
    weights = load_file(f"{tiny_folder}/model.safetensors")
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert set(weights) == {name for name, _ in model.named_parameters()}
    assert all(torch.equal(model.get_parameter(name), weight) for name, weight in weights.items())
    assert tokenizer.decode(tokenizer("Zumuke le zila.")["input_ids"]) == "Zumuke le zila."


def test_half_precision_weights_become_float32(folder):
    file = folder / "model.safetensors"
    save_file({name: w.bfloat16() for name, w in load_file(file).items()}, file, metadata={"format": "pt"})
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"float32"', '"bfloat16"'))
    model, _ = models.load(str(folder))
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", ["nonsense", "./missing/folder", "../missing", "/missing/folder", "a/b/c", "smollm2"])
def test_unknown_names_are_refused_with_what_is_bundled(name):
    with pytest.raises(ReconError, match="bundled: smollm2-135m") as error:
        models.load(name)
    assert f"unknown model {name!r}" in str(error.value)


def test_a_hub_id_is_passed_on():
    assert models.locate("Qwen/Qwen2.5-0.5B") == "Qwen/Qwen2.5-0.5B"


def test_a_folder_without_config_is_refused(tmp_path):
    with pytest.raises(ReconError, match=r"has no config\.json") as error:
        models.load(str(tmp_path))
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite_are_refused_by_name(folder, value):
    name = "model.layers.2.mlp.up_proj.weight"
    change(folder, name, value, slice(0, 3))
    with pytest.raises(ReconError, match=rf"parameter '{name}' holds 3 NaN or infinite values of 2048"):
        models.load(str(folder))


def test_missing_weights_are_refused(folder):
    file = folder / "model.safetensors"
    weights = load_file(file)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ReconError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        models.load(str(folder))


def test_weights_without_a_place_are_left_out_with_a_warning_streamed_or_not(folder, caplog):
    """As transformers does; not those that it ignores in old files."""
    file = folder / "model.safetensors"
    ignored = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    surplus = {"model.layers.9.mlp.up_proj.weight": torch.ones(3), "model.vision.weight": torch.ones(3)}
    save_file(load_file(file) | ignored | surplus, file, metadata={"format": "pt"})
    said = []
    for read in (models.load, models.skeleton):
        caplog.clear()
        read(str(folder))
        said.append([record.message for record in caplog.records if record.name == "recon"])
    [only] = said[0]
    assert said[1] == [only]
    assert only.startswith(
        "LlamaForCausalLM has no place for weight 'model.layers.9.mlp.up_proj.weight' of its checkpoint (2 such)"
    )


@pytest.mark.parametrize("kind, name", [(torch.int8, "I8"), (torch.float8_e4m3fn, "F8_E4M3")])
def test_weights_that_need_a_scale_are_refused_streamed_or_not(folder, kind, name):
    file = folder / "model.safetensors"
    weights = load_file(file)
    save_file(weights | {"model.norm.weight": weights["model.norm.weight"].to(kind)}, file, metadata={"format": "pt"})
    for read in (models.load, models.skeleton):
        with pytest.raises(
            ReconError, match=f"weight 'model.norm.weight' is stored as {name}; allowed: .* [Uu]ndo its quantisation"
        ):
            read(str(folder))


def quantised(folder: Path, **how) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": how}))


@pytest.mark.parametrize(
    "how",
    [{"quant_method": "gptq", "bits": 4}, {"quant_method": "awq"}, {"quant_method": "bitsandbytes", "load_in_4bit": True}],
    ids=lambda how: how["quant_method"],
)
def test_quantised_weights_are_refused_before_they_are_read(folder, tiny_folder, how, monkeypatch):
    quantised(folder, **how)
    dense = models.load(tiny_folder)[0]
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda *a, **k: pytest.fail("is read"))
    reads = (models.load, models.skeleton, lambda name: models.load_pruned(name, dense))
    for read in reads:
        with pytest.raises(
            ReconError, match=rf"its weights are quantised \({how['quant_method']}\); undo their quantisation first"
        ):
            read(str(folder))


def test_quantisation_that_transformers_undoes_is_undone(folder, monkeypatch):
    """Weights in eighth precision with a scale for each block, whether there is a GPU that could compute with them or not."""
    file = folder / "model.safetensors"
    before, stored = load_file(file), {}
    for name, weight in before.items():
        stored[name] = weight
        if name.endswith("_proj.weight"):
            scale = weight.abs().max() / 448
            stored |= {name: (weight / scale).to(torch.float8_e4m3fn), f"{name}_scale_inv": scale.view(1, 1)}
    save_file(stored, file, metadata={"format": "pt"})
    quantised(folder, quant_method="fp8", activation_scheme="dynamic", weight_block_size=[128, 128])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    model, _ = models.load(str(folder))
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.allclose(parameter, before[name], rtol=2**-4, atol=before[name].abs().max() / 448 / 2**6)
        assert torch.equal(parameter, before[name]) == (name not in stored or stored[name].dtype == torch.float32)
    assert not hasattr(model.config, "quantization_config")
    assert models.precision(models.configuration(str(folder))) == "dequantised from fp8"
    with pytest.raises(ReconError, match=r"undoes its quantisation \(fp8\), which a streamed run cannot do"):
        streaming.wanted("yes", RunSpec.of(model=str(folder)))


@pytest.mark.parametrize(
    "words, said",
    [
        ({"dtype": "bfloat16"}, "bfloat16"),
        ({"dtype": None}, "of a dtype that the configuration does not name"),
        ({gguf.NOTE: "dequantised from GGUF Q4_1 (100 % Q4_1)"}, "dequantised from GGUF Q4_1 (100 % Q4_1)"),
    ],
)
def test_what_weights_are_before_they_are_float32(folder, words, said):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | words))
    assert models.precision(models.configuration(str(folder))) == said


# ---- fingerprints


def test_fingerprint_does_not_depend_on_the_place(tiny_folder, folder):
    assert models.fingerprint(str(folder)) == models.fingerprint(tiny_folder)
    (folder / "README.md").write_text("a note")
    assert models.fingerprint(str(folder)) == models.fingerprint(tiny_folder)


def test_fingerprint_of_a_bundled_model_is_that_of_its_source(monkeypatch, tmp_path):
    """The converted files differ between versions of transformers, and nothing has to be fetched to tell runs apart."""
    monkeypatch.setenv("RECON_CACHE", str(tmp_path))
    found = {name: models.fingerprint(name) for name in assets.BUNDLED_MODELS}
    assert len(set(found.values())) == len(found) and not any(tmp_path.iterdir())
    monkeypatch.setattr(gguf, "CONVERSION", gguf.CONVERSION + 1)
    assert all(models.fingerprint(name) != value for name, value in found.items())


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_fingerprint_changes_with_each_file(folder, file):
    before = models.fingerprint(str(folder))
    path = folder / file
    path.write_text(path.read_text() + "\n")
    assert models.fingerprint(str(folder)) != before


def test_fingerprint_changes_with_one_weight(folder):
    before = models.fingerprint(str(folder))
    change(folder, "model.norm.weight", 0.5)
    assert models.fingerprint(str(folder)) != before


@pytest.mark.parametrize("file", ["tokenizer.model", "merges.txt", "vocab.txt", "qwen.tiktoken", "source.spm"])
def test_fingerprint_changes_with_a_tokenizer_in_other_formats(folder, file):
    (folder / file).write_text("one")
    before = models.fingerprint(str(folder))
    (folder / file).write_text("two")
    assert models.fingerprint(str(folder)) != before


def test_fingerprint_changes_with_a_shard_in_a_folder_below(folder):
    (folder / "weights").mkdir()
    file = folder / "weights" / "all.safetensors"
    (folder / "model.safetensors").rename(file)
    names = load_file(file)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(names, "weights/all.safetensors")})
    )
    before = models.fingerprint(str(folder))
    save_file({name: weight + 1 for name, weight in names.items()}, file, metadata={"format": "pt"})
    assert models.fingerprint(str(folder)) != before
    # What is not there, or is no index, is for loading to refuse.
    file.unlink()
    assert models.fingerprint(str(folder)) != before
    (folder / "model.safetensors.index.json").write_text("[]")
    assert models.fingerprint(str(folder))


def test_the_fingerprint_of_an_ordinary_folder_is_that_of_its_files_by_name(folder):
    """As records were named by it from the start."""
    read = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    digests = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in read}
    assert models.fingerprint(str(folder)) == hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


def test_fingerprint_of_an_unknown_model_is_refused():
    with pytest.raises(ReconError, match="unknown model 'nonsense'"):
        models.fingerprint("nonsense")


def test_weights_lie_where_tensors_of_their_own_would(folder):
    """As torch allocates on CPUs, and not in the file, wherever in it they begin: what is written to it later changes nothing."""
    file = folder / "model.safetensors"
    for padding in (0, 1, 2, 3, 4, 5, 6, 7):  # the header is a multiple of 8 bytes long
        save_file(load_file(file), file, metadata={"format": "pt", "padding": "x" * 8 * padding})
        model, _ = models.load(str(folder))
        assert {p.data_ptr() % 64 for p in model.parameters()} == {0}
        before = [parameter.clone() for parameter in model.parameters()]
        with open(file, "r+b") as opened:
            opened.seek(-40_000, os.SEEK_END)
            content = opened.read()
            opened.seek(-40_000, os.SEEK_END)
            opened.write(bytes(40_000))
            opened.flush()
            assert all(torch.equal(one, other) for one, other in zip(before, model.parameters(), strict=True))
            opened.seek(-40_000, os.SEEK_END)
            opened.write(content)


@pytest.mark.parametrize("shown", [True, False])
def test_the_progress_bars_of_transformers_are_as_they_were(tiny_folder, shown):
    (logging.enable_progress_bar if shown else logging.disable_progress_bar)()
    models.load(tiny_folder)
    assert logging.is_progress_bar_enabled() == shown
    logging.enable_progress_bar()
