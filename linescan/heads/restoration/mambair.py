"""MambaIR: image restoration by scans along rows and columns (SS2D), with convolutions and channel attention.

Paper: "MambaIR: A Simple Baseline for Image Restoration with State-Space Model", Guo et al., ECCV 2024,
arXiv 2402.15648. Official code: github.com/csguoh/MambaIR (Apache-2.0). Written from the paper and the published
weights.

`MambaIR` works at full resolution: super-resolution, Gaussian noise, JPEG artefacts. `MambaIRUNet` has the same blocks
in a U-Net, after Restormer (Zamir et al., CVPR 2022, arXiv 2111.09881), for the noise of real cameras.
"""

from typing import Sequence

import torch
from timm.layers import calculate_drop_path_rates
from torch import Tensor, nn

from ...checkpoint import fit_shapes, rename
from ...layers.blocks import Stage
from ...layers.channel_attention import ResidualStateSpaceBlock
from ...layers.ss2d import SS2D_NAMES
from ...layers.stems import ChannelsFirst, MapConv2d, mirror_to_multiple
from ...zoo import register
from .frame import RestorationFrame

__all__ = ["MambaIR", "MambaIRUNet"]


# What published files call the parts of a block.
BLOCK_NAMES = (
    (r"\.ln_(\d)\.", r".norm\1."),
    (r"\.skip_scale$", ".skip1"),
    (r"\.skip_scale2$", ".skip2"),
    (r"\.self_attention\.", ".mixer."),
    *SS2D_NAMES,
    (r"\.conv_blk\.cab\.(\d)\.attention\.1\.", r".attention.\1.fc1."),
    (r"\.conv_blk\.cab\.(\d)\.attention\.3\.", r".attention.\1.fc2."),
    (r"\.conv_blk\.cab\.", ".attention."),
)


# -- models -----------------------------------------------------------------------------------------------------------


class MambaIR(RestorationFrame):
    """MambaIR at full resolution: images (B, in_chans, H, W) -> (B, in_chans, H * upscale, W * upscale), of any size.

    Args:
        in_chans, upscale, embed_dim, depths, img_range, patch_norm, resi_connection: of `RestorationFrame`.
        upsampler: the head, see `linescan.heads.restoration.frame.HEADS`; with "pixelshuffledirect" the blocks are the
            light ones.
        d_state: states per channel of the scans.
        expand: scanned channels as a multiple of `embed_dim`.
        drop_path_rate: stochastic depth, from 0 at the first block to this at the last.

    Raises:
        InputError: no such upsampler, or not for this scale.
    """

    names = ((r"\.residual_group\.", "."), *BLOCK_NAMES)

    def __init__(
        self,
        in_chans: int = 3,
        upscale: int = 1,
        upsampler: str = "",
        embed_dim: int = 180,
        depths: Sequence[int] = (6, 6, 6, 6, 6, 6),
        d_state: int = 16,
        expand: float = 2.0,
        img_range: float = 1.0,
        patch_norm: bool = True,
        resi_connection: str = "1conv",
        drop_path_rate: float = 0.1,
    ):
        rates = iter(calculate_drop_path_rates(drop_path_rate, sum(depths)))
        light = upsampler == "pixelshuffledirect"

        def group(number: int, depth: int):
            return [ResidualStateSpaceBlock(embed_dim, d_state, expand, light, next(rates)) for _ in range(depth)]

        super().__init__(in_chans, upscale, upsampler, embed_dim, depths, img_range, patch_norm, resi_connection, group)


class Rise(Stage):
    """Half the channels at twice the resolution, the encoder's map beside them, and blocks.

    Args:
        dim: channels of the map below.
        reduce: what follows the concatenation, of `dim` channels.
        blocks: the blocks.
    """

    def __init__(self, dim: int, reduce: nn.Module | None, blocks: Sequence[nn.Module], bias: bool):
        super().__init__(reduce, blocks)
        self.up = ChannelsFirst(nn.Conv2d(dim, 2 * dim, 3, padding=1, bias=bias), nn.PixelShuffle(2))

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return super().forward(torch.cat([self.up(x), skip], -1))


