"""Class tokens among the tokens of a grid: where they are stored, and when a route visits them."""

from typing import Sequence

import torch
from torch import Tensor

from ..visits import declare, known

__all__ = ["insert_tokens", "merge_order", "token_places"]

PLACES = ("head", "middle", "half", "tail")


def token_places(at, stored) -> tuple[tuple, tuple]:
    """Both as tuples, one entry a token; a single name stands for all."""
    at, stored = ((p,) if isinstance(p, (str, int)) else tuple(p) for p in (at, stored))
    count = max(len(at), len(stored))
    if len(at) == 1 and isinstance(at[0], str):
        at *= count
    if len(stored) == 1 and isinstance(stored[0], str):
        stored *= count
    for places in (at, stored):
        bad = [p for p in places if p not in PLACES and not (isinstance(p, int) and p >= 0)]
        if bad or not places:
            raise ValueError(f"a class token goes to {', '.join(PLACES)} or an index from 0, got {[*bad]}")
    if len(at) != len(stored):
        raise ValueError(f"{len(at)} places to visit class tokens, {len(stored)} to store them")
    return at, stored


def merge_order(length: int, places: tuple, cells: int | None = None) -> tuple[int, ...]:
    """Which of `length` things and then len(places) tokens stands where, after the tokens went to their places.

    The things are `cells` tokens (by default `length`), and perhaps padding.
    """
    total = length + len(places)
    gaps = {"head": 0, "middle": length // 2, "half": (length if cells is None else cells) // 2, "tail": length}
    fixed = {place: length + i for i, place in enumerate(places) if isinstance(place, int)}
    if len(fixed) < sum(isinstance(place, int) for place in places) or any(place >= total for place in fixed):
        raise ValueError(f"class tokens need different indices below {total}, got {[*places]}")
    named = [(gaps[place], length + i) for i, place in enumerate(places) if isinstance(place, str)]
    order = list(range(length))
    for gap, token in sorted(named, reverse=True):  # from the back, so that gaps in front stay where they are
        order.insert(gap, token)
    for place in sorted(fixed):
        order.insert(place, fixed[place])
    return tuple(order)


def insert_tokens(
    table: Tensor,
    at: str | int | Sequence = "head",
    stored: str | int | Sequence = "head",
    length: int | None = None,
) -> Tensor:
    """Adds class tokens to a table: (..., S) -> (..., S + n), its tokens renumbered for a storage of length + n.

    A token inserted before a reversal takes part in it (VideoMamba: stored first, read first, and last on the way
    back); one inserted after does not (LocalVim: the middle of every route, index (S + n - 1) // 2).

    Args:
        table: any table, also one per sample (B, K, S).
        at: where each token is visited: "head", "middle" (before step S // 2), "half" (before step length // 2) or
            "tail", or its step among all S + n. One entry a token, or one name for all.
        stored: where each token is stored, in the same words: index among all length + n stored tokens.
        length: number of tokens stored so far; None: the number of steps (a table without padding).

    Raises:
        ValueError: a place is none, is taken twice or lies outside; or `at` and `stored` differ in number.
    """
    at, stored = token_places(at, stored)
    steps = table.shape[-1]
    length = steps if length is None else length
    # Where each token is stored now, the class tokens last.
    storage = torch.tensor(merge_order(length, stored), device=table.device).argsort().to(table.dtype)
    token = torch.where(table < -1, -2 - table, table)
    moved = storage[token.clamp_min(0).long()]
    moved = torch.where(table < -1, -2 - moved, torch.where(table == -1, table, moved))
    both = torch.cat([moved, storage[length:].expand(*table.shape[:-1], -1)], -1)
    both = both[..., torch.tensor(merge_order(steps, at, length), device=table.device)]
    before = known(table)
    if before is None or before.length != length:
        return both
    return declare(both, length + len(at), before.permutation, before.padding)
