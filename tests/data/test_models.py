"""Loading by name or folder, in shards or from GGUF, and what tells one set of weights from another."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from unittest.mock import Mock

import gguf as library
import pytest
import torch
from fixtures.models import make_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GgufConfig, safetensors_conversion

from recon import ReconError, RunSpec
from recon.data import files, models
from recon.study.plan import Plan

UP = "model.layers.2.mlp.up_proj.weight"


@pytest.fixture
def folder(tiny_folder, tmp_path):
    """A copy of the tiny model's folder that a test may spoil."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "copy"))


@pytest.fixture
def sharded(folder):
    """The same in bfloat16, in several shards with an index, in a folder below."""
    model = AutoModelForCausalLM.from_pretrained(folder).bfloat16()
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="60KB")
    (folder / "weights").mkdir()
    for file in folder.glob("*.safetensors"):
        file.rename(folder / "weights" / file.name)
    index = json.loads((folder / files.INDEX).read_text())
    places = {name: f"weights/{file}" for name, file in index["weight_map"].items()}
    (folder / files.INDEX).write_text(json.dumps(index | {"weight_map": places}))
    return folder


def change_config(folder: Path, **options) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | options))


def change_weights(folder: Path, change) -> None:
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def test_a_model_is_loaded_in_float32_for_evaluation_whole_or_in_shards_of_which_a_missing_one_is_named(tiny_folder, sharded):
    for name, dtype in ((tiny_folder, torch.float32), (str(sharded), torch.bfloat16)):
        weights = {name: weight.to(dtype).float() for name, weight in load_file(f"{tiny_folder}/model.safetensors").items()}
        model, tokenizer = models.load(Path(name))
        assert not model.training and {p.dtype for p in model.parameters()} == {torch.float32}
        assert set(weights) == {name for name, _ in model.named_parameters()}
        assert all(torch.equal(model.get_parameter(name), weight) for name, weight in weights.items())
        assert tokenizer.decode(tokenizer("Zumuke le zila.")["input_ids"]) == "Zumuke le zila."
        _, on_disk, _ = models.skeleton(name)
        assert all(value.dtype == torch.float32 and torch.equal(value, weights[n]) for n, value in on_disk.read(list(weights)))
        assert f"torch.{models.precision(models.configuration(name))}" == str(dtype)
    (gone := sorted(sharded.glob("weights/*"))[1]).unlink()
    with pytest.raises(ReconError, match=f"cannot be loaded.*weights/{gone.name}"):
        models.load(str(sharded))


@pytest.mark.parametrize("name", ["nonsense", "./missing/folder", "../missing", "/missing/folder", "a/b/c", "smollm2"])
def test_unknown_names_are_refused_with_what_is_bundled(name):
    for ask in (models.load, models.fingerprint):
        with pytest.raises(ReconError, match=f"unknown model '{name}'; bundled: smollm2-135m"):
            ask(name)
    assert models.locate("Qwen/Qwen2.5-0.5B") == "Qwen/Qwen2.5-0.5B"


def with_code(folder):
    change_config(folder, model_type="own", auto_map={"AutoConfig": "modeling_own.OwnConfig"})
    (folder / "modeling_own.py").write_text("raise SystemExit('was run')")


@pytest.mark.parametrize("spoil, said", [
    (lambda f: (f / "config.json").unlink(), r"has no config\.json"),
    (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "has no safetensors"),
    (lambda f: [file.unlink() for file in f.glob("token*")], "has no tokenizer"),
    (lambda f: os.truncate(f / "model.safetensors", (f / "model.safetensors").stat().st_size - 1), "SafetensorError"),
    (lambda f: change_config(f, quantization_config={"quant_method": "gptq", "bits": 4}), r"quantised \(gptq\); undo their"),
    (with_code, "trust_remote_code"),
    (lambda f: change_weights(f, lambda w: {n: t for n, t in w.items() if n != UP}), UP),
    (lambda f: change_weights(f, lambda w: w | {UP: w[UP] * torch.nan}), f"parameter '{UP}' holds 2048 NaN or infinite"),
    (lambda f: change_weights(f, lambda w: w | {UP.replace("weight", "bias"): w[UP][:, 0].contiguous()}), "up_proj.bias"),
    (lambda f: change_weights(f, lambda w: w | {UP: w[UP][:5].contiguous()}), r"5, 32.*64, 32|[Mm]ismatch"),
])  # fmt: skip
def test_what_cannot_be_loaded_is_named(folder, spoil, said):
    spoil(folder)
    with pytest.raises(ReconError, match=f"(?s){folder}.*{said}"):
        models.load(str(folder))
    with pytest.raises(ReconError, match=f"(?s){said}"):  # as when it stays on disk
        list(models.skeleton(str(folder))[1].read([UP]))


