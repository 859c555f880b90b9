"""Loading a causal LM and its tokenizer: a bundled name, a local folder, a GGUF file, or a Hub id."""

import contextlib
import hashlib
import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
from transformers.utils import logging as transformers_logging

from recon.data import assets, files, gguf
from recon.errors import ReconError
from recon.model.skeleton import auto_class
from recon.runtime.weights import (
    Checkpoint,
    check_finite,
    check_unquantised,
    open_model,
    quantisation,
    warn_of_surplus,
)

# The files in a folder that make up a model and its tokenizer: by suffix, and by name.
SUFFIXES = {".safetensors", ".json", ".model", ".tiktoken", ".spm"}
VOCABULARY_FILES = {"merges.txt", "vocab.txt"}
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def locate(name: str) -> str:
    """Where `from_pretrained` finds the model called `name`: a folder, or the Hub id itself.

    A GGUF file is unpacked into the cache once. Raises `ReconError` for a name that is neither bundled, nor a folder with a
    config.json, nor a GGUF file, nor looks like a Hub id.
    """
    if name in assets.BUNDLED_MODELS:
        return str(assets.bundled_model(name))
    if is_gguf(name):
        return str(gguf.converted(Path(name)))
    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            raise ReconError(f"model folder {name!r} has no config.json; give a folder in the Hugging Face format")
        return name
    if not HUB_ID.fullmatch(name) or name.startswith("."):
        bundled = ", ".join(assets.BUNDLED_MODELS)
        raise ReconError(
            f"unknown model {name!r}; bundled: {bundled}; or an existing local folder or GGUF file, or a Hub id (organisation/name)"
        )
    return name


def is_gguf(name: str) -> bool:
    """Whether `name` is that of an existing GGUF file."""
    return name.endswith(".gguf") and Path(name).is_file()


def folder(name: str, revision: str | None = None, trust_remote_code: bool = False) -> Path:
    """The folder with the checkpoint of the model called `name`, its files checked; fetched if it is on the Hub.

    Raises `ReconError` for what `locate` and `recon.data.files.shards` refuse, a model that the Hub does not have, and one that
    comes with its own code, unless `trust_remote_code`.
    """
    found = Path(locate(name))
    with _loading(name, revision):
        if not found.is_dir():
            found = files.hub_snapshot(str(found), revision, trust_remote_code)
        _check_code(found, trust_remote_code)
        files.shards(found)
    return found


def _check_code(folder: Path, trust_remote_code: bool) -> None:
    """Raises `ReconError` if the model in `folder` needs code that comes with it, unless that is trusted."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        own, kind = config.get("auto_map") or {}, config.get("model_type")
    except (OSError, ValueError, AttributeError):  # transformers says what is wrong with it
        return
    if own and kind not in CONFIG_MAPPING and not trust_remote_code:
        code = ", ".join(sorted(map(str, own.values()))) if isinstance(own, dict) else own
        raise ReconError(
            f"transformers does not know models of type {kind!r}, and the code that comes with it ({code}) is not run unless you allow "
            "it, after reading it: trust_remote_code=True, or --trust-remote-code"
        )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Context without transformers' own progress bars, which would stand between ours."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


@contextlib.contextmanager
def _loading(name: str, revision: str | None, what: str = "model") -> Iterator[None]:
    """Context, `quiet` too, that raises a `ReconError` naming the model for any error."""
    try:
        with quiet():
            yield
    except Exception as error:  # transformers, tokenizers, safetensors, huggingface_hub and its HTTP client raise their own kinds
        at = f" at revision {revision!r}" if revision else ""
        kind = "" if isinstance(error, ReconError) else f"{type(error).__name__}: "
        known = Path(name).exists() or name in assets.BUNDLED_MODELS
        hint = "" if known else f"; give another revision, a local folder, or a bundled model: {', '.join(assets.BUNDLED_MODELS)}"
        raise ReconError(f"{what} {name!r}{at} cannot be loaded: {kind}{error}{hint}") from error


def load(
    name: str, revision: str | None = None, device: torch.device | str = "cpu", trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The causal LM, or encoder-decoder, `name` in float32 and its tokenizer, in evaluation mode, on `device`.

    Weights are read from safetensors only, whose files are checked first (see `recon.data.files.shards`). Code that comes with a
    model runs only if `trust_remote_code`. Weights that the model has no place for are left out, with a warning. Quantised weights
    are read if transformers undoes their quantisation.

    Raises `ReconError` for an unknown model; naming weights that are missing or of the wrong shape, and the first that holds NaN or
    infinity; and, before any are read, for a quantisation that transformers does not undo.
    """
    where = folder(name, revision, trust_remote_code)
    with _loading(name, revision):
        tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=trust_remote_code)
        config = AutoConfig.from_pretrained(where, trust_remote_code=trust_remote_code)
        undone = _undo_quantisation(config)
        model, found = auto_class(config).from_pretrained(
            where, dtype=torch.float32, use_safetensors=True, output_loading_info=True, trust_remote_code=trust_remote_code,
            config=config, ignore_mismatched_sizes=True,  # refused below, by name
        )  # fmt: skip
        if not undone:
            Checkpoint(model, files.shards(where))  # refuses values that need scales from elsewhere
        if found["mismatched_keys"]:
            wrong = ", ".join(
                f"{key} is {tuple(has)}, not {tuple(wants)}" for key, has, wants in sorted(found["mismatched_keys"])
            )
            raise ReconError(f"it has weights of other shapes than its config.json calls for: {wrong}")
        if found["missing_keys"]:
            raise ReconError(f"it lacks weights that its config.json calls for: {', '.join(sorted(found['missing_keys']))}")
    warn_of_surplus(model, found["unexpected_keys"])
    for parameter, values in model.named_parameters():
        check_finite(parameter, values, f"model {name!r}")
        if not values.untyped_storage().resizable():
            # Mapped from the file, and would change with it. Kernels also give other last bits for memory that is not aligned.
            values.data = values.data.clone()
    return model.eval().to(device), tokenizer


