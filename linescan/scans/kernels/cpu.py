"""The C++ kernels in `cpu/`: the selective scan, the causal convolution and matrix states on a CPU, each one operator.

`setup.py` compiles them into `_cpu.so`, which needs nothing of Python and of torch only the stable C interface
(torch >= 2.10). Here it is loaded, and its operators `linescan_cpu::*` become the implementations named "cpu". Without
the library the chunked torch form serves, and the first call that the kernel would have taken says so. Neighbourhood
attention, which is no recurrence, has a kernel too, for inference.

The environment variable LINESCAN_CPU_KERNELS caps the instruction set ("avx512", "avx2", "baseline") or turns the
kernels off ("off").
"""

import ctypes
import logging
import os
from functools import partial
from math import inf
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._compat import argument_names
from ..gates import GATES, STEEPEST, Kernel
from ..ops.causal_conv import _causal_conv1d
from ..ops.delta import _gated_delta_rule
from ..ops.dplr import _dplr
from ..ops.gla import _gla, _simple_gla
from ..ops.hgrn import _hgrn
from ..ops.linear_attention import _linear_attention
from ..ops.selective_scan import _selective_scan, narrow, widen
from ..ops.ssd import _ssd, _step_sizes
from ..ops.wkv4 import _bi_wkv, _wkv4
from ..ops.wkv6 import _wkv6
from ..recurrence import Recurrence
from ..visits import visited

LIBRARY = Path(__file__).with_name("_cpu.so")
VERSION = 2  # of the library's operators
LANES = {"avx512": 16, "avx2": 8, "baseline": 4}  # floats in a vector
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_SERVED = {*_DTYPES, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8}  # tokens, and tables of routes
_SETTING = "LINESCAN_CPU_KERNELS"

_log = logging.getLogger("linescan")
_missing: str | None = None  # why the kernels cannot serve
_said = False


def _load() -> str | None:
    """Loads the library; returns what stands in the way, if anything does."""
    setting = os.environ.get(_SETTING, "")
    if setting not in ("", "off", *LANES):
        raise ValueError(f"{_SETTING} is one of off, {', '.join(LANES)}; got {setting!r}")
    if setting == "off":
        return f"turned off by {_SETTING}=off"
    if not LIBRARY.exists():
        return "not compiled; install a C++ compiler (g++ or clang++) and run `pip install` of linescan again"
    try:
        torch.ops.load_library(LIBRARY)
    except OSError as error:
        return f"not loadable ({error.__cause__ or error}); run `pip install` of linescan again"
    operators = torch.ops.linescan_cpu
    if not hasattr(operators, "selective_scan"):  # ONNX Runtime may have loaded the library before torch was there
        getattr(ctypes.CDLL(str(LIBRARY)), "linescan_define_operators", lambda: None)()
    if not hasattr(operators, "selective_scan"):
        return f"made for torch >= 2.10, this is {torch.__version__}"
    if not hasattr(operators, "version") or operators.version() != VERSION:
        return "compiled from other sources than these; run `pip install` of linescan again"
    if setting:
        instruction_set(setting)
    return None


def instruction_set(most: str = "") -> str:
    """The instruction set in use, after taking the best one up to `most` ("avx512", "avx2", "baseline") if given."""
    lanes = torch.ops.linescan_cpu.instruction_set(LANES.get(most, 0))
    return next(name for name, count in LANES.items() if count == lanes)


def missing() -> str | None:
    """Why the kernels cannot serve and what to do about it; None if they can."""
    return _missing


def info() -> str:
    """The kernels' state in a line."""
    return f"C++, {instruction_set()}" if _missing is None else f"chunked torch serves; the kernels are {_missing}"


def _in_graphs(op: Recurrence, operator: str, call=lambda *args: args) -> None:
    """Lets graphs of ONNX call the kernel `operator`, with the arguments call(*inputs, route, merge)."""
    if _missing is not None:
        return
    names = argument_names(getattr(torch.ops.linescan_cpu, operator).default)
    op.in_graphs = operator, lambda *args: dict(zip(names, call(*args)))


# -- what all operators share -----------------------------------------------------------------------------------------


def _unfit(args) -> Tensor | None:
    """The first argument that no kernel takes."""
    for x in args:
        if isinstance(x, Tensor) and not (x.is_cpu and x.dtype in _SERVED and x.numel()):
            return x
    return None


