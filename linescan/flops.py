"""Multiply-adds of recurrences for counters that do not know them.

`torch.utils.flop_counter` counts the recurrences by itself. Others take handles:

    FlopCountAnalysis(model, x).set_op_handle(**flop_handles())       # fvcore; FlopAnalyzer of mmengine the same
    get_model_complexity_info(                                        # ptflops
        model, (3, 224, 224), backend="aten", custom_modules_hooks=flop_handles("aten")
    )

`linescan.openmmlab` registers them, so that the `get_flops.py` of OpenMMLab's tools counts all of a model.
"""

from collections.abc import Callable

import torch

from .errors import known
from .scans import recurrences

__all__ = ["flop_handles"]


def flop_handles(graph: str = "jit") -> dict:
    """A function (inputs, outputs) -> multiply-adds for every recurrence.

    Args:
        graph: "jit" for counters of traced graphs (fvcore, mmengine), keyed by names such as "linescan::gla"; "aten"
            for those that see tensors (ptflops), keyed by operators.
    """
    in_graph = known("graph", graph, ("jit", "aten")) == "jit"
    shape = _shape_in_graph if in_graph else _shape
    return {
        f"linescan::{name}" if in_graph else getattr(torch.ops.linescan, name): _handle(x.layout, shape)
        for name, x in recurrences().items()
        if x.layout.counts
    }


def _handle(layout, shape: Callable) -> Callable:
    def handle(inputs, outputs) -> int:
        *given, route, _, _, _ = map(shape, inputs)  # after the route: whether to merge, the form, and S - L
        return layout.flops(given, route) // 2

    return handle


def _shape(value):
    return value.shape if isinstance(value, torch.Tensor) else value


def _shape_in_graph(value):
    """The shape of a tensor of a graph of `torch.jit.trace`, or the constant that it is."""
    if isinstance(value.type(), torch.TensorType):
        return value.type().sizes()
    return value.toIValue()
