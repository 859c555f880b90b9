"""Where memory runs out: smaller parts with the same result."""

import functools
from collections.abc import Iterable

import pytest
import torch
from fixtures.models import copied, make_model, random_tokens
from torch import nn
from torch.testing import assert_close

from recon import Execution, PruningConfig, ReconstructionConfig, decompose, perplexity, prune, reconstruct
from recon.methods.reconstruct import RECONSTRUCTED
from recon.methods.statistics import gather
from recon.model.modules import watched

BLOCKS = ReconstructionConfig("block", learning_rate=1e-3, rate="absolute", epochs=2, batch_size=3, accumulation=2)
execution = functools.partial(Execution, "cpu", "float32", progress=False)


def little_memory(blocks: Iterable[nn.Module], samples: int, spared: int = 0, gradients: bool = True):
    """Where gradients are needed, or are not, `blocks` take `samples` at a time, but for the first `spared` calls with more."""
    calls = []

    def run_out(number, args, kwargs):
        if torch.is_grad_enabled() == gradients and len(args[0]) > samples:
            calls.append(1)
            if len(calls) > spared:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nGPU 0 has ...")

    return watched(dict(enumerate(blocks)), run_out)


@pytest.mark.parametrize("spared", [0, 1])
def test_passes_without_gradients_are_made_anew_in_smaller_batches(dense, spared, monkeypatch, caplog):
    """Statistics, targets and errors count every token once, though memory runs out when some have been counted already."""
    monkeypatch.setattr("recon.runtime.execution.TOKENS", 4 * 12)
    tokens, found = random_tokens(8, 12), []
    block, hidden = dense.windows("block")[0], dense.embed(tokens)
    passes = (
        lambda student: gather(execution(), dense, block, hidden, "gram")[1],
        lambda student: prune(student, tokens, PruningConfig(criterion="wanda"), execution=execution()),
        lambda student: reconstruct(student, dense, tokens, ReconstructionConfig(granularity="matrix"), execution=execution()),
        lambda student: perplexity(student, tokens, execution=execution()).value,
    )
    for little in (False, True):
        student, results = copied(dense), []
        halves = [block.mlp for decoder in (dense, student) for block in decoder.blocks]  # run when the first has been looked at
        for run in passes:
            with little_memory(halves if little else [], 2, spared, gradients=False):
                results.append(run(student))
        found.append((results[0], results[-1], [matrix.weight == 0 for matrix in student.matrices().values()]))
    said = [r.message for r in caplog.records if "out of memory with 4 samples at a time: 2 from here on" in r.message]
    assert len(said) == 4  # once in each pass
    (grams, value, zeros), (others, other, same) = found
    assert_close(others, grams, rtol=1e-4, atol=1e-6)
    assert other == pytest.approx(value, rel=1e-3) and all(map(torch.equal, zeros, same))


@pytest.mark.parametrize("spared", [0, 3], ids=["from the start", "in the middle of a step"])
def test_what_does_not_fit_in_memory_is_done_in_smaller_parts_with_the_same_result(caplog, spared):
    dense, student = (decompose(make_model("llama")) for _ in range(2))
    prune(student, config=PruningConfig(criterion="magnitude"), execution=execution())
    other, tokens = copied(student), random_tokens(11, 12)
    wanted = reconstruct(student, dense, tokens, BLOCKS, execution=execution())
    with little_memory(other.blocks, 1, spared):
        found = reconstruct(other, dense, tokens, BLOCKS, execution=execution())
    assert {len(report.losses) for report in wanted} == {2 * 2}  # of six samples, three at a time, and of the five that are left
    assert [report.micro_batch for report in wanted] == [3] * 3 and [report.micro_batch for report in found] == [1] * 3
    # Said once per halving, not once per window: what did not fit in one will not fit in the next.
    said = [record.message for record in caplog.records if "out of memory" in record.message]
    assert len(said) == 2 and "3 samples at a time: 2 from here on (CUDA out of memory. Tried to allocate 20.00 MiB.)" in said[0]
    assert {report.status for report in (*found, *wanted)} == {RECONSTRUCTED}
    assert_close([report.losses for report in found], [report.losses for report in wanted], rtol=1e-4, atol=1e-6)
    for name, matrix in other.matrices().items():
        assert_close(matrix.weight, student.matrices()[name].weight, rtol=1e-3, atol=1e-5)
        assert torch.equal(matrix.weight == 0, student.matrices()[name].weight == 0)
