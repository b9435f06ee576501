"""Masked pre-training: VideoMamba for clips against the tokens of a frozen teacher, Vision-RWKV against pixels.

Papers: "VideoMamba: State Space Model for Efficient Video Understanding", Li et al., ECCV 2024, arXiv 2403.06977, after
"Unmasked Teacher", Li et al., ICCV 2023, arXiv 2303.16058; masked autoencoders: see `linescan.heads.mae`.

What is trained becomes a backbone without a classifier, which `linescan train --task classify --checkpoint` fine-tunes.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from .. import zoo
from ..backbones.videomamba import VideoMamba, VideoMambaPretrain
from ..backbones.vision_rwkv import VisionRWKV
from ..engine.cards import ModelCard, preprocess_of
from ..engine.image_sets import Digits, ImageSet, open_data
from ..engine.samples import Samples, reader
from ..errors import InputError
from ..heads.mae import MaskedAutoencoder, patches_of
from .base import HeldOutLosses, Task, build_model
from .recipes import PretrainingRecipe
from .teacher import Teacher

__all__ = ["PretrainingTask", "TokenTeacher", "draw_mask"]


# -- masks -------------------------------------------------------------------------------------------------------------


def draw_mask(noise: Tensor, kind: str, ratio: float, importance: Tensor | None = None) -> Tensor:
    """Which tokens of a clip are hidden: bool (B, T * H * W), of the same number in every sample.

    Args:
        noise: uniform random numbers in (0, 1), (B, T, H, W): the mask is a function of them.
        kind: "random": anywhere; "tube": the same places in every frame; "row": whole rows, of any frames; "frame-row":
            whole rows, equally many in each frame; "attention": equally many in each frame, the visible ones drawn
            without replacement with a probability proportional to `importance`.
        ratio: the share that is hidden, rounded down (in a frame, for all but "random").
        importance: (B, T, H * W), for "attention".
    """
    frames, height, width = noise.shape[1:]

    def hidden(scores: Tensor, count: int) -> Tensor:
        """The `count` lowest of the last axis."""
        return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, scores.argsort(-1)[..., :count], True)

    per_frame = int(ratio * height * width)
    if kind == "random":
        return hidden(noise.flatten(1), int(ratio * frames * height * width))
    if kind == "tube":
        return hidden(noise[:, :1].flatten(2), per_frame).expand(-1, frames, -1).flatten(1)
    if kind == "row":
        rows = hidden(noise[..., 0].flatten(1), frames * int(ratio * height))
        return rows.repeat_interleave(width, 1)
    if kind == "frame-row":
        return hidden(noise[..., 0], int(ratio * height)).repeat_interleave(width, 2).flatten(1)
    # The largest of log p + Gumbel noise are a draw without replacement.
    gumbel = -torch.log(-torch.log(noise.flatten(2).clamp(1e-7, 1 - 1e-7)))
    return hidden(importance.clamp(min=1e-30).log() + gumbel, per_frame).flatten(1)


class Unlabelled(Dataset):
    """Items {"input": an image or a clip, "noise": random numbers in (0, 1) of the shape of its patches}."""

    def __init__(self, images: ImageSet, read, patches: tuple[int, ...]):
        self.samples, self.patches = Samples(images, read), patches
        self.in_memory = images.in_memory

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input": self.samples[index]["input"], "noise": torch.rand(self.patches)}


# -- against a teacher's tokens ----------------------------------------------------------------------------------------


class TokenTeacher(Teacher):
    """The tokens of an image model, frame by frame, and where its class token attends to.

    Args:
        layers: how many of the last blocks give tokens.
        interval: blocks between them.
        project: put tokens through the model's head, as CLIP's projection.
        attends: whether attention is wanted.
        kwargs: of `Teacher`.

    Raises:
        InputError: a model without such tokens.
    """

    def __init__(self, *args, layers: int = 1, interval: int = 1, project: bool = False, attends: bool = False):
        super().__init__(*args)
        depth = len(getattr(self.model, "blocks", ()))
        self.taps = [depth - 1 - i * interval for i in reversed(range(layers))]
        if self.taps[0] < 0 or not hasattr(self.model, "forward_intermediates"):
            raise InputError(
                f"the teacher has {depth} blocks of tokens; {layers} of them, {interval} apart, are wanted"
            )
        self.head = self.model.get_classifier() if project else nn.Identity()
        self.attention: Tensor | None = None
        if attends:
            last = getattr(self.model.blocks[-1], "attn", None)
            if not hasattr(last, "attn_drop") or not getattr(self.model, "num_prefix_tokens", 0):
                raise InputError("--mask attention needs a teacher with attention and a class token, as timm's vit_*")
            last.fused_attn = False  # the fused kernel shows no attention
            last.attn_drop.register_forward_hook(self._keep)
        self.width = self.head.out_features if isinstance(self.head, nn.Linear) else self.model.num_features

    def _keep(self, module: nn.Module, inputs: tuple, attention: Tensor) -> None:
        self.attention = attention[:, :, 0, self.model.num_prefix_tokens :].mean(1)

    @torch.no_grad()
    def forward(self, clips: Tensor, step: int = 1) -> tuple[Tensor, Tensor | None]:
        """Clips (B, C, T, H, W) -> targets of unit length (layers, B, 1 + T * N, width), and attention (B, T, N).

        The class target is the mean of the frames' class tokens (of all tokens, where the model has none).

        Args:
            step: frames per token of the student; the teacher reads the middle one.
        """
        frames = self.prepare(clips[:, :, step // 2 :: step])
        batch, length = frames.shape[0], frames.shape[2]
        frames = frames.transpose(1, 2).flatten(0, 1)
        taps = self.model.forward_intermediates(
            frames, indices=self.taps, return_prefix_tokens=True, norm=False, output_fmt="NLC", intermediates_only=True
        )  # fmt: skip
        targets = []
        for tap in taps:
            patches, prefix = tap if isinstance(tap, tuple) else (tap, None)
            first = patches.mean(1, keepdim=True) if prefix is None else prefix[:, :1]
            first = first.unflatten(0, (batch, length)).mean(1)
            patches = patches.unflatten(0, (batch, length)).flatten(1, 2)
            targets.append(F.normalize(self.head(torch.cat([first, patches], 1)).float(), dim=-1))
        attention, self.attention = self.attention, None
        return torch.stack(targets), None if attention is None else attention.float().unflatten(0, (batch, length))


class Aligned(nn.Module):
    """A `VideoMambaPretrain` called as a module, so that it can be wrapped: (clips, mask) -> decoded tokens."""

    def __init__(self, student: VideoMambaPretrain):
        super().__init__()
        self.student = student

    def forward(self, clips: Tensor, mask: Tensor) -> Tensor:
        """(layers, B, visible, width), unit length."""
        return self.student.forward_decoded(clips, mask)[0]


# -- the task ----------------------------------------------------------------------------------------------------------


class PretrainingTask(Task):
    """Images or clips -> a loss on what is masked, without labels.

    Raises:
        InputError: a model that cannot be pre-trained, or a teacher that does not fit it.
    """

    recipe: PretrainingRecipe

    def __init__(self, recipe: PretrainingRecipe):
        super().__init__(recipe)
        channels = Digits.channels if recipe.data == "digits" else ImageSet.channels
        self.args = {"in_chans": channels, **recipe.model_args, "num_classes": 0}
        self.backbone = build_model(recipe, **self.args)  # what is saved for use; its weights are those of `model`
        frames = getattr(self.backbone, "num_frames", 0)
        self.preprocess = preprocess_of(self.backbone, self.args["in_chans"], self.args.get("img_size"))
        self.unit = "clips" if frames else "images"
        images, held_out = open_data(recipe.data, recipe.val, recipe.holdout, bool(frames), labelled=False)
        if frames and isinstance(self.backbone, VideoMamba):
            self._align()
        elif isinstance(self.backbone, VisionRWKV):
            self._restore()
        else:
            raise InputError(
                f"{recipe.model} cannot be pre-trained on what is masked; VideoMamba's models for clips "
                "(videomamba_video_*) and Vision-RWKV (vrwkv_*) can"
            )
        augment = recipe.augment or ("light" if recipe.data == "digits" else "crop")
        augmented = reader(self.preprocess, frames, augment=augment, flip=recipe.flip)
        self.data = Unlabelled(images, augmented, self.patches)
        plain = reader(self.preprocess, frames, augment="none" if frames else None)
        self.evaluator = HeldOutLosses(self, Unlabelled(held_out, plain, self.patches))

    def _align(self) -> None:
        recipe, backbone = self.recipe, self.backbone
        if not (recipe.teacher or recipe.teacher_checkpoint):
            raise InputError(f"pre-training {recipe.model} needs --teacher, a model's name, or --teacher-checkpoint")
        grid = (backbone.native_grid[0], backbone.native_grid[1])
        self.patches = (backbone.num_frames // backbone.tubelet_size, *grid)
        self.mask = recipe.mask or "attention"
        self.ratio = 0.8 if recipe.mask_ratio is None else recipe.mask_ratio
        self.teacher = TokenTeacher(
            recipe.teacher, recipe.teacher_checkpoint, recipe.teacher_args, self.preprocess,
            layers=recipe.layers, interval=recipe.interval, project=recipe.project, attends=self.mask == "attention",
        )  # fmt: skip
        self._check_grid(grid)
        entry = zoo.find(recipe.model)
        options = {"drop_path_rate": recipe.drop_path, **entry.args, **self.args}
        options.pop("num_classes")
        student = VideoMambaPretrain(
            output_dim=self.teacher.width, return_layers=recipe.layers, return_interval=recipe.interval,
            include_last=recipe.include_last, **options,
        )  # fmt: skip
        student.load_state_dict(self.backbone.state_dict(), strict=False)  # all but the decoders
        if not recipe.include_last:  # as published, the last block is not trained
            student.blocks[-1].requires_grad_(False)
        if recipe.layers == 1:
            student.norm.requires_grad_(False)
        self.model = Aligned(student)

    def _check_grid(self, grid: tuple[int, int]) -> None:
        """The teacher's tokens must stand on the student's grid."""
        clip = torch.zeros(1, self.preprocess.channels, self.backbone.num_frames, *self.preprocess.size[1:])
        try:
            targets, _ = self.teacher(clip, self.backbone.tubelet_size)
        except (AssertionError, ValueError, TypeError) as error:
            raise InputError(f"the teacher gives no tokens: {error}") from None
        tokens, frames = targets.shape[2] - 1, self.patches[0]
        if tokens != frames * grid[0] * grid[1]:
            raise InputError(
                f"the teacher has {tokens // frames} tokens per frame, the student {grid[0]}x{grid[1]}; another "
                "--teacher-arg img_size=N makes them agree"
            )

    def _restore(self) -> None:
        recipe, backbone = self.recipe, self.backbone
        if recipe.teacher or recipe.teacher_checkpoint or recipe.mask:
            raise InputError(f"{recipe.model} is pre-trained against pixels: it has no --teacher and no --mask")
        self.patches = (backbone.native_grid[0] * backbone.native_grid[1],)
        self.ratio = 0.75 if recipe.mask_ratio is None else recipe.mask_ratio
        count = self.patches[0]
        visible = int(count * (1 - self.ratio))
        if not 0 < visible < count:
            raise InputError(f"--mask-ratio {self.ratio} leaves {visible} of {count} patches visible")
        narrow = {"embed_dim": recipe.decoder_dim, "depth": recipe.decoder_depth}
        entry = zoo.find(recipe.model)
        options = {"drop_path_rate": recipe.drop_path, **entry.args, **self.args}
        self.model = MaskedAutoencoder(VisionRWKV(**options), VisionRWKV(**{**options, **narrow}))

    def forward(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        inputs, noise = batch["input"], batch["noise"]
        if isinstance(self.backbone, VideoMamba):
            targets, attention = self.teacher(inputs, self.backbone.tubelet_size)
            mask = F.pad(draw_mask(noise, self.mask, self.ratio, attention), (1, 0))  # the class token is visible
            targets = targets[:, ~mask].unflatten(1, (len(inputs), -1))
            decoded = model(inputs, mask)
            return {"loss": (2 - 2 * (decoded.float() * targets).sum(-1)).mean(), "output": decoded[-1]}
        order = noise.argsort(1)
        visible = int(order.shape[1] * (1 - self.ratio))
        restored = model(inputs, order, visible)
        target = patches_of(inputs, self.backbone.patch_size)
        if self.recipe.norm_pixels:
            target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6) ** 0.5
        error = (restored.float() - target).square().mean(-1).gather(1, order[:, visible:])
        return {"loss": error.mean(), "output": restored}

    def product(self, model: nn.Module) -> nn.Module:
        """The backbone, of the same storage as what is trained."""
        trained = model.student if isinstance(self.backbone, VideoMamba) else model.encoder
        state = trained.state_dict()
        self.backbone.load_state_dict({name: state[name] for name in self.backbone.state_dict()}, assign=True)
        return self.backbone

    def card(self) -> ModelCard:
        return ModelCard(self.recipe.model, self.args, [], self.preprocess)

    def checkpoint_gradients(self) -> None:
        for module in self.model.modules():
            if hasattr(module, "set_grad_checkpointing"):
                module.set_grad_checkpointing()
