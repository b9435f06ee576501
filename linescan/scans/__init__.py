"""Scans: routes over grids and points, and the linear recurrences that read through them. Needs torch alone.

routes          orders over grids and points, by name
MultiRoute      any recurrence along any routes, and a merge of their outputs
backend         forces one implementation; recurrences() lists them all
"""

from . import kernels, routes
from .multi_route import MultiRoute, create_merge
from .ops.causal_conv import causal_conv1d
from .ops.delta import delta_rule, gated_delta_rule, kda
from .ops.dplr import dplr, rwkv7
from .ops.gla import gla, hgrn2, retention, simple_gla
from .ops.hgrn import hgrn
from .ops.linear_attention import global_linear_attention, linear_attention
from .ops.log_linear import log_linear_attention
from .ops.selective_scan import selective_scan
from .ops.ssd import ssd
from .ops.wkv4 import bi_wkv, wkv4
from .ops.wkv6 import bi_wkv6, wkv6
from .recurrence import backend, recurrences

__all__ = [
    "MultiRoute",
    "backend",
    "bi_wkv",
    "bi_wkv6",
    "causal_conv1d",
    "create_merge",
    "delta_rule",
    "dplr",
    "gated_delta_rule",
    "gla",
    "global_linear_attention",
    "hgrn",
    "hgrn2",
    "kda",
    "kernels",
    "linear_attention",
    "log_linear_attention",
    "recurrences",
    "retention",
    "routes",
    "rwkv7",
    "selective_scan",
    "simple_gla",
    "ssd",
    "wkv4",
    "wkv6",
]
