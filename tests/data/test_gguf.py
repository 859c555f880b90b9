"""A GGUF file is unpacked to what transformers reads from it, and once."""

import gguf as library
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GgufConfig

from recon.data import gguf, models
from recon.errors import ReconError

WIDTH, INNER, HEADS, KEYS, VOCABULARY, BLOCKS = 64, 96, 4, 2, 50, 2


def write(path, kind=library.GGMLQuantizationType.Q8_0, file_type=None):
    """Writes a random Llama of two blocks with matrices of this kind; its head is its own."""
    draw = np.random.default_rng(0)
    writer = library.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(BLOCKS)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEYS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_vocab_size(VOCABULARY)
    if file_type is not None:
        writer.add_file_type(file_type)

    def add(name, *shape):
        values = draw.standard_normal(shape, dtype=np.float32)
        if len(shape) == 1:
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, library.quantize(values, kind), raw_dtype=kind)

    add("token_embd.weight", VOCABULARY, WIDTH)
    add("output.weight", VOCABULARY, WIDTH)
    add("output_norm.weight", WIDTH)
    keys = WIDTH // HEADS * KEYS
    for block in range(BLOCKS):
        for name, *shape in (
            ("attn_norm", WIDTH), ("attn_q", WIDTH, WIDTH), ("attn_k", keys, WIDTH), ("attn_v", keys, WIDTH),
            ("attn_output", WIDTH, WIDTH), ("ffn_norm", WIDTH), ("ffn_gate", INNER, WIDTH), ("ffn_up", INNER, WIDTH),
            ("ffn_down", WIDTH, INNER),
        ):  # fmt: skip
            add(f"blk.{block}.{name}.weight", *shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def file(tmp_path):
    return write(tmp_path / "tiny.gguf")


@pytest.fixture(autouse=True)
def surroundings(tmp_path, monkeypatch):
    class NoTokenizer:  # the file has none
        from_pretrained = staticmethod(lambda **source: NoTokenizer)
        save_pretrained = staticmethod(lambda folder: None)

    monkeypatch.setenv("RECON_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("transformers.AutoTokenizer", NoTokenizer)


def test_it_is_unpacked_once_to_what_transformers_reads(file, monkeypatch):
    folder = models.locate(str(file))
    expected = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    found = AutoModelForCausalLM.from_pretrained(folder)
    assert found.config.num_key_value_heads == KEYS and not found.config.tie_word_embeddings
    theirs = expected.state_dict()
    assert list(found.state_dict()) == list(theirs)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in found.state_dict().items())
    monkeypatch.setattr(gguf, "convert", lambda *_: pytest.fail("unpacked again"))
    assert models.locate(str(file)) == folder and models.fingerprint(str(file)) == gguf.digest(file)


def test_unpacking_draws_no_bars(file, tmp_path, capfd):
    gguf.convert(file, tmp_path)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "kind, file_type, said",
    [
        ("Q8_0", None, "dequantised from GGUF (100 % Q8_0)"),
        ("Q4_1", library.LlamaFileType.MOSTLY_Q4_1, "dequantised from GGUF Q4_1 (100 % Q4_1)"),
        ("F16", library.LlamaFileType.MOSTLY_F16, "GGUF F16 (100 % F16)"),
        ("F32", library.LlamaFileType.ALL_F32, "GGUF F32 (100 % F32)"),
    ],
)
def test_what_the_file_held_is_read_from_it(kind, file_type, said, tmp_path):
    assert gguf.stored(write(tmp_path / "tiny.gguf", library.GGMLQuantizationType[kind], file_type)) == said


def test_a_converted_model_says_what_it_was_and_so_does_what_is_saved_of_it(file, tmp_path):
    name = str(file)
    assert models.precision(models.configuration(name)) == gguf.stored(file)
    AutoModelForCausalLM.from_pretrained(models.locate(name), dtype=torch.bfloat16).save_pretrained(tmp_path / "saved")
    assert models.precision(models.configuration(str(tmp_path / "saved"))) == gguf.stored(file)


def test_what_cannot_be_read_is_named_and_leaves_nothing(file, tmp_path):
    file.write_bytes(file.read_bytes()[:3000])
    with pytest.raises(ReconError, match=r"tiny\.gguf' cannot be read as GGUF"):
        models.locate(str(file))
    assert not list((tmp_path / "cache" / "derived").iterdir())
