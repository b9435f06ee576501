"""Models of the zoo as the tools see them; they need no other library."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..checkpoint import CheckpointError, load_checkpoint, read_meta, read_state_dict
from ..engine.cards import ModelCard, read_card, restore, save_model
from ..engine.mask_sets import resize_images
from ..errors import InputError
from ..heads.detection.dense_boxes import decode
from ..media.draw import default_palette
from ..media.labels import class_names
from ..media.preprocess import Preprocess, normalise
from ..media.resize import letterbox
from ..zoo import Entry, create_model, fetch, find
from .open import expect_checkpoint, expect_task, restore_for
from .prompts import CLIP, encode, parse_prompts, pick, read_embeddings
from .results import Found, names_and_colours

__all__ = [
    "NAMED",
    "NamedDetector",
    "NamedSegmentor",
    "SegmentorInput",
    "of_all_classes",
    "stretched",
]


def stretched(images: Tensor) -> Tensor:
    """Images (B, C, H, W), each so that its lowest value is 0 and its highest 255; float32. An even one is 0."""
    images = images.float()
    low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
    return (images - low) * (255 / (high - low).clamp_min(1e-12))


class SegmentorInput:
    """What a segmentation model of the zoo does to images before its forward pass: `entry.preprocess`.

    Its keys: `order` of the channels, "RGB" or "BGR"; `mean` and `std` of bytes, or `stretch` for images whose darkest
    value becomes 0 and whose brightest 255; `size`, to which an image is resized whatever its shape, or `scale`
    (longest, shortest), to which its sides are resized at most; `divisor`, of which both sides are multiples;
    `min_size`, up to which smaller images are padded; `grey_extra`, where all images of a scene but the first are grey.

    Args:
        entry: of the zoo.
        size: instead of the entry's.

    Attributes:
        images: that the model reads of each scene.
        size: (height, width), or None.
    """

    def __init__(self, entry: Entry, size: Sequence[int] | None = None):
        how = entry.preprocess
        self.images = len(entry.inputs)
        self.size, self.scale = tuple(size or how.get("size", ())) or None, how.get("scale")
        self.reverse, self.stretch = how.get("order", "RGB") == "BGR", how.get("stretch", False)
        self.mean, self.std = how.get("mean"), how.get("std")
        self.divisor, self.min_size = how.get("divisor", 1), how.get("min_size", 1)
        self.grey_extra = how.get("grey_extra", False)

    @classmethod
    def of_card(cls, card: ModelCard) -> "SegmentorInput":
        """As the model was trained: at the card's size, if it has one."""
        size = card.preprocess.size[1:]
        return cls(find(card.model), None if max(size) == 1 else size)

    def resized(self, images: Tensor) -> Tensor:
        """Bytes (3 * images, H, W), RGB -> at the scale of the test."""
        sides = images.shape[1:]
        if self.size:
            sides = self.size
        elif self.scale:
            factor = min(max(self.scale) / max(sides), min(self.scale) / min(sides))
            sides = [int(side * factor + 0.5) for side in sides]
        return resize_images(images, [max(-(-side // self.divisor), 1) * self.divisor for side in sides])

    def logits(self, network: nn.Module, images: Tensor) -> Tensor:
        """Images (B, 3 * images, H, W) of bytes, RGB -> the network's logits (B, channels, H, W)."""
        height, width = images.shape[-2:]
        below, right = (max(-side % self.divisor, self.min_size - side) for side in (height, width))
        inputs = (x.flip(1) if self.reverse else x for x in images.chunk(self.images, 1))
        inputs = (stretched(x) if self.stretch else normalise(x, self.mean, self.std) for x in inputs)
        return network(*(F.pad(x, (0, right, 0, below)) for x in inputs))[..., :height, :width]


def of_all_classes(logits: Tensor) -> Tensor:
    """Logits (B, C, H, W) of all classes; a network of one channel tells two apart, by the sign of its logits."""
    return torch.cat([torch.zeros_like(logits), logits], 1) if logits.shape[1] == 1 else logits


class NamedSegmentor:
    """A segmentation model of the zoo: its network maps images (B, C, H, W) to logits (B, classes, H, W).

    One that reads several images of a scene gets them as one of all their channels, and its network each by itself.

    Args:
        name: of the zoo, with or without a tag; None for the one that the checkpoint's card names.
        checkpoint: weights; by default the published ones.
        args: of the model, over the entry's and the card's.

    Raises:
        InputError, CheckpointError: neither names a model, it segments no images, or the weights are not its.

    Attributes:
        name: of the model.
        module: the network.
        images: that it reads of each scene.
        grey_extra: whether all but the first are read as grey.
        channels: of the logits.
        classes, palette: names and colours, as the checkpoint has them.
        window, stride, resizes, align_corners: see `linescan.openmmlab.models.MMSegmentor`.
    """

    window = stride = None
    resizes = True
    align_corners = False

    def __init__(self, name: str | None, checkpoint: str | Path | None, **args):
        card = read_card(checkpoint) if checkpoint else None
        if card or name is None:
            self.module, card = restore_for("segmentation", name, checkpoint, **args)
            self.input, self.classes = SegmentorInput.of_card(card), card.classes
            self.palette = default_palette(len(self.classes))
        else:
            self._open(name, checkpoint, args)
        self.name = card.model if card else name
        self.channels, self.images, self.grey_extra = len(self.classes), self.input.images, self.input.grey_extra

    def _open(self, name: str, checkpoint: str | Path | None, args: dict) -> None:
        """A published file."""
        entry = find(name)
        checkpoint = fetch(entry) if checkpoint is None else checkpoint
        head = read_state_dict(checkpoint).get(f"{entry.classifier}.weight")
        if head is None:
            raise CheckpointError(f"{checkpoint} is not a checkpoint of {name}: it has no {entry.classifier}.weight")
        try:
            self.module = load_checkpoint(create_model(name, num_classes=len(head), **args), checkpoint)
        except TypeError as error:
            raise InputError(f"cannot build {name} with these arguments: {error}") from None
        self.input = SegmentorInput(entry)
        meta = read_meta(checkpoint) or {"classes": class_names(entry.data or "")}
        self.classes, self.palette = names_and_colours(meta, max(len(head), 2))

    def encode(self, images: np.ndarray) -> np.ndarray:
        """Images (..., H, W, 3) of bytes, RGB -> as `logits` takes them: the same."""
        return images

    def prepare(self, image: np.ndarray) -> np.ndarray:
        """An image (H, W, 3 * images) of bytes, RGB -> at the scale of the test."""
        return self.input.resized(torch.from_numpy(np.array(image)).movedim(-1, 0)).movedim(0, -1).numpy()

    def logits(self, images: Tensor) -> Tensor:
        """Images (B, 3 * images, H, W) of bytes, RGB -> logits (B, channels, H, W)."""
        return of_all_classes(self.input.logits(self.module, images))

    def decide(self, logits: Tensor) -> Tensor:
        """Logits (C, H, W) -> classes (H, W)."""
        return logits.max(0).indices  # in a third of the time of `argmax`, on CPUs


class NamedDetector:
    """A detector of the zoo: its network maps images (B, 3, H, W) and embeddings of prompts to `Levels`.

    The embeddings are those of `text` and `embeddings`, or those that the checkpoint keeps.

    Args:
        name: of the zoo, with or without a tag; None for that of the checkpoint, one that `save` has written.
        checkpoint: weights; by default the published ones.
        text: prompts, "cat, red car" or a list.
        embeddings: a file of embeddings (`linescan.tasks.prompts`), of which those of `text` are taken; all by default.
        text_encoder: what makes embeddings of `text`, see `linescan.tasks.prompts.encode`; by default CLIP's, with the
            weights that the checkpoint has for it, if any.
        img_size: side of the square that an image is fitted into, or (height, width); rounded up to multiples of 32.
        args: of the model, over the entry's.

    Attributes:
        module: the network.
        name: of the model.
        classes, palette: the prompts, and a colour of each.
        card: what a file of the model says of it.

    Raises:
        InputError: neither prompts nor a file of them, a prompt or an encoder that is not there, embeddings of another
            width.
        CheckpointError: the weights are not the model's.
    """

    def __init__(
        self,
        name: str | None,
        checkpoint: str | Path | None,
        text: str | Sequence[str] | None = None,
        embeddings: str | Path | None = None,
        text_encoder: str | None = None,
        img_size: int | Sequence[int] | None = None,
        **args,
    ):
        card = expect_checkpoint(checkpoint, "detection")
        if name is None and card is None:
            what = (
                f"{checkpoint} does not say which model it is of" if checkpoint else "no model and no checkpoint given"
            )
            raise InputError(f"{what}; name one with --model")
        expect_task(name, "detection")
        entry = find(name or card.model)
        prompts = parse_prompts(text) if text is not None else None
        if text_encoder and (embeddings or not prompts):
            raise InputError("a text encoder makes the embeddings of --text; a file of embeddings needs none")
        known = read_embeddings(embeddings) if embeddings else None  # before a model is opened in vain
        prompts = known[0] if known and prompts is None else prompts
        if prompts is None and not (card and card.classes):
            raise InputError(
                f"{entry.name} finds what prompts name: give --text 'cat, red car', --embeddings FILE, or a checkpoint "
                "that keeps its prompts"
            )
        vectors = pick(prompts, *known, embeddings) if known else None
        if card:
            self.module, card = restore(name, checkpoint, **args)
        else:
            checkpoint = fetch(entry) if checkpoint is None else checkpoint
            try:
                self.module = load_checkpoint(create_model(entry.full_name, **args), checkpoint)
            except TypeError as error:
                raise InputError(f"cannot build {name} with these arguments: {error}") from None
            preprocess = Preprocess((3, *entry.preprocess["size"]), (0.0,) * 3, (1.0,) * 3, "bilinear")
            card = ModelCard(entry.name, args, [], preprocess)
        if prompts is not None:
            if vectors is None and not text_encoder and set(prompts) <= set(card.classes):
                vectors = pick(prompts, card.classes, self.module.vocabulary, checkpoint)
            if vectors is None:
                inside = "backbone.text_model.model."
                state = read_state_dict(checkpoint)
                state = {key.removeprefix(inside): value for key, value in state.items() if key.startswith(inside)}
                vectors = encode(prompts, text_encoder or CLIP, state if state and not text_encoder else None)
            self.module.set_vocabulary(vectors)
            card = replace(card, classes=list(prompts), args=card.args | {"num_prompts": len(prompts)})
        sides = card.preprocess.size[1:] if img_size is None else np.broadcast_to(img_size, 2).tolist()
        if not all(isinstance(side, int) and 0 < side <= 2**14 for side in sides):
            raise InputError(f"img_size is a number of pixels, or height and width, not {img_size!r}")
        self.size = tuple(-(-side // 32) * 32 for side in sides)
        self.card = replace(card, preprocess=replace(card.preprocess, size=(3, *self.size)))
        self.fill = entry.preprocess["fill"]
        self.name, self.classes = entry.full_name, self.card.classes
        self.palette = default_palette(len(self.classes))

    def detect(self, images: Sequence[np.ndarray]) -> list[Found]:
        """Images (H, W, 3) of bytes, RGB -> the objects in each, in its pixels."""
        boxes = [letterbox(image, self.size, self.fill) for image in images]
        inputs = torch.from_numpy(np.stack([box.image for box in boxes])).to(self.module.vocabulary.device)
        levels = self.module(inputs.movedim(-1, 1).float() / 255)
        return [
            Found(box.undo(objects.boxes), objects.scores, objects.labels, None)
            for box, objects in zip(boxes, decode(levels, self.module.strides))
        ]

    def save(self, path: str | Path) -> None:
        """Writes the network with its prompts, as a file that needs neither text nor encoder any more.

        Raises:
            InputError: another ending than .safetensors.
        """
        if Path(path).suffix != ".safetensors":
            raise InputError(f"a model with its prompts is kept as .safetensors, not {Path(path).name!r}")
        save_model(path, self.module, self.card)


NAMED: dict[str, Any] = {"segmentation": NamedSegmentor, "detection": NamedDetector}
"""By task, what opens a model of the zoo: (name, checkpoint, **arguments)."""
