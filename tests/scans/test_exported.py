"""The forms that graphs of standard operators have, held against the definitions, and kernels in ONNX Runtime.

Whole graphs in ONNX Runtime: tests/backbones and tests/engine.
"""

import subprocess
import sys

import onnx
import onnxruntime
import pytest
import torch
from onnx import helper
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from linescan.scans import backend, exported, recurrence
from linescan.scans.kernels import cpu

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
        loops = [node for node in graph.graph.nodes if str(node.target) == "scan"]
        assert loops and not any(from_outside for *_, from_outside in (node.args for node in loops)), "for OpenVINO"
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


# -- kernels in ONNX Runtime ------------------------------------------------------------------------------------------


def in_onnx_runtime(op, call, threads):
    """What the kernel of a recurrence answers in ONNX Runtime, from a graph of one node."""
    operator, arguments = op.in_graphs
    given = arguments(*call)
    tensors = {key: x for key, x in given.items() if x is None or isinstance(x, torch.Tensor)}
    there = {key: x.numpy() for key, x in tensors.items() if x is not None}
    outputs = ["y", "state"][: 1 + len(op.layout.states)]
    node = helper.make_node(
        operator, [key if key in there else "" for key in tensors], outputs, domain=exported.DOMAIN,
        **{key: x for key, x in given.items() if key not in tensors},
    )  # fmt: skip
    inputs = [
        helper.make_tensor_value_info(key, helper.np_dtype_to_tensor_dtype(x.dtype), [None] * x.ndim)
        for key, x in there.items()
    ]
    outputs = [helper.make_tensor_value_info(key, onnx.TensorProto.FLOAT, None) for key in outputs]
    model = helper.make_model(
        helper.make_graph([node], "call", inputs, outputs),
        opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid(exported.DOMAIN, 1)], ir_version=10,
    )  # fmt: skip
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.register_custom_ops_library(str(cpu.LIBRARY))
    return onnxruntime.InferenceSession(model.SerializeToString(), options).run(None, there)


with_kernels = pytest.mark.skipif(
    cpu.missing() is not None or b"RegisterCustomOps" not in cpu.LIBRARY.read_bytes(),
    reason="no kernels, or a library that is older than its sources",
)
OPS = [op for op in recurrence.recurrences().values() if op.in_graphs is not None]


@with_kernels
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_kernels_in_onnx_runtime_are_those_of_torch(op):
    options = {name: True for name in op.layout.options if name not in op.layout.defaults}
    optional = [name for name, argument in op.layout.arguments.items() if argument.optional]
    for kind, length, threads in (*zip(ROUTES, (7, 7, 12, 7, 5), (1, 2, 1, 2, 1)), ("none", 600, 2)):
        without = optional if length == 7 else ()
        example = op.layout.example(3, 2, length, without=without, dtype=torch.float32, **options) | options
        call = [example.get(name) for name in op.parameters]
        call = op.layout.check(call, None).fill(call)
        route = table(kind, 3, 2, length)
        for merge in (None, "sum"):
            answers = pytree.tree_leaves(op(*call, route=route, merge=merge, return_final_state=True))
            want = [x for x in answers if x is not None]
            got = in_onnx_runtime(op, (*call, None if route is None else route.long(), merge is not None), threads)
            for x, y in zip(got, want, strict=True):
                torch.testing.assert_close(torch.from_numpy(x), y, rtol=0, atol=0)


@with_kernels
def test_a_wrong_table_is_refused_in_onnx_runtime():
    op = recurrence.recurrences()["causal_conv1d"]
    call = [torch.ones(1, 1, 4, 3), torch.ones(1, 3, 2), None, False, None, torch.tensor([[0, 1, 2, 4]]), False]
    with pytest.raises(Exception, match="1 entries of a route table lie outside the 4 tokens"):
        in_onnx_runtime(op, call, 1)


@with_kernels
def test_the_library_may_be_loaded_before_torch_is():
    """As by ONNX Runtime; its operators are then defined when linescan looks for them."""
    code = (
        "import ctypes, sys; ctypes.CDLL(sys.argv[1]); from linescan.scans.kernels import cpu; sys.exit(cpu.missing())"
    )
    done = subprocess.run((sys.executable, "-c", code, cpu.LIBRARY), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]
