"""A GGUF file as a checkpoint in safetensors: transformers unpacks it to float32, once, and the result is kept in the cache."""

from pathlib import Path

import torch
from safetensors import SafetensorError

from recon.data.cache import cached
from recon.data.files import digest
from recon.errors import ReconError

CONVERSION = 1  # raise it when what `convert` writes changes: converted models are cached under this number


def converted(path: Path) -> Path:
    """The folder in the cache with the checkpoint that the GGUF file `path` holds; made when it is first asked for.

    Raises `ReconError` naming the file if transformers cannot read it.
    """

    def make(folder: Path) -> None:
        try:
            convert(path.absolute(), folder)
        except (SafetensorError, OSError):  # a full disk raises either
            raise
        except Exception as error:  # transformers and gguf each raise their own kinds
            raise ReconError(f"{str(path)!r} cannot be read as GGUF: {type(error).__name__}: {error}") from error

    return cached(f"{path.stem}-{digest(path)[:16]}-v{CONVERSION}", make)


def convert(path: Path, folder: Path) -> None:
    """Writes the model in the GGUF file `path` (float32 safetensors) and its tokenizer to `folder`.

    The whole model is in memory meanwhile, in float32.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig  # takes seconds

    source = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    unpacked = GgufConfig(dequantize=True)
    AutoModelForCausalLM.from_pretrained(**source, quantization_config=unpacked, dtype=torch.float32).save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
