"""Masked autoencoder of Vision-RWKV: hidden patches are restored from the visible ones.

Papers: "Masked Autoencoders Are Scalable Vision Learners", He et al., CVPR 2022, arXiv 2111.06377; with Vision-RWKV
"Vision-RWKV: Efficient and Scalable Visual Perception with RWKV-Like Architectures", Duan et al., ICLR 2025,
arXiv 2403.02308. Official code: github.com/OpenGVLab/Vision-RWKV, classification/mae (Apache-2.0).

As published: the visible tokens are a sequence in the order of the draw, each blended with the one before it (there is
no grid to take neighbours from); the position embedding, which starts as a sinusoid, is added twice to the encoder's
tokens and once to the decoder's.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..backbones.vision_rwkv import VisionRWKV
from ..layers.pos_embed import sinusoid_2d
from ..layers.rwkv import QuadShift

__all__ = ["MaskedAutoencoder", "PreviousShift", "patches_of"]


class PreviousShift(nn.Module):
    """Each token's predecessor in the sequence; zeros before the first."""

    def forward(self, x: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """x (B, L, C) -> the same shape; there is no grid."""
        return F.pad(x, (0, 0, 1, -1))


def patches_of(images: Tensor, size: int) -> Tensor:
    """Images (B, C, H, W) -> their patches, row-major, (B, H / size * W / size, size * size * C)."""
    batch, channels, height, width = images.shape
    if height % size or width % size:
        raise ValueError(f"images of {height}x{width} pixels do not fall into patches of {size}x{size}")
    x = images.view(batch, channels, height // size, size, width // size, size)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, size * size * channels)


class MaskedAutoencoder(nn.Module):
    """Images and an order of their patches -> the restored patches.

    Args:
        encoder: the backbone to be trained; what it looks like afterwards is not changed.
        decoder: a narrower one of the same input, whose blocks and positions are used.

    Raises:
        ValueError: a backbone with a class token.
    """

    def __init__(self, encoder: VisionRWKV, decoder: VisionRWKV):
        super().__init__()
        if encoder.cls_token is not None:
            raise ValueError("masked pre-training is for a Vision-RWKV without class token")
        self.patch_size = encoder.patch_size
        decoder.patch_embed = nn.Identity()
        self.encoder, self.decoder = encoder, decoder
        self.enter = nn.Linear(encoder.embed_dim, decoder.embed_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder.embed_dim))
        self.predict = nn.Linear(decoder.embed_dim, encoder.patch_size**2 * encoder.in_chans)
        for module in list(self.modules()):
            if isinstance(getattr(module, "shift", None), QuadShift):
                module.shift = PreviousShift()
        self.init_weights()

    def init_weights(self) -> None:
        """The published initialisation: Xavier for every linear map and for patches, sinusoids for positions."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.encoder.patch_embed.weight.flatten(1))
        nn.init.normal_(self.mask_token, std=0.02)
        with torch.no_grad():
            for trunk in (self.encoder, self.decoder):
                trunk.pos_embed.copy_(sinusoid_2d(trunk.native_grid, trunk.embed_dim))

    def no_weight_decay(self) -> set[str]:
        """Positions and the mask token."""
        return {"encoder.pos_embed", "decoder.pos_embed", "mask_token"}

    def forward(self, images: Tensor, order: Tensor, visible: int) -> Tensor:
        """The patches that the decoder restores, (B, N, patch_size ** 2 * C), row-major.

        Args:
            images: (B, C, H, W), of sides that the patch size divides.
            order: (B, N), a permutation of the patches of each image; the first `visible` of them are seen, in this
                order.
            visible: how many patches are seen.
        """
        tokens, grid, _ = self.encoder.embed(images)
        tokens = tokens + self.encoder.positions(grid).flatten(1, 2)  # once more: `embed` has added it already
        seen = order[:, :visible, None]
        tokens = tokens.gather(1, seen.expand(-1, -1, tokens.shape[2]))
        for block in self.encoder.blocks:
            tokens = self.encoder.run_unit(block, tokens, (grid,))
        tokens = self.enter(self.encoder.norm(tokens))
        hidden = self.mask_token.to(tokens.dtype).expand(len(tokens), order.shape[1], -1)
        tokens = hidden.scatter(1, seen.expand(-1, -1, tokens.shape[2]), tokens)
        tokens = tokens + self.decoder.positions(grid).flatten(1, 2)
        for block in self.decoder.blocks:
            tokens = self.decoder.run_unit(block, tokens, (grid,))
        return self.predict(self.decoder.norm(tokens))
