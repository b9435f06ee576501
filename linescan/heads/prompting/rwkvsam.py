"""RWKV-SAM: an image and prompts (points, boxes, masks) -> a mask for each prompt, and its expected IoU.

Paper: "Mamba or RWKV: Exploring High-Quality and High-Efficiency Segment Anything Model", Yuan et al., 2024, arXiv
2406.19369. Official code: github.com/HarborYuan/ovsam (S-Lab License 1.0: not for commercial use). Its authors have
published no weights. Prompt encoder and mask decoder: "Segment Anything", Kirillov et al., ICCV 2023, arXiv 2304.02643
(github.com/facebookresearch/segment-anything, Apache-2.0). Written from the papers and the facts of the code.

    image -> encoder -> maps of strides 4, 8, 16 -> `encode`, once for an image
    prompts -> `prompt_encoder` -> tokens -> `decode`, with the image's features -> logits of masks at stride 4
"""

from typing import NamedTuple, Sequence

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d, to_2tuple
from torch import Tensor, nn

from ...backbones.contract import check_images
from ...backbones.rwkvsam import RWKVSAM
from ...checkpoint import rename, strip_prefix
from ...errors import InputError
from ...layers.norm import LayerNorm
from ...zoo import register

__all__ = ["ImageFeatures", "MaskDecoder", "PromptEncoder", "RWKVSAMPrompter"]

STRIDE = 16  # of the image embedding


class ImageFeatures(NamedTuple):
    """What the decoder reads of images: (B, dim, H / 16, W / 16), and details (B, C, ...) at strides 8 and 4."""

    embedding: Tensor
    stride8: Tensor
    stride4: Tensor


def layer_norm2d(dim: int) -> nn.Module:
    return LayerNorm2d(dim, eps=1e-6)


# -- prompts ----------------------------------------------------------------------------------------------------------


