"""What all tasks on point clouds share: how clouds are read for training, and how answers about files are written."""

from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .. import zoo
from ..engine.atomic import atomic
from ..engine.cards import ModelCard, points_of, read_card
from ..errors import InputError
from ..media.clouds import PointPreprocess, ScanPreprocess
from ..media.draw_points import PointView, draw_points, points_page
from ..media.find import Source
from ..media.points import LARGEST_CLOUD, PointCloud, column_names, points_of_array, read_points
from .base import Task
from .open import restore_for
from .recipes import CloudRecipe
from .tool import Tool, Writer

__all__ = ["CloudTask", "CloudTool", "CloudWriter", "OpenedCloud", "noted"]

CloudLike = str | Path | np.ndarray | PointCloud


class CloudTask(Task):
    """A task on clouds: its recipe says how they are read, or the checkpoint that it starts from, or the model.

    Attributes:
        preprocess: how the model wants its clouds.
        augment: how they are changed in training (`linescan.media.clouds.AUGMENTATIONS`).
    """

    unit = "clouds"
    recipe: CloudRecipe

    def __init__(self, recipe: CloudRecipe):
        super().__init__(recipe)
        self.preprocess = PointPreprocess(
            recipe.points, tuple((recipe.features or "").replace(",", " ").split()), recipe.fit == "sphere", recipe.up
        )
        self.augment = recipe.augment or self.usual_augment()
        if recipe.batch < 2:
            raise InputError("models of clouds normalise over the batch: --batch must be at least 2")

    @classmethod
    def resolve(cls, recipe: CloudRecipe) -> CloudRecipe:
        """As `Task`, and with what says how clouds are read."""
        card = read_card(recipe.checkpoint) if recipe.checkpoint else None
        recipe = super().resolve(recipe)
        entry = zoo.find(recipe.model) if zoo.is_model(recipe.model) else None
        if entry is None or "up" not in entry.preprocess:
            raise InputError(f"{recipe.model} reads no point clouds; `linescan list --task {cls.listed}` names models")
        how = points_of(entry)
        if recipe.data == "digits":
            how = replace(how, up="z")
        return cls.as_read(recipe, card.preprocess if card else how)

    @staticmethod
    def as_read(recipe: CloudRecipe, how: PointPreprocess) -> CloudRecipe:
        """The recipe, with clouds read in this way where it says nothing."""
        return replace(
            recipe,
            points=recipe.points or how.points,
            features=",".join(how.features) if recipe.features is None else recipe.features,
            fit=recipe.fit or ("sphere" if how.normalise else "none"),
            up=recipe.up or how.up,
        )

    def usual_augment(self) -> str:
        """What clouds like these are usually changed by: scans turned, models of objects scaled and shifted."""
        if self.recipe.data == "digits":
            return "scale+jitter"
        return "scale+shift" if self.preprocess.normalise else "rotate"


class OpenedCloud(NamedTuple):
    """A cloud, and what the model reads of it.

    Attributes:
        cloud: all points that were read.
        rows: the same as the model wants them, (N, channels).
        path: of its file, or None.
    """

    cloud: PointCloud
    rows: Tensor
    path: Path | None = None

    @property
    def notes(self) -> list[str]:
        """What was left out, a sentence each."""
        return self.cloud.notes

    def facts(self) -> dict:
        """How many points there are, of how many in the file, and what was left out; for JSON."""
        return {"points": len(self.cloud), "of": self.cloud.total or len(self.cloud), "notes": self.notes}


class CloudTool(Tool):
    """A model of clouds on a device, applied to files.

    A model whose answers depend on the batch as published answers here as if each cloud were alone.

    Args:
        model: a name of the zoo. Not needed with a checkpoint that linescan has written.
        checkpoint: a file of weights; without it, the published ones are fetched.
        device, dtype, batch: of `Tool`.
        limit: most points that are kept of a file.
        columns: names for the columns of formats without names (`linescan.media.points.read_points`).
        args: of the model.

    Raises:
        InputError, CheckpointError: see `linescan.engine.cards.restore`; the model reads no clouds; or wrong columns.

    Attributes:
        task: of its models, as in the zoo.
        card: what the model's file says.
    """

    task: ClassVar[str]
    kinds = ("cloud",)

    def __init__(
        self,
        model: str | None = None,
        checkpoint: str | Path | None = None,
        *,
        device: str | None = None,
        dtype: torch.dtype = torch.float32,
        batch: int = 16,
        limit: int = LARGEST_CLOUD,
        columns: str | None = None,
        **args,
    ):
        network, card = restore_for(self.task, model, checkpoint, **args)
        if not isinstance(card.preprocess, (PointPreprocess, ScanPreprocess)):
            raise InputError(f"{card.model} reads images or videos, not point clouds")
        super().__init__(card.model, network, device, dtype, batch)
        self.card: ModelCard = card
        self.limit, self.columns = limit, column_names(columns)
        for module in network.modules():
            if hasattr(module, "set_together"):
                module.set_together(False)

    @property
    def classes(self) -> list[str]:
        """The names of the classes."""
        return self.card.classes

    def facts(self) -> dict[str, str]:
        """What there is to know of this tool, by name."""
        how = self.card.preprocess
        if isinstance(how, ScanPreprocess):
            seen = f"all points of {', '.join(('x y z', *how.scan_features))}"
        else:
            seen = f"{how.points:,} points of {', '.join(('x y z', *how.features))}"
        return super().facts() | {"classes": f"{len(self.classes)} classes", "input": seen}

    def open(self, given: CloudLike) -> OpenedCloud:
        """Reads a file, or takes a table of points (N, 3 or more), whose columns are as in files, or a cloud."""
        if isinstance(given, PointCloud):
            cloud = given
        elif isinstance(given, np.ndarray):
            cloud = points_of_array(given, self.columns)
        else:
            cloud = read_points(given, limit=self.limit, columns=self.columns)
        path = Path(given) if isinstance(given, (str, Path)) else None
        return OpenedCloud(cloud, self.card.preprocess.rows(cloud), path)

    def view(self, opened: OpenedCloud, answer: Any) -> PointView:
        """What is to be seen of an answer."""
        raise NotImplementedError

    def draw(self, opened: OpenedCloud, answer: Any, frame: bool = False) -> Image.Image:
        """The cloud from four sides."""
        return draw_points(self.view(opened, answer))


class CloudWriter(Writer):
    """Writes a page that turns under the mouse for each cloud: OUT/pages/NAME.html. Tasks add files of their own.

    Answers have a `view`, what is to be seen of them.

    Args:
        out: the folder; None to write nothing.
        pages: whether pages are wanted.
    """

    def __init__(self, out: Path | None, pages: bool = True):
        self.out, self.pages = out, pages and out is not None

    def save(self, source: Source, answer: Any, frame: int | None = None) -> list[Path]:
        """Writes the page."""
        if not self.pages:
            return []
        path = self.place("pages", source, ".html")
        with atomic(path) as file:
            file.write(points_page(replace(answer.view, title=source.path.name)).encode())
        return [path]

    def place(self, folder: str, source: Source, suffix: str) -> Path:
        """OUT/FOLDER/NAME.suffix, in a folder that is there."""
        path = self.out / folder / (source.name + suffix)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


def noted(said: str, notes: Sequence[str]) -> str:
    """Words about an answer, and what was left out."""
    return f"{said} ({'; '.join(notes)})" if notes else said
