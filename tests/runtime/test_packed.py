"""Packed checkpoints: the layout as a slow reference packs it, back to the bit, and nothing damaged is read."""

import filecmp
import json
import shutil

import pytest
import torch
from fixtures.models import make_model
from fixtures.runs import result_of
from safetensors.torch import load_file, save_file
from test_refusals import refuse
from transformers import AutoModelForCausalLM

import recon
from recon.cli import main


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=str)
def plain(request, tmp_path):
    """A checkpoint in shards, some with notes of their own or none: a share of its projections zero, some zeros negative, in one
    matrix too few to gain; and a chat template, as tokenizers with several of them save it."""
    model = make_model("llama", tie_word_embeddings=True).to(request.param)
    draw = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        if "proj" in name:
            weight.data[torch.rand(weight.shape, generator=draw) < (0.01 if "layers.1.mlp.up" in name else 0.6)] = 0.0
            weight.data[:, 3] = -0.0
    model.save_pretrained(tmp_path / "plain", max_shard_size="20KB")
    for file, noted in zip(sorted((tmp_path / "plain").glob("*.safetensors")), (None, {"path": "of mine"})):
        save_file(load_file(file), file, noted)
    (tmp_path / "plain" / "additional_chat_templates").mkdir()
    (tmp_path / "plain" / "additional_chat_templates" / "tools.jinja").write_text("{{ messages }}")
    return tmp_path / "plain"


def test_packed_as_a_slow_reference_packs_and_back_to_the_bit(plain, tmp_path):
    recon.pack(plain, tmp_path / "packed")
    recon.unpack(tmp_path / "packed", tmp_path / "back")
    files = [file.relative_to(plain) for file in plain.glob("**/*.*")]
    assert all(filecmp.cmp(plain / file, tmp_path / "back" / file, shallow=False) for file in files)
    assert len(list(plain.glob("*.safetensors"))) > 2
    for file in plain.glob("*.safetensors"):
        found = load_file(tmp_path / "packed" / file.name.replace(".safetensors", ".packed.safetensors"))
        for name, weight in load_file(file).items():
            values = weight.flatten().tolist()
            bits = [str(value) != "0.0" for value in values]  # negative zeros are kept
            if weight.ndim == 1 or len(bits) / 8 + sum(bits) * weight.itemsize >= weight.nbytes:
                assert torch.equal(found[name], weight)
                continue
            mask = found[name + ".packed_mask"]
            assert [bool(mask[i // 8] >> i % 8 & 1) for i in range(len(bits))] == bits and len(mask) == -(-len(bits) // 8)
            assert found[name + ".packed_values"].tolist() == [value for value, bit in zip(values, bits) if bit]
    with pytest.raises(OSError, match="no file named model.safetensors"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "packed")


@pytest.mark.parametrize("plain", [torch.bfloat16], indirect=True)
@pytest.mark.parametrize("damage", ["cut", "lost", *range(10), "list", "names", "outside"])
def test_a_damaged_file_is_refused_by_name(plain, tmp_path, damage):
    recon.pack(plain, tmp_path / "packed")
    name = "model.packed.json" if damage in ("list", "names", "outside") else "model-00002*.safetensors"
    [file] = (tmp_path / "packed").glob(name)
    content = bytearray(file.read_bytes())
    if isinstance(damage, int):  # one bit, of a length, the header, or a tensor
        content[1 if damage == 0 else len(content) * damage // 10] ^= 1
    file.write_bytes(content if isinstance(damage, int) else content[:-9])
    if damage == "names":
        file.write_text("{}")
    if damage == "outside":
        file.write_text(json.dumps(json.loads(content) | {"../model.packed.safetensors": "0"}))
    if damage == "lost":
        file.unlink()
    with pytest.raises(recon.ReconError, match=file.name):
        recon.unpack(tmp_path / "packed", tmp_path / "back")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("stream", ["no", "yes"])
def test_a_run_saves_packed_what_it_saves_plain(tiny_spec, tmp_path, stream):
    for kind in ("plain", "packed"):
        result_of(tiny_spec, stream=stream, save=tmp_path / kind, save_dtype="bfloat16", save_format=kind)
    (one, _), (other, tokenizer) = recon.load(str(tmp_path / "plain")), recon.load(str(tmp_path / "packed"))
    assert all(torch.equal(values, other.get_parameter(name)) for name, values in one.named_parameters())
    assert tokenizer.vocab_size and not list(tmp_path.glob("packed/model.safetensors*"))
    weights = {name: weight for name, weight in load_file(tmp_path / "plain" / "model.safetensors").items() if "proj" in name}
    assert not any((weight.signbit() & (weight == 0)).any() for weight in weights.values())
    stored = load_file(tmp_path / "packed" / "model.packed.safetensors")
    size = sum(tensor.nbytes for name, tensor in stored.items() if "proj" in name)
    assert size == (1 / 2 + 1 / 16) * sum(weight.nbytes for weight in weights.values())
    assert "`recon unpack folder plain`" in (tmp_path / "packed" / "README.md").read_text()
    assert "sparsity_config" not in json.dumps([json.loads(path.read_text()) for path in tmp_path.glob("*/config.json")])
    # Read as what something else pruned, from a stream, and not computed again.
    again = tiny_spec.replaced(pruned=str(tmp_path / "packed"), granularity="none")
    assert result_of(again, stream=stream).record.metrics["sparsity"] == 0.5
    as_asked = {"save": tmp_path / "packed", "save_dtype": "bfloat16", "save_format": "packed"}
    known = result_of(tiny_spec, stream=stream, **as_asked)
    assert known.record.status == "done" and known.model is None
    for other in ({"save_dtype": "float16"}, {"save_format": "plain"}):  # which is not what is there
        with pytest.raises(recon.ReconError, match="exists and is not an empty folder"):
            result_of(tiny_spec, stream=stream, **as_asked | other)


def test_what_cannot_be_packed_or_unpacked(tiny_folder, tmp_path, capsys):
    main(["pack", tiny_folder, str(tmp_path / "packed")])
    assert "MB of weights" in capsys.readouterr().out
    assert "packed already" in refuse(["pack", str(tmp_path / "packed"), str(tmp_path / "twice")], capsys)
    assert "holds no model.packed.json" in refuse(["unpack", tiny_folder, str(tmp_path / "plain")], capsys)
    shutil.copytree(tiny_folder, tmp_path / "pointer")
    (tmp_path / "pointer" / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert "model.safetensors' cannot be read" in refuse(["pack", str(tmp_path / "pointer"), str(tmp_path / "new")], capsys)
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model.safetensors"}}
    (shutil.copytree(tiny_folder, tmp_path / "shards") / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "lacks 'model-00001-of-00002.safetensors'" in refuse(["pack", str(tmp_path / "shards"), str(tmp_path / "new")], capsys)
    assert "exists and is not an empty folder" in refuse(["unpack", str(tmp_path / "packed"), tiny_folder], capsys)
