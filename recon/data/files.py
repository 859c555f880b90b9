"""The files of a checkpoint, found and checked before anything is read from them; hashes of files.

A checkpoint is a folder in the Hugging Face format with its weights in safetensors: one `model.safetensors`, or shards
listed by an index. Nothing here unpickles, or runs code that comes with a model.
"""

import contextlib
import functools
import json
import re
from operator import itemgetter
from pathlib import Path, PurePosixPath, PureWindowsPath

from safetensors import SafetensorError, safe_open
from tqdm.auto import tqdm

from recon.errors import ReconError
from recon.runtime.storage import SLOW, cache_folder, complete, sha256

WEIGHTS, INDEX, HASHES = "model.safetensors", "model.safetensors.index.json", "SHA256SUMS"
RECORD = "record.json"  # the record of the run that made a model
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
DESCRIPTIONS = ("*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken", "*.spm")  # patterns of configuration and tokenizer files
LARGE = 2**26  # bytes from which a file's hash is kept in the cache


def shards(folder: Path | str) -> list[Path]:
    """The safetensors files that hold the weights of the checkpoint in `folder`, checked without reading any values.

    Every file is inside the folder (or among the blobs of the same repository in the Hub's cache), is as long as its header
    says, and holds exactly the tensors that the index places there. Hashes agree, if the checkpoint has any: a blob in the
    Hub's cache is named after its SHA-256, and models that `recon` saves have a `SHA256SUMS`, in the format of `sha256sum`.

    Raises:
        ReconError: naming the file or tensor at fault; also if there are no weights, or only pickled ones.
    """
    folder = Path(folder)
    places = placed(folder)
    paths = [_inside(folder, name) for name in places]
    for path, wanted in zip(paths, places.values(), strict=True):
        found = tensor_names(path)
        wanted = found if wanted is None else wanted
        if lacking := sorted(wanted - found):
            raise ReconError(
                f"{INDEX} places tensor {lacking[0]!r} in {path.name!r}, which does not hold it ({len(lacking)} such)"
            )
        if surplus := sorted(found - wanted):
            raise ReconError(
                f"{path.name!r} holds tensor {surplus[0]!r}, which {INDEX} does not place there ({len(surplus)} such)"
            )
    _check_hashes(folder, paths)
    return paths


def placed(folder: Path) -> dict[str, set[str] | None]:
    """The files that hold the weights of the checkpoint in `folder`, by their names in it, whether they exist or not, with the
    tensors that the index places in each (None without an index).

    Raises `ReconError` as `shards`.
    """
    # As in transformers, a single file has priority over an index.
    single = (folder / WEIGHTS).exists() or (folder / WEIGHTS).is_symlink()
    return {WEIGHTS: None} if single else _read_index(folder)


def tensor_names(shard: Path) -> set[str]:
    """The names of the tensors in a safetensors file; raises `ReconError` if its header and its length do not agree."""
    try:
        with safe_open(shard, "pt") as file:
            return set(file.keys())
    except (SafetensorError, OSError) as error:
        size = shard.stat().st_size
        raise ReconError(f"{shard.name!r} ({size:,} bytes) is truncated or damaged: {error}; fetch or write it again") from error


@functools.cache
def commit(name: str, revision: str | None = None) -> str:
    """The commit of `revision` of the model repository `name`, the same for as long as this process lasts.

    It is the one in the Hub's cache, so that it is known offline, and a resumed run keeps its files; or else the newest one.
    Raises whatever huggingface_hub raises if the Hub cannot be asked.
    """
    from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache

    # Folders in the cache are named after the commit.
    found = try_to_load_from_cache(name, "config.json", revision=revision)
    if not isinstance(found, str):
        HfApi().model_info(name, revision=revision)  # fails at once if the Hub cannot be reached
        found = hf_hub_download(name, "config.json", revision=revision)
    return Path(found).parent.name


def hub_snapshot(name: str, revision: str | None = None, code: bool = False) -> Path:
    """The folder in the Hub's cache with the files of the model repository `name` at `commit`; missing files are fetched.

    For old repositories without safetensors, the Hub's conversion to safetensors is fetched, as transformers does.

    code: whether Python files are fetched as well.

    Raises `ReconError` if there are no weights in safetensors.
    """
    folder = _download(name, commit(name, revision), code)
    if not _has_weights(folder) and revision in (None, "main"):
        from huggingface_hub import HfApi
        from transformers.safetensors_conversion import get_conversion_pr_reference

        folder = _download(name, get_conversion_pr_reference(HfApi(), name), code)
    if not _has_weights(folder):
        raise ReconError(f"it has neither {WEIGHTS} nor {INDEX}, and other formats are not read")
    return folder


def _has_weights(folder: Path) -> bool:
    return (folder / WEIGHTS).is_file() or (folder / INDEX).is_file()


