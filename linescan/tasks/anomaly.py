"""Anomalies: what is not as in normal images (`AnomalyDetector`); and how such networks are trained and scored."""

from dataclasses import dataclass, replace
from heapq import heappush, heapreplace
from pathlib import Path
from typing import Any, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from ..checkpoint import read_state_dict
from ..engine.anomaly_scores import best_f1_in_steps, ranking, region_overlap
from ..engine.anomaly_sets import AnomalySet, find_anomalies
from ..engine.atomic import atomic, write_all
from ..engine.cards import ModelCard, build, preprocess_of, read_card
from ..engine.scores import Evaluator, Totals
from ..errors import InputError
from ..extras import require
from ..media.arrays import write_array
from ..media.find import Source
from ..media.heat import draw_heat
from ..media.images import load_image
from ..media.page import figure, figures, page, table
from ..media.preprocess import Preprocess
from .base import Task, build_model
from .open import expect_task, restore_for
from .recipes import FALSE_ALARMS, AnomalyRecipe
from .report import WORST, csv_bytes
from .tool import Progress, Tool, Writer, expect_finite, silent

__all__ = ["Anomaly", "AnomalyDetector", "AnomalyMaps", "AnomalyScores", "AnomalyTask", "threshold_of"]

LOSS_WEIGHT = 5.0


def threshold_of(scores: Sequence[float] | np.ndarray, false_alarms: float) -> float:
    """The score that all but the share `false_alarms` of normal images stay at or below: one of theirs."""
    return float(np.quantile(np.asarray(scores, np.float64), 1 - false_alarms, method="higher"))


# -- training ---------------------------------------------------------------------------------------------------------

IMAGE_SCORES = "image_auroc", "image_ap", "image_f1"
PIXEL_SCORES = "pixel_auroc", "pixel_ap", "pixel_f1", "pixel_f1_steps", "aupro"


class AnomalyScores(Evaluator):
    """AUROC, average precision and best F1 of images and of pixels, and AUPRO: means over the classes of objects.

    Of classes without a normal or without a defective image there are no such scores; where all classes are, there is
    only `score`, the mean score of normal images. `threshold` is that of `threshold_of`, over all classes.

    Args:
        data: normal and defective images.
        false_alarms: of `threshold_of`.
    """

    data: AnomalySet

    def __init__(self, data: AnomalySet, false_alarms: float):
        self.data, self.false_alarms = data, false_alarms
        kinds: dict[int, set[bool]] = {}
        masked: set[int] = set()
        for one in data.images:
            kinds.setdefault(one.category, set()).add(bool(one.defect))
            masked |= {one.category} if one.mask else set()
        self.judged = sorted(category for category, both in kinds.items() if len(both) == 2)
        self.masked = [category for category in self.judged if category in masked]
        self.names = ("score", "threshold")
        self.primary, self.higher = "score", False
        if self.judged:
            require("sklearn", "anomaly")
            self.names = (*IMAGE_SCORES, *(PIXEL_SCORES if self.masked else ()), "threshold")
            self.primary, self.higher = "image_auroc", True

    def measure(self, model: nn.Module, batch: dict[str, Tensor], totals: Totals) -> None:
        maps = model.anomaly_maps(batch["input"])
        kept = {name: batch[name] for name in ("label", "category", "index")}
        totals.keep(score=maps.flatten(1).amax(1), **kept)
        if self.masked:
            chosen = torch.isin(batch["category"], torch.tensor(self.masked, device=maps.device))
            totals.keep(map=maps[chosen].float(), mask=batch["mask"][chosen], of=batch["category"][chosen])

    def by_category(self, totals: Totals) -> dict[str, dict[str, float]]:
        """The scores of each class that has any, by its name."""
        label, category, score = (totals[name].numpy() for name in ("label", "category", "score"))
        found = {}
        for number in self.judged:
            mine = category == number
            if len(set(label[mine])) < 2:  # what could not be read is left out
                continue
            scores = dict(zip(IMAGE_SCORES, ranking(label[mine], score[mine])))
            if number in self.masked:
                chosen = totals["of"].numpy() == number
                maps, masks = totals["map"][chosen].numpy(), totals["mask"][chosen].numpy()
                if masks.any() and not masks.all():
                    pixels = ranking(masks.ravel(), maps.ravel())
                    more = best_f1_in_steps(masks, maps), region_overlap(masks, maps)
                    scores |= dict(zip(PIXEL_SCORES, (*pixels, *more)))
            found[self.data.categories[number]] = scores
        return found

    def scores(self, totals: Totals) -> dict[str, float]:
        normal = totals["score"][totals["label"] == 0].double().numpy()
        found = {"threshold": threshold_of(normal, self.false_alarms) if len(normal) else float("nan")}
        if not self.judged:
            return {"score": float(normal.mean()), **found}
        every = self.by_category(totals).values()
        for name in self.names[:-1]:
            values = [scores[name] for scores in every if name in scores]
            found[name] = float(np.mean(values)) if values else float("nan")
        return {name: found[name] for name in self.names}

    def describe(self, scores: dict[str, float]) -> str:
        if not self.judged:
            return f"mean score of normal images {scores['score']:.4f}"
        said = f"AUROC of images {scores['image_auroc']:.4f}"
        return said + (f", of pixels {scores['pixel_auroc']:.4f}, AUPRO {scores['aupro']:.4f}" if self.masked else "")

    def report(self, totals: Totals, folder: Path, title: str) -> tuple[dict, list[Path]]:
        """report.html (scores of each class; missed defects and false alarms), and classes.csv and scores.csv."""
        threshold = self.scores(totals)["threshold"]
        label, score, index = (totals[name].numpy() for name in ("label", "score", "index"))
        order = np.argsort(-score, kind="stable")
        images = self.data.images
        listed = [(images[index[i]].path, images[index[i]].defect or "normal", f"{score[i]:.6f}") for i in order]
        by_category = self.by_category(totals)
        names = [name for name in self.names if name not in ("score", "threshold")]
        cells = [[category, *(f"{scores.get(name, np.nan):.4f}" for name in names)] for category, scores in
                 by_category.items()]  # fmt: skip
        missed = [i for i in order[::-1] if label[i] and score[i] <= threshold][:WORST]
        alarms = [i for i in order if not label[i]][:WORST]

        def shown(chosen: list[int]) -> str:
            return figures(
                figure(self.data.preview(int(index[i])), images[index[i]].path.name, f"{score[i]:.4f}") for i in chosen
            )

        sections = [
            ("Classes", "", table(["class", *names], cells)),
            ("Missed defects", f"Scores of at most {threshold:.4f}, the lowest first.", shown(missed)),
            ("Normal images with the highest scores", "The highest first.", shown(alarms)),
        ]
        note = f"{len(label)} images, {int(label.sum())} of them with a defect. {self.describe(self.scores(totals))}."
        contents = {
            "report.html": page(title, note, sections if cells else sections[2:]),
            "classes.csv": csv_bytes(["class", *names], cells),
            "scores.csv": csv_bytes(["image", "defect", "score"], listed),
        }
        return {"classes": by_category}, write_all(folder, contents)


