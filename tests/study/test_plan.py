"""What a plan says is what a run does: operations, memory, disk; and it reads no weights."""

import contextlib
import copy
import functools
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fixtures.families import small_model
from fixtures.models import FAMILIES, FLOAT32, copied, make_model, random_tokens
from fixtures.runs import record_of, result_of
from test_refusals import refuse
from torch.utils.flop_counter import FlopCounterMode, addmm_flop
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from recon import PruningConfig, ReconError, RunOptions, RunSpec, cli, decompose, prune, reconstruct, retrain, sample_tokens
from recon.data import models
from recon.data.text import SPLITS
from recon.runtime.device import resident
from recon.study import measure, plan

LONGER = {"samples": 32, "sequence_length": 48}
SIZES = {"hidden_size": 64, "intermediate_size": 192}


@pytest.fixture
def spec(tiny_spec):
    return tiny_spec.replaced(samples=8, criterion="magnitude")


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi", "bloom", "mixtral"])
def test_a_model_is_decomposed_by_its_configuration_as_with_its_weights(family, config_folder):
    model = make_model(family)
    real, shapes = decompose(model), plan.shapes_of(config_folder(model.config.to_dict()))
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in shapes.model.named_parameters()}
    assert shapes.groups == real.groups
    for granularity in ("half-block" if family in FAMILIES else "block", "2-blocks"):
        assert shapes.windows(granularity) == real.windows(granularity)
        for window in real.windows(granularity):
            inside = [(each.parameters(window).keys(), each.matrices(window).keys()) for each in (shapes, real)]
            assert inside[0] == inside[1]


def test_a_narrow_copy_has_not_as_many_rows_as_experts_which_routers_have(config_folder):
    widths = {"hidden_size": 64, "moe_intermediate_size": 64, "kv_lora_rank": 64, "intermediate_size": 64, "q_lora_rank": None}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16}
    routed = {"n_shared_experts": 1, "n_routed_experts": 8, "num_experts_per_tok": 2, "first_k_dense_replace": 1}
    config = AutoConfig.for_model("deepseek_v2", num_hidden_layers=2, vocab_size=99, **widths, **heads, **routed)
    real, shapes = decompose(AutoModelForCausalLM.from_config(config)), plan.shapes_of(config_folder(config.to_dict()))
    assert shapes.matrices().keys() == real.matrices().keys()


class Anywhere(contextlib.nullcontext):
    """In the place of torch's tracker of modules, which fails at gradients by what a module reads."""

    parents = ("Global",)


COUNTER = functools.partial(FlopCounterMode, display=False, custom_mapping={torch.ops.aten.addmm_: addmm_flop.__wrapped__})
ALONE = [  # pruning or retraining
    (0.07, {"criterion": "wanda"}), (0.07, {"statistics": "sparse"}),
    (0.07, {"criterion": "wanda++"}), (0.07, {"allocation": "dlp"}), (0.1, {"criterion": "admm"}), (0.15, {"mask_refinement": 1}),
    (0.1, {"criterion": "magnitude", "weighting": "fisher", "samples": 128, "sequence_length": 16}),
    (0.15, {"allocation": "measured", "samples": 4, "sequence_length": 128}),
    (0.07, {"retrain": "full"}), (0.07, {"retrain": "norms"}), (0.07, {"retrain": "scalelora", "retrain_objective": "distil"}),
    (0.07, {"retrain": "masklora", "retrain_checkpointing": True, "retrain_batch_size": 1}),
]  # fmt: skip


