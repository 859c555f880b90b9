"""Files that appear only when they are complete; the cache; locks; and `Storage`, where a run keeps its finished windows."""

import contextlib
import glob
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections import ChainMap, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, MutableMapping, Sequence
from functools import cache, partial
from pathlib import Path

import platformdirs
import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from recon.errors import ReconError

PART = ".part"  # ends the names of files and folders that are still being written; they are never read
SMALL = 64 * 2**20  # bytes: activations up to this size stay in memory even if there is a folder
RUN = "run.json"  # the file that says which run a folder belongs to


def cache_folder() -> Path:
    """Where fetched and converted files are kept: $RECON_CACHE, or else the folder for recon in the user's cache."""
    chosen = os.environ.get("RECON_CACHE")
    return Path(chosen).expanduser().absolute() if chosen else platformdirs.user_cache_path("recon")


@contextlib.contextmanager
def writing(what: str, advice: str) -> Iterator[None]:
    """Context that raises `ReconError` with `what` and `advice` if the system refuses to write, such as to a full disk."""
    try:
        yield
    except Exception as error:
        refused = getattr(error, "errno", None) or "(os error " in str(error)  # errors of Rust libraries have only such a text
        if isinstance(error, ReconError) or not refused:
            raise
        raise ReconError(f"{what} cannot be written: {error}; {advice}") from error


def check_writable(folder: Path, what: str) -> None:
    """Makes `folder` if it does not exist. Raises `ReconError` naming it and `what` it is for if it cannot be written to."""
    with writing(f"{what}: folder {str(folder)!r}", "name a folder that can be written"):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass


@contextlib.contextmanager
def complete(path: Path, folder: bool = False) -> Iterator[Path]:
    """Context that gives the name of a file to write, or of a new folder to fill, and renames it to `path` at the end.

    Makes parent folders. After an error nothing is left. A killed process leaves a folder beside `path` that ends in `PART`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(PART, f".{path.name}.", path.parent, ignore_cleanup_errors=True) as around:
        temporary = Path(around) / path.name
        if folder:
            temporary.mkdir()
        yield temporary
        os.replace(temporary, path)


def check_new(folder: Path) -> None:
    """Raises `ReconError` naming `folder`, where a model is to be saved, if it is a file, a mount point or not empty."""
    if folder.exists() and (os.path.ismount(folder) or not folder.is_dir() or any(folder.iterdir())):
        raise ReconError(f"save folder {str(folder)!r} exists and is not an empty folder that can be replaced; name a new one")


@contextlib.contextmanager
def new_checkpoint(folder: Path) -> Iterator[Path]:
    """As `complete`, for the folder of a model. Raises `ReconError` as `check_new` and `locked`, and if it cannot be written."""
    folder = folder.resolve()
    with locked(folder, "save folder"), writing(f"checkpoint {str(folder)!r}", "choose a place with room"):
        check_new(folder)
        with complete(folder, folder=True) as fresh:
            yield fresh


@contextlib.contextmanager
def locked(place: Path, what: str, wait: bool = False) -> Iterator[None]:
    """Context in which no other process works on the file or folder `place`. What killed processes left beside it is removed.

    what: what `place` is, for messages, such as "save folder". wait: wait while another process holds the lock, which the system
    releases when a process ends. Raises `ReconError` if it is held and not waited for, or if the folder cannot be written.
    """
    check_writable(place.parent, what)
    path = place.with_name(f".{place.name}.lock")
    lock = FileLock(path)
    try:
        lock.acquire(timeout=-1 if wait else 0)
    except Timeout:
        raise ReconError(f"{what} {str(place)!r} is in use by another process; wait until it is done, or name another") from None
    try:
        for left in place.parent.glob(f".{glob.escape(place.name)}.{8 * '?'}{PART}"):  # not those of a longer name
            shutil.rmtree(left, ignore_errors=True)
        yield
    finally:
        # Removed while the lock is held: a process that opened the file before sees that it is gone, and opens a new one.
        path.unlink(missing_ok=True)
        lock.release()


def digest(path: Path) -> str:
    """The SHA-256 of a file, computed anew if the file has changed."""
    state = path.stat()
    return _digest(path.resolve(), state.st_size, state.st_mtime_ns)


@cache
def _digest(path: Path, size: int, changed: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def derived_folder(name: str, *decisive: object) -> Path:
    """Where the cache keeps files computed from others. Its name has a hash of `decisive` (JSON): what they depend on."""
    key = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:16]
    return cache_folder() / "derived" / f"{name}-{key}"


def once(folder: Path, make: Callable[[Path], None]) -> Path:
    """`folder` in the cache; if it does not exist, `make(empty folder)` fills it. Raises `ReconError` if it cannot be written."""
    if not folder.is_dir():
        refused = writing(f"cache folder {str(cache_folder())!r}", "free space there, or set RECON_CACHE to another folder")
        with refused, locked(folder, "cache (RECON_CACHE)", wait=True):
            if not folder.is_dir():  # another process may have made it meanwhile
                with complete(folder, folder=True) as fresh:
                    make(fresh)
    return folder


def write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes `tensors` and `metadata` to the safetensors file `path`; see `complete`."""
    with complete(path) as temporary:
        stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(stored, temporary, metadata)


