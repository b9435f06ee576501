"""What every mixer promises: maps or tokens, tables made outside, states in and out, `project` apart from `scan`."""

import pytest
import torch
import torch.nn.functional as F

from linescan.layers.gla import BiGLA
from linescan.layers.mamba import MambaMixer
from linescan.layers.mixers import MIXERS, Attention, Mixer
from linescan.layers.rwkv import Place, QuadShift, SpatialMix, SpatialMix6
from linescan.layers.s6 import S6Scan
from linescan.layers.ss2d import SS2D, CascadeSS2D, MapScan, SSDScan
from linescan.scans import routes, selective_scan

MAKE = {name: lambda spec, name=name: Mixer(32, name, spec, head_dim=16, window=3) for name in MIXERS} | {
    "S6Scan": lambda spec: S6Scan(32, spec, d_state=4),
    "SSDScan": lambda spec: SSDScan(32, spec, d_state=4, dt_rank=2),
    "MapScan": lambda spec: MapScan(32, 0.5, spec),
    "MambaMixer": lambda spec: MambaMixer(32, spec, d_state=4),
    "SS2D": lambda spec: SS2D(32, spec, d_state=4),
    "BiGLA": lambda spec: BiGLA(32, 2, routes=spec),
}
BY_POSITION = ["log_linear", "log_linear_delta", "ttt", "ttt_fla", "titans", "titans_mlp"]  # what their states go with
NO_STATE = [name for name, core in MIXERS.items() if issubclass(core, Attention)] + ["bi_wkv4", "bi_wkv6", "sliding"]