def _undo_quantisation(config: PretrainedConfig) -> bool:
    """Makes transformers undo the quantisation that `config` tells of while it reads weights; returns whether there is one.

    Raises `ReconError` for a quantisation that transformers does not undo.
    """
    found = quantisation(config)
    if found is None:
        return False
    kind = AUTO_QUANTIZATION_CONFIG_MAPPING.get(found["quant_method"])
    if kind is None or "dequantize" not in inspect.signature(kind).parameters:
        check_unquantised(config)
    for part in (config, config.get_text_config()):
        vars(part).pop("quantization_config", None)
    # On a GPU, transformers does so only if it is asked to.
    config.quantization_config = found | {"dequantize": True}
    return True


def load_pruned(name: str, dense: PreTrainedModel, revision: str | None = None, trust_remote_code: bool = False) -> Checkpoint:
    """The weights of the pruned model `name`, to be read parameter by parameter; `dense` is the model that it was pruned from.

    Raises `ReconError` as `load`, for a model of another type than `dense`, and for quantised weights. See
    `recon.methods.external_mask`.
    """
    where = folder(name, revision, trust_remote_code)
    with _loading(name, revision, "pruned model"):
        config = AutoConfig.from_pretrained(where, trust_remote_code=trust_remote_code)
        if config.model_type != dense.config.model_type:
            raise ReconError(f"it is of type {config.model_type!r}, and the dense model of type {dense.config.model_type!r}")
        check_unquantised(config)
        return Checkpoint(dense, files.shards(where))


def configuration(name: str, revision: str | None = None, trust_remote_code: bool = False) -> PretrainedConfig:
    """The configuration of the model called `name`; no other file of a folder or of the Hub is read.

    Raises `ReconError` for what `locate` refuses, and if it cannot be read.
    """
    where = locate(name)
    with _loading(name, revision):
        if not Path(where).is_dir():
            # Asks the Hub once; reading a file would ask several times before it gives up.
            revision = files.commit(where, revision)
        return AutoConfig.from_pretrained(where, revision=revision, trust_remote_code=trust_remote_code)


def precision(config: PretrainedConfig) -> str:
    """What a model's weights are, before `load` makes float32 of them: what they are dequantised from, or their dtype.

    config: as `configuration` gives it.
    """
    if note := getattr(config, gguf.NOTE, None):
        return note
    if found := quantisation(config):
        return f"dequantised from {found['quant_method']}"
    dtype = config.dtype or config.get_text_config().dtype
    return str(dtype).removeprefix("torch.") if dtype else "of a dtype that the configuration does not name"


def skeleton(
    name: str, revision: str | None = None, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, Checkpoint, PreTrainedTokenizerBase]:
    """As `load`, but the model's parameters stay on disk: a skeleton, its weights, and the tokenizer. See `recon.runtime.weights`."""
    where = folder(name, revision, trust_remote_code)
    with _loading(name, revision):
        tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=trust_remote_code)
        config = AutoConfig.from_pretrained(where, trust_remote_code=trust_remote_code)
        model, checkpoint = open_model(config, files.shards(where), trust_remote_code)
        if (where / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(where)
    return model, checkpoint, tokenizer


def fingerprint(name: str, revision: str | None = None, trust_remote_code: bool = False) -> str:
    """Hash of what `load(name, revision)` loads, without loading it.

    For a bundled model, that of its source, which is the same on every machine; for a folder, of its weights, configuration and
    tokenizer (and of its code, if that is trusted); for a Hub id, the commit. Raises `ReconError` for an unknown model, and for one
    that the Hub does not have, or if the Hub cannot be reached.
    """
    if name in assets.BUNDLED_MODELS:
        return assets.origin(name)
    if is_gguf(name):
        return files.digest(Path(name))
    where = Path(locate(name))
    if not where.is_dir():
        with _loading(name, revision):
            return files.commit(str(where), revision)
    suffixes = SUFFIXES | {".py"} if trust_remote_code else SUFFIXES
    read = {path.name for path in where.iterdir() if path.suffix in suffixes or path.name in VOCABULARY_FILES}
    read.discard(files.RECORD)  # of the run that made the model
    with contextlib.suppress(ReconError):  # of a damaged index, which loading the model will name
        read |= set(files.placed(where))  # shards may lie in folders below
    # Ordered by name, so that the same files give the same hash wherever they lie.
    digests = {name: files.digest(where / name) for name in read if (where / name).is_file()}
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()
