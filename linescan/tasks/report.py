"""What a classifier gets right and wrong on held-out data: numbers, tables, and a page with its worst mistakes."""

import csv
import io
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Callable, Iterable, Sequence

import numpy as np
from PIL import Image

from ..engine.atomic import write_all
from ..media.page import bars, figure, figures, page, shade, table

__all__ = ["WORST", "Report", "csv_bytes", "previews"]

BINS = 15  # of the calibration, as in the paper
WORST = 48  # samples that a page shows
MATRIX = 60  # classes, up to which the page shows the whole confusion matrix
PAIRS = 30  # pairs of classes that are confused most, and are listed


@dataclass
class Report:
    """The answers of a classifier on held-out data, and what follows from them.

    Args:
        classes: their names.
        names: of the samples, (N,).
        labels: the class of each, (N,) int.
        probabilities: of each and every class, (N, classes).
    """

    classes: Sequence[str]
    names: Sequence[str]
    labels: np.ndarray
    probabilities: np.ndarray

    @cached_property
    def guesses(self) -> np.ndarray:
        """The likeliest class of each sample, (N,)."""
        return self.probabilities.argmax(1)

    @cached_property
    def sure(self) -> np.ndarray:
        """Its probability, (N,)."""
        return self.probabilities.max(1)

    @cached_property
    def confusion(self) -> np.ndarray:
        """How many samples of class i are taken for class j, (classes, classes) int."""
        count = len(self.classes)
        return np.bincount(self.labels * count + self.guesses, minlength=count**2).reshape(count, count)

    @cached_property
    def by_class(self) -> list[dict]:
        """Of each class `precision`, `recall` (the accuracy among its samples), `f1` and the number of samples.

        What has no samples to be computed from is None.
        """
        right, truly, guessed = self.confusion.diagonal(), self.confusion.sum(1), self.confusion.sum(0)

        def share(part: float, whole: float) -> float | None:
            return float(part / whole) if whole else None

        return [
            {
                "class": name,
                "samples": int(truly[i]),
                "precision": share(right[i], guessed[i]),
                "recall": share(right[i], truly[i]),
                "f1": share(2 * right[i], truly[i] + guessed[i]),
            }
            for i, name in enumerate(self.classes)
        ]

    @cached_property
    def calibration(self) -> list[dict]:
        """Samples by the probability of their likeliest class, in 15 equal bins: number, mean of it, and accuracy."""
        bins = np.minimum((self.sure * BINS).astype(int), BINS - 1)
        right = self.guesses == self.labels
        found = []
        for i in range(BINS):
            chosen = bins == i
            some = bool(chosen.any())
            found.append(
                {
                    "samples": int(chosen.sum()),
                    "probability": float(self.sure[chosen].mean()) if some else None,
                    "accuracy": float(right[chosen].mean()) if some else None,
                }
            )
        return found

    @cached_property
    def scores(self) -> dict[str, float]:
        """Accuracy; its mean over the classes; the mean F1 of the classes; the expected calibration error (Guo et al.,
        "On Calibration of Modern Neural Networks", 2017). Classes without samples do not count."""
        seen = [one for one in self.by_class if one["samples"]]
        gaps = [b["samples"] * abs(b["probability"] - b["accuracy"]) for b in self.calibration if b["samples"]]
        return {
            "accuracy": float((self.guesses == self.labels).mean()),
            "balanced_accuracy": float(np.mean([one["recall"] for one in seen])),
            "macro_f1": float(np.mean([one["f1"] for one in seen])),
            "calibration_error": float(sum(gaps) / len(self.labels)),
        }

    @cached_property
    def worst(self) -> np.ndarray:
        """The samples that are taken for another class, the surest of the mistakes first."""
        wrong = np.flatnonzero(self.guesses != self.labels)
        return wrong[np.argsort(-self.sure[wrong], kind="stable")]

    @cached_property
    def confused(self) -> list[tuple[int, int, int]]:
        """(class, what it is taken for, how often), the most frequent first."""
        wrong = self.confusion * (1 - np.eye(len(self.classes), dtype=int))
        order = np.argsort(-wrong, axis=None, kind="stable")[:PAIRS]
        pairs = ((int(i) // len(self.classes), int(i) % len(self.classes)) for i in order)
        return [(i, j, int(wrong[i, j])) for i, j in pairs if wrong[i, j]]

    def as_dict(self) -> dict:
        """In JSON's types."""
        return {
            **self.scores,
            "classes": self.by_class,
            "confusion": self.confusion.tolist(),
            "calibration": self.calibration,
        }

    # -- files ---------------------------------------------------------------------------------------------------------

    def write(self, folder: Path, title: str, image: Callable[[int], Image.Image]) -> list[Path]:
        """Writes report.html, scores.json, classes.csv, confusion.csv and predictions.csv; returns their paths.

        Args:
            folder: made if it is missing.
            title: of the page.
            image: sample -> what it shows.
        """
        names = [*self.by_class[0]]
        order = range(len(self.labels))
        contents = {
            "report.html": self.page(title, image),
            "scores.json": json.dumps(self.as_dict(), indent=1).encode() + b"\n",
            "classes.csv": csv_bytes(names, ([one[name] for name in names] for one in self.by_class)),
            "confusion.csv": csv_bytes(
                ["class", *self.classes], ([n, *row] for n, row in zip(self.classes, self.confusion.tolist()))
            ),
            "predictions.csv": csv_bytes(
                ["sample", "class", "guess", "probability", "probability_of_class"],
                (
                    [self.names[i], self.classes[self.labels[i]], self.classes[self.guesses[i]],
                     f"{self.sure[i]:.6f}", f"{self.probabilities[i, self.labels[i]]:.6f}"]
                    for i in order
                ),
            ),
        }  # fmt: skip
        return write_all(folder, contents)

    def page(self, title: str, image: Callable[[int], Image.Image]) -> bytes:
        """All of it, to be read in a browser."""
        scores = self.scores
        note = (
            f"{len(self.labels)} samples of {len(self.classes)} classes. Accuracy {scores['accuracy']:.2%}, mean over "
            f"the classes {scores['balanced_accuracy']:.2%}, mean F1 {scores['macro_f1']:.4f}."
        )
        return page(title, note, [self._matrix(), self._classes(), self._calibration(), self._mistakes(image)])

    def _matrix(self) -> tuple[str, str, str]:
        if len(self.classes) > MATRIX:
            rows = [(self.classes[i], self.classes[j], n) for i, j, n in self.confused]
            return "Most confused", "confusion.csv has all classes.", table(["class", "taken for", "times"], rows)
        shares = self.confusion / np.maximum(self.confusion.sum(1, keepdims=True), 1)
        rows = ([name, *row] for name, row in zip(self.classes, self.confusion.tolist()))
        right, wrong = (42, 157, 143), (231, 111, 81)
        colours = (
            ["", *(shade(share, right if i == j else wrong) if share else "" for j, share in enumerate(row))]
            for i, row in enumerate(shares.tolist())
        )
        said = "A row for each class, a column for what its samples are taken for."
        return "Confusion matrix", said, table(["", *self.classes], rows, colours)

    def _classes(self) -> tuple[str, str, str]:
        def cell(value: float | None) -> str:
            return "-" if value is None else f"{value:.3f}"

        ordered = sorted(self.by_class, key=lambda one: (one["f1"] is None, one["f1"]))
        measures = "precision", "recall", "f1"
        rows = [[one["class"], one["samples"], *(cell(one[name]) for name in measures)] for one in ordered]
        return "Classes", "The lowest F1 first.", table(["class", "samples", "precision", "recall", "F1"], rows)

    def _calibration(self) -> tuple[str, str, str]:
        said = (
            "How often the model is right when it is so sure; on the dashed line the two agree. Darker bars have more "
            f"samples. Expected calibration error: {self.scores['calibration_error']:.4f}."
        )
        heights, widths = ([b[name] for b in self.calibration] for name in ("accuracy", "samples"))
        return "Calibration", said, bars(heights, widths, "probability of the likeliest class", "accuracy")

    def _mistakes(self, image: Callable[[int], Image.Image]) -> tuple[str, str, str]:
        shown = self.worst[:WORST]
        said = f"{len(self.worst)} samples are taken for another class" + (
            f"; the {len(shown)} surest of the mistakes:" if len(shown) < len(self.worst) else ", the surest first."
        )
        made = (
            figure(
                image(i),
                f"{Path(self.names[i]).name}: {self.classes[self.labels[i]]}, taken for",
                f"{self.classes[self.guesses[i]]} {self.sure[i]:.1%}",
            )
            for i in shown.tolist()
        )
        return "Worst mistakes", said, figures(made)


def previews(data, worth: Iterable[tuple[int, float]]) -> str:
    """Samples of a page, side by side, with their names and what they are worth.

    Args:
        data: has `preview(index)` and `names`.
        worth: of each sample that is shown, its index and score.
    """
    return figures(figure(data.preview(i), Path(data.names[i]).name, f"{score:.4f}") for i, score in worth)


def csv_bytes(head: Sequence[str], rows: Iterable[Sequence]) -> bytes:
    """A table as the content of a CSV file; None is an empty cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(["" if cell is None else cell for cell in row] for row in rows)
    return text.getvalue().encode("utf-8", "backslashreplace")
