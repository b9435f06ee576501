"""Mamba-3 in Triton: its scan runs on the kernels of `gla`, with the ranks of a token as steps of their own.

What turns queries and keys adds up along each route: every route has its own, in time order, as all else is then.
"""

from functools import partial

import torch.nn.functional as F
from torch import Tensor

from ...ops.mamba3 import _by_scan, _mamba3_mimo
from .common import again, in_time
from .gla import Scan


def _scan(queries: Tensor, keys: Tensor, v: Tensor, g: Tensor, memory: Tensor, dtype) -> tuple[Tensor, Tensor]:
    """The scan of `_by_scan`, on tokens of that dtype."""
    length, rank = queries.shape[2], queries.shape[4]
    gates = F.pad(g[:, :, :, None], (0, 0, 0, rank - 1))  # of the first rank's step alone
    q, k, values = (x.transpose(3, 4).flatten(2, 3).to(dtype) for x in (queries, keys, v))
    y, memory = Scan.apply(q, k, values, gates.flatten(2, 3), None, memory, 1.0, None)
    y = y.unflatten(2, (length, rank)).transpose(3, 4)
    if rank > 1:  # later steps of the same token
        y = y + (queries @ keys.mT).triu(1) @ v
    return y, memory


def forward(*args) -> tuple[Tensor, tuple[Tensor, ...]]:
    core = partial(_by_scan, partial(_scan, dtype=args[0].dtype))
    return _mamba3_mimo._through_route(core, in_time)(*args)


backward = again(forward)
