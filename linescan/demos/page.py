"""The look of all drawings of the demos."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["BAD", "GOOD", "GREY", "INK", "PAPER", "plain"]

PAPER, INK, GREY, GOOD, BAD = "#fdfdfb", "#2b2d42", "#8d99ae", "#2a9d8f", "#e76f51"


def plain(axis: "Axes") -> None:
    """Axes with small grey numbers, faint horizontal lines, and no frame but on the left and below."""
    axis.tick_params(colors=GREY, labelsize=8)
    axis.grid(axis="y", color="#edf0f4")
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color("#d5dae1")
