"""Features: images and videos in, vectors out."""

import io
from pathlib import Path
from typing import Any, Sequence

import numpy as np
import torch
from torch import Tensor

from ..engine.atomic import atomic
from ..errors import InputError
from ..media.find import Source
from .classify import Classifier
from .tool import Progress, Writer, silent

__all__ = ["Embedder", "Features"]


class Embedder(Classifier):
    """The pooled features of images, or of videos if the model is one for them: what its classifier reads.

        embed = Embedder("vim_tiny_patch16_224")
        embed("cat.jpg").shape                                      # (192,)

    Answers are arrays (channels,), float32. Of a video's views the mean is taken. Arguments and errors are those of
    `Classifier`.
    """

    def forward(self, tensors: Sequence[Tensor]) -> Tensor:
        """Features (images, channels), float32 on the CPU, of images that `tensor` has made; one forward pass.

        Raises:
            InputError: the features are not finite.
        """
        with torch.inference_mode(), self.precision():
            inputs = torch.stack(list(tensors)).to(self.device)
            features = self.module.forward_head(self.module.forward_features(inputs), pre_logits=True).float().cpu()
        if not features.isfinite().all():
            raise InputError("the features are NaN or infinite; the weights are damaged, or the precision too low")
        return features.flatten(1)

    def answer(self, opened: Sequence[Any], progress: Progress = silent) -> list[np.ndarray]:
        if self.clips:
            return [self.watch(video, progress).numpy() for video in opened]
        return list(self.forward([seen.tensor for seen in opened]).numpy())

    def __call__(self, images: Any) -> Any:
        """The features of an image (channels,); a list of them for a list of images."""
        return super(Classifier, self).__call__(images)


class Features(Writer):
    """Features in one file, written when all are there.

    A .npz file holds arrays `path`, `frame` (-1 for a whole file) and `features` (rows, channels), a .parquet file
    columns of these names. Names that are no text are written with escapes.

    Args:
        path: of the file; its suffix says which of them.
    """

    def __init__(self, path: Path):
        self.path = path
        self.rows: list[tuple[str, int, np.ndarray]] = []

    def save(self, source: Source, answer: np.ndarray, frame: int | None = None) -> list[Path]:
        """Keeps a row."""
        name = str(source.path).encode("utf-8", "backslashreplace").decode()
        self.rows.append((name, -1 if frame is None else frame, answer))
        return [self.path]

    def describe(self, answer: np.ndarray) -> str:
        """How many there are."""
        return f"{len(answer)} features"

    def as_json(self, answer: np.ndarray) -> list[float]:
        """The features."""
        return answer.tolist()

    def close(self) -> None:
        """Writes the file, if there is anything to write."""
        if not self.rows:
            return
        names, numbers, vectors = zip(*self.rows)
        frames, features = np.array(numbers), np.stack(vectors)
        buffer = io.BytesIO()
        if self.path.suffix == ".parquet":
            import pyarrow
            from pyarrow import parquet

            rows = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(features.ravel()), features.shape[1])
            parquet.write_table(pyarrow.table({"path": names, "frame": frames, "features": rows}), buffer)
        else:
            np.savez_compressed(buffer, path=np.array(names), frame=frames, features=features)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with atomic(self.path) as file:
            file.write(buffer.getbuffer())