def write_json(path: Path, content: object) -> None:
    """Writes `content`, which JSON can hold, to `path`; see `complete`."""
    with complete(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")


def owner(folder: Path) -> str | None:
    """The key of the run that the work folder `folder` belongs to, as `Storage` has noted it; None if there is no note. Raises
    `ReconError` if the note is cut short, as after a power failure."""
    try:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            return json.loads((folder / RUN).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ReconError(f"{str(folder / RUN)!r} is cut short ({error}); delete {str(folder)!r}, to begin anew") from error


class Storage:
    """What the passes of a run keep: masks, room for activations, and the finished windows of each phase, such as "prune".

        <folder>/<phase>/00012.safetensors           a finished window: its tensors, and in the metadata what was noted of it
        <folder>/<phase>/00013.<name>.safetensors    the activations that the next window starts from

    Each file appears only when it is complete, and a window's file is written after its activations, so a killed run resumes
    after its last finished window. Without a folder, nothing is written, and no window counts as finished.

    folder: the run's own; made if it does not exist. run: the key of the run. keep: phases whose tensors are kept in memory if
    there is no folder. Raises `ReconError` for a folder of another run or with other content, or that cannot be used.
    """

    def __init__(self, folder: Path | None = None, run: str = "", keep: Collection[str] = ()):
        self.folder, self._keep = folder, keep
        self._noted: dict[str, list] = defaultdict(list)
        self._tensors: dict[str, dict[str, Tensor]] = defaultdict(dict)
        self.masks: MutableMapping[str, Tensor] = {}  # keep-masks by matrix name, bool (out, in)
        if folder is None:
            return
        go_on = "what is finished is kept: with room on the disk, the same command goes on from there"
        self._writing = partial(writing, f"work folder {str(folder)!r}", go_on)
        with self._writing():
            found = owner(folder)
            if found is None:
                if folder.exists() and not (folder.is_dir() and all(left.name.endswith(PART) for left in folder.iterdir())):
                    said = "is where a run would keep its windows, and holds something else; move it, or save elsewhere"
                    raise ReconError(f"folder {str(folder)!r} {said}")
                write_json(folder / RUN, run)
            elif found != run:
                said = "give its command to go on with it, delete the folder, or save to another one"
                raise ReconError(f"folder {str(folder)!r} holds another unfinished run ({found}; this is {run}); {said}")
        for left in [*folder.glob(f"**/.*{PART}")]:
            shutil.rmtree(left, ignore_errors=True)
        self.masks = ChainMap({}, {})  # masks set since the last finished window; masks in files
        for path in sorted(folder.glob("*/?????.safetensors")):
            self._take(path)

    def finished(self, phase: str) -> list:
        """What was noted for each finished window of `phase`, in order; see `finish`."""
        return list(self._noted[phase])

    def tensors(self, phase: str) -> Mapping[str, Tensor]:
        """The tensors of the finished windows of `phase`, by name. Do not change them in place."""
        return self._tensors[phase]

    def streams(self, phase: str) -> dict[str, Tensor]:
        """The activations that the next window of `phase` starts from, by name."""
        found = {}
        for path in self._streams(phase, len(self.finished(phase))):
            with self._reading(path):
                stored = load_file(path)["stream"]
            # A copy: tensors in a file may not be aligned, which can change the last bits of results.
            found[path.name.split(".")[1]] = self.empty(stored.shape, stored.dtype).copy_(stored)
        return found

    def finish(
        self, phase: str, noted: object, streams: Mapping[str, Tensor | None] = {}, tensors: Mapping[str, Tensor] = {}
    ) -> None:
        """Stores a finished window (or another step) of `phase`, with the masks that were set since the last one.

        noted: what `finished` returns for it, which JSON can hold. streams: activations that the next window starts from.
        tensors: parameters by full name, as the phase left them.
        """
        if self.folder is None:
            if phase in self._keep:
                self._tensors[phase].update({name: t.detach().clone() for name, t in tensors.items()})
            return
        number, place = len(self.finished(phase)), self.folder / phase
        with self._writing():
            for name, stream in streams.items():
                if stream is not None:
                    write_safetensors(place / f"{number + 1:05}.{name}.safetensors", {"stream": stream})
            path, masks = place / f"{number:05}.safetensors", self.masks.maps[0]
            write_safetensors(path, {**tensors, **masks}, {"noted": json.dumps(noted)})
            for old in {*place.glob("?????.*.safetensors")} - {*self._streams(phase, number + 1)}:
                old.unlink()
        masks.clear()
        self._take(path)

    def empty(self, shape: Sequence[int], dtype: torch.dtype, pinned: bool = False) -> Tensor:
        """A tensor on the CPU to fill with activations or with weights to keep. If there is a folder, a large tensor is in a file
        there, which disappears with the tensor. pinned: in memory that a GPU can read by itself, unless it is in a file.
        """
        size = math.prod(shape)
        if self.folder is None or size * dtype.itemsize <= SMALL:
            return torch.empty(shape, dtype=dtype, pin_memory=pinned)
        with self._writing(), tempfile.NamedTemporaryFile(dir=self.folder) as file:
            # Disk space is reserved before it is mapped, so a full disk raises an error here and does not crash a later write.
            allocate = getattr(os, "posix_fallocate", lambda number, start, size: os.ftruncate(number, size))  # macOS has none
            allocate(file.fileno(), 0, size * dtype.itemsize)
            return torch.from_file(file.name, shared=True, size=size, dtype=dtype).view(*shape)

    def delete(self, begun: bool = True) -> None:
        """Deletes the folder; with `begun` False, only if it has no finished window. Unfinished files do not count."""
        if self.folder is not None and (begun or not any(self._noted.values())):
            beside = f".{self.folder.name.removesuffix('.unfinished')}."  # `locked` removes what a kill leaves of it
            temporary = tempfile.TemporaryDirectory(PART, beside, self.folder.parent, ignore_cleanup_errors=True)
            with contextlib.suppress(FileNotFoundError), temporary as gone:  # the folder may be gone
                self.folder.replace(Path(gone) / self.folder.name)

    def _streams(self, phase: str, number: int) -> list[Path]:
        return sorted((self.folder / phase).glob(f"{number:05}.*.safetensors")) if self.folder else []

    @contextlib.contextmanager
    def _reading(self, path: Path) -> Iterator[None]:
        """Context that raises `ReconError` naming the file `path` if it is cut short."""
        try:
            yield
        except SafetensorError as error:
            raise ReconError(f"{str(path)!r} is cut short ({error}); delete {str(self.folder)!r}, to begin anew") from error

    def _take(self, path: Path) -> None:
        """Counts the window in the file `path` as finished; its tensors are mapped from that file."""
        with self._reading(path), safe_open(path, framework="pt") as file:
            self._noted[path.parent.name].append(json.loads(file.metadata()["noted"]))
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                tensor = file.get_tensor(name)
                (self.masks.maps[1] if tensor.dtype == torch.bool else self._tensors[path.parent.name])[name] = tensor
