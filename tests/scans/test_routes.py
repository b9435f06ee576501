"""Routes: golden tables of published systems, properties on random grids, and tables inside traced graphs."""

import hashlib
import json
import pickle
import re
from math import prod
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from linescan.scans import causal_conv1d, routes, selective_scan
from linescan.scans.routes import insert_tokens, inverse, orders, pad_slots, parse, point_table, points, table, tables
from linescan.scans.routes.curves import CURVES, hilbert_keys, zorder_keys
from linescan.scans.visits import known

DATA = Path(__file__).parent / "data"
MAMBAAD = json.loads((DATA / "mambaad__scan_tables.json").read_text())
NAMES = {"sweep": "row", "scan": "snake", "zigzag": "zigzag", "zorder": "zorder", "hilbert": "hilbert"}


def order(spec: str, *grid: int) -> list[int]:
    (route,) = parse(spec)
    return route.order(grid).tolist()


def steps_apart(cells: np.ndarray, grid: tuple[int, ...]) -> np.ndarray:
    return np.abs(np.diff(np.stack(np.unravel_index(cells, grid)))).sum(0)


# -- golden tables ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", MAMBAAD["sha256_int64"])
def test_mambaad_curves_at_every_size(key):
    name = key.rstrip("0123456789")
    size = int(key[len(name) :])
    got = table(NAMES[name], (size, size))[0].numpy().astype(np.int64)
    if str(size) in MAMBAAD["base"]:
        assert got.tolist() == MAMBAAD["base"][str(size)][name]
    assert hashlib.sha256(got.tobytes()).hexdigest() == MAMBAAD["sha256_int64"][key]


@pytest.mark.parametrize("name", NAMES)
def test_mambaad_eight_directions(name):
    curve = NAMES[name]
    four = [curve, f"T:{curve}", f"rot90:{curve}", f"rot90:T:{curve}"]
    assert table([*four, *(f"-{r}" for r in four)], (8, 8)).tolist() == MAMBAAD["directions"][name]


@pytest.mark.parametrize("grid", ["2x2", "4x5", "5x4", "3x7", "7x3", "8x8", "16x12"])
def test_mhsvm_routes_on_square_and_other_grids(grid):
    golden = np.load(DATA / "mhsvm__routes.npz")[f"routes_{grid}"]
    spec = "snake, T:snake, zigzag, fliplr:zigzag, spiral, flipud:spiral, row, col"
    np.testing.assert_array_equal(table(spec, grid), golden)


def test_pointmamba_hilbert_keys_and_orders():
    golden = np.load(DATA / "pointmamba__curves.npz")
    cells = torch.from_numpy(golden["cells"])
    for depth in (7, 9):
        np.testing.assert_array_equal(hilbert_keys(cells, depth), golden[f"hilbert_depth{depth}"])
    np.testing.assert_array_equal(hilbert_keys(cells[:, [1, 0, 2]], 7), golden["hilbert_trans_depth7"])
    points = torch.from_numpy(golden["points"])
    got = point_table(points, "hilbert, hilbert-trans", cell=0.02)
    np.testing.assert_array_equal(got[:, 0], golden["order_hilbert"])
    np.testing.assert_array_equal(got[:, 1], golden["order_hilbert_trans"])


# -- orders written out by hand -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec, grid, expected",
    [
        ("col", (2, 3), [0, 3, 1, 4, 2, 5]),
        ("-col", (2, 3), [5, 2, 4, 1, 3, 0]),
        ("snake", (3, 3), [0, 1, 2, 5, 4, 3, 6, 7, 8]),
        ("diagonal", (2, 3), [0, 1, 3, 2, 4, 5]),
        ("zigzag", (2, 3), [0, 1, 3, 4, 2, 5]),
        ("zorder", (3, 3), [0, 1, 3, 4, 2, 5, 6, 7, 8]),
        ("rot90:row", (2, 3), [2, 5, 1, 4, 0, 3]),
        ("w2", (4, 4), [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]),
        ("w2", (2, 3), [0, 1, 3, 4, 2, -1, 5, -1]),
        ("-w2", (3, 3), [-1, -1, -1, 8, -1, -1, 7, 6, -1, 5, -1, 2, 4, 3, 1, 0]),
        ("window(2x1, inside=-col, between=col)", (2, 2), [2, 0, 3, 1]),
        ("thw", (2, 1, 2), [0, 1, 2, 3]),
        ("wht", (2, 1, 2), [0, 2, 1, 3]),
        ("twh", (2, 2, 2), [0, 2, 1, 3, 4, 6, 5, 7]),
        ("spatial_first(col)", (2, 2, 2), [0, 2, 1, 3, 4, 6, 5, 7]),
        ("temporal_first(col)", (2, 2, 2), [0, 4, 2, 6, 1, 5, 3, 7]),
        ("hwt(snake)", (2, 2, 2), [0, 4, 5, 1, 2, 6, 7, 3]),
        ("temporal_first(w2)", (2, 1, 1), [0, 1, -1, -1, -1, -1, -1, -1]),
        ("snake", (2, 2, 2), [0, 1, 3, 2, 6, 7, 5, 4]),
    ],
)
def test_orders(spec, grid, expected):
    assert order(spec, *grid) == expected


