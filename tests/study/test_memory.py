import json
import subprocess
import sys

import pytest
import torch
from fixtures.models import make_model
from transformers import AutoTokenizer

from recon.data.text import SPLITS, sample_tokens
from recon.model.discovery import decompose
from recon.runtime.device import HOST
from recon.runtime.execution import Execution
from recon.study.memory import Size, _Run, distinct, highest, memory
from recon.study.spec import RunSpec

CUDA = torch.device("cuda", 0)
SHORT = {"samples": 8, "sequence_length": 32, "held_out_samples": 2, "evaluation_samples": 1, "evaluation_length": 64}


@pytest.fixture(scope="module")
def decoder():
    return decompose(make_model("llama", num_hidden_layers=4))


def total(parts: dict) -> float:
    return sum(parts.values())


@pytest.mark.parametrize("granularity", ["half-block", "block", "2-blocks"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_weights_on_a_device_are_those_that_are_moved_there(family, granularity, dtype, monkeypatch):
    """What an execution moves is counted, as if the processor were another device than that where the model is."""
    moved = []

    def move(data: torch.Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        moved.append(data.numel() * dtype.itemsize)
        return data.to(dtype)

    monkeypatch.setattr("recon.runtime.execution.moved", move)
    monkeypatch.setattr(Execution, "elsewhere", lambda execution, tensor: True)
    decoder, execution = decompose(make_model(family)), Execution("cpu", dtype)
    expected = _Run(RunSpec.of(**SHORT), decoder, execution.dtype, on_gpu=True, streamed=False)
    for window in distinct(decoder, granularity):
        moved.clear()
        with execution.holding(decoder, window):
            assert sum(moved) == total(expected.held(Size.of(decoder, window)))


@pytest.mark.parametrize(
    "options",
    [
        {"criterion": "wanda", "propagation": "mixed"},
        {"criterion": "sparsegpt", "granularity": "matrix"},
        {"criterion": "wanda-sp", "granularity": "2-blocks", "train": "all"},
        {"criterion": "wanda", "start": "exact", "mask_refinement": 2},
        {"adapter": "masklora", "granularity": "block"},
        {"granularity": "none", "retrain": "full", "retrain_checkpointing": True},
        {"retrain": "lora", "retrain_objective": "distil"},
    ],
    ids=lambda options: " ".join(map(str, options.values())),
)
def test_a_device_works_and_the_host_keeps(options, decoder):
    """Of what a run takes on the host alone, a device of its own takes over what is computed with."""
    spec = RunSpec.of(**SHORT, **options)
    apart, alone = (memory(spec, decoder, torch.bfloat16, device) for device in (CUDA, HOST))
    kept = {"dense model", "pruned model", "what pruning changed", "masks", "activations of all samples", "copy of the window"}
    kept |= {"copy of the model", "pruned block", "texts and scratch"}
    assert apart["cpu"].keys() == alone["cpu"].keys() and apart["cuda"].keys() == alone["cpu"].keys() - {"load", "copy"}
    for phase, parts in apart["cpu"].items():
        assert parts.keys() <= kept and total(parts) <= total(alone["cpu"][phase])
    for phase, parts in apart["cuda"].items():
        assert not parts.keys() & kept
        assert total(parts) + total(apart["cpu"][phase]) >= total(alone["cpu"][phase]) * 0.99


def test_what_takes_less(decoder):
    def needs(**options) -> float:
        return total(memory(RunSpec.of(**SHORT | options), decoder, torch.bfloat16)["cpu"][phase])

    phase = "reconstruct"
    half, block, whole = (needs(granularity=name, samples=32, batch_size=32) for name in ("half-block", "block", "model"))
    assert half < block < whole
    assert needs(samples=64, propagation="dense") < needs(samples=64, propagation="mixed")
    assert needs(criterion="wanda") < needs(criterion="sparsegpt")  # after which its weights are kept as well
    large = {"granularity": "block", "samples": 32, "batch_size": 32}
    assert needs(**large) < needs(**large, accumulation=2)
    assert needs(**large | {"granularity": "model"}, adapter="masklora") < needs(**large | {"granularity": "model"})
    phase = "retrain"
    assert needs(retrain="masklora") < needs(retrain="full")
    assert needs(retrain="full", retrain_batch_size=8, retrain_checkpointing=True) < needs(retrain="full", retrain_batch_size=8)


def test_a_streamed_run_has_a_window_in_hand(decoder):
    spec = RunSpec.of(**SHORT, granularity="block", criterion="sparsegpt")
    phases = memory(spec, decoder, torch.bfloat16, streamed=True)["cpu"]
    block = Size.of(decoder, decoder.windows("block")[0])
    assert phases["reconstruct"]["weights in hand"] == 4 * block.present and "prune" not in phases
    alone = memory(spec.replaced(statistics="sparse"), decoder, torch.bfloat16, streamed=True)["cpu"]
    assert alone["prune"]["weights in hand"] == 4 * block.present
    assert not highest(phases).keys() & {"dense model", "pruned model", "masks", "what pruning changed"}


# --- against measured memory: slow ------------------------------------------------------------------------------------

SHAPES = {  # of random models with 200 to 300 MB of weights each
    "wide": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4, "vocab_size": 32000},
    "deep": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 24, "vocab_size": 400},
    "experts": {
        "family": "mixtral", "num_local_experts": 8, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4,
        "vocab_size": 400,
    },
}  # fmt: skip
MEASURED = {
    "half-blocks": {"model": "wide", "samples": 32, "sequence_length": 512, "criterion": "wanda"},
    "the whole model": {"model": "wide", "granularity": "model"},
    "matrices": {"model": "wide", "granularity": "matrix", "samples": 16, "sequence_length": 256},
    "exact matrices, dense": {
        "model": "wide", "granularity": "matrix", "solver": "exact", "exact_iterations": 2, "propagation": "dense",
    },
    "SparseGPT": {"model": "wide", "granularity": "none", "criterion": "sparsegpt"},
    "full retraining": {"model": "wide", "granularity": "none", "retrain": "full"},
    "MaskLoRA": {"model": "wide", "granularity": "none", "retrain": "masklora"},
    "blocks": {"model": "deep", "granularity": "block", "batch_size": 4, "samples": 32},
    "quarters, norms too, dense": {"model": "deep", "granularity": "quarter", "train": "all", "propagation": "dense"},
    "experts": {"model": "experts", "criterion": "wanda", "samples": 16, "sequence_length": 256},
    "streamed model": {"model": "deep", "stream": "yes", "granularity": "model", "samples": 16},
    "streamed half-blocks": {"model": "wide", "stream": "yes", "criterion": "wanda", "samples": 16},
    "exact start, dense": {
        "model": "smollm2-135m", "start": "exact", "exact_iterations": 2, "sequence_length": 256, "propagation": "dense",
    },
    "long samples": {
        "model": "smollm2-135m",
        "granularity": "model",
        "samples": 2,
        "sequence_length": 1024,
        "held_out_samples": 0,
    },
}  # fmt: skip
MEASURE = """
import json, sys
from recon.study.plan import plan
from recon.study.run import run
from recon.study.spec import RunOptions, RunSpec
from recon.runtime.device import limit_compiled_shapes

limit_compiled_shapes()  # as the command line does
spec, stream = RunSpec.of(**json.loads(sys.argv[1])), sys.argv[2]
planned = plan(spec, stream=stream)
measured = run(spec, RunOptions(stream=stream, progress=False)).record.peak_memory_bytes
print(json.dumps({"process": planned.memory["cpu"]["load"]["process"], "predicted": planned.rooms["memory"][0], "measured": measured}))
"""


@pytest.fixture(scope="session")
def larger_models(tiny_folder, tmp_path_factory):
    folders, tokenizer = {}, AutoTokenizer.from_pretrained(tiny_folder)
    # Kept in the cache: what tokenising leaves of the heap would count in the first process that is measured.
    for split in SPLITS:
        sample_tokens("wikipedia", split, tokenizer, 1, 16)
    for name, shape in SHAPES.items():
        folders[name] = tmp_path_factory.mktemp(name)
        tokenizer.save_pretrained(folders[name])
        heads = {"num_attention_heads": 8, "num_key_value_heads": 8}
        options = heads | {"max_position_embeddings": 1024, "tie_word_embeddings": True}
        make_model(**({"family": "llama", "std": 0.02} | shape | options)).save_pretrained(folders[name])
    return folders


@pytest.mark.slow
@pytest.mark.parametrize("name", MEASURED)
def test_predicted_memory_is_within_a_quarter_of_what_a_run_takes(name, larger_models):
    """Each in a process of its own; what the process takes before the run counts on neither side."""
    options = {"samples": 8, "sequence_length": 128, "criterion": "magnitude", "held_out_samples": 2, "evaluation_samples": 4}
    options |= {"evaluation_length": 256, **MEASURED[name]}
    options["model"] = str(larger_models.get(options["model"], options["model"]))
    stream = options.pop("stream", "no")
    command = [sys.executable, "-c", MEASURE, json.dumps(options), stream]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    predicted, measured = ((found[what] - found["process"]) / 2**20 for what in ("predicted", "measured"))
    print(f"{name}: predicted {predicted:.0f} MiB, measured {measured:.0f} MiB, ratio {predicted / measured:.3f}")
    assert 0.75 < predicted / measured < 1.33
