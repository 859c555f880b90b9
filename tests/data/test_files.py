"""Checkpoints whose files are damaged, lie, or lead elsewhere are refused by name; whole ones are found whole."""

import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from fixtures.runs import record_of
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, safetensors_conversion

import recon
from recon.data import files, models
from recon.errors import ReconError
from recon.runtime.storage import sha256

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def sharded_folder(tiny_folder, tmp_path_factory) -> Path:
    """The tiny model in several shards with an index."""
    folder = Path(shutil.copytree(tiny_folder, tmp_path_factory.mktemp("shards") / "sharded"))
    (folder / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(tiny_folder).save_pretrained(folder, max_shard_size="60KB")
    return folder


@pytest.fixture
def sharded(sharded_folder, tmp_path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(sharded_folder, tmp_path / "sharded"))


@pytest.fixture
def folder(tiny_folder, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_folder, tmp_path / "copy"))


def change_index(folder: Path, change) -> None:
    content = json.loads((folder / INDEX).read_text())
    content["weight_map"] = change(content["weight_map"])
    (folder / INDEX).write_text(json.dumps(content))


def flip_a_bit(file: Path, place: int = -100) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)


def hub_cache(folder: Path, home: Path) -> Path:
    """The files of `folder` laid out as in the Hub's cache: links from a snapshot to blobs named after their hash."""
    snapshot, blobs = home / "models--me--tiny" / "snapshots" / ("a" * 40), home / "models--me--tiny" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in folder.iterdir():
        name = files.sha256(file)
        shutil.copy(file, blobs / name)
        (snapshot / file.name).symlink_to(f"../../blobs/{name}")
    return snapshot


# ---- whole checkpoints


def test_shards_are_found_whole(tiny_folder, sharded):
    assert files.shards(tiny_folder) == [Path(tiny_folder) / "model.safetensors"]
    found = files.shards(sharded)
    assert found == sorted(sharded.glob("*.safetensors")) and len(found) > 2
    assert set().union(*map(files.tensor_names, found)) == set(load_file(f"{tiny_folder}/model.safetensors"))
    one, many = (models.load(str(f))[0].state_dict() for f in (tiny_folder, sharded))
    assert all(torch.equal(one[name], many[name]) for name in one)


def test_the_links_of_the_hubs_cache_are_followed(sharded, tmp_path):
    snapshot = hub_cache(sharded, tmp_path / "hub")
    assert len(files.shards(snapshot)) == len(files.shards(sharded))
    assert models.load(str(snapshot))[0].config.num_hidden_layers == 4


def test_shards_in_a_folder_below_are_allowed(sharded):
    (sharded / "weights").mkdir()
    for file in sharded.glob("*.safetensors"):
        file.rename(sharded / "weights" / file.name)
    change_index(sharded, lambda places: {tensor: f"weights/{file}" for tensor, file in places.items()})
    assert {file.parent.name for file in files.shards(sharded)} == {"weights"}


# ---- the index


@pytest.mark.parametrize(
    "text, said",
    [
        ("{", "is no index"),
        ("[]", "is no index"),
        ("{}", "is no index.*weight_map"),
        ('{"weight_map": []}', "is no index"),
        ('{"weight_map": {"a": 3, "b": "x.safetensors"}}', "is no index"),
        ('{"weight_map": {}}', "empty weight_map"),
    ],
)
def test_what_is_no_index_is_refused(sharded, text, said):
    (sharded / INDEX).write_text(text)
    with pytest.raises(ReconError, match=f"(?s){INDEX} .*{said}|{INDEX} has an {said}"):
        files.shards(sharded)


def test_an_index_that_lies_is_refused(sharded):
    first, second, *_ = sorted(sharded.glob("*.safetensors"))
    moved = sorted(files.tensor_names(first))[0]
    change_index(sharded, lambda places: places | {moved: second.name})
    with pytest.raises(ReconError, match=rf"'{first.name}' holds tensor '{moved}', which .* does not place there"):
        files.shards(sharded)
    change_index(sharded, lambda places: places | {moved: first.name, "model.ghost.weight": second.name})
    with pytest.raises(ReconError, match=rf"places tensor 'model.ghost.weight' in '{second.name}', which does not hold it"):
        files.shards(sharded)
    change_index(sharded, lambda places: {t: f for t, f in places.items() if t not in (moved, "model.ghost.weight")})
    with pytest.raises(ReconError, match=rf"model '{sharded}' cannot be loaded: '{first.name}' holds tensor '{moved}'"):
        models.load(str(sharded))