def _supports(*args) -> bool:
    """Whether the kernel serves a call; says once if it would, were it there."""
    global _said
    if _unfit(args) is not None:
        return False
    if _missing is not None and not _said:
        _said = True
        _log.warning("linescan: the CPU kernels are %s. The slower torch form serves instead.", _missing)
    return _missing is None


def _alike(*tensors) -> bool:
    """Whether all are of one dtype, float32 or half precision; None is no tensor."""
    dtype = tensors[0].dtype
    return dtype in _DTYPES and all(x is None or x.dtype is dtype for x in tensors)


def _check(op: Recurrence, *args) -> None:
    """For calls that ask for the kernel by name."""
    if _missing is not None:
        raise RuntimeError(f"{op.name}: the CPU kernels are {_missing}")
    x = _unfit(args)
    if x is not None:
        raise ValueError(
            f"{op.name}: the cpu kernel takes non-empty float32, bfloat16 or float16 tensors on the CPU, "
            f"got {str(x.dtype)[6:]} {tuple(x.shape)} on {x.device}"
        )


def _rows(x: Tensor | None) -> Tensor | None:
    """Tokens as the kernels read them: any strides, but for channels that stand next to each other."""
    return x if x is None or x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _parameter(x: Tensor | None) -> Tensor | None:
    if x is None or not x.numel():  # the state of a convolution of one tap has no numbers
        return None
    return x if x.dtype is torch.float32 and x.is_contiguous() else x.float().contiguous()


def _table(route: Tensor | None) -> Tensor | None:
    return route if route is None else (route if route.dtype is torch.int64 else route.int()).contiguous()


def _output(x: Tensor, routes: int, merge: bool) -> Tensor:
    """Room for the output: float32 where routes are summed in it."""
    batch, _, length, channels = x.shape
    shape = (batch, length, channels) if merge else (batch, routes, length, channels)
    return x.new_empty(shape, dtype=torch.float32 if merge else None)


def _like(x: Tensor | None, new=torch.empty_like) -> Tensor | None:
    """Room for a gradient."""
    return None if x is None else new(x, dtype=torch.float32, memory_format=torch.contiguous_format)


def _run(kernel, inputs, ready, *others) -> None:
    """Runs a kernel on the inputs as they stand or, where it refuses them, on `ready(*inputs)`."""
    if not kernel(*inputs, *others):
        kernel(*ready(*inputs), *others)


def _finish(grads, inputs) -> list[Tensor]:
    """Gradients of the inputs that are there, in their dtypes."""
    pairs = zip(grads, inputs)
    return [grad if x.dtype is torch.float32 else grad.to(x.dtype) for grad, x in pairs if x is not None]


def _register(op: Recurrence, forward, backward, room=None) -> None:
    op.register("cpu", forward, backward, _supports, partial(_check, op), kernel=True, room=room)


# -- selective scan ---------------------------------------------------------------------------------------------------


def _scan_inputs(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, delta_weight, route, merge):
    u, delta, B, C, z = map(_rows, (u, delta, B, C, z))
    A, D, delta_bias, state, weight = map(_parameter, (A, D, delta_bias, initial_state, delta_weight))
    return u, delta, A, B, C, D, z, delta_bias, delta_softplus, state, weight, _table(route), merge


