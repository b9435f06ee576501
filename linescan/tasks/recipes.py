"""The recipes of all tasks: what `linescan train --task NAME` can be told, and what it does by default.

Each task adds its options to those of `Recipe`. Nothing here imports torch.
"""

import json
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from ..engine.configs import find_config
from ..engine.recipe import (
    AUGMENT,
    COUNT,
    DATA,
    LOSS,
    MODEL,
    NATURAL,
    OPTIMISER,
    POSITIVE,
    SHARE,
    UNIT,
    Range,
    Recipe,
    check_options,
    option,
)
from ..errors import InputError

if sys.version_info < (3, 11):
    import tomli as tomllib
else:
    import tomllib

__all__ = [
    "RECIPES",
    "AnomalyRecipe",
    "ChangeRecipe",
    "ClassificationRecipe",
    "CloudRecipe",
    "DistillationRecipe",
    "EncoderDistillationRecipe",
    "OccupancyRecipe",
    "PartsRecipe",
    "PointClassificationRecipe",
    "PointPretrainingRecipe",
    "PretrainingRecipe",
    "PromptingRecipe",
    "RestorationRecipe",
    "ScanDetectionRecipe",
    "SegmentationRecipe",
    "VolumeSegmentationRecipe",
    "read_options",
    "read_recipe",
]


@dataclass(frozen=True)
class _Mirrored(Recipe):
    flip: float | None = option(
        None, "How often a sample is mirrored; default: 0.5, and 0 with --augment light.", AUGMENT, UNIT
    )  # fmt: skip


@dataclass(frozen=True)
class _Taught(Recipe):
    teacher: str | None = option(None, "A name of `linescan list`, or of timm. Default: that of --teacher-checkpoint.",
                                 MODEL)  # fmt: skip
    teacher_checkpoint: str | None = option(
        None, "The teacher's weights; without them the published ones are fetched.", MODEL
    )  # fmt: skip
    teacher_args: dict = option({}, "An argument of the teacher; may be repeated.", MODEL, metavar="KEY=VALUE")


@dataclass(frozen=True)
class ClassificationRecipe(_Mirrored):
    """Train a classifier of images, or of videos if the model is one for clips."""

    task: ClassVar[str] = "classify"
    implementation: ClassVar[str] = "linescan.tasks.classify:ClassificationTask"
    default_model: ClassVar[str] = "vim_tiny_patch16_224"
    judges: ClassVar[bool] = True
    scored: ClassVar[str] = "A folder of classes, or `digits` (those held out)."
    examples: ClassVar[tuple[str, ...]] = (
        "linescan train --data digits --out runs/digits --epochs 30 --model-arg img_size=32 --model-arg patch_size=8 "
        "--model-arg depth=4",
        "linescan train --data flowers --out runs/flowers --model vim_small_patch16_224 --pretrained --epochs 30 "
        "--mixup 0.8 --cutmix 1 --ema 0.9998 --bf16",
        "linescan train --data flowers --out runs/flowers [dim](the same options)[/] --resume",
        "linescan train --data clips --out runs/clips --model videomamba_video_tiny_patch16_224.k400_f8 --pretrained",
        "torchrun --standalone --nproc_per_node=4 -m linescan train --data imagenet --out runs/imagenet --epochs 300",
        "linescan train --config segmentation/vmamba_tiny_upernet_ade20k --cfg-options train_dataloader.batch_size=4",
    )

    views: str = option(
        "1x1", "Of each held-out video: clips x crops, as in 4x3, whose mean is scored.", DATA, metavar="CLIPSxCROPS",
        scoring=True,
    )  # fmt: skip
    smoothing: float = option(0.1, "Label smoothing.", LOSS, SHARE)
    augment: str | None = option(
        None, "none, light, standard, or a policy of timm; default: light for the digits, rand-m9-mstd0.5-inc1 for RGB "
        "images, rand-m5-n2-mstd0.5-inc1 for videos, standard for grey ones and RGBA, else crop.", AUGMENT,
    )  # fmt: skip
    erasing: float = option(0.0, "How often a rectangle is erased.", AUGMENT, UNIT)
    mixup: float = option(0.0, "Strength of mixup; 0: none.", AUGMENT, NATURAL)
    cutmix: float = option(0.0, "Strength of cutmix; 0: none.", AUGMENT, NATURAL)
    repeats: int = option(
        1, "Augmented copies of each sample in a row; an epoch then has this many times fewer samples.", AUGMENT, COUNT
    )  # fmt: skip

    def __post_init__(self):
        super().__post_init__()
        if (self.mixup or self.cutmix) and self.batch % 2:
            raise InputError(f"mixup and cutmix pair samples up: --batch must be even, not {self.batch}")


@dataclass(frozen=True)
class DistillationRecipe(ClassificationRecipe, _Taught):
    """Train a classifier to match a frozen teacher as well as the labels."""

    task: ClassVar[str] = "distill"
    judges: ClassVar[bool] = False  # what comes out is a classifier
    implementation: ClassVar[str] = "linescan.tasks.distill:DistillationTask"
    examples: ClassVar[tuple[str, ...]] = (
        "linescan train --task distill --data flowers --out runs/student --teacher vim_small_patch16_224 "
        "--model vim_tiny_patch16_224 --pretrained",
        "linescan train --task distill --data digits --out runs/student --match features "
        "--teacher-checkpoint runs/demo/best.safetensors --model scan_tiny --model-arg img_size=32",
    )

    match: str = option(
        "soft", "What is matched: soft (the teacher's probabilities), hard (its best class), features (before the "
        "classifier) or tokens (of the last layer, as VideoMamba distils itself).", LOSS,
        choices=("soft", "hard", "features", "tokens"),
    )  # fmt: skip
    temperature: float = option(1.0, "Of soft probabilities.", LOSS, POSITIVE)
    label_weight: float = option(1.0, "Of the loss against the labels.", LOSS, NATURAL)
    match_weight: float = option(1.0, "Of the loss against the teacher.", LOSS, POSITIVE)

    def __post_init__(self):
        super().__post_init__()
        if not (self.teacher or self.teacher_checkpoint):
            raise InputError("--task distill needs --teacher, a model's name, or --teacher-checkpoint")


