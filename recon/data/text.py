"""Calibration and evaluation text as token windows: bundled corpora, local files, and C4 and WikiText-2 from the Hub.

Every text is a list of documents in a fixed order, dealt to three disjoint splits by position. The documents of a split are
joined and tokenised together. Every sample begins with the tokens that the tokenizer puts in front of a text.
"""

import functools
import hashlib
import json
import re
from importlib import metadata
from itertools import islice
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from recon.config import PROTOCOLS
from recon.data import assets, wikitext
from recon.errors import ReconError
from recon.runtime.storage import derived_folder, once

SPLITS = ("calibration", "validation", "evaluation")
BUNDLED = {"wikipedia": ["enwiki-sample"], "news": ["lee-background", "lee"], "code": assets.CODE}  # text -> its assets
FORMATS = (".txt", ".jsonl", ".parquet")  # .txt: documents between blank lines; others: the string "text" of each row
SEPARATOR = "\n\n"
PROBE = "The quick brown fox jumps over the lazy dog."  # a text to find out what a tokenizer puts around texts
# Where a text is (on the Hub, or a local folder), and the most documents taken of each part: 24,000 pages of C4 are 10 million
# calibration tokens or so, enough for 2,048 samples of 4,096; 1,100 pages are the evaluation text of the published protocol.
HUB: dict[str, dict] = assets.TABLE["hub_texts"]
TEXTS = (*BUNDLED, *HUB)
PARTS = {
    "c4": {"calibration": "train", "validation": "train", "evaluation": "validation"},
    "wikitext2": {"calibration": "train", "validation": "validation", "evaluation": "test"},
}
# Documents of each split, by position modulo 8; a split not listed takes all. News is short, so half of it is for evaluation.
DEAL = {"calibration": {0, 1, 2, 4, 6}, "validation": {5}, "evaluation": {3, 7}}
DEALS = {
    "news": {"calibration": {1, 3, 7}, "validation": {5}, "evaluation": {0, 2, 4, 6}},
    "c4": {"calibration": {0, 1, 2, 3, 4, 6, 7}, "validation": {5}},
    "wikitext2": {},
}
CLEANING = 1  # raise it when `wikitext.prose` changes: cleaned Wikipedia articles are cached under this number
SHORTEST_ARTICLE = 1000  # characters of prose; stubs and disambiguation pages have less


def documents(name: str, split: str) -> list[str]:
    """The documents of one split ("calibration", "validation" or "evaluation") of a text, in order; no document is in two splits.

    name: one of `TEXTS`, or the path of a file in one of `FORMATS`. Raises `ReconError` if either is unknown or cannot be read.
    """
    if split not in SPLITS:
        raise ReconError(f"unknown split {split!r}; choose one of {', '.join(SPLITS)}")
    if name in PARTS:
        texts = _hub(name, PARTS[name][split])
    elif name == "wikipedia":
        texts = _wikipedia()
    elif name == "news":  # articles of the Lee corpora, one per line
        lines = (line.strip() for each in BUNDLED["news"] for line in assets.fetch(each).open(encoding="latin-1"))
        texts = [line for line in lines if line]
    elif name == "code":  # whole files: functions of one file repeat docstrings, so they must be in the same split
        texts = [assets.fetch(each).read_text(encoding="utf-8").strip() for each in BUNDLED["code"]]
    else:
        texts = _read_file(name)
    if (positions := DEALS.get(name, DEAL).get(split)) is None:
        return texts
    once: dict[str, str] = {}  # repeated documents count once, or one could be in two splits
    for text in texts:
        once.setdefault(text.strip(), text)
    return [text for position, text in enumerate(once.values()) if position % 8 in positions]


def sample_tokens(
    name: str, split: str, tokenizer, samples: int, sequence_length: int, seed: int | None = None, protocol: str = "samples"
) -> torch.LongTensor:
    """Samples of one split, (samples, sequence_length): the tokens of `beginning`, then text. No text token is in two samples.

    name, split: as `documents`.
    sequence_length: tokens per sample, those of the beginning included.
    seed: draws the samples at random without replacement; None takes the first ones in order (evaluation).
    protocol: "samples"; or "joined", that of published perplexities (Frantar & Alistarh 2023, arXiv 2301.00774): the documents
        are joined, tokenised with special tokens and cut into samples, so only the first begins with those of `beginning`.

    Raises `ReconError` as `documents` and `beginning`; for an unknown protocol; and if samples are too short, too many or none.
    """
    if protocol not in PROTOCOLS or samples < 1:
        raise ReconError(f"{samples} samples of protocol {protocol!r}; allowed: at least 1, and one of {', '.join(PROTOCOLS)}")
    front = beginning(tokenizer) if protocol == "samples" else []
    least = max(2, len(front) + 1)
    if sequence_length < least:
        why = f"the tokenizer puts {len(front)} in front of a text"
        raise ReconError(f"samples must be of at least {least} tokens, not {sequence_length}: {why}")
    length = sequence_length - len(front)
    known_by = len(tokenizer), *tokenizer(PROBE).input_ids  # a tokenizer may be changed in place
    tokens = _tokens(name, split, tokenizer, protocol == "joined", _changed(name), known_by)
    available = len(tokens) // length
    if samples > available:
        held = f"the {split} split of text {name!r} holds: it has {len(tokens)} tokens, {available} samples of that length"
        raise ReconError(f"{samples} samples of {sequence_length} tokens are more than {held}")
    drawn = torch.arange(available) if seed is None else torch.randperm(available, generator=torch.Generator().manual_seed(seed))
    cut = tokens[: available * length].view(available, length)[drawn[:samples]]
    return torch.cat([torch.tensor(front, dtype=cut.dtype).expand(samples, -1), cut], 1)


