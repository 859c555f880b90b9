"""Calibration and evaluation text as token windows: bundled corpora, local files, and C4 and WikiText-2 from the Hub.

Every text is a list of documents in a fixed order, dealt to three disjoint splits by position. The documents of a split are joined
and tokenised at once, and every sample begins as the tokenizer begins a text.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from itertools import groupby, islice
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from safetensors.torch import load_file
from torch import Tensor

from recon.config import PROTOCOLS
from recon.data import assets, wikitext
from recon.data.cache import cached
from recon.errors import ReconError
from recon.runtime.storage import write_safetensors

log = logging.getLogger("recon")
SPLITS = ("calibration", "validation", "evaluation")
TEXTS = {
    "wikipedia": "about 90 English Wikipedia articles of 2016 as plain prose (bundled in the gensim wheel)",
    "news": "the Lee corpora, 343 short news articles of 2001 and 2002 (bundled in the gensim wheel)",
    "code": "20 files of Python source, docstrings included (the gensim wheel's own)",
    "c4": "allenai/c4, English web pages (hub)",
    "wikitext2": "Salesforce/wikitext, wikitext-2-raw-v1 (hub)",
}
BUNDLED = {"wikipedia": ["enwiki-sample"], "news": ["lee-background", "lee"], "code": assets.CODE}  # the assets of a text
SUFFIXES = (".txt", ".jsonl", ".parquet")
SEPARATOR = "\n\n"
PROBE = "The quick brown fox jumps over the lazy dog."  # tells what a tokenizer puts around a text
# The documents of each split, by their position modulo 8. News is short, so half of it is for evaluation.
DEAL = {"calibration": {0, 1, 2, 4, 6}, "validation": {5}, "evaluation": {3, 7}}
DEAL_NEWS = {"calibration": {1, 3, 7}, "validation": {5}, "evaluation": {0, 2, 4, 6}}
DEAL_C4_TRAIN = {"calibration": {0, 1, 2, 3, 4, 6, 7}, "validation": {5}}


@dataclass(frozen=True)
class HubText:
    """Where the Hub keeps a text; `path` may also be a local folder in the same format. `limits`: the most documents of each part."""

    path: str
    config: str | None = None
    data_files: dict[str, str] | None = None
    revision: str | None = None
    limits: dict[str, int] | None = None


# 24,000 pages of C4 are about 10 million calibration tokens (2,048 samples of 4,096 fit); 1,100 pages are the
# published protocol's evaluation text.
HUB = {
    "c4": HubText(
        "allenai/c4",
        data_files={
            "train": "en/c4-train.00000-of-01024.json.gz",
            "validation": "en/c4-validation.00000-of-00008.json.gz",
        },
        limits={"train": 24_000, "validation": 1_100},
    ),
    "wikitext2": HubText("Salesforce/wikitext", config="wikitext-2-raw-v1"),
}
CLEANING = 1  # raise it when `wikitext.prose` changes: the cleaned Wikipedia articles are cached under this number
SHORTEST_ARTICLE = 1000  # characters; stubs and disambiguation pages leave less
# tokenizer -> {(text, split, whether with special tokens, state): tokens}; an entry disappears together with its tokenizer
_TOKENS: WeakKeyDictionary = WeakKeyDictionary()


def documents(name: str, split: str) -> list[str]:
    """The documents of one split of a text, in order.

    Args:
        name: a key of `TEXTS`, or the path of a .txt (paragraphs parted by blank lines), .jsonl (key "text") or
            .parquet (column "text") file.
        split: "calibration", "validation" or "evaluation"; no document is in two of them.

    Raises:
        ReconError: unknown text or split, an unreadable or malformed file, a Hub that cannot be reached.
    """
    if split not in SPLITS:
        raise ReconError(f"unknown split {split!r}; choose one of {', '.join(SPLITS)}")
    if name == "c4":
        # C4's validation file is for evaluation only.
        if split == "evaluation":
            return _hub("c4", "validation")
        return _deal(_hub("c4", "train"), DEAL_C4_TRAIN, split)
    if name == "wikitext2":
        return _hub("wikitext2", {"calibration": "train", "validation": "validation", "evaluation": "test"}[split])
    if name == "news":
        return _deal(_news(), DEAL_NEWS, split)
    if name == "code":
        return _deal(_code(), DEAL, split)
    return _deal(_wikipedia() if name == "wikipedia" else _read_file(_local(name)), DEAL, split)


def sample_tokens(
    name: str,
    split: str,
    tokenizer,
    samples: int,
    sequence_length: int,
    seed: int | None = None,
    protocol: str = "samples",
) -> torch.LongTensor:
    """Samples of one split, shape (samples, sequence_length): what `beginning` gives, then text. No text token is in two samples.

    Args:
        name, split: as `documents`.
        tokenizer: of the model, as `transformers` loads it.
        samples: number of samples.
        sequence_length: tokens per sample, those of the beginning included.
        seed: draws the samples at random without replacement; None takes the first ones in order (evaluation).
        protocol: "samples"; or "joined", the protocol of published perplexities (Frantar & Alistarh 2023, arXiv 2301.00774): the joined
            documents with the tokenizer's special tokens are cut into windows, so that only the first begins as a text does.

    Raises:
        ReconError: as `documents` and `beginning`; an unknown protocol; an empty split; no samples, or more than the split holds;
            a length that leaves no token to predict, or no room for text.
    """
    if protocol not in PROTOCOLS:
        raise ReconError(f"unknown protocol {protocol!r}; allowed: {', '.join(PROTOCOLS)}")
    if samples < 1:
        raise ReconError(f"samples must be at least 1, not {samples}")
    front = beginning(tokenizer) if protocol == "samples" else []
    least = max(2, len(front) + 1)
    if sequence_length < least:
        raise ReconError(
            f"sequence_length must be at least {least} tokens, not {sequence_length}: the tokenizer puts {len(front)} in front of a text"
        )
    tokens, length = _tokens(name, split, tokenizer, special=protocol == "joined"), sequence_length - len(front)
    available = len(tokens) // length
    if samples > available:
        raise ReconError(
            f"{samples} samples of {sequence_length} tokens are more than the {split} split of text {name!r} holds: "
            f"it has {len(tokens)} tokens, {available} samples of that length"
        )
    if seed is None:
        chosen = torch.arange(samples)
    else:
        chosen = torch.randperm(available, generator=torch.Generator().manual_seed(seed))[:samples]
    cut = tokens[: available * length].view(available, length)[chosen]
    return torch.cat([torch.tensor(front, dtype=cut.dtype).expand(samples, -1), cut], 1)


def beginning(tokenizer) -> list[int]:
    """The tokens that `tokenizer` puts in front of every text by default, such as `<bos>`; none where it puts none.

    Raises `ReconError` where that cannot be told: a text's own tokens are not there, just once, among those with special tokens.
    """
    text, whole = (list(tokenizer(PROBE, add_special_tokens=special).input_ids) for special in (False, True))
    starts = [start for start in range(len(whole)) if whole[start : start + len(text)] == text]
    if not text or len(starts) != 1:
        raise ReconError(
            f"it cannot be told which tokens {type(tokenizer).__name__} puts in front of a text: "
            f"{PROBE!r} is {text} without special tokens and {whole} with them"
        )
    return whole[: starts[0]]


def is_fetched(name: str) -> bool:
    """Whether a text is on this machine; False for one of the Hub."""
    return name not in HUB and all(assets.ASSETS[each].is_cached() for each in BUNDLED.get(name, []))


def fingerprint(name: str) -> str:
    """SHA-256 of the text's documents, split by split; of a Hub text, of where it is taken from and its revision."""
    if name in HUB:
        return hashlib.sha256(json.dumps(asdict(HUB[name]), sort_keys=True).encode()).hexdigest()
    return hashlib.sha256(json.dumps([documents(name, split) for split in SPLITS]).encode()).hexdigest()