@dataclass(frozen=True)
class EncoderDistillationRecipe(_Taught):
    """Train an image encoder without labels to match the map of features of a frozen teacher: RWKV-SAM's of SAM's.

    The teacher is a model, or the folder of its features, where it cannot be had. What comes out is the whole model;
    `--task prompting --checkpoint` or `--task classify --checkpoint` trains the rest.
    """

    task: ClassVar[str] = "distill-encoder"
    implementation: ClassVar[str] = "linescan.tasks.distill_encoder:EncoderDistillationTask"
    default_model: ClassVar[str] = "rwkvsam_small_prompt"
    examples: ClassVar[tuple[str, ...]] = (
        "linescan train --task distill-encoder --data photos --out runs/encoder --teacher samvit_base_patch16.sa1b",
        "linescan train --task distill-encoder --data photos --out runs/encoder --features sam_features --bf16",
        "linescan train --task prompting --data coco --out runs/coco --checkpoint runs/encoder/model.safetensors",
    )

    data: str = option(..., "`digits`; a folder of images, in folders or not; or one with train/ and val/ in it.", DATA,
                       short="-d")  # fmt: skip
    features: str | None = option(
        None, "Instead of a teacher: a folder with NAME.npz for each image NAME.jpg of --data and --val, folders "
        "alike; of one array (channels, height, width) each.", DATA,
    )  # fmt: skip
    flip: float = option(0.5, "How often an image is mirrored; with --features never.", AUGMENT, UNIT)
    epochs: int = option(24, "Times that each sample is seen.", OPTIMISER, COUNT, short="-e")
    batch: int = option(2, "Images in one forward pass of a process.", OPTIMISER, COUNT, short="-b")
    lr: float = option(1e-4, "Highest learning rate.", OPTIMISER, POSITIVE)
    warmup: float = option(0.0, "Epochs in which the learning rate rises from 0.", OPTIMISER, NATURAL)

    def __post_init__(self):
        super().__post_init__()
        if bool(self.teacher or self.teacher_checkpoint) == bool(self.features):
            raise InputError("--task distill-encoder needs --teacher, --teacher-checkpoint, or --features instead")
        if self.features and self.data == "digits":
            raise InputError("--features are of files, which the digits are not")


@dataclass(frozen=True)
class PretrainingRecipe(_Mirrored, _Taught):
    """Train a backbone without labels on what is masked; `--task classify --checkpoint` fine-tunes the result.

    A VideoMamba for clips reads the visible tokens and matches a frozen teacher's; a Vision-RWKV restores the hidden
    patches from the visible ones (MAE).
    """

    task: ClassVar[str] = "pretrain"
    implementation: ClassVar[str] = "linescan.tasks.pretrain:PretrainingTask"
    default_model: ClassVar[str] = "vrwkv_base"
    examples: ClassVar[tuple[str, ...]] = (
        "linescan train --task pretrain --data imagenet --out runs/mae --model vrwkv_base --model-arg key_norm=true "
        "--drop-path 0.1",
        "linescan train --task pretrain --data clips --out runs/masked --model videomamba_video_middle_patch16_224 "
        "--teacher vit_base_patch16_clip_quickgelu_224.openai --project --drop-path 0.4 --bf16",
        "linescan train --data clips --out runs/tuned --checkpoint runs/masked/model.safetensors",
    )

    data: str = option(..., "`digits`; a folder of files, in folders or not; or one with train/ and val/ in it.", DATA,
                       short="-d")  # fmt: skip
    mask_ratio: float | None = option(
        None, "The share of patches that is hidden; default: 0.75 of an image, 0.8 of a clip.", LOSS,
        Range(above=0, below=1),
    )  # fmt: skip
    mask: str | None = option(
        None, "Where patches of a clip are hidden: attention (seldom where the teacher's class token attends to; the "
        "default), random, tube (alike in all frames), row (whole rows) or frame-row (equally many in each frame).",
        LOSS, choices=("attention", "random", "tube", "row", "frame-row"),
    )  # fmt: skip
    project: bool = option(False, "Put the teacher's tokens through its head, as CLIP's projection.", MODEL)
    layers: int = option(1, "For clips: how many of the last layers are matched.", LOSS, COUNT)
    interval: int = option(1, "Blocks between two of these layers.", LOSS, COUNT)
    include_last: bool = option(
        False, "For clips: train the last block too, which the published training left out.", LOSS
    )  # fmt: skip
    decoder_dim: int = option(512, "For images: channels of the decoder.", MODEL, COUNT)
    decoder_depth: int = option(8, "For images: blocks of the decoder.", MODEL, COUNT)
    norm_pixels: bool = option(False, "For images: normalise the pixels of each patch that is restored.", LOSS)
    augment: str | None = option(
        None, "none, light, crop, standard, or a policy of timm; default: light for the digits, else crop.", AUGMENT
    )  # fmt: skip

    epochs: int = option(800, "Times that each sample is seen.", OPTIMISER, COUNT, short="-e")
    lr: float = option(1.5e-4, "Highest learning rate; as published, times the samples per step / 256.", OPTIMISER,
                       POSITIVE)  # fmt: skip
    betas: tuple[float, float] | None = option((0.9, 0.95), "Decay of the mean and of the variance of the gradient.",
                                               OPTIMISER, SHARE)  # fmt: skip
    warmup: float = option(40.0, "Epochs in which the learning rate rises from 0.", OPTIMISER, NATURAL)


