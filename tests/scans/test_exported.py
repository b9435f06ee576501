"""The forms that graphs of standard operators have, held against the definitions; in ONNX Runtime: tests/backbones."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from linescan.scans import backend, exported, recurrence

from .tools import RECURRENT, ROUTES, bits, case, table


@pytest.fixture
def exporting(monkeypatch):
    """Recurrences take themselves for traced by `torch.onnx.export`; nothing need trace them."""
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    monkeypatch.setattr(recurrence, "is_plain", lambda inputs: False)


@pytest.mark.parametrize("case", RECURRENT, ids=str)
def test_exported_forms_are_the_definition(case, exporting):
    for kind, length in (*zip(ROUTES, (7, 7, 12, 7, 1)), ("none", 3), ("padded", 9)):
        inputs, route = case.make(length=length), table(kind, 2, 2, length)
        for merge in (None, "sum"):
            got = case(inputs, route, merge)
            with pytest.MonkeyPatch.context() as eager, backend("reference"):
                eager.setattr(torch.onnx, "is_in_onnx_export", lambda: False)
                want = case(inputs, route, merge)
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["selective_scan", "gla", "ssd", "bi_wkv", "wkv6", "ttt_linear_fla"])
def test_the_graph_does_not_grow_with_the_length(name, exporting):
    def nodes(length):
        inputs = case(name).make(length=length)
        trace = make_fx(lambda *tensors: case(name)(dict(zip(inputs, tensors))), tracing_mode="fake")
        graph = trace(*inputs.values())
        assert not [node for node in graph.graph.nodes if str(node.target).startswith("linescan.")]
        return sum(len(module.graph.nodes) for module in graph.modules() if hasattr(module, "graph"))

    assert nodes(24) == nodes(240)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["selective_scan", "ssd", "gla", "wkv6", "delta_rule", "bi_wkv"])
def test_states_are_float32_in_half_precision(name, dtype, exporting):
    inputs = bits(case(name).make(length=200), dtype)
    (output, *states), (want, *want_states) = (
        pytree.tree_leaves(case(name)(given)) for given in (inputs, bits(inputs, torch.float64))
    )
    assert output.dtype == dtype and {state.dtype for state in states} <= {torch.float32}
    torch.testing.assert_close(output, want.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-5)
    for state, exact in zip(states, want_states, strict=True):
        torch.testing.assert_close(state, exact.float(), rtol=1e-4, atol=1e-5)


def test_a_loop_goes_both_ways():
    x = torch.arange(1.0, 8).view(1, 1, 7, 1)

    def body(states, tokens, others):  # puts out what came before
        sums = [states[0]]
        for token in tokens[0].unbind(2):
            sums.append(sums[-1] + others[0] * token)
        return sums[-1:], [torch.stack(sums[:-1], 2)]

    zero, one = torch.zeros(1, 1, 1), torch.ones(1)
    for reverse, want in ((False, [0, 1, 3, 6, 10, 15, 21]), (True, [27, 25, 22, 18, 13, 7, 0])):
        (last,), (y,) = exported.loop(body, [zero], [x], [one], size=3, reverse=reverse)
        assert y.flatten().tolist() == want and last.item() == 28