def _tokens(name: str, split: str, tokenizer, special: bool) -> torch.LongTensor:
    """All tokens of a split, shape (tokens,), kept for as long as the tokenizer lives.

    special: with the special tokens that the tokenizer adds by default.
    """
    kept = _TOKENS.setdefault(tokenizer, {})
    # Between two calls, a local file may be edited, or a Hub text get another revision.
    state = _local(name).stat().st_mtime_ns if name not in TEXTS else HUB.get(name) and fingerprint(name)
    key = (name, split, special, state)
    if key not in kept:
        text = SEPARATOR.join(documents(name, split))
        if not text.strip():
            raise ReconError(
                f"the {split} split of text {name!r} is empty: it has too few documents, which are dealt by position"
            )

        def tokenise() -> Tensor:
            # verbose=False: no warning about a text that is longer than the model's context, which is intended here.
            return tokenizer(text, add_special_tokens=special, return_tensors="pt", verbose=False).input_ids[0]

        kept[key] = _from_cache(text, tokenizer, special, tokenise) if name in BUNDLED else tokenise()
    return kept[key]


def _from_cache(text: str, tokenizer, special: bool, tokenise: Callable[[], Tensor]) -> Tensor:
    """What `tokenise` gives, computed once for all processes: it takes seconds, and hundreds of bytes a token."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # in Python alone, so that nothing tells all that it depends on
        return tokenise()
    decisive = [text, backend.to_str(), special, metadata.version("tokenizers")]
    name = f"tokens-{hashlib.sha256(json.dumps(decisive).encode()).hexdigest()[:16]}"
    file = "tokens.safetensors"
    try:
        folder = cached(name, lambda folder: write_safetensors(folder / file, {"tokens": tokenise().int()}))
    except ReconError as error:
        log.warning("the text's tokens are not kept: %s", error)
        return tokenise()
    return load_file(folder / file)["tokens"].long()


def _deal(texts: list[str], deal: dict[str, set[int]], split: str) -> list[str]:
    """The documents of `split`; repeated ones count once, or the same document could be in two splits."""
    return [text for position, text in enumerate(dict.fromkeys(texts)) if position % 8 in deal[split]]


def _news() -> list[str]:
    """The articles of the Lee corpora, one per line, in ISO-8859-1."""
    lines = (line for name in BUNDLED["news"] for line in assets.fetch(name).open(encoding="latin-1"))
    return [line.strip() for line in lines if line.strip()]


def _code() -> list[str]:
    """Whole files, so that functions of one file, which repeat one another's docstrings, are in one split."""
    return [assets.fetch(name).read_text(encoding="utf-8").strip() for name in BUNDLED["code"]]


