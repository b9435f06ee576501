"""The private functions of other packages that linescan uses do what linescan takes them for."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nn.modules.module import register_module_forward_hook
from torch.utils import _pytree as pytree

from linescan import _compat
from linescan.scans.kernels import cpu


def seen_by(function) -> set[str]:
    """Where `function` returns True, of eager mode and everything that may see a call."""
    found = set()

    def call(how):
        if function():
            found.add(how)
        return True

    call("eager")
    with FakeTensorMode():
        call("dispatch mode")
    torch.func.grad(lambda x: call("grad") and x.sum())(torch.ones(2))
    torch.vmap(lambda x: call("vmap") and x.sum())(torch.ones(2, 2))
    with torch.autograd.forward_ad.dual_level():
        call("forward mode")
    make_fx(lambda x: call("make_fx") and x + 1)(torch.ones(2))
    torch.jit.trace(lambda x: call("jit") and x + 1, torch.ones(2), check_trace=False)
    return found


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_who_sees_a_call():
    assert seen_by(_compat.is_watched) == {"dispatch mode", "grad", "vmap", "forward mode", "make_fx", "jit"}
    assert seen_by(_compat.is_transformed) == {"grad", "vmap", "forward mode"}
    assert seen_by(_compat.dispatch_modes_active) == {"dispatch mode", "make_fx"}
    assert seen_by(_compat.is_jit_tracing) == {"jit"}

    def still_seen():
        with _compat.unwatched():
            return _compat.dispatch_modes_active() or _compat.is_jit_tracing()

    assert seen_by(still_seen) == set()


def test_a_compiled_call_is_watched():
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: x + 1 if _compat.is_watched() else x, fullgraph=True, backend="eager")
    assert compiled(torch.zeros(2)).sum() == 2


def test_an_operator_differentiates_above_autograd():
    def slope(x: torch.Tensor) -> torch.Tensor:
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            return torch.autograd.grad((x * x).sum(), x)[0]

    operator = torch.library.custom_op("linescan_tests::slope", _compat.above_autograd(slope), mutates_args=())
    operator.register_autograd(lambda ctx, grad: grad * 2)
    assert operator(torch.full((1,), 3.0, requires_grad=True)).item() == 6


def test_sizes_without_a_number_are_symbols():
    assert not _compat.is_symbol(3)
    function = lambda x: x + 1 if _compat.is_symbol(x.shape[0]) else x - 1  # noqa: E731
    for dynamic, value in ((False, -1), (True, 1)):
        torch._dynamo.reset()
        assert (
            torch.compile(function, fullgraph=True, backend="eager", dynamic=dynamic)(torch.zeros(3)) == value
        ).all()


@pytest.mark.filterwarnings("error::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_sizes_are_plain_while_a_trace_is_recorded():
    def function(x):
        assert type(_compat.plain_shape(x)[0]) is int
        with _compat.unwatched():
            assert type(x.shape[0]) is int and torch.ones(3).numpy().sum() == 3
        return x + _compat.plain_shape(x)[0]

    traced = torch.jit.trace(function, torch.zeros(3), check_trace=False)
    assert traced(torch.zeros(5)).tolist() == [3] * 5  # a constant of the trace
    assert _compat.plain_shape(torch.zeros(3)) == (3,)


def test_inside_unwatched_tensors_are_plain():
    with FakeTensorMode():
        assert type(torch.ones(2)) is not torch.Tensor
        with _compat.unwatched():
            assert torch.ones(2).tolist() == [1, 1]
        assert type(torch.ones(2)) is not torch.Tensor

    def function(x):
        with _compat.unwatched():
            plain = torch.arange(3)
            assert plain.numpy().tolist() == [0, 1, 2]
        return (x * plain).sum()

    assert torch.func.grad(function)(torch.ones(3)).tolist() == [0, 1, 2]


def test_sizes_that_are_not_known_are_not_known_to_be_equal():
    assert _compat.known_equal(3, 3) and not _compat.known_equal(3, 4)
    function = lambda x: x + 1 if _compat.known_equal(*x.shape) else x - 1  # noqa: E731
    for dynamic, square in ((False, 1), (True, -1)):
        torch._dynamo.reset()
        compiled = torch.compile(function, fullgraph=True, backend="eager", dynamic=dynamic)
        assert (compiled(torch.zeros(3, 4)) == -1).all() and (compiled(torch.zeros(5, 5)) == square).all()


def test_the_sizes_of_an_example_are_known_while_it_is_traced():
    seen = []

    class Looks(nn.Module):
        def forward(self, x):
            seen.append((type(x.shape[0]), *map(_compat.example_size, x.shape)))
            return x + 1

    torch.export.export(Looks(), (torch.zeros(3, 4),), dynamic_shapes=({0: torch.export.Dim("n")},), strict=False)
    assert (torch.SymInt, 3, 4) in seen


def test_argument_names():
    assert _compat.argument_names(torch.ops.aten.addcmul.default) == ["self", "tensor1", "tensor2", "value"]
    if cpu.missing() is None:
        assert _compat.argument_names(torch.ops.linescan_cpu.causal_conv1d.default)[:2] == ["x", "weight"]


def test_linear_pointwise():
    linear = _compat.linear_pointwise()
    if linear is None:
        pytest.skip("torch is built without oneDNN")
    x, weight, bias = torch.randn(4, 3), torch.randn(5, 3), torch.randn(5)
    torch.testing.assert_close(linear(x, weight, bias), F.linear(x, weight, bias))
    torch.testing.assert_close(linear(x, weight, None), F.linear(x, weight))


def test_hooks_and_own_forwards_are_seen():
    layer = nn.Linear(2, 2)
    assert not _compat.is_observed(layer)
    for register in (
        layer.register_forward_hook,
        layer.register_forward_pre_hook,
        layer.register_full_backward_hook,
        layer.register_full_backward_pre_hook,
        register_module_forward_hook,
    ):
        handle = register(lambda *args: None)
        assert _compat.is_observed(layer), register.__name__
        handle.remove()
        assert not _compat.is_observed(layer)
    layer.forward = lambda x: torch.zeros(1)
    assert _compat.is_observed(layer)


def test_a_flop_counter_of_mmengine_takes_the_handles():
    analysis = pytest.importorskip("mmengine.analysis")
    handles = _compat.mmengine_flop_handles()
    assert "aten::linear" in handles
    handles["linescan::of_this_test"] = lambda inputs, outputs: 1
    try:
        assert "linescan::of_this_test" in analysis.FlopAnalyzer(nn.Linear(2, 2), torch.ones(1, 2))._op_handles
    finally:
        del handles["linescan::of_this_test"]


class Parts(nn.Module):
    """Of what ONNX has no right translation for: two results, a list of one, one in place, one inside another."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.enable_grad():
            y = F.rms_norm(self.norm(self.conv(x.chunk(1, 1)[0])).relu_(), (6,))
        variance, mean = torch.var_mean(y, (2, 3))
        return variance + mean.double(), torch.rsub(y.movedim(1, -1), 1)


