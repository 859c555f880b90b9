"""Texts, their splits and samples of tokens: bundled, of local files, and of the Hub from local folders in its formats."""

import ast
import gzip
import json

import datasets
import pytest
import torch
from fixtures.models import dressed
from transformers import AutoTokenizer

from recon.data import assets, text, wikitext
from recon.errors import ReconError


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(assets.bundled_model("smollm2-135m"))


@pytest.fixture
def paragraphs(tmp_path):
    """A text file of 40 different paragraphs of ten words."""
    file = tmp_path / "own.txt"
    file.write_text("\n\n".join(" ".join(f"word{n}x{k}" for k in range(10)) for n in range(40)))
    return str(file)


def every(name: str) -> list[str]:
    return [document for split in text.SPLITS for document in text.documents(name, split)]


@pytest.mark.parametrize("name, split, samples, articles", [
    ("wikipedia", "evaluation", 48, {2}), ("wikipedia", "validation", 16, {1}), ("news", "evaluation", 24, range(24, 30)),
])  # fmt: skip
def test_windows_of_the_protocol_are_of_as_many_articles_as_pages_say(tokenizer, name, split, samples, articles):
    tokens = text.sample_tokens(name, split, tokenizer, samples, 256).numel()
    lengths = [len(tokenizer(document).input_ids) for document in text.documents(name, split)]
    assert next(count for count in range(1, len(lengths) + 1) if sum(lengths[:count]) >= tokens) in articles


def test_documents_are_dealt_by_position_and_count_once(paragraphs, tmp_path):
    found = {split: {int(d[4:].split("x")[0]) % 8 for d in text.documents(paragraphs, split)} for split in text.SPLITS}
    assert found == text.DEAL and len(every(paragraphs)) == 40
    for deal in (text.DEAL, text.DEALS["news"]):
        assert sorted(place for places in deal.values() for place in places) == list(range(8))
    file = tmp_path / "twice.txt"
    file.write_text("\n\n".join(["same", "same "] * 4 + [f"other {n}" for n in range(7)]))
    assert [document.strip() for document in every(str(file))].count("same") == 1


def test_bundled_texts_read_as_they_should_and_their_splits_are_disjoint():
    for name, count in (("wikipedia", 94), ("news", 343), ("code", 20)):
        assert all(text.documents(name, split) for split in text.SPLITS)
        assert len(every(name)) == len(set(every(name))) == count
    assert any("his £3,000 satelite" in document for document in every("news"))  # in its encoding
    assert all(len(ast.parse(document).body) > 3 and '"""' in document for document in every("code"))  # whole files
    articles = every("wikipedia")
    assert sum(map(len, articles)) > 2_000_000 and min(map(len, articles)) >= text.SHORTEST_ARTICLE
    for markup in ("{{", "}}", "[[", "]]", "''", "==", "<ref", "|", "&nbsp;", "Category:", "#REDIRECT", "()", "  "):
        assert not [article for article in articles if markup in article], markup
    assert any(article.startswith("Anarchism is a political philosophy that advocates") for article in articles)


SENTENCE = "This sentence is here because a paragraph has to have some length before it counts."
PAGE = f"""{{{{Hatnote}}}}
:''For other uses, see [[Elsewhere]], which is a page about something else entirely, with a long name.''
{SENTENCE}
== Heading ==
* {SENTENCE}
{{| class="wikitable"
| {SENTENCE}
|}}
A formula <math>a^2</math> stands in it. {SENTENCE}
Short line.
{SENTENCE} Again.
==See also==
{SENTENCE} Not this one.
"""


@pytest.mark.parametrize("source, expected", [
    ("'''Bold''' and ''[[Page name|shown]]'' words. ", "Bold and shown words. "),
    ("A fact.<ref>Book, {{cite book|title=T}}</ref><ref name=a /> ", "A fact. "),
    ("[[File:A.jpg|thumb|Its [[link]] caption.]]{{Infobox|a=b}}<!-- note -->", ""),
    ("It is {{convert|5|km|mi}} or {{convert|5|to|9|km|mi}} away&nbsp;now. ", "It is 5 km or 5 to 9 km away now. "),
    ("Greek ({{lang-el|λόγος}}; {{IPAc-en|l|o}}) {{lang|fr|mot}}. ", "Greek (λόγος) mot. "),
    ("Empty ({{IPAc-en|a}}) parentheses {{citation needed}}, [http://a.b named]. ", "Empty parentheses, named. "),
    (PAGE.partition(SENTENCE)[0], ""),
    (PAGE, f"{SENTENCE}\n\n{SENTENCE} Again."),
])  # fmt: skip
def test_wikitext_becomes_prose(source, expected):
    end = "" if source is PAGE else SENTENCE
    assert wikitext.prose(source + end) == expected + end


