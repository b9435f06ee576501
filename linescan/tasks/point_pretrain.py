"""Masked pre-training of PointMamba (arXiv 2402.10739, after Point-MAE, arXiv 2203.06604): hidden patches are restored.

What is trained becomes a backbone without a classifier, which `linescan train --task points --checkpoint` and
`--task point-parts --checkpoint` fine-tune.
"""

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..engine.cards import ModelCard
from ..engine.cloud_sets import CloudSamples, open_clouds
from ..errors import InputError
from ..heads.points.mae import PointMAE
from ..layers.points import chamfer
from .base import HeldOutLosses, build_model, load_weights
from .clouds import CloudTask
from .recipes import PointPretrainingRecipe

__all__ = ["PointPretrainingTask"]


class Hidden(Dataset):
    """Items {"input": a cloud, "noise": random numbers (G,), "curve": a number below `curves`}."""

    def __init__(self, samples: CloudSamples, groups: int, curves: int):
        self.samples, self.groups, self.curves = samples, groups, curves
        self.in_memory = samples.in_memory

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {
            "input": self.samples[index]["input"],
            "noise": torch.rand(self.groups),
            "curve": torch.randint(self.curves, ()),
        }


class PointPretrainingTask(CloudTask):
    """Clouds -> the Chamfer distance (L2) of restored patches from what they were, without labels.

    Each batch follows one of the model's curves, that of its first sample's draw.

    Raises:
        InputError: a model that cannot be pre-trained.
    """

    listed = "point-pretraining"

    def __init__(self, recipe: PointPretrainingRecipe):
        super().__init__(recipe)
        own = recipe.model_args.get("backbone_args", {})
        channels = {"in_chans": self.preprocess.channels} if self.preprocess.features else {}
        self.args = {
            "mask_ratio": recipe.mask_ratio, "mask": recipe.mask, "decoder_depth": recipe.decoder_depth,
            **({"backbone_args": {**channels, **own}} if channels else {}),
        }  # fmt: skip
        self.model = build_model(recipe, **self.args)
        if not isinstance(self.model, PointMAE):
            raise InputError(
                f"{recipe.model} is not pre-trained on hidden patches; pointmamba_mae is, with the backbone that "
                "--model-arg backbone=NAME says"
            )
        clouds, held_out = open_clouds(recipe.data, recipe.val, recipe.holdout, False, recipe.columns)
        encoder = self.model.encoder
        sizes = encoder.groups, encoder.copies
        self.data = Hidden(CloudSamples(clouds, self.preprocess, self.augment), *sizes)
        self.evaluator = HeldOutLosses(self, Hidden(CloudSamples(held_out, self.preprocess), *sizes))

    def load_weights(self) -> None:
        """Of all that is trained, of which the card names the encoder alone."""
        load_weights(self.model, self.recipe, self.args | self.recipe.model_args)

    def usual_augment(self) -> str:
        """As published."""
        return "rotate"

    def forward(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        restored, target = model(batch["input"], batch["noise"], int(batch["curve"][0]))
        loss = chamfer(restored.float().flatten(0, 1), target.flatten(0, 1)).mean()
        return {"loss": loss, "output": restored}

    def product(self, model: nn.Module) -> nn.Module:
        """The encoder."""
        return model.encoder

    def card(self) -> ModelCard:
        backbone, args = self.model.built_from
        return ModelCard(backbone, args, [], self.preprocess)