@dataclass(frozen=True)
class SegmentationRecipe(Recipe):
    """Train a model that says the class of each pixel, on images and their masks.

    The defaults are those of MHS-VM's published runs: cross-entropy and Dice loss, images that are resized to one size,
    mirrored, flipped and turned. Configs of mmseg are trained with --config instead.
    """

    task: ClassVar[str] = "segmentation"
    implementation: ClassVar[str] = "linescan.tasks.segment:SegmentationTask"
    default_model: ClassVar[str] = "mhsvm_vmunet_4h"
    judges: ClassVar[bool] = True
    scored: ClassVar[str] = "A folder with images/ and masks/ in it; of one with train/ and val/ (or test/) the latter."
    examples: ClassVar[tuple[str, ...]] = (
        "linescan train --task segmentation --data isic18 --out runs/isic18 --model-arg threshold=0.5",
        "linescan train --task segmentation --data streets --out runs/streets --model segman_seg_tiny --size 512x512 "
        "--augment mirror+scale --dice-weight 0 --lr 1e-4 --bf16",
        "linescan train --task segmentation --data MFNet --out runs/mfnet --model sigma_tiny --encoder-checkpoint "
        "vssmtiny.pth --size 480x640 --dice-weight 0 --batch 8 --epochs 500 --lr 6e-5 --schedule poly --warmup 10",
        "linescan train --task segmentation --data lesions --out runs/tuned --checkpoint best_4h.pth --model "
        "mhsvm_vmunet_4h --lr 1e-4 --epochs 50",
        "linescan evaluate --task segmentation --data isic18 --checkpoint runs/isic18/best.safetensors",
        "linescan segment lesion.jpg --checkpoint runs/isic18/best.safetensors",
    )

    data: str = option(..., "A folder with images/ and masks/ (files of the same names) in it, extra/ for models that "
                       "read two images of a scene, and classes.txt for more than two classes; one with such folders "
                       "train/ and val/ in it; or MFNet, PST900, NYUDepth v2 or SUN RGB-D in Sigma's layout.", DATA,
                       short="-d")  # fmt: skip
    val: str | None = option(None, "A folder with images/ and masks/ to hold out. Default: by --holdout.", DATA)
    size: str | None = option(
        None, "What is trained on: whole images, resized to it, or with --augment scale parts of them. Default: the "
        "checkpoint's or the model's, else 256x256.", DATA, metavar="HEIGHTxWIDTH",
    )  # fmt: skip
    augment: str | None = option(
        None, "Words joined by +: mirror (left and right), flip (upside down), rotate (by any angle), scale (by 0.5 to "
        "2, and cut); or none. Default: mirror+flip+rotate, and mirror+scale for models that do not resize images to "
        "one size.", AUGMENT,
    )  # fmt: skip
    scales: str = option("1", "Scales of the test, whose answers are added up, as in 0.75,1,1.25.", DATA,
                         metavar="SCALE,...", scoring=True)  # fmt: skip
    mirror: bool = option(False, "Add the answers for the mirrored images in the test.", DATA, scoring=True)
    dice_weight: float = option(1.0, "Of the Dice loss beside cross-entropy.", LOSS, NATURAL)
    encoder_checkpoint: str | None = option(
        None, "Start the encoder from these weights of a classifier; for Sigma of a vmamba_vanilla_*.", MODEL
    )  # fmt: skip

    epochs: int = option(300, "Times that each sample is seen.", OPTIMISER, COUNT, short="-e")
    batch: int = option(32, "Samples in one forward pass of a process.", OPTIMISER, COUNT, short="-b")
    lr: float = option(1e-3, "Highest learning rate.", OPTIMISER, POSITIVE)
    weight_decay: float = option(0.01, "Weight decay.", OPTIMISER, NATURAL)
    warmup: float = option(0.0, "Epochs in which the learning rate rises from 0.", OPTIMISER, NATURAL)

    def __post_init__(self):
        super().__post_init__()
        self.sides, self.factors  # noqa: B018 - refuse what is none

    @property
    def factors(self) -> list[float]:
        """`scales` as numbers."""
        try:
            factors = [float(part) for part in self.scales.split(",")]
        except ValueError:
            factors = []
        if not factors or not all(0.1 <= factor <= 10 for factor in factors):
            raise InputError(f"--scales are numbers of 0.1 to 10 with commas between, as in 0.75,1,1.25, not "
                             f"{self.scales!r}")  # fmt: skip
        return factors

    def resumed(self) -> "SegmentationRecipe":
        """The recipe of a run that goes on, whose weights are all in its state."""
        return replace(self, pretrained=False, checkpoint=None, encoder_checkpoint=None)

    @property
    def sides(self) -> tuple[int, int] | None:
        """`size` as numbers."""
        if self.size is None:
            return None
        parts = self.size.lower().split("x")
        if len(parts) > 2 or not all(part.isdecimal() and int(part) for part in parts):
            raise InputError(f"--size must be as in 256 or 480x640 (height x width), not {self.size!r}")
        return int(parts[0]), int(parts[-1])


@dataclass(frozen=True)
class VolumeSegmentationRecipe(Recipe):
    """Train a Mamba-ND with UNETR's decoder, which says what each voxel of a volume is.

    It trains on cubes, half of which have their middle in an organ, mirrored, turned, brighter and darker at random,
    and is scored on whole volumes.
    """

    task: ClassVar[str] = "volume-segmentation"
    implementation: ClassVar[str] = "linescan.tasks.segment_volumes:VolumeSegmentationTask"
    default_model: ClassVar[str] = "mamband_unetr_small"
    judges: ClassVar[bool] = True
    scored: ClassVar[str] = "A folder as for training; what is held out there is scored."
    examples: ClassVar[tuple[str, ...]] = (
        "linescan train --task volume-segmentation --data btcv --out runs/btcv --bf16 --evaluate-every 50",
        "linescan train --task volume-segmentation --data hearts --out runs/hearts --spacing 1 1 1 --intensity 0 1500 "
        "--window 64",
        "linescan evaluate --task volume-segmentation --data btcv --checkpoint runs/btcv/best.safetensors",
        "linescan segment abdomen.nii.gz --checkpoint runs/btcv/best.safetensors",
    )

    data: str = option(..., "A folder with dataset.json in it, as BTCV and the Medical Segmentation Decathlon have it; "
                       "or such a file.", DATA, short="-d")  # fmt: skip
    val: str | None = option(None, "As --data; what is held out there is scored instead.", DATA)
    holdout: float = option(0.1, "The share of volumes that is held out, where the list does not say which.", DATA,
                            Range(above=0, below=1), scoring=True)  # fmt: skip
    spacing: tuple[float, float, float] | None = option(
        None, "Millimetres from voxel to voxel that volumes are resampled to; default: the checkpoint's, or the "
        "model's (1.5 1.5 2).", DATA, POSITIVE, metavar="X Y Z",
    )  # fmt: skip
    intensity: tuple[float, float] | None = option(
        None, "What becomes 0 and what 1; default: the checkpoint's, or the model's (-175 250, for CT).", DATA,
        Range(), metavar="LOW HIGH",
    )  # fmt: skip
    window: int | None = option(None, "Side of the cubes; default: the checkpoint's, or the model's (96).", DATA,
                                Range(least=16, most=1024))  # fmt: skip
    repeats: int = option(4, "Cubes of each volume in an epoch.", AUGMENT, COUNT)
    dice_weight: float = option(1.0, "Of the Dice loss beside cross-entropy.", LOSS, NATURAL)

    epochs: int = option(5000, "Times that each volume is seen.", OPTIMISER, COUNT, short="-e")
    batch: int = option(4, "Cubes in one forward pass of a process.", OPTIMISER, COUNT, short="-b")
    lr: float = option(1e-4, "Highest learning rate.", OPTIMISER, POSITIVE)
    weight_decay: float = option(1e-5, "Weight decay.", OPTIMISER, NATURAL)
    warmup: float = option(50.0, "Epochs in which the learning rate rises from 0.", OPTIMISER, NATURAL)