class MambaIRUNet(nn.Module):
    """MambaIR in a U-Net: degraded images (B, in_chans, H, W) -> restored ones, of any size; four levels.

    A side that 8 does not divide is mirrored at the bottom or the right up to it, and the result cut.

    Args:
        in_chans, out_chans: of the images; alike, unless `dual_pixel` is set.
        dim: channels of the first level, doubled from level to level. The decoder's last level has twice as many.
        depths: blocks of the levels; the decoder has as many.
        refinement: blocks after the decoder.
        d_state, expand: of the scans.
        bias: whether convolutions have one.
        dual_pixel: two images of a dual-pixel sensor as input: embedded, they are added before the last convolution,
            instead of the image after it.
    """

    upscale = 1

    def __init__(
        self,
        in_chans: int = 3,
        out_chans: int = 3,
        dim: int = 48,
        depths: Sequence[int] = (4, 6, 6, 8),
        refinement: int = 4,
        d_state: int = 16,
        expand: float = 1.5,
        bias: bool = False,
        dual_pixel: bool = False,
    ):
        super().__init__()
        self.in_chans = in_chans
        dims = [dim * 2**i for i in range(4)]

        def blocks(width: int, depth: int) -> list[nn.Module]:
            return [ResidualStateSpaceBlock(width, d_state, expand) for _ in range(depth)]

        def down(width: int) -> nn.Module:
            conv = nn.Conv2d(width, width // 2, 3, padding=1, bias=bias)
            return ChannelsFirst(conv, nn.PixelUnshuffle(2))

        self.patch_embed = nn.Conv2d(in_chans, dim, 3, padding=1, bias=bias)
        self.encoder = nn.ModuleList(
            Stage(down(dims[i - 1]) if i else None, blocks(dims[i], depths[i])) for i in range(4)
        )
        self.decoder = nn.ModuleList(
            [
                Rise(dims[3], MapConv2d(dims[3], dims[2], 1, bias=bias), blocks(dims[2], depths[2]), bias),
                Rise(dims[2], MapConv2d(dims[2], dims[1], 1, bias=bias), blocks(dims[1], depths[1]), bias),
                Rise(dims[1], None, blocks(dims[1], depths[0]), bias),
            ]
        )
        self.refinement = Stage(None, blocks(dims[1], refinement))
        self.skip_conv = nn.Conv2d(dim, dims[1], 1, bias=bias) if dual_pixel else None
        self.output = nn.Conv2d(dims[1], out_chans, 3, padding=1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        x = mirror_to_multiple(x, 8)
        first = self.patch_embed(x)
        y, skips = first.permute(0, 2, 3, 1), []
        for stage in self.encoder:
            y = stage(y)
            skips.append(y)
        skips.pop()
        for stage in self.decoder:
            y = stage(y, skips.pop())
        y = self.refinement(y).permute(0, 3, 1, 2)
        y = self.output(y) + x if self.skip_conv is None else self.output(y + self.skip_conv(first))
        return y[..., :height, :width]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations in the backward pass, block by block."""
        for stage in (*self.encoder, *self.decoder, self.refinement):
            stage.grad_checkpointing = enable

    def checkpoint_filter(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The official code's keys to linescan's."""
        return fit_shapes(rename(state, [*UNET_NAMES, *BLOCK_NAMES]), self)


# What published files call the levels of the U-Net.
UNET_NAMES = (
    (r"^patch_embed\.proj\.", "patch_embed."),
    (r"^encoder_level(\d)\.", lambda m: f"encoder.{int(m[1]) - 1}.blocks."),
    (r"^latent\.", "encoder.3.blocks."),
    (r"^down(\d)_\d\.body\.", r"encoder.\1.downsample."),
    (r"^up(\d)_\d\.body\.", lambda m: f"decoder.{4 - int(m[1])}.up."),
    (r"^reduce_chan_level(\d)\.", lambda m: f"decoder.{3 - int(m[1])}.downsample."),
    (r"^decoder_level(\d)\.", lambda m: f"decoder.{3 - int(m[1])}.blocks."),
    (r"^refinement\.(?=\d)", "refinement.blocks."),
)


# -- the zoo ----------------------------------------------------------------------------------------------------------

PUBLISHED = {
    "code": "https://github.com/csguoh/MambaIR",
    "licence": "Apache-2.0",
    "inputs": ((3, 64, 64),),
    "first_conv": "conv_first",
}
"""What MambaIR's and MambaIRv2's entries in the zoo share."""

NOISY = "DIV2K, Flickr2K, BSD500, WED"


def enlarging(upscale: int, args: dict, params: float, psnr: float | None = None, ssim: float | None = None) -> dict:
    """A model of super-resolution: millions of parameters, and PSNR and SSIM on Urban100 where they are published."""
    facts = {"args": {**args, "upscale": upscale}, "params": params}
    if psnr is None:
        return facts
    return {**facts, "weights": {"df2k": {"data": "DF2K", "metrics": {"psnr_urban100": psnr, "ssim_urban100": ssim}}}}


def gaussian_noise(psnr: dict[int, float]) -> dict:
    """Weights for Gaussian noise of each standard deviation, of 255, with their PSNR on Urban100."""
    return {f"sigma{sigma}": {"data": NOISY, "metrics": {"psnr_urban100": value}} for sigma, value in psnr.items()}


def jpeg(results: dict[int, tuple[float, float]]) -> dict:
    """Weights for JPEG of each quality, with their PSNR and SSIM on Classic5."""
    return {
        f"q{quality}": {"data": NOISY, "metrics": {"psnr_classic5": psnr, "ssim_classic5": ssim}}
        for quality, (psnr, ssim) in results.items()
    }


CLASSIC = {"upsampler": "pixelshuffle"}
LIGHT = {"upsampler": "pixelshuffledirect", "embed_dim": 60, "depths": (6,) * 4, "d_state": 10, "expand": 1.2}

register(
    MambaIR,
    {
        "mambair_light_x2": enlarging(2, LIGHT, 0.905, 32.92, 0.9356),
        "mambair_light_x3": enlarging(3, LIGHT, 0.913, 29.00, 0.8689),
        "mambair_light_x4": enlarging(4, LIGHT, 0.924, 26.75, 0.8051),
        "mambair_x2": enlarging(2, CLASSIC, 20.422, 34.15, 0.9446),
        "mambair_x3": enlarging(3, CLASSIC, 20.607, 29.93, 0.8841),
        "mambair_x4": enlarging(4, CLASSIC, 20.570, 27.68, 0.8287),
        "mambair_real_x4": enlarging(4, {"upsampler": "nearest+conv"}, 20.385),
        "mambair_color_dn": {
            "args": {"expand": 1.2},
            "params": 15.778,
            "weights": gaussian_noise({15: 35.17, 25: 32.99, 50: 30.07}),
        },
        "mambair_jpeg": {
            "args": {"in_chans": 1, "expand": 1.2},
            "inputs": ((1, 63, 63),),
            "params": 15.771,
            "weights": jpeg({10: (30.27, 0.8256), 30: (33.74, 0.8965), 40: (34.53, 0.9084)}),
        },
    },
    **PUBLISHED,
    task="restoration",
    paper="ECCV 2024, arXiv 2402.15648",
    page="https://github.com/csguoh/MambaIR#model_summary",
)
register(
    MambaIRUNet,
    {
        "mambair_unet_dn": {
            "params": 26.779,
            "weights": {"sidd": {"data": "SIDD", "metrics": {"psnr_sidd": 39.89, "ssim_sidd": 0.960}}},
        },
    },
    **{**PUBLISHED, "first_conv": "patch_embed"},
    task="restoration",
    paper="ECCV 2024, arXiv 2402.15648",
    page="https://github.com/csguoh/MambaIR#model_summary",
)
