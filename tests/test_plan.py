import json
from dataclasses import replace

import pytest
import torch
from conftest import FAMILIES, make_model
from torch.utils._pytree import tree_leaves

from recon import cli, estimate, models, plan, study
from recon.decoder import Decoder
from recon.errors import ReconError
from recon.rehearsal import Ledger, Rehearsal, peaks
from recon.runs import Run, run
from recon.spec import RunSpec

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
    return RunSpec(
        model=tiny_folder, text=tiny_text, samples=8, sequence_length=32, held_out_samples=2, evaluation_texts=(tiny_text,),
        evaluation_samples=2, evaluation_length=64, criterion="magnitude",
    )  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "gemma3", "opt", "gpt2", "phi", "bloom"])
def test_a_model_is_taken_apart_by_its_configuration_as_with_its_weights(family, config_folder):
    model = make_model(family)
    real, shapes = Decoder(model), plan.shapes_of(config_folder(model.config.to_dict())).decoder
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in shapes.model.named_parameters()}
    assert all(p.device.type == "meta" for p in shapes.model.parameters())
    assert shapes.groups == real.groups
    for granularity in ("half-block" if family in FAMILIES else "matrix", "block"):
        assert shapes.windows(granularity) == real.windows(granularity)
        for window in real.windows(granularity):
            assert shapes.parameters(window).keys() == real.parameters(window).keys()
            assert shapes.matrices(window).keys() == real.matrices(window).keys()


def test_what_is_counted_is_what_is_there(spec, tmp_path):
    planned, saved = plan.plan(spec, save=True), tmp_path / "saved"
    record = run(spec, save=saved, progress=False)
    model, _ = models.load(str(saved))
    decoder = Decoder(model)
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
    assert planned.disk == file.stat().st_size - header


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
        {"granularity": "none", "criterion": "sparsegpt", "then": "full"},
        {"granularity": "block", "start": "exact", "swaps": 2},
        {"granularity": "none", "then": "masklora", "then_checkpointing": True},
    ],
    ids=lambda options: " ".join(map(str, options.values())),
)
def test_the_rehearsal_takes_the_bytes_that_the_run_takes(spec, options):
    """Shapes alone, on two or three blocks and a few batches, against every tensor of the whole run on four blocks."""
    spec, (config, decoder) = replace(spec, **options), plan.shapes_of(spec.model)
    # Whether pruning changes weights decides, in a rehearsal, what the run sees for itself.
    ledger = Counted(equal=False)
    with ledger:
        Real(spec, config, decoder, ledger, evaluated=True).execute(None, "")
    real, rehearsed = _totals(ledger.peaks), _totals(peaks(spec, config, decoder))
    assert rehearsed.keys() == real.keys()
    for phase, total in real.items():
        assert rehearsed[phase] == pytest.approx(total, rel=0.1), phase


def test_what_cannot_fit_is_refused_before_weights_are_read_and_told_what_would(spec, monkeypatch):
    def read(*args, **kwargs):
        raise AssertionError("weights are read")

    def have(planned):
        monkeypatch.setattr(plan, "available_memory", lambda: int(planned.peak_memory - planned.peak["process"]) + 1000)

    monkeypatch.setattr(models, "load", read)
    monkeypatch.setattr(plan, "LONG", 0)
    monkeypatch.setattr(plan, "resident", lambda: 0)
    large = replace(spec, granularity="model", evaluation_samples=1)
    have(plan.plan(replace(large, granularity="2-blocks")))
    record, error = study.run_or_record_failure(large)
    assert isinstance(error, ReconError) and record.status == "failed"
    assert "needs" in str(error) and "--granularity 2-blocks would fit" in str(error)
    _, error = study.run_or_record_failure(large, force=True)
    assert isinstance(error, AssertionError)

    monkeypatch.setattr(plan, "available_memory", lambda: 1000)
    with pytest.raises(ReconError, match="even .*--granularity half-block.* would need"):
        plan.check(large)
    # What is loaded already need not fit once more.
    assert plan.check(large, loaded=2**30)


def test_a_short_run_is_not_planned(spec, monkeypatch):
    monkeypatch.setattr(plan, "plan", None)
    assert plan.check(spec) is None


def test_72b_parameters_are_planned_without_weights(config_folder, monkeypatch, capsys):
    monkeypatch.setattr(plan, "available_memory", lambda: 2**40)
    folder = config_folder(QWEN_72B)
    before = plan.resident()
    cli.main(["plan", "--model", folder, "--granularity", "block", "--criterion", "magnitude", "--held-out-samples", "0"])
    said = capsys.readouterr().out
    assert plan.resident() - before < 2**30
    assert "72,706,203,648 parameters" in said and "80 of block" in said and "fits" in said
    shapes = plan.shapes_of(folder).decoder
    spec = RunSpec(model=folder, granularity="block", criterion="magnitude", held_out_samples=0)
    parts = max(plan._memory(spec, evaluated=False).values(), key=lambda parts: sum(parts.values()))
    weights = sum(p.nbytes for p in shapes.model.parameters())
    assert parts["dense model"] == pytest.approx(weights, rel=0.001)
    assert parts["pruned model"] == pytest.approx(weights, rel=0.01)
