"""Triton kernels of the scans, as implementations named "triton". They serve CUDA tensors where Triton is installed.

Triton is optional and slow to import, so nothing here imports it until a call needs it. With TRITON_INTERPRET=1 in the
environment the kernels run in Triton's interpreter, on CPU tensors: very slow, and how they are tested without a GPU.
"""

import os
from contextlib import nullcontext
from functools import cache
from importlib import import_module, metadata
from importlib.util import find_spec

import torch
from torch import Tensor

from ...ops.causal_conv import _causal_conv1d
from ...ops.delta import _gated_delta_rule
from ...ops.dplr import _dplr
from ...ops.gla import _gla, _simple_gla
from ...ops.hgrn import _hgrn
from ...ops.linear_attention import _linear_attention
from ...ops.log_linear import _log_linear_attention, _log_linear_gated_delta_rule
from ...ops.mamba3 import _mamba3_mimo
from ...ops.mlstm import _mlstm
from ...ops.selective_scan import _selective_scan
from ...ops.ssd import _ssd
from ...ops.ttt import _ttt_linear
from ...ops.wkv4 import _bi_wkv, _wkv4
from ...ops.wkv6 import _wkv6
from ...recurrence import Recurrence

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@cache
def _installed() -> bool:
    return find_spec("triton") is not None


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "") in ("1", "true", "on")


def info() -> str:
    """Which kernels serve CUDA devices, or what to do about missing ones."""
    if not _installed():
        return "chunked torch; Triton is not installed: pip install triton (Linux) or triton-windows"
    package = metadata.packages_distributions()["triton"][0]  # it has several names: triton-windows, pytorch-triton
    return f"Triton {metadata.version(package)}"


def _fits(*args) -> bool:
    tensors = [x for x in args if isinstance(x, Tensor)]
    devices = ("cuda", "cpu") if _interpreting() else ("cuda",)
    return all(
        x.device.type in devices and x.numel() > 0 and (x.dtype in _DTYPES or not x.is_floating_point())
        for x in tensors
    )


def _register(op: Recurrence, module: str, fits=lambda *args: True, limit: str = "") -> None:
    """Registers `forward` and `backward` of a module beside this one, which the first call imports.

    `limit` says in words what `fits` asks for.
    """

    def run(function: str, inputs: int):
        def implementation(*args):
            call = args[inputs:]
            if not _installed():
                raise RuntimeError(f"{op.name}: {info()}")
            if not (_fits(*call) and fits(*call)):
                got = sorted({f"{str(x.dtype)[6:]} on {x.device.type}" for x in call if isinstance(x, Tensor)})
                raise ValueError(
                    f"{op.name}: the triton kernel takes non-empty float32, bfloat16 or float16 tensors on a CUDA "
                    f"device{limit}, got {', '.join(got)}"
                )
            kernels = import_module(f"{__name__}.{module}")
            device = args[0].device  # Triton launches on the current device, which need not be the tensors'
            with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
                return getattr(kernels, function)(*args)

        return implementation

    def supports(*call) -> bool:
        return _fits(*call) and fits(*call) and _installed()

    op.register("triton", run("forward", 0), run("backward", 2), supports)


_register(_selective_scan, "selective_scan", lambda u, delta, A, *_: A.shape[-1] <= 64, " and at most 64 states")
_register(_causal_conv1d, "causal_conv", lambda x, weight, *_: weight.shape[-1] <= 16, " and at most 16 taps")
_register(_gla, "gla")
_register(_simple_gla, "gla")
_register(_ssd, "ssd")
_register(_linear_attention, "linear_attention")
_register(_log_linear_attention, "log_linear", lambda *call: call[7] == 0, " from position 0 on")
_register(
    _log_linear_gated_delta_rule,
    "log_linear_delta",
    lambda q, *call: call[7] == 0 and q.shape[-1] <= 128,
    " from position 0 on and at most 128 key channels",
)
_register(_hgrn, "hgrn")
_register(_bi_wkv, "bi_wkv")
_register(_wkv4, "wkv4")
_register(_wkv6, "wkv6")
_register(_gated_delta_rule, "delta", lambda q, *_: q.shape[-1] <= 128, " and at most 128 key channels")
_register(_dplr, "dplr", lambda q, *_: q.shape[-1] <= 128, " and at most 128 key channels")
_register(_mlstm, "mlstm")
_register(_mamba3_mimo, "mamba3")


def _ttt_fits(q: Tensor, *call) -> bool:
    # Triton 3.6 cannot compile its backward for sm_100: a pass on tensor memory fails.
    compiles = not q.is_cuda or torch.cuda.get_device_capability(q.device)[0] != 10
    return q.shape[-1] <= 64 and call[7] <= 64 and compiles


_register(_ttt_linear, "ttt", _ttt_fits, " (no sm_100), at most 64 channels and mini-batches of at most 64")
