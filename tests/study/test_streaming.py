"""A streamed run gives the bits of one in memory, whatever happens to it on the way, and never has the model in memory."""

import contextlib
import errno
import gc
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from fixtures.models import make_model
from fixtures.runs import Death, Killed, comparable, options, record_of, result_of
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import recon
from recon.cli import main
from recon.data import files
from recon.errors import ReconError
from recon.methods.fit import WindowFit
from recon.methods.units import find_units
from recon.model.skeleton import Lazy, auto_class, is_placeholder
from recon.runtime import activations, device
from recon.runtime.folder_store import FolderStore
from recon.study import environment, streaming
from recon.study.home import OnDisk
from recon.study.record import read_record
from recon.study.run import _Run
from recon.study.spec import RunOptions


@pytest.fixture(scope="module")
def spec(tiny_folder, tiny_text):
    return recon.RunSpec.of(
        model=tiny_folder,
        text=tiny_text,
        samples=4,
        epochs=1,
        chunks=1,
        sequence_length=16,
        held_out_samples=2,
        evaluation_texts=(tiny_text,),
        evaluation_samples=2,
        evaluation_length=32,
    )


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """The cache's folder, where runs work that save nothing."""
    monkeypatch.setenv("RECON_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture(scope="module")
def expected(spec, tmp_path_factory):
    """What a run in memory gives: its record, and the folder that it saved to."""
    folder = tmp_path_factory.mktemp("expected") / "saved"
    return record_of(spec, save=folder, stream="no"), folder


def assert_same(found, saved: Path, expected, other: Path) -> None:
    """The same record but for times, and checkpoints that load as the same model."""
    assert comparable(found) == comparable(expected)
    kind = auto_class(AutoConfig.from_pretrained(other))
    ours, theirs = (kind.from_pretrained(folder).state_dict() for folder in (saved, other))
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    index = json.loads((saved / files.INDEX).read_text())["metadata"]
    entries = [tensor for path in saved.glob("*.safetensors") for tensor in load_file(path).values()]
    assert index["total_size"] == sum(tensor.nbytes for tensor in entries)
    assert index["total_parameters"] == sum(tensor.numel() for tensor in entries)
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert (saved / name).read_bytes() == (other / name).read_bytes(), name


CASES = {
    "half-blocks": ("", {}),
    "sparsegpt, mixed, transposed weights": ("gpt2", {"criterion": "sparsegpt", "granularity": "block", "propagation": "mixed"}),
    "single matrices, exact": ("", {"granularity": "matrix", "solver": "exact", "propagation": "dense"}),
    "single matrices, mixed": ("", {"granularity": "matrix", "propagation": "mixed", "samples": 3, "chunks": 2}),
    "parallel blocks": ("phi", {"criterion": "magnitude", "granularity": "2-blocks", "propagation": "sparse", "start": "exact"}),
    "parallel halves, all trained": ("gpt_neox", {"train": "all", "statistics": "dense", "propagation": "dense", "chunks": 4}),
    "experts": ("mixtral", {"propagation": "sparse", "pattern": "2:4"}),
    "experts, biases": ("gpt_oss", {"criterion": "sparsegpt", "propagation": "dense"}),
    "adapters, swaps": ("gemma2", {"adapter": "masklora", "rank": 2, "mask_refinement": 2}),
    "mixed, from exact": ("", {"propagation": "mixed", "start": "exact"}),
    "whole heads and neurons": ("", {"criterion": "wanda-sp", "pattern": "0.3", "propagation": "sparse"}),
    "whole units, biases changed": (
        "gpt2",
        {"criterion": "flap", "pattern": "0.3", "granularity": "block", "propagation": "mixed"},
    ),
    "whole units, pruned only": ("opt", {"criterion": "flap", "pattern": "0.3", "granularity": "none"}),
    "pruned only": ("", {"granularity": "none", "criterion": "ria"}),
    "encoder-decoder": ("bart", {"criterion": "sparsegpt", "granularity": "block", "propagation": "sparse"}),
    "encoder-decoder, biases passed on": ("t5", {"granularity": "2-blocks", "propagation": "mixed", "train": "all"}),
}


def saved_model(family: str, tiny_folder: str, folder: Path, **changes) -> str:
    """A folder with a random model of `family` and the tokenizer of `tiny_folder`."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    make_model(family, vocab_size=len(tokenizer), **changes).save_pretrained(folder, max_shard_size="40KB")
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("case", CASES)
def test_the_bits_of_a_run_in_memory(case, spec, expected, tiny_folder, tmp_path, monkeypatch):
    family, changes = CASES[case]
    spec = spec.replaced(**changes)
    if family:
        spec = spec.replaced(model=saved_model(family, tiny_folder, tmp_path / "model"))
    if changes:
        expected = record_of(spec, save=tmp_path / "other", stream="no"), tmp_path / "other"
    monkeypatch.setattr(activations, "SMALL", 0 if case in ("half-blocks", "mixed, from exact") else 2**20)
    found = record_of(spec, save=tmp_path / "saved", stream="yes")
    assert_same(found, tmp_path / "saved", *expected)
    assert found.environment["streamed"] and not list(tmp_path.glob("*.unfinished"))


def test_masks_from_elsewhere(spec, expected, tmp_path):
    """What is reconstructed starts from another run's checkpoint."""
    given = spec.replaced(pruned=str(expected[1]))
    kept = record_of(given, save=tmp_path / "other", stream="no")
    found = record_of(given, save=tmp_path / "saved", stream="yes")
    assert_same(found, tmp_path / "saved", kept, tmp_path / "other")


def test_without_a_place_to_save_it_works_in_the_cache(spec, expected, cache):
    assert comparable(record_of(spec, stream="yes")) == comparable(expected[0])
    assert not list((cache / "unfinished").iterdir())


@pytest.fixture
def begin(cache):
    """Begins streamed runs: gives one of a spec that has loaded its model and texts."""
    with contextlib.ExitStack() as stack:

        def begin(spec) -> _Run:
            options, session = RunOptions(progress=False), recon.Session()
            home = OnDisk(spec, options, session)
            stack.enter_context(home.locked())
            run = _Run(spec, options, session, home, ())
            run.load()
            home.open()
            return run

        yield begin


def watch(monkeypatch) -> tuple[dict[Lazy, int], list[int]]:
    """Parameters that there are from now on, by model, and how many there were of all models each time that some were read."""
    there, most, plain = {}, [], Lazy.present

    def present(lazy, parameters):
        context = plain(lazy, parameters)

        class Watching:
            def __enter__(self):
                context.__enter__()
                there[lazy] = sum(p.numel() for p in lazy.parameters.values() if not is_placeholder(p))
                most.append(sum(there.values()))

            def __exit__(self, *exception):
                result = context.__exit__(*exception)
                there[lazy] = sum(p.numel() for p in lazy.parameters.values() if not is_placeholder(p))
                return result

        return Watching()

    monkeypatch.setattr(Lazy, "present", present)
    return there, most


@pytest.mark.parametrize("criterion", ["wanda", "flap"])
def test_no_more_than_two_windows_are_there_at_once(criterion, spec, begin, monkeypatch):
    monkeypatch.setattr(activations, "SMALL", 0)
    run = begin(spec.replaced(criterion=criterion))
    there, most = watch(monkeypatch)
    block = max(sum(p.numel() for p in block.parameters()) for block in run.dense.blocks)
    ends, norm = max(p.numel() for p in run.dense.ends.values()), 32
    _, states = run.measure_dense()
    student = run.home.student(None)
    run.prune(student)
    run.measure("pruned", None, student, states)
    gc.collect()
    assert "activations/prune" not in Path("/proc/self/maps").read_text()  # nor activations that were for the next window
    assert max(most) <= max(block + ends, 2 * (ends + norm))  # both heads, for the divergence between the models
    most.clear()
    run.reconstruct(student, masks=run.home.store.masks)
    matrices = [sum(m.weight.numel() for m in run.dense.matrices(w).values()) for w in run.dense.windows("half-block")]
    assert max(matrices) < max(most) <= max(max(matrices) + block - sum(sorted(matrices)[-2:]), ends) + max(matrices)
    assert not any(there.values())


def test_nor_where_one_pass_prunes_and_reconstructs(spec, begin, monkeypatch):
    monkeypatch.setattr(activations, "SMALL", 0)
    run = begin(spec.replaced(criterion="sparsegpt"))
    _, states = run.measure_dense()
    there, most = watch(monkeypatch)
    found = run.prune_and_reconstruct(run.home.student(None))
    block = max(sum(p.numel() for p in block.parameters()) for block in run.dense.blocks)
    ends, norm = max(p.numel() for p in run.dense.ends.values()), 32
    assert max(most) <= max(2 * block, ends)
    most.clear()
    run.measure("pruned", None, run.home.pruned_on_the_way(None, found), states)
    assert max(most) <= max(block + ends, 2 * (ends + norm))
    assert not any(there.values())


def test_of_an_encoder_decoder_too(spec, begin, tiny_folder, tmp_path, monkeypatch):
    """Beside a window there is no more than the encoder's last norm, and the biases that others are called with."""
    model = saved_model("t5", tiny_folder, tmp_path / "model", num_layers=4, tie_word_embeddings=False)
    run = begin(spec.replaced(model=model, granularity="2-blocks", propagation="mixed"))
    there, most = watch(monkeypatch)
    blocks = [sum(p.numel() for p in block.parameters()) for block in run.dense.blocks]
    passed_on = sum(run.dense.model.get_parameter(name).numel() for name in run.dense.shared)
    ends, norm = max(p.numel() for p in run.dense.ends.values()), 32
    assert 0 < passed_on < min(blocks) / 10
    _, states = run.measure_dense()
    student = run.home.student(None)
    run.prune(student)
    run.measure("pruned", None, student, states)
    assert max(blocks) <= max(most) <= max(max(blocks) + passed_on + norm + ends, 2 * (ends + norm))
    assert ends + norm in most  # the head alone
    most.clear()
    run.reconstruct(student, masks=run.home.store.masks)
    window = max(sum(blocks[at : at + 2]) for at in range(0, 8, 2))
    assert window <= max(most) <= 2 * (window + passed_on + norm) + ends < sum(blocks) + 2 * ends
    assert not any(there.values())


# --- resuming -----------------------------------------------------------------------------------------------------------


ROUNDED = {
    "bfloat16": {
        "compute_dtype": "bfloat16",
        "train": "all",
        "propagation": "sparse",
    },  # norms are trained, and not rounded while used
    "float16": {"compute_dtype": "float32", "granularity": "block"},
}


@pytest.mark.parametrize("dtype", ROUNDED)
def test_saved_in_half_the_room(dtype, spec, tmp_path, monkeypatch):
    """Weights are those of the run, rounded; streamed (killed on the way) as in memory, and with the record that nothing was lost for."""
    spec, saved = spec.replaced(**ROUNDED[dtype]), tmp_path / "saved"
    plain = record_of(spec, save=tmp_path / "plain", stream="no")
    kept = record_of(spec, save=tmp_path / "other", stream="no", save_dtype=dtype)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("recon.study.checkpoint.write_card", lambda *_: (_ for _ in ()).throw(Killed))
        record_of(spec, save=saved, stream="yes", save_dtype=dtype)
    store = saved.with_name("saved.unfinished")
    sizes = {name: sum(path.stat().st_size for path in (store / name).glob("*")) for name in ("exact", "checkpoint")}
    assert sizes["exact"] > 0 and (sizes["exact"] < 0.2 * sizes["checkpoint"]) == (dtype == "bfloat16")
    with pytest.raises(ReconError, match=rf"save_dtype was '{dtype}', is 'float32'"):
        record_of(spec, save=saved, stream="yes")
    found = record_of(spec, save=saved, stream="yes", save_dtype=dtype)
    assert_same(found, saved, kept, tmp_path / "other")
    assert comparable(found) == comparable(plain)
    assert found.environment["save_dtype"] == dtype and "save_dtype" not in plain.environment
    model, exact = (AutoModelForCausalLM.from_pretrained(folder) for folder in (saved, tmp_path / "plain"))
    assert model.dtype == getattr(torch, dtype) and json.loads((saved / "config.json").read_text())["dtype"] == dtype
    for (name, ours), (_, theirs) in zip(model.named_parameters(), exact.named_parameters(), strict=True):
        assert torch.equal(ours, theirs.to(model.dtype)) and torch.equal(ours == 0, theirs == 0), name
    cards = [(folder / "README.md").read_text() for folder in (saved, tmp_path / "other", tmp_path / "plain")]
    assert [f"rounded to {dtype}" in card for card in cards] == [True, True, False]


@pytest.mark.parametrize("stream", ["yes", "no"])
def test_what_a_dtype_cannot_hold_is_named_before_anything_long(stream, spec, tiny_folder, tmp_path, monkeypatch):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    content = load_file(folder / "model.safetensors")
    name = "model.layers.2.mlp.up_proj.weight"
    content[name][1, 2] = -1e5
    save_file(content, folder / "model.safetensors", metadata={"format": "pt"})
    spec = spec.replaced(model=str(folder))
    monkeypatch.setattr("recon.study.run._Run.measure_dense", lambda *_: pytest.fail("has begun to compute"))
    with pytest.raises(ReconError, match=rf"'{name}' holds 1e\+05.*float16.*6.55e\+04.*bfloat16"):
        record_of(spec, save=tmp_path / "saved", stream=stream, save_dtype="float16")
    with pytest.raises(ReconError, match="save_dtype is 'float16', but no folder to save to is named"):
        record_of(spec, stream=stream, save_dtype="float16")


def attempt(spec, saved, monkeypatch, points, error=None):
    """A run that dies on the way, or its record where it does not."""
    with monkeypatch.context() as patch:
        death = Death(patch, points, error)
        try:
            return record_of(spec, save=saved, stream="yes")
        except Killed:
            return None
        finally:
            gc.collect()
            assert death.dead or death.left > 0 or error


def test_killed_again_and_again(spec, expected, tmp_path, monkeypatch):
    """After a few writes to the disk, and a few more each time, so that every kind of write is the last one now and then."""
    monkeypatch.setattr(activations, "SMALL", 0)
    saved, attempts, record = tmp_path / "saved", 0, None
    while record is None:
        assert attempts < 30
        record = attempt(spec, saved, monkeypatch, 8 + 5 * attempts)
        attempts += 1
        assert record is not None or not saved.exists() or (saved / "README.md").exists()
    assert attempts > 4
    assert_same(record, saved, *expected)
    assert record.environment["resumed"] > 3
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
    assert record.seconds["total"] >= record.seconds["save"] > 0


def test_an_encoder_decoder_is_killed(spec, tiny_folder, tmp_path, monkeypatch):
    """What blocks are called with is found anew each time, also once the block that it is computed from is reconstructed."""
    monkeypatch.setattr(activations, "SMALL", 0)
    spec = spec.replaced(
        model=saved_model("t5", tiny_folder, tmp_path / "model"), granularity="block", propagation="sparse", train="all"
    )
    expected = record_of(spec, save=tmp_path / "other", stream="no"), tmp_path / "other"
    record, attempts = None, 0
    while record is None:
        assert attempts < 30
        record = attempt(spec, tmp_path / "saved", monkeypatch, 40)
        attempts += 1
    assert attempts > 2
    assert_same(record, tmp_path / "saved", *expected)


@pytest.mark.parametrize(
    "change",
    [{"granularity": "block", "propagation": "mixed"}, {"granularity": "matrix", "solver": "exact", "propagation": "dense"}],
)
def test_biases_that_pruning_adds_outlive_a_kill(change, spec, cache, monkeypatch):
    """FLAP compares the whole model before it removes anything, and gives matrices biases that no file of the model has."""
    monkeypatch.setattr(activations, "SMALL", 0)
    spec = spec.replaced(criterion="flap", pattern="0.3", **change)
    expected, model = result_of(spec, stream="no")
    assert 0 < sum(name.endswith("_proj.bias") for name, _ in model.named_parameters()) < 8  # not all halves lose something
    record, attempts, phases = None, 0, set()
    while record is None:
        assert attempts < 40
        record = attempt(spec, None, monkeypatch, 17 + 2 * attempts)
        journal = cache / "unfinished" / spec.key() / "journal.jsonl"
        if journal.exists():
            phases.add(json.loads(journal.read_text().splitlines()[-1])["phase"])
        attempts += 1
    assert phases >= {"compare", "prune", "reconstruct"}, attempts
    assert comparable(record) == comparable(expected)


def test_units_are_those_of_the_dense_model_whatever_is_pruned_already(spec, begin):
    """When a run goes on, its first block may have lost all of a half, and says nothing of how others are built."""
    run = begin(spec.replaced(criterion="flap"))
    student = run.home.student(None)
    run.home.store.masks.update({name: torch.zeros(m.weight.shape, dtype=torch.bool) for name, m in run.dense.matrices().items()})
    with student.loaded(student.windows("block")[0]):
        assert not any(parameter.any() for parameter in student.weights(student.windows("block")[0]))
    in_memory = recon.decompose(AutoModelForCausalLM.from_pretrained(spec.model.model))
    for ours, theirs in zip(find_units(student), find_units(in_memory), strict=True):
        assert (ours.window, ours.reader.name, ours.count, ours.weights) == (
            theirs.window, theirs.reader.name, theirs.count, theirs.weights,
        )  # fmt: skip
        assert ours.rows.keys() == theirs.rows.keys() and all(torch.equal(ours.rows[n], theirs.rows[n]) for n in ours.rows)


@pytest.mark.parametrize("saving", [True, False])
def test_killed_while_its_work_is_deleted_it_gives_the_record_again(saving, spec, cache, tmp_path, monkeypatch):
    """With all of it; whoever called it had the record before anything was deleted."""
    spec = spec.replaced(granularity="none", held_out_samples=0)
    store = tmp_path / ("saved.unfinished" if saving else f"unfinished/{spec.key()}")
    given = []
    while not given or (store / "journal.jsonl").exists():  # one file or folder less each time
        assert len(given) < 40
        with monkeypatch.context() as patch, pytest.raises(Killed):

            class Done(recon.Callback):
                def on_done(self, record, patch=patch):
                    given.append(record)
                    Death(patch, 2)

            record_of(spec, save=tmp_path / "saved" if saving else None, stream="yes", callbacks=[Done()])
        monkeypatch.setattr(_Run, "execute", lambda *_: pytest.fail("computed anew"))
    assert len(given) > 5 and all(record.to_dict() == given[0].to_dict() for record in given)
    assert not saving or files.shards(tmp_path / "saved")


def test_the_command_line_has_the_record_before_the_work_is_deleted(spec, tmp_path, monkeypatch):
    spec = spec.replaced(granularity="none", held_out_samples=0, compute_dtype="float32")
    command = options(spec, "--stream", "yes", "--save", str(tmp_path / "saved"), "--record", str(tmp_path / "record.json"))

    def die(*_):
        raise Killed

    for place in ("recon.study.studies.write_record", "recon.study.unfinished.delete"):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(place, die)
            main(command)
        monkeypatch.setattr(_Run, "execute", lambda *_: pytest.fail("computed anew"))
    assert recon.study.studies.read_record(tmp_path / "record.json").status == "done"


def test_a_study_has_the_record_before_the_work_is_deleted(spec, cache, tmp_path, monkeypatch):
    """Killed in between, it computes nothing anew."""
    spec = spec.replaced(granularity="none", held_out_samples=0)
    monkeypatch.setattr(streaming, "is_too_large", lambda spec: True)
    store, records = tmp_path / "unfinished" / spec.key(), tmp_path / "records"

    def die(*_):
        raise Killed

    for place in ("recon.study.studies.write_record", "recon.study.unfinished.delete"):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(place, die)
            recon.run_study([spec], records, progress=False)
        monkeypatch.setattr(_Run, "execute", lambda *_: pytest.fail("computed anew"))
    assert store.exists() and read_record(records / f"{spec.key()}.json").environment["streamed"]
    assert list(recon.run_study([spec], records, progress=False).status) == ["done"]


@pytest.mark.parametrize("stream", ["yes", "no"])
def test_what_has_been_saved_is_on_the_disk(stream, spec, tiny_folder, tmp_path, monkeypatch):
    """All files with all of their content, and what the folders list, before the folder has its name; killed once before that."""
    model = shutil.copytree(tiny_folder, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = {"default": "{{ messages }}", "tools": "{{ tools }}"}  # of which one is saved in a folder
    tokenizer.save_pretrained(model)
    spec = spec.replaced(model=str(model), granularity="none", criterion="magnitude", held_out_samples=0)
    saved = tmp_path / "saved"
    if stream == "yes":
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr("recon.study.checkpoint.sync_all", lambda _: (_ for _ in ()).throw(Killed))
            record_of(spec, save=saved, stream=stream)
    synced, fsync, replace = {}, os.fsync, os.replace

    def content(path) -> object:
        return sorted(os.listdir(path)) if os.path.isdir(path) else os.stat(path).st_size

    def note(descriptor):
        synced[os.fstat(descriptor).st_ino] = content(f"/proc/self/fd/{descriptor}")
        fsync(descriptor)

    def check(source, target):
        if Path(target) == saved:
            for path in (Path(source), *Path(source).rglob("*")):
                assert synced.get(path.stat().st_ino) == content(path), path
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(os, "replace", check)
    record_of(spec, save=saved, stream=stream)
    assert "saved" in synced[tmp_path.stat().st_ino]
    assert any(path.is_dir() for path in saved.iterdir())


def test_a_place_to_save_that_was_filled_meanwhile(spec, tmp_path, monkeypatch):
    spec, saved = spec.replaced(granularity="none", held_out_samples=0), tmp_path / "saved"
    finish = FolderStore.finish

    def fill(store, phase, *args, **options):
        finish(store, phase, *args, **options)
        if phase == "record":
            saved.mkdir()
            (saved / "something").touch()

    with (
        monkeypatch.context() as patch,
        pytest.raises(ReconError, match=r"cannot be moved to '.*saved'.*complete in '.*checkpoint'"),
    ):
        patch.setattr(FolderStore, "finish", fill)
        record_of(spec, save=saved, stream="yes")
    (saved / "something").unlink()
    record_of(spec, save=saved, stream="yes")
    assert files.shards(saved)


def test_what_was_begun_streamed_goes_on_so_where_it_would_fit_by_now(spec, tmp_path, monkeypatch):
    spec = spec.replaced(granularity="none", held_out_samples=0)
    started(spec, tmp_path, monkeypatch, 25)
    record = record_of(spec, save=tmp_path / "saved")
    assert record.environment["resumed"] > 0 and not list(tmp_path.glob("*.unfinished"))


def test_a_run_that_is_refused_leaves_nothing_in_the_way(spec, tmp_path):
    with pytest.raises(ReconError, match="sequence length 4000 is more than"):
        record_of(spec.replaced(sequence_length=4000), save=tmp_path / "saved", stream="yes")
    assert not list(tmp_path.iterdir())


def test_a_work_folder_that_cannot_be_made(spec, tmp_path, monkeypatch):
    mkdir = Path.mkdir

    def full(path, *args, **options):
        if path.name == "masks":
            raise OSError(errno.ENOSPC, "No space left on device")
        mkdir(path, *args, **options)

    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(ReconError, match=r"saved\.unfinished' cannot be written: .*No space left"):
        record_of(spec, save=tmp_path / "saved", stream="yes")


def test_the_same_said_in_another_way_goes_on(spec, tmp_path, monkeypatch, caplog):
    """As many pruning samples as windows are reconstructed with, by number or by 0; another environment is said."""
    spec = spec.replaced(granularity="none", held_out_samples=0)
    started(spec, tmp_path, monkeypatch, 25)
    here = environment.environment
    monkeypatch.setattr("recon.study.home.environment", lambda *a: here(*a) | {"packages": {"torch": "1.0"}})
    record = record_of(spec.replaced(prune_samples=spec.calibration.samples), save=tmp_path / "saved", stream="yes")
    assert record.environment["resumed"] == 1
    assert re.search(r"another environment .*packages\.torch was '.*', is '1\.0'", caplog.text)


def started(spec, tmp_path, monkeypatch, points=45) -> Path:
    """The folder of a run that was killed on the way."""
    assert attempt(spec, tmp_path / "saved", monkeypatch, points) is None
    return tmp_path / "saved.unfinished"


@pytest.mark.parametrize("place", ["fsync", "posix_fallocate"])
def test_a_full_disk_loses_nothing(place, spec, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(activations, "SMALL", 0)
    full = OSError(errno.ENOSPC, "No space left on device")
    if place == "fsync":
        points = {"error": full}
        with pytest.raises(
            ReconError, match=r"saved\.unfinished' cannot be written: .*No space left on device.*same command goes on"
        ):
            attempt(spec, tmp_path / "saved", monkeypatch, 45, **points)
    else:
        store = started(spec, tmp_path, monkeypatch)
        with monkeypatch.context() as patch, pytest.raises(ReconError, match=r"saved\.unfinished' cannot be written: .*No space"):
            patch.setattr(os, "posix_fallocate", lambda *_: (_ for _ in ()).throw(full))
            record_of(spec, save=tmp_path / "saved", stream="yes")
        assert (store / "journal.jsonl").exists()
    record = record_of(spec, save=tmp_path / "saved", stream="yes")
    assert record.environment["resumed"] > 0
    assert_same(record, tmp_path / "saved", *expected)


def test_what_is_not_whole_is_never_read(spec, expected, tmp_path, monkeypatch):
    """Half a journal line, files under their final names that no line speaks of, and files that were being written."""
    store = started(spec, tmp_path, monkeypatch)
    journal = store / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:-1]) + lines[-1][:-20])
    for place in ("masks/00099.safetensors", "checkpoint/model-00009-of-00009.safetensors", "activations/x.part"):
        (store / place).write_bytes(b"nonsense")
    record = record_of(spec, save=tmp_path / "saved", stream="yes")
    assert_same(record, tmp_path / "saved", *expected)


