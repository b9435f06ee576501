"""Any recurrence along any routes, and the ways to make one output of the routes' outputs."""

from inspect import signature
from typing import Callable, Sequence

import torch
from torch import Tensor, nn

from .._compat import is_observed
from . import routes as _routes
from .kernels import cpu
from .recurrence import is_plain

__all__ = [
    "MultiRoute",
    "Sum",
    "Mean",
    "Gate",
    "Concat",
    "ChannelAttention",
    "RouteAttention",
    "PathActivation",
    "create_merge",
]


def _is_free(*tensors: Tensor) -> bool:
    """Whether a kernel may serve: no gradient is wanted, and nothing traces or transforms the call."""
    return not torch.is_grad_enabled() and is_plain(tensors)


def _weighted_sum(y: Tensor, weight: Tensor) -> Tensor:
    """(B, K, L, D) times weights (B or 1, K, D), summed over routes: (B, L, D)."""
    out = cpu.weighted_sum(y, weight) if _is_free(y, weight) else None
    return (y * weight.unsqueeze(2)).sum(1) if out is None else out


class Sum(nn.Module):
    """(B, K, L, ...) -> (B, L, ...): the sum over routes (Vim, VMamba)."""

    def __init__(self, dim: int, n_routes: int):
        super().__init__()
        self.out_dim = dim

    def forward(self, y: Tensor) -> Tensor:
        return y.sum(1)

    def of_sum(self, y: Tensor) -> Tensor:
        """The same of the sum over routes (B, L, ...), which recurrences make by themselves."""
        return y


class Mean(Sum):
    """(B, K, L, ...) -> (B, L, ...): the mean over routes (ViG)."""

    def __init__(self, dim: int, n_routes: int):
        super().__init__(dim, n_routes)
        self.n_routes = n_routes

    def forward(self, y: Tensor) -> Tensor:
        return y.mean(1)

    def of_sum(self, y: Tensor) -> Tensor:
        return y / self.n_routes


class Gate(nn.Module):
    """(B, K, L, D) -> (B, L, D): a weighted mean over routes, with learned weights for every channel.

    The weights are a softmax over routes of `logits` (K, D), at first all equal.
    """

    def __init__(self, dim: int, n_routes: int):
        super().__init__()
        self.out_dim = dim
        self.logits = nn.Parameter(torch.zeros(n_routes, dim))

    def forward(self, y: Tensor) -> Tensor:
        return _weighted_sum(y, self.logits.softmax(0).to(y.dtype)[None])


class Concat(nn.Module):
    """(B, K, L, ..., D) -> (B, L, ..., K * D): the routes' outputs side by side, as heads are (multi-head scan)."""

    def __init__(self, dim: int, n_routes: int):
        super().__init__()
        self.out_dim = n_routes * dim

    def forward(self, y: Tensor) -> Tensor:
        return y.movedim(1, -2).flatten(-2)