@pytest.mark.parametrize("near, options", [
    *((near, {"granularity": "none"} | options) for near, options in ALONE),
    (0.07, {"granularity": "half-block", "propagation": "dense", "epochs": 3}),
    (0.07, {"granularity": "half-block", "propagation": "sparse", "adapter": "masklora"}),
    (0.07, {"granularity": "matrix", "propagation": "mixed"}), (0.07, {"granularity": "2-blocks", "propagation": "mixed"}),
    (0.07, {"granularity": "model"}),
    (0.15, {"granularity": "matrix", "solver": "exact", "exact_iterations": 4, "propagation": "dense"} | LONGER),
    (0.15, {"granularity": "matrix", "solver": "exact", "exact_iterations": 4, "propagation": "mixed"} | LONGER),
    *((0.1, {"granularity": "block", "samples": samples, "batch_size": 1, "held_out_samples": count})
      for samples, count in ((2, 0), (2, 2), (1, 0), (2, 1))),  # errors
], ids=lambda given: " ".join(map(str, given.values())) if isinstance(given, dict) else "")  # fmt: skip
def test_operations_are_those_that_run(near, options, config_folder, monkeypatch):
    """Nearly: errors are measured on two samples more, and the counter does not see into the attention kernel."""
    monkeypatch.setattr("torch.utils.flop_counter.ModuleTracker", Anywhere)
    dense = make_model("llama", **SIZES, max_position_embeddings=128)
    common = {"samples": 96, "sequence_length": 12, "held_out_samples": 0}  # so short that attention hardly counts
    common |= {"epochs": 1, "batch_size": 16, "retrain_epochs": 1, "retrain_batch_size": 16}
    spec = RunSpec.of(**{**common, "model": config_folder(dense.config.to_dict()), **options})
    teacher, model, length = decompose(dense), copy.deepcopy(dense), spec.calibration.sequence_length
    batch, measured = random_tokens(spec.calibration.samples, length), spec.calibration.held_out_samples
    held_out = {"held_out": random_tokens(measured, length, seed=1)} if measured else {}
    retrained, fitted = spec.retraining.retrain != "none", spec.reconstruction.granularity != "none"
    if retrained or fitted:
        masks = prune(model, config=PruningConfig(criterion="magnitude"), execution=FLOAT32).masks
    student = decompose(model, like=teacher)
    with COUNTER() as counter:
        if retrained:
            retrain(student, batch, spec.retraining, masks=masks, dense=teacher, execution=FLOAT32)
        elif fitted:
            reconstruct(student, teacher, batch, spec.reconstruction, masks=masks, execution=FLOAT32, **held_out)
        else:
            prune(student, batch, spec.pruning, execution=FLOAT32)
    phase = "retrain" if retrained else "reconstruct" if fitted else "prune"
    assert plan.flops(spec)[phase] == pytest.approx(counter.get_total_flops(), rel=near)


@pytest.mark.parametrize("held_out, options", [(0, {}), (24, {}), (24, {"granularity": "none", "retrain": "norms"})])
def test_operations_of_measuring_are_those_that_run(held_out, options, config_folder):
    dense = make_model("llama", **SIZES)
    how = {"evaluation_samples": 8, "evaluation_length": 12, "kl_windows": 4, "sequence_length": 12}
    how["evaluation_texts"] = ("news",)
    spec = RunSpec.of(**how, held_out_samples=held_out, model=config_folder(dense.config.to_dict()), **options)
    teacher, read = decompose(dense), random_tokens(held_out, 12) if held_out else None
    texts = measure.Texts(random_tokens(2, 12), read, {"news": random_tokens(8, 12)})
    with COUNTER() as counter:
        _, states = measure.measure(teacher, "dense", texts, spec.evaluation, None, FLOAT32)
        for name in ("pruned", "reconstructed"):
            measure.measure(copied(teacher), name, texts, spec.evaluation, None, FLOAT32, (teacher, states))
    assert plan.flops(spec)["evaluate"] == pytest.approx(counter.get_total_flops(), rel=0.07)


def test_operations_count_the_experts_that_a_token_sees(config_folder, tmp_path):
    found = {}
    for seen in (4, 2):
        model = make_model("mixtral", num_experts_per_tok=seen, num_hidden_layers=2)
        model.config.save_pretrained(tmp_path / str(seen))
        short = {"sequence_length": 16, "evaluation_length": 16, "held_out_samples": 0, "kl_windows": 0}
        spec = RunSpec.of(model=str(tmp_path / str(seen)), **short, granularity="block")
        found[seen] = plan.flops(spec)["evaluate"]
    experts = sum(matrix.weight.numel() for matrix in decompose(model).matrices().values() if matrix.expert is not None)
    assert found[4] - found[2] == 3 * spec.evaluation.evaluation_samples * 16 * 2 * experts / 2


