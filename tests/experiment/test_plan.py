import json
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from fixtures.families import small_model
from fixtures.models import FAMILIES, make_model
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, AutoTokenizer

from recon import cli
from recon.data import models
from recon.errors import ReconError
from recon.experiment import estimate, plan, rehearsal, study
from recon.experiment.config import RunSpec
from recon.experiment.rehearsal import Ledger, Rehearsal, peaks
from recon.experiment.run import Run, run
from recon.model.discovery import take_apart
from recon.runtime import activations
from recon.runtime.device import COMPUTE_DTYPES

QWEN_72B = {  # config.json of Qwen2.5-72B, as far as shapes go
    "model_type": "qwen2", "hidden_size": 8192, "intermediate_size": 29568, "num_hidden_layers": 80, "num_attention_heads": 64,
    "num_key_value_heads": 8, "vocab_size": 152064, "max_position_embeddings": 32768, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture
def config_folder(tmp_path):
    """Factory of folders with a configuration and nothing else."""

    def make(config: dict) -> str:
        (tmp_path / "config.json").write_text(json.dumps(config))
        return str(tmp_path)

    return make


@pytest.fixture
def spec(tiny_folder, tiny_text):
    return RunSpec.of(
        model=tiny_folder, text=tiny_text, samples=8, sequence_length=32, held_out_samples=2, evaluation_texts=(tiny_text,),
        evaluation_samples=2, evaluation_length=64, criterion="magnitude",
    )  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "gemma3", "opt", "gpt2", "phi", "bloom"])
def test_a_model_is_taken_apart_by_its_configuration_as_with_its_weights(family, config_folder):
    model = make_model(family)
    real, shapes = take_apart(model), plan.shapes_of(config_folder(model.config.to_dict())).decoder
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in shapes.model.named_parameters()}
    assert all(p.device.type == "meta" for p in shapes.model.parameters())
    assert shapes.groups == real.groups
    for granularity in ("half-block" if family in FAMILIES else "matrix", "block"):
        assert shapes.windows(granularity) == real.windows(granularity)
        for window in real.windows(granularity):
            assert shapes.parameters(window).keys() == real.parameters(window).keys()
            assert shapes.matrices(window).keys() == real.matrices(window).keys()


@pytest.mark.parametrize("family, experts", [("qwen3_moe", "num_experts"), ("deepseek_v3", "n_routed_experts")])
def test_mixtures_of_experts_are_planned(family, experts, spec, config_folder):
    config = small_model(family).config
    setattr(config, experts, 16)  # of which a pass is rehearsed with fewer
    model = AutoModelForCausalLM.from_config(config)
    spec = spec.replaced(model=config_folder(model.config.to_dict()), granularity="block", criterion="wanda")
    planned = plan.plan(spec.replaced(evaluation_samples=1))
    assert planned.parameters == sum(p.numel() for p in model.parameters())
    decoder = plan.shapes_of(spec.model.model).decoder
    trained = sum(p.numel() for p in decoder.trained(decoder.windows("block")[-1], "matrices").values())
    # At the end of a step, gradients and two moments of all that is trained, experts that no token reached included.
    found = rehearsal.peaks(spec, *plan.shapes_of(spec.model.model)).found
    assert max(parts.get("gradients and AdamW", 0) for parts in found.values()) >= 3 * 4 * trained


def test_a_model_that_needs_values_has_no_plan_and_runs_without_one(config_folder, monkeypatch):
    spec = RunSpec.of(
        model=config_folder(small_model("phimoe").config.to_dict()), samples=4, sequence_length=32, evaluation_length=32
    )
    with pytest.raises(ReconError, match="no plan can be made for model .* shapes and no values"):
        plan.plan(spec)
    monkeypatch.setattr(plan, "LARGE", 0)  # so that any run is looked at
    assert plan.check(spec) is None


def test_what_is_counted_is_what_is_there(spec, tmp_path):
    planned, saved = plan.plan(spec, save=True), tmp_path / "saved"
    record = run(spec, save=saved, progress=False)
    model, _ = models.load(str(saved))
    decoder = take_apart(model)
    assert planned.parameters == sum(p.numel() for p in model.parameters())
    assert planned.prunable == sum(m.weight.numel() for m in decoder.matrices().values())
    assert planned.windows == len(record.windows)
    assert planned.largest_window == max(
        sum(p.numel() for p in decoder.parameters(w).values()) for w in decoder.windows("half-block")
    )
    assert planned.flops == record.flops == estimate.flops(spec, decoder)
    assert planned.tokens == {"reconstruct": 8 * 32, "evaluate": 2 * 64}
    assert record.tokens["reconstruct"] == planned.tokens["reconstruct"]
    file = saved / "model.safetensors"
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert planned.disk == file.stat().st_size - header == 2 * plan.plan(spec, save=True, save_dtype="bfloat16").disk


