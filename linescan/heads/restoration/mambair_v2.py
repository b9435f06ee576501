"""MambaIRv2: window attention, and one scan over all pixels in an order of their own ("attentive state space").

Paper: "MambaIRv2: Attentive State Space Restoration", Guo et al., CVPR 2025, arXiv 2411.15269. Official code:
github.com/csguoh/MambaIR (Apache-2.0). Written from the paper and the published weights.

A router gives every pixel one of T classes. The scan reads class after class, so that pixels that are alike stand
together wherever they are in the image, and a prompt of the class is added to what a pixel reads the state with. The
order is a route table for each image; no feature is sorted.
"""

from typing import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import known
from ...layers.attention import ShiftedWindowAttention
from ...layers.blocks import Block, TokenMixer
from ...layers.linear import linear
from ...layers.mlp import ConvGatedMlp, ConvMlp
from ...layers.norm import LayerNorm, at_least_float32
from ...layers.s6 import S6Scan
from ...layers.ss2d import SS2D_NAMES
from ...layers.stems import depthwise
from ...scans import routes
from ...zoo import register
from .frame import RestorationFrame
from .mambair import CLASSIC, PUBLISHED, enlarging, gaussian_noise, jpeg

__all__ = ["AttentiveScan", "MambaIRv2", "Routing", "fixed_gumbel"]

Routing = str | Callable[[int, Tensor], Tensor]
"""How pixels get their class from the router's logits: "sample" or "argmax", or a function (number of the scan, logits
(B, L, T)) -> noise of the same shape, whose sum has its highest value at the class."""


def fixed_gumbel(number: int, length: int, classes: int, device: torch.device | str | None = None) -> Tensor:
    """Gumbel noise (length, classes), float32: always the same for one `number`, on every device.

    A hash of the place (the finaliser of splitmix64), not a generator: it can be traced, and a row does not depend on
    how many there are.
    """
    z = torch.arange(length * classes, device=device).view(length, classes) * -0x61C8864680B583EB
    z = z + (number + 1) * 0x2545F4914F6CDD1D % 2**62
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        z = (z ^ ((z >> shift) & ((1 << (64 - shift)) - 1))) * factor
    unit = ((z >> 41) & 0x7FFFFF).float().add(0.5).mul(2.0**-23)  # as many bits as float32 has: never 0 or 1
    return -torch.log(-torch.log(unit))


