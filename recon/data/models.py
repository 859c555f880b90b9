"""Loading a causal LM and its tokenizer: a bundled name, a local folder, a GGUF file, or a Hub id."""

import contextlib
import hashlib
import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from recon.data import assets, files
from recon.errors import ReconError
from recon.runtime import packed
from recon.runtime.storage import PART, cache_folder, once
from recon.runtime.weights import Weights, check_finite, open_model, quantisation, read_model

# The files in a folder that make up a model and its tokenizer, by suffix and by name.
SUFFIXES = {".safetensors", ".json", ".model", ".tiktoken", ".spm"}
VOCABULARY_FILES = {"merges.txt", "vocab.txt"}
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def locate(name: str) -> str:
    """What `from_pretrained` takes for the model `name`: a folder (a GGUF file is converted to one), or the Hub id itself."""
    if name in assets.BUNDLED_MODELS:
        return str(assets.bundled_model(name))
    if name.endswith(".gguf") and Path(name).is_file():
        with _loading(name, None):
            return str(once(files.conversion(Path(name)), lambda fresh: files.convert(Path(name).absolute(), fresh)))
    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            raise ReconError(f"model folder {name!r} has no config.json; give a folder in the Hugging Face format")
        return name
    if not HUB_ID.fullmatch(name):
        bundled = ", ".join(assets.BUNDLED_MODELS)
        raise ReconError(f"unknown model {name!r}; bundled: {bundled}; or give a folder, a GGUF file, or a Hub id (owner/name)")
    return name


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Context without transformers' own progress bars, which would appear between ours."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


@contextlib.contextmanager
def _loading(name: str, revision: str | None, what: str = "model") -> Iterator[None]:
    """Context that turns any error into a `ReconError` naming the model; also `quiet`."""
    try:
        with quiet():
            yield
    except Exception as error:  # transformers, tokenizers, safetensors, huggingface_hub and its HTTP client raise their own kinds
        at = f" at revision {revision!r}" if revision else ""
        kind = "" if isinstance(error, ReconError) else f"{type(error).__name__}: "
        known = Path(name).exists() or name in assets.BUNDLED_MODELS
        hint = "" if known else f"; give another revision, a local folder, or a bundled model: {', '.join(assets.BUNDLED_MODELS)}"
        raise ReconError(f"{what} {name!r}{at} cannot be loaded: {kind}{error}{hint}") from error


@contextlib.contextmanager
def _opened(
    name: str, revision: str | None, trust_remote_code: bool, what: str = "model"
) -> Iterator[tuple[Path, PretrainedConfig]]:
    """As `_loading`; gives the model's folder, fetched if it is on the Hub, and its configuration."""
    place = locate(name)
    with _loading(name, revision, what):
        path = Path(place) if Path(place).is_dir() else files.hub_snapshot(place, revision, trust_remote_code)
        yield path, AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)


def _tokenizer(path: Path, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The tokenizer in the folder `path`. Raises `ReconError` if there is none, and for others what transformers raises."""
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # where there is no file of a tokenizer, transformers asks for packages that do not help
        if any("token" in file.name or "vocab" in file.name or file.suffix == ".model" for file in path.iterdir()):
            raise
        raise ReconError("it has no tokenizer; save the one that it was trained with in its folder") from error


def load(
    name: str | Path, revision: str | None = None, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The causal LM, or encoder-decoder, `name` in float32 and in evaluation mode, and its tokenizer.

    Weights are read from safetensors only, as reading a pickle can run any code; code that comes with a model runs only if
    `trust_remote_code`. Raises `ReconError` as `locate` and `read_model`, if it cannot be fetched, or if a weight is not finite.
    """
    with _opened(name := str(name), revision, trust_remote_code) as (path, config):
        tokenizer = _tokenizer(path, trust_remote_code)
        home = None
        if packed.is_packed(path):  # what it is unpacked to is large, and the system's temporary folder may be in memory
            (home := cache_folder()).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=home, prefix=".offloaded.", suffix=PART) as scratch:
            model, _ = read_model(packed.unpacked(path, Path(scratch)), config, trust_remote_code)
    for parameter, values in model.named_parameters():
        check_finite(parameter, values, f"model {name!r}")
        if not values.untyped_storage().resizable():
            # Mapped from the file: the values would change with it. Unaligned memory also changes the last bits of results.
            values.data = values.data.clone()
    return model.eval(), tokenizer


