"""Packed checkpoints: of each matrix with enough zeros, one bit a weight and, in their order, the weights that are not zero.

Beside the files of an ordinary checkpoint, `model.packed.safetensors` stands for `model.safetensors`, and the same for shards:

    <name>.packed_mask      uint8 (ceil(n / 8),)   bit i, the lowest of a byte first: whether weight i of n is stored
    <name>.packed_values    (stored,)              those weights, in the order in which the matrix lies in memory
    <name>                                         every other tensor, as it is
    metadata "packed"                              JSON: the shape of every tensor, and the metadata of the plain file

`model.packed.json` holds the SHA-256 of each of these files.
Only positive zeros are left out, so what comes back is the same to the bit. Of n weights of b bytes, a share s of them zero, it
takes n (1 / 8 + (1 - s) b) bytes. Transformers finds no weights under these names, and so never loads a part of them unnoticed.
"""

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from huggingface_hub.utils.sha import sha_fileobj
from safetensors import safe_open
from torch import Tensor
from tqdm.auto import tqdm

from recon.errors import ReconError
from recon.runtime.storage import PART, cache_folder, write_json, write_safetensors

PLAIN, PACKED = ".safetensors", ".packed.safetensors"  # how the names of files end
DIGESTS = "model.packed.json"
MASK, VALUES = ".packed_mask", ".packed_values"
NOTE = """
## Packed

The weights in this copy are packed: one bit a weight, and those that are not zero. `recon.load(folder)` reads it as it is. For
any other library, `recon unpack folder plain` gives back the ordinary checkpoint, the same to the bit.
"""


def is_packed(folder: Path) -> bool:
    """Whether the checkpoint in `folder` is packed."""
    return any(folder.glob(f"*{PACKED}"))


def pack(folder: Path, target: Path) -> None:
    """Packs the weights of the checkpoint in `folder` into files in `target`, an existing folder, which may be the same, and says
    so in its README.md. Raises `ReconError` if it holds no safetensors, or is packed already.
    """
    files, digests = sorted(folder.glob(f"model*{PLAIN}")), {}
    if is_packed(folder) or not files:
        raise ReconError(f"{str(folder)!r} {'is packed already' if is_packed(folder) else 'holds no model*.safetensors to pack'}")
    for file in tqdm(files, desc="pack", unit="file"):
        tensors, shapes = {}, {}
        with safe_open(file, framework="pt") as opened:
            own = opened.metadata() or {}
            for name in opened.keys():  # noqa: SIM118 - it is no mapping
                plain = opened.get_tensor(name)
                shapes[name] = list(plain.shape)
                tensors |= _packed(name, plain)
        new = target / file.name.replace(PLAIN, PACKED)
        write_safetensors(new, tensors, packed=json.dumps({"shapes": shapes, "metadata": own}))
        digests[new.name] = _digest(new)
        if folder == target:
            file.unlink()
    _carry(folder, target, PLAIN, PACKED)
    write_json(target / DIGESTS, digests)
    card = target / "README.md"
    card.write_text((card.read_text(encoding="utf-8") if card.exists() else "") + NOTE, encoding="utf-8")


def unpack(folder: Path, target: Path) -> None:
    """Writes the plain form of the packed checkpoint in `folder` to `target`. Raises `ReconError` as `read`."""
    for file, tensors, own in read(folder):
        write_safetensors(target / file.name.replace(PACKED, PLAIN), tensors, **own)
    _carry(folder, target, PACKED, PLAIN)
    (target / DIGESTS).unlink()
    card = target / "README.md"
    if card.exists():
        card.write_text(card.read_text(encoding="utf-8").replace(NOTE, ""), encoding="utf-8")


@contextlib.contextmanager
def unpacked(folder: Path) -> Iterator[Path]:
    """Context with the checkpoint in `folder` in its plain form: `folder` itself, or another that is gone afterwards."""
    if not is_packed(folder):
        yield folder
        return
    cache_folder().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(PART, ".unpacked.", cache_folder()) as scratch:
        unpack(folder, Path(scratch))
        yield Path(scratch)


def read(folder: Path) -> Iterator[tuple[Path, dict[str, Tensor], dict]]:
    """Each packed file of `folder` with its tensors, unpacked, and the metadata of the plain file.

    Raises `ReconError` naming a file that is missing, cut short or altered.
    """
    try:
        digests = json.loads((folder / DIGESTS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ReconError(f"{str(folder)!r} holds no packed weights, or {DIGESTS} in it cannot be read: {error}") from error
    for name, digest in tqdm(digests.items(), desc="unpack", unit="file", disable=len(digests) == 1):
        file = folder / name
        if not file.is_file() or _digest(file) != digest:
            raise ReconError(f"packed file {str(file)!r} is {'altered or cut short' if file.is_file() else 'missing'}")
        with safe_open(file, framework="pt") as opened:
            about = json.loads(opened.metadata()["packed"])
            yield file, {name: _plain(opened, name, shape) for name, shape in about["shapes"].items()}, about["metadata"]


def _packed(name: str, plain: Tensor) -> dict[str, Tensor]:
    """What is stored of a tensor."""
    flat = plain.contiguous().view(-1)
    if plain.ndim > 1 and plain.is_floating_point():
        stored = flat.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[plain.itemsize]) != 0
        if flat.numel() / 8 < int((~stored).sum()) * plain.itemsize:
            mask = torch.from_numpy(np.packbits(stored.numpy(), bitorder="little"))
            return {name + MASK: mask, name + VALUES: flat[stored]}
    return {name: plain}


def _plain(opened: safe_open, name: str, shape: list[int]) -> Tensor:
    """The tensor `name` of a packed file."""
    if name in opened.keys():  # noqa: SIM118
        return opened.get_tensor(name)
    values, mask = opened.get_tensor(name + VALUES), opened.get_tensor(name + MASK).numpy()
    plain = torch.zeros(shape, dtype=values.dtype)
    plain.view(-1)[torch.from_numpy(np.unpackbits(mask, count=plain.numel(), bitorder="little")).bool()] = values
    return plain


def _digest(file: Path) -> str:
    with open(file, "rb") as opened:
        return sha_fileobj(opened).hex()


def _carry(folder: Path, target: Path, old: str, new: str) -> None:
    """Copies all but weights to `target`; the index of shards goes with the form of the weights."""
    for file in folder.iterdir():
        if file.is_file() and file.suffix != PLAIN:
            place = target / file.name.replace(f"model{old}.index", f"model{new}.index")
            if place != file:
                (shutil.move if folder == target else shutil.copy2)(file, place)
