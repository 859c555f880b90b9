"""The benchmark: the yardstick loop is a fair one, products are counted right, and results are kept. No timing is judged."""

import copy
import dataclasses
import json
import math
import shutil

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from recon.config import ReconstructionConfig
from recon.errors import ReconError
from recon.evaluate.perplexity import drift
from recon.methods.prune import prune
from recon.methods.reconstruct import reconstruct
from recon.model.discovery import take_apart
from recon.paper.bench import products, reference, sections
from recon.paper.bench.measure import bench
from recon.paper.bench.report import TABLES, summary, tables, workers
from recon.paper.bench.spec import DEFAULT, SECTIONS, BenchSpec
from recon.paper.bench.subject import shortened
from recon.runtime.execution import Execution


@pytest.fixture(scope="module")
def spec(tiny_folder, tiny_text, tmp_path_factory):
    return BenchSpec(
        output=tmp_path_factory.mktemp("bench") / "cost.json", model=tiny_folder, text=tiny_text, samples=8, sequence_length=32,
        evaluation_samples=2, evaluation_length=32, blocks=2, repeats=2,
    )  # fmt: skip


@pytest.fixture(scope="module")
def results(spec):
    return bench(spec, progress=False)


def test_every_section_gives_its_table(results):
    assert set(results["sections"]) == set(DEFAULT)
    assert len(tables(results)) == len(DEFAULT)
    for section in results["sections"].values():
        assert section["seconds"] > 0 and "git_commit" in section["environment"]
    text = summary(results)
    for words in (
        "Equal steps",
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
    with pytest.raises(ReconError, match=r"unknown section 'speed'; allowed: products, loops"):
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


def test_the_reference_loop_reconstructs_like_ours(tiny, tokens):
    """Same windows, inputs, loss, steps and learning rates: it ends near where ours does, zeros included."""
    dense, samples, unseen = take_apart(tiny("llama")), tokens(32, 16), tokens(8, 16, seed=9)
    students = [take_apart(copy.deepcopy(dense.model), like=dense) for _ in range(3)]
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
    dense, samples = take_apart(tiny("llama")), tokens(4, 16)
    student = take_apart(copy.deepcopy(dense.model), like=dense)
    masks = prune(student, samples, execution=Execution(progress=False)).masks
    with FlopCounterMode(display=False) as theirs, products.Recorder() as ours:
        reconstruct(
            student, dense, samples, ReconstructionConfig(granularity="block"), masks=masks, execution=Execution(progress=False)
        )
    counts = theirs.get_flop_counts()["Global"]
    expected = sum(counts[op] for op in counts if str(op) in ("aten.mm", "aten.addmm", "aten.bmm"))
    multiplications = sum(math.prod(product.left[0]) * product.right[0][-1] * count for product, count in ours.counts.items())
    assert 2 * multiplications == expected > 0


def test_a_products_time_is_that_of_its_layout():
    product = products.Product(((8, 4), (1, 8), torch.float32), ((4, 2), (2, 1), torch.float32))
    assert 0 < product.seconds(torch.device("cpu")) < 1


def test_shortened_runs_its_first_blocks(tiny, tokens):
    dense = take_apart(tiny("llama"))
    short = shortened(dense, 2)
    assert len(short.blocks) == 2 and len(dense.blocks) == 3
    hidden = dense.embed(tokens(2, 8))
    assert torch.equal(short.forward(short.windows("2-blocks")[0], hidden), dense.forward(dense.windows("2-blocks")[0], hidden))