def shaken(module):
    """In float64, with no parameter at a constant."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.double().parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return module.eval()


def make(name, spec="row, -col"):
    torch.manual_seed(0)
    return shaken(MAKE[name](spec))


def tokens(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("name", MAKE)
def test_maps_tokens_and_tables_give_the_same(name):
    mixer, x = make(name), tokens(2, 3, 5, 32)
    y = mixer(x)
    assert y.shape == x.shape
    flat = mixer(x.flatten(1, 2), (3, 5))
    assert torch.equal(flat, y.flatten(1, 2))
    table = routes.table("row, -col", (3, 5))
    assert torch.allclose(mixer(x, route=table), y)
    assert torch.allclose(mixer(x, route=table.expand(2, -1, -1)), y)  # one per sample
    other = torch.stack([table, table.flip(-2)])
    apart = torch.cat([mixer(x[i : i + 1], route=other[i]) for i in range(2)])
    assert torch.allclose(mixer(x, route=other), apart)
    assert torch.equal(mixer(x.flatten(1, 2)), mixer(x.flatten(1, 2)[:, None]).flatten(1, 2)), "tokens in a line"


@pytest.mark.parametrize("name", [name for name in MAKE if name not in NO_STATE + BY_POSITION])
def test_a_state_is_passed_on(name):
    mixer = make(name, "row, row")
    mixer = getattr(mixer, "core", mixer)
    if hasattr(mixer, "conv"):  # a 2D convolution reads both sides
        mixer.conv = torch.nn.Identity()
    x = tokens(2, 12, 32)
    whole, last = mixer(x, return_final_state=True)
    state, parts = None, []
    for start, end in ((0, 5), (5, 6), (6, 12)):
        y, state = mixer(x[:, start:end], initial_state=state, return_final_state=True)
        parts.append(y)
    assert torch.allclose(torch.cat(parts, 1), whole)
    for a, b in zip(*((s if isinstance(s, tuple) else (s,)) for s in (state, last))):
        assert a.shape[1] == 2 and torch.allclose(a, b)


@pytest.mark.parametrize("name", BY_POSITION)
def test_a_state_is_passed_on_with_its_position(name):
    core, x = make(name, "row").core, tokens(2, 22, 32)
    whole = core(x)
    first, state = core(x[:, :9], return_final_state=True)
    inputs = core.project(x[:, 9:])
    second, _ = core.scan(*inputs, grid=(1, 13), initial_state=state, position=9, return_final_state=True)
    assert torch.allclose(torch.cat([first, second], 1), whole)


@pytest.mark.parametrize("name", NO_STATE)
def test_what_reads_all_tokens_at_once_has_no_state(name):
    mixer = make(name)
    for options in ({"return_final_state": True}, {"initial_state": torch.zeros(1)}):
        with pytest.raises(ValueError, match="it has no state"):
            mixer(tokens(1, 3, 4, 32), **options)


@pytest.mark.parametrize("mix", [SpatialMix, SpatialMix6])
def test_rwkv_reads_a_grid_and_has_no_state(mix):
    mixer = shaken(mix(64, QuadShift(1), Place(1, 3)))
    x = tokens(1, 12, 64)
    assert mixer(x, (3, 4)).shape == x.shape and not torch.allclose(mixer(x, (3, 4)), mixer(x, (4, 3)))
    with pytest.raises(ValueError, match="it has no state"):
        mixer(x, (3, 4), return_final_state=True)


def test_a_cascade_has_no_state_to_start_from():
    with pytest.raises(ValueError, match="it has no state"):
        CascadeSS2D(8, d_state=2)(torch.randn(1, 3, 4, 8), initial_state=torch.zeros(1))


@pytest.mark.parametrize("name", [name for name in MAKE if name not in NO_STATE])
def test_tables_of_another_number_of_routes_are_refused(name):
    with pytest.raises(ValueError, match="made for 2 routes, the table has 3"):
        make(name)(tokens(1, 2, 3, 32), route=routes.table("row, row, row", (2, 3)))


# -- what systems do between project and scan -------------------------------------------------------------------------


def s6(scan, u, C=None, prompt=0):
    """One route of S6, written down with the operator alone."""
    dt, B, own = (u @ scan.x_proj[0].T).split(scan.split, -1)
    step = F.softplus(dt @ scan.dt_proj[0].T + scan.dt_bias[0])
    C = (own if C is None else C) + prompt
    return selective_scan(u[:, None], step[:, None], -scan.A_log.exp(), B[:, None], C[:, None], scan.D)[:, 0]


def test_two_scans_exchange_what_they_read():
    """Sigma's cross fusion: each modality is read with the other's C."""
    one, other = (shaken(S6Scan(8, "row", d_state=4)) for _ in range(2))
    u, v = tokens(2, 10, 8), tokens(4, 10, 8)[2:]
    (dt_u, B_u, C_u), (dt_v, B_v, C_v) = one.project(u[:, None]), other.project(v[:, None])
    assert torch.allclose(one.scan(u[:, None], dt_u, B_u, C_v, grid=(1, 10)), s6(one, u, C_v[:, 0]))
    assert torch.allclose(other.scan(v[:, None], dt_v, B_v, C_u, grid=(1, 10)), s6(other, v, C_u[:, 0]))


def test_a_prompt_and_an_order_per_image():
    """MambaIRv2: a prompt is added to C, and every image has its own order."""
    scan, u, prompt = shaken(S6Scan(8, 1, d_state=4)), tokens(2, 10, 8), tokens(2, 10, 4)
    order = torch.stack([torch.randperm(10), torch.randperm(10)])
    dt, B, C = scan.project(u[:, None])
    got = scan.scan(u[:, None], dt, B, C + prompt[:, None], route=order[:, None].int())
    for i in range(2):
        sorted_u, sorted_prompt = u[i : i + 1, order[i]], prompt[i : i + 1, order[i]]
        assert torch.allclose(got[i, order[i]], s6(scan, sorted_u, prompt=sorted_prompt)[0])


def test_one_set_of_parameters_for_all_routes():
    """RSMamba: three orders through one and the same mixer."""
    mixer = shaken(MambaMixer(8, 3, d_state=4, shared="all"))
    assert len(mixer.A_log) == len(mixer.D) == len(mixer.conv_weight) == 1
    x = tokens(2, 6, 8)
    table = torch.stack([torch.arange(6), torch.arange(6).flip(0), torch.tensor([3, 1, 0, 5, 2, 4])]).int()
    alone = shaken(MambaMixer(8, 1, d_state=4))
    alone.load_state_dict(mixer.state_dict())
    want = sum(alone(x, route=row[None]) for row in table)
    assert torch.allclose(mixer(x, route=table), want)
    _, (conv, scan) = mixer(x, route=table, return_final_state=True)
    for k, row in enumerate(table):
        _, (own_conv, own_scan) = alone(x, route=row[None], return_final_state=True)
        assert torch.allclose(conv[:, k : k + 1], own_conv) and torch.allclose(scan[:, k : k + 1], own_scan)
    with pytest.raises(ValueError, match="shared is one of '', 'inputs', 'all'"):
        MambaMixer(8, shared="some")


@pytest.mark.parametrize("name, gate, rank", [
    ("gla", "forget", 16), ("kda", "forget", 16), ("dplr", "remove", 16), ("wkv7", "remove", 32),
    ("simple_gla", "forget", 4),
])  # fmt: skip
def test_gates_per_channel_have_the_rank_of_their_papers(name, gate, rank):
    torch.manual_seed(0)
    core = Mixer(64, name, "row, -row, col, -col", head_dim=64 if name == "simple_gla" else 16).double().core
    values = core.values(gate, tokens(1, 80, 64)).transpose(1, 2).flatten(2)[0]  # all routes of a token
    assert torch.linalg.matrix_rank(values - values.mean(0), rtol=1e-5) == rank


def test_decays_of_rwkv_bend():
    for name in ("wkv6", "wkv7"):
        core = Mixer(64, name, head_dim=16).core
        far = core.values("decay", 1e6 * tokens(1, 8, 64).float())
        assert (far - core.own["decay"][-1].bias.view(4, 4, 16)[:, None]).abs().max() < 64