class PromptEncoder(nn.Module):
    """Points, boxes and masks -> tokens and a map, in float32 at least for the positions.

    A position is sines and cosines of random frequencies, which are part of the weights.

    Args:
        dim: channels of tokens and map.
        mask_dim: channels between the convolutions over masks.
    """

    def __init__(self, dim: int = 256, mask_dim: int = 16):
        super().__init__()
        self.register_buffer("frequencies", torch.randn(2, dim // 2))
        self.point = nn.Embedding(4, dim)  # background, foreground, and a box's two corners
        self.not_a_point = nn.Embedding(1, dim)
        self.no_mask = nn.Embedding(1, dim)
        self.mask = nn.Sequential(
            nn.Conv2d(1, mask_dim // 4, 2, 2),
            layer_norm2d(mask_dim // 4),
            nn.GELU(),
            nn.Conv2d(mask_dim // 4, mask_dim, 2, 2),
            layer_norm2d(mask_dim),
            nn.GELU(),
            nn.Conv2d(mask_dim, dim, 1),
        )

    def positions(self, where: Tensor) -> Tensor:
        """Places (..., 2) as shares (x, y) of the sides -> (..., dim), float32."""
        angle = 2 * torch.pi * ((2 * where.float() - 1) @ self.frequencies.float())
        return torch.cat([angle.sin(), angle.cos()], -1)

    def grid(self, height: int, width: int) -> Tensor:
        """Positions of the cells of a map, (1, dim, height, width)."""
        rows, columns = ((torch.arange(n, device=self.frequencies.device) + 0.5) / n for n in (height, width))
        y, x = torch.meshgrid(rows, columns, indexing="ij")
        return self.positions(torch.stack([x, y], -1)).permute(2, 0, 1)[None].to(self.frequencies.dtype)

    def forward(
        self,
        size: tuple[int, int],
        points: Tensor | None = None,
        labels: Tensor | None = None,
        boxes: Tensor | None = None,
        point_size: tuple[int, int] | None = None,
    ) -> Tensor:
        """Prompts -> their tokens (P, n, dim).

        Args:
            size: height and width of the image in pixels.
            points: (P, N, 2), (x, y) in pixels.
            labels: (P, N): 1 for a point on the object, 0 beside it, -1 for none; by default all are on it.
            boxes: (P, 4), (x0, y0, x1, y1) in pixels.
            point_size: height and width that points are shares of; by default `size`.
        """
        dtype, tokens = self.frequencies.dtype, []
        if points is not None:
            labels = labels if labels is not None else torch.ones(points.shape[:2], dtype=torch.long)
            labels = labels.to(points.device)
            where = points
            if boxes is None:  # as SAM has it: one token that is no point stands for the box
                where, labels = F.pad(points, (0, 0, 0, 1)), F.pad(labels, (0, 1), value=-1)
            height, width = point_size or size
            at = self.positions((where.float() + 0.5) / where.new_tensor((width, height)).float())
            own = at + self.point(labels.clamp_min(0))
            tokens.append(torch.where((labels < 0)[..., None], self.not_a_point.weight.to(own), own))
        if boxes is not None:
            corners = boxes.unflatten(-1, (2, 2)).float() + 0.5
            at = self.positions(corners / corners.new_tensor((size[1], size[0])))
            tokens.append(at + self.point.weight[2:])
        return torch.cat(tokens, 1).to(dtype)

    def dense(self, masks: Tensor | None = None) -> Tensor:
        """Logits of earlier masks (P, 1, H / 4, W / 4), or none -> what the embedding gets, (P or 1, dim, ...)."""
        return self.no_mask.weight[..., None, None] if masks is None else self.mask(masks)


# -- decoder ----------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Softmax attention of some tokens to others: out_proj(softmax(q k / sqrt(d)) v).

    Args:
        dim: channels in and out.
        inner: channels of queries, keys and values.
        num_heads: heads.
    """

    def __init__(self, dim: int, inner: int, num_heads: int = 8):
        super().__init__()
        self.num_heads = num_heads
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, inner) for _ in range(3))
        self.out_proj = nn.Linear(inner, dim)

    @torch.no_grad()
    def attend_to_alike(self, gain: float = 1.5) -> None:
        """Starts with the same map for queries and keys: what is alike attends to each other, places first of all.

        Without it, it takes long until prompts have an effect: after 200 steps on scenes of digits, mIoU with one click
        is 0.13, with it 0.71.
        """
        self.q_proj.weight.mul_(gain)
        self.k_proj.weight.copy_(self.q_proj.weight)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (P, n, dim), k and v (P, m, dim) -> (P, n, dim)."""
        projected = self.q_proj(q), self.k_proj(k), self.v_proj(v)
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in projected)
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Perceptron(nn.Module):
    """Linear layers with ReLU between.

    Args:
        dims: channels in, between and out.
    """

    def __init__(self, *dims: int):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(dims[:-1], dims[1:]))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


class TwoWayBlock(nn.Module):
    """Prompts attend to prompts, then to the image, then go through an MLP; at last the image attends to prompts.

    Args:
        dim: channels.
        hidden: channels of the MLP.
        first: the first block, whose prompts attend to each other without positions and without a shortcut.
    """

    def __init__(self, dim: int, hidden: int, first: bool):
        super().__init__()
        self.first = first
        self.self_attn = Attention(dim, dim)
        self.to_image = Attention(dim, dim // 2)
        self.to_tokens = Attention(dim, dim // 2)
        self.mlp = Perceptron(dim, hidden, dim)
        self.norm1, self.norm2, self.norm3, self.norm4 = (LayerNorm(dim) for _ in range(4))
        self.to_image.attend_to_alike()
        self.to_tokens.attend_to_alike()

    def forward(self, tokens: Tensor, image: Tensor, token_pos: Tensor, image_pos: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (P, n, dim), cells of the image (P, m, dim) and the positions of both -> both."""
        if self.first:
            tokens = self.norm1(self.self_attn(tokens, tokens, tokens))
        else:
            q = tokens + token_pos
            tokens = self.norm1(tokens + self.self_attn(q, q, tokens))
        keys = image + image_pos
        tokens = self.norm2(tokens + self.to_image(tokens + token_pos, keys, image))
        tokens = self.norm3(tokens + self.mlp(tokens))
        return tokens, self.norm4(image + self.to_tokens(keys, tokens + token_pos, tokens))


def _refine(layer: nn.Module, inner: int, out_dim: int) -> nn.Sequential:
    return nn.Sequential(layer, layer_norm2d(inner), nn.GELU(), nn.Conv2d(inner, out_dim, 3, padding=1))


class MaskDecoder(nn.Module):
    """SAM's two-way decoder, whose mask features are joined with the encoder's maps of strides 4 and 8.

    Of the four masks and scores that SAM tells apart, the first is used; the tokens of the others stand in the files.
    As first made, unlike SAM's, a token and the cells at its place attend to each other (`Attention.attend_to_alike`).

    Args:
        dim: channels of tokens and image embedding.
        detail_dims: channels of the maps of strides 4 and 8.
        depth: two-way blocks.
        hidden: channels of their MLPs.
    """

    def __init__(self, dim: int, detail_dims: Sequence[int], depth: int = 2, hidden: int = 2048):
        super().__init__()
        high, middle = detail_dims
        quarter, out = dim // 4, dim // 8
        self.iou_token = nn.Embedding(1, dim)
        self.mask_tokens = nn.Embedding(4, dim)
        self.blocks = nn.ModuleList(TwoWayBlock(dim, hidden, i == 0) for i in range(depth))
        self.last = Attention(dim, dim // 2)
        self.last.attend_to_alike()
        self.norm = LayerNorm(dim)
        self.upscale = nn.Sequential(
            nn.ConvTranspose2d(dim, quarter, 2, 2),
            layer_norm2d(quarter),
            nn.GELU(),
            nn.ConvTranspose2d(quarter, out, 2, 2),
            nn.GELU(),
        )
        self.stride4 = _refine(nn.Conv2d(high, quarter, 3, padding=1), quarter, out)
        self.stride8 = _refine(nn.ConvTranspose2d(middle, quarter, 2, 2), quarter, out)
        self.mix = _refine(nn.Conv2d(3 * out, quarter, 3, padding=1), quarter, out)
        self.to_mask = Perceptron(dim, dim, dim, out)
        self.to_iou = Perceptron(dim, dim, dim, 4)

    def forward(self, features: ImageFeatures, tokens: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Masks and scores.

        Args:
            features: of the images, the maps of strides 8 and 4 as `stride8` and `stride4` made them, and what prompts
                say of the whole image (`PromptEncoder.dense`) in the embedding; of one image for all prompts, or of
                one for each.
            tokens: (P, n, dim), of the prompts.
            positions: (1, dim, h, w), of the embedding's cells.

        Returns:
            Logits (P, 1, 4 h, 4 w), and the expected IoU (P, 1).
        """
        prompts, grid = tokens.shape[0], features.embedding.shape[-2:]
        own = torch.cat([self.iou_token.weight, self.mask_tokens.weight[:1]])
        start = x = torch.cat([own.expand(prompts, -1, -1), tokens], 1)
        image = features.embedding.expand(prompts, -1, -1, -1).flatten(2).mT
        where = positions.flatten(2).mT
        for block in self.blocks:
            x, image = block(x, image, start, where)
        x = self.norm(x + self.last(x + start, image + where, image))
        coarse = self.upscale(image.mT.unflatten(-1, grid))
        details = (y.expand(prompts, -1, -1, -1) for y in (features.stride8, features.stride4))
        fused = coarse + self.mix(torch.cat([coarse, *details], 1))
        masks = torch.einsum("pc,pchw->phw", self.to_mask(x[:, 1]), fused)
        return masks[:, None], self.to_iou(x[:, 0])[:, :1]


# -- the whole --------------------------------------------------------------------------------------------------------


class RWKVSAMPrompter(nn.Module):
    """RWKV-SAM: images and prompts -> masks.

        features = model.encode(image)  # once
        logits, iou = model.decode(features, points=...)  # for any number of prompts

    Args:
        img_size: side that images are scaled and padded to; points are shares of it, boxes of the image's own size.
        in_chans: input channels.
        dims, depths, mlp_ratio, pos_embed, kernel, drop_path_rate: of the encoder, `RWKVSAM`.
        dim: channels of tokens and image embedding, a multiple of 16.
    """

    pretrained_cfg = {
        "input_size": (3, 1024, 1024), "interpolation": "bilinear", "crop_pct": 1.0,
        "mean": (123.675 / 255, 116.28 / 255, 103.53 / 255), "std": (58.395 / 255, 57.12 / 255, 57.375 / 255),
    }  # fmt: skip

    def __init__(
        self,
        img_size: int | tuple[int, int] = 1024,
        in_chans: int = 3,
        dims: Sequence[int] = (64, 128, 384),
        depths: Sequence[int] = (2, 4, 14),
        mlp_ratio: int = 2,
        pos_embed: bool = False,
        kernel: bool = False,
        drop_path_rate: float = 0.0,
        dim: int = 256,
    ):
        super().__init__()
        if len(depths) != 3:
            raise InputError(f"the decoder reads maps of strides 4, 8 and 16: depths are 3 numbers, not {depths}")
        if dim % 16:
            raise InputError(f"dim is a multiple of 16, not {dim}")
        self.img_size, self.in_chans = to_2tuple(img_size), in_chans
        self.backbone = RWKVSAM(
            img_size, in_chans, 0, dims=dims, depths=depths, mlp_ratio=mlp_ratio, pos_embed=pos_embed, kernel=kernel,
            drop_path_rate=drop_path_rate,
        )  # fmt: skip
        self.neck = nn.Sequential(
            nn.Conv2d(dims[-1], dim, 1, bias=False),
            layer_norm2d(dim),
            nn.Conv2d(dim, dim, 3, padding=1, bias=False),
            layer_norm2d(dim),
        )
        self.prompt_encoder = PromptEncoder(dim)
        self.decoder = MaskDecoder(dim, dims[:2])

    def encode(self, x: Tensor) -> ImageFeatures:
        """Images (B, in_chans, H, W), sides multiples of 16 -> what `decode` reads of them.

        Raises:
            InputError: a side that 16 does not divide.
        """
        check_images(x, self.in_chans, STRIDE, type(self).__name__)
        if x.shape[-1] % STRIDE or x.shape[-2] % STRIDE:
            raise InputError(f"RWKV-SAM reads images whose sides are multiples of 16, not {x.shape[-2]}x{x.shape[-1]}")
        high, middle, last = self.backbone.forward_intermediates(x, intermediates_only=True)
        return ImageFeatures(self.neck(last), self.decoder.stride8(middle), self.decoder.stride4(high))

    def decode(
        self,
        features: ImageFeatures,
        points: Tensor | None = None,
        labels: Tensor | None = None,
        boxes: Tensor | None = None,
        masks: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One mask for each of P prompts, all to one image, or each to its own.

        Args:
            features: of one image, or of P.
            points, labels, boxes: of `PromptEncoder.forward`, in pixels of the image that was encoded.
            masks: logits (P, 1, H / 4, W / 4) of an earlier answer.

        Returns:
            Logits (P, 1, H / 4, W / 4), above 0 on the object, and the expected IoU (P, 1).

        Raises:
            InputError: no points and no boxes, or another number of prompts.
        """
        given = [x for x in (points, labels, boxes, masks) if x is not None]
        if (points is None and boxes is None) or any(x.shape[0] != given[0].shape[0] for x in given):
            raise InputError("a prompt has points or a box (or both), and all arguments are of the same prompts")
        grid = features.embedding.shape[-2:]
        size = STRIDE * grid[0], STRIDE * grid[1]
        tokens = self.prompt_encoder(size, points, labels, boxes, self.img_size)
        features = features._replace(embedding=features.embedding + self.prompt_encoder.dense(masks))
        return self.decoder(features, tokens, self.prompt_encoder.grid(*grid))

    def forward(
        self,
        x: Tensor,
        points: Tensor | None = None,
        labels: Tensor | None = None,
        boxes: Tensor | None = None,
        masks: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Images (B, in_chans, H, W) and prompts of `decode`, one for each image or all for one -> as `decode`."""
        return self.decode(self.encode(x), points, labels, boxes, masks)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the encoder's activations in the backward pass, block by block."""
        self.backbone.set_grad_checkpointing(enable)

    def checkpoint_filter(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The official code's keys to linescan's."""
        own = {key: value for key, value in state.items() if not key.startswith("backbone.")}
        inner = self.backbone.checkpoint_filter(strip_prefix(state, "backbone."))
        own = rename(own, OFFICIAL_NAMES)
        rows = sorted(key for key in own if key.startswith("prompt_encoder.points."))
        if rows:
            own["prompt_encoder.point.weight"] = torch.cat([own.pop(key) for key in rows])
        return own | {f"backbone.{key}": value for key, value in inner.items()}


OFFICIAL_NAMES = (
    (r"^neck\.out_proj\.", "neck."),
    (r"^pe\.pe_layer\.positional_encoding_gaussian_matrix$", "prompt_encoder.frequencies"),
    (r"^pe\.mask_downscaling\.", "prompt_encoder.mask."),
    (r"^pe\.point_embeddings\.(\d)\.weight$", r"prompt_encoder.points.\1"),
    (r"^pe\.(no_mask|not_a_point)_embed\.", r"prompt_encoder.\1."),
    (r"^mask_decoder\.mask_decoder\.", "decoder."),
    (r"^mask_decoder\.([hm])r_feat_proj\.", lambda m: f"decoder.stride{'4' if m[1] == 'h' else '8'}."),
    (r"^mask_decoder\.mix_feat_proj\.", "decoder.mix."),
    (r"^decoder\.transformer\.layers\.", "decoder.blocks."),
    (r"^decoder\.transformer\.final_attn_token_to_image\.", "decoder.last."),
    (r"^decoder\.transformer\.norm_final_attn\.", "decoder.norm."),
    (r"^decoder\.output_upscaling\.", "decoder.upscale."),
    (r"^decoder\.output_hypernetworks_mlps\.0\.", "decoder.to_mask."),
    (r"^decoder\.iou_prediction_head\.", "decoder.to_iou."),
    (r"\.cross_attn_token_to_image\.", ".to_image."),
    (r"\.cross_attn_image_to_token\.", ".to_tokens."),
    (r"\.mlp\.lin([12])\.", lambda m: f".mlp.layers.{int(m[1]) - 1}."),
)


# -- the zoo ----------------------------------------------------------------------------------------------------------

register(
    RWKVSAMPrompter,
    {
        "rwkvsam_small_prompt": {"args": {"dims": (64, 128, 384)}, "params": 24.242},
        "rwkvsam_base_prompt": {"args": {"dims": (128, 256, 768)}},
    },
    task="prompting",
    inputs=((3, 1024, 1024), (1, 2)),  # an image and its points
    first_conv="backbone.patch_embed.0",
    paper="preprint 2024, arXiv 2406.19369",
    code="https://github.com/HarborYuan/ovsam",
    licence="S-Lab-1.0",
)
