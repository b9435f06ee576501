"""The fast implementations of the recurrences; importing them registers them.

`cpu` is C++, compiled at installation; `triton` is compiled at first use.
"""

from ..recurrence import recurrences
from . import triton

# isort: split
from . import cpu

__all__ = ["backend_info", "cpu", "triton"]


def backend_info() -> dict[str, str]:
    """What serves where: the kernels' state and how to get a missing one, then the implementation of every operator.

    Returns:
        Lines by name: "cpu" and "triton" for the kernels, then one a recurrence ("cpu: C++, cuda: chunked torch").
    """
    states = {"cpu": cpu.info(), "triton": triton.info()}
    names = {"cpu": "C++", "triton": "Triton", "chunked": "chunked torch", "reference": "torch loop"}
    rows = dict(states)
    for name, op in sorted(recurrences().items()):
        served = []
        for device, kernel in (("cpu", "cpu"), ("cuda", "triton")):
            there = kernel in op.implementations and states[kernel].startswith(names[kernel])
            best = kernel if there else "chunked" if "chunked" in op.implementations else "reference"
            served.append(f"{device}: {names[best]}")
        rows[name] = ", ".join(served)
    return rows
