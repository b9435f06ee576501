"""Every counter of operations counts the recurrences of a model."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import linescan
from linescan.errors import InputError
from linescan.flops import flop_handles


def model():
    return linescan.create_model("vim_tiny_patch16_224", depth=2).eval(), torch.randn(1, 3, 64, 64)


def of_recurrences() -> int:
    """What torch's counter counts of `model()` for operators of linescan, in multiply-adds."""
    net, x = model()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net(x)
    return sum(n for op, n in counter.get_flop_counts()["Global"].items() if str(op).startswith("linescan.")) // 2


class Counter(TorchDispatchMode):
    """Goes by operators, as ptflops does."""

    def __init__(self, handles):
        super().__init__()
        self.handles, self.total = handles, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in self.handles:
            self.total += self.handles[func._overloadpacket](args, out)
        return out


def test_counters_that_see_tensors():
    net, x = model()
    with torch.no_grad(), Counter(flop_handles("aten")) as counter:
        net(x)
    assert counter.total == of_recurrences() > 0


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_counters_of_traced_graphs():
    analysis = pytest.importorskip("mmengine.analysis")
    import linescan.openmmlab  # noqa: F401

    net, x = model()
    alone = analysis.FlopAnalyzer(net, x).set_op_handle(**dict.fromkeys(flop_handles(), lambda inputs, outputs: 0))
    found = analysis.FlopAnalyzer(net, x).total() - alone.total()
    assert found == of_recurrences()
    known = analysis.get_model_complexity_info(net, inputs=x, show_table=False, show_arch=False)
    assert known["flops"] == alone.total() + found


def test_an_unknown_kind_of_graph():
    with pytest.raises(InputError, match="graph is one of 'jit', 'aten', not 'onnx'"):
        flop_handles("onnx")
