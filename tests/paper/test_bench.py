"""The benchmark: the yardstick loop is a fair one, products are counted right, and results are kept. No timing is judged."""

import copy
import dataclasses
import functools
import json
import math
import shutil

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from recon.config import PruningConfig, ReconstructionConfig
from recon.errors import ReconError
from recon.evaluate.perplexity import drift
from recon.methods.problem import ERROR_SAMPLES
from recon.methods.prune import prune
from recon.methods.reconstruct import reconstruct
from recon.model.discovery import decompose
from recon.paper.bench import products, reference, report, sections
from recon.paper.bench.measure import bench
from recon.paper.bench.report import TABLES, summary, tables, workers
from recon.paper.bench.spec import DEFAULT, SECTIONS, BenchSpec
from recon.paper.bench.subject import Subject, shortened
from recon.paper.plots import cost
from recon.runtime.execution import Execution
from recon.study.cost import gemm_rate


@pytest.fixture(scope="module")
def spec(tiny_folder, tiny_text, tmp_path_factory):
    return BenchSpec(
        output=tmp_path_factory.mktemp("bench") / "cost.json", model=tiny_folder, text=tiny_text, samples=8, sequence_length=32,
        evaluation_samples=2, evaluation_length=32, blocks=2, repeats=2,
    )  # fmt: skip


@pytest.fixture(scope="module")
def results(spec):
    """Of the default sections; speeds, which nothing here judges, are measured for a moment, and few steps are made."""
    moment = {"size": 64, "seconds": 0.001}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sections, "gemm_rate", lambda *args, **options: gemm_rate(*args, **options | moment))
        patch.setattr(products, "seconds", functools.partial(products.seconds, least=0.001))
        patch.setattr("recon.config.STEPS", 4)
        return bench(spec, progress=False)


def test_every_section_gives_its_table(results):
    assert set(results["sections"]) == set(DEFAULT)
    assert len(tables(results)) == len(DEFAULT)
    for section in results["sections"].values():
        assert section["seconds"] > 0 and "git_commit" in section["environment"]
    text = summary(results)
    for words in (
        "Phases against their floor",
        "wanda",
        "a quarter of the samples, from exact",
        "sequence length",
        "large squares, float32",
    ):
        assert words in text


def test_shares_are_shares(results):
    section = results["sections"]["products"]["results"]
    alone = sum(row["count"] * row["seconds_alone"] for row in section["products"] if row["kind"] == "weights")
    assert section["achieved_share_of_ceiling"] == [alone / seconds for seconds in section["seconds"]]
    section = results["sections"]["phases"]["results"]
    rate, table = section["square_flops_per_second"], report.phases(section)
    for phase, parts in section["floor_flops"].items():
        assert table.loc[phase, "floor, s"] == pytest.approx(sum(count / rate[dtype] for dtype, count in parts.items()))
        mean = sum(row["seconds"] for row in section["rows"] if (row["phase"], row["loop"]) == (phase, "ours")) / 2
        assert table.loc[phase, "ours / floor"] == pytest.approx(mean / table.loc[phase, "floor, s"])
    assert table.loc["teacher's pass", "in teacher's passes"] == 1
    sweep = results["sections"]["sweep"]["results"]
    assert len(sweep["runs"]) == len(sweep["seconds_in_study"]) == len(sweep["seconds_singly"]) == 12


def test_overhead_of_workers_is_what_runs_do_not_account_for():
    studies = [
        {"workers": 0, "seconds": 40.0, "ends": [12.0, 25.0, 40.0], "own_seconds": [10.0, 12.0, 14.0]},
        {"workers": 2, "seconds": 20.0, "ends": [12.0, 19.0, 20.0], "own_seconds": [10.0, 11.0, 5.0]},
    ]
    table = workers({"studies": studies, "windows": [{"workers": 0, "seconds": 9.0}, {"workers": 2, "seconds": 6.0}]})
    assert table.loc[0, ["overhead per run, s", "most, s"]].tolist() == [1.0, 1.0]
    assert table.loc[2, ["study, times as fast", "windows, times as fast"]].tolist() == [2.0, 1.5]
    assert table.loc[2, ["overhead per run, s", "most, s"]].isna().all()


def test_measured_sections_are_kept(spec, results, monkeypatch):
    monkeypatch.setattr("recon.paper.bench.measure.Subject", lambda *a: pytest.fail("nothing is missing"))
    again = bench(spec, progress=False)
    assert again == json.loads(spec.output.read_text()) == results
    with pytest.raises(ReconError, match=r"holds measurements with samples 8, not 4; name another"):
        bench(dataclasses.replace(spec, samples=4), progress=False)
    other = spec.output.with_name("other.json")
    other.write_text("{")
    with pytest.raises(ReconError, match=r"other.json.*is not a file of measurements"):
        bench(dataclasses.replace(spec, output=other), progress=False)


def test_bad_input(spec):
    with pytest.raises(ReconError, match=r"unknown section 'speed'; allowed: products, phases"):
        BenchSpec(sections=("speed",))
    with pytest.raises(ReconError, match=r"repeats is 0"):
        BenchSpec(repeats=0)
    assert set(SECTIONS) - set(DEFAULT) == {"workers", "compile", "large"} and set(TABLES) == set(SECTIONS)
    assert all(callable(getattr(sections, name)) for name in SECTIONS)
    with pytest.raises(ReconError, match=r"section large needs a GPU, and the device is 'cpu'"):
        bench(
            dataclasses.replace(spec, output=spec.output.with_name("large.json"), sections=("large",), device="cpu"),
            progress=False,
        )


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_and_plain_are_timed_in_turn(spec):
    other = dataclasses.replace(spec, output=spec.output.with_name("compile.json"), sections=("compile",), repeats=1)
    found = bench(other, progress=False)
    section = found["sections"]["compile"]["results"]
    assert section["seconds_to_compile"] > 0 and all(row["plain"] > 0 and row["compiled"] > 0 for row in section["rows"])
    assert "compiled / plain" in summary(found)