def test_memory_of_a_window_is_counted():
    """Gradients, two moments and the copy of a window follow from what is trained in it; activations from its batch."""
    decoder, base = decompose(make_model("llama", num_hidden_layers=4)), RunSpec.of(sequence_length=32, compute_dtype="float32")
    memory = functools.partial(plan.window_memory, decoder, device=torch.device("cpu"))
    found = {name: memory(base.replaced(granularity=name)) for name in ("none", "half-block", "block", "model")}
    elements = sum(p.numel() for p in decoder.trained(decoder.windows("block")[0], "matrices").values())
    for name, blocks in (("block", 1), ("model", 4)):
        per_element = {part: found[name][part] / (blocks * elements) for part in ("gradients", "moments", "copies", "rounded")}
        assert per_element == {"gradients": 4, "moments": 8, "copies": 4, "rounded": 4}  # 4: masks
        assert found[name]["activations"] == blocks * found["block"]["activations"]
    assert found["none"] == {} and sum(found["half-block"].values()) < sum(found["block"].values())
    base = base.replaced(granularity="block")
    rounded = memory(base.replaced(compute_dtype="bfloat16"))
    assert rounded["rounded"] == (4 + 2) * elements and rounded["activations"] < found["block"]["activations"]
    assert memory(base.replaced(adapter="masklora", rank=2))["moments"] < 0.2 * found["block"]["moments"]
    weights = sum(matrix.weight.numel() for matrix in decoder.matrices(decoder.windows("block")[0]).values())
    assert memory(base.replaced(criterion="wanda++"))["statistics"] == 12 * weights > found["block"]["statistics"] == 0
    norms, whole = memory(base.replaced(granularity="none", retrain="norms")), decoder.model.num_parameters()
    vectors = sum(parameter.numel() for parameter in decoder.model.parameters() if parameter.ndim == 1)
    assert [norms[part] for part in ("gradients", "moments", "copies")] == [4 * vectors, 8 * vectors, 4 * vectors]
    for criterion in ("wanda", "sparsegpt", "wanda++"):  # retraining gathers no statistics
        retrained = memory(base.replaced(granularity="none", retrain="full", criterion=criterion))
        assert (retrained["copies"], retrained["statistics"]) == (4 * whole, 0)
    exact = memory(base.replaced(granularity="matrix", solver="exact"))
    assert exact["gradients"] == exact["activations"] == 0 < exact["statistics"]


def test_a_folder_that_has_changed_is_planned_anew(config_folder):
    folders = (config_folder(make_model("llama", num_hidden_layers=count).config.to_dict()) for count in (2, 3))
    assert [len(plan.shapes_of(folder).blocks) for folder in folders] == [2, 3]


