"""A GGUF file as a checkpoint in safetensors, unpacked to float32 once, block by block, and kept in the cache."""

import os
import re
from pathlib import Path

import numpy as np
import torch
from gguf import GGUFReader, dequantize
from safetensors import SafetensorError
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoTokenizer, GenerationConfig
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
    load_gguf_checkpoint,
)

from recon.data.assets import convert_gguf, writing
from recon.data.files import INDEX, digest
from recon.errors import ReconError
from recon.model.skeleton import skeleton
from recon.runtime.storage import cache_folder, sync, write_json, write_safetensors
from recon.runtime.weights import as_stored

SUFFIX = ".gguf"
CONVERSION = 1  # raise it when what is written changes: converted models are cached under this number


def converted(path: Path) -> Path:
    """The folder in the cache with the checkpoint that the GGUF file `path` holds; made when it is first asked for.

    Raises `ReconError` where transformers does not read such files, naming the file.
    """
    folder = cache_folder() / "derived" / f"{path.stem}-{digest(path)[:16]}-v{CONVERSION}"
    if folder.exists():
        return folder
    with writing() as temporary:
        if folder.exists():  # another process may have made it meanwhile
            return folder
        fresh = temporary / "checkpoint"
        fresh.mkdir()
        try:
            _convert(path.absolute(), fresh)
        except (SafetensorError, OSError):  # a full disk is either, by what was being written
            raise
        except Exception as error:  # transformers and gguf each raise their own kinds
            raise ReconError(f"{str(path)!r} cannot be read as GGUF: {type(error).__name__}: {error}") from error
        for file in fresh.iterdir():
            sync(file)
        folder.parent.mkdir(exist_ok=True)
        os.replace(fresh, folder)
    return folder


def _convert(path: Path, folder: Path) -> None:
    """Writes the checkpoint in the GGUF file `path` to `folder`, block by block where transformers reads it tensor by tensor."""
    reader = GGUFReader(path)
    architecture = reader.get_field("general.architecture").contents()
    if _read_as_a_whole(architecture):
        convert_gguf(path, folder)
        return
    source = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    config = AutoConfig.from_pretrained(**source)
    model = skeleton(config)
    # What follows is the loop that transformers unpacks a whole file in, cut into blocks.
    found = load_gguf_checkpoint(path)
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=found["config"])
    names = get_gguf_hf_weights_map(model, processor)
    blocks: dict[str, list] = {}
    for tensor in reader.tensors:
        block = re.match(r"blk\.\d+\.", tensor.name)
        blocks.setdefault(block[0] if block else tensor.name, []).append(tensor)
    places = {}
    for number, tensors in enumerate(tqdm(blocks.values(), desc=f"unpack {path.name}", unit="block"), 1):
        found["tensors"] = {}  # where a processor puts what several tensors make up
        for tensor in tensors:
            made = processor.process(
                weights=dequantize(tensor.data, tensor.tensor_type), name=tensor.name, tensor_key_mapping=names, parsed_parameters=found
            )  # fmt: skip
            if made.name in names:
                found["tensors"][names[made.name]] = torch.from_numpy(np.copy(made.weights)).float()
        stored = as_stored(model, found["tensors"])
        if stored:
            file = f"model-{number:05}-of-{len(blocks):05}.safetensors"
            write_safetensors(folder / file, stored)
            places |= dict.fromkeys(stored, file)
    size = sum((folder / file).stat().st_size for file in set(places.values()))
    write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": places})
    config.dtype, config.architectures = "float32", [type(model).__name__]
    config.save_pretrained(folder)
    GenerationConfig.from_model_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)


def _read_as_a_whole(architecture: str) -> bool:
    """Whether transformers reads files of this architecture in its newer way, which has no loop over tensors."""
    try:
        from transformers.integrations.gguf import is_gguf_arch_supported
    except ImportError:
        return False
    return is_gguf_arch_supported(architecture)