@dataclass(frozen=True)
class RestorationRecipe(Recipe):
    """Train a network that restores images: enlarges them, or takes away noise or the traces of JPEG.

    It trains on pairs of images, or on sharp images that are degraded on the fly. The defaults are those that
    MambaIR's published runs share, but for their length.
    """

    task: ClassVar[str] = "restoration"
    implementation: ClassVar[str] = "linescan.tasks.restore:RestorationTask"
    default_model: ClassVar[str] = "mambair_v2_light_x2"
    judges: ClassVar[bool] = True
    scored: ClassVar[str] = "A folder of sharp images; or one with folders high and low of pairs in it."
    examples: ClassVar[tuple[str, ...]] = (
        "linescan train --task restoration --data photos --out runs/x2 --model mambair_v2_light_x2 --repeats 100",
        "linescan train --task restoration --data photos --out runs/dn --model mambair_color_dn --patch 128 "
        "--degrade 'noise 0-50' --loss charbonnier --bf16",
        "linescan train --task restoration --data pairs --out runs/x3 --model mambair_v2_light_x3 "
        "--checkpoint mambairv2_lightSR_x2.pth --steps 250000 --ema 0.999",
    )

    data: str = option(..., "A folder of sharp images; or one with folders high (sharp) and low (degraded, of the same "
                       "names) in it; or one with such folders train/ and val/ in it.", DATA, short="-d")  # fmt: skip
    degrade: str | None = option(
        None, "What is done to sharp images where there are no pairs, in this order: bicubic (smaller, as Matlab does "
        "it), noise S (Gaussian, of 255), jpeg Q; S and Q may be ranges, as in 'bicubic, noise 0-15, jpeg 60-95'. "
        "Default: bicubic, for a model that enlarges.", AUGMENT, metavar="STEPS", scoring=True,
    )  # fmt: skip
    patch: int = option(64, "Side of the patches, in pixels of the degraded image.", AUGMENT, COUNT)
    repeats: int = option(1, "Patches of each image in an epoch.", AUGMENT, COUNT)
    stages: str | None = option(
        None, "Patches that grow: side x batch : steps, of each stage, as in '128x8:92000, 192x4:48000, 384x1:24000'; "
        "the last stage goes on to the end. --patch and --batch are the largest.", AUGMENT, metavar="SIDExBATCH:STEPS",
    )  # fmt: skip
    mixup: float = option(0.0, "Strength of mixup, of every second batch; 0: none.", AUGMENT, NATURAL)
    loss: str = option("l1", "The loss: l1, or charbonnier (L1, smooth at 0).", LOSS, choices=("l1", "charbonnier"))
    measure: str | None = option(
        None, "PSNR and SSIM are of y (luma) or rgb; default: rgb for noise and for pairs of one size, else y.", DATA,
        choices=("y", "rgb"), scoring=True,
    )  # fmt: skip
    crop: int | None = option(None, "Pixels at each border that are not scored; default: the model's scale, and 0 "
                              "for a model that does not enlarge.", DATA, NATURAL, scoring=True)  # fmt: skip

    batch: int = option(16, "Patches in one forward pass of a process.", OPTIMISER, COUNT, short="-b")
    optimizer: str = option("adam", "An optimiser of timm: adam, adamw, sgd, lion, muon, ...", OPTIMISER)
    lr: float = option(2e-4, "Highest learning rate.", OPTIMISER, POSITIVE)
    betas: tuple[float, float] | None = option((0.9, 0.99), "Decay of the mean and of the variance of the gradient.",
                                               OPTIMISER, SHARE)  # fmt: skip
    weight_decay: float = option(0.0, "Weight decay.", OPTIMISER, NATURAL)
    warmup: float = option(0.0, "Epochs in which the learning rate rises from 0.", OPTIMISER, NATURAL)

    def __post_init__(self):
        super().__post_init__()
        for side, batch, _ in self.growth:
            if side > self.patch or batch > self.batch:
                raise InputError(f"--stages has {batch} patches of {side}: --patch and --batch are at least as large, "
                                 f"not {self.patch} and {self.batch}")  # fmt: skip

    @property
    def growth(self) -> list[tuple[int, int, int]]:
        """`stages` as numbers: side, batch, steps."""
        if self.stages is None:
            return []
        number = r"\s*([1-9]\d*)\s*"
        parts = [re.fullmatch(f"{number}x{number}:{number}", part) for part in self.stages.split(",")]
        if not all(parts):
            raise InputError("--stages is side x batch : steps, with commas between, as in '128x8:92000, 192x4:48000', "
                             f"not {self.stages!r}")  # fmt: skip
        return [tuple(map(int, part.groups())) for part in parts]


FALSE_ALARMS = 0.01
"""The share of normal images that may be above a threshold chosen on them, where nothing else is said."""


@dataclass(frozen=True)
class AnomalyRecipe(Recipe):
    """Train a MambaAD on normal images alone, to find what is not normal: it rebuilds the features of a frozen teacher.

    The defaults are those of the published runs. Held-out images are scored by image, and by pixel where there are
    masks; `threshold` is the score that all but --false-alarms of the held-out normal images stay below.
    """

    task: ClassVar[str] = "anomaly"
    implementation: ClassVar[str] = "linescan.tasks.anomaly:AnomalyTask"
    default_model: ClassVar[str] = "mambaad_resnet34"
    judges: ClassVar[bool] = True
    scored: ClassVar[str] = "As for training; what is held out there is scored."
    examples: ClassVar[tuple[str, ...]] = (
        "linescan train --task anomaly --data mvtec --out runs/mvtec --evaluate-every 100",
        "linescan train --task anomaly --data screws --out runs/screws --epochs 100 --model-arg teacher=resnet18 "
        "--teacher-checkpoint runs/teacher/best.safetensors",
        "linescan evaluate --task anomaly --data mvtec --checkpoint mambaad_mvtec.pth --model mambaad_resnet34",
    )

    data: str = option(..., "MVTec-AD (CLASS/train/good, CLASS/test/..., or one CLASS alone), VisA, or any folder of "
                       "normal images.", DATA, short="-d")  # fmt: skip
    val: str | None = option(None, "A folder as --data, whose held-out images are scored instead.", DATA)
    holdout: float = option(0.1, "The share of normal images that is held out, where the folder does not say which.",
                            DATA, Range(above=0, below=1), scoring=True)  # fmt: skip
    size: int | None = option(None, "Side that images are resized to, a multiple of 32; default: 256, or the "
                              "checkpoint's.", DATA, Range(least=64))  # fmt: skip
    false_alarms: float = option(0.05, "The share of held-out normal images that `threshold` lets pass as defective.",
                                 DATA, SHARE, scoring=True)  # fmt: skip
    teacher_checkpoint: str | None = option(
        None, "The teacher's weights: a file of the classifier that --model-arg teacher= names, or `random`; default: "
        "those that timm fetches. A --checkpoint has them.", MODEL,
    )  # fmt: skip

    epochs: int = option(1000, "Times that each sample is seen.", OPTIMISER, COUNT, short="-e")
    batch: int = option(16, "Samples in one forward pass of a process.", OPTIMISER, COUNT, short="-b")
    lr: float = option(5e-3, "Highest learning rate.", OPTIMISER, POSITIVE)
    betas: tuple[float, float] | None = option((0.9, 0.999), "Decay of the mean and of the variance of the gradient.",
                                               OPTIMISER, SHARE)  # fmt: skip
    weight_decay: float = option(1e-4, "Weight decay.", OPTIMISER, NATURAL)
    schedule: str = option(
        "step", "How the learning rate falls.", OPTIMISER,
        choices=("cosine", "constant", "poly", "step", "multistep", "tanh", "wsd"),
    )  # fmt: skip
    decay_every: float = option(800.0, "Epochs between two falls of step.", OPTIMISER, POSITIVE)
    warmup: float = option(0.0, "Epochs in which the learning rate rises from 0.", OPTIMISER, NATURAL)

    def __post_init__(self):
        super().__post_init__()
        if self.size is not None and self.size % 32:
            raise InputError(f"--size must be a multiple of 32, not {self.size}")

    def resumed(self) -> "AnomalyRecipe":
        """The recipe of a run that goes on, whose weights are all in its state: the teacher's, too."""
        return replace(self, pretrained=False, checkpoint=None, teacher_checkpoint="random")


@dataclass(frozen=True)
class ChangeRecipe(Recipe):
    """Train a Mamba-FCS on pairs of images of a place, of two dates, to say what has changed from what to what.

    The defaults are those of the published run on SECOND (100,000 steps of 8 pairs). Sets with one folder of labels
    train a model of changes alone.
    """

    task: ClassVar[str] = "change"
    implementation: ClassVar[str] = "linescan.tasks.change:ChangeTask"
    default_model: ClassVar[str] = "mambafcs_base"
    judges: ClassVar[bool] = True
    scored: ClassVar[str] = "A folder as for training; of one with test/ (or val/) in it that part."
    examples: ClassVar[tuple[str, ...]] = (
        "linescan train --task change --data SECOND --out runs/second --encoder-checkpoint imagenet",
        "linescan train --task change --data Landsat-SCD --classes Landsat-SCD --out runs/landsat --crop 416 "
        "--augment turn --encoder-checkpoint vssm_base_0229_ckpt_epoch_237.pth --sek-from 150000",
        "linescan train --task change --data town --out runs/town --checkpoint second.pth --lr 2e-5 --epochs 50 --bf16",
        "linescan train --task change --data LEVIR-CD --out runs/levir --model mambafcs_base_binary "
        "--encoder-checkpoint imagenet",
        "linescan evaluate --task change --data SECOND --model mambafcs_base.second --checkpoint second.pth",
    )

    data: str = option(..., "A folder with im1, im2, label1 and label2 in it as SECOND has them, or A, B, labelA and "
                       "labelB; A, B and label for changes alone; or one with such folders train/ and test/ in it.",
                       DATA, short="-d")  # fmt: skip
    val: str | None = option(None, "Such a folder to hold out. Default: what is there, or by --holdout.", DATA)
    classes: str | None = option(
        None, "Names of the classes with commas between, `unchanged` first; or SECOND, or Landsat-SCD. Default: those "
        "of classes.txt in the folder, one in a line, or of SECOND.", DATA, metavar="NAME,NAME,...",
    )  # fmt: skip
    crop: int = option(512, "Side of the squares that are trained on.", AUGMENT, Range(least=32))
    augment: str = option("turn+jitter", "Words joined by +: turn (the eight symmetries), jitter (brightness, contrast "
                          "and saturation of each image); or none.", AUGMENT)  # fmt: skip
    encoder_checkpoint: str | None = option(
        None, "Start the encoder from these weights of a VMamba classifier, or from `imagenet`, the published ones of "
        "vmamba_base_s2l15.", MODEL,
    )  # fmt: skip
    semantic_weight: float = option(0.5, "Of the cross entropy of the classes.", LOSS, NATURAL)
    lovasz_weight: float = option(0.5, "Of the Lovasz loss of changes and classes.", LOSS, NATURAL)
    sek_weight: float = option(0.5, "Of the SeK loss.", LOSS, NATURAL)
    sek_from: int = option(0, "Steps without the SeK loss at first: as published 150000 on Landsat-SCD.", LOSS, NATURAL)
    similarity_weight: float = option(0.05, "Of the likeness of both dates where nothing has changed.", LOSS, NATURAL)

    epochs: int = option(270, "Times that each sample is seen.", OPTIMISER, COUNT, short="-e")
    batch: int = option(8, "Pairs in one forward pass of a process.", OPTIMISER, COUNT, short="-b")
    lr: float = option(1e-4, "Highest learning rate.", OPTIMISER, POSITIVE)
    weight_decay: float = option(5e-4, "Weight decay.", OPTIMISER, NATURAL)
    schedule: str = option(
        "step", "How the learning rate falls.", OPTIMISER,
        choices=("cosine", "constant", "poly", "step", "multistep", "tanh", "wsd"),
    )  # fmt: skip
    decay_rate: float | None = option(
        0.5, "Factor of step and multistep, or the power of poly.", OPTIMISER, POSITIVE
    )  # fmt: skip
    decay_every: float = option(27.0, "Epochs between two falls of step.", OPTIMISER, POSITIVE)
    warmup: float = option(0.0, "Epochs in which the learning rate rises from 0.", OPTIMISER, NATURAL)

    def __post_init__(self):
        super().__post_init__()
        if self.crop <= 32 and self.batch == 1:
            raise InputError("--crop 32 needs a --batch of 2 or more: one pixel is left of a pair, and no norm of one")

    def resumed(self) -> "ChangeRecipe":
        """The recipe of a run that goes on, whose weights are all in its state."""
        return replace(self, pretrained=False, checkpoint=None, encoder_checkpoint=None)