class Entangled(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.clone()
        y[:, 0] += 1
        return y


def test_an_onnx_export_takes_apart_what_it_must(monkeypatch, tmp_path):
    from onnx_ir.schemas import OpSignature
    from torch._export.passes import replace_set_grad_with_hop_pass as grad_mode
    from torch.onnx._internal.exporter import _fx_passes

    torch.manual_seed(0)
    shapes, path = ({0: torch.export.Dim("batch", min=1)},), tmp_path / "model.onnx"
    patched = _fx_passes, grad_mode, torch.fx.proxy, torch.fx.GraphModule, OpSignature
    before = [dict(vars(owner)) for owner in patched]

    def same(network):
        with torch.no_grad():
            with _compat.quick_onnx_export():
                options = {"dynamo": True, "dynamic_shapes": shapes, "optimize": False, "verbose": False}
                program = torch.onnx.export(network.eval(), (torch.rand(2, 2, 8, 8),), **options)
            for batch in (1, 3):
                x = torch.rand(batch, 2, 8, 8)
                want = tuple(pytree.tree_leaves(network(x)))
                torch.testing.assert_close(tuple(program(x)), want, check_dtype=True)
                torch.testing.assert_close(tuple(pytree.tree_leaves(program.exported_program.module()(x))), want)
        program.save(path)
        assert str(Path(__file__).parent).encode() not in path.read_bytes(), "the file tells of this machine"

    whole = torch.export.ExportedProgram.run_decompositions
    with monkeypatch.context() as patch:
        patch.delattr(torch.export.ExportedProgram, "run_decompositions")
        same(Parts())
    calls = []
    monkeypatch.setattr(
        torch.export.ExportedProgram, "run_decompositions", lambda *given: calls.append(1) or whole(*given)
    )
    same(Entangled())
    assert calls == [1] and [dict(vars(owner)) for owner in patched] == before


def test_graphs_that_an_onnx_export_makes_can_be_called():
    x = torch.rand(3)
    with _compat.quick_onnx_export():
        now, later = make_fx(torch.sin)(x), make_fx(torch.cos)(x)
        assert torch.equal(now(x), x.sin())
    assert torch.equal(later(x), x.cos()) and torch.equal(now(x), x.sin())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_onnx_export_knows_the_sizes_of_norms(dtype):
    """Those that torch finds, by taking norms apart, where sizes are symbols."""
    aten = torch.ops.aten

    def sizes():
        mode = FakeTensorMode(shape_env=ShapeEnv())  # another each time: it remembers what it has found
        x, weight = (mode.from_tensor(torch.rand(*shape, dtype=dtype)) for shape in ((2, 6, 4, 5), (6,)))
        with mode:
            norms = [
                aten._native_batch_norm_legit_no_training(x, weight, weight, weight, weight, 0.1, 1e-5),
                aten._native_batch_norm_legit_no_training(x, None, None, weight, weight, 0.1, 1e-5),
                aten.native_layer_norm(x.permute(0, 2, 3, 1), weight.shape, weight, weight, 1e-5),
                aten.native_layer_norm(x, x.shape[2:], None, None, 1e-5),
            ]
            return [[(y.dtype, *map(str, y.shape)) for y in norm] for norm in norms]

    want = sizes()
    with _compat.quick_onnx_export():
        assert sizes() == want
