"""The finished steps of a run and their files, from which the same run goes on after it was killed."""

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from recon.errors import ReconError
from recon.runtime.storage import sha256, sync, write_safetensors


class Journal:
    """The finished steps of a run, one JSON object per line, after a first line that says which run it is.

    A line counts if it is complete: what a killed process wrote of its last line is ignored.

    Args:
        path: the file; it appears with the first step.
        fingerprint: everything that decides what the steps find, as JSON can hold it.

    Raises:
        ReconError: the file is that of another run, naming what differs; or it is damaged, or cannot be read.
    """

    def __init__(self, path: Path, fingerprint: dict):
        self.path = path
        self.entries: list[dict] = []
        self._fingerprint = json.loads(json.dumps(fingerprint))  # as it will be read
        try:
            whole = path.read_bytes() if path.exists() else b""
        except OSError as error:
            raise ReconError(f"{str(path)!r} cannot be read: {error.strerror}") from error
        whole = whole[: whole.rfind(b"\n") + 1]
        try:
            header, *self.entries = map(json.loads, whole.splitlines()) if whole else (None,)
        except ValueError as error:
            raise ReconError(f"{str(path)!r} is damaged ({error}); delete its folder to begin anew") from error
        self._end = len(whole)
        if header is not None and (found := differences(header, self._fingerprint)):
            raise ReconError(
                f"folder {str(path.parent)!r} holds another unfinished run: {'; '.join(found)}. Give its command to go on with it, "
                "delete the folder, or save to another one"
            )

    def finished(self, phase: str) -> list:
        """What the finished steps of `phase` found, in their order."""
        return [entry["found"] for entry in self.entries if entry["phase"] == phase]

    def add(self, entry: dict) -> None:
        """Adds one finished step, which is on the disk when this returns. Raises `OSError` if it is not added.

        entry: has at least the step's "phase" and what it "found".
        """
        first = not self._end
        lines = b"".join(json.dumps(each).encode() + b"\n" for each in ([self._fingerprint, entry] if first else [entry]))
        # Overwrites what a killed or failed write left behind the last complete line.
        with open(self.path, "r+b" if self.path.exists() else "xb") as file:
            file.truncate(self._end)
            file.seek(self._end)
            file.write(lines)
            file.flush()
            os.fsync(file.fileno())
        if first:
            sync(self.path.parent)
        self._end += len(lines)
        self.entries.append(entry)


class StepFiles:
    """The files in a run's folder. The journal notes each by its name, size and hash, with the names of the tensors in it.

    `places`: by kind of file, the tensors that can be read, each with what the journal says of its file. `shards`: what the journal
    says of the checkpoint's finished shards.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.places: dict[str, dict[str, dict]] = {"masks": {}, "weights": {}, "exact": {}}
        self.shards: list[dict] = []
        self._open: dict[str, object] = {}

    def take(self, entry: dict) -> None:
        """Makes the files of a finished step readable: adds them to `places` and `shards`."""
        for kind, places in self.places.items():
            places |= {name: entry[kind] for name in entry.get(kind, {}).get("names", ())}
        self.shards += [entry["shard"]] if "shard" in entry else []

    def write(self, name: str, tensors: dict[str, Tensor], **more) -> dict:
        """Writes the safetensors file `name`; returns what the journal is to say of it, and `more`."""
        write_safetensors(self.folder / name, tensors)
        return self.noted(name) | more

    def noted(self, name: str) -> dict:
        """What the journal is to say of the file `name`."""
        path = self.folder / name
        return {"file": name, "size": path.stat().st_size, "sha256": sha256(path)}

    def check(self, noted: dict) -> None:
        """Raises `ReconError` if a file of a finished step is missing, or is not what was written."""
        path = self.folder / noted["file"]
        size = path.stat().st_size if path.exists() else None
        if size != noted["size"] or sha256(path) != noted["sha256"]:
            wrong = "is missing" if size is None else "has changed since it was written"
            raise ReconError(f"{str(path)!r} {wrong}; delete {str(self.folder)!r} to begin anew")

    def tensor(self, kind: str, name: str) -> Tensor:
        """The tensor `name` in a file of this kind, mapped; not to be changed in place."""
        file = self.places[kind][name]["file"]
        if file not in self._open:
            self._open[file] = safe_open(self.folder / file, framework="pt")
        return self._open[file].get_tensor(name)

    def sweep(self, folders: Iterable[str], finished: Iterable[str]) -> None:
        """Makes `folders`, and deletes all files in them but those of `finished` steps."""
        counted = {self.folder / name for name in finished}
        for name in folders:
            (self.folder / name).mkdir(parents=True, exist_ok=True)
            for path in (self.folder / name).iterdir():
                if path.is_dir():  # some tokenizers save folders in the checkpoint
                    shutil.rmtree(path)
                elif path not in counted:
                    path.unlink()
        sync(self.folder)
        sync(self.folder.parent)


def differences(before: object, now: object, name: str = "") -> list[str]:
    """The differences between two values as JSON holds them, such as "spec.samples was 8, is 4"."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = sorted(before.keys() | now.keys())
        return [found for key in keys for found in differences(before.get(key), now.get(key), f"{name}.{key}".lstrip("."))]
    return [] if before == now else [f"{name} was {before!r}, is {now!r}"]