class AttentiveScan(TokenMixer):
    """Tokens (B, L, dim) through S6 once, in the order of their classes.

        u = in_proj(x);    u = u * sigmoid(conv(u));    class = argmax(router(x) + noise)
        y = out_proj(norm(S6(u, C + prompt)))           prompt = class_embed[class] @ state_embed

    As published, the prompts are added in the order of the scan: the t-th token of the scan gets the prompt of the t-th
    token of the map. Gradients reach the router through the prompts, straight through the choice.

    Args:
        dim: channels in and out.
        hidden: scanned channels.
        d_state: N, states per channel.
        num_tokens: T, classes.
        inner_rank: numbers that a class is described by, between `class_embed` and `state_embed`.
        routing: see `Routing`. "sample" adds Gumbel noise to the logits: fresh noise in training, in evaluation
            noise that is always the same (`fixed_gumbel`). "argmax" adds none, in both.
        number: of this scan in its model, which fixed noise depends on.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        d_state: int,
        num_tokens: int,
        inner_rank: int,
        routing: Routing = "sample",
        number: int = 0,
    ):
        super().__init__()
        if not callable(routing):
            known("routing", routing, ("sample", "argmax"))
        self.routing, self.number = routing, number
        self.in_proj = nn.Linear(dim, hidden)
        self.conv = depthwise(hidden, 3)
        self.router = nn.Sequential(nn.Linear(dim, dim // 3), nn.GELU(), nn.Linear(dim // 3, num_tokens))
        self.class_embed = nn.Parameter(torch.empty(num_tokens, inner_rank).uniform_(-1 / num_tokens, 1 / num_tokens))
        self.state_embed = nn.Parameter(torch.empty(inner_rank, d_state).uniform_(-1 / inner_rank, 1 / inner_rank))
        self.ssm = S6Scan(hidden, 1, d_state)
        self.norm = LayerNorm(hidden)
        self.out_proj = nn.Linear(hidden, dim)

    def no_weight_decay(self) -> set[str]:
        return {"class_embed", "state_embed"}

    def scores(self, x: Tensor) -> Tensor:
        """Tokens (B, L, dim) -> the classes' scores with their noise, (B, L, T), at least float32."""
        scores = at_least_float32(self.router(x)).log_softmax(-1)
        if callable(self.routing):
            return scores + self.routing(self.number, scores)
        if self.routing == "argmax":
            return scores
        if self.training:
            return scores - torch.empty_like(scores).exponential_().log()
        return scores + fixed_gumbel(self.number, *scores.shape[1:], device=scores.device).to(scores.dtype)

    def prompts(self, scores: Tensor, chosen: Tensor, step: Tensor) -> Tensor:
        """The prompt (B, L, N) of each token, from the scores, the chosen classes, and the steps of the tokens."""
        table = self.class_embed @ self.state_embed
        prompts = F.embedding(chosen.gather(1, step), table)
        if torch.is_grad_enabled() and scores.requires_grad:
            soft = scores.softmax(-1)
            straight = (soft - soft.detach()) @ table  # zero, with the gradient of the soft choice
            prompts = prompts + straight.gather(1, step[..., None].expand_as(straight))
        return prompts

    def project(self, x: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Tokens (B, L, dim) -> those to scan (B, 1, L, hidden), and their dt, B and C, see `S6Scan.project`."""
        u = linear(self.in_proj, x)
        u = (u * self.conv(u.unflatten(1, grid)).flatten(1, 2).sigmoid())[:, None]
        return u, *self.ssm.project(u)

    def mix_tokens(
        self, x: Tensor, grid: tuple[int, int], *, route: Tensor | None = None, **options
    ) -> tuple[Tensor, Tensor]:
        scores = self.scores(x)
        chosen = scores.argmax(-1)
        if route is None:
            length = x.shape[1]
            place = chosen * length + torch.arange(length, device=x.device)  # no two alike: ONNX has no stable sort
            route = place.argsort(-1)[:, None]
        step = routes.inverse(route, x.shape[1]).expand(x.shape[0], 1, -1)[:, 0].long()
        u, dt, B, C = self.project(x, grid)
        C = C + self.prompts(scores, chosen, step).to(C.dtype)[:, None]
        y, state = self.ssm.scan(u, dt, B, C, route=route, **options)
        return linear(self.out_proj, self.norm(y)), state


class AttentiveBlock(nn.Module):
    """Attention in windows, then the attentive scan, each a block with an MLP and a scaled residual around it.

        x = local(x) + scale1 * x;    x = semantic(x) + scale2 * x

    Args:
        dim: channels of the map (B, H, W, dim).
        local, semantic: the blocks.
    """

    def __init__(self, dim: int, local: Block, semantic: Block):
        super().__init__()
        self.local, self.semantic = local, semantic
        self.scale1, self.scale2 = (nn.Parameter(torch.full((dim,), 1e-4)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.local(x) + self.scale1 * x
        return self.semantic(x) + self.scale2 * x


class MambaIRv2(RestorationFrame):
    """MambaIRv2: images (B, in_chans, H, W) -> (B, in_chans, H * upscale, W * upscale), of any size.

    Images are mirrored at the bottom and the right up to whole windows, and the result cut.

    Args:
        in_chans, upscale, upsampler, embed_dim, depths, img_range, patch_norm, resi_connection: of `RestorationFrame`.
        light: MLPs with a gate of half the channels.
        d_state: states per channel of the scans.
        num_heads: heads of the attention.
        window_size: side of its windows; every second block shifts them by half.
        mlp_ratio: hidden channels of MLPs, and scanned ones, as a multiple of `embed_dim`.
        num_tokens: classes of pixels.
        inner_rank: numbers that a class is described by.
        conv_kernel_size: side of the convolutions in the MLPs.
        routing: how pixels get their class, see `Routing`. The published weights are sampled, in tests as in training;
            their authors advise against "argmax" with them.

    Raises:
        InputError: no such upsampler, or not for this scale; heads do not divide the channels.
    """

    names = (
        (r"\.residual_group\.layers\.", ".blocks."),
        (r"(blocks\.\d+)\.norm([12])\.", r"\1.local.norm\2."),
        (r"(blocks\.\d+)\.norm([34])\.", lambda m: f"{m[1]}.semantic.norm{int(m[2]) - 2}."),
        (r"\.wqkv\.", ".local.mixer.qkv."),
        (r"\.win_mhsa\.relative_position_bias_table$", ".local.mixer.bias_table"),
        (r"\.win_mhsa\.", ".local.mixer."),
        (r"\.convffn1\.", ".local.mlp."),
        (r"\.convffn2\.", ".semantic.mlp."),
        (r"\.dwconv\.depthwise_conv\.0\.", ".dwconv."),
        (r"\.sg\.norm\.", ".norm."),
        (r"\.sg\.conv\.", ".dwconv."),
        (r"\.embeddingA\.weight$", ".semantic.mixer.state_embed"),
        (r"\.assm\.embeddingB\.weight$", ".semantic.mixer.class_embed"),
        (r"\.assm\.selectiveScan\.", ".semantic.mixer."),
        (r"\.assm\.in_proj\.0\.", ".semantic.mixer.in_proj."),
        (r"\.assm\.CPE\.0\.", ".semantic.mixer.conv."),
        (r"\.assm\.route\.", ".semantic.mixer.router."),
        (r"\.assm\.out_norm\.", ".semantic.mixer.norm."),
        (r"\.assm\.", ".semantic.mixer."),
        *SS2D_NAMES,
    )

    def __init__(
        self,
        in_chans: int = 3,
        upscale: int = 1,
        upsampler: str = "",
        light: bool = False,
        embed_dim: int = 174,
        depths: Sequence[int] = (6, 6, 6, 6, 6, 6),
        d_state: int = 16,
        num_heads: int = 6,
        window_size: int = 16,
        mlp_ratio: float = 2.0,
        num_tokens: int = 128,
        inner_rank: int = 64,
        conv_kernel_size: int = 5,
        img_range: float = 1.0,
        patch_norm: bool = True,
        resi_connection: str = "1conv",
        routing: Routing = "sample",
    ):
        hidden = int(embed_dim * mlp_ratio)

        def mlp() -> nn.Module:
            if light:
                return ConvGatedMlp(embed_dim, hidden // 2, kernel_size=conv_kernel_size)
            return ConvMlp(embed_dim, hidden, kernel_size=conv_kernel_size, conv_act_layer=nn.GELU)

        def block(number: int, shift: int) -> AttentiveBlock:
            attention = ShiftedWindowAttention(embed_dim, num_heads, window_size, shift)
            scan = AttentiveScan(embed_dim, hidden, d_state, num_tokens, inner_rank, routing, number)
            return AttentiveBlock(embed_dim, Block(embed_dim, attention, mlp()), Block(embed_dim, scan, mlp()))

        def group(number: int, depth: int) -> list[nn.Module]:
            first = sum(depths[:number])
            return [block(first + i, i % 2 * (window_size // 2)) for i in range(depth)]

        super().__init__(
            in_chans, upscale, upsampler, embed_dim, depths, img_range, patch_norm, resi_connection, group, window_size
        )
        for module in self.modules():
            if isinstance(module, AttentiveScan):
                module.in_proj.reset_parameters()  # published as a convolution, and initialised as one

    def checkpoint_filter(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The official code's keys to linescan's, without the table of offsets, which is computed."""
        return super().checkpoint_filter({k: v for k, v in state.items() if k != "relative_position_index_SA"})


# -- the zoo ----------------------------------------------------------------------------------------------------------

LIGHT = {
    "upsampler": "pixelshuffledirect", "light": True, "embed_dim": 48, "depths": (5, 5, 5, 5), "d_state": 8,
    "num_heads": 4, "mlp_ratio": 1.0, "num_tokens": 64, "inner_rank": 32,
}  # fmt: skip
SMALL = {**CLASSIC, "embed_dim": 132, "depths": (4,) * 6, "num_heads": 4}
LARGE = {**CLASSIC, "depths": (6,) * 9}

register(
    MambaIRv2,
    {
        "mambair_v2_light_x2": enlarging(2, LIGHT, 0.774, 33.26, 0.9378),
        "mambair_v2_light_x3": enlarging(3, LIGHT, 0.781, 29.01, 0.8689),
        "mambair_v2_light_x4": enlarging(4, LIGHT, 0.790, 26.82, 0.8079),
        "mambair_v2_small_x2": enlarging(2, SMALL, 9.622),
        "mambair_v2_small_x3": enlarging(3, SMALL, 9.807),
        "mambair_v2_small_x4": enlarging(4, SMALL, 9.770),
        "mambair_v2_base_x2": enlarging(2, CLASSIC, 22.903, 34.49, 0.9468),
        "mambair_v2_base_x3": enlarging(3, CLASSIC, 23.088, 30.28, 0.8905),
        "mambair_v2_base_x4": enlarging(4, CLASSIC, 23.051, 27.89, 0.8344),
        "mambair_v2_large_x2": enlarging(2, LARGE, 34.091),
        "mambair_v2_large_x3": enlarging(3, LARGE, 34.275),
        "mambair_v2_large_x4": enlarging(4, LARGE, 34.238),
        "mambair_v2_color_dn": {"params": 22.658, "weights": gaussian_noise({15: 35.42})},
        "mambair_v2_jpeg": {
            "args": {"in_chans": 1},
            "inputs": ((1, 63, 63),),
            "params": 22.652,
            "weights": jpeg({10: (30.37, 0.8269), 30: (33.81, 0.8970), 40: (34.64, 0.9093)}),
        },
    },
    **PUBLISHED,
    task="restoration",
    paper="CVPR 2025, arXiv 2411.15269",
    page="https://github.com/csguoh/MambaIR/releases/tag/v1.0",
)
