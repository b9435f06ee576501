"""Bi-WKV as Vision-RWKV's kernel computes it: its loops, statement by statement, and the equation it approaches."""

import pytest
import torch

from linescan.scans import bi_wkv
from linescan.scans.ops.published import bi_wkv_kernel


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def loops(k, v, w, u):
    """Sums of a piece's beginning by their definition, then the recurrences of the equation."""
    batch, length, channels = k.shape
    size = -(-length // 32)
    out = torch.empty_like(v)
    weight = k.exp()
    for first in range(0, length, size):
        a = b = c = d = k.new_zeros(batch, channels)
        for i in range(first):
            decay = torch.exp(-(first - i) * w) * weight[:, i]
            a, b = a + decay * v[:, i], b + decay
        for i in range(first + 1, length):
            decay = torch.exp(-(i - first) * w) * weight[:, i]
            c, d = c + decay * v[:, i], d + decay
        for t in range(first, min(first + size, length)):
            own = torch.exp(u + k[:, t])
            apart = (torch.arange(length) - t).abs()[:, None]
            largest = torch.where(apart == 0, u + k, k - (apart - 1) * w).amax(1).exp()
            out[:, t] = (a + c + own * v[:, t]) / (b + d + own + 1e-6 * largest)
            a, b = w.neg().exp() * a + weight[:, t] * v[:, t], w.neg().exp() * b + weight[:, t]
            if t + 1 < length:
                c = w.exp() * c - torch.exp(k[:, t + 1] + w) * v[:, t + 1]
                d = w.exp() * d - torch.exp(k[:, t + 1] + w)
    return out


@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 70, 200])
def test_it_is_the_kernel_s_loops(length):
    k, v, w, u = normal(2, length, 5), normal(2, length, 5, seed=1), normal(5, seed=2) / length, normal(5, seed=3)
    assert torch.allclose(bi_wkv_kernel(k, v, w, u), loops(k, v, w, u), rtol=1e-9, atol=1e-9)
    half = bi_wkv_kernel(*(x.bfloat16() for x in (k, v, w, u)))
    assert half.dtype == torch.bfloat16


def test_it_comes_near_the_equation_as_a_step_decays_less():
    k, v, w, u = normal(2, 640, 5), normal(2, 640, 5, seed=1), normal(5, seed=2) / 640, normal(5, seed=3)
    gaps = []
    for share in (1, 0.1, 0):
        equation = bi_wkv(k[:, None], v[:, None], share * w, u)[:, 0]
        gaps.append((bi_wkv_kernel(k, v, share * w, u) - equation).abs().max().item())
    assert gaps[0] > 5 * gaps[1] > 5 * gaps[2] and gaps[2] < 1e-6


def test_keys_of_any_size_are_safe():
    k, v, w, u = normal(2, 64, 5), normal(2, 64, 5, seed=1), normal(5, seed=2) / 64, normal(5, seed=3)
    shifted = bi_wkv_kernel(k + 1e4, v, w, u)
    assert torch.allclose(shifted, bi_wkv_kernel(k, v, w, u))
    assert bi_wkv_kernel((k * 100).float(), v.float(), w.float(), u.float()).isfinite().all()


def test_gradients_and_shapes():
    inputs = normal(1, 40, 2), normal(1, 40, 2, seed=1), normal(2, seed=2) / 40, normal(2, seed=3)
    assert torch.autograd.gradcheck(bi_wkv_kernel, [x.requires_grad_() for x in inputs])
    assert bi_wkv_kernel(*(x[:, :0] if x.ndim > 1 else x for x in inputs)).shape == (1, 0, 2)
    with pytest.raises(ValueError, match=r"k and v are \(B, T, D\), w and u \(D,\); got \(1, 40, 2\), .* \(1,\)"):
        bi_wkv_kernel(*inputs[:3], inputs[3][:1])
