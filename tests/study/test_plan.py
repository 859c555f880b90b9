from types import SimpleNamespace

import pytest
import torch
from fixtures.families import small_model
from fixtures.models import make_model
from fixtures.runs import record_of
from transformers import AutoModelForCausalLM

from recon import cli
from recon.data import models
from recon.errors import ReconError
from recon.model.discovery import decompose
from recon.runtime.device import COMPUTE_DTYPES
from recon.study import cost, plan, studies
from recon.study.memory import highest
from recon.study.shapes import shapes_of
from recon.study.spec import RunOptions, RunSpec

QWEN_72B = {  # config.json of Qwen2.5-72B, as far as shapes go
    "model_type": "qwen2", "hidden_size": 8192, "intermediate_size": 29568, "num_hidden_layers": 80, "num_attention_heads": 64,
    "num_key_value_heads": 8, "vocab_size": 152064, "max_position_embeddings": 32768, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture
def spec(tiny_folder, tiny_text):
    return RunSpec.of(
        model=tiny_folder, text=tiny_text, samples=8, epochs=1, sequence_length=32, held_out_samples=2, evaluation_texts=(tiny_text,),
        evaluation_samples=2, evaluation_length=64, criterion="magnitude",
    )  # fmt: skip


def test_memory_of_a_window_is_counted():
    """Gradients, two moments and the copy of a window follow from what is trained in it; activations from its batch."""
    decoder, base = decompose(make_model("llama", num_hidden_layers=4)), RunSpec.of(sequence_length=32, compute_dtype="float32")
    assert plan.window_memory(decoder, base.replaced(granularity="none")) == {}
    found = {
        name: plan.window_memory(decoder, base.replaced(granularity=name))
        for name in ("half-block", "block", "2-blocks", "model")
    }
    trained = sum(p.numel() for p in decoder.trained(decoder.windows("block")[0], "matrices").values())
    for name, blocks in (("block", 1), ("2-blocks", 2), ("model", 4)):
        assert found[name]["gradients"] == 4 * blocks * trained and found[name]["moments"] == 8 * blocks * trained
        assert (
            found[name]["copies"] == (4 + 2) * blocks * trained
            and found[name]["activations"] == blocks * found["block"]["activations"]
        )
    assert sum(found["half-block"].values()) < sum(found["block"].values())
    rounded = plan.window_memory(decoder, base.replaced(granularity="block", compute_dtype="bfloat16"))
    assert rounded["copies"] == (4 + 2 + 2) * trained and rounded["activations"] < found["block"]["activations"]
    adapted = plan.window_memory(decoder, base.replaced(granularity="block", adapter="masklora", rank=2))
    assert adapted["moments"] < 0.2 * found["block"]["moments"]
    exact = plan.window_memory(decoder, base.replaced(granularity="matrix", solver="exact"))
    assert exact["gradients"] == exact["activations"] == 0 < exact["statistics"]


@pytest.mark.parametrize("family, experts", [("qwen3_moe", "num_experts"), ("deepseek_v3", "n_routed_experts")])
def test_mixtures_of_experts_are_planned(family, experts, spec, config_folder):
    config = small_model(family).config
    setattr(config, experts, 16)
    model = AutoModelForCausalLM.from_config(config)
    spec = spec.replaced(model=config_folder(model.config.to_dict()), granularity="block", criterion="wanda")
    planned = plan.plan(spec.replaced(evaluation_samples=1))
    assert planned.parameters == sum(p.numel() for p in model.parameters())
    decoder = shapes_of(spec.model.model).decoder
    trained = sum(p.numel() for p in decoder.trained(decoder.windows("block")[-1], "matrices").values())
    # Gradients and two moments of all that is trained, experts that no token reaches included.
    assert planned.memory["cpu"]["reconstruct"]["gradients and AdamW"] == 3 * 4 * trained


def test_a_plan_and_a_run_agree_on_lengths_that_are_not_given(spec):
    asked = spec.replaced(sequence_length=0, evaluation_length=0, granularity="none", samples=1)
    planned = plan.plan(asked)
    assert planned.spec == asked.replaced(sequence_length=256, evaluation_length=256)  # what the model was made for
    record = record_of(asked)
    assert record.spec == planned.spec.flat() and record.key == planned.spec.key() == asked.key()
    assert planned.tokens["evaluate"] == 2 * 256 and record.tokens["prune"] == 256 and record.flops == planned.flops


def test_what_is_counted_is_what_is_there(spec, tmp_path):
    planned, saved = plan.plan(spec, save=True), tmp_path / "saved"
    record = record_of(spec, save=saved)
    model, _ = models.load(str(saved))
    decoder = decompose(model)
    assert planned.parameters == sum(p.numel() for p in model.parameters())
    assert planned.prunable == sum(m.weight.numel() for m in decoder.matrices().values())
    assert planned.weights == "float32" and "dense        float32\n" in str(planned)
    assert planned.windows == len(record.windows)
    assert planned.largest_window == max(
        sum(p.numel() for p in decoder.parameters(w).values()) for w in decoder.windows("half-block")
    )
    assert planned.flops == record.flops == cost.flops(spec, decoder)
    assert planned.tokens == {"reconstruct": 8 * 32, "evaluate": 2 * 64}
    assert record.tokens["reconstruct"] == planned.tokens["reconstruct"]
    file = saved / "model.safetensors"
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert planned.disk == file.stat().st_size - header == 2 * plan.plan(spec, save=True, save_dtype="bfloat16").disk


def test_what_cannot_fit_is_refused_before_weights_are_read_and_told_what_would(spec, monkeypatch):
    def read(*args, **kwargs):
        raise AssertionError("weights are read")

    def have(planned):
        monkeypatch.setattr(plan, "available_memory", lambda: int(planned.rooms["memory"][0]) + 1000)

    monkeypatch.setattr(plan, "_can_be_streamed", lambda spec: False)  # streaming would come before all else
    monkeypatch.setattr(models, "load", read)
    monkeypatch.setattr(plan, "LONG", 0)
    monkeypatch.setattr(plan, "resident", lambda: 0)
    # In bfloat16, whose copies make windows the peak; in float32, evaluation is, whatever the window.
    large = spec.replaced(granularity="model", evaluation_samples=1, compute_dtype="bfloat16")
    have(plan.plan(large.replaced(granularity="2-blocks")))
    record, error = studies.run_or_record_failure(large)
    assert isinstance(error, ReconError) and record.status == "failed"
    assert "needs" in str(error) and "--granularity 2-blocks would fit" in str(error)
    _, error = studies.run_or_record_failure(large, RunOptions(force=True))
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
        patched.setattr(plan, "peak_memory", lambda *args, **options: on_disk.memory)
        half, both = (
            plan.plan(spec.replaced(compute_dtype=d), True, stream="yes", save_dtype="bfloat16") for d in COMPUTE_DTYPES
        )
    assert half.disk == pytest.approx(on_disk.disk - 2 * on_disk.parameters, rel=0.05) and half.disk < on_disk.disk < both.disk
    assert on_disk.disk >= 4 * on_disk.parameters + on_disk.prunable // 8 > here.disk == 0
    phase, other = (planned.memory["cpu"]["reconstruct"] for planned in (here, on_disk))
    # A block of four, and nothing of the dense model beside it.
    assert other["weights in hand"] < 0.3 * phase["dense model"] and "dense model" not in other
    assert sum(other.values()) < sum(phase.values())

    too_little = on_disk.rooms["memory"][0] + 1000
    monkeypatch.setattr(plan, "available_memory", lambda: int(too_little))
    monkeypatch.setattr(plan, "LONG", 0)
    with pytest.raises(ReconError, match="--stream yes would fit"):
        plan.check(spec, stream="no")
    with pytest.raises(ReconError, match="retraining"):
        plan.plan(spec.replaced(retrain="full"), stream="yes")


def test_where_the_disk_is_too_small_it_is_said_what_would_fit(spec, monkeypatch):
    monkeypatch.setattr(plan, "peak_memory", lambda *args, **options: {"cpu": {"reconstruct": {"process": 0.0}}})
    spec = spec.replaced(granularity="block", samples=64)

    def said(stream: str, free: int) -> str:
        planned = plan.plan(spec, save=True, stream=stream, disk=free / plan.GIB)
        assert "of disk" in planned.problem
        return plan.advice(planned)

    planned = plan.plan(spec, save=True, stream="yes")
    activations = 4 * 4 * 32 * (64 + 2) * 32  # of two models, before and after a window, in float32
    rest = planned.disk - activations
    # A quarter of the samples; all that helps, where not even that will do.
    assert "--samples 16 would fit" in said("yes", rest + activations * (16 + 2) // (64 + 2))
    assert said("yes", rest).startswith("even --samples 8 would need")
    assert "do not save" in said("no", 0)


# --- a GPU that is not here ---------------------------------------------------------------------------------------------

CUDA = torch.device("cuda", 0)


@pytest.mark.parametrize("family", ["llama4_text", "biogpt", "mamba", "lfm2", "qwen3_next"])
def test_families_are_planned_with_and_without_a_gpu(family, spec, config_folder):
    """Experts multiplied all at once, halves that are no module, convolutions, routers in another dtype; taken apart as narrower ones."""
    spec = spec.replaced(model=config_folder(small_model(family).config.to_dict()), evaluation_samples=1, granularity="block")
    spec = spec.replaced(compute_dtype="bfloat16")
    if family != "mamba":
        spec = spec.replaced(granularity="half-block")
    on_host, with_gpu = (plan.plan(spec, stream="yes", device_memory=memory) for memory in (None, 1))
    assert on_host.memory.keys() == {"cpu"} and sum(with_gpu.memory["cuda"]["reconstruct"].values()) > 0


@pytest.mark.parametrize("granularity", ["2-blocks", "model"])
def test_memory_of_a_device_follows_the_window(granularity, spec):
    decoder = shapes_of(spec.model.model).decoder
    spec = spec.replaced(
        granularity=granularity, samples=32, batch_size=32, accumulation=2
    )  # as large as where nothing is trained
    planned = plan.plan(spec, device_memory=1)
    assert planned.device == CUDA and planned.seconds == {} and planned.available["cuda"] == 2**30
    trained = max(sum(p.numel() for p in decoder.trained(w, "matrices").values()) for w in decoder.windows(granularity))
    there, here, alone = (
        *(planned.memory[kind]["reconstruct"] for kind in ("cuda", "cpu")),
        plan.plan(spec).memory["cpu"]["reconstruct"],
    )
    # The window itself, gradients and two moments, beside what its batch takes; models and activations of all samples are on the host.
    assert there["gradients and AdamW"] == 3 * 4 * trained and there["weights in hand"] >= 4 * trained
    assert not there.keys() & {"dense model", "pruned model", "masks", "activations of all samples"}
    assert not here.keys() & {"gradients and AdamW", "one batch", "rounded weights"}
    assert sum(here.values()) < sum(alone.values())
    assert "time         not known" in str(planned) and "GiB memory on cuda:0" in str(planned)


def test_what_does_not_fit_onto_a_device_is_told_what_would(spec, monkeypatch):
    halves = {"half-block": 1, "block": 2, "2-blocks": 4, "4-blocks": 8, "model": 8}

    def memory(spec, device, on_disk=False):
        """Of a device, a GiB for each half-block of a window; of the host, one where the model is on disk, else ten."""
        host = {"process": 0.0, "dense model": (1.0 if on_disk else 10.0) * plan.GIB}
        return {
            "cuda": {"reconstruct": {"window": halves[spec.reconstruction.granularity] * float(plan.GIB)}},
            "cpu": {"reconstruct": host},
        }

    def said(stream: str, **room: float) -> tuple[str, str]:
        planned = plan.plan(spec.replaced(granularity="model"), stream=stream, **room)
        return planned.problem, plan.advice(planned)

    monkeypatch.setattr(plan, "peak_memory", memory)
    assert said("no", memory=20, device_memory=9) == ("", "")
    problem, advice = said("no", memory=20, device_memory=5)
    assert problem == "needs 8.0 GiB of memory on cuda:0, of which there are 5.0 GiB"
    assert advice == "--granularity 2-blocks would fit, with 4.0 GiB of memory on cuda:0"
    assert said("no", memory=5, device_memory=9)[1] == "--stream yes would fit, with 1.0 GiB of memory"
    # Where both are too little, the model has to stay on the disk, and the window has to be smaller.
    problem, advice = said("no", memory=5, device_memory=2.5)
    assert "of memory," in problem and "memory on cuda:0" in problem
    assert advice == "--stream yes --granularity block would fit, with 2.0 GiB of memory on cuda:0"
    assert said("yes", memory=5, device_memory=0.5)[1].startswith("even --")
    assert "of disk, of which there are 0.0 GiB" in said("yes", memory=20, device_memory=9, disk=1e-6)[0]


def test_memory_of_a_device_is_that_of_a_gpu(spec):
    for name in ("cpu", "cuda:first"):
        with pytest.raises(ReconError, match=f"device is '{name}'; allowed: auto, cuda"):
            plan.plan(spec.replaced(device=name), device_memory=24)
    if not torch.cuda.is_available():
        with pytest.raises(ReconError, match="--device-memory"):
            plan.plan(spec.replaced(device="cuda"))


def test_the_plan_of_a_short_run_is_not_told(spec, monkeypatch):
    assert plan.check(spec) is None
    monkeypatch.setattr(plan, "LONG", 0)
    assert plan.check(spec).problem == ""


@pytest.mark.parametrize("stream, save", [("no", True), ("yes", True), ("yes", False)])
def test_the_disk_that_counts_is_the_one_that_is_written_to(stream, save, spec, tmp_path, monkeypatch):
    """Of the folder to save to, though it is yet to be made; of the cache, where a streamed run saves nothing."""
    asked, usage = [], plan.shutil.disk_usage
    monkeypatch.setattr(plan, "peak_memory", lambda *_, **__: {"cpu": {"load": {"process": 0.0}}})
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
    monkeypatch.setattr("recon.study.checkpoint.write_card", lambda *_: (_ for _ in ()).throw(RuntimeError("the power is gone")))
    _, error = studies.run_or_record_failure(spec, RunOptions(save=tmp_path / "saved", stream="yes"))
    assert str(error) == "the power is gone"
    monkeypatch.undo()
    monkeypatch.setattr(plan, "LONG", 0)
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    for _ in range(2):
        record, error = studies.run_or_record_failure(spec, RunOptions(save=tmp_path / "saved", stream="yes"))
        assert error is None and record.status == "done"
    _, error = studies.run_or_record_failure(spec, RunOptions(save=tmp_path / "other", stream="yes"))
    assert "of disk, of which there are 0.0 GiB" in str(error)


def test_72b_parameters_are_planned_without_weights(config_folder, monkeypatch, capsys):
    monkeypatch.setattr(plan, "available_memory", lambda: 2**40)
    folder = config_folder(QWEN_72B)
    before = plan.resident()
    cli.main(["plan", "--model", folder, "--granularity", "block", "--criterion", "magnitude", "--held-out-samples", "0"])
    said = capsys.readouterr().out
    assert plan.resident() - before < 2**30
    assert "72,706,203,648 parameters" in said and "80 of block" in said and "fits" in said
    shapes = shapes_of(folder).decoder
    spec = RunSpec.of(model=folder, granularity="block", criterion="magnitude", held_out_samples=0).resolved()
    parts = highest(plan.peak_memory(spec, torch.device("cpu"))["cpu"])
    weights = sum(p.nbytes for p in shapes.model.parameters())
    assert parts["dense model"] == pytest.approx(weights, rel=0.001)
    assert parts["pruned model"] == pytest.approx(weights, rel=0.01)