@dataclass(frozen=True)
class PromptingRecipe(Recipe):
    """Train a promptable segmentor, RWKV-SAM, on the masks of objects: clicks and boxes are drawn from them.

    Held-out objects are scored with one click each, and with one box.
    """

    task: ClassVar[str] = "prompting"
    implementation: ClassVar[str] = "linescan.tasks.prompt_training:PromptingTask"
    default_model: ClassVar[str] = "rwkvsam_small_prompt"
    judges: ClassVar[bool] = True
    scored: ClassVar[str] = "`digits`, or a folder as for training; of each what is held out."
    examples: ClassVar[tuple[str, ...]] = (
        "linescan train --task prompting --data digits --out runs/prompt --epochs 5 --batch 8 --objects 4 --lr 1e-3 "
        "--flip 0 --model-arg img_size=96 --model-arg 'dims=[16,32,96]' --model-arg 'depths=[1,1,4]' "
        "--model-arg dim=128",
        "linescan train --task prompting --data coco --out runs/coco --checkpoint encoder.safetensors --bf16",
        "linescan evaluate --task prompting --data digits --checkpoint runs/prompt/best.safetensors",
        "linescan prompt photo.jpg --checkpoint runs/prompt/best.safetensors --point 120,80",
    )

    data: str = option(..., "`digits` (scenes of them); a folder with images/ and instances.json (COCO's) in it; one "
                       "with such folders train/ and val/ in it; or COCO as it comes.", DATA, short="-d")  # fmt: skip
    holdout: float = option(0.1, "Without --val: the share of images that is held out.", DATA,
                            Range(above=0, below=1), scoring=True)  # fmt: skip
    objects: int = option(8, "Objects of each image in a step: half of them shown by a click, half by a box.", DATA,
                          Range(least=2))  # fmt: skip
    flip: float = option(0.5, "How often an image is mirrored.", AUGMENT, UNIT)
    epochs: int = option(12, "Times that each sample is seen.", OPTIMISER, COUNT, short="-e")
    batch: int = option(4, "Images in one forward pass of a process.", OPTIMISER, COUNT, short="-b")
    lr: float = option(1e-4, "Highest learning rate.", OPTIMISER, POSITIVE)
    warmup: float = option(0.2, "Epochs in which the learning rate rises from 0.", OPTIMISER, NATURAL)
    clip_grad: float | None = option(1.0, "Largest norm of the gradient.", OPTIMISER, POSITIVE)


# -- point clouds -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CloudRecipe(Recipe):
    """What all tasks on point clouds can be told; defaults as PointMamba was trained (arXiv 2402.10739)."""

    data: str = option(..., "`digits`; a folder of classes; one with train/ and val/ in it; or ModelNet40 or "
                       "ShapeNetPart as they come.", DATA, short="-d")  # fmt: skip
    points: int | None = option(None, "Points of a cloud that the model reads; default: as the checkpoint or the "
                                "published model does, as for the next three.", DATA, COUNT)  # fmt: skip
    features: str | None = option(None, "What it reads beside coordinates: normals, colours, intensity.", DATA)
    fit: str | None = option(
        None, "sphere (each cloud is moved and scaled into the unit sphere) or none.", DATA, choices=("sphere", "none")
    )  # fmt: skip
    up: str | None = option(None, "The axis that points upwards: y or z.", DATA, choices=("y", "z"))
    columns: str | None = option(None, "Names for columns of files without, as in 'x y z nx ny nz label'.", DATA,
                                 scoring=True)  # fmt: skip
    augment: str | None = option(
        None, "Words joined by +: rotate (about the upward axis), turn (about any), scale, shift, jitter, drop; or "
        "none. Default: scale+shift, and rotate with --fit none.", AUGMENT,
    )  # fmt: skip

    epochs: int = option(300, "Times that each sample is seen.", OPTIMISER, COUNT, short="-e")
    batch: int = option(32, "Samples in one forward pass of a process.", OPTIMISER, COUNT, short="-b")
    lr: float = option(3e-4, "Highest learning rate.", OPTIMISER, POSITIVE)
    warmup: float = option(10.0, "Epochs in which the learning rate rises from 0.", OPTIMISER, NATURAL)
    min_lr: float | None = option(1e-6, "Learning rate at the end of cosine, poly, tanh and wsd.", OPTIMISER, NATURAL)
    clip_grad: float | None = option(10.0, "Largest norm of the gradient.", OPTIMISER, POSITIVE)