class AnomalyTask(Task):
    """Normal images -> the mean squared difference of rebuilt features from the teacher's, summed over the levels.

    Raises:
        InputError: a model that finds no anomalies, or data that cannot be used.
        CheckpointError: the teacher's weights do not fit.
    """

    unit = "normal images"
    listed = "anomaly"
    recipe: AnomalyRecipe

    def __init__(self, recipe: AnomalyRecipe):
        super().__init__(recipe)
        expect_task(recipe.model, self.listed)
        found = find_anomalies(recipe.data, recipe.holdout)
        held_out = find_anomalies(recipe.val, recipe.holdout) if recipe.val else found
        if not held_out.test:
            raise InputError(f"{recipe.val or recipe.data} holds no test/ with images to score")
        self.model = build_model(recipe)
        preprocess = preprocess_of(self.model, img_size=recipe.size)
        self.card_of = ModelCard(recipe.model, recipe.model_args, [], preprocess)
        self.data = AnomalySet(found.train, found.categories, preprocess)
        self.evaluator = AnomalyScores(AnomalySet(held_out.test, held_out.categories, preprocess), recipe.false_alarms)

    @classmethod
    def resolve(cls, recipe: AnomalyRecipe) -> AnomalyRecipe:
        """As `Task`, with the size of its checkpoint, and with images normalised as the teacher's file says."""
        resolved, teacher = super().resolve(recipe), recipe.teacher_checkpoint
        if recipe.checkpoint:
            card = read_card(recipe.checkpoint)
            return replace(resolved, **{"size": recipe.size or (card.preprocess.size[1] if card else None)})
        if teacher in (None, "random") or not (card := read_card(teacher)):
            return resolved
        how = {"mean": list(card.preprocess.mean), "std": list(card.preprocess.std)}
        return replace(resolved, model_args=how | recipe.model_args)

    def load_weights(self) -> None:
        """As `Task`; a model without weights gets those of its teacher."""
        super().load_weights()
        recipe, name = self.recipe, self.model.teacher_name
        path = recipe.teacher_checkpoint
        if recipe.checkpoint or recipe.pretrained or path == "random":
            return
        if path is None:
            self.model.load_teacher(build(name, pretrained=True).state_dict(), name)
        else:
            self.model.load_teacher(read_state_dict(path), path)

    def forward(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        targets, rebuilt = model(batch["input"])
        differences = [F.mse_loss(own.float(), target.float()) for target, own in zip(targets, rebuilt)]
        return {"loss": LOSS_WEIGHT * sum(differences), "output": rebuilt[0]}

    def card(self) -> ModelCard:
        return self.card_of

    @classmethod
    def judge(cls, recipe: AnomalyRecipe, model: nn.Module, card: ModelCard) -> Evaluator:
        found = find_anomalies(recipe.data, recipe.holdout)
        if not found.test:
            raise InputError(f"{recipe.data} holds no test/ with images to score")
        return AnomalyScores(AnomalySet(found.test, found.categories, card.preprocess), recipe.false_alarms)

    def describe(self) -> str:
        teacher = sum(p.numel() for p in self.model.teacher.parameters()) / 1e6
        return f"{super().describe()}; teacher {self.model.teacher_name}, {teacher:.2f} M"


# -- the user's side --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Anomaly:
    """What is found in an image.

    Attributes:
        map: (h, w) float32, how little each place is like normal images; in the model's resolution, over all of the
            image.
        threshold: a score above which an image is anomalous; None where none was chosen.
        image: the image, small.
    """

    map: np.ndarray
    threshold: float | None
    image: Image.Image

    @property
    def score(self) -> float:
        """Of the image: the highest value of the map."""
        return float(self.map.max())

    @property
    def place(self) -> tuple[float, float]:
        """Where it is, as shares of the width and the height."""
        row, column = np.unravel_index(int(self.map.argmax()), self.map.shape)
        return (float(column) + 0.5) / self.map.shape[1], (float(row) + 0.5) / self.map.shape[0]

    @property
    def anomalous(self) -> bool | None:
        """Whether the score is above the threshold; None without one."""
        return None if self.threshold is None else self.score > self.threshold

    def drawn(self, image: Image.Image | None = None) -> Image.Image:
        """The map over the image (by default the small one): dark where all is normal, light where the map is twice
        the threshold, or highest without one. A cross marks the highest place of an anomalous image."""
        span = None if self.threshold is None else (0.0, max(2 * self.threshold, 1e-12))
        return draw_heat(self.map, image or self.image, 0.5, self.place if self.anomalous else None, span)


class AnomalyDetector(Tool):
    """Says how little images are like the normal ones that the model was trained on, and where.

        detect = AnomalyDetector(checkpoint="runs/screws/best.safetensors")
        found = detect("screw.png")                       # found.score, found.map, found.anomalous, found.drawn()

    Images are resized to the model's size whatever their shape, so that all of each is looked at.

    Args:
        model: a name of `linescan list --task anomaly`; not needed where the checkpoint names it.
        checkpoint: its weights (.pth, .safetensors). Without it, the published ones.
        threshold: a score above which an image is anomalous; by default the one that training chose on held-out normal
            images, if the checkpoint has one. `calibrate` chooses another.
        device, dtype, batch, strict: as for `Tool`.
        args: further arguments of the model.

    Raises:
        InputError, CheckpointError: no such model, one that finds no anomalies, or no weights for it.
    """

    def __init__(
        self,
        model: str | None = None,
        checkpoint: str | Path | None = None,
        *,
        threshold: float | None = None,
        device: str | None = None,
        dtype: torch.dtype = torch.float32,
        batch: int = 8,
        strict: bool = False,
        **args,
    ):
        module, card = restore_for("anomaly", model, checkpoint, **args)
        super().__init__(card.model, module, device, dtype, batch, strict)
        self.preprocess: Preprocess = card.preprocess
        chosen = card.trained.get("val_threshold") if threshold is None else threshold
        self.threshold = float(chosen) if isinstance(chosen, (int, float)) else None

    def facts(self) -> dict[str, str]:
        """What there is to know of this tool, by name."""
        said = "no threshold" if self.threshold is None else f"threshold {self.threshold:.4f}"
        return super().facts() | {"threshold": said}

    def calibrate(
        self, inputs: Sequence[Any], false_alarms: float = FALSE_ALARMS, progress: Progress = silent
    ) -> list[str]:
        """Chooses the threshold on normal images, `threshold_of`; returns a line for each that could not be read.

        Raises:
            InputError: none of them could be.
        """
        scores, broken = [], []
        for given, (_, answer) in zip(inputs, self.each(inputs, progress)):
            if isinstance(answer, InputError):
                broken.append(str(answer) if str(given) in str(answer) else f"{given}: {answer}")
            else:
                scores.append(answer.score)
            progress(1.0)
        if not scores:
            raise InputError("none of the normal images can be read" + (f"; the first: {broken[0]}" if broken else ""))
        self.threshold = threshold_of(scores, false_alarms)
        return broken

    def open(self, given: Any) -> tuple[Image.Image, Tensor]:
        """A file, a PIL image or an array -> the image, RGB, and as the network wants it."""
        image = load_image(given, self.preprocess.channels, self.preprocess.size[1:])
        return image, self.preprocess.whole(image)

    def answer(self, opened: Sequence[tuple[Image.Image, Tensor]], progress: Progress = silent) -> list[Anomaly]:
        inputs = torch.stack([tensor for _, tensor in opened]).to(self.device)
        maps = expect_finite(self.module.anomaly_maps(inputs)).float().cpu().numpy()
        found = []
        for (image, _), values in zip(opened, maps):
            small = image.convert("RGB")
            small.thumbnail((336, 336))
            found.append(Anomaly(values, self.threshold, small))
        return found

    def draw(self, opened: tuple[Image.Image, Tensor], answer: Anomaly, frame: bool = False) -> Image.Image:
        return answer.drawn(opened[0])


class AnomalyMaps(Writer):
    """OUT/maps/NAME.tif (32-bit floats), OUT/scores.csv, and OUT/report.html with the highest scores.

    Args:
        out: the folder.
    """

    def __init__(self, out: Path):
        self.out = out
        self.rows: list[list] = []
        self.worst: list[tuple[float, int, Anomaly, str]] = []  # a heap, the lowest score first

    def save(self, source: Source, answer: Anomaly, frame: int | None = None) -> list[Path]:
        """Writes the map of an image, or of a frame of a video."""
        name = source.name if frame is None else f"{source.name}/{frame:06d}"
        path = self.out / "maps" / f"{name}.tif"
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic(path) as file:
            write_array(file, answer.map[..., None], format="TIFF")
        said = str(source.path) if frame is None else f"{source.path}, frame {frame}"
        one = answer.score, -len(self.rows), replace(answer, map=answer.map.copy()), said
        if len(self.worst) < WORST:
            heappush(self.worst, one)
        elif one > self.worst[0]:
            heapreplace(self.worst, one)
        self.rows.append([said, f"{answer.score:.6f}", "" if answer.anomalous is None else int(answer.anomalous)])
        return [path]

    def describe(self, answer: Anomaly) -> str:
        """The score, whether it is above the threshold, and where the highest place is."""
        x, y = answer.place
        place = f"most at {x:.0%} of the width, {y:.0%} of the height"
        if answer.threshold is None:
            return f"score {answer.score:.4f}, {place}"
        sign, word = (">", "anomalous") if answer.anomalous else ("<=", "normal")
        return f"{word}, score {answer.score:.4f} {sign} {answer.threshold:.4f}, {place}"

    def as_json(self, answer: Anomaly) -> dict:
        """`score`, `threshold` and `anomalous` (None without one), and `place`, as shares of width and height."""
        place = [round(share, 4) for share in answer.place]
        return {"score": answer.score, "threshold": answer.threshold, "anomalous": answer.anomalous, "place": place}

    def close(self) -> None:
        """Writes scores.csv and report.html, the highest scores first."""
        if not self.rows:
            return
        rows = sorted(self.rows, key=lambda row: -float(row[1]))
        threshold = self.worst[0][2].threshold
        note = f"{len(rows)} images" + (
            "."
            if threshold is None
            else f", {sum(row[2] for row in rows)} of them above the threshold {threshold:.4f}."
        )
        worst = sorted(self.worst, key=lambda one: one[:2], reverse=True)
        made = (
            figure(pair, Path(said).name, f"{score:.4f}")
            for score, _, answer, said in worst
            for pair in [_beside(answer.image, answer.drawn())]
        )
        shown = [
            (f"The {len(worst)} highest scores", "Each image, and where it differs from normal ones.", figures(made))
        ]
        contents = {
            "scores.csv": csv_bytes(["image", "score", "anomalous"], rows),
            "report.html": page("Anomalies", note, shown),
        }
        write_all(self.out, contents)


def _beside(left: Image.Image, right: Image.Image) -> Image.Image:
    sheet = Image.new("RGB", (2 * right.width + 4, right.height), "white")
    sheet.paste(left.resize(right.size), (0, 0))
    sheet.paste(right, (right.width + 4, 0))
    return sheet