def _scan_room(u, delta, A, B, *others):
    """For the states (B, K, segments - 1, D, N) that segments of time but the first start from."""
    *_, route, _ = others
    (batch, _, length, channels), (routes, _, states) = u.shape, A.shape
    steps, groups = length if route is None else route.shape[-1], B.shape[3] if B.ndim == 5 else 1
    segment = torch.ops.linescan_cpu.selective_scan_segment.default(batch, channels, groups, steps, states)
    return [u.new_empty((batch, routes, (steps - 1) // segment, channels, states), dtype=torch.float32)]


def _scan_forward(*args, kept=()):
    u, A, merge = args[0], args[2], args[-1]
    y = _output(u, A.shape[0], merge)
    state = A.new_empty((u.shape[0], *A.shape), dtype=torch.float32)
    _run(torch.ops.linescan_cpu.selective_scan.default, args, _scan_inputs, y, state, *(kept or [None]))
    return y if y.dtype is u.dtype else y.to(u.dtype), state


def _scan_backward(grad_output, grad_state, *args, kept):
    *inputs, route, merge = args
    low_rank = inputs[-1] is not None
    wide = widen(*inputs) if low_rank else inputs[:-1]
    u, delta, A, B, C, D, z, delta_bias, _, initial_state = wide
    du, ddelta, dA, dD, dz, dbias, dinitial = map(_like, (u, delta, A, D, z, delta_bias, initial_state))
    dB, dC = _like(B, torch.zeros_like), _like(C, torch.zeros_like)
    grads = (du, ddelta, dA, dB, dC, dD, dz, dbias, dinitial)
    call = *wide, None, route, merge
    if not kept:  # in a graph
        kept = _scan_room(*call)
        _run(torch.ops.linescan_cpu.selective_scan.default, call, _scan_inputs, None, None, *kept)
    others = _rows(grad_output), _parameter(grad_state), *map(_parameter, kept), *grads
    _run(torch.ops.linescan_cpu.selective_scan_backward.default, call, _scan_inputs, *others)
    grads = _finish(grads, (u, delta, A, B, C, D, z, delta_bias, initial_state))
    return narrow(grads, *inputs) if low_rank else grads


# -- causal convolution -----------------------------------------------------------------------------------------------


def _conv_inputs(x, weight, bias, silu, initial_state, route, merge):
    weight, bias, initial_state = map(_parameter, (weight, bias, initial_state))
    return _rows(x), weight, bias, silu, initial_state, _table(route), merge


def _conv_forward(*args):
    x, weight, *_, merge = args
    y = _output(x, weight.shape[0], merge)
    shape = x.shape[0], *weight.shape[:2], weight.shape[-1] - 1
    state = weight.new_empty(shape, dtype=torch.float32)
    _run(torch.ops.linescan_cpu.causal_conv1d.default, args, _conv_inputs, y, state)
    return y if y.dtype is x.dtype else y.to(x.dtype), state


def _conv_backward(grad_output, grad_state, *args):
    x, weight, bias, _, initial_state, *_ = args
    grads = tuple(map(_like, (x, weight, bias, initial_state)))
    others = _rows(grad_output), _parameter(grad_state), *grads
    _run(torch.ops.linescan_cpu.causal_conv1d_backward.default, args, _conv_inputs, *others)
    return _finish(grads, (x, weight, bias, initial_state))


# -- matrix states ----------------------------------------------------------------------------------------------------

GATED, LATE, DELTA, LOW_RANK = range(4)  # the rules of matrix_scan.h
_OF_TOKENS = ("q", "k", "v", "a", "b", "gate", "beta")
_OF_HEADS = ("bonus", "skip", "idle")


def _matrix_inputs(rule, *inputs):
    rows, (gate, beta), parameters = map(_rows, inputs[:5]), inputs[5:7], map(_parameter, inputs[7:10])
    scale, normalize, initial_state, route, merge = inputs[10:]
    gate = gate if gate is None or gate.ndim == 4 else _rows(gate)
    return rule, *rows, gate, beta, *parameters, scale, normalize, _parameter(initial_state), _table(route), merge


def _matrix_call(rule, given, route, merge):
    """The kernel's arguments from those that are there, by name."""
    inputs = map(given.get, (*_OF_TOKENS, *_OF_HEADS))
    scale, normalize, initial_state = given.get("scale", 1.0), given.get("normalize", False), given["initial_state"]
    return rule, *inputs, scale, normalize, initial_state, route, merge


def _matrix_room(rule, given, route):
    """For what a forward leaves to its backward.

    The states (B, K, H, pieces - 1, N, M), normalised M + 1, that pieces of time but the first start from; and of rules
    whose writes depend on reads what they wrote, (B, K, H, S, M), filled up to whole pieces and whole vectors.
    """
    tokens = [given[name] for name in _OF_TOKENS if given.get(name) is not None]
    (batch, routes, length), (heads, values) = visited(tokens, route), given["v"].shape[3:]
    keys, steps = given["q"].shape[4], length if route is None else route.shape[-1]
    piece = torch.ops.linescan_cpu.matrix_scan_piece.default(keys, values, steps)
    pieces, widest = -(-steps // piece), LANES["avx512"]
    written = (pieces * piece, -(-values // widest) * widest) if rule in (DELTA, LOW_RANK) else (0, 0)
    sizes = (pieces - 1, keys, values + given.get("normalize", False)), written
    return [tokens[0].new_empty((batch, routes, heads, *size), dtype=torch.float32) for size in sizes]


def _matrix_forward(rule, given, route, merge, y, state, kept=()):
    """Fills y and the final state, unless they are None, and what is kept."""
    call = _matrix_call(rule, given, route, merge)
    _run(torch.ops.linescan_cpu.matrix_scan.default, call, _matrix_inputs, y, state, *(kept or [None, None]))


def _matrix_backward(rule, given, route, merge, grad_output, grad_state, kept) -> dict[str, Tensor]:
    """Gradients, in float32, of the tensors among `given` by name; of q and k one for every head of v."""
    if not kept:  # in a graph
        kept = _matrix_room(rule, given, route)
        _matrix_forward(rule, given, route, merge, None, None, kept)
    heads = given["v"].shape[3]
    grads = {name: _like(x) for name, x in given.items() if isinstance(x, Tensor)}
    for name in ("q", "k"):
        if given[name].shape[3] != heads:
            batch, routes, length, _, keys = given[name].shape
            grads[name] = grads[name].new_empty(batch, routes, length, heads, keys)
    names = (*_OF_TOKENS, *_OF_HEADS, "initial_state")
    others = _rows(grad_output), _parameter(grad_state), *map(_parameter, kept), *map(grads.get, names)
    call = _matrix_call(rule, given, route, merge)
    _run(torch.ops.linescan_cpu.matrix_scan_backward.default, call, _matrix_inputs, *others)
    return grads


def _register_matrix(op: Recurrence, rule: int, names: str) -> None:
    """Registers the kernel for a recurrence, whose inputs have those `names` here."""
    keys = names.split()

    def forward(*args, kept=()):
        *inputs, route, merge = args
        y, state = op.new_outputs(*args)
        sums = y.float() if merge else y
        _matrix_forward(rule, dict(zip(keys, inputs)), route, merge, sums, state, kept)
        return sums.to(y.dtype), state

    def backward(grad_output, grad_state, *args, kept):
        *inputs, route, merge = args
        given = dict(zip(keys, inputs))
        grads = _matrix_backward(rule, given, route, merge, grad_output, grad_state, kept)
        return _finish(*zip(*((grads[key], x) for key, x in given.items() if isinstance(x, Tensor))))

    def room(*args):
        return _matrix_room(rule, dict(zip(keys, args)), args[-2])

    _register(op, forward, backward, room)
    _in_graphs(op, "matrix_scan", lambda *args: _matrix_call(rule, dict(zip(keys, args[:-2])), *args[-2:]))


def _ssd_gates(dt, A, dt_bias, dt_softplus, dt_min, dt_max):
    """Log decays (B, K, L, H) and step sizes (B, K or 1, L, H), and the log decays (K, H) of a padding token."""
    dt, limits = dt.float(), (dt_softplus, dt_min, dt_max)
    step, idle = (_step_sizes(x, dt_bias, *limits) for x in (dt, dt.new_zeros(1, 1, 1, 1)))
    return A[:, None] * step, step, (A[:, None] * idle)[0, :, 0]


def _of_ssd_gates(grads, step, dt, A, dt_bias, dt_softplus, dt_min, dt_max):
    """Gradients of dt, A and dt_bias, from those of what `_ssd_gates` makes of them; autograd would take longer."""

    def of_raw(grad, x):  # from a step size to what its softplus is taken of
        x = x.float() if dt_bias is None else x.float() + dt_bias[:, None]
        if dt_min > 0 or dt_max < inf or not dt_softplus:
            free = F.softplus(x) if dt_softplus else x
            grad = grad * ((free >= dt_min) & (free <= dt_max))
        return torch.ops.aten.softplus_backward(grad, x, 1, 20) if dt_softplus else grad

    gate, idle, A = grads["gate"], grads["idle"][None, :, None], A[:, None]
    nothing = dt.new_zeros(1, 1, 1, 1)
    idle_step = _step_sizes(nothing.float(), dt_bias, dt_softplus, dt_min, dt_max)
    of_A = (gate * step).sum((0, 2)) + (idle * idle_step)[0, :, 0]
    of_dt = of_raw(grads["beta"] + (A * gate).sum_to_size(step.shape), dt)
    of_bias = None
    if dt_bias is not None:
        of_bias = of_dt.sum((0, 2)) + of_raw(A * idle, nothing)[0, :, 0]
    return of_dt.sum_to_size(dt.shape), of_A, of_bias


def _ssd_given(x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_min, dt_max, initial_state):
    gate, step, idle = _ssd_gates(dt, A, dt_bias, dt_softplus, dt_min, dt_max)
    return {"q": C, "k": B, "v": x, "gate": gate, "beta": step, "skip": D, "idle": idle, "initial_state": initial_state}


def _gated(y: Tensor, z: Tensor, merge: bool) -> Tensor:
    y = y * F.silu(z.float())
    return y.sum(1) if merge else y


def _ssd_room(x, dt, A, B, C, D, z, *others):
    """Nothing where outputs are gated: the backward makes them again, and all that it needs with them."""
    return [] if z is not None else _matrix_room(GATED, {"q": C, "k": B, "v": x, "beta": dt}, others[-2])


def _ssd_forward(*args, kept=()):
    *inputs, route, merge = args
    z = inputs[6]
    y, state = _ssd.new_outputs(*inputs, route, merge and z is None)
    sums = y.float() if merge or z is not None else y
    _matrix_forward(GATED, _ssd_given(*inputs), route, merge and z is None, sums, state, kept)
    return (sums if z is None else _gated(sums, z, merge)).to(y.dtype), state


def _ssd_backward(grad_output, grad_state, *args, kept):
    *inputs, route, merge = args
    x, dt, A, B, C, D, z, dt_bias, *limits, initial_state = inputs
    given, of_z = _ssd_given(*inputs), None
    if z is not None:  # the outputs before their gate are made again
        y, state = _ssd.new_outputs(*inputs, route, False)
        y, kept = y.float(), _matrix_room(GATED, given, route)
        _matrix_forward(GATED, given, route, False, y, state, kept)
        with torch.enable_grad():
            before, gate = (t.detach().float().requires_grad_() for t in (y, z))
            grad_output, of_z = torch.autograd.grad(_gated(before, gate, merge), (before, gate), grad_output.float())
    grads = _matrix_backward(GATED, given, route, merge and z is None, grad_output, grad_state, kept)
    of_dt, of_A, of_bias = _of_ssd_gates(grads, given["beta"], dt, A, dt_bias, *limits)
    of_B, of_C = (
        grads[name] if grads[name].shape == y.shape else grads[name].unflatten(3, (y.shape[3], -1)).sum(4)
        for name, y in (("k", B), ("q", C))
    )
    made = (grads["v"], of_dt, of_A, of_B, of_C, grads.get("skip"), of_z, of_bias, grads.get("initial_state"))
    return _finish(made, (x, dt, A, B, C, D, z, dt_bias, initial_state))


# -- vector states ----------------------------------------------------------------------------------------------------

SUM, WKV, WKV_BOTH = range(3)  # the rules of vector_scan.h


def _vector_inputs(rule, x, g, w, u, initial_state, route, merge):
    w, u, initial_state = map(_parameter, (w, u, initial_state))
    return rule, _rows(x), _rows(g), w, u, initial_state, _table(route), merge


def _register_vector(op: Recurrence, rule: int, names: str) -> None:
    """Registers the kernel for a recurrence, whose inputs have those `names` here."""
    keys = names.split()

    def call(*args):
        *inputs, route, merge = args
        given = dict(zip(keys, inputs))
        return rule, *map(given.get, ("x", "g", "w", "u", "initial_state")), route, merge

    def forward(*args):
        y, state = op.new_outputs(*args)
        sums = y.float() if args[-1] else y
        _run(torch.ops.linescan_cpu.vector_scan.default, call(*args), _vector_inputs, sums, state)
        return sums.to(y.dtype), state

    def backward(grad_output, grad_state, *args):
        inputs = call(*args)
        grads = [_like(x) for x in inputs[1:6]]
        others = _rows(grad_output), _parameter(grad_state), *grads
        _run(torch.ops.linescan_cpu.vector_scan_backward.default, inputs, _vector_inputs, *others)
        return _finish(grads, inputs[1:6])

    _register(op, forward, backward)
    _in_graphs(op, "vector_scan", call)


# -- neighbourhood attention ------------------------------------------------------------------------------------------


def _map_inputs(q, k, v, bias, *others):
    return *map(_rows, (q, k, v)), _parameter(bias), *others


def neighborhood_attention(q, k, v, window, dilation, bias, scale) -> Tensor | None:
    """`linescan.layers.neighborhood`'s, of checked arguments, without gradients; None where no kernel serves."""
    if not (_alike(q, k, v) and _supports(q, k, v, bias)):
        return None
    y = v.new_empty(v.shape)
    inputs = *(x.flatten(1, 2) for x in (q, k, v)), bias, q.shape[2], *window, *dilation, scale
    _run(torch.ops.linescan_cpu.neighborhood_attention.default, inputs, _map_inputs, y.flatten(1, 2))
    return y


# -- merging routes ---------------------------------------------------------------------------------------------------


def _merges(*tensors) -> bool:
    """Whether the kernels that merge routes serve: channels in whole vectors of any width."""
    return tensors[0].shape[-1] % 16 == 0 and _supports(*tensors)


def channel_gates(y, norm, reduce, expand) -> Tensor | None:
    """The gates of `ChannelAttention`, whose layers are given, of outputs y (B, K, L, D): float32 (B, K, D).

    No gradients; None where no kernel serves.
    """
    layers = [x for layer in (norm, reduce, expand) for x in (layer.weight, layer.bias)]
    if not _merges(y, *layers):
        return None
    out = y.new_empty(*y.shape[:2], y.shape[3], dtype=torch.float32)
    of_norm, others = map(_parameter, layers[:2]), map(_parameter, layers[2:])
    torch.ops.linescan_cpu.channel_gates.default(_rows(y), *of_norm, norm.eps, *others, out)
    return out


def weighted_sum(y, weight) -> Tensor | None:
    """y (B, K, L, D) times weight (B or 1, K, D), summed over routes (B, L, D), likewise."""
    if not _merges(y, weight):
        return None
    out = y.new_empty(y.shape[0], *y.shape[2:])
    weight = weight if len(weight) == len(y) else weight.expand(len(y), -1, -1)
    torch.ops.linescan_cpu.weighted_sum.default(_rows(y), _parameter(weight), out)
    return out


# -- between products and recurrences ---------------------------------------------------------------------------------


def _are_floats(*tensors) -> bool:
    """Whether all are float32, here, and of any numbers; None is no tensor."""
    for x in tensors:
        if x is not None and not (x.dtype is torch.float32 and x.is_cpu and x.numel()):
            return False
    return True


def shift_blend(x, mix, grid, heads: int, gamma: float, pixels: int, own: bool, added=None) -> Tensor | None:
    """Tokens (B, L, C) blended with the neighbours of `linescan.layers.rwkv.QuadShift`, once for every row of mixes.

    No gradients; None where no kernel serves: all in one dtype, half precision, too.

    Args:
        mix: (K, 1, C), shares of the neighbours, or of the tokens themselves if `own`.
        added: to the mixes, (K, B, L, C), contiguous; the output takes its place.

    Returns:
        (K, B, L, C).
    """
    if not (_alike(x, mix, added) and _supports(x, mix, added)):
        return None
    out = x.new_empty(len(mix), *x.shape) if added is None else added
    others = *grid, heads, gamma, pixels, own, added is not None, out
    torch.ops.linescan_cpu.shift_blend.default(x.contiguous(), mix.contiguous(), *others)
    return out


def norm(x, weight, bias, eps: float, heads: int = 1, gate=None, dtype=None) -> Tensor | None:
    """Layer norm of x (..., C) in `heads` groups of channels, root-mean-square norm without a `bias`; likewise.

    Args:
        x: in half precision, too.
        weight, bias: (C), likewise.
        gate: (..., C), in x's dtype; the result is multiplied by silu(gate).
        dtype: of the result, by default that of x.
    """
    if x.shape[-1] % (16 * heads) or not (_alike(x, gate) and _supports(x, weight, bias, gate)):
        return None
    out = x.new_empty(x.shape, dtype=dtype)
    inputs = (t if t is None else t.contiguous() for t in (x, weight, bias, gate))
    torch.ops.linescan_cpu.norm.default(*inputs, x.shape[-1] // heads, eps, out)
    return out


def rotate(x, cos, sin) -> Tensor | None:
    """`linescan.layers.pos_embed.rotate_pairs`, likewise."""
    channels, heads = x.shape[-1], int(cos.ndim > 2 and cos.shape[-2] == 1)  # which then share the tables
    places = cos.shape[: cos.ndim - 1 - heads]
    fit = x.shape[x.ndim - 1 - heads - len(places) : x.ndim - 1 - heads] == places
    if not fit or channels % 16 or not (_are_floats(x, cos, sin) and _supports()):
        return None
    rows = _rows((x.flatten(-2) if heads else x).flatten(0, -2))
    tables = [table.reshape(-1, channels) for table in (cos, sin)]
    out = x.new_empty(x.shape)
    torch.ops.linescan_cpu.rotate.default(rows, *tables, out)
    return out


# -- gates ------------------------------------------------------------------------------------------------------------

# In the order of kernels.h: how many of the inputs are tokens, and how many outputs there are.
_SIZES = {
    "log_sigmoid": (1, 1),
    "sigmoid": (1, 1),
    "exponential": (1, 1),
    "forget": (1, 2),
    "share": (3, 2),
    "blend": (2, 2),
    "linear_unit": (3, 2),
    "unit": (1, 1),
    "erase": (2, 2),
}


def _in_line(x: Tensor) -> bool:
    """Whether the numbers of a token, and those of its heads, stand next to each other."""
    return x.stride(-1) == 1 and (x.ndim == 4 or (x.ndim == 5 and x.stride(-2) == x.shape[-1]))


def _gate_kernel(name: str) -> Kernel:
    which, (n_tokens, n_outputs) = list(_SIZES).index(name), _SIZES[name]

    def supports(*inputs) -> bool:
        tensors = [x for x in inputs if isinstance(x, Tensor)]
        if not _are_floats(*tensors):
            return False
        tokens, others = tensors[:n_tokens], tensors[n_tokens:]
        first = tokens[0]
        return all(map(_in_line, tokens)) and all(
            (x.shape[0], *x.shape[2:]) == (first.shape[0], *first.shape[2 : x.ndim]) for x in tokens[1:]
        ) and all(x.is_contiguous() and x.shape == first.shape[-1:] for x in others)  # fmt: skip

    def arguments(inputs) -> tuple:
        tokens = [x.flatten(3) for x in inputs[:n_tokens]]
        other = inputs[n_tokens] if len(inputs) > n_tokens else None
        parameter, factor = (other, STEEPEST) if isinstance(other, Tensor) else (None, other or 1.0)
        return which, factor, *tokens, *[None] * (3 - n_tokens), parameter, inputs[0].shape[-1]

    def forward(*inputs):
        like = max(inputs[:n_tokens], key=lambda x: (x.ndim, x.shape[1]))
        out = [torch.empty_like(like) for _ in range(n_outputs)]
        torch.ops.linescan_cpu.gate.default(*arguments(inputs), *_flat_heads(out, 2))
        return out[0] if n_outputs == 1 else tuple(out)

    def backward(grads, *inputs):
        grads = [grad if _in_line(grad) else grad.contiguous() for grad in grads]
        tensors = [torch.empty_like(x) for x in inputs if isinstance(x, Tensor)]
        tokens, others = tensors[:n_tokens], tensors[n_tokens:]
        of_parameter = others[0][None] if others else None
        call = *arguments(inputs), *_flat_heads(grads, 2), *_flat_heads(tokens, 3), of_parameter
        torch.ops.linescan_cpu.gate_backward.default(*call)
        return tensors

    return Kernel(supports, forward, backward)


def _flat_heads(tensors: list[Tensor], count: int) -> list[Tensor | None]:
    """Heads side by side as channels; filled up with None."""
    return [x.flatten(3) for x in tensors] + [None] * (count - len(tensors))


_missing = _load()
if _missing is None:
    for _name in _SIZES:
        GATES[_name].kernel = _gate_kernel(_name)
_register(_ssd, _ssd_forward, _ssd_backward, _ssd_room)
_register_matrix(_gla, GATED, "q k v gate scale initial_state")
_register_matrix(_simple_gla, GATED, "q k v gate scale initial_state")
_register_matrix(_linear_attention, GATED, "q k v scale normalize initial_state")
_register_matrix(_wkv6, LATE, "q k v gate bonus scale initial_state")
_register_matrix(_gated_delta_rule, DELTA, "q k v gate beta scale initial_state")
_register_matrix(_dplr, LOW_RANK, "q k v a b gate scale initial_state")
_register_vector(_hgrn, SUM, "x g initial_state")
_register_vector(_wkv4, WKV, "x g w u initial_state")
_register_vector(_bi_wkv, WKV_BOTH, "x g w u")
_register(_selective_scan, _scan_forward, _scan_backward, _scan_room)
_register(_causal_conv1d, _conv_forward, _conv_backward)
_in_graphs(_selective_scan, "selective_scan")
_in_graphs(_causal_conv1d, "causal_conv1d")