def beginning(tokenizer) -> list[int]:
    """The tokens that `tokenizer` puts in front of every text, such as `<bos>`. Raises `ReconError` if they cannot be found."""
    text, whole = (list(tokenizer(PROBE, add_special_tokens=special).input_ids) for special in (False, True))
    starts = [start for start in range(len(whole)) if whole[start : start + len(text)] == text]
    if not text or len(starts) != 1:
        seen = f"{PROBE!r} is {text} without special tokens and {whole} with them"
        raise ReconError(f"it cannot be told which tokens {type(tokenizer).__name__} puts in front of a text: {seen}")
    return whole[: starts[0]]


def fingerprint(name: str) -> str:
    """SHA-256 of the text's documents, split by split; for a Hub text, of its place on the Hub and its revision."""
    if name in HUB:
        return hashlib.sha256(json.dumps(HUB[name], sort_keys=True).encode()).hexdigest()
    return _hash(name, _changed(name))


@functools.lru_cache(maxsize=8)
def _hash(name: str, changed: int | None) -> str:
    return hashlib.sha256(json.dumps([documents(name, split) for split in SPLITS]).encode()).hexdigest()


def _changed(name: str) -> int | None:
    """When `name`, if it is a file, was last changed, which may be while this process runs."""
    file = Path(name).expanduser()
    return file.stat().st_mtime_ns if file.is_file() else None


@functools.lru_cache(maxsize=8)
def _tokens(name: str, split: str, tokenizer, special: bool, *changed) -> torch.LongTensor:
    """All tokens of a split, (tokens,), with special tokens if `special`; those of a bundled text are kept in the cache.

    changed: values that differ if the file or the tokenizer has changed, so that old tokens are not returned.
    """
    published = HUB.get(name, {}).get("joined_by", SEPARATOR)
    text = (published if special else SEPARATOR).join(documents(name, split))
    if not text.strip():
        count, more = sum(len(documents(name, each)) for each in SPLITS), "give more (in .txt, blank lines part them)"
        raise ReconError(f"the {split} split of text {name!r} is empty: it has {count} documents, dealt by position; {more}")

    def tokenise() -> Tensor:
        # verbose=False: no warning about a text that is longer than the model's context, which is intended here.
        return tokenizer(text, add_special_tokens=special, return_tensors="pt", verbose=False).input_ids[0]

    backend, file = getattr(tokenizer, "backend_tokenizer", None), "tokens.safetensors"
    if name not in BUNDLED or backend is None:
        return tokenise()
    # Tokenising takes seconds, and hundreds of bytes of memory per token.
    folder = derived_folder("tokens", text, backend.to_str(), special, metadata.version("tokenizers"))
    once(folder, lambda folder: save_file({"tokens": tokenise().int()}, folder / file))
    return load_file(folder / file)["tokens"].long()


def _wikipedia() -> list[str]:
    """The prose of Wikipedia articles that have at least `SHORTEST_ARTICLE` characters of it."""

    def make(dump: Path, folder: Path) -> None:
        found = ({"title": title, "text": wikitext.prose(source)} for title, source in wikitext.articles(dump))
        rows = [json.dumps(article) for article in found if len(article["text"]) >= SHORTEST_ARTICLE]
        (folder / "articles.jsonl").write_text("\n".join([*rows, ""]), encoding="utf-8")

    return _read_file(assets.derived("wikipedia", BUNDLED["wikipedia"], CLEANING, make) / "articles.jsonl")


def _hub(name: str, part: str) -> list[str]:
    """The rows of one part ("train", "validation", "test") of a Hub text."""
    import datasets  # slow to import, and bundled text does not need it

    source = HUB[name]
    where = {"data_files": source["data_files"], "revision": source["revision"]}
    try:
        rows = datasets.load_dataset(source["path"], source["config"], split=part, streaming=True, **where)
        return [row["text"] for row in islice(rows, (source["limits"] or {}).get(part))]
    except Exception as error:  # datasets, huggingface_hub, httpx and pyarrow each raise their own kinds
        said = f"{source['path']} ({type(error).__name__}: {error})"
        raise ReconError(f"text {name!r} could not be read from {said}; 'wikipedia', 'news' and 'code' need no hub") from error


def _read_file(name: str | Path) -> list[str]:
    """The documents that are not empty in a file of one of `FORMATS`."""
    path = Path(name).expanduser()
    kind = path.suffix.lower()
    if kind not in FORMATS or not path.is_file():
        known = f"{', '.join(TEXTS)}, or the path of an existing {', '.join(FORMATS)} file"
        raise ReconError(f"unknown text {name!r}; choose one of {known}")
    number, texts = 0, []
    try:
        if kind == ".parquet":
            from pyarrow.parquet import read_table  # slow to import

            rows = read_table(path, columns=["text"])["text"].to_pylist()
        else:
            rows = path.read_text(encoding="utf-8-sig")
            rows = rows.split("\n") if kind == ".jsonl" else re.split(r"\n\s*\n", f"\n\n{rows}\n\n")
        for row in rows:
            number += 1
            text = json.loads(row)["text"] if kind == ".jsonl" and row.strip() else row
            if text.encode() and text.strip():  # encode() raises an error for bytes and for lone surrogates
                texts.append(text)
        return texts
    except Exception as error:  # json and pyarrow each raise their own kinds
        said = f"row {number}, {type(error).__name__}: {error}" if number else f"{type(error).__name__}: {error}"
        rule = 'it has to be in UTF-8, and rows have to have a string "text"'
        raise ReconError(f"text file '{path}' cannot be read ({said}); {rule}") from error
