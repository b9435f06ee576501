"""Objects cut out of scans, to be pasted into others: the ground-truth sampling of SECOND (Yan et al., Sensors 2018).

Of rare classes a detector then sees many in every scan. Objects keep the place at which they were scanned, so that they
are as dense as they should be there; only those are pasted that stand on nothing else.
"""

import hashlib
import json
import zipfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..layers.boxes import overlap_bev, points_in_boxes
from .atomic import atomic

__all__ = ["Labelled", "ObjectBank"]

LEAST = 5
"""Points that an object must have to be kept."""


class Labelled(NamedTuple):
    """What is known of a scan in training.

    Attributes:
        rows: (N, channels) points as the model reads them.
        boxes: (M, 7 or 9).
        labels: (M,) int64 classes, -1 and less for none.
        levels: (M,) int64, 3 for boxes that never count.
    """

    rows: Tensor
    boxes: Tensor
    labels: Tensor
    levels: Tensor


class ObjectBank:
    """The objects of many scans, by class.

    Args:
        boxes: (M, 7 or 9) of all objects.
        labels: (M,) their classes.
        ends: (M + 1,) where the points of each begin in `points`, and the last ones end.
        points: (all, channels), as the model reads them; may be mapped from a file.

    Attributes:
        members: by class the numbers of its objects.
    """

    def __init__(self, boxes: np.ndarray, labels: np.ndarray, ends: np.ndarray, points: np.ndarray):
        self.boxes, self.labels, self.ends, self.points = boxes, labels, ends, points
        self.members = {label: np.flatnonzero(labels == label) for label in np.unique(labels).tolist()}

    def __len__(self) -> int:
        return len(self.boxes)

    @classmethod
    def cut(cls, scans: Iterable[Labelled], progress: Callable[[float], None] = lambda n: None) -> "ObjectBank":
        """The objects in scans that have at least `LEAST` points and count at some difficulty.

        Args:
            scans: of the training set.
            progress: called with 1 after each scan.
        """
        boxes, labels, parts, counts = [], [], [], [0]
        for scan in scans:
            good = (scan.labels >= 0) & (scan.levels < 3)
            for box, label, inside in zip(
                scan.boxes[good], scan.labels[good], points_in_boxes(scan.rows, scan.boxes[good])
            ):
                if inside.sum() >= LEAST:
                    boxes.append(box.numpy())
                    labels.append(int(label))
                    parts.append(scan.rows[inside].numpy())
                    counts.append(len(parts[-1]))
            progress(1)
        if not boxes:
            return cls(np.zeros((0, 7), np.float32), np.zeros(0, np.int64), np.zeros(1, np.int64), np.zeros((0, 3)))
        return cls(np.stack(boxes), np.array(labels), np.cumsum(counts), np.concatenate(parts))

    @classmethod
    def kept(cls, folder: Path, facts: Mapping, cut: Callable[[], "ObjectBank"]) -> "ObjectBank":
        """The bank that a folder keeps for these facts, or else a new one, which is kept there where it can be.

        Args:
            folder: linescan's own, in that of the data.
            facts: all that the bank depends on.
            cut: makes it.
        """
        name = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
        paths = folder / f"objects-{name}.npz", folder / f"objects-{name}.npy"
        if not all(path.is_file() for path in paths):
            bank = cut()
            with suppress(OSError):  # a folder that may only be read
                folder.mkdir(exist_ok=True)
                with atomic(paths[1]) as file:
                    np.save(file, bank.points)
                with atomic(paths[0]) as file:
                    np.savez(file, boxes=bank.boxes, labels=bank.labels, ends=bank.ends)
            return bank
        try:
            points = np.load(paths[1], mmap_mode="r")
            with np.load(paths[0]) as table:
                bank = cls(table["boxes"], table["labels"], table["ends"], points)
            if len(points) != bank.ends[-1]:
                raise ValueError(f"{len(points)} points, not {bank.ends[-1]}")
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise InputError(f"{paths[0]} or .npy is damaged, delete both ({error})") from None
        return bank

    def paste(self, scan: Labelled, wanted: Mapping[int, int]) -> Labelled:
        """The scan with objects pasted into it, drawn by torch's generator: so many of each class as are missing.

        One after the other is drawn; what would stand on another object is left out. Points of the scan where an object
        is pasted are taken away.

        Args:
            scan: its boxes without a class stay as they are.
            wanted: how many of each class there are to be in the end.
        """
        boxes, chosen = scan.boxes, []  # of all that stands there, and numbers of what is pasted
        for label, count in wanted.items():
            members = self.members.get(label, ())
            missing = min(count - int((scan.labels == label).sum()), len(members))
            if missing <= 0:
                continue
            drawn = [int(members[i]) for i in torch.randperm(len(members))[:missing]]
            new, first = torch.from_numpy(self.boxes[drawn]), len(boxes)
            boxes = torch.cat([boxes, new])
            meets = overlap_bev(new, boxes) > 0
            stands = torch.arange(len(boxes)) < first
            for i, number in enumerate(drawn):
                if not (meets[i] & stands).any():
                    stands[first + i] = True
                    chosen.append(number)
            boxes = boxes[stands]
        if not chosen:
            return scan
        pasted = boxes[len(scan.boxes) :]
        covered = points_in_boxes(scan.rows, pasted).any(0)
        parts = [torch.from_numpy(np.array(self.points[self.ends[n] : self.ends[n + 1]])) for n in chosen]
        labels = torch.from_numpy(self.labels[chosen])
        return Labelled(
            torch.cat([scan.rows[~covered], *parts]),
            boxes,
            torch.cat([scan.labels, labels]),
            torch.cat([scan.levels, torch.zeros_like(labels)]),
        )