def _download(name: str, revision: str | None, code: bool) -> Path:
    from huggingface_hub import snapshot_download

    patterns = [*DESCRIPTIONS, "*.py"] if code else list(DESCRIPTIONS)
    folder = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    # Repositories may hold the same weights in several formats: only those that will be read are fetched.
    weights = list(_read_index(folder)) if (folder / INDEX).is_file() else [WEIGHTS]
    return Path(snapshot_download(name, revision=revision, allow_patterns=weights))


def _read_index(folder: Path) -> dict[str, set[str]]:
    """The tensors that the index of `folder` places in each file, by the file's name."""
    path = folder / INDEX
    if not path.is_file():
        pickled = sorted(file.name for file in folder.glob("*") if file.suffix in PICKLED)
        if pickled:
            raise ReconError(
                f"its weights are pickled ({', '.join(pickled[:3])}), and reading a pickle can run any code; give a checkpoint in "
                f"safetensors ({WEIGHTS}), as transformers' save_pretrained writes"
            )
        raise ReconError(f"{str(folder)!r} has neither {WEIGHTS} nor {INDEX}; weights are read from safetensors only")
    try:
        places = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        found: dict[str, set[str]] = {}
        for tensor, file in sorted(places.items(), key=itemgetter(1)):
            found.setdefault(file, set()).add(tensor)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ReconError(
            f"{INDEX} is no index ({type(error).__name__}: {error}); it must be an object whose weight_map says which file "
            "each tensor lies in"
        ) from error
    if not found:
        raise ReconError(f"{INDEX} has an empty weight_map; it must say which file each tensor lies in")
    for name in found:
        # A name must not be a path out of the folder on any system.
        kinds = (PurePosixPath(name), PureWindowsPath(name))
        if any(kind.is_absolute() or kind.drive or ".." in kind.parts for kind in kinds) or not name.endswith(".safetensors"):
            raise ReconError(f"{INDEX} names the file {name!r}; allowed: safetensors files inside the folder")
    return found


def _inside(folder: Path, name: str) -> Path:
    """The file `name` of `folder`; raises `ReconError` if it is missing, or a link that leads out of the folder."""
    path, home = folder / name, folder.resolve()
    # In the Hub's cache, files are links from snapshots/<commit>/ to blobs/ beside it.
    allowed = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    target = path.resolve()
    if not any(target.is_relative_to(place) for place in allowed):
        raise ReconError(
            f"{name!r} is a link that leads out of its folder, to {str(target)!r}; put the file itself there, or name its own folder"
        )
    if not target.is_file():
        raise ReconError(f"{str(folder)!r} lacks the weights' file {name!r}; fetch or write it again")
    return path


def _check_hashes(folder: Path, paths: list[Path]) -> None:
    """Raises `ReconError` naming a file that has a hash, and another content."""
    stored, wanted = read_hashes(folder), {}
    for path in paths:
        target, name = path.resolve(), path.relative_to(folder).as_posix()
        if name in stored:
            wanted[path] = stored[name]
        elif target.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", target.name):
            wanted[path] = target.name
    total = sum(path.stat().st_size for path in wanted)
    with tqdm(total=total, desc="verify weights", unit="B", unit_scale=True, disable=total < SLOW) as bar:
        for path, expected in wanted.items():
            if digest(path) != expected:
                raise ReconError(
                    f"{path.name!r} is damaged: its content does not have the hash {expected[:12]}...; fetch it again"
                )
            bar.update(path.stat().st_size)


def read_hashes(folder: Path) -> dict[str, str]:
    """The SHA-256 of files in `folder`, by name, as its `SHA256SUMS` says; empty if there is none."""
    path = folder / HASHES
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    matches = (re.fullmatch(r"([0-9a-f]{64}) [ *](.+)", line) for line in lines)
    return {match[2]: match[1] for match in matches if match}


def write_hashes(folder: Path, pattern: str = "*.safetensors") -> None:
    """Writes `SHA256SUMS` for the files of `folder` called like `pattern`; `sha256sum --check` reads it too."""
    lines = [f"{digest(path)}  {path.name}\n" for path in sorted(folder.glob(pattern)) if path.is_file()]
    (folder / HASHES).write_text("".join(lines), encoding="utf-8")


def digest(path: Path) -> str:
    """The SHA-256 of a file, computed anew if the file has changed; that of a large one is kept in the cache."""
    found = path.stat()
    # Known by its inode, so that renaming changes nothing; size and times tell whether its content may have changed.
    return _digest(path.resolve(), f"{found.st_dev}-{found.st_ino}", f"{found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}")


@functools.cache
def _digest(path: Path, inode: str, state: str) -> str:
    if path.stat().st_size < LARGE:
        return sha256(path)
    kept = cache_folder() / "digests" / inode
    if kept.is_file() and (found := re.fullmatch(f"{state} ([0-9a-f]{{64}})".encode(), kept.read_bytes())):
        return found[1].decode()
    computed = sha256(path)
    with contextlib.suppress(OSError), complete(kept) as temporary:  # a cache that cannot be written only costs time
        temporary.write_text(f"{state} {computed}", encoding="utf-8")
    return computed
