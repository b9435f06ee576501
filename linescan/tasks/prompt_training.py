"""How promptable segmentors are trained and scored: on clicks and boxes that are drawn from the masks of objects."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss

from ..engine.cards import ModelCard, preprocess_of
from ..engine.instance_sets import PromptSamples, open_instances
from ..engine.scores import Evaluator, Totals
from .base import Task, build_model
from .open import expect_task
from .recipes import PromptingRecipe

__all__ = ["PromptScores", "PromptingTask", "Rounds", "iou_of"]

FOCAL_WEIGHT = 20.0


def enlarged(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Logits (P, 1, h, w) in the resolution of the network's input, (P, H, W), float32."""
    return F.interpolate(logits.float(), size, mode="bilinear", align_corners=False)[:, 0]


def iou_of(found: Tensor, masks: Tensor) -> Tensor:
    """The IoU of masks (P, H, W) bool with others, (P,) float32; 0 where both are empty."""
    common, either = (found & masks).sum((1, 2)), (found | masks).sum((1, 2))
    return common / either.clamp_min(1)


class Rounds(nn.Module):
    """A promptable segmentor as it is trained: two rounds of prompts for each object.

    Every other object is shown by a click, the others by a box. In the second round all get one more click where the
    first answer is wrong, on the object or beside it; what was shown by a box gets the first answer too.

    Args:
        prompter: the segmentor.
    """

    def __init__(self, prompter: nn.Module):
        super().__init__()
        self.prompter = prompter

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """A batch of `PromptSamples` with two objects or more.

        Returns:
            Logits (N, H, W) of the answers of both rounds, their scores (N,), and the object (N,) of each.
        """
        prompter, image, size = self.prompter, batch["image"], batch["input"].shape[-2:]
        features = prompter.encode(batch["input"])
        numbers = torch.arange(len(image), device=image.device)
        clicked, boxed = numbers[::2], numbers[1::2]
        of_clicked, of_boxed = (
            type(features)(*(part[image[these]] for part in features)) for these in (clicked, boxed)
        )
        points, boxes = batch["points"][clicked, None], batch["boxes"][boxed]

        by_click, click_score = prompter.decode(of_clicked, points=points)
        by_box, box_score = prompter.decode(of_boxed, boxes=boxes)
        more, labels = self.corrections(enlarged(by_click, size), batch["masks"][clicked])
        both, both_labels = torch.cat([points, more], 1), torch.cat([torch.ones_like(labels), labels], 1)
        by_clicks, clicks_score = prompter.decode(of_clicked, points=both, labels=both_labels)
        more, labels = self.corrections(enlarged(by_box, size), batch["masks"][boxed])
        better, better_score = prompter.decode(of_boxed, points=more, labels=labels, boxes=boxes, masks=by_box.detach())

        logits = torch.cat([enlarged(part, size) for part in (by_click, by_box, by_clicks, better)])
        scores = torch.cat([click_score, box_score, clicks_score, better_score])[:, 0]
        return logits, scores.float(), torch.cat([clicked, boxed, clicked, boxed])

    @staticmethod
    @torch.no_grad()
    def corrections(logits: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
        """A random pixel of each mask that is wrong, (P, 1, 2), and its label (P, 1); of a right one a pixel on it."""
        wrong = (logits > 0) != masks
        choice = torch.where(wrong.flatten(1).any(1)[:, None, None], wrong, masks)
        place = torch.multinomial(choice.flatten(1).float(), 1)
        return torch.stack([place % masks.shape[-1], place // masks.shape[-1]], -1).float(), masks.flatten(1).gather(
            1, place
        ).long()


class PromptScores(Evaluator):
    """The mean IoU over all objects, with one click (farthest from the border) and with one box.

    Masks are compared in the resolution of the network's input.

    Args:
        data: the held-out set.
    """

    names = ("click_miou", "box_miou")
    primary = "click_miou"

    def __init__(self, data: PromptSamples):
        self.data = data

    def measure(self, model: nn.Module, batch: dict[str, Tensor], totals: Totals) -> None:
        prompter = model.prompter if isinstance(model, Rounds) else model
        features = prompter.encode(batch["input"])
        size, masks = batch["input"].shape[-2:], batch["masks"]
        for image in range(len(batch["input"])):
            of = batch["image"] == image
            own = type(features)(*(part[image : image + 1] for part in features))
            for name, prompt in (
                ("click", {"points": batch["points"][of, None]}),
                ("box", {"boxes": batch["boxes"][of]}),
            ):
                logits, _ = prompter.decode(own, **prompt)
                totals.add(**{name: iou_of(enlarged(logits, size) > 0, masks[of]).sum()})
        totals.add(objects=len(masks))

    def scores(self, totals: Totals) -> dict[str, float]:
        return {f"{name}_miou": (totals[name] / totals["objects"]).item() for name in ("click", "box")}

    def describe(self, scores: dict[str, float]) -> str:
        return f"mIoU {scores['click_miou']:.4f} with one click, {scores['box_miou']:.4f} with one box"


class PromptingTask(Task):
    """Prompts -> SAM's losses: focal (weight 20), dice, and the mean squared error of the expected IoU.

    "Segment Anything", Kirillov et al., ICCV 2023, arXiv 2304.02643, appendix A; with fewer rounds.

    Raises:
        InputError: a model that takes no prompts, or data that cannot be used.
    """

    losses = ("loss", "focal", "dice", "iou")
    unit = "images"
    listed = "prompting"
    recipe: PromptingRecipe

    def __init__(self, recipe: PromptingRecipe):
        super().__init__(recipe)
        expect_task(recipe.model, self.listed)
        prompter = build_model(recipe)
        self.model = Rounds(prompter)
        self.preprocess = preprocess_of(prompter, prompter.in_chans, prompter.img_size)
        train, held_out = open_instances(recipe.data, recipe.val, recipe.holdout)
        self.data = PromptSamples(train, self.preprocess, recipe.objects, recipe.flip)
        self.evaluator = PromptScores(PromptSamples(held_out, self.preprocess))

    def forward(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        logits, scores, objects = model(batch)
        masks = batch["masks"][objects]
        target = masks.to(logits.dtype)
        focal = sigmoid_focal_loss(logits, target, reduction="mean")
        shares = logits.sigmoid()
        common, both = (shares * target).sum((1, 2)), shares.sum((1, 2)) + target.sum((1, 2))
        dice = (1 - (2 * common + 1) / (both + 1)).mean()
        iou = F.mse_loss(scores, iou_of(logits > 0, masks))
        return {"loss": FOCAL_WEIGHT * focal + dice + iou, "focal": focal, "dice": dice, "iou": iou, "output": logits}

    def product(self, model: Rounds) -> nn.Module:
        return model.prompter

    def checkpoint_gradients(self) -> None:
        self.model.prompter.set_grad_checkpointing()

    def card(self) -> ModelCard:
        return ModelCard(self.recipe.model, self.recipe.model_args, [], self.preprocess)

    @classmethod
    def judge(cls, recipe: PromptingRecipe, model: nn.Module, card: ModelCard) -> Evaluator:
        _, held_out = open_instances(recipe.data, recipe.val, recipe.holdout)
        return PromptScores(PromptSamples(held_out, card.preprocess))