@pytest.mark.parametrize("template", "$A|<bos> $A|<one> <two> $A|<bos> $A <eos>|$A <eos>|<same> <same> $A <same>".split("|"))
def test_samples_begin_as_the_tokenizer_begins_a_text(paragraphs, tokenizer, template):
    tokenizer = dressed(tokenizer, template)
    front = tokenizer.convert_tokens_to_ids(template.partition("$A")[0].split())
    assert text.beginning(tokenizer) == front
    length = 16 - len(front)
    for split in text.SPLITS:
        own = tokenizer("\n\n".join(text.documents(paragraphs, split)), add_special_tokens=False).input_ids
        count = len(own) // length
        # All of the text, in order: no token of it is in two samples.
        expected = [front + own[at : at + length] for at in range(0, count * length, length)]
        assert text.sample_tokens(paragraphs, split, tokenizer, count, 16).tolist() == expected
        drawn = text.sample_tokens(paragraphs, split, tokenizer, count, 16, seed=3).tolist()
        assert sorted(drawn) == sorted(expected) and drawn != expected
        with pytest.raises(ReconError, match=f"own.txt' holds: it has {len(own)} tokens, {count} samples of that length"):
            text.sample_tokens(paragraphs, split, tokenizer, count + 1, 16)


def test_samples_depend_on_the_seed_alone_and_are_the_callers_own(tokenizer):
    state = torch.get_rng_state()
    draw = [text.sample_tokens("news", "calibration", tokenizer, 8, 64, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(draw[0], draw[1]) and not torch.equal(draw[0], draw[2])
    draw[0].zero_()
    assert torch.equal(text.sample_tokens("news", "calibration", tokenizer, 8, 64, seed=0), draw[1])
    assert torch.equal(torch.get_rng_state(), state)


def test_text_is_tokenised_again_by_a_changed_tokenizer(tokenizer):
    changed = dressed(tokenizer, "$A")
    draw = [text.sample_tokens("news", "validation", changed, 2, 16, protocol="joined")]
    changed.backend_tokenizer.post_processor = dressed(tokenizer, "<one> $A").backend_tokenizer.post_processor
    draw.append(text.sample_tokens("news", "validation", changed, 2, 16, protocol="joined"))
    assert torch.equal(draw[0].flatten()[:-1], draw[1].flatten()[1:])


def test_what_cannot_be_sampled_is_refused(paragraphs, tokenizer, tmp_path):
    class Odd:
        def __call__(self, text, add_special_tokens=True, **options):
            found = tokenizer(text, add_special_tokens=add_special_tokens, **options)
            return type(found)({"input_ids": found.input_ids[::-1] if add_special_tokens else found.input_ids})

    (tmp_path / "short.txt").write_text("only one")
    two = dressed(tokenizer, "<one> <two> $A")
    assert text.sample_tokens(paragraphs, "evaluation", two, 1, 3).shape == (1, 3)
    for said, name, split, by, samples, length, protocol in (
        ("cannot be told which tokens Odd puts in front", paragraphs, "evaluation", Odd(), 1, 16, "samples"),
        ("protocol 'packed'; allowed: .* samples, joined", paragraphs, "evaluation", tokenizer, 1, 16, "packed"),
        ("0 samples .*; allowed: at least 1", paragraphs, "evaluation", tokenizer, 0, 16, "samples"),
        ("samples must be of at least 2 tokens, not 1", paragraphs, "evaluation", tokenizer, 1, 1, "samples"),
        ("at least 3 tokens, not 2: the tokenizer puts 2 in front", paragraphs, "evaluation", two, 1, 2, "samples"),
        ("short.txt' is empty", str(tmp_path / "short.txt"), "evaluation", tokenizer, 1, 2, "samples"),
        ("unknown split 'test'; choose one of calibration, validation, evaluation", "news", "test", tokenizer, 1, 16, "samples"),
    ):
        with pytest.raises(ReconError, match=said):
            text.sample_tokens(name, split, by, samples, length, protocol=protocol)


def write(path, documents):
    """The same documents in the format that the suffix names."""
    if path.suffix == ".txt":
        path.write_text("\n \n\n".join(documents) + "\n")
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps({"text": document, "id": 1}) for document in documents) + "\n\n")
    else:
        datasets.Dataset.from_dict({"id": list(range(len(documents))), "text": documents}).to_parquet(path)
    return str(path)


def test_all_formats_read_the_same_and_fingerprints_tell_texts_apart(tmp_path):
    documents = [f"paragraph {n}\nwith a second line é" for n in range(16)]
    names = [write(tmp_path / f"text{suffix}", documents) for suffix in text.FORMATS]
    for name in names:
        assert [len(text.documents(name, split)) for split in text.SPLITS] == [10, 2, 4]
        assert text.documents(name, "validation") == [documents[5], documents[13]]
    for suffix in text.FORMATS[:2]:  # as some editors write it, with a byte order mark
        (tmp_path / f"marked{suffix}").write_bytes(b"\xef\xbb\xbf" + (tmp_path / f"text{suffix}").read_bytes())
        names.append(str(tmp_path / f"marked{suffix}"))
    other = write(tmp_path / "b.txt", documents[:-1])
    assert len({text.fingerprint(name) for name in names}) == 1
    assert len({text.fingerprint(name) for name in (*names, other, *text.TEXTS)}) == 2 + len(text.TEXTS)


