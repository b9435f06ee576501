"""The look of all plots: of the demos, and of comparisons."""

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["BAD", "GOOD", "GREY", "INK", "PAPER", "plain"]

PAPER, INK, GREY, GOOD, BAD = "#fdfdfb", "#2b2d42", "#8d99ae", "#2a9d8f", "#e76f51"


def plain(axis: "Axes", lines: Literal["x", "y", "both"] = "y") -> None:
    """Axes with small grey numbers, faint lines (horizontal ones by default), no frame but on the left and below."""
    axis.tick_params(colors=GREY, labelsize=8)
    axis.grid(axis=lines, color="#edf0f4")
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color("#d5dae1")
