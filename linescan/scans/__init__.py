"""Scans: routes over grids and points, and the linear recurrences that read through them. Needs torch alone.

routes          orders over grids and points, by name
MultiRoute      any recurrence along any routes, and a merge of their outputs
backend         forces one implementation; recurrences() lists them all
"""

from . import kernels, routes
from .multi_route import MultiRoute, create_merge
from .ops.causal_conv import causal_conv1d
from .ops.delta import delta_rule, gated_delta_product, gated_delta_rule, kda
from .ops.dplr import comba, dplr, gated_delta_rule_2, rwkv7
from .ops.gla import gla, hgrn2, retention, simple_gla
from .ops.hgrn import hgrn, rg_lru
from .ops.linear_attention import based, global_linear_attention, hedgehog, hedgehog_features, linear_attention
from .ops.log_linear import log_linear_attention, log_linear_gated_delta_rule
from .ops.mamba3 import mamba3, mamba3_mimo
from .ops.mesa_net import mesa_net
from .ops.mlstm import mlstm
from .ops.mom import mom_gated_delta_rule, mom_gla
from .ops.selective_scan import selective_scan
from .ops.ssd import ssd
from .ops.titans import titans_memory
from .ops.ttt import ttt_linear, ttt_linear_fla
from .ops.vittt import vittt_conv, vittt_glu
from .ops.window_attention import hedgehog_window
from .ops.wkv4 import bi_wkv, wkv4
from .ops.wkv6 import bi_wkv6, wkv6
from .recurrence import backend, recurrences

__all__ = [
    "MultiRoute",
    "backend",
    "based",
    "bi_wkv",
    "bi_wkv6",
    "causal_conv1d",
    "comba",
    "create_merge",
    "delta_rule",
    "dplr",
    "gated_delta_product",
    "gated_delta_rule",
    "gated_delta_rule_2",
    "gla",
    "global_linear_attention",
    "hedgehog",
    "hedgehog_features",
    "hedgehog_window",
    "hgrn",
    "hgrn2",
    "kda",
    "kernels",
    "linear_attention",
    "log_linear_attention",
    "log_linear_gated_delta_rule",
    "mamba3",
    "mamba3_mimo",
    "mesa_net",
    "mlstm",
    "mom_gated_delta_rule",
    "mom_gla",
    "recurrences",
    "retention",
    "rg_lru",
    "routes",
    "rwkv7",
    "selective_scan",
    "simple_gla",
    "ssd",
    "titans_memory",
    "ttt_linear",
    "ttt_linear_fla",
    "vittt_conv",
    "vittt_glu",
    "wkv4",
    "wkv6",
]