@pytest.mark.parametrize(
    "name",
    ["../other.safetensors", "a/../../other.safetensors", "/etc/other.safetensors", "C:\\other.safetensors", "..\\o.safetensors", "model.bin"],
)  # fmt: skip
def test_an_index_cannot_name_files_outside(sharded, name):
    change_index(sharded, lambda places: dict.fromkeys(places, name))
    with pytest.raises(ReconError, match="allowed: safetensors files inside the folder") as error:
        files.shards(sharded)
    assert repr(name) in str(error.value)


# ---- the files


def test_a_missing_shard_is_named(sharded):
    gone = sorted(sharded.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(ReconError, match=f"lacks the weights' file '{gone.name}'"):
        files.shards(sharded)


@pytest.mark.parametrize("length", [0, 5, 100, 5000, -1])
def test_a_truncated_shard_is_named(sharded, length):
    broken = sorted(sharded.glob("*.safetensors"))[1]
    os.truncate(broken, length if length >= 0 else broken.stat().st_size - 1)
    with pytest.raises(ReconError, match=rf"'{broken.name}' \([\d,]+ bytes\) is truncated or damaged"):
        files.shards(sharded)


@pytest.mark.parametrize("kind", ["single", "shard"])
def test_a_link_out_of_the_folder_is_refused(folder, sharded, tmp_path, kind):
    place = folder if kind == "single" else sharded
    file = sorted(place.glob("*.safetensors"))[-1]
    file.rename(tmp_path / "elsewhere.safetensors")
    file.symlink_to("../elsewhere.safetensors")
    with pytest.raises(ReconError, match=f"'{file.name}' is a link that leads out of its folder, to '{tmp_path}"):
        files.shards(place)
    file.unlink()
    (tmp_path / "elsewhere.safetensors").rename(place / "inside.safetensors")
    file.symlink_to("inside.safetensors")
    assert file in files.shards(place)


def test_a_link_out_of_the_hubs_blobs_is_refused(folder, tmp_path):
    snapshot = hub_cache(folder, tmp_path / "hub")
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(folder / "model.safetensors")
    with pytest.raises(ReconError, match="leads out of its folder"):
        files.shards(snapshot)


def test_a_folder_without_weights_or_with_pickles_only_is_refused(folder):
    file = folder / "model.safetensors"
    weights = load_file(file)
    file.unlink()
    with pytest.raises(ReconError, match="has neither model.safetensors nor"):
        files.shards(folder)
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(ReconError, match=r"its weights are pickled \(pytorch_model.bin\), and reading a pickle can run any code"):
        files.shards(folder)


# ---- flipped bits, where there are hashes


def test_a_flipped_bit_in_the_hubs_cache_is_found(folder, tmp_path):
    snapshot = hub_cache(folder, tmp_path / "hub")
    files.shards(snapshot)
    flip_a_bit((snapshot / "model.safetensors").resolve())
    with pytest.raises(ReconError, match="'model.safetensors' is damaged: its content does not have the hash"):
        files.shards(snapshot)


def test_a_flipped_bit_in_what_was_saved_with_hashes_is_found(sharded):
    files.write_hashes(sharded)
    assert subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=sharded).returncode == 0
    spoilt = files.shards(sharded)[1]
    flip_a_bit(spoilt)
    with pytest.raises(ReconError, match=f"model '{sharded}' cannot be loaded: '{spoilt.name}' is damaged"):
        models.load(str(sharded))


# ---- the Hub, and code that comes with a model


def test_only_what_is_read_is_fetched_from_the_hub(sharded, folder, tiny_folder, tmp_path, monkeypatch):
    """A stand-in for the download: it copies what is asked for from a repository that has more."""
    from fnmatch import fnmatch

    (sharded / "consolidated.safetensors").write_bytes(b"the same once more")
    (sharded / "modeling.py").write_text("raise SystemExit")

    def download(repository, revision, allow_patterns):
        source = {"me/sharded": sharded, "me/single": folder if revision != "refs/pr/7" else Path(tiny_folder)}[repository]
        target = tmp_path / "fetched" / repository / (revision or "main")
        target.mkdir(parents=True, exist_ok=True)
        for file in source.iterdir():
            if any(fnmatch(file.name, pattern) for pattern in allow_patterns):
                shutil.copy(file, target)
        return str(target)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr(files, "commit", lambda name, revision: revision)
    found = models.folder("me/sharded")
    assert files.shards(found) and models.load("me/single")
    fetched = {file.name for file in found.iterdir()}
    assert {INDEX, "config.json", "tokenizer.json"} < fetched and not {"consolidated.safetensors", "modeling.py"} & fetched
    # A repository with a pickle only: at no other revision than the newest does the Hub offer a conversion.
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    shutil.rmtree(tmp_path / "fetched")
    monkeypatch.setattr(safetensors_conversion, "get_conversion_pr_reference", lambda api, name: "refs/pr/7")
    with pytest.raises(ReconError, match="model 'me/single' at revision 'v1' cannot be loaded: it has neither"):
        models.load("me/single", "v1")
    assert models.load("me/single")


