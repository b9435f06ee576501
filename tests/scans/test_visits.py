"""Route tables: what is found out about them, once, and what is refused."""

import gc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from linescan.scans import routes, visits
from linescan.scans.visits import check_table, declare, is_permutation, known, read, write

from .tools import ROUTES, gather, scatter, table


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(ROUTES[1:]), st.integers(1, 3), st.integers(1, 3), st.integers(1, 9), st.integers(0, 99))
def test_read_gathers_and_write_scatters(kind, batch, rows, length, seed):
    """Whether anything is known of the table or not; and `write` undoes `read` on permutations."""
    route = table(kind, batch, rows, length, seed)
    for shared in (1, rows):
        x = torch.randn(batch, shared, length, 2)
        ordered = gather(x, route, rows)
        torch.testing.assert_close(read(x, route), ordered, rtol=0, atol=0)
        torch.testing.assert_close(write(ordered, route, length), scatter(ordered, route, length), rtol=0, atol=0)
        check_table("test", route, length)
        torch.testing.assert_close(read(x, route), ordered, rtol=0, atol=0)
        torch.testing.assert_close(write(ordered, route, length), scatter(ordered, route, length), rtol=0, atol=0)
        if kind == "permutation":
            torch.testing.assert_close(write(read(x, route), route, length), x.expand(-1, rows, -1, -1))


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(-7, 6), min_size=1, max_size=9))
def test_what_is_found_out(entries):
    """Of any row of entries for 5 tokens."""
    route, written = torch.tensor([entries]), [e for e in entries if e >= 0]
    good = all(-6 <= e < 5 for e in entries) and len(set(written)) == len(written)
    if not good:
        with pytest.raises(ValueError, match="test: "):
            check_table("test", route, 5)
        assert known(route) is None
        return
    check_table("test", route, 5)
    found = known(route)
    assert found.permutation == (sorted(entries) == [0, 1, 2, 3, 4]) and found.padding == (-1 in entries)


@pytest.mark.parametrize("merge", [False, True])
def test_a_graph_of_routes_of_each_sample_serves_every_batch(merge):
    class There(torch.nn.Module):
        def forward(self, x, route):
            return write(read(x, route), route, x.shape[2], merge)

    given = [(torch.randn(n, 2, 5, 3), torch.rand(n, 2, 5).argsort(-1).int()) for n in (2, 3)]
    axes = {0: torch.export.Dim.DYNAMIC}
    program = torch.export.export(There(), given[0], dynamic_shapes=(axes, axes)).module()
    torch.testing.assert_close(program(*given[1]), There()(*given[1]))


def test_every_sample_and_route_is_looked_at():
    route = torch.arange(4).expand(2, 3, 4).clone()
    check_table("test", route, 4)
    assert known(route).permutation
    for b in range(2):
        for k in range(3):
            bad = route.clone()
            bad[b, k, 3] = 0
            with pytest.raises(ValueError, match="visits token 0 twice"):
                check_table("test", bad, 4)


def test_a_table_is_looked_at_once(monkeypatch):
    looked = []
    inspect = visits._inspect
    monkeypatch.setattr(visits, "_inspect", lambda *args: looked.append(args[2]) or inspect(*args))
    route = torch.arange(6)[None]
    for _ in range(3):
        check_table("test", route, 6)
    assert looked == [6]
    check_table("test", route, 8)  # for another number of tokens
    assert looked == [6, 8]
    route[0, 0] = -1  # written to since
    check_table("test", route, 8)
    assert looked == [6, 8, 8] and known(route).padding
    with torch.inference_mode():
        frozen = torch.arange(6)[None]
    for _ in range(2):
        check_table("test", frozen, 6)
    assert looked == [6, 8, 8, 6]


def test_what_was_known_goes_with_the_table():
    route = torch.arange(6)[None]
    check_table("test", route, 6)
    key = id(route)
    assert key in visits._known
    copy = route.clone()
    assert known(copy) is None and known(route) is not None
    del route
    gc.collect()
    assert key not in visits._known


def test_tables_of_routes_are_known(monkeypatch):
    monkeypatch.setattr(visits, "_inspect", lambda *args: pytest.fail("looked at"))
    for spec, permutation in (("row, -row", True), ("w4, -w4", False), ("cls(hilbert, at=middle)", True)):
        made = routes.table(spec, (4, 6))
        length = made.shape[-1] if permutation else 24
        check_table("test", made, length)
        assert known(made).permutation is permutation and known(made).padding is not permutation
        with pytest.raises(ValueError, match=f"test: the route table was made for {length} tokens, the inputs have 30"):
            check_table("test", made, 30)
    points = routes.point_table(torch.rand(2, 9, 3), "hilbert, -z")
    for made, length in ((points, 9), (routes.insert_tokens(points, "middle", "tail"), 10)):
        check_table("test", made, length)
        assert known(made).permutation is None  # whether all rows are points only the device knows
    monkeypatch.undo()
    assert is_permutation(points, 9) and known(points).permutation is True and known(points).made
    some = routes.point_table(torch.rand(2, 9, 3), "hilbert, -z", lengths=[9, 4])
    assert not is_permutation(some, 9)
    padded, slots = routes.pad_slots(routes.table("w4", (3, 3)), 9)
    assert is_permutation(padded, 9 + slots)


def test_permutations_are_told_from_other_tables():
    route = torch.stack([torch.arange(6), torch.arange(6).flip(0)]).int()
    assert is_permutation(route, 6) and is_permutation(route[1:], 6)
    assert not is_permutation(route, 7)
    for entry in (-1, -2):
        route[1, 0] = entry  # remembered answers must not outlive the numbers
        assert not is_permutation(route, 6) and is_permutation(route[:1], 6)
    route[1, 0] = 4
    with pytest.raises(ValueError, match="visits token 4 twice"):
        is_permutation(route, 6)


def test_declared_tables_are_taken_as_they_are():
    route = declare(torch.tensor([[0, 1, 1]]), 3, permutation=True, padding=False)
    assert is_permutation(route, 3)
