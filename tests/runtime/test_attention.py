"""Causal attention in chunks: the library's answer and gradients, taken only where it is meant to be."""

import pytest
import torch
from torch.nn import functional as F

from recon.runtime import attention
from recon.runtime.attention import CHUNK, FastCausalAttention, causal_attention


def tensors(heads=4, key_heads=2, length=2 * CHUNK + 7, width=16, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, heads, length, width), (2, key_heads, length, width), (2, key_heads, length, width)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def library(query, key, value, **options):
    key, value = (t.repeat_interleave(query.shape[1] // key.shape[1], 1) for t in (key, value))
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, **options)


@pytest.mark.parametrize("length", [1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, 3 * CHUNK + 5])
@pytest.mark.parametrize("heads, key_heads", [(4, 4), (4, 2), (3, 1)])
def test_answer_and_gradients_are_the_librarys(length, heads, key_heads):
    # float64 leaves only summation order to differ; sums over chunks are in float32.
    ours, theirs = tensors(heads, key_heads, length), tensors(heads, key_heads, length)
    found, expected = causal_attention(*ours, scale=0.3), library(*theirs, scale=0.3)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-5)


def test_bfloat16_is_as_near_the_truth_as_the_librarys():
    truth = library(*tensors())
    query, key, value = tensors(dtype=torch.bfloat16)
    distances = [
        (found - truth).norm() / truth.norm() for found in (library(query, key, value), causal_attention(query, key, value, 0.25))
    ]
    assert distances[0] < 0.01 and distances[1] < 2 * distances[0]


@pytest.mark.parametrize("autocast", [False, True])
def test_taken_under_the_mode(monkeypatch, autocast):
    calls = []
    monkeypatch.setattr(attention, "causal_attention", lambda *a: calls.append([t.dtype for t in a[:3]]) or causal_attention(*a))
    query, key, value = tensors(dtype=torch.float32 if autocast else torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), FastCausalAttention():
        found = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    assert calls == [[torch.bfloat16] * 3] and found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), library(query, key, value).float(), rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    "options",
    [{}, {"is_causal": True, "dropout_p": 0.5}, {"attn_mask": torch.zeros(263, 263, dtype=torch.bfloat16)}, {"is_causal": True, "short": True},
     {"is_causal": True, "dtype": torch.float32}],
)  # fmt: skip
def test_left_to_the_library_elsewhere(monkeypatch, options):
    options = dict(options)
    monkeypatch.setattr(attention, "causal_attention", lambda *a: pytest.fail("not for this"))
    length = 8 if options.pop("short", False) else 2 * CHUNK + 7
    query, key, value = tensors(heads=2, key_heads=2, length=length, dtype=options.pop("dtype", torch.bfloat16))
    with FastCausalAttention():
        F.scaled_dot_product_attention(query, key, value, **options)


def test_scores_above_the_diagonal_are_never_seen():
    query, key, value = tensors(dtype=torch.bfloat16)
    before = causal_attention(query, key, value, 0.25)[:, :, : CHUNK + 3]
    with torch.no_grad():
        key[:, :, CHUNK + 3 :] = torch.nan
        value[:, :, CHUNK + 3 :] = 9.0
    after = causal_attention(query, key, value, 0.25)[:, :, : CHUNK + 3]
    assert torch.equal(before[:, :, :CHUNK], after[:, :, :CHUNK])
