"""Tiny random models of the families of causal LMs and encoder-decoders in transformers, each from its own configuration with small numbers put in."""

import re

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 99
# Numbers of a configuration that are made small: the first pattern that its name matches says how small.
RULES = [
    (r".*vocab_size.*", VOCABULARY),
    (r".*(num_local_experts|num_experts|n_routed_experts)", 4),
    (r".*(experts_per_tok|top_k|topk|moe_k|num_experts_per_token)", 2),
    (r"first_k_dense_replace|num_dense_layers|n_shared_experts|moe_num_shared_experts|n_group|topk_group", 1),
    (r"mamba_n_heads|mamba_num_heads|num_heads|n_heads?|.*attention_heads", 4),
    (r"num_key_value_heads|num_kv_heads|linear_num_.*_heads", 2),
    (r"mamba_d_head|mamba_head_dim", 16),
    (r".*head_dim|.*_rank|.*head_width", 8),
    (r"rotary_dim", 4),
    (r"hidden_size|n_embd|d_model|dim|embedding_size|word_embed_proj_dim|embed_dim", 32),
    (r".*intermediate_size|.*ffn_dim|d_ff|n_inner|.*ffn_hidden_size|d_inner|mamba_d_ssm|lru_width", 64),
    (r".*d_state|.*state_size|.*chunk_size", 16),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len", 128),
]
LAYERS = r"num_hidden_layers|n_layers?|num_layers|decoder_layers|encoder_layers"
_HEADS = {"num_key_value_heads": 2, "head_dim": 8}
_HYBRID = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
_INDEXER = {
    "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8, "indexer_compress_ratio": 4,
}  # fmt: skip
# What the rules miss, by family.
CHANGES = {
    "bailing_hybrid": _HYBRID
    | {"mlp_layer_types": ["dense", "sparse"], "linear_num_heads": 4, "num_experts_per_tok": 2, "num_expert_group": 1},
    "bamba": {"attn_layer_indices": [1]},
    "dbrx": {
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
    },
    "deepseek_v2": {"num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "dots1": {"num_experts_per_tok": 2, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "gemma3n_text": {
        "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "intermediate_size": 64,
        "num_kv_shared_layers": 2, "activation_sparsity_pattern": None, "hidden_size_per_layer_input": 8,
    },
    "granitemoehybrid": _HYBRID,
    "hunyuan_v1_dense": _HEADS,
    "hunyuan_v1_moe": _HEADS,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "head_dim": 8, "qk_head_dim": 16, "zero_expert_num": 1},
    "mamba2": {"head_dim": 16, "n_groups": 1},
    "ministral": _HEADS,
    "nemotron": _HEADS,
    "nemotron_h": {"n_groups": 1},
    "qwen4_exp_text": _INDEXER,
    "xlm": {"emb_dim": 32, "causal": True},
    "zamba2": {
        "num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2, "hybrid_layer_ids": [1, 3],
        "n_mamba_heads": 4, "mamba_headdim": 16, "attention_head_dim": 16, "attention_hidden_size": 64,
    },
}  # fmt: skip
# Members of a family that are built differently.
VARIANTS = {
    "falcon (new decoder)": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "gpt_neox (sequential)": ("gpt_neox", {"use_parallel_residual": False}),
    "opt (350m)": ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 16}),
    "stablelm (parallel)": ("stablelm", {"use_parallel_residual": True, "qk_layernorm": True}),
}
# Families that no small model of text alone was made of here.
UNTRIED = (
    "blt cohere_compass_text dory dots3_note dots3_note_text gemma3n gemma4_assistant gemma4_unified_assistant inkling2_loop_text "
    "inkling2_text inkling_text musicgen musicgen_melody phi4_multimodal qwen4_exp reformer xmod zamba"
).split()
APART = " (encoder-decoder)"
ENCODER_DECODERS = (
    "bart bigbird_pegasus blenderbot blenderbot-small fsmt led longt5 m2m_100 marian mbart mt5 mvp nllb-moe pegasus pegasus_x plbart "
    "prophetnet switch_transformers t5 t5gemma t5gemma2 umt5"
).split()
FAMILIES = sorted([kind for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if kind not in UNTRIED] + list(VARIANTS))
FAMILIES += [kind + APART for kind in ENCODER_DECODERS]


def small_model(family: str, seed: int = 0) -> torch.nn.Module:
    """A random model of `family` in float32, in evaluation mode."""
    kind, variant = VARIANTS.get(family, (family.removesuffix(APART), {}))
    auto = AutoModelForSeq2SeqLM if family.endswith(APART) else AutoModelForCausalLM
    default = CONFIG_MAPPING[kind]()
    config = type(default)(**(_shrunk(default.to_dict()) | CHANGES.get(kind, {}) | variant))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = auto.from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def _shrunk(values: dict) -> dict:
    """The numbers of a configuration that are to be others, by name."""
    layers = next((value for name, value in values.items() if re.fullmatch(LAYERS, name) and isinstance(value, int)), 0)
    # Two layers, or as many as show every kind of layer that there is.
    by_layer = {name: value for name, value in values.items() if isinstance(value, list) and layers and len(value) == layers}
    shown = {value.index(kind) for value in by_layer.values() for kind in value if isinstance(kind, str)}
    shown = sorted(shown | set(range(2)) if len(shown) < 2 else shown)[:layers]
    found = {name: [value[index] for index in shown] for name, value in by_layer.items()}
    for name, value in values.items():
        if isinstance(value, dict) and "model_type" in value:
            found[name] = _shrunk(value)
        if name == "is_decoder":
            found[name] = True
        if not isinstance(value, int) or isinstance(value, bool):
            continue
        if name.endswith("_token_id") and value >= VOCABULARY:
            found[name] = 1
        if re.fullmatch(LAYERS, name):
            found[name] = len(shown)
        small = next((small for pattern, small in RULES if re.fullmatch(pattern, name)), value)
        if small < value:
            found[name] = small
    for name in ("num_key_value_heads", "num_kv_heads"):  # as many as heads, where they are
        if values.get(name) is not None and values[name] == values.get("num_attention_heads"):
            found[name] = found.get("num_attention_heads", values[name])
    return found
