"""MultiRoute over several recurrences, routes and merges."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from linescan.scans import causal_conv1d, routes, selective_scan, ssd
from linescan.scans.kernels import cpu
from linescan.scans.multi_route import ChannelAttention, MultiRoute, RouteAttention, create_merge

from .tools import noise

MERGES = ["sum", "mean", "gate", "concat", "channel_attention", "path_activation", "route_attention"]
CROSS = "row, -row, col, -col"


def s6_inputs(batch=2, n_routes=4, length=12, dim=8, d_state=3):
    torch.manual_seed(0)
    return {
        "u": noise(batch, 1, length, dim),
        "delta": noise(batch, n_routes, length, dim, offset=-2),
        "A": -torch.exp(noise(n_routes, dim, d_state)),
        "B": noise(batch, n_routes, length, d_state),
        "C": noise(batch, n_routes, length, d_state),
    }


def flips(x):
    """The four orders of VMamba's cross-scan by transposing and flipping, (B, 12, ...) on 3 x 4 -> (B, 4, 12, ...)."""
    column = x.unflatten(1, (3, 4)).transpose(1, 2).flatten(1, 2)
    return torch.stack((x, x.flip(1), column, column.flip(1)), 1)


def unflips(y):
    column = torch.stack((y[:, 2], y[:, 3].flip(1))).unflatten(2, (4, 3)).transpose(2, 3).flatten(2, 3)
    return torch.stack((y[:, 0], y[:, 1].flip(1), *column), 1)


def test_cross_scan_is_flips_and_transposes():
    inputs = s6_inputs()
    got = MultiRoute(selective_scan, CROSS)(*inputs.values(), grid=(3, 4), delta_softplus=True)
    u = flips(inputs["u"][:, 0])
    delta, B, C = (torch.stack([flips(inputs[key][:, k])[:, k] for k in range(4)], 1) for key in ("delta", "B", "C"))
    want = unflips(selective_scan(u, delta, inputs["A"], B, C, delta_softplus=True)).sum(1)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", MERGES)
def test_merges(name):
    torch.manual_seed(0)
    merge = create_merge(name, 8, 3).double()
    for parameter in merge.parameters():
        torch.nn.init.normal_(parameter)
    y = noise(2, 3, 5, 8).requires_grad_()
    got = merge(y)
    assert got.shape == (2, 5, merge.out_dim)
    for b in range(2):
        parts = y[b].unbind(0)
        if name == "sum":
            want = parts[0] + parts[1] + parts[2]
        elif name == "mean":
            want = (parts[0] + parts[1] + parts[2]) / 3
        elif name == "gate":
            weights = merge.logits.exp()
            want = sum(p * w for p, w in zip(parts, weights)) / sum(weights)
        elif name == "concat":
            want = torch.cat(parts, -1)
        elif name == "path_activation":
            weights = (merge.gate.weight @ torch.cat([p.mean(0) for p in parts])).exp()
            want = sum(p * w for p, w in zip(parts, weights)) / sum(weights)
        elif name == "route_attention":
            mean, lowest = sum(parts) / 3, torch.minimum(torch.minimum(*parts[:2]), parts[2])
            spread = (sum((part - mean) ** 2 for part in parts) / 2).sqrt() / (mean - lowest + 1e-5)
            want = 3 * mean * spread.clamp_min(0)
        else:
            want = 0
            for part in parts:
                token_mean = F.layer_norm(part, (8,), merge.norm.weight, merge.norm.bias, 1e-5).mean(0)
                hidden = F.gelu(merge.global_reduce.weight @ token_mean + merge.global_reduce.bias)
                want = want + part * torch.sigmoid(merge.channel_select.weight @ hidden + merge.channel_select.bias)
        torch.testing.assert_close(got[b], want)
    assert torch.autograd.gradcheck(merge, (y,), fast_mode=True)