def test_what_takes_less(spec):
    def memory(stream: str = "no", **options) -> dict:
        how = {"evaluation_samples": 1, "granularity": "block", **options}
        return plan.Plan(spec.replaced(**how), RunOptions(stream=stream)).memory["cpu"]

    def needs(*stream: str, **options) -> float:
        return sum(size for part, size in memory(*stream, **options).items() if part not in ("process", "margin"))

    assert needs(criterion="wanda") < needs(criterion="sparsegpt") and needs("yes") < 0.9 * needs("no")
    read = {"criterion": "wanda", "prune_samples": 10**5}
    assert min(needs(**read), needs(evaluation_samples=10**5)) > needs() + 1e8 > needs(prune_samples=10**5)
    long = {"retrain": "full", "retrain_batch_size": 8}
    assert needs(**long, retrain_checkpointing=True) < needs(**long)
    # Blocks that run again in retraining leave reconstruction what it takes; and no batch has more samples than there are.
    whole, again = {"granularity": "model", "batch_size": 8}, {"retrain": "norms", "retrain_checkpointing": True}
    assert memory(**whole, **again)["activations"] == memory(**whole)["activations"]
    assert needs(**long | {"retrain_batch_size": 64}) == needs(**long)
    few = {"granularity": "matrix", "chunks": 4, "samples": 1}
    assert memory(**few, batch_size=64)["activations"] == memory(**few, batch_size=4)["activations"]
    assert memory(**few, batch_size=4)["activations"] > memory(**few, batch_size=1)["activations"]
    # Of all samples: what is read and given, in as many models as are run; magnitudes are pruned without samples.
    stream, streams = 4 * 32 * 32 * 10**4, functools.partial(memory, samples=10**4)
    assert [streams(propagation=way)["streams"] // stream for way in ("dense", "sparse", "mixed")] == [2, 4, 4]
    assert streams(granularity="none", criterion="wanda")["streams"] == 2 * stream
    assert streams(granularity="none")["streams"] < stream / 100


@pytest.mark.parametrize("family", ["mixtral", "llama4_text", "mamba", "t5 (encoder-decoder)"])
def test_families_are_planned(family, spec, config_folder):
    """Experts, routers in another dtype, convolutions, two stacks."""
    spec = spec.replaced(model=config_folder(small_model(family).config.to_dict()), granularity="block", compute_dtype="bfloat16")
    planned = plan.Plan(spec, RunOptions(stream="yes"))
    assert planned.memory.keys() == {"cpu", "disk"} and all(planned.flops[phase] for phase in ("reconstruct", "evaluate"))


def test_a_plan_and_a_run_agree(spec):
    asked = spec.replaced(sequence_length=0, evaluation_length=0, samples=1, granularity="none")
    planned = plan.Plan(asked)
    assert planned.spec == asked.replaced(sequence_length=256, evaluation_length=256)  # what the model was made for
    found = result_of(asked)
    assert found.record.key == planned.spec.key() and found.record.flops == planned.flops
    size = sum(p.numel() for p in found.model.parameters())
    saving = plan.Plan(asked, RunOptions(save="~/a"))
    assert RunOptions(save="~/a").save == Path.home().resolve() / "a"
    assert f"{size:,} parameters" in str(planned) and saving.memory["disk"] == {"saved model": 4 * size}


def test_a_gpu_holds_what_runs_on_it_and_the_host_the_rest(spec):
    """Of memory alone: no GPU is asked."""
    gpu, retraining = torch.device("cuda"), spec.replaced(samples=9, compute_dtype="float32", retrain="full")
    elements = (planned := plan.Plan(retraining)).elements
    memory = planned._peak(gpu)
    assert memory["cuda"]["parameters"] == memory["cpu"]["copies"] == 4 * elements
    assert memory["cpu"]["streams"] == 16 / 9 * planned._peak(torch.device("cpu"))["cpu"]["streams"]  # pinned
    distilling = plan.Plan(retraining.replaced(retrain_objective="distil"))
    assert distilling._peak(gpu)["cuda"]["parameters"] == 8 * elements
    alone = plan.Plan(retraining.replaced(retrain="none"))
    ends = elements - sum(parameter.numel() for parameter in alone.decoder.blocks.parameters())
    assert alone._peak(gpu)["cuda"]["parameters"] >= 8 * ends and "copies" not in alone._peak(gpu)["cpu"]


def test_what_cannot_be_planned_is_refused_and_not_streamed(spec, config_folder):
    config = AutoConfig.for_model("rwkv", vocab_size=99, hidden_size=32, attention_hidden_size=32, num_hidden_layers=8)
    spec = spec.replaced(model=config_folder(config.to_dict()))  # which divides weights in place
    with pytest.raises(ReconError, match="Rwkv.* does not run on tokens alone"):
        plan.Plan(spec)
    assert not plan.stays_on_disk(spec, "auto", math.inf)


def test_what_cannot_fit_is_refused_before_weights_are_read(spec, monkeypatch):
    monkeypatch.setattr("recon.runtime.device.available_memory", lambda: 1000)
    monkeypatch.setattr(models, "load", None)
    with pytest.raises(ReconError, match="this run needs .* try smaller windows or --stream yes"):
        record_of(spec, stream="no")
    cannot_stream = {"pattern": "2:4", "reorder_neurons": True}, {"granularity": "none", "retrain": "full"}
    for options, tries in zip(cannot_stream, ("smaller windows", "--retrain-checkpointing")):
        with pytest.raises(ReconError, match=f"; try {tries}$"):
            record_of(spec.replaced(**options), stream="no")
    with pytest.raises(TypeError, match="not callable"):
        record_of(spec, stream="no", force=True)
    plan.check(spec, RunOptions(stream="no"), loaded=2**30)  # what is loaded already need not fit once more
    for cannot, said in ({"pattern": "3:7"}, "divide"), ({"evaluation_length": 10**6}, "made for"), ({"device": "meta"}, "meta"):
        with pytest.raises(ReconError, match=said):
            plan.Plan(spec.replaced(**cannot))


def test_what_the_disk_has_no_room_for_is_refused(spec, monkeypatch, tmp_path):
    size, room = plan.Plan(spec).elements, SimpleNamespace(free=10**6)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: room)
    plan.check(spec, RunOptions(stream="no"))  # which writes nothing
    said = "GiB of disk, of which there are 0.0; save to another disk, or have RECON_CACHE"
    for options in (RunOptions(stream="yes"), RunOptions(stream="no", save=tmp_path / "to be" / "made")):
        room.free = 10**3
        with pytest.raises(ReconError, match=said):
            plan.check(spec, options)
        room.free = 100 * size
        plan.check(spec, options)
    room.free = 3 * size
    saving = RunOptions(stream="no", save=tmp_path)
    plan.check(spec, replace(saving, save_dtype="bfloat16"))
    for given in ({}, {"save_dtype": "bfloat16", "save_format": "packed"}):  # from plain files, which are beside it then
        with pytest.raises(ReconError, match="disk"):
            plan.check(spec, replace(saving, **given))