@dataclass(frozen=True)
class PointClassificationRecipe(CloudRecipe):
    """Train a classifier of point clouds: PointMamba or Mamba3D."""

    task: ClassVar[str] = "points"
    implementation: ClassVar[str] = "linescan.tasks.points:PointClassificationTask"
    default_model: ClassVar[str] = "pointmamba_modelnet40"
    judges: ClassVar[bool] = True
    scored: ClassVar[str] = "A folder of classes (of ModelNet40, its test set), or `digits` (those held out)."
    examples: ClassVar[tuple[str, ...]] = (
        "linescan train --task points --data scans --out runs/scans --pretrained --drop-path 0.1",
        "linescan train --task points --data ModelNet40 --out runs/mamba3d --model mamba3d_modelnet40 --lr 5e-4 "
        "--drop-path 0.2",
        "linescan train --task points --data scans --out runs/tuned --checkpoint runs/masked/model.safetensors",
        "linescan train --task points --data ModelNet40 --out runs/few --few-shot 5x10 --fold 3 --epochs 150",
        "linescan evaluate --task points --data ModelNet40 --model pointmamba_modelnet40 --votes 10",
    )

    augment: str | None = option(
        None, "Words joined by +: rotate (about the upward axis), turn (about any), scale, shift, jitter, drop; or "
        "none. Default: scale+shift, and rotate with --fit none.", AUGMENT, scoring=True,
    )  # fmt: skip
    votes: int = option(0, "Draws of each held-out cloud, augmented, whose mean is scored; 0: the cloud as it is.",
                        DATA, NATURAL, scoring=True)  # fmt: skip
    smoothing: float = option(0.0, "Label smoothing.", LOSS, SHARE)
    few_shot: str | None = option(
        None, "Train on so many clouds of so many classes, drawn by --fold, and score on 20 others of each class.",
        DATA, metavar="WAYSxSHOTS",
    )  # fmt: skip
    fold: int = option(0, "Another draw of --few-shot; papers average ten.", DATA, NATURAL)

    def __post_init__(self):
        super().__post_init__()
        self.shots  # noqa: B018 - refuses what is none

    @property
    def shots(self) -> tuple[int, int] | None:
        """`few_shot` as numbers."""
        if self.few_shot is None:
            return None
        parts = self.few_shot.lower().split("x")
        if len(parts) != 2 or not all(part.isdecimal() and int(part) for part in parts):
            raise InputError(f"--few-shot must be as in 5x10, 5 classes and 10 clouds of each, not {self.few_shot!r}")
        return int(parts[0]), int(parts[1])


@dataclass(frozen=True)
class PartsRecipe(CloudRecipe):
    """Train a model that names the part that each point of a cloud belongs to, given the kind of object."""

    task: ClassVar[str] = "point-parts"
    implementation: ClassVar[str] = "linescan.tasks.point_parts:PartsTask"
    default_model: ClassVar[str] = "pointmamba_old_shapenetpart"
    judges: ClassVar[bool] = True
    scored: ClassVar[str] = "A folder of kinds of objects whose points have labels, or `digits` (those held out)."
    examples: ClassVar[tuple[str, ...]] = (
        "linescan train --task point-parts --data shapenetcore_partanno_segmentation_benchmark_v0_normal "
        "--out runs/parts --pretrained --drop-path 0.2",
        "linescan train --task point-parts --data scans --out runs/parts --checkpoint runs/masked/model.safetensors",
        "linescan evaluate --task point-parts --data scans --checkpoint runs/parts/best.safetensors",
    )

    data: str = option(..., "`digits`; a folder of kinds of objects, whose points have labels; one with train/ and "
                       "val/ in it; or ShapeNetPart as it comes. parts.txt in it may name the parts.", DATA,
                       short="-d")  # fmt: skip
    batch: int = option(16, "Samples in one forward pass of a process.", OPTIMISER, COUNT, short="-b")
    lr: float = option(2e-4, "Highest learning rate.", OPTIMISER, POSITIVE)


@dataclass(frozen=True)
class PointPretrainingRecipe(CloudRecipe):
    """Train a PointMamba without labels: hidden patches of clouds are restored from the visible ones.

    What comes out is the encoder; `--task points --checkpoint` or `--task point-parts --checkpoint` fine-tunes it.
    """

    task: ClassVar[str] = "point-pretrain"
    implementation: ClassVar[str] = "linescan.tasks.point_pretrain:PointPretrainingTask"
    default_model: ClassVar[str] = "pointmamba_mae"
    examples: ClassVar[tuple[str, ...]] = (
        "linescan train --task point-pretrain --data shapes --out runs/masked --drop-path 0.1",
        "linescan train --task point-pretrain --data shapes --out runs/masked "
        "--model-arg backbone=pointmamba_scanobjectnn",
        "linescan train --task points --data scans --out runs/tuned --checkpoint runs/masked/model.safetensors",
    )

    data: str = option(..., "`digits`; a folder of files, in folders or not; or one with train/ and val/ in it.", DATA,
                       short="-d")  # fmt: skip
    mask_ratio: float = option(0.6, "The share of patches that is hidden.", LOSS, Range(above=0, below=1))
    mask: str = option("random", "Which are hidden: random, or block (those nearest to a random one).", LOSS,
                       choices=("random", "block"))  # fmt: skip
    decoder_depth: int = option(4, "Blocks of the decoder.", MODEL, COUNT)
    augment: str | None = option(
        None, "Words joined by +: rotate (about the upward axis), turn (about any), scale, shift, jitter, drop; or "
        "none. Default: rotate.", AUGMENT,
    )  # fmt: skip
    batch: int = option(128, "Samples in one forward pass of a process.", OPTIMISER, COUNT, short="-b")
    lr: float = option(1e-3, "Highest learning rate.", OPTIMISER, POSITIVE)


