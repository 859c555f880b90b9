"""Packed checkpoints: a matrix with enough zeros is stored as one bit per weight and the nonzero weights, in order.

In the checkpoint, `model.packed.safetensors` takes the place of `model.safetensors`, and likewise for shards:

    <name>.packed_mask      uint8 (ceil(n / 8),)   bit i, the lowest of a byte first: whether weight i of n is stored
    <name>.packed_values    (stored,)              those weights, in the order in which the matrix lies in memory
    <name>                                         every other tensor, as it is
    metadata "packed"                              JSON: the shape of every tensor, and the metadata of the plain file

`model.packed.json` holds the SHA-256 of each packed file. Only positive zeros are left out (negative ones are stored), so
unpacking restores every bit. A matrix of n weights of b bytes, a share s of them zero, takes n (1 / 8 + (1 - s) b) bytes.
Transformers finds no weights under these names, so it never loads only a part of them unnoticed.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm.auto import tqdm

from recon.errors import ReconError
from recon.runtime.storage import digest, new_checkpoint, write_json, write_safetensors

PLAIN, PACKED = "model.safetensors", "model.packed.safetensors"
DIGESTS = "model.packed.json"
WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf"}  # suffixes of weight files
MASK, VALUES = ".packed_mask", ".packed_values"


def pack(folder: Path | str, target: Path | str) -> None:
    """Writes the checkpoint in `folder` packed to the new folder `target`. Raises `ReconError` if there is nothing to pack."""
    with new_checkpoint(Path(target)) as fresh:
        pack_files(Path(folder), fresh)


def unpack(folder: Path | str, target: Path | str) -> None:
    """Writes the packed checkpoint in `folder` unpacked to the new folder `target`: bit for bit what was packed.

    Raises `ReconError` naming a file that is missing, altered or cut short.
    """
    with new_checkpoint(Path(target)) as fresh:
        _unpack_files(Path(folder), fresh)


def unpacked(folder: Path, scratch: Path) -> Path:
    """The folder of the plain checkpoint: `folder`, or if it is packed, `scratch`, to which it is unpacked."""
    if not is_packed(folder):
        return folder
    _unpack_files(folder, scratch)
    return scratch


def is_packed(folder: Path) -> bool:
    """Whether the checkpoint in `folder` is packed."""
    return (folder / DIGESTS).is_file()


def pack_files(folder: Path, target: Path) -> None:
    """As `pack`, but to the existing folder `target`."""
    files, digests = sorted(folder.glob("model*.safetensors")), {}
    if is_packed(folder) or not files:
        raise ReconError(f"{str(folder)!r} {'is packed already' if is_packed(folder) else 'holds no model*.safetensors to pack'}")
    if (index := folder / f"{PLAIN}.index.json").is_file():
        if lost := {*json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()} - {file.name for file in files}:
            raise ReconError(f"{str(folder)!r} lacks {min(lost)!r}, which {index.name} names")
    for file in tqdm(files, desc="pack", unit="file"):
        try:
            with safe_open(file, framework="pt") as opened:
                tensors, noted = {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata()  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise ReconError(f"{str(file)!r} cannot be read: {error}") from error
        about = {"shapes": {name: list(each.shape) for name, each in tensors.items()}, "metadata": noted}
        new = target / file.name.replace(".safetensors", ".packed.safetensors")
        stored = {key: part for name, each in tensors.items() for key, part in _packed(name, each).items()}
        write_safetensors(new, stored, {"format": "pt", "packed": json.dumps(about)})
        digests[new.name] = digest(new)
    _carry(folder, target, PLAIN, PACKED)
    write_json(target / DIGESTS, digests)


def _unpack_files(folder: Path, target: Path) -> None:
    if not is_packed(folder):
        raise ReconError(f"{str(folder)!r} holds no {DIGESTS}; only what `recon pack` or --save-format packed wrote is unpacked")
    try:
        digests = json.loads((folder / DIGESTS).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ReconError(f"packed file {str(folder / DIGESTS)!r} is altered or cut short: {error}") from error
    if unknown := {file.name for file in folder.glob("*.packed.safetensors")} - {*digests}:
        raise ReconError(f"packed file {str(folder / DIGESTS)!r} is altered: it does not name {min(unknown)!r}")
    if outside := next((name for name in digests if Path(name).name != name), None):
        raise ReconError(f"packed file {str(folder / DIGESTS)!r} is altered: {outside!r} is in another folder")
    for name, noted in tqdm(digests.items(), desc="unpack", unit="file"):
        file = folder / name
        if not file.is_file() or digest(file) != noted:
            raise ReconError(f"packed file {str(file)!r} is {'altered or cut short' if file.is_file() else 'missing'}")
        with safe_open(file, framework="pt") as opened:
            about, known = json.loads(opened.metadata()["packed"]), set(opened.keys())
            tensors = {each: _plain(opened, each, shape, known) for each, shape in about["shapes"].items()}
        write_safetensors(target / name.replace(".packed", ""), tensors, about["metadata"])
    _carry(folder, target, PACKED, PLAIN)


def _packed(name: str, plain: Tensor) -> dict[str, Tensor]:
    """The tensors that are stored for the tensor `plain`, by name."""
    flat = plain.contiguous().view(-1)
    if plain.ndim > 1 and plain.is_floating_point():
        stored = flat.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[plain.itemsize]) != 0
        if flat.numel() / 8 < int((~stored).sum()) * plain.itemsize:
            mask = torch.from_numpy(np.packbits(stored.numpy(), bitorder="little"))
            return {name + MASK: mask, name + VALUES: flat[stored]}
    return {name: plain}


def _plain(opened: safe_open, name: str, shape: list[int], known: set[str]) -> Tensor:
    """The tensor `name`, unpacked; known: the names of the tensors in the packed file `opened`."""
    if name in known:
        return opened.get_tensor(name)
    values, mask = opened.get_tensor(name + VALUES), opened.get_tensor(name + MASK).numpy()
    plain = torch.zeros(shape, dtype=values.dtype)
    plain.view(-1)[torch.from_numpy(np.unpackbits(mask, count=plain.numel(), bitorder="little")).bool()] = values
    return plain


def _carry(folder: Path, target: Path, old: str, new: str) -> None:
    """Copies all files except weights and digests, also from one folder down; `old` in file names (shard index) becomes `new`."""
    for file in (*folder.iterdir(), *folder.glob("[!.]*/*")):  # one folder down: such as additional chat templates
        if file.parent != folder and (file.parent / "config.json").is_file():  # another model
            continue
        if file.is_file() and file.suffix not in WEIGHTS and file.name != DIGESTS:
            place = target / file.relative_to(folder).with_name(file.name.replace(old, new))
            place.parent.mkdir(exist_ok=True)
            shutil.copy2(file, place)