def test_72b_parameters_are_planned_without_weights(config_folder, capsys):
    folder = config_folder({
        "model_type": "qwen2", "hidden_size": 8192, "intermediate_size": 29568, "num_hidden_layers": 80,
        "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 152064, "max_position_embeddings": 32768,
        "tie_word_embeddings": False,
    })  # fmt: skip
    before, words = resident(), ["plan", "--model", folder, "--stream", "no"]
    cli.main([*words, "--granularity", "block", "--criterion", "magnitude", "--memory", "1000"])
    said = capsys.readouterr().out
    assert resident() - before < 2**30
    assert "72,706,203,648 parameters" in said and "80 of block" in said and "verdict      fits" in said
    assert "models 541.70" in said  # of both, in float32
    said = refuse([*words, "--memory", "100"], capsys)
    assert "this run needs" in said and "of which there are" in said


SHAPES = {  # of random models with 200 to 300 MB of weights each
    "wide": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4, "vocab_size": 32000},
    "deep": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 24, "vocab_size": 400},
}
MEASURED = {
    "half-blocks": {"model": "wide", "samples": 32, "sequence_length": 512, "criterion": "wanda"},
    "the whole model": {"model": "wide", "granularity": "model"},
    "SparseGPT": {"model": "wide", "granularity": "none", "criterion": "sparsegpt"},
    "full retraining": {"model": "wide", "granularity": "none", "retrain": "full"},
    "quarters, norms too, dense": {"model": "deep", "granularity": "quarter", "train": "all", "propagation": "dense"},
    "streamed model": {"model": "deep", "stream": "yes", "granularity": "model", "samples": 16},
}
MEASURE = """
import json, sys
from recon.study.plan import Plan
from recon.study.run import run
from recon.study.spec import RunOptions, RunSpec
from recon.runtime.device import limit_compiled_shapes

limit_compiled_shapes()  # as the command line does
spec, options = RunSpec.of(**json.loads(sys.argv[1])), RunOptions(stream=sys.argv[2], progress=False)
planned = Plan(spec, options)
process = planned.memory["cpu"]["process"]
print(json.dumps([planned.rooms["memory"][0] - process, run(spec, options).record.peak_memory_bytes - process]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", MEASURED)
def test_predicted_memory_is_within_a_quarter_of_what_a_run_takes(name, tiny_folder, tmp_path):
    """Each in a process of its own; what the process takes before the run counts on neither side."""
    options = {"samples": 8, "sequence_length": 128, "criterion": "magnitude", "held_out_samples": 2, "evaluation_samples": 4}
    options |= {"evaluation_length": 256, "epochs": 1, "retrain_epochs": 1, **MEASURED[name]}
    shape = SHAPES[options["model"]] | {"num_attention_heads": 8, "num_key_value_heads": 8, "max_position_embeddings": 1024}
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    for split in SPLITS:  # kept in the cache: what tokenising leaves of the heap would count in the first process
        sample_tokens("wikipedia", split, tokenizer, 1, 16)
    tokenizer.save_pretrained(tmp_path)
    make_model("llama", std=0.02, tie_word_embeddings=True, **shape).save_pretrained(tmp_path)
    options["model"], stream = str(tmp_path), options.pop("stream", "no")
    done = subprocess.run([sys.executable, "-c", MEASURE, json.dumps(options), stream], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    predicted, measured = (size / 2**20 for size in json.loads(done.stdout.splitlines()[-1]))
    print(f"{name}: predicted {predicted:.0f} MiB, measured {measured:.0f} MiB, ratio {predicted / measured:.3f}")
    assert 0.75 < predicted / measured < 1.33


@pytest.mark.parametrize("models, options", [
    (2, {}), (2, {"criterion": "none", "granularity": "none"}), (3, {"criterion": "sparsegpt"}),
    (3, {"pattern": "2:4", "reorder_neurons": True}), (4, {"criterion": "admm", "pattern": "2:4", "reorder_neurons": True}),
])  # fmt: skip
def test_memory_has_room_for_a_model_its_copy_and_what_changes_in_it(spec, models, options):
    numbers = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_pretrained(spec.model.model).parameters())
    assert plan.models_in_memory(spec.replaced(**options)) == 4 * numbers * models


def test_steps_of_every_window_take_their_time(spec, monkeypatch):
    """On a machine that multiplies in no time."""
    monkeypatch.setattr(plan, "gemm_rate", lambda *given: 1e30)
    matrices = [len(window["losses"]) * (4 if window["name"].endswith("attention") else 3) for window in record_of(spec).windows]
    assert plan.Plan(spec).seconds["reconstruct"] == pytest.approx(plan.STEP * sum(matrices))
