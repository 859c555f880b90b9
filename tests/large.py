"""Writes a random Llama of any size as a checkpoint, block by block: `python tests/large.py FOLDER [--layers 32]`."""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, LlamaConfig

from recon import assets
from recon.files import INDEX
from recon.weights import skeleton


def write_random_llama(folder: Path, **settings) -> int:
    """A checkpoint in bfloat16 of the shape of Llama-2-7B, but for `settings`, with SmolLM2's tokenizer; returns its parameters.

    One shard per block: no more than a block is ever in memory.
    """
    folder.mkdir(parents=True)
    tokenizer = AutoTokenizer.from_pretrained(assets.bundled_model("smollm2-135m"))
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(vocab_size=len(tokenizer), dtype="bfloat16", architectures=["LlamaForCausalLM"], **settings)
    config.save_pretrained(folder)
    shards: dict[str, list[tuple[str, torch.Size]]] = {}
    for name, parameter in skeleton(config).named_parameters():
        block = name.split(".")[2] if ".layers." in name else "ends"
        shards.setdefault(block, []).append((name, parameter.shape))
    places, generator, numbers = {}, torch.Generator().manual_seed(0), 0
    # Numbers are drawn once and repeated from another place in every matrix: drawing them all would take longer than all else.
    pool = (0.02 * torch.randn(10_000_019, generator=generator)).bfloat16()
    for number, (_, parameters) in enumerate(shards.items(), 1):
        file, tensors = f"model-{number:05}-of-{len(shards):05}.safetensors", {}
        for name, shape in parameters:
            if len(shape) == 1:
                tensors[name] = torch.ones(shape, dtype=torch.bfloat16)
            else:
                start = int(torch.randint(len(pool), (), generator=generator))
                repeated = pool.roll(-start).repeat(-(-shape.numel() // len(pool)))
                tensors[name] = repeated[: shape.numel()].view(shape)
            places[name] = file
            numbers += shape.numel()
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / file, metadata={"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 2 * numbers}, "weight_map": places}), encoding="utf-8")
    return numbers


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    given = parser.parse_args()
    print(f"{write_random_llama(given.folder, num_hidden_layers=given.layers) / 1e9:.2f} billion parameters")
