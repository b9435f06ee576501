"""`nn.Linear` on the fast path of `linescan.scans.matmul`."""

from torch import Tensor, nn

from ..scans.matmul import linear

__all__ = ["Linear", "through_onednn"]


class Linear(nn.Linear):
    """`nn.Linear` that computes with `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) -> (..., out_features)."""
        return linear(x, self.weight, self.bias)


def through_onednn(model: nn.Module) -> None:
    """Makes every plain `nn.Linear` inside a model, timm's included, a `Linear`; weights and names stay."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear
