"""What backbones are made of: token mixers, residual blocks around them, and stages of blocks.

A mixer mixes the tokens of a map (B, H, W, dim), or tokens (B, L, dim). A block adds a mixer's and an MLP's output to
the stream. A stage changes the resolution and runs blocks. Systems pass parts; what is here is what runs, so hooks,
`FSDP` wrapping and gradient checkpointing act on these modules.
"""

from typing import Callable, Iterable

import torch
from timm.layers import DropPath
from timm.models import checkpoint, register_notrace_module
from torch import Tensor, nn

from ..errors import InputError
from .norm import LayerNorm
from .stems import plus_depthwise

__all__ = ["Block", "Stage", "TokenMixer", "run"]


@register_notrace_module
class TokenMixer(nn.Module):
    """Base of all mixers: `mixer(x)` for a map, `mixer(tokens, grid)` for tokens.

    Subclasses define `mix_tokens`. Where they get no route they look up their own table for the grid; tables are
    cached. What they compute from the tokens is a method `project`, the recurrence over it a method `scan`. Symbolic
    tracing (torch.fx) sees a mixer as one node.
    """

    def mix_tokens(self, x: Tensor, grid: tuple[int, ...], *context, **options) -> tuple[Tensor, object]:
        """Tokens (B, L, dim) on a grid -> the same, and the state after the last step (None where there is none).

        Args:
            x, grid, context: as `forward` had them, but for maps, which are tokens here.
            options: `route`, `initial_state` and `return_final_state=True`, for `MultiRoute` or another mixer.
        """
        raise NotImplementedError

    def forward(
        self,
        x: Tensor,
        grid: tuple[int, ...] | None = None,
        *context,
        route: Tensor | None = None,
        initial_state=None,
        return_final_state: bool = False,
    ):
        """Mixes tokens.

        Args:
            x: a map (B, H, W, dim) or (B, T, H, W, dim), or tokens (B, L, dim).
            grid: where the tokens stand, row-major; not for maps. By default in a line, (1, L).
            context: what else a mixer reads, such as rotary tables.
            route: a table (K, S), or (B, K, S) with an order per sample, instead of the mixer's own routes.
            initial_state: what the recurrence starts from; zeros if None.
            return_final_state: also return the state after the last step.

        Returns:
            As x, or a pair of that and the state.

        Raises:
            InputError: a state is given to, or wanted of, a mixer that has none.
        """
        size = x.shape
        grid = tuple(size[1:-1]) if x.ndim > 3 else grid or (1, size[1])
        options = {"route": route, "initial_state": initial_state, "return_final_state": True}
        tokens = x if x.ndim == 3 else x.flatten(1, -2)
        y, state = self.mix_tokens(tokens, grid, *context, **options)
        if state is None and (return_final_state or initial_state is not None):
            raise InputError(f"{type(self).__name__} reads all tokens at once: it has no state")
        y = y if x.ndim == 3 else y.reshape(*size[:-1], y.shape[-1])
        return (y, state) if return_final_state else y


class Block(nn.Module):
    """A residual block: a token mixer, then, if there is one, an MLP; over maps (B, H, W, dim) or tokens (B, L, dim).

        x = x + cpe1(x);    x = x + drop_path(scale1(mixer(norm1(x))))
        x = x + cpe2(x);    x = x + drop_path(scale2(mlp(norm2(x))))

    Args:
        dim: channels of the stream.
        mixer: the token mixer.
        mlp: the MLP, or None.
        norm_layer: dim -> norm.
        post_norm: normalise each branch's output instead of its input.
        scale_layer: dim -> a layer scale on each branch's output; None for none.
        cpe_layer: dim -> a convolution whose output is added before each branch ("conditional position embedding");
            None for none.
        drop_path: rate of stochastic depth, for both branches.
    """

    mlp_reads_context = False

    def __init__(
        self,
        dim: int,
        mixer: nn.Module,
        mlp: nn.Module | None = None,
        norm_layer: Callable = LayerNorm,
        post_norm: bool = False,
        scale_layer: Callable | None = None,
        cpe_layer: Callable | None = None,
        drop_path: float = 0.0,
    ):
        super().__init__()

        def part(layer: Callable | None, wanted: bool = True) -> nn.Module | None:
            return layer(dim) if layer and wanted else None

        self.post_norm = post_norm
        self.cpe1 = part(cpe_layer)
        self.norm1 = norm_layer(dim)
        self.mixer = mixer
        self.scale1 = part(scale_layer)
        self.cpe2 = part(cpe_layer, mlp is not None)
        self.norm2 = part(norm_layer, mlp is not None)
        self.mlp = mlp
        self.scale2 = part(scale_layer, mlp is not None)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, *context, with_mixed: bool = False, **options):
        """The stream after the block.

        Args:
            x: the stream.
            context: further inputs of the mixer, such as the grid of tokens.
            with_mixed: also return the mixer's branch as it is, before stochastic depth.
            options: of the mixer, such as `route`.
        """
        if self.cpe1 is not None:
            x = plus_depthwise(self.cpe1, x)
        mixed = self.branch(x, self.norm1, self.mixer, self.scale1, *context, **options)
        x = x + self.drop_path(mixed)
        if self.mlp is not None:
            if self.cpe2 is not None:
                x = plus_depthwise(self.cpe2, x)
            context = context if self.mlp_reads_context else ()
            x = x + self.drop_path(self.branch(x, self.norm2, self.mlp, self.scale2, *context))
        return (x, mixed) if with_mixed else x

    def branch(
        self, x: Tensor, norm: nn.Module, layer: nn.Module, scale: nn.Module | None, *context, **options
    ) -> Tensor:
        """What a branch adds to the stream."""
        y = norm(layer(x, *context, **options)) if self.post_norm else layer(norm(x), *context, **options)
        return y if scale is None else scale(y)

    def without_mlp(self) -> None:
        """Removes the MLP's branch, for a model that reads nothing after the mixer."""
        self.cpe2 = self.norm2 = self.mlp = self.scale2 = None


class Stage(nn.Module):
    """A downsampling, then blocks: (B, H, W, C) -> (B, H', W', dim).

    Args:
        downsample: what changes resolution and width; None for none.
        blocks: the blocks; each is called as `block(x, *self.context(x))`.
    """

    def __init__(self, downsample: nn.Module | None, blocks: Iterable[nn.Module]):
        super().__init__()
        self.downsample = nn.Identity() if downsample is None else downsample
        self.blocks = nn.ModuleList(blocks)
        self.grad_checkpointing = False

    def context(self, x: Tensor) -> tuple:
        """What all blocks of the stage read beside the stream, from the map before the first."""
        return ()

    def forward(self, x: Tensor) -> Tensor:
        return self.run_blocks(self.downsample(x))

    def run_blocks(self, x: Tensor) -> Tensor:
        """The map after the blocks."""
        context = self.context(x)
        for block in self.blocks:
            x = run(block, x, *context, checkpointing=self.grad_checkpointing)
        return x


def run(block: nn.Module, x: Tensor, *context, checkpointing: bool, **options):
    """`block(x, *context)`; with `checkpointing` its activations are recomputed in the backward pass."""
    if checkpointing and torch.is_grad_enabled():
        return checkpoint(block, x, *context, **options)
    return block(x, *context, **options)