def skeleton(
    name: str, revision: str | None = None, trust_remote_code: bool = False, scratch: Path | None = None
) -> tuple[PreTrainedModel, Weights, PreTrainedTokenizerBase]:
    """As `load`, but parameters stay on disk: the model without them, its `Weights`, and the tokenizer; see `open_model`."""
    with _opened(name, revision, trust_remote_code) as (path, config):
        tokenizer = _tokenizer(path, trust_remote_code)
        return *open_model(path, config, trust_remote_code, scratch), tokenizer


def load_pruned(
    name: str, dense: PreTrainedModel, revision: str | None = None, trust_remote_code: bool = False, scratch: Path | None = None
) -> Weights:
    """The weights of the model `name`, which was pruned from `dense`, to read one by one. Raises `ReconError` as `load`."""
    with _opened(name, revision, trust_remote_code, "pruned model") as (path, config):
        if config.model_type != dense.config.model_type:
            raise ReconError(f"it is of type {config.model_type!r}, and the dense model of type {dense.config.model_type!r}")
        return open_model(path, config, trust_remote_code, scratch)[1]


def configuration(name: str, revision: str | None = None, trust_remote_code: bool = False) -> PretrainedConfig:
    """The configuration of the model `name`. It reads no other file; from a GGUF file, only the header."""
    path = Path(name)
    if name.endswith(".gguf") and path.is_file() and not files.conversion(path).is_dir():  # the header is enough
        with _loading(name, revision):
            return AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    place = locate(name)
    with _loading(name, revision):
        if not Path(place).is_dir():
            revision = files.commit(place, revision)  # asks the Hub once; reading a file would ask several times
        return AutoConfig.from_pretrained(place, revision=revision, trust_remote_code=trust_remote_code)


def precision(config: PretrainedConfig) -> str:
    """What the weights of a model are before `load` converts them to float32: their dtype, or what they are dequantised from."""
    if note := getattr(config, files.NOTE, None):
        return note
    if found := quantisation(config):
        return f"dequantised from {found['quant_method']}"
    dtype = config.dtype or config.get_text_config().dtype
    return str(dtype).removeprefix("torch.") if dtype else "of a dtype that the configuration does not name"


def fingerprint(name: str, revision: str | None = None, trust_remote_code: bool = False) -> str:
    """Hash of what `load` loads, without loading it: of a bundled model's assets; a GGUF file; a folder's weights, configuration,
    tokenizer and trusted code. For a Hub id, the commit. Raises `ReconError` if the model is unknown or the Hub unreachable.
    """
    if name in assets.BUNDLED_MODELS:
        return assets.origin(name)
    if name.endswith(".gguf") and Path(name).is_file():
        return files.digest(Path(name))
    place = Path(locate(name))
    with _loading(name, revision):
        if not place.is_dir():
            return files.commit(str(place), revision)
        suffixes = SUFFIXES | {".py"} if trust_remote_code else SUFFIXES
        read = {path for path in place.iterdir() if path.suffix in suffixes or path.name in VOCABULARY_FILES}
        if (place / files.INDEX).is_file() and not (place / files.WEIGHTS).is_file():  # shards may be in subfolders
            index = json.loads((place / files.INDEX).read_text(encoding="utf-8"))
            read |= {place / file for file in index["weight_map"].values()}
        # Names are relative, so the same files give the same hash in any folder. The record of the run is left out.
        digests = {path.relative_to(place).as_posix(): files.digest(path) for path in read if path.name != files.RECORD}
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()