class ChannelAttention(nn.Module):
    """(B, K, L, D) -> (B, L, D): every route's output is gated by channel, then all are added.

        a_k = sigmoid(W2 gelu(W1 mean_l(LN(y_k)) + b1) + b2)        y = sum_k a_k y_k

    One set of weights serves all routes. BiAttn of LocalMamba: Huang et al., "LocalMamba: Visual State Space Model with
    Windowed Selective Scan", 2024, arXiv 2403.09338, section 4.2, its channel half, which is all that the published
    weights have.

    Args:
        dim: D, channels.
        n_routes: not used; any number of routes will do.
        reduction: D over the width between W1 and W2.
    """

    types = nn.LayerNorm, nn.Linear, nn.GELU, nn.Linear  # whose products one kernel makes

    def __init__(self, dim: int, n_routes: int = 1, reduction: int = 8):
        super().__init__()
        self.out_dim = dim
        self.norm = nn.LayerNorm(dim)
        self.global_reduce = nn.Linear(dim, dim // reduction)
        self.act = nn.GELU()
        self.channel_select = nn.Linear(dim // reduction, dim)

    def forward(self, y: Tensor) -> Tensor:
        return _weighted_sum(y, self.gates(y))

    def gates(self, y: Tensor) -> Tensor:
        """The factors a (B, K, D), in float32 where a kernel makes them."""
        layers = self.norm, self.global_reduce, self.act, self.channel_select
        if _is_free(y) and tuple(map(type, layers)) == self.types and not any(map(is_observed, layers)):
            gates = cpu.channel_gates(y, *layers[:2], layers[3])
            if gates is not None:
                return gates
        means = self.norm(y).mean(2)
        return self.channel_select(self.act(self.global_reduce(means))).sigmoid()


class PathActivation(nn.Module):
    """(B, K, L, D) -> (B, L, D): a weighted mean over routes, with weights for every sample.

        a = softmax(W [mean_l(y_1), ..., mean_l(y_K)])        y = sum_k a_k y_k

    W is (K, K * D). The multi-path activation of RSMamba: Chen et al., "RSMamba: Remote Sensing Image Classification
    with State Space Model", IEEE GRSL 2024, arXiv 2403.19654, section II-C.
    """

    def __init__(self, dim: int, n_routes: int):
        super().__init__()
        self.out_dim = dim
        self.gate = nn.Linear(n_routes * dim, n_routes, bias=False)

    def mix(self, y: Tensor, means: Tensor) -> Tensor:
        """The outputs y (B, K, L, ...), weighted by what W makes of means (B, K, D), which may be of other outputs."""
        weights = self.gate(means.flatten(1)).softmax(-1)
        return torch.einsum("bkld,bk->bld", y, weights.to(y.dtype))

    def forward(self, y: Tensor) -> Tensor:
        return self.mix(y, y.mean(2))


class RouteAttention(nn.Module):
    """(B, K, L, D) -> (B, L, D): the sum over routes, weighted by how much the routes differ at each place.

        y = sum_k y_k * relu(c - threshold);    c = std_k(y_k) / (mean_k(y_k) - min_k(y_k) + 1e-5)

    The standard deviation is the unbiased one. Without parameters; where all routes agree, 0. "Scan route attention" of
    MHS-VM: Ji, "MHS-VM: Multi-Head Scanning in Parallel Subspaces for Vision Mamba", 2024, arXiv 2406.05992.

    Args:
        dim: D, channels.
        n_routes: not used; any number of routes from two on will do.
        threshold: below which there is nothing. Of four routes c is at least 2/3, unless they hardly differ.
    """

    def __init__(self, dim: int, n_routes: int = 4, threshold: float = 0.0):
        super().__init__()
        self.out_dim, self.threshold = dim, threshold

    def forward(self, y: Tensor) -> Tensor:
        above = y - y.amin(1, keepdim=True)  # exact where routes are close, and their means would cancel
        spread = above.std(1) / (above.mean(1) + 1e-5)
        return y.sum(1) * (spread - self.threshold).relu()


_MERGES = {
    "sum": Sum, "mean": Mean, "gate": Gate, "concat": Concat, "channel_attention": ChannelAttention,
    "path_activation": PathActivation, "route_attention": RouteAttention,
}  # fmt: skip


def create_merge(name: str, dim: int, n_routes: int) -> nn.Module:
    """A module that merges the outputs of K = `n_routes` routes, (B, K, L, dim) -> (B, L, merge.out_dim).

    Args:
        name: "sum", "mean", "gate", "concat", "channel_attention", "path_activation" or
            "route_attention".
        dim: channels of one route's output.
        n_routes: K.

    Raises:
        ValueError: there is no merge of that name.
    """
    if name not in _MERGES:
        raise ValueError(f"unknown merge {name!r}; there are: {', '.join(_MERGES)}")
    return _MERGES[name](dim, n_routes)


class MultiRoute(nn.Module):
    """Runs a recurrence along several routes and merges the outputs.

        scan = MultiRoute(selective_scan, "row, -row, col, -col", merge="gate", dim=96)
        y = scan(u, delta, A, B, C, grid=(14, 14))                  # (B, 196, 96)

    Args:
        recurrence: any function of this package that takes `route` and `merge`, as `selective_scan`.
        routes: what `routes.table` takes; K, the number of routes of tables given with each call (point clouds); or
            None for one route, the stored order.
        merge: a name for `create_merge`, a module (B, K, L, ...) -> (B, L, ...), or a function (dim, K) -> module.
        dim: channels of one route's output; not needed by "sum" and "mean".
        join_heads: outputs (B, K, L, H, P) are merged as (B, K, L, H * P).

    Raises:
        ValueError: unknown merge or route.
    """

    def __init__(
        self,
        recurrence: Callable,
        routes: "int | None | _routes.RouteLike | Sequence[_routes.RouteLike]",
        merge: "str | nn.Module | Callable[[int, int], nn.Module]" = "sum",
        dim: int = 0,
        join_heads: bool = False,
    ):
        super().__init__()
        self.recurrence = recurrence
        self.routes = routes if routes is None or isinstance(routes, int) else _routes.parse(routes)
        self.n_routes: int = len(self.routes) if isinstance(self.routes, tuple) else routes or 1
        self.join_heads = join_heads
        if isinstance(merge, str):
            merge = create_merge(merge, dim, self.n_routes)
        self.merge = merge if isinstance(merge, nn.Module) else merge(dim, self.n_routes)
        parameters = signature(recurrence).parameters.values()
        self.has_state = any(p.name in ("initial_state", "options") for p in parameters)

    def table(self, grid: Sequence[int], device: torch.device | str | None = None) -> Tensor | None:
        """The table (K, S) of the routes over a grid; None for the stored order.

        Raises:
            ValueError: the routes are not known here, but given with each call.
        """
        if isinstance(self.routes, int):
            raise ValueError(f"MultiRoute: made for {self.n_routes} given routes, so each call needs a route table")
        return None if self.routes is None else _routes.table(self.routes, grid, device)

    def merge_routes(self, y: Tensor, grid: Sequence[int] | None) -> Tensor:
        """Outputs (B, K, L, ...) of the routes -> (B, L, ...); `grid` as the call had it."""
        return self.merge(y)

    def forward(
        self,
        *inputs,
        grid: Sequence[int] | None = None,
        route: Tensor | None = None,
        initial_state: Tensor | None = None,
        return_final_state: bool = False,
        keep: int | None = None,
        **options,
    ) -> Tensor | tuple[Tensor, Tensor | None]:
        """Args:
            inputs, options: of the recurrence; token inputs are (B, K or 1, L, ...), in stored order.
            grid: (H, W) or (T, H, W) that the tokens stand on.
            route: a table (K, S) or (B, K, S) instead of the routes over `grid`.
            initial_state: of the recurrence.
            return_final_state: also return the state after the last step.
            keep: tokens whose outputs are merged and returned, the first of the L; all by default.

        Returns:
            the merged output (B, L, ...), or with `return_final_state` a pair of that and the state (B, K, ...), which
            is None where the recurrence has none.

        Raises:
            ValueError: neither `grid` nor `route` is given, a table of another number of routes, or an initial state
                for a recurrence that has none.
        """
        if route is None:
            if grid is None and self.routes is not None:
                raise ValueError("MultiRoute: give the grid that the tokens stand on, or a route table")
            route = self.table(grid, inputs[0].device)
        elif route.shape[-2] != self.n_routes:
            raise ValueError(f"MultiRoute: made for {self.n_routes} routes, the table has {route.shape[-2]}")
        if self.has_state:
            options |= {"initial_state": initial_state, "return_final_state": True}
        elif initial_state is not None:
            raise ValueError(f"{self.recurrence.__name__} reads all tokens at once: it has no state to start from")
        merge = self.merge
        added = type(merge) in (Sum, Mean)  # the recurrence adds up by itself
        result = self.recurrence(*inputs, route=route, merge="sum" if added else None, **options)
        y, state = result if self.has_state else (result, None)
        if keep is not None:
            y = y.narrow(1 if added else 2, 0, keep)
        if self.join_heads:
            y = y.flatten(-2)
        y = merge.of_sum(y) if added else self.merge_routes(y, grid)
        return (y, state) if return_final_state else y

    def extra_repr(self) -> str:
        routes = ", ".join(map(str, self.routes)) if isinstance(self.routes, tuple) else self.routes
        return f"{self.recurrence.__name__}, routes={routes}"