@pytest.mark.skipif(cpu.missing() is not None, reason=f"CPU kernels {cpu.missing()}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["gate", "channel_attention"])
@pytest.mark.parametrize("dim", [32, 80, 24])
def test_merges_by_kernels(name, dim, dtype):
    """Without a gradient, of outputs of which more are not wanted; where no kernel serves, as with one."""
    torch.manual_seed(0)
    merge = create_merge(name, dim, 3).to(dtype)
    for parameter in merge.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    y = noise(2, 3, 150, dim)[:, :, :140].to(dtype) + 3
    want = merge.double()(y.double())
    with torch.no_grad():
        got = merge.to(dtype)(y)
    assert got.dtype == dtype
    close = (1e-5, 2e-5) if dtype is torch.float32 else (0.05, 0.1)
    torch.testing.assert_close(got.double(), want, rtol=close[0], atol=close[1])


def test_channel_attention_calls_a_norm_that_is_observed():
    merge, seen = ChannelAttention(8), []
    merge.norm.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    with torch.no_grad():
        merge(noise(2, 3, 5, 8).float())
    assert seen == [(2, 3, 5, 8)]


def test_route_attention_closes_below_its_threshold_and_where_routes_agree():
    y = noise(2, 4, 5, 8).requires_grad_()
    open_, closed = RouteAttention(8)(y), RouteAttention(8, threshold=1.0)(y)
    assert ((closed == 0) & (open_ != 0)).any() and (closed != 0).any()
    same = y[:, :1].expand(-1, 4, -1, -1)
    assert (RouteAttention(8)(same) == 0).all()
    RouteAttention(8)(same).sum().backward()
    assert (y.grad == 0).all(), "and has no gradient there"


def test_gate_starts_as_the_mean():
    y = noise(2, 3, 5, 8)
    torch.testing.assert_close(create_merge("gate", 8, 3).double()(y), y.mean(1))


def test_channel_attention_has_the_published_parameters():
    shapes = {key: tuple(x.shape) for key, x in ChannelAttention(16).state_dict().items()}
    assert shapes == {
        "norm.weight": (16,), "norm.bias": (16,),
        "global_reduce.weight": (2, 16), "global_reduce.bias": (2,),
        "channel_select.weight": (16, 2), "channel_select.bias": (16,),
    }  # fmt: skip


def test_unknown_merge_lists_what_exists():
    with pytest.raises(ValueError, match=f"unknown merge 'max'; there are: {', '.join(MERGES)}"):
        create_merge("max", 8, 2)


@pytest.mark.parametrize("merge", MERGES)
def test_merge_follows_the_recurrence(merge):
    """Whether the operator adds up by itself or a module merges, and whether the state is asked for or not."""
    inputs = s6_inputs()
    scan = MultiRoute(selective_scan, CROSS, merge, dim=8).double()
    route = routes.table(CROSS, (3, 4))
    apart, want_state = selective_scan(*inputs.values(), route=route, return_final_state=True)
    output, state = scan(*inputs.values(), grid=(3, 4), return_final_state=True)
    torch.testing.assert_close(output, scan.merge(apart))
    torch.testing.assert_close(state, want_state)
    torch.testing.assert_close(scan(*inputs.values(), grid=(3, 4)), output)


@given(
    height=st.integers(1, 6), width=st.integers(1, 6), spec=st.sampled_from(["row", "-col", "snake", "hilbert", "w2"])
)
@settings(deadline=None, max_examples=20)
def test_one_route_is_a_permutation(height, width, spec):
    torch.manual_seed(0)
    x, weight = noise(1, 1, height * width, 3), noise(1, 3, 4)
    got = MultiRoute(causal_conv1d, spec)(x, weight, grid=(height, width))
    order = routes.table(spec, (height, width))[0].tolist()
    steps = torch.stack([x[0, 0, t] if t >= 0 else torch.zeros(3).double() for t in order])
    want = torch.zeros_like(got)
    for t, token in enumerate(order):
        if token >= 0:
            want[0, token] = sum(weight[0, :, 3 - j] * steps[t - j] for j in range(min(4, t + 1)))
    torch.testing.assert_close(got, want)


def test_heads_side_by_side():
    """Head outputs (B, K, L, H, P) concatenate on their last axis."""
    torch.manual_seed(0)
    x, dt = noise(2, 1, 12, 2, 4), noise(2, 1, 12, 2, offset=-2)
    B, C, A = noise(2, 1, 12, 1, 3), noise(2, 1, 12, 1, 3), -torch.rand(2, 2).double()
    got = MultiRoute(ssd, "row, -row", "concat", dim=4)(x, dt, A, B, C, grid=(3, 4), dt_softplus=True)
    assert got.shape == (2, 12, 2, 8)
    apart = ssd(x, dt, A, B, C, dt_softplus=True, route=routes.table("row, -row", (3, 4)))
    torch.testing.assert_close(got[..., :4], apart[:, 0])
    torch.testing.assert_close(got[..., 4:], apart[:, 1])


def test_given_tables():
    """Point clouds: one table a sample, and a number of routes instead of a spec."""
    inputs = s6_inputs(n_routes=2)
    route = torch.stack([torch.stack([torch.randperm(12) for _ in range(2)]) for _ in range(2)]).int()
    scan = MultiRoute(selective_scan, 2)
    torch.testing.assert_close(
        scan(*inputs.values(), route=route), selective_scan(*inputs.values(), route=route, merge="sum")
    )
    with pytest.raises(ValueError, match="made for 2 given routes, so each call needs a route table"):
        scan(*inputs.values(), grid=(3, 4))
    with pytest.raises(ValueError, match="give the grid .* or a route table"):
        scan(*inputs.values())
    with pytest.raises(ValueError, match="made for 2 routes, the table has 3"):
        scan(*inputs.values(), route=route[:, [0, 1, 1]])
    with pytest.raises(ValueError, match="unknown"):
        MultiRoute(selective_scan, "sideways")


def test_any_module_merges():
    class First(torch.nn.Module):
        def forward(self, y):
            return y[:, 0]

    inputs = s6_inputs(n_routes=2)
    got = MultiRoute(selective_scan, "row, col", First())(*inputs.values(), grid=(3, 4))
    want = selective_scan(*inputs.values(), route=routes.table("row, col", (3, 4)))[:, 0]
    torch.testing.assert_close(got, want)


def test_it_exports():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scan = MultiRoute(selective_scan, CROSS, "channel_attention", dim=8).double()

        def forward(self, *inputs):
            return self.scan(*inputs, grid=(3, 4))

    net, inputs = Net(), tuple(s6_inputs().values())
    torch.testing.assert_close(torch.export.export(net, inputs).module()(*inputs), net(*inputs))


def test_repr_names_routes_and_recurrence():
    assert "selective_scan, routes=row, -row" in repr(MultiRoute(selective_scan, "row, -row"))