def _wikipedia() -> list[str]:
    folder = assets.derived("wikipedia", BUNDLED["wikipedia"], CLEANING, _clean_dump)
    return list(_json_lines(folder / "articles.jsonl"))


def _clean_dump(dump: Path, folder: Path) -> None:
    """Writes the prose of the dump's articles, one {"title", "text"} per line."""
    with (folder / "articles.jsonl").open("w", encoding="utf-8") as file:
        for title, source in wikitext.articles(dump):
            text = wikitext.prose(source)
            if len(text) >= SHORTEST_ARTICLE:
                file.write(json.dumps({"title": title, "text": text}) + "\n")


def _hub(name: str, part: str) -> list[str]:
    """The rows of one part ("train", "validation", "test") of a Hub text."""
    import datasets  # slow to import, and bundled text does not need it

    source = HUB[name]
    try:
        rows = datasets.load_dataset(
            source.path,
            source.config,
            data_files=source.data_files,
            split=part,
            revision=source.revision,
            streaming=True,
        )
        return [row["text"] for row in islice(rows, (source.limits or {}).get(part))]
    except Exception as error:  # datasets, huggingface_hub, httpx and pyarrow each raise their own kinds
        raise ReconError(
            f"text {name!r} could not be read from {source.path} ({type(error).__name__}: {error}); "
            "'wikipedia', 'news' and 'code' need no hub"
        ) from error


def _local(name: str) -> Path:
    """The readable, supported file that `name` is the path of."""
    path = Path(name).expanduser()
    if path.suffix.lower() not in SUFFIXES or not path.is_file():
        known = f"{', '.join(TEXTS)}, or the path of an existing {', '.join(SUFFIXES)} file"
        raise ReconError(f"unknown text {name!r}; choose one of {known}")
    return path


def _read_file(path: Path) -> list[str]:
    readers = {".txt": _paragraphs, ".jsonl": _json_lines, ".parquet": _parquet}
    try:
        texts = [text for text in readers[path.suffix.lower()](path) if text.strip()]
    except (UnicodeDecodeError, OSError) as error:
        raise ReconError(f"text file '{path}' cannot be read: {error}") from error
    if not texts:
        raise ReconError(f"text file '{path}' is empty")
    return texts


def _paragraphs(path: Path) -> list[str]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return ["\n".join(block) for filled, block in groupby(lines, lambda line: bool(line.strip())) if filled]


def _json_lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ReconError(f"text file '{path}', line {number}: not JSON ({error})") from error
            if not isinstance(row, dict) or not isinstance(row.get("text"), str):
                raise ReconError(f"text file '{path}', line {number}: no string under the key \"text\"")
            yield row["text"]


def _parquet(path: Path) -> list[str]:
    import datasets

    try:
        rows = list(datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=True))
    except Exception as error:  # datasets and pyarrow each raise their own kinds
        raise ReconError(f"text file '{path}' cannot be read as Parquet ({type(error).__name__}: {error})") from error
    if rows and "text" not in rows[0]:
        raise ReconError(f"text file '{path}' has no column \"text\"; its columns are {', '.join(rows[0])}")
    return [row["text"] for row in rows if row["text"]]