@pytest.mark.parametrize(("filename", "content", "message"), [
    ("a.csv", "x", r"unknown text '.*a.csv'; .*existing .txt, .jsonl, .parquet file"),
    ("a.txt", b"\xff\xfe\xff", "a.txt' cannot be read .*utf-8"),
    ("a.jsonl", '{"text": "a"}\n\n{"text": ', "a.jsonl' cannot be read .*JSON"),
    ("a.jsonl", '{"text": "a"}\n{"txt": "b"}', 'have a string "text"'),
    ("a.jsonl", '{"text": null}', 'have a string "text"'),
    ("a.jsonl", '{"text": "half of a character: \\ud83d"}', "a.jsonl' cannot be read .*surrogates"),
    ("a.parquet", "nonsense", "a.parquet' cannot be read"),
    ("a.parquet", [b"bytes"], "a.parquet' cannot be read .*'bytes' object has no attribute 'encode'"),
])  # fmt: skip
def test_bad_files(tmp_path, filename, content, message):
    if isinstance(content, list):
        datasets.Dataset.from_dict({"text": content}).to_parquet(tmp_path / filename)
    else:
        (tmp_path / filename).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ReconError, match=message):
        text.documents(str(tmp_path / filename), "calibration")
    with pytest.raises(ReconError, match="unknown text .*wikipedia, news, code, c4, wikitext2, or the path of an"):
        text.fingerprint(str(tmp_path / "none.txt"))


def test_c4(tmp_path, monkeypatch, tokenizer):
    for part, file in text.HUB["c4"]["data_files"].items():
        (path := tmp_path / "c4" / file).parent.mkdir(parents=True, exist_ok=True)
        rows = [{"text": f"{part} page {n}", "timestamp": "2019-04-25T12:57:54Z", "url": "u"} for n in range(50)]
        path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    limits = {"limits": {"train": 40, "validation": 20}}
    before = text.fingerprint("c4")
    monkeypatch.setitem(text.HUB, "c4", text.HUB["c4"] | {"path": str(tmp_path / "c4")} | limits)
    assert text.fingerprint("c4") != before
    found = {split: text.documents("c4", split) for split in text.SPLITS}
    assert found["evaluation"] == [f"validation page {n}" for n in range(20)]
    assert found["validation"] == [f"train page {n}" for n in range(5, 40, 8)]
    assert set(found["calibration"]) == {f"train page {n}" for n in range(40)} - set(found["validation"])
    tokenizer = dressed(tokenizer, "<bos> $A")
    whole = tokenizer(" ".join(found["evaluation"]), return_tensors="pt").input_ids  # as published
    assert torch.equal(text.sample_tokens("c4", "evaluation", tokenizer, 1, whole.numel(), protocol="joined"), whole)
    monkeypatch.setitem(text.HUB, "c4", text.HUB["c4"] | {"path": str(tmp_path / "nowhere")})
    with pytest.raises(ReconError, match="'c4' could not be read from .*nowhere.*'wikipedia', 'news' and 'code' need no hub"):
        text.documents("c4", "calibration")


def test_wikitext2_is_joined_as_published(tmp_path, monkeypatch, tokenizer):
    config, tokenizer = text.HUB["wikitext2"]["config"], dressed(tokenizer, "<bos> $A <eos>")
    for part in ("train", "validation", "test"):
        rows = ["", f" = {part} = \n", "", f" Some {part} sentence . \n", f" Some {part} sentence . \n"]
        datasets.Dataset.from_dict({"text": rows}).to_parquet(tmp_path / config / f"{part}-00000-of-00001.parquet")
    files = [{"split": p, "path": f"{config}/{p}-*"} for p in ("train", "validation", "test")]
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n- {json.dumps({'config_name': config, 'data_files': files})}\n---\n")
    monkeypatch.setitem(text.HUB, "wikitext2", text.HUB["wikitext2"] | {"path": str(tmp_path)})
    for split, part in {"calibration": "train", "validation": "validation", "evaluation": "test"}.items():
        rows = text.documents("wikitext2", split)
        assert rows == ["", f" = {part} = \n", "", *[f" Some {part} sentence . \n"] * 2]
    expected = tokenizer("\n\n".join(rows), return_tensors="pt").input_ids[0]
    found = text.sample_tokens("wikitext2", "evaluation", tokenizer, 3, len(expected) // 3, protocol="joined")
    assert found.dtype == torch.int64 and torch.equal(found.flatten(), expected[: found.numel()])