def test_what_is_loaded_from_the_hub_is_the_commit_that_its_fingerprint_names(sharded, tmp_path, monkeypatch):
    """Though a newer one is out, and though another one comes out meanwhile."""
    newest, cache = ["b" * 40], tmp_path / "hub"

    def snapshot(repository, revision=None, allow_patterns=None):
        commit = revision if revision and len(revision) == 40 else newest[0]
        folder = cache / f"models--{repository.replace('/', '--')}" / "snapshots" / commit
        if allow_patterns != ["config.json"] or not folder.is_dir():
            shutil.copytree(sharded, folder, dirs_exist_ok=True)
        if revision is None:
            (folder.parents[1] / "refs").mkdir(exist_ok=True)
            (folder.parents[1] / "refs" / "main").write_text(commit)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    monkeypatch.setattr(
        "huggingface_hub.hf_hub_download", lambda name, file, revision: f"{snapshot(name, revision, [file])}/{file}"
    )
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *args, **options: None)
    first = models.fingerprint("me/model")
    newest[0] = "c" * 40
    assert first == "b" * 40 == models.folder("me/model").name
    files.commit.cache_clear()  # as in another process
    assert models.folder("me/model").name == first == models.fingerprint("me/model")
    assert models.folder("me/model", "d" * 40).name == "d" * 40 == models.fingerprint("me/model", "d" * 40)
    assert models.folder("me/other").name == "c" * 40 == models.fingerprint("me/other")