class Counted(Ledger):
    """Counts tensors that do have values."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor)
        return made


class Real(Rehearsal):
    """The run itself, on a random model: every sample, batch and epoch."""

    measure = Run.measure


def _totals(found) -> dict[str, float]:
    return {phase: sum(parts.values()) for phase, parts in found.highest().items()}


@pytest.mark.parametrize(
    "options",
    [
        {"criterion": "wanda", "batch_size": 4, "propagation": "mixed", "epochs": 2},
        {"granularity": "matrix"},
        {"granularity": "model", "train": "all"},
        {"granularity": "none", "criterion": "sparsegpt", "retrain": "full"},
        {"granularity": "block", "start": "exact", "mask_refinement": 2},
        {"granularity": "none", "retrain": "masklora", "retrain_checkpointing": True},
        {"granularity": "matrix", "criterion": "wanda", "compute_dtype": "float32"},
        {"family": "mixtral", "criterion": "wanda"},
        {"family": "t5", "criterion": "wanda", "granularity": "block"},
    ],
    ids=lambda options: " ".join(map(str, options.values())),
)
def test_the_rehearsal_takes_the_bytes_that_the_run_takes(spec, options, config_folder):
    """Shapes alone, on two or three blocks and a few batches, against every tensor of the whole run on four blocks."""
    family, options = options.get("family"), {name: value for name, value in options.items() if name != "family"}
    if family:  # such as with experts, among which random weights divide the tokens
        spec = spec.replaced(model=config_folder(make_model(family, num_hidden_layers=4).config.to_dict()))
    spec, (config, decoder) = spec.replaced(**options), plan.shapes_of(spec.model.model)
    # Whether pruning changes weights decides, in a rehearsal, what the run sees for itself.
    ledger = Counted(equal=False)
    with ledger:
        Real(spec, config, decoder, ledger, evaluated=True).execute(None, "")
    real, rehearsed = _totals(ledger.peaks), _totals(peaks(spec, config, decoder))
    assert rehearsed.keys() == real.keys()
    for phase, total in real.items():
        # Random weights send more tokens to some experts than to others, which shows where weights are so small.
        assert rehearsed[phase] == pytest.approx(total, rel=0.2 if family else 0.1), phase


def test_what_cannot_fit_is_refused_before_weights_are_read_and_told_what_would(spec, monkeypatch):
    def read(*args, **kwargs):
        raise AssertionError("weights are read")

    def have(planned):
        monkeypatch.setattr(plan, "available_memory", lambda: int(planned.peak_memory - planned.peak["process"]) + 1000)

    monkeypatch.setattr(plan, "_can_be_streamed", lambda spec: False)  # streaming would come before all else
    monkeypatch.setattr(models, "load", read)
    monkeypatch.setattr(plan, "LONG", 0)
    monkeypatch.setattr(plan, "resident", lambda: 0)
    large = spec.replaced(granularity="model", evaluation_samples=1)
    have(plan.plan(replace(large, granularity="2-blocks")))
    record, error = study.run_or_record_failure(large)
    assert isinstance(error, ReconError) and record.status == "failed"
    assert "needs" in str(error) and "--granularity 2-blocks would fit" in str(error)
    _, error = study.run_or_record_failure(large, force=True)
    assert isinstance(error, AssertionError)

    monkeypatch.setattr(plan, "available_memory", lambda: 1000)
    # What is loaded already need not fit once more.
    assert plan.check(large, loaded=2**30)


def test_a_streamed_run_takes_less_memory_and_more_disk(spec, monkeypatch):
    monkeypatch.setattr(plan, "resident", lambda: 0)
    monkeypatch.setattr(plan, "resident_anonymous", lambda: 0)
    spec = spec.replaced(granularity="block", evaluation_samples=1)
    here, on_disk = (plan.plan(spec, stream=stream) for stream in ("no", "yes"))
    assert (here.streamed, on_disk.streamed) == (False, True)
    with monkeypatch.context() as patched:
        patched.setattr(plan, "_memory", lambda *args, **options: {"cpu": on_disk.memory})
        half, both = (
            plan.plan(spec.replaced(compute_dtype=d), True, stream="yes", save_dtype="bfloat16") for d in COMPUTE_DTYPES
        )
    assert half.disk == pytest.approx(on_disk.disk - 2 * on_disk.parameters, rel=0.05) and half.disk < on_disk.disk < both.disk
    assert on_disk.disk >= 4 * on_disk.parameters + on_disk.prunable // 8 > here.disk == 0
    phase, other = (planned.memory["reconstruct"] for planned in (here, on_disk))
    # What a window was before lies in a file where it is large, and these are all small.
    copies = {}
    for small in (activations.SMALL, 0):
        with monkeypatch.context() as patched:
            patched.setattr(rehearsal, "SMALL", small)
            copies[small] = plan.plan(spec, stream="yes").memory["reconstruct"].get("copy of the window", 0)
    assert copies[0] < 100 < 4 * on_disk.largest_window * 0.9 < copies[activations.SMALL]
    # A block of four, and nothing of the dense model beside it.
    assert sum(other.values()) < 0.6 * sum(phase.values()) and other["dense model"] < 0.1 * phase["dense model"]

    too_little = sum(on_disk.peak.values()) + 1000
    monkeypatch.setattr(plan, "available_memory", lambda: int(too_little))
    monkeypatch.setattr(plan, "LONG", 0)
    with pytest.raises(ReconError, match="--stream yes would fit"):
        plan.check(spec, stream="no")
    with pytest.raises(ReconError, match="retraining"):
        plan.plan(spec.replaced(retrain="full"), stream="yes")


def test_where_the_disk_is_too_small_it_is_said_what_would_fit(spec, monkeypatch):
    memory = {"reconstruct": {"process": 0.0}}
    monkeypatch.setattr(plan, "_memory", lambda *args, **options: {"cpu": memory})
    spec = spec.replaced(granularity="block", samples=64)

    def said(stream: str, free: int) -> str:
        planned = replace(plan.plan(spec, save=True, stream=stream), available_disk=free)
        assert "of disk" in planned.problem
        return plan.advice(planned)

    planned = plan.plan(spec, save=True, stream="yes")
    activations = 4 * 4 * 32 * (64 + 2) * 32  # of two models, before and after a window, in float32
    rest = planned.disk - activations
    # Half the bytes in bfloat16; a quarter of the samples where not even that will do; and nothing where the weights alone are too many.
    assert "--samples 16 would fit" in said("yes", rest + activations * (16 + 2) // (64 + 2))
    assert "would fit" not in (too_few := said("yes", rest)) and "take a folder on a disk with" in too_few
    assert "do not save" in said("no", 0)


# --- a GPU that is not here ---------------------------------------------------------------------------------------------

CUDA = torch.device("cuda", 0)


@pytest.mark.parametrize(
    "options",
    [
        {"criterion": "wanda", "propagation": "mixed"},
        {"criterion": "sparsegpt", "granularity": "matrix"},
        {"criterion": "wanda-sp", "granularity": "2-blocks", "train": "all"},
        {"criterion": "wanda", "start": "exact", "chunks": 2, "mask_refinement": 2},
        {"adapter": "masklora", "granularity": "block", "stream": "yes"},
        {"granularity": "none", "retrain": "full", "retrain_checkpointing": True},
        {"retrain": "lora", "retrain_objective": "distil"},
        {"family": "mixtral", "criterion": "wanda", "granularity": "block"},
        {"family": "qwen3_moe", "stream": "yes"},
    ],
    ids=lambda options: " ".join(map(str, options.values())),
)
def test_all_that_a_run_does_it_does_on_one_device(spec, options, config_folder):
    """On tensors without values, torch refuses what mixes devices as it does on a GPU; and the host is left with what is kept."""
    options = dict(options)
    if family := options.pop("family", None):
        spec = spec.replaced(model=config_folder(small_model(family).config.to_dict()))
    kind = rehearsal.StreamedRehearsal if options.pop("stream", "no") == "yes" else Rehearsal
    spec = spec.replaced(compute_dtype="bfloat16", **options)
    config, decoder = plan.shapes_of(spec.model.model)
    config = rehearsal.shortened(config, 2) if kind is Rehearsal and not family else config
    found, on_host = (rehearsal.rehearse(spec, config, decoder, True, device, kind) for device in (CUDA, rehearsal.HOST))
    here, there, alone = found.highest(), found.highest("cuda"), on_host.highest()
    assert here.keys() == alone.keys() and there.keys() == alone.keys() - {"load", "copy"}
    working = {"gradients and AdamW", "weights in the compute dtype", "logits", "statistics of inputs"}
    kept = {"dense model", "pruned model", "activations of all samples"}

    def size(parts: dict, names: set) -> float:
        return sum(parts.get(name, 0.0) for name in names)

    for phase, parts in there.items():
        # What is computed with is there, and what is kept is here, where there is less of everything than without a device.
        assert size(here[phase], working) < 1000, phase  # of batches, the host embeds each
        assert size(parts, kept) < 0.1 * size(parts, working | {"one batch"}), phase
        assert sum(here[phase].values()) <= sum(alone[phase].values()), phase


@pytest.mark.parametrize("family", ["llama4_text", "biogpt", "mamba", "lfm2", "qwen3_next"])
def test_families_are_planned_with_and_without_a_gpu(family, spec, config_folder):
    """Experts multiplied all at once, halves that are no module, convolutions, routers in another dtype; taken apart as narrower ones."""
    spec = spec.replaced(model=config_folder(small_model(family).config.to_dict()), evaluation_samples=1, granularity="block")
    spec = spec.replaced(compute_dtype="bfloat16")
    if family != "mamba":
        spec = spec.replaced(granularity="half-block")
    on_host, with_gpu = (plan.plan(spec, stream="yes", device_memory=memory) for memory in (None, 1))
    assert on_host.device_memory == {} and sum(with_gpu.device_memory["reconstruct"].values()) > 0


@pytest.mark.parametrize("granularity", ["2-blocks", "model"])
def test_memory_of_a_device_follows_the_window(granularity, spec):
    decoder = plan.shapes_of(spec.model.model).decoder
    planned = plan.plan(spec.replaced(granularity=granularity, evaluation_samples=1), device_memory=1)
    assert planned.device == CUDA and planned.seconds == {} and planned.available_device_memory == 2**30
    trained = max(sum(p.numel() for p in decoder.trained(w, "matrices").values()) for w in decoder.windows(granularity))
    found = planned.device_memory["reconstruct"]
    # The window itself, gradients and two moments, beside what its batch takes.
    assert found["gradients and AdamW"] == pytest.approx(3 * 4 * trained, rel=0.35)
    assert 4 * 4 * trained * 0.9 < sum(found.values()) < sum(planned.memory["reconstruct"].values())
    assert "time         not known" in str(planned) and "GiB on cuda:0" in str(planned)


def test_what_does_not_fit_onto_a_device_is_told_what_would(spec, monkeypatch):
    halves = {"half-block": 1, "block": 2, "2-blocks": 4, "4-blocks": 8, "model": 8}

    def memory(spec, evaluated=True, on_disk=False, device=rehearsal.HOST):
        """Of a device, a GiB for each half-block of a window; of the host, one where the model is on disk, else ten."""
        host = {"process": 0.0, "dense model": (1.0 if on_disk else 10.0) * plan.GIB}
        return {
            "cuda": {"reconstruct": {"window": halves[spec.reconstruction.granularity] * float(plan.GIB)}},
            "cpu": {"reconstruct": host},
        }

    def said(stream: str, **room: float) -> tuple[str, str]:
        planned = plan.plan(spec.replaced(granularity="model"), stream=stream, **room)
        return planned.problem, plan.advice(planned)

    monkeypatch.setattr(plan, "_memory", memory)
    assert said("no", memory=20, device_memory=9) == ("", "")
    problem, advice = said("no", memory=20, device_memory=5)
    assert problem == "needs 8.0 GiB of memory on cuda:0, of which there are 5.0 GiB"
    assert advice == "--granularity 2-blocks would fit, with 4.0 GiB on cuda:0"
    assert said("no", memory=5, device_memory=9)[1] == "--stream yes would fit, with 1.0 GiB"
    # Where both are too little, the model has to stay on the disk, and the window has to be smaller.
    problem, advice = said("no", memory=5, device_memory=2.5)
    assert "of memory," in problem and "memory on cuda:0" in problem
    assert advice == "--stream yes --granularity block would fit, with 2.0 GiB on cuda:0"
    assert said("yes", memory=5, device_memory=0.5)[1].startswith("even --")
    assert "of disk, of which there are 0.0 GiB" in said("yes", memory=20, device_memory=9, disk=1e-6)[0]


def test_memory_of_a_device_is_that_of_a_gpu(spec):
    for name in ("cpu", "cuda:first"):
        with pytest.raises(ReconError, match=f"device is '{name}'; allowed: auto, cuda"):
            plan.plan(spec.replaced(device=name), device_memory=24)
    if not torch.cuda.is_available():
        with pytest.raises(ReconError, match="--device-memory"):
            plan.plan(spec.replaced(device="cuda"))


def test_a_short_run_is_not_planned(spec, monkeypatch):
    monkeypatch.setattr(plan, "plan", None)
    assert plan.check(spec) is None


@pytest.mark.parametrize("stream, save", [("no", True), ("yes", True), ("yes", False)])
def test_the_disk_that_counts_is_the_one_that_is_written_to(stream, save, spec, tmp_path, monkeypatch):
    """Of the folder to save to, though it is yet to be made; of the cache, where a streamed run saves nothing."""
    asked, usage = [], plan.shutil.disk_usage
    monkeypatch.setattr(plan, "_memory", lambda *_, **__: {"cpu": {"load": {"process": 0.0}}})
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda place: asked.append(place) or usage(place))
    monkeypatch.setenv("RECON_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    (tmp_path / "results").mkdir()
    plan.plan(spec, save, tmp_path / "results" / "some" / "where", stream)
    assert asked == [tmp_path / ("results" if save else "cache")]


def test_what_has_begun_is_not_planned_again(spec, tmp_path, monkeypatch):
    """Its own work is on the disk by now, and what it takes would count twice."""
    spec = spec.replaced(granularity="none")
    monkeypatch.setattr(plan, "LONG", 0)
    monkeypatch.setattr(
        "recon.experiment.streamed.checkpoint.write_card", lambda *_: (_ for _ in ()).throw(RuntimeError("the power is gone"))
    )
    _, error = study.run_or_record_failure(spec, save=tmp_path / "saved", stream="yes", progress=False)
    assert str(error) == "the power is gone"
    monkeypatch.undo()
    monkeypatch.setattr(plan, "LONG", 0)
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    for _ in range(2):
        record, error = study.run_or_record_failure(spec, save=tmp_path / "saved", stream="yes", progress=False)
        assert error is None and record.status == "done"
    _, error = study.run_or_record_failure(spec, save=tmp_path / "other", stream="yes", progress=False)
    assert "of disk, of which there are 0.0 GiB" in str(error)


def test_72b_parameters_are_planned_without_weights(config_folder, monkeypatch, capsys):
    monkeypatch.setattr(plan, "available_memory", lambda: 2**40)
    folder = config_folder(QWEN_72B)
    before = plan.resident()
    cli.main(["plan", "--model", folder, "--granularity", "block", "--criterion", "magnitude", "--held-out-samples", "0"])
    said = capsys.readouterr().out
    assert plan.resident() - before < 2**30
    assert "72,706,203,648 parameters" in said and "80 of block" in said and "fits" in said
    shapes = plan.shapes_of(folder).decoder
    spec = RunSpec.of(model=folder, granularity="block", criterion="magnitude", held_out_samples=0)
    parts = max(plan._memory(spec, evaluated=False)["cpu"].values(), key=lambda parts: sum(parts.values()))
    weights = sum(p.nbytes for p in shapes.model.parameters())
    assert parts["dense model"] == pytest.approx(weights, rel=0.001)
    assert parts["pruned model"] == pytest.approx(weights, rel=0.01)


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
    "SparseGPT": {"model": "wide", "granularity": "none", "criterion": "sparsegpt"},
    "full retraining": {"model": "wide", "granularity": "none", "retrain": "full"},
    "blocks, mixed": {"model": "deep", "granularity": "block", "propagation": "mixed", "batch_size": 4, "samples": 32},
    "quarters, norms too": {"model": "deep", "granularity": "quarter", "train": "all"},
    "experts": {"model": "experts", "criterion": "wanda", "samples": 16, "sequence_length": 256},
    "streamed": {"model": "deep", "stream": "yes", "granularity": "model", "samples": 16},
    "exact start": {"model": "smollm2-135m", "start": "exact", "exact_iterations": 2, "sequence_length": 256},
}
MEASURE = """
import json, sys
from recon.experiment.plan import plan
from recon.experiment.run import run
from recon.experiment.config import RunSpec

spec, stream = RunSpec.of(**json.loads(sys.argv[1])), sys.argv[2]
planned = plan(spec, stream=stream)
measured = run(spec, stream=stream, progress=False).peak_memory_bytes
print(json.dumps({"process": planned.peak["process"], "predicted": planned.peak_memory, "measured": measured}))
"""


@pytest.fixture(scope="session")
def larger_models(tiny_folder, tmp_path_factory):
    folders = {}
    for name, shape in SHAPES.items():
        folders[name] = tmp_path_factory.mktemp(name)
        AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(folders[name])
        options = {
            "num_attention_heads": 8,
            "num_key_value_heads": 8,
            "max_position_embeddings": 1024,
            "tie_word_embeddings": True,
        }
        make_model(**({"family": "llama", "std": 0.02} | shape | options)).save_pretrained(folders[name])
    return folders


@pytest.mark.slow
@pytest.mark.parametrize("name", MEASURED)
def test_predicted_memory_is_within_a_fifth_of_what_a_run_takes(name, larger_models):
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
    assert predicted == pytest.approx(measured, rel=0.2)
