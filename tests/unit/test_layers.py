"""The local layers' own passes against autograd's: the same bits where the order of the arithmetic is the same."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from megatron.core.optimizer import clip_grads
from torch import nn
from torch.nn.functional import silu

from megatron_prune.runtime import cpu
from megatron_prune.runtime.layers import SwiGLU, _RMSNormOnCpu

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=20, deadline=None)
@given(tokens=some.integers(1, 9), batch=some.integers(1, 3), width=some.integers(1, 40), seed=some.integers(0, 99))
def test_swiglu_and_its_gradient_are_autograds_to_the_bit(dtype, tokens, batch, width, seed):
    random = torch.Generator().manual_seed(seed)
    given = torch.randn(tokens, batch, 2 * width, generator=random).to(dtype).requires_grad_()
    into = torch.randn(tokens, batch, width, generator=random).to(dtype)
    gate, up = given.chunk(2, -1)
    plain = silu(gate) * up
    ours = SwiGLU.apply(given)
    assert torch.equal(ours, plain)
    (want,), (got,) = torch.autograd.grad(plain, given, into), torch.autograd.grad(ours, given, into)
    assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=20, deadline=None)
@given(tokens=some.integers(1, 9), width=some.integers(1, 70), scale=some.floats(1e-3, 1e2), seed=some.integers(0, 99))
def test_rms_norm_gives_torchs_bits_and_the_exact_gradient(dtype, tokens, width, scale, seed):
    random = torch.Generator().manual_seed(seed)
    norm = nn.RMSNorm(width, eps=1e-5, dtype=dtype)
    norm.weight.data = torch.randn(width, generator=random).to(dtype)
    stream = (scale * torch.randn(tokens, 2, width, generator=random)).to(dtype).requires_grad_()
    into = torch.randn(tokens, 2, width, generator=random).to(dtype)
    ours = _RMSNormOnCpu.apply(stream, norm.weight, 1e-5)
    assert torch.equal(ours, norm(stream))
    exact = stream.detach().double().requires_grad_()
    weight = norm.weight.detach().double().requires_grad_()
    dense = weight * exact / (exact.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    want = torch.autograd.grad(dense, (exact, weight), into.double())
    # every element of a gradient is rounded to the dtype once, after a few roundings in float32 of terms as large as these
    terms = into.double().abs() * weight.abs() / exact.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-3)
    for got, right, largest in zip(
        torch.autograd.grad(ours, (stream, norm.weight), into), want, (terms.detach().max(), into.abs().max())
    ):
        atol = 64 * torch.finfo(torch.float32).eps * largest.item() * max(width, 2 * tokens)
        torch.testing.assert_close(got.double(), right, rtol=2 * torch.finfo(dtype).eps, atol=atol)


def test_gradients_are_clipped_in_their_own_memory():
    """As megatron-core calls it: the same tensors in and out."""
    gradients = [torch.randn(5, 3), torch.randn(7)]
    want, where = [gradient * 0.3 for gradient in gradients], [gradient.data_ptr() for gradient in gradients]
    with cpu.stand_in():
        clip_grads.multi_tensor_applier(clip_grads.multi_tensor_scale_impl, torch.zeros(1), [gradients, gradients], 0.3)
    assert all(torch.equal(got, right) for got, right in zip(gradients, want))
    assert [gradient.data_ptr() for gradient in gradients] == where