def test_the_work_of_another_run_is_refused(spec, tmp_path, monkeypatch, tiny_folder):
    store = started(spec, tmp_path, monkeypatch)

    def go(spec):
        record_of(spec, save=tmp_path / "saved", stream="yes")

    with pytest.raises(ReconError, match=r"spec\.learning_rate was 0\.01, is 0\.001\. "):
        go(spec.replaced(learning_rate=1e-3))
    copy = tmp_path / "model"
    shutil.copytree(tiny_folder, copy)
    entries = json.loads((store / "journal.jsonl").read_text().splitlines()[0])
    with pytest.raises(ReconError, match=rf"spec\.model was '{tiny_folder}', is '{copy}'"):
        go(spec.replaced(model=str(copy)))
    assert {"model", "texts", "spec", "compute_dtype"} <= set(entries)
    mask = store / "masks/00000.safetensors"
    changed = bytearray(mask.read_bytes())
    changed[-1] ^= 1
    mask.write_bytes(changed)
    with pytest.raises(ReconError, match=r"masks/00000\.safetensors' has changed since it was written; delete"):
        go(spec)
    mask.unlink()
    with pytest.raises(ReconError, match=r"masks/00000\.safetensors' is missing; delete"):
        go(spec)


def test_damaged_activations_are_refused(spec, tmp_path, monkeypatch):
    store = started(spec, tmp_path, monkeypatch, 90)
    entries = map(json.loads, (store / "journal.jsonl").read_text().splitlines()[1:])
    last = [entry for entry in entries if entry["phase"] == "reconstruct"][-1]
    stream = store / last["streams"]["dense"]["file"]
    content = stream.read_bytes()
    changed = bytearray(content)
    changed[-3] ^= 64
    for damaged, said in ((changed, "has changed"), (content[:100], "has changed"), (None, "is missing")):
        stream.unlink() if damaged is None else stream.write_bytes(damaged)
        with pytest.raises(ReconError, match=rf"activations/{stream.name}' {said}.*; delete"):
            record_of(spec, save=tmp_path / "saved", stream="yes")