def test_quantisation_that_transformers_undoes_is_undone(folder, monkeypatch):
    """Weights in eighth precision with a scale for each block, whether there is a GPU that could compute with them or not."""
    before, stored = load_file(folder / "model.safetensors"), {}
    for name, weight in before.items():
        stored[name] = weight
        if name.endswith("_proj.weight"):
            scale = weight.abs().max() / 448
            stored |= {name: (weight / scale).to(torch.float8_e4m3fn), f"{name}_scale_inv": scale.view(1, 1)}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    how = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    change_config(folder, quantization_config=how)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ReconError, match=r"its weights are quantised \(fp8\)"):
        models.skeleton(str(folder))
    model, _ = models.load(str(folder))
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.allclose(parameter, before[name], rtol=2**-4, atol=before[name].abs().max() / 448 / 2**6)
    assert not hasattr(model.config, "quantization_config")
    assert models.precision(models.configuration(str(folder))) == "dequantised from fp8"


def test_weights_lie_in_aligned_memory_and_not_in_the_file(folder):
    file = folder / "model.safetensors"
    for padding in range(8):  # the header is a multiple of 8 bytes long
        save_file(load_file(file), file, metadata={"format": "pt", "padding": "x" * 8 * padding})
        assert {p.data_ptr() % 64 for p in models.load(str(folder))[0].parameters()} == {0}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A stand-in for the Hub, from which patterns of files are copied: repository -> folder, its newest commit, what was read."""
    hub = {"repositories": {}, "newest": "b" * 40, "fetched": set()}
    cache = tmp_path / "hub"

    def snapshot(repository, revision=None, allow_patterns=()):
        commit = revision or hub["newest"]
        target = cache / f"models--{repository.replace('/', '--')}" / "snapshots" / commit.replace("/", "-")
        source = hub["repositories"][repository + ("@pr" if commit.startswith("refs") else "")]
        for file in {file for pattern in allow_patterns for file in source.glob(pattern)}:
            target.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, target)
            hub["fetched"].add(file.name)
        if revision is None or revision.startswith("refs"):
            noted = target.parents[1] / "refs" / (revision or "main")
            noted.parent.mkdir(parents=True, exist_ok=True)
            noted.write_text(commit)
        return str(target)

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    one_file = lambda name, file, revision: f"{snapshot(name, revision, [file])}/{file}"  # noqa: E731
    monkeypatch.setattr("huggingface_hub.hf_hub_download", one_file)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *args, **options: None)
    monkeypatch.setattr(safetensors_conversion, "get_conversion_pr_reference", lambda api, name: "refs/pr/7")
    files.commit.cache_clear()
    return hub


def test_what_is_loaded_from_the_hub_is_the_commit_that_its_fingerprint_names(hub, folder, tiny_folder, monkeypatch):
    """Though a newer one is out; and nothing is fetched that is not read."""
    for name in ("consolidated.safetensors", "modeling.py", "pytorch_model.bin"):
        (folder / name).write_text("the same once more")
    hub["repositories"] = {"me/one": folder, "me/old": folder, "me/old@pr": Path(tiny_folder)}
    assert models.fingerprint("me/one") == "b" * 40 == files.hub_snapshot("me/one").name
    hub["newest"] = "c" * 40
    files.commit.cache_clear()  # as in another process
    assert files.hub_snapshot("me/one").name == models.fingerprint("me/one") == "b" * 40 and models.load("me/one")
    assert models.fingerprint("me/one", "d" * 40) == "d" * 40 == files.hub_snapshot("me/one", "d" * 40).name
    assert not {"consolidated.safetensors", "modeling.py", "pytorch_model.bin"} & hub["fetched"]
    # A repository with a pickle only: at no other revision than the newest does the Hub offer a conversion.
    (folder / "model.safetensors").unlink()
    assert models.load("me/old")
    with monkeypatch.context() as patch:  # without a connection
        patch.setattr(safetensors_conversion, "get_conversion_pr_reference", Mock(side_effect=ConnectionError("offline")))
        assert models.load("me/old")
        hub["repositories"]["me/older"] = folder
        with pytest.raises(ReconError, match="model 'me/older' cannot be loaded: .*offline"):
            models.load("me/older")
    with pytest.raises(ReconError, match="model 'me/old' at revision 'v1' cannot be loaded: it has no safetensors"):
        models.load("me/old", "v1")


MODEL = """
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_code_that_comes_with_a_model_runs_where_trusted_and_counts(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    own = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    change_config(folder, auto_map=own, model_type="own")
    (folder / "modeling_own.py").write_text(MODEL)
    assert type(models.load(str(folder), trust_remote_code=True)[0]).__name__ == "OwnForCausalLM"
    spec = RunSpec.of(model=str(folder), text=f"{folder}/tiny_text.txt", evaluation_texts=f"{folder}/tiny_text.txt")
    before, trusted = spec.key(), spec.replaced(trust_remote_code=True).key()
    assert "parameters" in str(Plan(spec.replaced(trust_remote_code=True)))
    (folder / "modeling_own.py").write_text(MODEL + "# changed")
    assert spec.key() == before and len({before, trusted, spec.replaced(trust_remote_code=True).key()}) == 3


def test_the_fingerprint_of_a_folder_is_that_of_its_files_by_name(folder, tiny_folder):
    """As records were named by it from the start, wherever it lies."""
    read = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    digests = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in read}
    expected = hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()
    (folder / "README.md").write_text("a note")
    (folder / "record.json").write_text("{}")
    assert models.fingerprint(str(folder)) == models.fingerprint(tiny_folder) == expected


