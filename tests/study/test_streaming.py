"""A streamed run gives the bits of one in memory, saves the same model, and never has more than a window or two in memory."""

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from fixtures.large import write_random_llama
from fixtures.models import saved_model
from fixtures.runs import comparable, record_of
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from recon import ReconError, decompose
from recon.data import files
from recon.model.skeleton import Lazy, auto_class, is_placeholder
from recon.runtime import storage
from recon.study import plan
from recon.study.measure import Texts
from recon.study.record import read_record


@pytest.fixture(scope="module")
def spec(tiny_spec):
    return tiny_spec.replaced(samples=3, chunks=1, sequence_length=16, evaluation_length=32)


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
    assert list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert (saved / name).read_bytes() == (other / name).read_bytes(), name


CASES = {
    "half-blocks": ("", {}), "pruned only": ("opt", {"granularity": "none", "criterion": "ria"}),
    "masks from another run": ("", {"pruned": "its checkpoint"}),
    "experts": ("mixtral", {"propagation": "sparse", "pattern": "2:4"}),
    "sparsegpt, mixed, transposed weights": ("gpt2", {"criterion": "sparsegpt", "granularity": "block", "propagation": "mixed"}),
    "single matrices, mixed": ("", {"granularity": "matrix", "propagation": "mixed", "chunks": 2}),
    "parallel blocks": ("phi", {"criterion": "magnitude", "granularity": "2-blocks", "propagation": "sparse", "start": "exact"}),
    "parallel halves, all trained": ("gpt_neox", {"train": "all", "propagation": "dense", "chunks": 4}),
    "experts, biases": ("gpt_oss", {"criterion": "sparsegpt", "propagation": "dense"}),
    "adapters, refined masks": ("gemma2", {"adapter": "masklora", "rank": 2, "mask_refinement": 2}),
    "whole heads and neurons": ("", {"criterion": "wanda-sp", "pattern": "0.3", "propagation": "sparse"}),
    "whole units, biases changed": ("gpt2", {"criterion": "flap", "pattern": "0.3", "granularity": "block"}),
    "whole units, biases added": ("", {"criterion": "flap", "pattern": "0.3"}),
    "encoder-decoder": ("bart", {"criterion": "sparsegpt", "granularity": "block", "propagation": "sparse"}),
    "encoder-decoder, biases passed on": ("t5", {"granularity": "2-blocks", "propagation": "mixed", "train": "all"}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_bits_of_a_run_in_memory(case, spec, expected, tiny_folder, tmp_path, monkeypatch):
    family, changes = CASES[case]
    spec = spec.replaced(**changes | {"pruned": str(expected[1]) if "pruned" in changes else None})
    if family:
        spec = spec.replaced(model=saved_model(family, tiny_folder, tmp_path / "model"))
    if changes:
        expected = record_of(spec, save=tmp_path / "other", stream="no"), tmp_path / "other"
    monkeypatch.setattr(storage, "SMALL", 0 if case == "half-blocks" else storage.SMALL)
    monkeypatch.delattr(os, "posix_fallocate")  # as on macOS
    found = record_of(spec, save=tmp_path / "saved", stream="yes")
    assert_same(found, tmp_path / "saved", *expected)
    assert found.environment["streamed"] and not list(tmp_path.glob("*.unfinished"))


def test_biases_without_a_place_are_refused_by_name(spec, tiny_folder, tmp_path):
    model = saved_model("qwen2", tiny_folder, tmp_path / "model")
    with pytest.raises(ReconError, match=r"Qwen2ForCausalLM has a place for '.*o_proj\.bias', one of"):
        record_of(spec.replaced(model=model, criterion="flap", pattern="0.3"), save=tmp_path / "saved", stream="yes")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("family", ["", "mixtral"])
def test_no_more_than_two_windows_are_in_memory(family, spec, tiny_folder, tmp_path, monkeypatch):
    """Counted whenever a block runs; with both models' heads, for the divergence between them."""
    model = saved_model(family, tiny_folder, tmp_path / "model") if family else tiny_folder
    whole = decompose(AutoModelForCausalLM.from_pretrained(model))
    blocks, most = {type(block) for block in whole.blocks}, []

    def count(module, args):
        if type(module) in blocks:
            lazy = [each for each in gc.get_objects() if isinstance(each, Lazy)]
            most.append(sum(p.numel() for each in lazy for p in each.parameters.values() if not is_placeholder(p)))

    gc.collect()
    hook = torch.nn.modules.module.register_module_forward_pre_hook(count)
    monkeypatch.setattr(storage, "SMALL", 0)
    try:
        record_of(spec.replaced(model=model, criterion="sparsegpt"), save=tmp_path / "saved", stream="yes")
    finally:
        hook.remove()
    block = max(sum(p.numel() for p in block.parameters()) for block in whole.blocks)
    ends = sum(p.numel() for p in dict.fromkeys(whole.ends.values()))
    assert block <= max(most) <= 2 * block + ends


@pytest.mark.parametrize("dtype, changes", [("bfloat16", {"compute_dtype": "bfloat16", "train": "all"}), ("float16", {})])
def test_saved_in_half_the_room(dtype, changes, spec, tmp_path):
    """Weights are those of the run, rounded; streamed as in memory, and with the record that nothing was lost for."""
    spec = spec.replaced(**changes)
    ways = (("plain", "no", "float32"), ("other", "no", dtype), ("saved", "yes", dtype))
    plain, kept, found = (record_of(spec, save=tmp_path / name, stream=how, save_dtype=each) for name, how, each in ways)
    assert_same(found, tmp_path / "saved", kept, tmp_path / "other")
    assert comparable(found) == comparable(plain)
    assert found.environment["save_dtype"] == dtype and "save_dtype" not in plain.environment
    model, exact = (AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype="auto") for name in ("saved", "plain"))
    assert model.dtype == getattr(torch, dtype) and json.loads((tmp_path / "saved/config.json").read_text())["dtype"] == dtype
    for (name, ours), (_, theirs) in zip(model.named_parameters(), exact.named_parameters(), strict=True):
        assert torch.equal(ours, theirs.to(model.dtype)) and torch.equal(ours == 0, theirs == 0), name
    assert [f"rounded to {dtype}" in (tmp_path / name / "README.md").read_text() for name in ("saved", "plain")] == [True, False]


@pytest.mark.parametrize("stream", ["no", "yes"])
def test_what_a_dtype_cannot_hold_is_named_before_anything_is_done(stream, spec, tiny_folder, tmp_path, monkeypatch):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    content, name = load_file(folder / "model.safetensors"), "model.layers.2.mlp.up_proj.weight"
    content[name][1, 2] = -1e5
    save_file(content, folder / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr(Texts, "draw", lambda *given: pytest.fail("texts are read"))
    with pytest.raises(ReconError, match=rf"'{name}' holds .*float16.*6.55e\+04.*bfloat16"):
        record_of(spec.replaced(model=str(folder)), save=tmp_path / "saved", save_dtype="float16", stream=stream)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("propagation", ["dense", "mixed"])
def test_short_of_memory_it_has_the_bits_of_one_in_memory(propagation, spec, monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    forward = LlamaDecoderLayer.forward

    def run_out(block, hidden, *args, **options):
        if hidden.shape[1] == 16 and len(hidden) > (1 if torch.is_grad_enabled() else 2):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(block, hidden, *args, **options)

    spec = spec.replaced(granularity="block", batch_size=4, propagation=propagation, compute_dtype="float32")
    monkeypatch.setattr(LlamaDecoderLayer, "forward", run_out)
    found, wanted = (record_of(spec, stream=stream) for stream in ("yes", "no"))
    assert comparable(found) == comparable(wanted) and [window["micro_batch"] for window in found.windows] == [1] * 4


def test_auto_streams_what_does_not_fit(spec):
    numbers = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_pretrained(spec.model.model).parameters())
    for memory, wanted in ((8 * numbers + 1, False), (8 * numbers - 1, True)):
        assert plan.stays_on_disk(spec, "auto", memory) == wanted
        assert plan.stays_on_disk(spec, "yes", memory) and not plan.stays_on_disk(spec, "no", memory)
    for said, given in (("masklora", {"retrain": "masklora"}), ("reorder", {"reorder_neurons": True, "pattern": "2:4"})):
        with pytest.raises(ReconError, match=f"{said}.*which a streamed run cannot do"):
            record_of(spec.replaced(**given), stream="yes")


LAYERS = 3  # 32 make 13 GB of weights, and take half an hour


def anonymous(process: subprocess.Popen) -> int:
    """Bytes of resident memory that is not mapped from files."""
    try:
        return 1024 * int(Path(f"/proc/{process.pid}/status").read_text().split("RssAnon:")[1].split()[0])
    except (OSError, IndexError):
        return 0


@pytest.mark.slow
def test_four_gibibytes_are_enough(tmp_path):
    """For blocks of the shape of a 7B Llama: memory depends on the size of a block, not on their number."""
    write_random_llama(tmp_path / "model", num_hidden_layers=LAYERS)
    saved, record = tmp_path / "saved", tmp_path / "record.json"
    command = [
        sys.executable, "-m", "recon.cli", "run", "--model", str(tmp_path / "model"), "--stream", "yes", "--samples", "2",
        "--sequence-length", "128", "--held-out-samples", "0", "--evaluation-samples", "1", "--evaluation-length", "128",
        "--learning-rate", "1e-4", "--save", str(saved), "--record", str(record),
    ]  # fmt: skip
    peak = 0
    for killed_after in (3, 7, None):  # windows: on the way, and never
        process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, env=os.environ, text=True)
        work = tmp_path / "saved.unfinished"
        while process.poll() is None:
            time.sleep(0.02)
            peak = max(peak, anonymous(process))
            if killed_after and len(list(work.glob("*/?????.safetensors"))) >= killed_after:
                process.send_signal(signal.SIGKILL)
                break
        _, complaint = process.communicate()
        assert process.returncode == (-signal.SIGKILL if killed_after else 0), complaint
    assert 0 < peak < 4 * 2**30
    found = read_record(record)
    assert found.environment["resumed"] and found.metrics["sparsity"] == pytest.approx(0.5, abs=1e-4)
    assert abs(found.peak_memory_bytes - peak) < 2**29
    zeros = total = 0
    for path in saved.glob("*.safetensors"):
        for tensor in (tensor for name, tensor in load_file(path).items() if "_proj." in name):
            zeros, total = zeros + tensor.numel() - int(tensor.count_nonzero()), total + tensor.numel()
    assert zeros / total == pytest.approx(found.metrics["sparsity"])
    assert len(json.loads((saved / files.INDEX).read_text())["weight_map"]) == 9 * LAYERS + 3
