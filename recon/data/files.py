"""The files of a checkpoint: a folder in the Hugging Face format with its weights in safetensors, or a repository of the Hub."""

import functools
import hashlib
import json
from pathlib import Path

from recon.errors import ReconError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
RECORD = "record.json"  # the record of the run that made a model
# Patterns of configuration, tokenizer and weights. Repositories may hold the same weights in other formats too.
FILES = ("*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken", "*.spm", "model*.safetensors")


def shards(folder: Path | str) -> list[Path]:
    """The safetensors files that hold the weights of the checkpoint in `folder`: a single one, or those that its index names.

    Raises `ReconError` if there are none, or one is missing.
    """
    folder = Path(folder)
    if (folder / WEIGHTS).is_file():  # as in transformers, it has priority over an index
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        why = "weights are read from safetensors only, as reading a pickle can run any code"
        raise ReconError(f"{str(folder)!r} has neither {WEIGHTS} nor {INDEX}; {why}")
    names = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
    if lacking := [name for name in names if not (folder / name).is_file()]:
        raise ReconError(f"{str(folder)!r} lacks the weights' file {lacking[0]!r}; fetch or write it again")
    return [folder / name for name in names]


@functools.cache
def commit(name: str, revision: str | None = None) -> str:
    """The commit of `revision` of the model repository `name`: that in the Hub's cache, so that it is known offline, and a resumed run
    keeps its files; or else the newest one. Raises whatever huggingface_hub raises if the Hub cannot be asked.
    """
    from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache

    # Folders in the cache are named after the commit.
    found = try_to_load_from_cache(name, "config.json", revision=revision)
    if not isinstance(found, str):
        HfApi().model_info(name, revision=revision)  # fails at once if the Hub cannot be reached
        found = hf_hub_download(name, "config.json", revision=revision)
    return Path(found).parent.name


def hub_snapshot(name: str, revision: str | None = None, code: bool = False) -> Path:
    """The folder in the Hub's cache with the files of the model repository `name` at `commit`, with `code` or without; fetched if need be.

    For old repositories without safetensors, the Hub's conversion to safetensors is fetched, as transformers does.
    """
    from huggingface_hub import HfApi, snapshot_download
    from transformers.safetensors_conversion import get_conversion_pr_reference

    patterns = [*FILES, "*.py"] if code else list(FILES)
    folder = Path(snapshot_download(name, revision=commit(name, revision), allow_patterns=patterns))
    if revision in (None, "main") and not ((folder / WEIGHTS).is_file() or (folder / INDEX).is_file()):
        folder = Path(snapshot_download(name, revision=get_conversion_pr_reference(HfApi(), name), allow_patterns=patterns))
    return folder


def digest(path: Path) -> str:
    """The SHA-256 of a file, computed anew if the file has changed."""
    state = path.stat()
    return _digest(path.resolve(), state.st_size, state.st_mtime_ns)


@functools.cache
def _digest(path: Path, size: int, changed: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
