"""Loading a causal LM and its tokenizer: a bundled name, a local folder, or a Hub id."""

import contextlib
import hashlib
import inspect
import json
import re
from pathlib import Path

import torch
from safetensors import safe_open
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

from recon.data import assets, files
from recon.errors import ReconError
from recon.model.skeleton import auto_class
from recon.runtime.weights import (
    Checkpoint,
    check_finite,
    check_stored,
    check_unquantised,
    open_model,
    quantisation,
    warn_of_surplus,
)

SUFFIXES = {
    ".safetensors",
    ".json",
    ".model",
    ".tiktoken",
    ".spm",
}  # of the files in a folder that a model and its tokenizer are made of
VOCABULARY_FILES = {"merges.txt", "vocab.txt"}
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def locate(name: str) -> str:
    """Where `from_pretrained` finds the model called `name`: a folder, or the Hub id itself.

    A GGUF file is unpacked into the cache once. Raises `ReconError` for a name that is neither bundled, nor a folder with a
    config.json, nor a GGUF file, nor shaped like a Hub id.
    """
    if name in assets.BUNDLED_MODELS:
        return str(assets.bundled_model(name))
    if is_gguf(name):
        from recon.data import gguf  # takes a second to import

        return str(gguf.converted(Path(name)))
    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            raise ReconError(f"model folder {name!r} has no config.json; give a folder in the Hugging Face format")
        return name
    if not HUB_ID.fullmatch(name) or name.startswith("."):
        bundled = ", ".join(assets.BUNDLED_MODELS)
        raise ReconError(
            f"unknown model {name!r}; bundled: {bundled}; or an existing local folder, or a Hub id (organisation/name)"
        )
    return name


def is_gguf(name: str) -> bool:
    """Whether `name` is that of an existing GGUF file."""
    return name.endswith(".gguf") and Path(name).is_file()


def folder(name: str, revision: str | None = None, trust_remote_code: bool = False) -> Path:
    """The folder with the checkpoint of the model called `name`, fetched from the Hub where need be, its files checked.

    Raises `ReconError` for what `locate` and `recon.data.files.shards` refuse, a model that the Hub does not have, and one that
    comes with code of its own, unless `trust_remote_code`.
    """
    where = locate(name)
    found = Path(where)
    if not found.is_dir():
        try:
            found = files.hub_snapshot(where, revision, trust_remote_code)
        except Exception as error:  # huggingface_hub, its HTTP client and transformers each raise their own kinds
            raise _not_loaded(name, revision, error) from error
    try:
        check_code(found, trust_remote_code)
        files.shards(found)
    except ReconError as error:
        raise _not_loaded(name, revision, error) from error
    return found


def check_code(folder: Path, trust_remote_code: bool) -> None:
    """Raises `ReconError` where the model in `folder` can only run by code that comes with it, unless that is trusted."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        own, kind = config.get("auto_map") or {}, config.get("model_type")
    except (OSError, ValueError, AttributeError):  # transformers says what is wrong with it
        return
    if own and kind not in CONFIG_MAPPING and not trust_remote_code:
        code = ", ".join(sorted(map(str, own.values()))) if isinstance(own, dict) else own
        raise ReconError(
            f"transformers does not know models of type {kind!r}, and the code that comes with it ({code}) is not run unless "
            "you have read it and say so: trust_remote_code=True, or --trust-remote-code True"
        )


def _not_loaded(name: str, revision: str | None, error: Exception) -> ReconError:
    at = f" at revision {revision!r}" if revision else ""
    kind = "" if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: "
    return ReconError(f"model {name!r}{at} cannot be loaded: {kind}{error}")


def load(
    name: str, revision: str | None = None, device: torch.device | str = "cpu", trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The causal LM, or encoder-decoder, `name` in float32 and its tokenizer, in evaluation mode, on `device`.

    Weights come from safetensors only, whose files are checked first (see `recon.data.files.shards`). Code that comes with a model
    is run with `trust_remote_code` alone. Weights that the model has no place for are left out, with a warning. Quantised ones are
    taken where transformers undoes that while it reads them.

    Raises `ReconError` for an unknown model, and for weights that are missing, of the wrong shape, NaN or infinite, naming them (the
    first, where not finite); before any are read, for those quantised in another way.
    """
    where = folder(name, revision, trust_remote_code)
    # The bar of transformers' weight loading flickers by in a second and would sit between our own bars.
    transformers_logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=trust_remote_code)
        config = AutoConfig.from_pretrained(where, trust_remote_code=trust_remote_code)
        undone = _undo_quantisation(config)
        model, found = auto_class(config).from_pretrained(
            where, dtype=torch.float32, use_safetensors=True, output_loading_info=True, trust_remote_code=trust_remote_code,
            config=config, ignore_mismatched_sizes=True,  # refused below, by name
        )  # fmt: skip
        if not undone:
            _check_stored(files.shards(where), model)
    except Exception as error:  # transformers, tokenizers and safetensors each raise their own kinds
        raise _not_loaded(name, revision, error) from error
    if found["mismatched_keys"]:
        wrong = ", ".join(f"{key} is {tuple(has)}, not {tuple(wants)}" for key, has, wants in sorted(found["mismatched_keys"]))
        raise ReconError(f"model {name!r} has weights of other shapes than its config.json calls for: {wrong}")
    if found["missing_keys"]:
        missing = ", ".join(sorted(found["missing_keys"]))
        raise ReconError(f"model {name!r} lacks weights that its config.json calls for: {missing}")
    warn_of_surplus(model, found["unexpected_keys"])
    for parameter, values in model.named_parameters():
        check_finite(parameter, values, f"model {name!r}")
        if not values.untyped_storage().resizable():
            # Mapped from the file, and would change with it. Besides, kernels give other last bits for memory that begins at any place.
            values.data = values.data.clone()
    return model.eval().to(device), tokenizer


