"""A GGUF file is unpacked to what transformers reads from it, and once."""

import gguf as library
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GgufConfig

from recon.data import gguf, models
from recon.errors import ReconError

WIDTH, INNER, HEADS, KEYS, VOCABULARY, BLOCKS = 64, 96, 4, 2, 50, 2


@pytest.fixture
def file(tmp_path):
    """A random Llama of two blocks with 8-bit matrices; its head is its own."""
    path, draw = tmp_path / "tiny.gguf", np.random.default_rng(0)
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

    def add(name, *shape):
        values = draw.standard_normal(shape, dtype=np.float32)
        if len(shape) == 1:
            writer.add_tensor(name, values)
        else:
            kind = library.GGMLQuantizationType.Q8_0
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


def test_what_cannot_be_read_is_named_and_leaves_nothing(file, tmp_path):
    file.write_bytes(file.read_bytes()[:3000])
    with pytest.raises(ReconError, match=r"tiny\.gguf' cannot be read as GGUF"):
        models.locate(str(file))
    assert not list((tmp_path / "cache" / "derived").iterdir())
