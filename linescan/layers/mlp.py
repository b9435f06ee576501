"""The MLPs of blocks, over the last axis of tokens or maps."""

from typing import Callable

from timm.models import register_notrace_module
from torch import Tensor, nn

from .linear import linear
from .norm import LayerNorm
from .stems import depthwise, plus_depthwise

__all__ = ["ConvGatedMlp", "ConvMlp", "DepthwiseMlp", "GatedMlp", "Mlp"]


@register_notrace_module
class Mlp(nn.Module):
    """(..., dim) -> (..., dim): fc2(act(fc1(x))).

    Args:
        dim: channels in and out.
        hidden: channels between.
        act_layer: the activation.
        bias: of both Linear layers.
        drop: rate of the dropout after the activation and after fc2.
    """

    widths = 1  # outputs of fc1 per hidden channel

    def __init__(self, dim: int, hidden: int, act_layer: Callable = nn.GELU, bias: bool = True, drop: float = 0.0):
        super().__init__()
        self.fc1 = nn.Linear(dim, self.widths * hidden, bias=bias)
        self.act = act_layer()
        self.drop = nn.Dropout(drop)
        self.fc2 = nn.Linear(hidden, dim, bias=bias)

    def activate(self, x: Tensor) -> Tensor:
        """Outputs of fc1 -> inputs of fc2."""
        return self.act(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(linear(self.fc2, self.drop(self.activate(linear(self.fc1, x)))))


class GatedMlp(Mlp):
    """(..., dim) -> (..., dim): fc2(a * act(b)), where fc1(x) = (a, b), or (b, a) with `gate_first` (arXiv 2002.05202).

    Args:
        dim, hidden, act_layer, bias, drop: of `Mlp`.
        gate_first: order of the halves of fc1's output.
    """

    widths = 2

    def __init__(self, dim: int, hidden: int, *args, gate_first: bool = False, **kwargs):
        super().__init__(dim, hidden, *args, **kwargs)
        self.gate_first = gate_first

    def activate(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return self.act(a) * b if self.gate_first else a * self.act(b)


class ConvMlp(Mlp):
    """Maps (B, H, W, dim) -> the same: fc2(y + conv(y)), y = act(fc1(x)), with a depthwise convolution.

    Args:
        dim, hidden, act_layer, bias, drop: of `Mlp`.
        kernel_size: side of the convolution.
        conv_act_layer: an activation after it.
    """

    def __init__(
        self, dim: int, hidden: int, *args, kernel_size: int = 3, conv_act_layer: Callable = nn.Identity, **kwargs
    ):
        super().__init__(dim, hidden, *args, **kwargs)
        self.dwconv = depthwise(hidden, kernel_size)
        self.conv_act = conv_act_layer()

    def activate(self, x: Tensor) -> Tensor:
        x = self.act(x)
        if type(self.conv_act) is nn.Identity:
            return plus_depthwise(self.dwconv, x)
        return x + self.conv_act(self.dwconv(x))


class DepthwiseMlp(Mlp):
    """Maps (B, H, W, dim) -> the same: fc2(act(conv(fc1(x)))), or with `act_first` fc2(conv(act(fc1(x)))).

    Args:
        dim, hidden, act_layer, bias, drop: of `Mlp`.
        kernel_size: side of the depthwise convolution.
        act_first: the activation stands before the convolution.
    """

    def __init__(self, dim: int, hidden: int, *args, kernel_size: int = 3, act_first: bool = False, **kwargs):
        super().__init__(dim, hidden, *args, **kwargs)
        self.act_first = act_first
        self.dwconv = depthwise(hidden, kernel_size)

    def activate(self, x: Tensor) -> Tensor:
        return self.dwconv(self.act(x)) if self.act_first else self.act(self.dwconv(x))


class ConvGatedMlp(Mlp):
    """Maps (B, H, W, dim) -> the same: fc2(a * conv(norm(b))), where act(fc1(x)) = (a, b).

    Args:
        dim, hidden, act_layer, bias, drop: of `Mlp`; fc1 has 2 * hidden outputs.
        kernel_size: side of the depthwise convolution.
    """

    widths = 2

    def __init__(self, dim: int, hidden: int, *args, kernel_size: int = 5, **kwargs):
        super().__init__(dim, hidden, *args, **kwargs)
        self.norm = LayerNorm(hidden)
        self.dwconv = depthwise(hidden, kernel_size)

    def activate(self, x: Tensor) -> Tensor:
        a, b = self.act(x).chunk(2, -1)
        return a * self.dwconv(self.norm(b))