def _undo_quantisation(config: PretrainedConfig) -> bool:
    """Has transformers undo the quantisation of weights while it reads them, where `config` says that they are; whether it does.

    Raises `ReconError` for a way to quantise that it would keep.
    """
    found = quantisation(config)
    if found is None:
        return False
    kind = AUTO_QUANTIZATION_CONFIG_MAPPING.get(found["quant_method"])
    if kind is None or "dequantize" not in inspect.signature(kind).parameters:
        check_unquantised(config)
    for part in (config, config.get_text_config()):
        vars(part).pop("quantization_config", None)
    # Where there is a GPU, it would not do so unasked.
    config.quantization_config = found | {"dequantize": True}
    return True


def _check_stored(shards: list[Path], model: PreTrainedModel) -> None:
    """Raises `ReconError` for a parameter whose values are read as they are stored, but mean something else."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for path in shards:
        with safe_open(path, "pt") as file:
            for name in parameters.intersection(file.keys()):
                check_stored(name, file.get_slice(name).get_dtype(), path)


def load_pruned(name: str, dense: PreTrainedModel, revision: str | None = None, trust_remote_code: bool = False) -> Checkpoint:
    """The weights of the pruned model `name`, opened to be read parameter by parameter; `dense` is what it was pruned from.

    Its files are checked as those of `load`. Raises `ReconError` also for a model of another type than `dense`, and quantised weights. See `recon.methods.external_mask`.
    """
    where = folder(name, revision, trust_remote_code)
    try:
        config = AutoConfig.from_pretrained(where, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises many kinds
        raise _not_loaded(name, revision, error) from error
    if config.model_type != dense.config.model_type:
        raise ReconError(
            f"pruned model {name!r} is of type {config.model_type!r}, and the dense one of type {dense.config.model_type!r}"
        )
    try:
        check_unquantised(config)
        return Checkpoint(dense, files.shards(where))
    except ReconError as error:
        raise ReconError(f"pruned model: {error}") from error


def configuration(name: str, revision: str | None = None, trust_remote_code: bool = False) -> PretrainedConfig:
    """The configuration of the model called `name`; of a folder or the Hub's files, nothing else is read.

    Raises `ReconError` for what `locate` and `fingerprint` refuse, and where it cannot be read.
    """
    where = locate(name)
    if not Path(where).is_dir():
        # Asks the Hub once, where to read a file would ask again and again before it gave up.
        revision = fingerprint(name, revision, trust_remote_code)
    try:
        return AutoConfig.from_pretrained(where, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers and huggingface_hub each raise their own kinds
        raise ReconError(f"model {name!r}: its configuration cannot be read: {error}") from error


def skeleton(
    name: str, revision: str | None = None, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, Checkpoint, PreTrainedTokenizerBase]:
    """What `load` gives, but with the model's parameters left on disk: see `recon.runtime.weights`."""
    where = folder(name, revision, trust_remote_code)
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=trust_remote_code)
        config = AutoConfig.from_pretrained(where, trust_remote_code=trust_remote_code)
        model, checkpoint = open_model(config, files.shards(where), trust_remote_code)
        if (where / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(where)
    except Exception as error:  # transformers, tokenizers and safetensors each raise their own kinds
        raise _not_loaded(name, revision, error) from error
    return model, checkpoint, tokenizer


def fingerprint(name: str, revision: str | None = None, trust_remote_code: bool = False) -> str:
    """Hash of what `load(name, revision)` loads, without loading it.

    For a bundled model, of what it is made from, the same on every machine; for a folder, of its weights, configuration and
    tokenizer (and of its code, where that is run); for a Hub id, the commit. Raises `ReconError` for an unknown model, and for one that the Hub does not have or
    that cannot be asked for.
    """
    if name in assets.BUNDLED_MODELS:
        return assets.origin(name)
    if is_gguf(name):
        return files.digest(Path(name))
    where = Path(locate(name))
    if not where.is_dir():
        try:
            return files.commit(str(where), revision)
        except Exception as error:  # huggingface_hub and its HTTP client each raise their own kinds
            at = f" at revision {revision!r}" if revision else ""
            raise ReconError(
                f"model {name!r}{at} cannot be had from the Hub ({type(error).__name__}: {error}); "
                f"give a local folder, or a bundled model: {', '.join(assets.BUNDLED_MODELS)}"
            ) from error
    suffixes = SUFFIXES | {".py"} if trust_remote_code else SUFFIXES
    read = {path.name for path in where.iterdir() if path.suffix in suffixes or path.name in VOCABULARY_FILES}
    read.discard(files.RECORD)  # how long a run took makes no difference to its model
    with contextlib.suppress(ReconError):  # an index that is none: loading the model will say so
        read |= set(files.placed(where))  # shards may lie in folders below
    # Ordered by name, so that the same files give the same hash wherever they lie.
    digests = {name: files.digest(where / name) for name in read if (where / name).is_file()}
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()
