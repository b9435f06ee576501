"""A recurrence that uses all that layouts can say, so that the contract holds for whatever will be declared with them:
several states, tokens that are booleans, parameters that routes share, an axis that may be missing, an option that a
size depends on, and sizes that follow from others."""

import torch

from linescan.scans.recurrence import Public, Recurrence
from linescan.scans.recurrence import recurrence as declare

__all__ = ["EXAMPLE"]


@declare(
    "k: B K L H d; v: B K L [G] H; reset?: bool B K L; decay: [K] H; taps?: (extra+1)",
    "B K L H (d+extra)",
    state="memory: B R H d; count: B R",
    scale=lambda d: 1 / d,
    requires=lambda d: "d is at most 64" if d > 64 else None,
    flops="4 * B * R * S * H * d",
    values=dict(decay=torch.sigmoid),
    sizes=dict(d=3, G=2),
    extra=1,
)
def _example(k, v, reset, decay, taps, scale: float, extra: int, memory, count):
    """M_t = decay M_{t-1} + k_t sum_g v_t, from zero at a reset, and n_t tokens since then; both are the output."""
    v = v.sum(3) if v.ndim == 5 else v
    outputs = []
    for t in range(k.shape[2]):
        kept = 1 if reset is None else 1 - reset[:, :, t].to(k.dtype)
        memory = (kept if reset is None else kept[..., None, None]) * decay[..., None] * memory
        memory = memory + scale * k[:, :, t] * v[:, :, t, :, None]
        count = kept * count + 1
        counts = count[..., None, None].expand(*memory.shape[:-1], extra)
        outputs.append(torch.cat((memory, counts if taps is None else counts * taps[1:] + taps[0]), -1))
    return torch.stack(outputs, 2), (memory, count)


@_example.chunked
def _chunked(*inputs):
    return _example.definition(*inputs)


def example(
    k, v, reset=None, decay=None, taps=None, *, scale=None, extra=None, initial_state=None, route=None, merge=None,
    return_final_state=False,
):  # fmt: skip
    inputs = k, v, reset, decay, taps, scale, extra, *(initial_state or (None, None))
    return _example(*inputs, route=route, merge=merge, return_final_state=return_final_state)


assert isinstance(_example, Recurrence)
EXAMPLE = Public("example", example, _example, _example.layout)