def test_floors_are_counted_for_the_model_at_hand(tiny, tokens, spec):
    """Of half-blocks of three blocks: a teacher's pass, the student's, gradients of all weights and of inputs of o_proj and down_proj."""
    subject = Subject(spec, False)
    floors = {phase: sum(parts.values()) for phase, parts in sections._floors(subject, subject.dense).items()}
    count = sum(matrix.weight.numel() for matrix in subject.dense.matrices().values())
    inner = sum(m.weight.numel() for name, m in subject.dense.matrices().items() if name.endswith(("o_proj", "down_proj")))
    tokens = spec.samples * spec.sequence_length
    attention = floors["teacher's pass"] - 2 * count * tokens
    assert floors["prune, wanda"] == floors["teacher's pass"] < floors["prune, sparsegpt"] and 0 < attention < 2 * count * tokens
    errors = 2 * ERROR_SAMPLES / spec.samples * floors["teacher's pass"]  # before and after
    products = 2 * (3 * count + inner) * tokens + (1 + 1 + 2) * attention
    assert floors["reconstruct"] == floors["prune and reconstruct"] == pytest.approx(products + errors)
    again = 1 - 1 / len(subject.dense.blocks)  # the student's own pass: nothing reads the last half-blocks
    assert again * floors["teacher's pass"] <= floors["reconstruct, mixed"] - floors["reconstruct"] < floors["teacher's pass"]


def test_the_reference_prunes_as_ours_does_on_the_sparse_model(tiny, tokens, monkeypatch):
    monkeypatch.setattr(reference, "pick_compute_dtype", lambda *a: torch.float32)
    dense, samples = decompose(tiny("llama")), tokens(8, 16)
    theirs, ours = (decompose(copy.deepcopy(dense.model), like=dense) for _ in range(2))
    found = reference.prune(theirs, samples, "0.5", progress=False)
    masks = prune(ours, samples, PruningConfig(statistics="sparse"), execution=Execution("cpu", "float32", progress=False)).masks
    for name, mask in masks.items():
        assert (found[name] == mask).float().mean() > 0.99  # rounding may decide between weights that are as good
        assert torch.equal(theirs.matrices()[name].weight != 0, found[name])


def test_what_sections_give_can_be_drawn(results, style):
    for section, draw in {
        "phases": cost.phases,
        "profile": cost.operations,
        "growth": cost.growth,
        "quality": cost.quality,
    }.items():
        plot = draw(results["sections"][section]["results"])
        assert len(plot.data) and "nan" not in plot.finding


def test_the_reference_loop_reconstructs_like_ours(tiny, tokens):
    """Same windows, inputs, loss, steps and learning rates: it ends near where ours does, zeros included."""
    dense, samples, unseen = decompose(tiny("llama")), tokens(32, 16), tokens(8, 16, seed=9)
    students = [decompose(copy.deepcopy(dense.model), like=dense) for _ in range(3)]
    masks = [prune(student, samples, execution=Execution(compute_dtype="float32", progress=False)).masks for student in students][
        0
    ]
    reference.reconstruct(students[0], dense, samples, masks, progress=False)
    config = ReconstructionConfig(
        propagation="dense", train="all", loss="mse", learning_rate=3e-3, rate="absolute", epochs=1, batch_size=2
    )
    reconstruct(students[1], dense, samples, config, masks=masks, execution=Execution(progress=False))
    theirs, ours, pruned = (drift(student, dense, unseen)[0][-1] for student in students)
    assert theirs == pytest.approx(ours, rel=0.05) and theirs < 0.95 * pruned
    for name, matrix in students[0].matrices().items():
        assert torch.equal(matrix.weight != 0, masks[name])
        assert not hasattr(matrix.module, "weight_orig")
    assert all(p.requires_grad for p in students[0].model.parameters())


def test_products_are_counted_as_torch_counts_them(tiny, tokens):
    dense, samples = decompose(tiny("llama")), tokens(4, 16)
    student = decompose(copy.deepcopy(dense.model), like=dense)
    masks = prune(student, samples, execution=Execution(progress=False)).masks
    with FlopCounterMode(display=False) as theirs, products.Recorder() as ours:
        config = ReconstructionConfig(granularity="block", epochs=1)
        reconstruct(student, dense, samples, config, masks=masks, execution=Execution(progress=False))
    counts = theirs.get_flop_counts()["Global"]
    expected = sum(counts[op] for op in counts if str(op) in ("aten.mm", "aten.addmm", "aten.bmm"))
    multiplications = sum(math.prod(product.left[0]) * product.right[0][-1] * count for product, count in ours.counts.items())
    assert 2 * multiplications == expected > 0


def test_a_products_time_is_that_of_its_layout():
    product = products.Product(((8, 4), (1, 8), torch.float32), ((4, 2), (2, 1), torch.float32))
    assert 0 < product.seconds(torch.device("cpu")) < 1


def test_shortened_runs_its_first_blocks(tiny, tokens):
    dense = decompose(tiny("llama"))
    short = shortened(dense, 2)
    assert len(short.blocks) == 2 and len(dense.blocks) == 3
    hidden = dense.embed(tokens(2, 8))
    assert torch.equal(short.forward(short.windows("2-blocks")[0], hidden), dense.forward(dense.windows("2-blocks")[0], hidden))