MODEL = """
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_code_that_comes_with_a_model_is_run_only_where_trusted(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    config = json.loads((folder / "config.json").read_text())
    own = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    # A type that transformers knows is loaded by its own code; the other is not there to be run.
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": own}))
    assert type(models.load(str(folder))[0]).__name__ == "LlamaForCausalLM"
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": own, "model_type": "own"}))
    (folder / "modeling_own.py").write_text(MODEL)
    with pytest.raises(
        ReconError, match=r"type 'own', and the code that comes with it \(modeling_own.OwnConfig.*trust_remote_code"
    ):
        models.load(str(folder))
    assert not (tmp_path / "modules").exists()
    assert type(models.load(str(folder), trust_remote_code=True)[0]).__name__ == "OwnForCausalLM"
    # The code decides about the numbers, so it tells runs apart; a spec that does not run any has the key it always had.
    own = recon.RunSpec.of(model=str(folder), text=f"{folder}/tiny_text.txt", evaluation_texts=f"{folder}/tiny_text.txt")
    keys = [own.key(), own.replaced(trust_remote_code=True).key()]
    (folder / "modeling_own.py").write_text(MODEL + "# changed")
    keys += [own.key(), own.replaced(trust_remote_code=True).key()]
    assert keys[0] == keys[2] and len(set(keys)) == 3


def test_weights_are_written_bit_by_bit(tiny_folder, folder):
    """A flipped bit where there is no hash is found where it makes a number that is none."""
    weights = load_file(f"{tiny_folder}/model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name].view(torch.int32).view(-1)[7] |= 0x7F800000  # all bits of the exponent
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ReconError, match=f"parameter '{name}' holds 1 NaN or infinite values"):
        models.load(str(folder))


def test_the_hash_of_a_large_file_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("RECON_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(files, "LARGE", 4)
    path, computed = tmp_path / "large", []
    monkeypatch.setattr(files, "sha256", lambda path: computed.append(path) or sha256(path))
    for content, count in ((b"first", 1), (b"first", 1), (b"other", 2)):
        if not path.exists() or path.read_bytes() != content:
            path.write_bytes(content)
            os.utime(path, ns=(0, len(computed)))
        files._digest.cache_clear()  # as in another process
        assert files.digest(path) == hashlib.sha256(content).hexdigest() and len(computed) == count
    [kept] = (tmp_path / "cache" / "digests").iterdir()
    kept.write_text("{}")
    files._digest.cache_clear()
    assert files.digest(path) == hashlib.sha256(b"other").hexdigest() and len(computed) == 3


# ---- a run on what is damaged, in memory or streamed


UP = "model.layers.2.mlp.up_proj.weight"


def change_weights(folder: Path, change) -> None:
    """Replaces tensor `UP` by what `change` makes of it, in the shard that has it."""
    file = folder / json.loads((folder / INDEX).read_text())["weight_map"][UP]
    weights = load_file(file)
    save_file(weights | {UP: change(weights[UP])}, file, metadata={"format": "pt"})


def link_out(folder: Path, file: Path) -> None:
    file.rename(folder.parent / "elsewhere.safetensors")
    file.symlink_to("../elsewhere.safetensors")


def pickle_only(folder: Path, file: Path) -> None:
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    torch.save({}, folder / "pytorch_model.bin")


def own_code(folder: Path, file: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    own = {"model_type": "own", "auto_map": {"AutoConfig": "modeling_own.OwnConfig"}}
    (folder / "config.json").write_text(json.dumps(config | own))
    (folder / "modeling_own.py").write_text("raise SystemExit('was run')")


def misplace(places: dict) -> dict:
    return places | {UP: sorted(set(places.values()) - {places[UP]})[0]}


DAMAGES = {
    "truncated": (lambda folder, file: os.truncate(file, file.stat().st_size - 1), "'{file}' .* is truncated or damaged"),
    "flipped": (lambda folder, file: flip_a_bit(file), "'{file}' is damaged: its content does not have the hash"),
    "missing": (lambda folder, file: file.unlink(), "lacks the weights' file '{file}'"),
    "index": (lambda folder, file: change_index(folder, misplace), f"places? tensor '{UP}'|holds tensor '{UP}'"),
    "upwards": (lambda folder, file: change_index(folder, lambda p: p | {UP: "../x.safetensors"}), "names the file '../x.safetensors'"),
    "link": (link_out, "'{file}' is a link that leads out of its folder"),
    "pickle": (pickle_only, r"its weights are pickled \(pytorch_model.bin\)"),
    "code": (own_code, r"type 'own', and the code that comes with it \(modeling_own.OwnConfig\) is not run unless"),
    "shape": (lambda folder, file: change_weights(folder, lambda w: w[:5].contiguous()), rf"{UP}\S* is \(5, 32\), not \(64, 32\)"),
    "integers": (lambda folder, file: change_weights(folder, lambda w: w.to(torch.int8)), f"'{UP}' is stored as I8; allowed"),
    "NaN": (lambda folder, file: change_weights(folder, lambda w: w * torch.nan), f"'{UP}' holds 2048 NaN or infinite values"),
    "infinity": (lambda folder, file: change_weights(folder, lambda w: w + torch.inf), f"'{UP}' holds 2048 NaN or infinite values"),
}  # fmt: skip


def spoiled(folder, damage: str) -> str:
    """Does the damage to the checkpoint in `folder`; what is to be said of it, as a pattern."""
    spoil, said = DAMAGES[damage]
    file = folder / json.loads((folder / INDEX).read_text())["weight_map"][UP]
    if damage == "flipped":
        files.write_hashes(folder)
    spoil(folder, file)
    return said.format(file=file.name)


@pytest.mark.parametrize("stream", ["no", "yes"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_run_on_a_damaged_model_names_what_is_wrong_and_leaves_nothing(
    damage, stream, sharded, tiny_text, tmp_path, monkeypatch
):
    """Neither a checkpoint nor a work folder, in which the same command would find another model once it is whole again."""
    said = spoiled(sharded, damage)
    spec = recon.RunSpec.of(
        model=str(sharded), text=tiny_text, samples=2, sequence_length=16, held_out_samples=0, granularity="block",
        evaluation_texts=(tiny_text,), evaluation_samples=1, evaluation_length=16,
    )  # fmt: skip
    monkeypatch.setattr("recon.methods.prune.prune", lambda *a, **k: pytest.fail("has begun to prune"))
    with pytest.raises(ReconError, match=f"(?s){sharded}.*({said})"):
        record_of(spec, save=tmp_path / "saved", stream=stream)
    assert {path.name for path in tmp_path.iterdir()} <= {"sharded", "elsewhere.safetensors"}


@pytest.mark.parametrize("stream", ["no", "yes"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "index", "upwards", "link", "pickle", "code", "integers"])
def test_a_run_on_a_damaged_pruned_model_names_what_is_wrong_too(
    damage, stream, sharded, tiny_folder, tiny_text, tmp_path, monkeypatch
):
    said = spoiled(sharded, damage)
    spec = recon.RunSpec.of(
        model=tiny_folder, pruned=str(sharded), text=tiny_text, evaluation_texts=(tiny_text,), sequence_length=16
    )
    monkeypatch.setattr("recon.evaluate.perplexity.perplexity", lambda *a, **k: pytest.fail("has begun to compute"))
    with pytest.raises(ReconError, match=f"(?s){sharded}.*({said})"):
        record_of(spec, save=tmp_path / "saved", stream=stream)
    assert {path.name for path in tmp_path.iterdir()} <= {"sharded", "elsewhere.safetensors"}