@dataclass(frozen=True)
class ScanDetectionRecipe(Recipe):
    """Train a detector of boxes in LiDAR scans: LION."""

    task: ClassVar[str] = "point-detect"
    implementation: ClassVar[str] = "linescan.tasks.point_detect:ScanDetectionTask"
    default_model: ClassVar[str] = "lion_mamba_kitti"
    judges: ClassVar[bool] = True
    scored: ClassVar[str] = "KITTI's or nuScenes' folder, or `digits`; of each what is held out."
    examples: ClassVar[tuple[str, ...]] = (
        "linescan train --task point-detect --data kitti --out runs/kitti --epochs 80 --bf16",
        "linescan train --task point-detect --data nuscenes --out runs/nuscenes --model lion_mamba_nuscenes "
        "--epochs 36 --weight-decay 0.05 --clip-grad 35",
        "linescan evaluate --task point-detect --data kitti --checkpoint runs/kitti/best.safetensors",
        "linescan points detect 000042.bin --checkpoint runs/kitti/best.safetensors",
    )

    data: str = option(..., "`digits` (as a street); KITTI's folder, with training/velodyne in it; or nuScenes', with "
                       "v1.0-trainval or v1.0-mini.", DATA, short="-d")  # fmt: skip
    sweeps: int = option(10, "Of nuScenes: scans that are joined.", DATA, COUNT, scoring=True)
    augment: str | None = option(
        None, "Words joined by +: paste (objects of other scans), flip (in x and y), mirror (left and right), rotate, "
        "scale, shift; or none. Default: of KITTI paste+mirror+rotate+scale, of nuScenes "
        "paste+flip+rotate+scale+shift.", AUGMENT,
    )  # fmt: skip
    unpasted: int = option(4, "Last epochs, in which nothing is pasted.", AUGMENT, NATURAL)
    epochs: int = option(80, "Times that each sample is seen.", OPTIMISER, COUNT, short="-e")
    batch: int = option(2, "Scans in one forward pass of a process.", OPTIMISER, COUNT, short="-b")
    lr: float = option(3e-3, "Highest learning rate.", OPTIMISER, POSITIVE)
    weight_decay: float = option(0.01, "Weight decay.", OPTIMISER, NATURAL)
    warmup: float = option(4.0, "Epochs in which the learning rate rises from 0.", OPTIMISER, NATURAL)
    clip_grad: float | None = option(10.0, "Largest norm of the gradient.", OPTIMISER, POSITIVE)


@dataclass(frozen=True)
class OccupancyRecipe(Recipe):
    """Train a network that says what every cell around a scanner is: OccRWKV."""

    task: ClassVar[str] = "point-occupancy"
    implementation: ClassVar[str] = "linescan.tasks.point_occupancy:CompletionTask"
    default_model: ClassVar[str] = "occrwkv_semantickitti"
    judges: ClassVar[bool] = True
    scored: ClassVar[str] = "SemanticKITTI's folder; of it sequence 08."
    examples: ClassVar[tuple[str, ...]] = (
        "linescan train --task point-occupancy --data SemanticKITTI --out runs/occupancy",
        "linescan evaluate --task point-occupancy --data SemanticKITTI --checkpoint runs/occupancy/best.safetensors",
        "linescan points occupancy 000000.bin --checkpoint runs/occupancy/best.safetensors",
    )

    data: str = option(..., "SemanticKITTI's folder, with sequences/00/velodyne, labels and voxels in it.", DATA,
                       short="-d")  # fmt: skip
    augment: str = option("flip", "flip (along x and y) or none.", AUGMENT, choices=("flip", "none"))
    epochs: int = option(80, "Times that each sample is seen.", OPTIMISER, COUNT, short="-e")
    batch: int = option(2, "Scans in one forward pass of a process.", OPTIMISER, COUNT, short="-b")
    optimizer: str = option("adam", "An optimiser of timm: adam, adamw, sgd, lion, muon, ...", OPTIMISER)
    lr: float = option(1e-3, "Highest learning rate.", OPTIMISER, POSITIVE)
    weight_decay: float = option(0.0, "Weight decay.", OPTIMISER, NATURAL)
    warmup: float = option(0.0, "Epochs in which the learning rate rises from 0.", OPTIMISER, NATURAL)


RECIPES: dict[str, type[Recipe]] = {
    recipe.task: recipe
    for recipe in (
        ClassificationRecipe,
        DistillationRecipe,
        EncoderDistillationRecipe,
        PretrainingRecipe,
        SegmentationRecipe,
        VolumeSegmentationRecipe,
        RestorationRecipe,
        AnomalyRecipe,
        ChangeRecipe,
        PromptingRecipe,
        PointClassificationRecipe,
        PartsRecipe,
        PointPretrainingRecipe,
        ScanDetectionRecipe,
        OccupancyRecipe,
    )
}
"""By the name of the task."""


def read_options(name: str | Path) -> tuple[str, dict[str, Any]]:
    """The task of a recipe's file, and the options in it.

    Args:
        name: a TOML file, the recipe.json of a run, or one of linescan's by name, such as
            "restoration/mambair_v2_light_x2" (`linescan.engine.configs.list_configs(".toml")`).

    Raises:
        InputError: it cannot be read, or says what this version does not know.
    """
    path = find_config(name, ".toml")
    try:
        values = (json if path.suffix == ".json" else tomllib).loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict) or values.get("task") not in RECIPES:
            raise InputError(f"task must be one of {', '.join(RECIPES)}")
        task = values.pop("task")
        check_options(RECIPES[task], values)
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path} cannot be used as a recipe: {error}") from None
    return task, values


def read_recipe(name: str | Path, **others) -> Recipe:
    """The recipe of a file, see `read_options`; with other values for some of its options, or for those that it lacks.

        train(read_recipe("restoration/mambair_v2_light_x2", data="DF2K"), "runs/x2")

    Raises:
        InputError: it cannot be read, is one of another version, or has no `data`.
    """
    task, values = read_options(name)
    if not (values := values | others).get("data"):
        raise InputError(f"the recipe {name} has no data: read_recipe(..., data=FOLDER)")
    return RECIPES[task].from_dict(values)
