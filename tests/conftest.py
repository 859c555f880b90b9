"""Tiny random models of many families, and a folder with one that has a tokenizer and a text of its own."""

import os
import random
import signal

if "PYTEST_XDIST_WORKER" in os.environ:  # side by side, each on a core of its own; so are the processes that tests start
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCABULARY = 99
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_COMMON = _SPECIAL | {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_GPT2 = _SPECIAL | {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
_T5GEMMA = _COMMON | {"num_hidden_layers": 2, "head_dim": 8, "sliding_window": 6, "final_logit_softcapping": 3.0}
_OPT = {"ffn_dim": 64, "word_embed_proj_dim": 32, "num_key_value_heads": None, "intermediate_size": None}

# family -> name of its configuration class, what it is made with beside _COMMON (None drops an entry)
SEQUENTIAL = {
    "llama": ("LlamaConfig", {}),
    "mistral": ("MistralConfig", {"sliding_window": 6}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 8}),
    "gemma2": ("Gemma2Config", {"head_dim": 8, "sliding_window": 6, "final_logit_softcapping": 3.0}),
    "gemma3": (
        "Gemma3TextConfig",
        {
            "head_dim": 8,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "phi3": ("Phi3Config", {}),
    "olmo2": ("Olmo2Config", {}),
    "stablelm": ("StableLmConfig", {}),
    "granite": ("GraniteConfig", {"logits_scaling": 4.0, "residual_multiplier": 0.6, "embedding_multiplier": 3.0}),
    "smollm3": ("SmolLM3Config", {}),
    "glm4": ("Glm4Config", {"head_dim": 8}),
    "starcoder2": ("Starcoder2Config", {}),
    "opt": ("OPTConfig", _OPT),
    "gpt2": ("GPT2Config", _GPT2),
}
PARALLEL = {
    "gpt_neox": ("GPTNeoXConfig", {}),
    "falcon": ("FalconConfig", {"ffn_hidden_size": 64, "new_decoder_architecture": False}),
    "phi": ("PhiConfig", {}),
    "gptj": ("GPTJConfig", _GPT2 | {"rotary_dim": 4}),
    "cohere": ("CohereConfig", {"logit_scale": 0.25}),
}
UNDIVIDED = {
    "bloom": ("BloomConfig", _SPECIAL | {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 3, "n_head": 4}),
    "mpt": (
        "MptConfig",
        _SPECIAL | {"vocab_size": VOCABULARY, "d_model": 32, "n_layers": 3, "n_heads": 4, "max_seq_len": 64},
    ),
}
EXPERTS = {
    "mixtral": ("MixtralConfig", {"num_local_experts": 4}),
    "gpt_oss": ("GptOssConfig", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "sliding_window": 6}),
    "llama4": (
        "Llama4TextConfig",
        {"num_local_experts": 4, "head_dim": 8, "intermediate_size_mlp": 64, "attention_chunk_size": 32},
    ),
}
ENCODER_DECODERS = {
    "t5": (
        "T5Config",
        _SPECIAL | {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4},
    ),
    "bart": (
        "BartConfig",
        _SPECIAL
        | {"vocab_size": VOCABULARY, "d_model": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "encoder_layers": 2}
        | {"decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 64},
    ),
    "t5gemma": ("T5GemmaConfig", {"vocab_size": VOCABULARY} | {part: _T5GEMMA for part in ("encoder", "decoder")}),
}
REFUSED = {"bert": ("BertConfig", {})}
FAMILIES = SEQUENTIAL | PARALLEL
_OWN_NAMES = {"gpt2", "gptj", "bloom", "mpt", *ENCODER_DECODERS}  # families whose configurations call everything something else


def heed_interrupts() -> None:
    """For `preexec_fn`: a process started in the background, as under CI, would ignore SIGINT, and so would its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def make_model(family: str, seed: int = 0, std: float = 0.2, **changes) -> torch.nn.Module:
    """A random causal LM of `family` in float32: matrices ~ N(0, std^2), vectors their default plus noise like it."""
    kind, own = (FAMILIES | UNDIVIDED | EXPERTS | ENCODER_DECODERS | REFUSED)[family]
    settings = (own if family in _OWN_NAMES else _COMMON | own) | changes
    config = getattr(transformers, kind)(**{key: value for key, value in settings.items() if value is not None})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        auto = transformers.AutoModelForSeq2SeqLM if family in ENCODER_DECODERS else transformers.AutoModelForCausalLM
        model = auto.from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=std)
                else:
                    parameter.add_(torch.randn_like(parameter) * std)
    return model


@pytest.fixture(scope="session")
def tiny():
    """Factory of tiny random models: `tiny("llama")`, `tiny("gpt2", seed=1, n_layer=2)`; a new model with each call."""
    return make_model


def random_tokens(samples: int, length: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (samples, length), generator=generator)


@pytest.fixture(scope="session")
def tokens():
    """Factory of random tokens (samples, length) that every tiny model knows."""
    return random_tokens


def _paragraphs(count: int = 240) -> list[str]:
    draw = random.Random(0)
    syllables = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
    words = ["".join(draw.choices(syllables, k=draw.randint(1, 3))) for _ in range(150)]
    frequencies = [1 / (rank + 3) for rank in range(len(words))]

    def sentence():
        return " ".join(draw.choices(words, frequencies, k=draw.randint(5, 12))).capitalize() + "."

    return [" ".join(sentence() for _ in range(draw.randint(4, 8))) for _ in range(count)]


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> str:
    """A local model: a random Llama of four blocks with its tokenizer, and `tiny_text.txt` beside them."""
    folder = tmp_path_factory.mktemp("tiny")
    paragraphs = _paragraphs()
    (folder / "tiny_text.txt").write_text("\n\n".join(paragraphs), encoding="utf-8")
    (folder / "other.txt").write_text("\n\n".join(reversed(paragraphs)), encoding="utf-8")
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<pad>", "<bos>", "<eos>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        paragraphs,
        trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")
    tokenizer.save_pretrained(folder)
    model = make_model(
        "llama", vocab_size=len(tokenizer), num_hidden_layers=4, max_position_embeddings=256, tie_word_embeddings=True
    )
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_text(tiny_folder) -> str:
    """A text file of 240 paragraphs of made-up words, about 22,000 tokens for the tokenizer of `tiny_folder`."""
    return f"{tiny_folder}/tiny_text.txt"
