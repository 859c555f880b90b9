import ast
import copy
import gzip
import json
import logging

import pytest
import torch
from tokenizers import processors
from transformers import PreTrainedTokenizer

from recon.data import assets, text, wikitext
from recon.errors import ReconError

BUNDLED = ("wikipedia", "news", "code")


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(assets.bundled_model("smollm2-135m"))


@pytest.fixture
def paragraphs(tmp_path):
    """A text file of 40 different paragraphs of ten words."""
    file = tmp_path / "own.txt"
    file.write_text("\n\n".join(" ".join(f"word{n}x{k}" for k in range(10)) for n in range(40)))
    return str(file)


# ---- splits


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_splits_are_disjoint_and_not_empty(name):
    splits = [set(text.documents(name, split)) for split in text.SPLITS]
    assert all(splits)
    assert sum(map(len, splits)) == len(set.union(*splits))


def test_documents_are_dealt_by_position(paragraphs):
    found = {split: [int(d[4:].split("x")[0]) % 8 for d in text.documents(paragraphs, split)] for split in text.SPLITS}
    assert {split: set(places) for split, places in found.items()} == text.DEAL
    assert sum(map(len, found.values())) == 40


@pytest.mark.parametrize("deal", [text.DEAL, text.DEAL_NEWS])
def test_a_deal_gives_every_position_to_one_split(deal):
    assert sorted(place for places in deal.values() for place in places) == list(range(8))


def test_repeated_documents_count_once(tmp_path):
    file = tmp_path / "twice.txt"
    file.write_text("\n\n".join(["same"] * 8 + [f"other {n}" for n in range(7)]))
    assert [d for split in text.SPLITS for d in text.documents(str(file), split)].count("same") == 1


def test_news_is_read_in_its_encoding():
    news = [document for split in text.SPLITS for document in text.documents("news", split)]
    assert len(news) == 343
    assert any("his £3,000 satelite" in document for document in news)


def test_unknown_split():
    with pytest.raises(ReconError, match="unknown split 'test'; choose one of calibration, validation, evaluation"):
        text.documents("news", "test")


# ---- code


def test_code_is_dealt_by_whole_files():
    found = {split: text.documents("code", split) for split in text.SPLITS}
    assert [len(found[split]) for split in text.SPLITS] == [13, 2, 5]
    for document in sum(found.values(), []):
        assert len(list(ast.parse(document).body)) > 3 and '"""' in document
    # Runs of 40 words that calibration and evaluation share are next to none.
    words = {split: " ".join(found[split]).split() for split in text.SPLITS}
    seen = {tuple(words["calibration"][i : i + 40]) for i in range(len(words["calibration"]))}
    shared = sum(tuple(words["evaluation"][i : i + 40]) in seen for i in range(len(words["evaluation"])))
    assert shared < 0.01 * len(words["evaluation"])


# ---- wikitext


def test_wikipedia_reads_as_prose():
    articles = [document for split in text.SPLITS for document in text.documents("wikipedia", split)]
    assert len(articles) > 90 and sum(map(len, articles)) > 2_000_000
    assert min(map(len, articles)) >= text.SHORTEST_ARTICLE
    for markup in ("{{", "}}", "[[", "]]", "''", "==", "<ref", "|", "&nbsp;", "Category:", "#REDIRECT", "()", "  "):
        assert not [article for article in articles if markup in article], markup
    assert any(article.startswith("Anarchism is a political philosophy that advocates") for article in articles)


SENTENCE = "This sentence is here because a paragraph has to have some length before it counts."


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("'''Bold''' and ''[[Page name|shown]]'' words. ", "Bold and shown words. "),
        ("A fact.<ref>Book, {{cite book|title=T}}</ref><ref name=a /> ", "A fact. "),
        ("[[File:A.jpg|thumb|Its [[link]] caption.]]{{Infobox|a=b}}<!-- note -->", ""),
        ("It is {{convert|5|km|mi}} or {{convert|5|to|9|km|mi}} away&nbsp;now. ", "It is 5 km or 5 to 9 km away now. "),
        ("Greek ({{lang-el|λόγος}}; {{IPAc-en|l|o}}) {{lang|fr|mot}}. ", "Greek (λόγος) mot. "),
        ("Empty ({{IPAc-en|a}}) parentheses {{citation needed|date=May}}, [http://a.b named]. ",)
        + ("Empty parentheses, named. ",),
    ],
)
def test_inline_markup(source, expected):
    assert wikitext.prose(source + SENTENCE) == expected + SENTENCE


