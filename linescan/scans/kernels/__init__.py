"""The fast implementations of the recurrences; importing one registers it. `cpu` is C++, compiled at installation."""

from ..recurrence import recurrences
from . import cpu

__all__ = ["backend_info", "cpu"]


def backend_info() -> dict[str, str]:
    """What serves where: the kernels' state and how to get a missing one, then the implementation of every operator.

    Returns:
        Lines by name: "cpu" for the C++ kernels, then one a recurrence ("cpu: C++ kernel, cuda: chunked torch").
    """
    forms = {"cpu": "C++ kernel", "triton": "Triton kernel", "chunked": "chunked torch", "reference": "torch loop"}
    rows = {"cpu": cpu.info()}
    for name, op in sorted(recurrences().items()):
        served = []
        for device, kernel in (("cpu", "cpu"), ("cuda", "triton")):
            there = kernel in op.implementations and (kernel != "cpu" or cpu.missing() is None)
            best = kernel if there else "chunked" if "chunked" in op.implementations else "reference"
            served.append(f"{device}: {forms[best]}")
        rows[name] = ", ".join(served)
    return rows
