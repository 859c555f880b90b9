"""Where memory runs out: smaller parts with the same result."""

import contextlib
import functools
from types import SimpleNamespace

import pytest
import torch
from fixtures.models import copied, make_model, random_tokens
from torch.testing import assert_close

from recon import Decoder, Execution, PruningConfig, ReconstructionConfig, decompose, perplexity, prune, reconstruct
from recon.methods.reconstruct import RECONSTRUCTED
from recon.methods.statistics import gather

BLOCKS = ReconstructionConfig("block", learning_rate=1e-3, rate="absolute", epochs=2, batch_size=3, accumulation=2)
execution = functools.partial(Execution, "cpu", "float32", progress=False)


@pytest.fixture
def pair():
    """A dense model of three blocks and a pruned copy, as decoders."""
    dense, student = (decompose(make_model("llama")) for _ in range(2))
    prune(student, config=PruningConfig(criterion="magnitude"), execution=execution())
    return dense, student


@contextlib.contextmanager
def little_memory(decoder: Decoder, samples: int, spared: int = 0, gradients: bool = True):
    """Where gradients are needed, or are not, blocks take `samples` at a time, but for the first `spared` calls with more."""
    calls = []

    def run_out(block, args):
        if torch.is_grad_enabled() == gradients and len(args[0]) > samples:
            calls.append(1)
            if len(calls) > spared:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nGPU 0 has ...")

    handles = [block.register_forward_pre_hook(run_out) for block in decoder.blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("spared", [0, 1])
def test_passes_without_gradients_are_made_anew_in_smaller_batches(spared, monkeypatch, caplog):
    """Statistics, targets and errors count every token once, though memory runs out when some have been counted already."""
    monkeypatch.setattr("recon.runtime.execution.TOKENS", 4 * 12)
    dense, tokens, found = decompose(make_model("llama", num_hidden_layers=2)), random_tokens(8, 12), []
    for little in (False, True):
        student = copied(dense)

        def run_out(spared=spared, little=little, student=student):
            """In the second half of a block, when the first has been looked at."""
            stack = contextlib.ExitStack()
            for decoder in (dense, student) if little else ():
                halves = SimpleNamespace(blocks=[block.mlp for block in decoder.blocks])
                stack.enter_context(little_memory(halves, 2, spared, False))
            return stack

        with run_out():
            here = execution()
            grams = gather(here, dense, dense.windows("block")[0], here.embed(dense, tokens), "gram")[1]
        with run_out():
            prune(student, tokens, PruningConfig(criterion="wanda"), execution=execution())
        with run_out():
            reconstruct(student, dense, tokens, ReconstructionConfig(granularity="matrix"), execution=execution())
        with run_out():
            value = perplexity(student, tokens, execution=execution()).value
        found.append((grams, value, [matrix.weight == 0 for matrix in student.matrices().values()]))
    said = [r.message for r in caplog.records if "out of memory with 4 samples at a time: 2 from here on" in r.message]
    assert len(said) == 4  # once in each pass
    (grams, value, zeros), (others, other, same) = found
    assert_close(others, grams, rtol=1e-4, atol=1e-6)
    assert other == pytest.approx(value, rel=1e-3) and all(map(torch.equal, zeros, same))


@pytest.mark.parametrize("spared", [0, 3], ids=["from the start", "in the middle of a step"])
def test_what_does_not_fit_in_memory_is_done_in_smaller_parts_with_the_same_result(pair, caplog, spared):
    dense, student = pair
    other, tokens = copied(student), random_tokens(7, 12)
    wanted = reconstruct(student, dense, tokens, BLOCKS, execution=execution())
    with little_memory(other, 1, spared):
        found = reconstruct(other, dense, tokens, BLOCKS, execution=execution())
    assert [report.micro_batch for report in wanted] == [3] * 3 and [report.micro_batch for report in found] == [1] * 3
    # Said once per halving, not once per window: what did not fit in one will not fit in the next.
    said = [record.message for record in caplog.records if "out of memory" in record.message]
    assert len(said) == 2 and "3 samples at a time: 2 from here on (CUDA out of memory. Tried to allocate 20.00 MiB.)" in said[0]
    assert {report.status for report in (*found, *wanted)} == {RECONSTRUCTED}
    assert_close([report.losses for report in found], [report.losses for report in wanted], rtol=1e-4, atol=1e-6)
    for name, matrix in other.matrices().items():
        assert_close(matrix.weight, student.matrices()[name].weight, rtol=1e-3, atol=1e-5)
        assert torch.equal(matrix.weight == 0, student.matrices()[name].weight == 0)