def test_what_is_no_prose_is_left_out():
    source = f"""{{{{Hatnote}}}}
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
    assert wikitext.prose(source) == f"{SENTENCE}\n\n{SENTENCE} Again."


# ---- tokens


def test_the_published_protocol(paragraphs, dressed):
    tokenizer = dressed("<bos> $A <eos>")
    joined = "\n\n".join(text.documents(paragraphs, "evaluation"))
    expected = tokenizer(joined, return_tensors="pt").input_ids[0]
    windows = text.sample_tokens(paragraphs, "evaluation", tokenizer, 3, 16, protocol="joined")
    assert windows.dtype == torch.int64
    assert torch.equal(windows, expected[:48].view(3, 16))
    drawn = torch.randperm(len(expected) // 16, generator=torch.Generator().manual_seed(1))[:3]
    seeded = text.sample_tokens(paragraphs, "evaluation", tokenizer, 3, 16, seed=1, protocol="joined")
    assert torch.equal(seeded, expected[: len(expected) // 16 * 16].view(-1, 16)[drawn])


@pytest.fixture
def dressed(tokenizer):
    """Factory of tokenizers that put around a text what a template says, such as "<bos> $A"."""

    def make(template: str, fast: bool = True):
        if not fast:
            return ByteTokenizer(template)
        made = copy.deepcopy(tokenizer)
        special = [part for part in template.split() if part != "$A"]
        made.add_special_tokens({"additional_special_tokens": special})
        pairs = [(name, made.convert_tokens_to_ids(name)) for name in special]
        made.backend_tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=pairs)
        return made

    return make


class ByteTokenizer(PreTrainedTokenizer):
    """A slow tokenizer: bytes are tokens."""

    def __init__(self, template: str):
        self.front, _, self.behind = (part.split() for part in template.partition("$A"))
        super().__init__(additional_special_tokens=self.front + self.behind)

    vocab_size = 256

    def get_vocab(self) -> dict[str, int]:
        return {chr(n): n for n in range(256)} | self.added_tokens_encoder

    def _tokenize(self, text: str) -> list[str]:
        return [chr(byte) for byte in text.encode()]

    def _convert_token_to_id(self, token: str) -> int:
        return ord(token)

    def _convert_id_to_token(self, index: int) -> str:
        return chr(index)

    def build_inputs_with_special_tokens(self, ids, pair=None) -> list[int]:
        front, behind = map(self.convert_tokens_to_ids, (self.front, self.behind))
        return front + ids + behind


@pytest.mark.parametrize("fast", [True, False], ids=["fast", "slow"])
@pytest.mark.parametrize(
    "template", ["$A", "<bos> $A", "<one> <two> $A", "<bos> $A <eos>", "$A <eos>", "<same> <same> $A <same>"]
)
def test_samples_begin_as_the_tokenizer_begins_a_text(paragraphs, dressed, template, fast):
    tokenizer = dressed(template, fast)
    front = tokenizer.convert_tokens_to_ids(template.partition("$A")[0].split())
    assert text.beginning(tokenizer) == front
    length = 16 - len(front)
    for split in text.SPLITS:
        own = tokenizer("\n\n".join(text.documents(paragraphs, split)), add_special_tokens=False).input_ids
        count = len(own) // length
        samples = text.sample_tokens(paragraphs, split, tokenizer, count, 16)
        assert samples.shape == (count, 16)
        # All of the text, in order: no token of it is in two samples.
        assert samples.tolist() == [front + own[at : at + length] for at in range(0, count * length, length)]
        with pytest.raises(ReconError, match=f"has {len(own)} tokens, {count} samples of that length"):
            text.sample_tokens(paragraphs, split, tokenizer, count + 1, 16)
        assert not {*tokenizer.convert_tokens_to_ids(template.partition("$A")[2].split())} & {
            *samples[:, len(front) :].flatten().tolist()
        }


@pytest.mark.parametrize("name", assets.BUNDLED_MODELS)
def test_samples_begin_as_the_bundled_tokenizers_begin_a_text(name):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(assets.bundled_model(name))
    front = {"smollm2-135m": [], "gemma3-270m": [tokenizer.bos_token_id]}[name]
    assert text.beginning(tokenizer) == front
    whole = tokenizer("\n\n".join(text.documents("news", "validation")), verbose=False).input_ids
    samples = text.sample_tokens("news", "validation", tokenizer, 20, 64)
    assert samples[:, : len(front)].tolist() == [front] * 20
    assert samples[:, len(front) :].flatten().tolist() == whole[len(front) :][: 20 * (64 - len(front))]


def test_no_text_is_in_two_splits_however_samples_begin(paragraphs, dressed):
    tokenizer = dressed("<bos> $A")
    numbers = []
    for split in text.SPLITS:
        words = tokenizer.decode(text.sample_tokens(paragraphs, split, tokenizer, 3, 64)[:, 1:].flatten()).split()
        numbers.append({word.partition("x")[0] for word in words[1:-1]})  # those at the ends may be cut
    assert all(numbers) and sum(map(len, numbers)) == len(set.union(*numbers))


def test_a_tokenizer_that_changes_a_text_with_its_special_tokens_is_refused(paragraphs, tokenizer):
    class Odd:
        def __call__(self, text, add_special_tokens=True, **options):
            found = tokenizer(text, add_special_tokens=add_special_tokens, **options)
            return type(found)({"input_ids": found.input_ids[::-1] if add_special_tokens else found.input_ids})

    with pytest.raises(ReconError, match="cannot be told which tokens Odd puts in front"):
        text.sample_tokens(paragraphs, "evaluation", Odd(), 1, 16)


def test_an_unknown_protocol(paragraphs, tokenizer):
    with pytest.raises(ReconError, match="unknown protocol 'packed'; allowed: samples, joined"):
        text.sample_tokens(paragraphs, "evaluation", tokenizer, 1, 16, protocol="packed")


def test_windows_do_not_overlap(tokenizer):
    # with every window drawn, a random choice is a permutation of the cut-up text
    ordered = text.sample_tokens("news", "validation", tokenizer, 86, 128)
    drawn = text.sample_tokens("news", "validation", tokenizer, 86, 128, seed=3)
    assert not torch.equal(drawn, ordered)
    assert sorted(drawn.tolist()) == sorted(ordered.tolist())
    assert len({tuple(window) for window in drawn.tolist()}) == 86


def test_seeds(tokenizer):
    draw = [text.sample_tokens("news", "calibration", tokenizer, 8, 64, seed=seed) for seed in (0, 0, 1)]
    assert draw[0].shape == (8, 64)
    assert torch.equal(draw[0], draw[1]) and not torch.equal(draw[0], draw[2])


def test_sampling_leaves_torch_s_generator_alone(tokenizer):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    text.sample_tokens("news", "calibration", tokenizer, 2, 64, seed=1)
    assert torch.equal(before, torch.get_rng_state())


def test_returned_tokens_are_the_caller_s_own(tokenizer):
    first = text.sample_tokens("news", "validation", tokenizer, 2, 64)
    kept = first.clone()
    first.zero_()
    assert torch.equal(text.sample_tokens("news", "validation", tokenizer, 2, 64), kept)


def test_a_text_is_tokenised_once_until_it_changes(paragraphs, tokenizer, monkeypatch, tmp_path):
    first = text.sample_tokens(paragraphs, "evaluation", tokenizer, 2, 16)
    with monkeypatch.context() as patch:
        patch.setattr(text, "documents", lambda name, split: pytest.fail("read again"))
        assert torch.equal(text.sample_tokens(paragraphs, "evaluation", tokenizer, 2, 16), first)
    (tmp_path / "own.txt").write_text("\n\n".join(f"entirely different words, number {n}" for n in range(40)))
    assert not torch.equal(text.sample_tokens(paragraphs, "evaluation", tokenizer, 2, 16), first)


def _refused(name, make):
    raise ReconError("the cache folder cannot be written")


def test_a_bundled_text_is_tokenised_once_for_all_processes(tokenizer, dressed, monkeypatch):
    def draw(by):
        monkeypatch.setattr(text, "_TOKENS", {})  # as in another process
        return text.sample_tokens("news", "validation", by, 2, 16, protocol="joined")

    first, other = draw(tokenizer), draw(dressed("<one> $A"))
    assert not torch.equal(first, other)  # kept apart
    with monkeypatch.context() as patch:
        patch.setattr(type(tokenizer), "__call__", lambda *given, **options: pytest.fail("tokenised again"))
        assert torch.equal(draw(tokenizer), first)

    monkeypatch.setattr(text, "cached", _refused)
    assert torch.equal(draw(tokenizer), first)


def test_no_warning_about_long_texts(tokenizer, caplog, monkeypatch):
    monkeypatch.setattr(tokenizer, "model_max_length", 64)
    monkeypatch.setattr(tokenizer, "deprecation_warnings", {})  # it warns once in its life
    monkeypatch.setattr(text, "_TOKENS", {})
    monkeypatch.setattr(text, "cached", _refused)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    text.sample_tokens("news", "validation", tokenizer, 1, 64)
    assert "longer than" not in caplog.text
    tokenizer("word " * 100)
    assert "longer than" in caplog.text  # it would have been seen


def test_more_than_there_is(paragraphs, tokenizer):
    count = len(tokenizer("\n\n".join(text.documents(paragraphs, "validation"))).input_ids)
    with pytest.raises(ReconError) as error:
        text.sample_tokens(paragraphs, "validation", tokenizer, 1000, 16)
    for part in ("1000 samples of 16 tokens", "validation split", "own.txt", f"{count} tokens, {count // 16} samples"):
        assert part in str(error.value)


def test_too_small_numbers(tokenizer, dressed):
    with pytest.raises(ReconError, match="samples must be at least 1, not 0"):
        text.sample_tokens("news", "calibration", tokenizer, 0, 64)
    with pytest.raises(ReconError, match="sequence_length must be at least 2 tokens, not 1"):
        text.sample_tokens("news", "calibration", tokenizer, 1, 1)
    with pytest.raises(ReconError, match="sequence_length must be at least 3 tokens, not 2: the tokenizer puts 2 in front"):
        text.sample_tokens("news", "calibration", dressed("<one> <two> $A"), 1, 2)
    assert text.sample_tokens("news", "calibration", dressed("<one> <two> $A"), 1, 3).shape == (1, 3)


# ---- local files


def write(path, documents):
    """The same documents in the format that the suffix names."""
    if path.suffix == ".txt":
        path.write_text("\n \n\n".join(documents) + "\n")
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps({"text": document, "id": 1}) for document in documents) + "\n\n")
    else:
        import datasets

        datasets.Dataset.from_dict({"id": list(range(len(documents))), "text": documents}).to_parquet(path)
    return str(path)


def test_all_formats_read_the_same(tmp_path):
    documents = [f"paragraph {n}\nwith a second line é" for n in range(16)]
    names = [write(tmp_path / f"text{suffix}", documents) for suffix in text.SUFFIXES]
    for name in names:
        assert [len(text.documents(name, split)) for split in text.SPLITS] == [10, 2, 4]
        assert text.documents(name, "validation") == [documents[5], documents[13]]
    assert len({text.fingerprint(name) for name in names}) == 1


def test_whether_a_text_is_here_is_told_without_fetching_it(paragraphs, tmp_path, monkeypatch):
    monkeypatch.setenv("RECON_CACHE", str(tmp_path))
    monkeypatch.setattr(assets, "_download", lambda *given: pytest.fail("fetched"))
    assert [text.is_fetched(name) for name in (paragraphs, *text.TEXTS)] == [True] + [False] * len(text.TEXTS)


def test_fingerprints_tell_texts_apart(tmp_path):
    documents = [f"paragraph {n}" for n in range(16)]
    one, other = write(tmp_path / "a.txt", documents), write(tmp_path / "b.txt", documents[:-1])
    prints = [text.fingerprint(name) for name in (one, other, *text.TEXTS)]
    assert len(set(prints)) == len(prints) and {len(p) for p in prints} == {64}
    assert text.fingerprint("news") == text.fingerprint("news")


def test_a_hub_text_s_fingerprint_follows_its_revision(monkeypatch):
    before = text.fingerprint("c4")
    monkeypatch.setitem(text.HUB, "c4", text.HubText("allenai/c4", revision="abc"))
    assert text.fingerprint("c4") != before


@pytest.mark.parametrize(
    ("filename", "content", "message"),
    [
        ("a.csv", "x", r"unknown text '.*a.csv'; .*existing .txt, .jsonl, .parquet file"),
        ("a.txt", " \n\n ", "a.txt' is empty"),
        ("a.txt", b"\xff\xfe\xff", "a.txt' cannot be read: .*utf-8"),
        ("a.jsonl", '{"text": "a"}\n\n{"text": ', "a.jsonl', line 3: not JSON"),
        ("a.jsonl", '{"text": "a"}\n{"txt": "b"}', 'line 2: no string under the key "text"'),
        ("a.jsonl", '{"text": null}', 'line 1: no string under the key "text"'),
        ("a.jsonl", "[1]", 'line 1: no string under the key "text"'),
        ("a.parquet", "nonsense", "a.parquet' cannot be read as Parquet"),
    ],
)
def test_bad_files(tmp_path, filename, content, message):
    file = tmp_path / filename
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ReconError, match=message):
        text.documents(str(file), "calibration")


def test_parquet_without_text(tmp_path):
    import datasets

    datasets.Dataset.from_dict({"body": ["a"], "id": [1]}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(ReconError, match='no column "text"; its columns are body, id'):
        text.documents(str(tmp_path / "a.parquet"), "calibration")


def test_unknown_text_and_missing_file(tmp_path):
    with pytest.raises(ReconError, match="unknown text 'wikipdia'.*wikipedia, news, code, c4, wikitext2, or the path of an"):
        text.documents("wikipdia", "calibration")
    for missing in (str(tmp_path / "none.txt"), str(tmp_path)):
        with pytest.raises(ReconError, match="unknown text .*wikipedia, news"):
            text.fingerprint(missing)


def test_an_empty_split(tmp_path, tokenizer):
    file = write(tmp_path / "short.txt", ["only one"])
    with pytest.raises(ReconError, match="the evaluation split of text .*short.txt' is empty"):
        text.sample_tokens(file, "evaluation", tokenizer, 1, 2)


# ---- hub texts, from local folders in the hub's own formats


@pytest.fixture
def c4(tmp_path, monkeypatch):
    source = text.HUB["c4"]
    for part, file in source.data_files.items():
        path = tmp_path / "c4" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [{"text": f"{part} page {n}", "timestamp": "2019-04-25T12:57:54Z", "url": "u"} for n in range(50)]
        path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    limits = {"train": 40, "validation": 20}
    monkeypatch.setitem(text.HUB, "c4", text.HubText(str(tmp_path / "c4"), None, source.data_files, None, limits))


@pytest.fixture
def wikitext2(tmp_path, monkeypatch):
    import datasets

    config = text.HUB["wikitext2"].config
    folder = tmp_path / "wikitext"
    for part in ("train", "validation", "test"):
        rows = ["", f" = {part} = \n", "", f" Some {part} sentence . \n", f" Some {part} sentence . \n"]
        datasets.Dataset.from_dict({"text": rows}).to_parquet(folder / config / f"{part}-00000-of-00001.parquet")
    files = [{"split": p, "path": f"{config}/{p}-*"} for p in ("train", "validation", "test")]
    (folder / "README.md").write_text(f"---\nconfigs:\n- {json.dumps({'config_name': config, 'data_files': files})}\n---\n")
    monkeypatch.setitem(text.HUB, "wikitext2", text.HubText(str(folder), config))


def test_c4(c4):
    found = {split: text.documents("c4", split) for split in text.SPLITS}
    assert found["evaluation"] == [f"validation page {n}" for n in range(20)]
    assert found["validation"] == [f"train page {n}" for n in range(5, 40, 8)]
    assert set(found["calibration"]) == {f"train page {n}" for n in range(40)} - set(found["validation"])


def test_wikitext2_is_joined_as_published(wikitext2, tokenizer):
    for split, part in {"calibration": "train", "validation": "validation", "evaluation": "test"}.items():
        rows = text.documents("wikitext2", split)
        assert rows == ["", f" = {part} = \n", "", *[f" Some {part} sentence . \n"] * 2]
    expected = tokenizer("\n\n".join(rows)).input_ids
    found = text.sample_tokens("wikitext2", "evaluation", tokenizer, 1, len(expected), protocol="joined")
    assert found.tolist() == [expected]


def test_a_hub_out_of_reach(tmp_path, monkeypatch):
    monkeypatch.setitem(text.HUB, "c4", text.HubText(str(tmp_path / "nowhere")))
    with pytest.raises(ReconError, match="'c4' could not be read from .*nowhere.*'wikipedia', 'news' and 'code' need no hub"):
        text.documents("c4", "calibration")