def test_windows_follow_the_position_formula_of_localmamba():
    height, width, k = 7, 9, 4
    got = inverse(table(f"w{k}", (height, width)), height * width)[0].reshape(height, width)
    r, c = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    across = -(-width // k)
    assert torch.equal(got.long(), ((r // k) * across + c // k) * k * k + (r % k) * k + c % k)


@pytest.mark.parametrize("axes", ["thw", "twh", "htw", "hwt", "wth", "wht"])
def test_axis_orders_are_permuted_row_orders(axes):
    cells = np.arange(60).reshape(3, 4, 5).transpose(["thw".index(a) for a in axes])
    assert order(axes, 3, 4, 5) == cells.ravel().tolist()
    slices = [cell.ravel()[order("hilbert", *cell.shape)] for cell in cells]
    assert order(f"{axes}(hilbert)", 3, 4, 5) == np.concatenate(slices).tolist()
    assert order(f"{axes}:hilbert", 3, 4, 5) == cells.ravel()[order("hilbert", *cells.shape)].tolist()


def test_turns_are_what_numpy_does_to_the_map():
    cells = np.arange(12).reshape(3, 4)
    views = {
        "T": cells.T,
        "rot90": np.rot90(cells),
        "rot180": np.rot90(cells, 2),
        "rot270": np.rot90(cells, 3),
        "flipud": np.flipud(cells),
        "fliplr": np.fliplr(cells),
        "antiT": np.rot90(cells, 2).T,
    }
    for name, view in views.items():
        np.testing.assert_array_equal(order(f"{name}:row", 3, 4), view.ravel())
        for other in views:  # applied from left to right, and kept as one turn
            (both,) = parse(f"{name}:{other}:hilbert")
            inner = parse(f"{other}:hilbert")[0].order(view.shape)
            np.testing.assert_array_equal(both.order((3, 4)), view.ravel()[inner])
            assert both.spec.count(":") <= 1


# -- properties ---------------------------------------------------------------------------------------------------

TURNS = st.sampled_from(list(orders.TURNS))
AXES = st.sampled_from(orders.AXES)
SIZES = st.integers(1, 5)


def compose(inner):
    sizes = st.one_of(SIZES, st.tuples(SIZES, SIZES))
    return st.one_of(
        inner.map(lambda r: -r),
        st.builds(lambda r, name: r.turn(name), inner, TURNS),
        st.builds(routes.window, sizes, inner, inner),
    )


FLAT = st.recursive(st.sampled_from([*CURVES, "shuffle(3)"]).map(lambda name: parse(name)[0]), compose, max_leaves=3)
SOLID = st.recursive(
    st.one_of(
        st.sampled_from(["shuffle", *(n for n in CURVES if n != "spiral")]).map(lambda name: parse(name)[0]),
        FLAT.map(routes.spatial_first),
        FLAT.map(routes.temporal_first),
    ),
    lambda inner: st.one_of(
        inner.map(lambda r: -r),
        st.builds(lambda r, name: r.turn(name), inner, TURNS),
        st.builds(lambda r, axes: r.axes(axes), inner, AXES),
        st.builds(routes.window, SIZES, inner, inner),
    ),
    max_leaves=2,
)


def is_made(case) -> bool:
    """Windows of windows of windows may take far more steps than a few cells have, and are refused."""
    route, grid = case
    try:
        return route.order(grid) is not None
    except ValueError as error:
        assert "a route takes at most" in str(error)
        return False


CASES = st.one_of(
    st.tuples(FLAT, st.tuples(st.integers(1, 9), st.integers(1, 9))),
    st.tuples(SOLID, st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5))),
).filter(is_made)


@settings(deadline=None, max_examples=150)
@given(CASES)
def test_every_route_visits_every_cell_once(case):
    route, grid = case
    got = route.order(grid)
    assert got.dtype == np.int32
    assert sorted(got[got >= 0]) == list(range(prod(grid)))
    assert (got[got < 0] == -1).all()
    one = table(route, grid)
    assert table(route.spec, grid) is one
    back = routes.inverse_table(route, grid)
    assert torch.equal(one.gather(1, back.long())[0], torch.arange(prod(grid), dtype=torch.int32))
    assert torch.equal(back, inverse(one, prod(grid)))


@settings(deadline=None, max_examples=100)
@given(CASES)
def test_specs_and_symmetries(case):
    route, grid = case
    assert parse(route.spec) == (route,) and hash(parse(route.spec)[0]) == hash(route)
    assert pickle.loads(pickle.dumps(route)) == route
    assert -(-route) == route
    assert (-route).order(grid).tolist() == route.order(grid)[::-1].tolist()
    assert route.turn("T").turn("T") == route.turn("fliplr").turn("fliplr") == route
    assert route.turn("rot90").turn("rot90") == route.turn("rot180")
    assert route.turn("rot90").turn("rot90").turn("rot90").turn("rot90") == route
    assert route.turn("rot90").turn("T") == route.turn("T").turn("rot270")
    if len(grid) == 3:
        assert route.axes("htw").axes("htw") == route.axes("wth").axes("hwt") == route


@settings(deadline=None, max_examples=60)
@given(CASES, st.sampled_from(["head", "middle", "tail"]), st.sampled_from(["head", "middle", "tail", 0, 1]))
def test_class_tokens_round_trip(case, at, stored):
    route, grid = case
    with_token = route.with_tokens(at, stored)
    assert parse(with_token.spec) == (with_token,) and parse((-with_token).spec) == (-with_token,)
    got, plain, cells = with_token.order(grid), route.order(grid), prod(grid)
    index = {"head": 0, "middle": cells // 2, "tail": cells}.get(stored, stored)
    step = {"head": 0, "middle": len(plain) // 2, "tail": len(plain)}[at]
    assert got[step] == index and with_token.length(grid) == cells + 1
    expected = np.where(plain >= index, plain + 1, plain)
    np.testing.assert_array_equal(np.delete(got, step), expected)


@pytest.mark.parametrize("name", ["snake", "hilbert"])
def test_hilbert_and_snake_only_step_to_neighbours(name):
    for grid in [(h, w) for h in range(1, 25) for w in range(1, 25)] + [(40, 41), (37, 90), (6, 100)]:
        assert (steps_apart(order(name, *grid), grid) == 1).all(), grid


@pytest.mark.parametrize("grid", [(2, 2, 2), (8, 8, 8), (4, 6, 8), (8, 14, 14), (2, 12, 4), (16, 10, 6), (10, 4, 4)])
def test_3d_hilbert_and_snake_only_step_to_neighbours_on_even_sides(grid):
    for name in ("snake", "hilbert"):
        assert (steps_apart(order(name, *grid), grid) == 1).all()


def test_3d_hilbert_never_jumps_far_on_odd_sides():
    for grid in [(3, 3, 3), (5, 7, 7), (1, 9, 5), (7, 5, 3), (3, 14, 14), (9, 2, 6)]:
        apart = steps_apart(order("hilbert", *grid), grid)
        assert apart.max() <= 2 and (apart == 2).mean() < 0.1


@pytest.mark.parametrize("dims, bits", [(2, 1), (2, 4), (3, 1), (3, 2), (3, 3)])
def test_keys_agree_with_the_grid_curves(dims, bits):
    grid = (2**bits,) * dims
    cells = torch.stack(torch.meshgrid(*[torch.arange(n) for n in grid], indexing="ij"), -1).reshape(-1, dims)
    for name, keys in (("hilbert", hilbert_keys(cells.flip(-1), bits)), ("zorder", zorder_keys(cells, bits))):
        assert keys.sort().values.tolist() == list(range(prod(grid)))
        assert keys.argsort().tolist() == order(name, *grid)


def test_shuffles_go_by_their_seed():
    assert order("shuffle", 2, 4) == order("shuffle(0)", 2, 4) == order("shuffle", 1, 2, 4) == [6, 2, 1, 7, 3, 0, 5, 4]
    assert order("shuffle(1)", 2, 4) == [7, 2, 1, 6, 0, 4, 3, 5] != order("shuffle(2)", 2, 4)
    for wrong in ("shuffle(-1)", "shuffle(x)", "shuffle(4294967296)", "shuffle(9" + 4000 * "9" + ")"):
        with pytest.raises(ValueError, match="seed of a shuffle is a number|at most 2000 characters"):
            parse(wrong)
    with pytest.raises(ValueError, match="does not fit shuffle or shuffle.SEED."):
        parse("shuffle(1, 2)")


def test_shuffles_are_redrawn_and_nothing_else():
    mixed = parse("w3, shuffle(1), -shuffle, shuffle(2)")
    fixed = table(mixed, (4, 5))
    torch.manual_seed(0)
    fresh, again = routes.redrawn(mixed, (4, 5)), routes.redrawn(mixed, (4, 5))
    torch.manual_seed(0)
    for k in (1, 3):  # the draws of torch, in the order of the routes
        assert torch.equal(fresh[k, :20].long(), torch.randperm(20)) and (fresh[k, 20:] == -1).all()
        assert not torch.equal(fresh[k], again[k]) and not torch.equal(fresh[k], fixed[k])
    for k in (0, 2):
        assert torch.equal(fresh[k], fixed[k])
    assert torch.equal(table(mixed, (4, 5)), fixed), "the cached table stays as it is"
    assert routes.redrawn(parse("row, col"), (4, 5)).tolist() == table("row, col", (4, 5)).tolist()


# -- tables -------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_cache():
    """A cache for two tables of 64 tokens, empty before and after."""
    tables._cache.clear()
    before = routes.cache_limit(2 * 64 * 4)
    yield
    routes.cache_limit(before)
    tables._cache.clear()


def test_the_cache_is_bounded_by_bytes(small_cache):
    row, col = table("row", (8, 8)), table("col", (8, 8))
    assert table("row", (8, 8)) is row and table("col", (8, 8)) is col
    table("row", (8, 8))  # used last
    snake = table("snake", (8, 8))
    assert table("row", (8, 8)) is row and table("snake", (8, 8)) is snake
    assert table("col", (8, 8)) is not col and torch.equal(table("col", (8, 8)), col)
    assert tables._cache.bytes == sum(x.nbytes for x in tables._cache.entries.values()) == 512
    large = table("row", (12, 12))  # more than all that may be kept
    assert table("row", (12, 12)) is not large and tables._cache.bytes == 0
    assert routes.cache_limit(0) == 512 and routes.cache_limit() == 0
    with pytest.raises(ValueError, match="a number of bytes from 0, got -1"):
        routes.cache_limit(-1)


def test_the_cache_keeps_64_mebibytes_unless_set():
    assert routes.cache_limit() == 64 * 2**20


def test_many_sizes_do_not_fill_the_memory(small_cache):
    for side in range(1, 40):
        table("row, -row", (side, 3)), routes.inverse_table("row", (side, 3))
        assert tables._cache.bytes <= 512


def test_threads_share_one_cache(small_cache):
    routes.cache_limit(2**20)
    found = []

    def work():
        for side in range(1, 30):
            found.append(table("hilbert", (side, side)))

    threads = [Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(x) for x in found}) == 29
    assert tables._cache.bytes == sum(x.nbytes for x in tables._cache.entries.values())


@pytest.mark.parametrize("spec, grid, message", [
    ("w50000", "4x4", "w50000 takes 2,500,000,000 steps on the 16 cells of 4x4"),
    ("row", "100000x100000", "row takes 10,000,000,000 steps on the 10,000,000,000 cells"),
    ("-T:w50000", (4, 4), "takes 2,500,000,000 steps"),
    ("window(2, inside=w9999)", (4, 4), "takes 399,920,004 steps"),
    ("window(2, between=w9999)", (4, 4), "takes 399,920,004 steps"),
    ("spatial_first(w9999)", (2, 4, 4), "takes 199,960,002 steps"),
    ("wht:w999", (2, 4, 4), "takes 997,002,999 steps"),
    ("cls(w50000)", (4, 4), "takes 2,500,000,001 steps"),
    ("w65", (1, 1), "w65 takes 4,225 steps on the 1 cells of 1x1"),
    (["row"] * 17, (4096, 4096), "a table of 17 routes with 16,777,216 steps has more than 268,435,456 entries"),
    ("-" * 2000 + "row", (4, 4), "at most 2000 characters, got 2003 that begin with '---"),
    ("T:" * 1500 + "row", (4, 4), "at most 2000 characters"),
])  # fmt: skip
def test_a_table_far_larger_than_its_grid_is_refused_before_it_is_made(spec, grid, message, monkeypatch):
    monkeypatch.setattr(routes.Route, "_order", lambda *args: pytest.fail("made"))
    with pytest.raises(ValueError, match=re.escape(message)) as refused:
        table(spec, grid)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 250


def test_long_and_deep_specs_within_bounds():
    assert parse("-" * 901 + "row")[0] == parse("-row")[0] and parse("- -row")[0] == parse("row")[0]
    assert parse("T:" * 900 + "row")[0] == parse("row")[0]
    # Windows larger than a small map are in use.
    assert table("w7", (1, 1)).shape == (1, 49) and table("w64", (1, 1)).shape == (1, 4096)


@settings(deadline=None, max_examples=100)
@given(CASES)
def test_the_number_of_steps_is_known_before(case):
    route, grid = case
    assert route._steps(grid) == len(route._order(grid))
    assert (-route).with_tokens("middle", "tail")._steps(grid) == route._steps(grid) + 1


def test_table_stacks_routes_and_pads_on_the_right():
    got = table(["row", "-w2"], (1, 3))
    assert got.dtype == torch.int32
    assert got.tolist() == [[0, 1, 2, -1, -1, -1, -1, -1], [-1, -1, -1, 2, -1, -1, 1, 0]]
    assert inverse(got, 3).tolist() == [[0, 1, 2], [7, 6, 3]]
    assert table("row,-w2", "1x3") is got  # one cache, however a call is spelled
    assert table(parse("row, -window(2)"), torch.Size([1, 3]), "cpu") is got


def test_inverse_drops_repeated_visits_and_takes_a_table_a_sample():
    assert inverse(torch.tensor([[2, -3, 0, -1]]), 4).tolist() == [[2, -1, 0, -1]]
    many = torch.stack([torch.stack([torch.randperm(6) for _ in range(3)]) for _ in range(2)]).int()
    assert torch.equal(inverse(many, 6), many.argsort(-1).int())


def test_a_table_made_during_inference_can_be_saved_for_backward():
    tables._cache.clear()
    with torch.inference_mode():
        index = table("hilbert", (3, 5))
    x = torch.randn(15, requires_grad=True)
    x[index.long()].sum().backward()
    assert not index.is_inference() and torch.equal(x.grad, torch.ones(15))


def test_pad_slots_number_padding_along_each_route():
    got, slots = pad_slots(table("w2, -w2, row", (1, 3)), 3)
    assert slots == 5
    assert got.tolist() == [[0, 1, 3, 4, 2, 5, 6, 7], [3, 4, 5, 2, 6, 7, 1, 0], [0, 1, 2, 3, 4, 5, 6, 7]]
    same, none = pad_slots(table("row", (2, 3)), 6)
    assert none == 0 and torch.equal(same, table("row", (2, 3)))
    with pytest.raises(ValueError, match="4 steps cannot visit 5 tokens"):
        pad_slots(torch.zeros(1, 4, dtype=torch.int32), 5)


def test_class_tokens_of_published_systems():
    # Vim: stored and read in the middle of L tokens, at L // 2, and the whole sequence is reversed.
    assert order("cls(row, at=middle, stored=middle)", 14, 14) == list(range(197))
    assert order("-cls(row, at=middle, stored=middle)", 14, 14) == list(range(196, -1, -1))
    # VideoMamba: stored first, read first; on the way back it is read last.
    assert order("-cls(row)", 2, 1, 2) == [4, 3, 2, 1, 0]
    # LocalVim: at (S - 1) // 2 of every route, padded and reversed ones too, S counting the token.
    for spec in ("row", "-col", "w2", "-w2", "-w7"):
        got = order(f"cls({spec}, at=middle, stored=middle)", 5, 7)
        assert got[(len(got) - 1) // 2] == 35 // 2
        got = order(f"cls({spec}, at=half, stored=middle)", 5, 7)
        assert got == order(f"cls({spec}, at=17, stored=middle)", 5, 7) and got[35 // 2] == 35 // 2
    assert order("cls(w2, at=half+half, stored=tail)", 1, 3) == [0, 3, 4, 1, -1, -1, 2, -1, -1, -1]
    # Registers, spread over the sequence and stored first.
    assert order("cls(row, at=0+3+5, stored=head)", 1, 3) == [0, 3, 4, 1, 5, 2]
    assert order("cls(col, at=head+tail, stored=head)", 2, 2) == [0, 2, 4, 3, 5, 1]


def test_insert_tokens_into_tables():
    assert insert_tokens(torch.tensor([[2, 0, 1]]), "middle", "tail").tolist() == [[2, 3, 0, 1]]
    got = insert_tokens(torch.tensor([[1, -3, -1, 0]]), "tail", "head", length=2)
    assert got.tolist() == [[2, -4, -1, 1, 0]]  # the repeated visit of token 1 is one of token 2 now
    many = point_table(torch.rand(2, 5, 3), "hilbert, -zorder")
    inserted = insert_tokens(many, ["head", "tail"], ["head", "head"])
    assert inserted.shape == (2, 2, 7)
    assert (inserted[..., 0] == 0).all() and (inserted[..., -1] == 1).all()
    assert torch.equal(inserted[..., 1:-1], many + 2)
    for bad in (dict(at="front"), dict(at=9), dict(at=[1, 1]), dict(at=["head", 1], stored=[0]), dict(at=[])):
        with pytest.raises(ValueError):
            insert_tokens(many, **bad)


# -- points -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axes", [2, 3])
@pytest.mark.parametrize("cell", [None, 0.05])
def test_point_tables_are_permutations_a_sample(axes, cell):
    coords = torch.randn(3, 50, axes)
    curves = "hilbert,hilbert-trans,z,z-trans,-hilbert,axis0"
    got = point_table(coords, curves, cell=cell)
    assert got.shape == (3, 6, 50) and got.dtype == torch.int32
    assert torch.equal(got.sort(-1).values, torch.arange(50).expand(3, 6, 50).int())
    assert torch.equal(got[:, 4], got[:, 0].flip(-1))
    swapped = point_table(coords[..., [1, 0, 2][:axes]], "hilbert,zorder", cell=cell)
    assert torch.equal(got[:, [1, 3]], swapped)
    assert (coords[..., 0].gather(1, got[:, 5].long()).diff() >= 0).all()
    if cell is None:  # samples do not see each other, nor where they stand, nor their scale
        assert torch.equal(point_table(coords[1:2] * 4, curves), got[1:2])


def test_points_on_a_grid_follow_the_grid_curve():
    cells = np.stack(np.unravel_index(np.arange(64), (8, 8)), -1)
    coords = torch.tensor(cells[None, :, ::-1].copy(), dtype=torch.float32)  # (x, y)
    assert point_table(coords, "hilbert", bits=3)[0, 0].tolist() == order("hilbert", 8, 8)
    assert point_table(coords.flip(-1), "zorder", bits=3)[0, 0].tolist() == order("zorder", 8, 8)


@pytest.mark.parametrize("extent", [3, 17, 130, 9000])
def test_cell_rule_takes_the_depth_of_the_largest_cell(extent):
    cells = torch.randint(0, extent, (2, 80, 3))
    cells[:, 0], cells[0, 1] = 0, extent
    depth = int(cells.max()).bit_length()
    got = point_table(cells.double() + 0.5, "hilbert,zorder", cell=1.0)
    keys = hilbert_keys(cells, depth)
    assert torch.equal(points._deep_hilbert_keys(cells, torch.tensor([[depth]])), keys)
    assert torch.equal(got[:, 0].long(), keys.argsort(dim=-1, stable=True))
    assert torch.equal(got[:, 1].long(), zorder_keys(cells, depth).argsort(dim=-1, stable=True))


def test_each_sample_may_have_a_curve_of_its_own_depth():
    near, far = torch.rand(1, 50, 3), 900 * torch.rand(1, 50, 3)
    both = torch.cat((near, far))
    for curves in ("hilbert", "hilbert-trans, -hilbert", "zorder"):
        alone = torch.cat([point_table(x, curves, cell=0.02) for x in (near, far)])
        assert torch.equal(point_table(both, curves, cell=0.02, together=False), alone)
    published = point_table(both, "hilbert", cell=0.02)
    assert not torch.equal(published[:1], point_table(near, "hilbert", cell=0.02))
    assert torch.equal(published[1:], point_table(far, "hilbert", cell=0.02))


def test_a_reversed_curve_is_the_curve_backwards_points_of_one_cell_too():
    coords = torch.randn(2, 30, 3).repeat(1, 2, 1)
    both = point_table(coords, "hilbert, -hilbert, zorder-trans, -zorder-trans, axis1, -axis1")
    assert torch.equal(both[:, 1::2], both[:, ::2].flip(-1))


@pytest.mark.parametrize("options", [dict(), dict(cell=0.02), dict(cell=0.02, together=False)])
def test_what_is_no_point_is_not_visited(options):
    coords = torch.randn(3, 20, 3) + 5  # far from the origin, where padding would be
    lengths = [20, 7, 0]
    coords[1, 7:] = 1e6  # what is there does not matter
    coords[0, 4] = float("nan")
    curves = "hilbert, -hilbert-trans, zorder, -axis2"
    got = point_table(coords, curves, lengths=lengths, **options)
    assert torch.equal(point_table(coords, curves, lengths=torch.tensor(lengths), **options), got)
    there = torch.cat((coords[:1, :4], coords[:1, 5:]), 1)
    first = point_table(there, curves, **options)[0]
    assert torch.equal(got[0, :, :19], torch.where(first >= 4, first + 1, first))
    assert torch.equal(got[1, :, :7].sort(-1).values, torch.arange(7).int().expand(4, 7))
    assert (got[0, :, 19:] == -1).all() and (got[1, :, 7:] == -1).all() and (got[2] == -1).all()
    assert point_table(coords[:, :0], curves, **options).shape == (3, 4, 0)


def test_equal_points_keep_their_order():
    assert point_table(torch.zeros(2, 40, 3), "hilbert,z").tolist() == [[list(range(40))] * 2] * 2


def test_point_tables_compile():
    coords = torch.randn(2, 30, 3)
    for options in (dict(bits=4), dict(cell=0.1)):

        def tables(x):
            points = point_table(x, "hilbert,-axis1", **options)
            with_token = insert_tokens(points, at="middle", stored="tail")
            return with_token, inverse(with_token, 31), pad_slots(with_token, 31)[0]

        torch._dynamo.reset()
        for got, expected in zip(torch.compile(tables, fullgraph=True, backend="aot_eager")(coords), tables(coords)):
            assert torch.equal(got, expected)


# -- traced graphs ------------------------------------------------------------------------------------------------


class Scan(torch.nn.Module):
    def __init__(self, spec):
        super().__init__()
        self.spec = spec
        self.A = torch.nn.Parameter(-torch.rand(4, 3, 2))

    def forward(self, x):
        route = routes.table(self.spec, x.shape[-2:], x.device)
        u = x.flatten(2).transpose(1, 2)[:, None]
        B = u[..., None, :2]
        y = selective_scan(u, u, self.A, B, B, delta_softplus=True, route=route, merge="sum")
        back = routes.inverse_table(self.spec, x.shape[-2:], x.device)
        return y * back.sum(0)[:, None]


SPECS = {"text": "row, -row, w4, -w4", "routes": parse("row, -row, w4, -w4")}


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("how", ["compile", "compile dynamic", "export strict", "export", "fake"])
def test_tables_are_constants_of_traced_graphs(how, spec, cached):
    model, x = Scan(SPECS[spec]), torch.randn(2, 3, 4, 6)
    expected = model(x)
    if not cached:
        tables._cache.clear()
    torch._dynamo.reset()
    if how.startswith("compile"):
        dynamic = how.endswith("dynamic") or None
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        torch.testing.assert_close(compiled(x), expected)
        wider = torch.randn(2, 3, 5, 7)
        torch.testing.assert_close(compiled(wider), model(wider))
    elif how.startswith("export"):
        program = torch.export.export(model, (x,), strict=how.endswith("strict"))
        other = torch.randn_like(x)
        torch.testing.assert_close(program.module()(other), model(other))
    else:
        with FakeTensorMode():
            assert Scan(SPECS[spec])(torch.randn(2, 3, 4, 6)).shape == (2, 24, 3)
    # Nothing that tracing made stays behind.
    assert type(table(SPECS[spec], (4, 6))) is torch.Tensor
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("strict", [False, True])
def test_tables_that_an_export_made_are_known_after_it(strict):
    """Else what is made of them for each call, as `pad_slots` does, would be checked at each call."""
    tables._cache.clear()
    torch.export.export(Scan(SPECS["text"]), (torch.randn(2, 3, 4, 6),), strict=strict)
    assert known(table(SPECS["text"], (4, 6))) is not None


@pytest.mark.parametrize("how", ["compile", "export strict", "export"])
def test_one_graph_serves_every_grid(how):
    model, x = Scan("row, -col, hilbert, -w4"), torch.randn(2, 3, 5, 7)  # windows of 4 leave padding
    torch._dynamo.reset()
    if how == "compile":
        counter = CompileCounterWithBackend("aot_eager")
        run = torch.compile(model, fullgraph=True, backend=counter, dynamic=True)
    else:
        axes = {i: torch.export.Dim.DYNAMIC for i in (0, 2, 3)}
        run = torch.export.export(model, (x,), dynamic_shapes=(axes,), strict=how.endswith("strict")).module()
    for batch, height, width in ((2, 5, 7), (3, 8, 6), (4, 3, 12)):
        x = torch.randn(batch, 3, height, width, requires_grad=True)
        got, want = run(x), model(x)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), x)[0] for y in (got, want)))
    assert how != "compile" or counter.frame_count == 1
    route = torch.ops.linescan.route_table("table", "row", [4, 6], x.device)
    route.zero_()
    assert torch.equal(table("row", (4, 6))[0], torch.arange(24, dtype=torch.int32)), "a graph has a copy"


class Fixed(torch.nn.Module):
    """Reads through a table of five tokens and one of padding."""

    def __init__(self):
        super().__init__()
        self.register_buffer("route", torch.tensor([[0, 1, 2, 3, 4, -1]]))
        self.taps = torch.nn.Parameter(torch.rand(1, 3, 2))

    def forward(self, x):
        return causal_conv1d(x, self.taps, route=self.route)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_constant_table_is_for_its_number_of_tokens():
    model, x, more = Fixed(), torch.rand(1, 1, 5, 3), torch.rand(1, 1, 6, 3)
    traced = torch.jit.trace(model, (x,), check_trace=False)
    torch.testing.assert_close(traced(x), model(x))
    with pytest.raises(Exception, match="traced with 5 tokens and a route table for them, now run with 6"):
        traced(more)
    tokens = {2: torch.export.Dim.DYNAMIC}
    with pytest.raises(Exception, match="(?s)marked.*dynamic.*specialized"):
        torch.export.export(model, (x,), dynamic_shapes=(tokens,))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (x, more):
        torch.testing.assert_close(compiled(tokens), model(tokens))


def test_nothing_is_recomputed_in_a_compiled_forward():
    model, x = Scan(SPECS["text"]), torch.randn(2, 3, 4, 6)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(x)
    before = list(tables._cache.entries)
    compiled(x)
    assert before == list(tables._cache.entries)


def test_a_default_device_is_respected():
    with torch.device("meta"):
        assert table("row", (3, 4)).device.type == "meta"
    assert table("row", (3, 4)).device.type == "cpu"


# -- errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec, message",
    [
        ("hilber", "unknown route 'hilber', did you mean 'hilbert'\\? there are: row, col, .*cls"),
        ("row, peano", "unknown route 'peano'; there are"),
        ("w2, rot45:row", "unknown route 'rot45'.*rot90"),
        ("", "route is missing"),
        ("row,,col", "route is missing"),
        ("-", "unknown route"),
        ("T:", "unknown route"),
        ("window(row", "unbalanced"),
        ("row)", "unbalanced"),
        ("row(3)", "does not fit row"),
        ("window()", "does not fit window"),
        ("window(3, outside=row)", "does not fit window"),
        ("w0", "sides of at least 1"),
        ("window(3x0)", "sides of at least 1"),
        ("window(row)", "sides of at least 1"),
        ("spatial_first(cls(row))", "class tokens go around"),
        ("cls(cls(row))", "class tokens go around"),
        ("cls(row, at=front)", "head, middle, half, tail or an index"),
        ("cls(row, at=head+head, stored=1)", "2 places to visit class tokens, 1 to store"),
        ([], "no route given"),
        (3, "a route is a spec"),
    ],
)
def test_bad_specs_give_one_clear_line(spec, message):
    with pytest.raises(ValueError, match=message) as error:
        parse(spec)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "spec, grid, message",
    [
        ("row", (0, 3), "sides of at least 1, got 0x3"),
        ("row", (4, -1), "sides of at least 1, got 4x-1"),
        ("row", (4,), r"\(H, W\) or \(T, H, W\)"),
        ("row", (4.5, 2), "got 4.5x2"),
        ("row", "14x", "got 14x"),
        ("row", 14, "got 14"),
        ("spiral", (2, 3, 4), "spiral is a 2D route, got the 3D grid 2x3x4"),
        ("wht", (3, 4), "wht needs a 3D grid"),
        ("temporal_first(row)", (3, 4), "needs a 3D grid"),
        ("w2x2", (2, 3, 4), "2 sides cannot tile the 3D grid"),
        ("cls(row, at=9)", (2, 2), "different indices below 5"),
        ("row, cls(row)", (2, 2), "store the same class tokens"),
    ],
)
def test_impossible_grids_give_one_clear_line(spec, grid, message):
    with pytest.raises(ValueError, match=message) as error:
        table(spec, grid)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: point_table(torch.zeros(4, 3)), r"\(B, N, 2\) or \(B, N, 3\)"),
        (lambda: point_table(torch.zeros(1, 4, 2), "axis2"), "unknown point curve 'axis2'; there are: hilbert"),
        (lambda: hilbert_keys(torch.zeros(4, 3), 4), "integer coordinates"),
        (lambda: zorder_keys(torch.zeros(4, 3).int(), 22), "bits is 1 to 21"),
        (lambda: parse("row")[0].turn("rot45"), "unknown turn 'rot45'; there are: T, rot90"),
        (lambda: parse("row")[0].axes("hw"), "unknown axis order"),
    ],
)
def test_other_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# -- drawings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec, grid, image",
    [
        ("row, hilbert, -w7, cls(snake, at=middle)", (14, 9), None),
        ("hilbert", (1, 1), None),
        ("spatial_first(spiral), temporal_first(row)", (3, 4, 5), np.zeros((3, 8, 10, 3))),
        ("zorder", (4, 6), np.zeros((32, 48, 3), np.uint8)),
    ],
)
def test_drawings(spec, grid, image, tmp_path):
    pytest.importorskip("matplotlib")
    from linescan.scans.routes.draw import draw_routes

    figure = draw_routes(spec, grid, tmp_path / "routes.png", image)
    titles = [axis.get_title() for axis in figure.axes if axis.get_title()]
    assert titles == [str(route) for route in parse(spec)]
    assert (tmp_path / "routes.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="an image is"):
        draw_routes(spec, grid, image=np.zeros((7, 7, 7)))
