"""Fixtures that all tests share: tiny models, tokens, and a folder with a model, its tokenizer and its text."""

import functools
import gc
import json
import os

if "PYTEST_XDIST_WORKER" in os.environ:  # parallel workers use one core each, and so do processes that they start
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest
from fixtures.models import make_model, paragraphs, random_tokens
from fixtures.runs import options
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from recon import RunSpec, decompose


def pytest_collection_finish():
    """Later garbage collections skip what has been imported; otherwise each takes 0.2 s or more."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny():
    """Factory of tiny random models: `tiny("llama")`, `tiny("gpt2", seed=1, n_layer=2)`; a new model with each call."""
    return make_model


@pytest.fixture(scope="session")
def tokens():
    """Factory of random tokens (samples, length) in the vocabulary of every tiny model."""
    return random_tokens


@pytest.fixture(scope="session")
def made():
    """Function from a family to its decoder, made once; no test may change its model."""
    return functools.cache(lambda family, **changes: decompose(make_model(family, **changes)))


@pytest.fixture(scope="session")
def dense(made):
    """The decoder of a Llama with two blocks, which no test may change."""
    return made("llama", num_hidden_layers=2)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> str:
    """A local model: a random Llama of four blocks with its tokenizer, and `tiny_text.txt` beside them."""
    folder = tmp_path_factory.mktemp("tiny")
    text = paragraphs()
    (folder / "tiny_text.txt").write_text("\n\n".join(text), encoding="utf-8")
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    known = {"special_tokens": ["<pad>", "<bos>", "<eos>"], "initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
    core.train_from_iterator(text, trainers.BpeTrainer(vocab_size=400, show_progress=False, **known))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")
    tokenizer.save_pretrained(folder)
    sizes = {"vocab_size": len(tokenizer), "num_hidden_layers": 4, "max_position_embeddings": 256}
    make_model("llama", **sizes, tie_word_embeddings=True).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_text(tiny_folder) -> str:
    """A text file of 240 paragraphs of made-up words, about 22,000 tokens for the tokenizer of `tiny_folder`."""
    return f"{tiny_folder}/tiny_text.txt"


@pytest.fixture(scope="session")
def tiny_spec(tiny_folder, tiny_text) -> RunSpec:
    """The spec of a very short run."""
    return RunSpec.of(
        model=tiny_folder, text=tiny_text, samples=4, epochs=1, sequence_length=32, held_out_samples=2,
        evaluation_texts=(tiny_text,), evaluation_samples=2, evaluation_length=64,
    )  # fmt: skip


@pytest.fixture
def config_folder(tmp_path):
    """Function that writes a configuration, and nothing else, to the test's folder and returns the folder."""

    def make(config: dict) -> str:
        (tmp_path / "config.json").write_text(json.dumps(config))
        return str(tmp_path)

    return make


@pytest.fixture
def small(tiny_spec):
    """The options of `recon run` for a very short run."""
    return options(tiny_spec.replaced(samples=8, learning_rate=3e-3))[1:]