def test_fingerprint_changes_with_each_file(sharded):
    found = [models.fingerprint(str(sharded))]
    for name in "config.json tokenizer.json tokenizer.model merges.txt vocab.txt qwen.tiktoken source.spm".split():
        with (sharded / name).open("a") as file:
            file.write("\n")
        found.append(models.fingerprint(str(sharded)))
    shard = sorted(sharded.glob("weights/*"))[1]
    save_file({name: weight + 1 for name, weight in load_file(shard).items()}, shard, metadata={"format": "pt"})
    assert len({*found, models.fingerprint(str(sharded))}) == 9


def write_gguf(path, kind="Q8_0", file_type=None):
    """Writes a random Llama of two blocks with matrices of this kind; its head is its own."""
    writer, kind = library.GGUFWriter(path, "llama"), library.GGMLQuantizationType[kind]
    model = make_model("llama", hidden_size=64, intermediate_size=96, num_hidden_layers=2, vocab_size=50)
    numbers = {
        "block_count": 2, "context_length": 64, "embedding_length": 64, "feed_forward_length": 96, "head_count": 4,
        "head_count_kv": 2, "layer_norm_rms_eps": 1e-5, "rope_dimension_count": 16, "vocab_size": 50,
    }  # fmt: skip
    for name, value in numbers.items():
        getattr(writer, f"add_{name}")(value)
    if file_type is not None:
        writer.add_file_type(file_type)
    names = library.get_tensor_name_map(library.MODEL_ARCH.LLAMA, 2)
    for name, weight in model.named_parameters():
        values, stored = weight.detach().numpy(), None if weight.ndim == 1 else kind
        values = library.quantize(values, kind) if stored else values
        writer.add_tensor(names.get_name(name, [".weight"]), values, raw_dtype=stored)
    for part in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{part}_to_file")()
    writer.close()
    return path


@pytest.fixture
def without_tokenizer(tmp_path, monkeypatch):
    monkeypatch.setenv("RECON_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", Mock())


@pytest.mark.parametrize("kind, file_type, said", [
    ("Q8_0", None, "dequantised from GGUF (100 % Q8_0)"),
    ("Q4_1", library.LlamaFileType.MOSTLY_Q4_1, "dequantised from GGUF Q4_1 (100 % Q4_1)"),
    ("Q8_0", library.LlamaFileType.GUESSED, "dequantised from GGUF (100 % Q8_0)"),
    ("F16", library.LlamaFileType.MOSTLY_F16, "GGUF F16 (100 % F16)"),
])  # fmt: skip
def test_gguf_is_unpacked_once_as_transformers_reads_it_and_named(kind, file_type, said, tmp_path, without_tokenizer, capfd):
    file = write_gguf(tmp_path / "tiny.gguf", kind, file_type)
    planned = models.configuration(str(file))
    assert planned.num_hidden_layers == 2 and not (tmp_path / "cache").exists()  # from its header
    place = models.locate(str(file))
    assert capfd.readouterr() == ("", "")  # no bars
    how = {"dtype": torch.float32, "quantization_config": GgufConfig(dequantize=True)}
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, **how)
    found = AutoModelForCausalLM.from_pretrained(place)
    assert not found.config.tie_word_embeddings and found.config.num_key_value_heads == 2
    assert list(found.state_dict()) == list(expected.state_dict())
    assert all(torch.equal(tensor, expected.state_dict()[name]) for name, tensor in found.state_dict().items())
    assert models.locate(str(file)) == place and models.fingerprint(str(file)) == files.digest(file)
    found.to(torch.bfloat16).save_pretrained(tmp_path / "saved")  # what is saved of it says so too
    assert {models.precision(models.configuration(str(name))) for name in (file, tmp_path / "saved")} == {said}


def test_gguf_that_cannot_be_read_is_named_and_leaves_nothing(tmp_path, without_tokenizer):
    file = write_gguf(tmp_path / "tiny.gguf")
    file.write_bytes(file.read_bytes()[:3000])
    with pytest.raises(ReconError, match=r"tiny\.gguf' cannot be loaded"):
        models.locate(str(file))
    assert not list((tmp_path / "cache" / "derived").iterdir())