@pytest.mark.parametrize("what, cut", [("dense", False), ("given", False), ("reconstructed", False), ("dense", True)])
def test_a_shard_that_is_written_to_while_it_is_read_is_named(what, cut, spec, expected, tiny_folder, tmp_path, monkeypatch):
    """In the model's own file, in the pruned model's, or in a window that is finished, a bit flips, or all is cut off that comes after
    so many bytes, at which others are killed (SIGBUS); as it was again, the run goes on."""
    model = shutil.copytree(tiny_folder, tmp_path / "model")
    pruned = shutil.copytree(expected[1], tmp_path / "pruned")
    spec = spec.replaced(model=str(model), pruned=str(pruned))
    file = {"dense": model / "model.safetensors", "given": pruned / "model.safetensors"}.get(what)
    fit, calls, before = WindowFit.__call__, [], []

    def flip(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            shard = file or sorted((tmp_path / "saved.unfinished" / "checkpoint").glob("*.safetensors"))[0]
            content = shard.read_bytes()
            before[:] = shard, content
            with open(shard, "r+b") as opened:  # in place
                opened.truncate(20_000) if cut else opened.write(content[:-100] + bytes([content[-100] ^ 1]))
        return fit(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(ReconError) as error:
        patch.setattr(WindowFit, "__call__", flip)
        record_of(spec, save=tmp_path / "saved", stream="yes")
    shard, content = before
    assert f"'{shard}' has been written to while this run read from it" in str(error.value)
    with pytest.raises(ReconError, match=r"(model|pruned) was|has changed since it was written|is truncated"):
        record_of(spec, save=tmp_path / "saved", stream="yes")
    shard.write_bytes(content)
    found = record_of(spec, save=tmp_path / "saved", stream="yes")
    assert found.environment["resumed"] == 1
    assert_same(found, tmp_path / "saved", record_of(spec, save=tmp_path / "other", stream="no"), tmp_path / "other")


# --- when a run is streamed -----------------------------------------------------------------------------------------------


def test_auto_streams_what_does_not_fit(spec, monkeypatch):
    assert not streaming.wanted("auto", spec) and streaming.wanted("yes", spec) and not streaming.wanted("no", spec)
    numbers = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_pretrained(spec.model.model).parameters())
    for memory, wanted in ((8 * numbers + 1, False), (8 * numbers - 1, True), (0, False)):  # 0: the system does not tell
        monkeypatch.setattr(device, "available_memory", lambda memory=memory: memory)
        assert streaming.wanted("auto", spec) == wanted
    # What pruning makes of the weights is kept where it is more than zeros.
    monkeypatch.setattr(device, "available_memory", lambda: 8 * numbers + 1)
    others = (
        {"criterion": "sparsegpt"},
        {"pruned": spec.model.model},
        {"criterion": "ria"},
    )
    assert [streaming.wanted("auto", spec.replaced(**other)) for other in others] == [True, True, False]
    with pytest.raises(ReconError, match="stream is 'maybe'; allowed: auto, yes, no"):
        streaming.wanted("maybe", spec)


def test_what_needs_the_whole_model_is_not_streamed(spec):
    spec = spec.replaced(retrain="masklora")
    with pytest.raises(ReconError, match=r"masklora.*which a streamed run cannot do"):
        record_of(spec, stream="yes")


@pytest.mark.slow
def test_killed_for_real(spec, expected, tmp_path):
    """SIGKILL at many moments, to a process of its own."""
    where = ["--save", str(tmp_path / "saved"), "--record", str(tmp_path / "record.json"), "--stream", "yes"]
    command = [sys.executable, "-m", "recon.cli", *options(spec, *where)]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    killed = 0
    for number in range(40):
        process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        journal, began = tmp_path / "saved.unfinished" / "journal.jsonl", time.monotonic()
        lines = len(journal.read_bytes().splitlines()) if journal.exists() else 0
        # A little after the second step of this process is finished, at another moment each time.
        while process.poll() is None and time.monotonic() - began < 120:
            if journal.exists() and len(journal.read_bytes().splitlines()) >= lines + 3:
                time.sleep(0.013 * (number % 7))
                break
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        _, complaint = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), complaint
        killed += process.returncode != 0
        # Without its work folder it had done all there was to do, though it may not have left yet.
        if process.returncode == 0 or (tmp_path / "saved").exists() and not journal.parent.exists():
            break
    assert killed > 4 and not journal.parent.exists()
    record = read_record(tmp_path / "record.json")
    record.spec = expected[0].spec
    found, wanted = comparable(record), comparable(expected[0])
    assert found["metrics"] == wanted["metrics"] and found["windows"] == wanted["windows"]
