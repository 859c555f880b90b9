"""The files of a checkpoint: a folder in the Hugging Face format, a repository of the Hub, or a GGUF file."""

import contextlib
import functools
import io
from collections import Counter
from pathlib import Path

import torch

from recon.runtime.storage import derived_folder, digest

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
RECORD = "record.json"  # the record of the run that made a model
# Patterns of configuration, tokenizer and weights. Repositories may hold the same weights in other formats too.
FILES = ("*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken", "*.spm", "model*.safetensors")
CONVERSION = 2  # raise it when `convert` writes something else: converted models are cached under this number
NOTE = "weights_from"  # entry in the configuration of a converted model: how the file kept the weights; see `stored`
FLOATS = {"F64", "F32", "F16", "BF16"}  # types of GGUF tensors that are not quantised


@functools.cache
def commit(name: str, revision: str | None = None) -> str:
    """The commit of `revision` of the model repository `name`: the one in the Hub's cache, or else the newest. So it is known
    offline, and a resumed run keeps its files. Raises whatever huggingface_hub raises if the Hub cannot be reached.
    """
    from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache

    # Folders in the cache are named after the commit.
    found = try_to_load_from_cache(name, "config.json", revision=revision)
    if not isinstance(found, str):
        HfApi().model_info(name, revision=revision)  # fails at once if the Hub cannot be reached
        found = hf_hub_download(name, "config.json", revision=revision)
    return Path(found).parent.name


def hub_snapshot(name: str, revision: str | None = None, code: bool = False) -> Path:
    """The folder in the Hub's cache with the files of the model repository `name` at its `commit`; with its `code` if asked.

    For old repositories without safetensors, it fetches the Hub's conversion to safetensors, as transformers does.
    """
    from huggingface_hub import HfApi, snapshot_download
    from transformers.safetensors_conversion import get_conversion_pr_reference

    patterns = [*FILES, "*.py"] if code else list(FILES)
    folder = Path(snapshot_download(name, revision=commit(name, revision), allow_patterns=patterns))
    if revision in (None, "main") and not any(folder.glob("model*.safetensors*")):
        try:
            converted = get_conversion_pr_reference(HfApi(), name)
        except Exception:  # without a connection: use the one that was fetched before
            known = sorted((folder.parents[1] / "refs" / "refs" / "pr").glob("*"))
            if not known:
                raise
            converted = f"refs/pr/{known[-1].name}"
        folder = Path(snapshot_download(name, revision=converted, allow_patterns=patterns))
    return folder


def conversion(path: Path) -> Path:
    """The folder in the cache, which may not exist yet, for the checkpoint converted from the GGUF file `path`."""
    return derived_folder(path.stem, digest(path), CONVERSION)


def convert(path: Path, folder: Path) -> None:
    """Writes the model in the GGUF file `path`, as float32 safetensors, and its tokenizer to `folder`. It is all held in memory.

    The configuration notes how the file kept the weights (see `stored`); checkpoints made from the model later keep that note.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig  # slow to import

    source = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    unpacked = GgufConfig(dequantize=True)
    with contextlib.redirect_stderr(io.StringIO()):  # one of transformers' progress bars cannot be switched off
        model = AutoModelForCausalLM.from_pretrained(**source, quantization_config=unpacked, dtype=torch.float32)
        setattr(model.config, NOTE, stored(path))
        model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)


def stored(path: Path) -> str:
    """How the GGUF file `path` keeps its weights, such as "dequantised from GGUF Q4_1 (79 % Q4_1, 21 % Q8_0)"."""
    from gguf import GGUFReader, LlamaFileType

    reader, elements = GGUFReader(path), Counter()
    for tensor in reader.tensors:
        elements[tensor.tensor_type.name] += int(tensor.n_elements)
    shares = [f"{share:.0f} % {kind}" for kind, n in elements.most_common() if (share := 100 * n / elements.total()) > 0.5]
    name, named = "", reader.get_field("general.file_type")
    with contextlib.suppress(AttributeError, ValueError, IndexError):  # it names no type, or one that the library does not know
        name = f" {LlamaFileType(named.contents()).name.split('_', 1)[1]}"  # without MOSTLY_ or ALL_
    return f"{'' if set(elements) <= FLOATS else 'dequantised from '}GGUF{name} ({', '.join(shares)})"
