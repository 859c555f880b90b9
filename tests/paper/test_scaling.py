"""Predictions against schedules worked out by hand, and against their bounds."""

import random

import pytest

import recon
from recon.paper.scaling import Windows, shape, study, windows, windows_of
from recon.study.cost import flops


def test_runs_go_to_whoever_is_free_first():
    found = study([4, 3, 2, 2], workers=2, start=1)
    assert found.seconds == 1 + 4 + 2  # 4 and then 2; 3 and then 2
    assert found.parts == {"runs": 5.5, "longest run": 4, "start of workers": 1} and found.bottleneck == "runs"
    assert study([4, 3], workers=8).bottleneck == "longest run" and study([4, 3], workers=8).seconds == 4
    assert study([1], workers=3, start=5).bottleneck == "start of workers"
    assert study([], workers=2).seconds == 0


def test_windows_by_hand():
    one = Windows(3, dense_seconds=1, reconstruct_seconds=10, sent=20, returned=10)
    # Ready at 1, 2, 3; sent, in 2 s each, at 3, 5, 7; two workers: done at 13, 15, 23; back 1 s later.
    assert windows(one, workers=2, bandwidth=10).seconds == 24
    assert windows(one, workers=2, bandwidth=10, start=4).seconds == 25
    assert windows(one, workers=2, bandwidth=10).bottleneck == "reconstruction"
    assert windows(one, workers=3, bandwidth=10).seconds == 18
    assert windows(one, workers=64, bandwidth=10).bottleneck == "no more windows"
    assert windows(one, workers=3, bandwidth=1).bottleneck == "network"
    assert windows(Windows(100, 1, 10, 1, 1), workers=50, bandwidth=1e9).bottleneck == "dense pass"


@pytest.mark.parametrize("seed", range(20))
def test_nothing_is_faster_than_any_of_its_parts_or_slower_than_all_of_them_in_turn(seed):
    draw = random.Random(seed)
    one = Windows(draw.randint(1, 40), draw.random(), 10 * draw.random(), draw.randint(0, 99), draw.randint(0, 99))
    bandwidth, start = 1 + 100 * draw.random(), draw.random()
    alone = windows(one, 1, bandwidth, start)
    before = alone.seconds
    for workers in (1, 2, 3, 8, 64):
        found = windows(one, workers, bandwidth, start)
        assert max(found.parts.values()) <= found.seconds * (1 + 1e-12) and found.seconds <= before * (1 + 1e-12)
        before = found.seconds
    each = one.dense_seconds + one.reconstruct_seconds + (one.sent + one.returned) / bandwidth
    assert alone.seconds <= start + one.count * each * (1 + 1e-12)
    runs = [draw.random() for _ in range(draw.randint(1, 30))]
    for workers in (1, 2, 7):
        found = study(runs, workers, start)
        assert max(found.parts.values()) <= found.seconds * (1 + 1e-12) <= (start + sum(runs) / workers + max(runs)) * (1 + 1e-9)


def test_windows_from_shapes(tiny):
    spec = recon.RunSpec.of(samples=6, sequence_length=16, held_out_samples=8, granularity="block", propagation="dense")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 99}
    decoder = recon.decompose(tiny("llama"))
    found = windows_of(spec, decoder, rate=1e6)
    assert found == windows_of(spec, shape("llama", 3, **sizes), rate=1e6)
    block = sum(p.numel() for p in decoder.blocks[0].parameters())
    matrices = block - 2 * 32  # norms
    assert (found.count, found.returned) == (3, 4 * block)
    assert found.sent == 4 * (2 * block + (6 + 2) * 16 * 32) + matrices
    assert found.reconstruct_seconds == pytest.approx(flops(spec, decoder)["reconstruct"] / 3e6)
    attention = 2 * 16 * 32  # scores and weighted sums over the causal half, of 32 numbers per token
    assert found.dense_seconds == pytest.approx((6 + 2) * 16 * (2 * matrices + attention) / 1e6)
