"""Mamba-3 in Triton: its scan runs on the kernels of `gla`, with the ranks of a token as steps of their own.

What turns queries and keys adds up along each route: every route has its own, in time order, as all else is then.
"""

import torch.nn.functional as F
from torch import Tensor

from ...ops.mamba3 import _by_scan, _mamba3_mimo
from .common import again, in_time
from .gla import Scan


def _scan(queries: Tensor, keys: Tensor, v: Tensor, g: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    """The scan of `_by_scan`."""
    length, rank = queries.shape[2], queries.shape[4]
    gates = F.pad(g[:, :, :, None], (0, 0, 0, rank - 1))  # of the first rank's step alone
    q, k, values = (x.transpose(3, 4).flatten(2, 3) for x in (queries, keys, v))
    y, memory = Scan.apply(q, k, values, gates.flatten(2, 3), None, memory, 1.0, None)
    y = y.unflatten(2, (length, rank)).transpose(3, 4)
    if rank > 1:  # later steps of the same token
        y = y + (queries @ keys.mT).triu(1) @ v
    return y, memory


def _core(*inputs):
    return _by_scan(_scan, *inputs)


forward = _mamba3_mimo._through_route(_core, in_time)
backward = again(forward)
