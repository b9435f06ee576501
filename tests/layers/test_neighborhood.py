"""Neighbourhood attention against natten's numbers, a loop over queries, and itself in other blocks and as a kernel."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck

from linescan.engine.processes import threads
from linescan.layers import neighborhood
from linescan.layers.neighborhood import neighborhood_attention, neighborhood_keys, neighborhood_logits
from linescan.scans.kernels import cpu
from tests.parity import recipe

DATA = Path(__file__).parents[1] / "parity" / "data"
MANIFEST = json.loads((DATA / "segman__natten.json").read_text())


def qkv(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=dtype) for _ in range(3))


def by_query(q, k, v, window, dilation, bias, scale):
    """The definition, one query and head at a time."""
    out = torch.zeros_like(v)
    for i in range(q.shape[1]):
        for j in range(q.shape[2]):
            axes = []
            for position, size, side, step in zip((i, j), q.shape[1:3], window, dilation):
                group = list(range(position % step, size, step))
                start = min(max(group.index(position) - side // 2, 0), len(group) - side)
                axes.append([(key, (key - position) // step + side - 1) for key in group[start : start + side]])
            keys = [(r, c, a, b) for r, a in axes[0] for c, b in axes[1]]
            for head in range(q.shape[3]):
                logits = torch.stack([(q[:, i, j, head] * k[:, r, c, head]).sum(-1) for r, c, _, _ in keys], -1) * scale
                if bias is not None:
                    logits = logits + torch.stack([bias[head, a, b] for _, _, a, b in keys])
                values = torch.stack([v[:, r, c, head] for r, c, _, _ in keys], 1)
                out[:, i, j, head] = (logits.softmax(-1)[..., None] * values).sum(1)
    return out


@pytest.mark.parametrize("case", MANIFEST["inputs"])
def test_equals_natten(case):
    spec = MANIFEST["inputs"][case]
    window, dilation = tuple(spec["kernel"]), tuple(spec["dilation"])

    def noise(name, shape):
        return torch.from_numpy(recipe.noise(f"{case}.{name}", shape)).double()

    q, k, v = (noise(name, spec["shape"]).permute(0, 2, 3, 1, 4) for name in "qkv")
    bias = noise("rpb", (q.shape[3], 2 * window[0] - 1, 2 * window[1] - 1))
    got = {
        "logits": neighborhood_logits(q, k, window, dilation, bias).permute(0, 3, 1, 2, 4),
        "out": neighborhood_attention(q, k, v, window, dilation, bias).permute(0, 3, 1, 2, 4),
    }
    with np.load(DATA / "segman__natten.npz") as golden:
        for name, y in got.items():
            want, have = golden[f"{case}.{name}"].reshape(-1), y.contiguous().numpy()
            have = have.reshape(-1) if have.size == want.size else recipe.sample(have)
            assert np.abs(have - want).max() <= 1e-7 * np.abs(want).max()
        for axis, side, step, size in zip("hw", window, dilation, q.shape[1:3]):
            keys, rows = neighborhood_keys(size, side, step)
            assert np.array_equal(keys[:, 0].numpy(), golden[f"{case}.start_{axis}"])
            assert np.array_equal(rows[:, 0].numpy(), golden[f"{case}.bias_{axis}"])


@pytest.mark.parametrize("size, window, dilation", [
    ((7, 9), (3, 5), (1, 1)),
    ((5, 5), (5, 5), (1, 1)),
    ((9, 10), (3, 3), (2, 3)),
    ((11, 3), (1, 3), (4, 1)),
])  # fmt: skip
@pytest.mark.parametrize("biased", [True, False])
def test_equals_a_loop_over_queries(size, window, dilation, biased):
    q, k, v = qkv(2, *size, 2, 3)
    bias = torch.randn(2, 2 * window[0] - 1, 2 * window[1] - 1, dtype=torch.float64) if biased else None
    got = neighborhood_attention(q, k, v, window, dilation, bias, scale=0.7)
    assert torch.allclose(got, by_query(q, k, v, window, dilation, bias, 0.7), atol=1e-12)


@pytest.mark.parametrize("size", [(8, 8), (9, 17), (40, 23), (31, 64)])
@pytest.mark.parametrize("window", [3, 7])
def test_blocks_of_queries_agree_with_the_definition(size, window):
    q, k, v = qkv(1, *size, 2, 4)
    bias = torch.randn(2, 2 * window - 1, 2 * window - 1, dtype=torch.float64)
    rows, columns = (neighborhood_keys(n, window)[0] for n in size)
    values = v[:, rows[:, None, :, None], columns[None, :, None, :]].flatten(3, 4)
    want = torch.einsum("bhwnk, bhwknd -> bhwnd", neighborhood_logits(q, k, window, 1, bias).softmax(-1), values)
    assert torch.allclose(neighborhood_attention(q, k, v, window, bias=bias), want, atol=1e-12)


def test_blocks_of_sizes_that_are_symbols_change_nothing(monkeypatch):
    bias = torch.randn(1, 9, 9, dtype=torch.float64)
    for size in ((9, 20), (16, 5), (6, 7)):  # several blocks, and less than one
        q, k, v = qkv(2, *size, 1, 2)
        want = neighborhood_attention(q, k, v, 5, bias=bias)
        with monkeypatch.context() as patch:
            patch.setattr(neighborhood, "is_symbol", lambda n: True)
            assert torch.allclose(neighborhood_attention(q, k, v, 5, bias=bias), want, atol=1e-12)


@pytest.mark.parametrize("dilation", [1, 2])
def test_gradients(dilation):
    q, k, v = (x.requires_grad_() for x in qkv(1, 7, 6, 2, 2))
    bias = torch.randn(2, 5, 5, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda *x: neighborhood_attention(*x[:3], 3, dilation, x[3]), (q, k, v, bias), fast_mode=True)


def test_rows_of_blocks_one_by_one_change_nothing(monkeypatch):
    q, k, v = (x.requires_grad_() for x in qkv(1, 30, 12, 2, 4))
    bias = torch.randn(2, 9, 9, dtype=torch.float64, requires_grad=True)

    def run():
        y = neighborhood_attention(q, k, v, 5, bias=bias)
        return y, *torch.autograd.grad(y.square().sum(), (q, k, v, bias))

    at_once = run()
    monkeypatch.setattr(neighborhood, "_BUDGET", 1)
    for a, b in zip(at_once, run()):
        assert torch.allclose(a, b, atol=1e-12)


def test_half_precision_keeps_its_dtype():
    q, k, v = qkv(1, 12, 12, 2, 8, dtype=torch.float32)
    bias = torch.randn(2, 9, 9)
    exact = neighborhood_attention(q, k, v, 5, bias=bias)
    half = neighborhood_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), 5, bias=bias)
    assert half.dtype == torch.bfloat16
    assert torch.allclose(half.float(), exact, atol=0.1)


# -- the C++ kernel ---------------------------------------------------------------------------------------------------

compiled = pytest.mark.skipif(cpu.missing() is not None, reason=f"CPU kernels {cpu.missing()}")
MAPS = [
    # size, heads, channels of keys and values, window, dilation
    ((1, 1), 1, 1, 1, (1, 1), (1, 1)),
    ((5, 5), 2, 3, 3, (5, 5), (1, 1)),
    ((7, 9), 3, 16, 20, (3, 5), (1, 1)),
    ((16, 41), 1, 36, 36, (7, 7), (1, 1)),  # several strips of columns
    ((30, 17), 2, 24, 70, (11, 13), (1, 1)),
    ((12, 10), 2, 33, 5, (3, 3), (4, 3)),
    ((5, 130), 2, 32, 32, (1, 63), (1, 2)),
]


@pytest.fixture
def sets():
    """All instruction sets that this processor has."""
    before = cpu.instruction_set()
    yield [name for name in cpu.LANES if cpu.instruction_set(name) == name]
    cpu.instruction_set(before)


def case(size, heads, keys, values, window, biased=True):
    generator = torch.Generator().manual_seed(keys + values)
    q, k, v = (torch.randn(2, *size, heads, d, generator=generator) for d in (keys, keys, values))
    bias = torch.randn(heads, 2 * window[0] - 1, 2 * window[1] - 1, generator=generator)
    return q, k, v, bias if biased else None


@compiled
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 5e-3), (torch.float16, 6e-4)])
def test_the_kernel_agrees_with_torch_in_float64(dtype, tolerance, sets):
    for *shape, window, dilation in MAPS:
        for biased in (True, False):
            q, k, v, bias = case(*shape, window, biased)
            q, k, v = (x.to(dtype) for x in (q, k, v))
            exact = None if bias is None else bias.double()
            want = neighborhood_attention(q.double(), k.double(), v.double(), window, dilation, exact, scale=0.3)
            for name in sets:
                cpu.instruction_set(name)
                got = cpu.neighborhood_attention(q, k, v, window, dilation, bias, 0.3)
                assert got.dtype == dtype
                error = (got - want).abs().max() / want.abs().max()
                assert error < tolerance, f"{name}, {shape}, {window}, {dilation}: relative error {error:.1e}"


@compiled
def test_the_kernel_serves_where_no_gradient_is_wanted():
    q, k, v, bias = case((9, 9), 2, 8, 8, (5, 5))
    served = cpu.neighborhood_attention(q, k, v, (5, 5), (1, 1), bias, 1.0)
    assert torch.equal(neighborhood_attention(q, k, v, 5, bias=bias), served)
    assert neighborhood_attention(q, k, v, 5, bias=bias.requires_grad_()).grad_fn is not None
    with torch.no_grad():
        assert torch.equal(neighborhood_attention(q, k, v, 5, bias=bias), served)
    in_a_graph = torch.compile(partial(neighborhood_attention, window=5), backend="eager", fullgraph=True)
    torch.testing.assert_close(in_a_graph(q, k, v), neighborhood_attention(q, k, v, 5))


@compiled
def test_threads_and_strides_do_not_change_a_bit():
    q, k, v, bias = case((90, 33), 2, 36, 36, (7, 7))
    packed = torch.cat([x.flatten(3) for x in (q, k, v)], -1)
    views = [x.unflatten(-1, (2, 36)) for x in packed.chunk(3, -1)]
    outcomes = []
    for count in (1, 2, 3, 16):
        with threads(count):
            outcomes.append(neighborhood_attention(q, k, v, 7, bias=bias))
    outcomes.append(neighborhood_attention(*views, 7, bias=bias))
    outcomes.append(neighborhood_attention(*(x.mT.contiguous().mT for x in (q, k, v)), 7, bias=bias))
    assert all(torch.equal(outcomes[0], other) for other in outcomes[1:])


@compiled
def test_nothing_outside_of_a_window_counts(sets):
    """Neither NaN nor infinity in a key or a value, nor a logit that is larger by far."""
    q, k, v, bias = case((20, 24), 1, 8, 8, (5, 3))
    want = neighborhood_attention(q, k, v, (5, 3), bias=bias)
    for at, value in enumerate((torch.nan, torch.inf, 1e30)):
        k[:, 10, 3 + 8 * at] = value
        v[:, 10, 3 + 8 * at] = value
    for name in sets:
        cpu.instruction_set(name)
        got = neighborhood_attention(q, k, v, (5, 3), bias=bias)
        reached = torch.zeros(20, 24, dtype=torch.bool)
        for at in range(3):
            reached[8:13, 2 + 8 * at : 5 + 8 * at] = True
        torch.testing.assert_close(got[:, ~reached], want[:, ~reached])
        assert got[:, 8:13, 2:5].isnan().all()


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window, dilation, message", [
    (4, 1, "odd windows"),
    (7, 1, "window of 7x7 with dilation 1x1 does not fit a map of 6x8"),
    (3, 3, "window of 3x3 with dilation 3x3 does not fit"),
    ((3, 3), (1, 0), "does not fit"),
])  # fmt: skip
def test_wrong_windows_are_named(window, dilation, message):
    q, k, v = qkv(1, 6, 8, 2, 4)
    with pytest.raises(ValueError, match=message) as caught:
        neighborhood_attention(q, k, v, window, dilation)
    assert "\n" not in str(caught.value)


def test_wrong_shapes_are_named():
    q, k, v = qkv(1, 6, 8, 2, 4)
    with pytest.raises(ValueError, match=r"q, k, v of shape \(B, H, W, heads, d\)"):
        neighborhood_attention(q, k[:, :5], v, 3)
    with pytest.raises(ValueError, match=r"bias of shape \(2, 5, 5\)"):
        neighborhood_attention(q, k, v, 3, bias=torch.zeros(2, 3, 3))
