"""The numbers of a run, as rows of metrics.csv and as TensorBoard scalars."""

import csv
import io
from importlib.util import find_spec
from pathlib import Path
from typing import Sequence

from .atomic import atomic

__all__ = ["Log", "read_metrics"]


def read_metrics(path: str | Path) -> list[dict[str, float]]:
    """The rows of a metrics.csv; empty cells are left out, and so is a last row that was cut short."""
    with open(path, newline="") as file:
        lines = file.read().splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("\n")]
    return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(whole)]


class Log:
    """Appends to FOLDER/metrics.csv, and to FOLDER/tensorboard where TensorBoard is installed.

    Args:
        folder: of the run.
        step: the step that training starts from; what an interrupted run has written beyond it is forgotten.
        columns: of the file, "step" among them.
    """

    def __init__(self, folder: Path, step: int, columns: Sequence[str]):
        path = folder / "metrics.csv"
        rows = [row for row in read_metrics(path) if row["step"] <= step] if step and path.exists() else []
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(map(_cells, rows))
        with atomic(path) as file:
            file.write(text.getvalue().encode())
        self._file = open(path, "a", newline="")
        self._writer = csv.DictWriter(self._file, columns, lineterminator="\n")
        self._board = None
        if find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            # Ctrl-C within a write may leave the writer's thread asleep until it flushes, and closing waits for it.
            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1, flush_secs=5)

    def write(self, **values: float) -> None:
        """One row; `values` are some of columns, `step` always among them."""
        self._writer.writerow(_cells(values))
        self._file.flush()
        if self._board:
            for name, value in values.items():
                if name not in ("step", "seconds"):
                    self._board.add_scalar(name, value, values["step"])

    def close(self) -> None:
        """Closes the files."""
        self._file.close()
        if self._board:
            self._board.close()


def _cells(row: dict[str, float]) -> dict[str, str]:
    """Numbers as text that reads back as the same number; whole ones without a point."""
    return {k: str(int(v)) if k in ("step", "epoch") else repr(float(v)) for k, v in row.items()}
