"""A GGUF file as a checkpoint in safetensors: transformers unpacks it to float32, once, into the cache."""

import contextlib
import io
from collections import Counter
from pathlib import Path

import torch

from recon.data.files import digest
from recon.runtime.storage import derived_folder, once

CONVERSION = 2  # raise it when what `convert` writes changes: converted models are cached under this number
NOTE = "weights_from"  # where the configuration of a converted model says what the file held
FLOATS = {"F64", "F32", "F16", "BF16"}  # types of GGUF tensors that are not quantised


def converted(path: Path) -> Path:
    """The folder in the cache with the checkpoint that the GGUF file `path` holds, made once."""
    return once(derived_folder(f"{path.stem}-{digest(path)[:16]}-v{CONVERSION}"), lambda fresh: convert(path.absolute(), fresh))


def convert(path: Path, folder: Path) -> None:
    """Writes the model in the GGUF file `path` (float32 safetensors) and its tokenizer to `folder`; all of it is in memory meanwhile.

    Its configuration says how the file kept the weights, see `stored`; whatever is saved of the model later says so too.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig  # takes seconds

    source = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    unpacked = GgufConfig(dequantize=True)
    with contextlib.redirect_stderr(io.StringIO()):  # of transformers' bars, one has no switch
        model = AutoModelForCausalLM.from_pretrained(**source, quantization_config=unpacked, dtype=torch.float32)
        setattr(model.config, NOTE, stored(path))
        model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)


def stored(path: Path) -> str:
    """How the GGUF file `path` keeps its weights: the name that it gives itself, if any, and the share of elements in each type.

    For example "dequantised from GGUF Q4_1 (79 % Q4_1, 21 % Q8_0)", or "GGUF F16 (100 % F16)" where nothing is quantised.
    """
    from gguf import GGUFReader, LlamaFileType

    reader, elements = GGUFReader(path), Counter()
    for tensor in reader.tensors:
        elements[tensor.tensor_type.name] += int(tensor.n_elements)
    shares = [f"{share:.0f} % {kind}" for kind, n in elements.most_common() if (share := 100 * n / elements.total()) > 0.5]
    named = reader.get_field("general.file_type")
    name = "" if named is None else f" {LlamaFileType(named.contents()).name.split('_', 1)[1]}"  # without MOSTLY_ or ALL_
    return f"{'' if set(elements) <= FLOATS else 'dequantised from '}GGUF{name} ({', '.join(shares)})"
