"""The demos."""

from pathlib import Path
from typing import Annotated, Optional

import typer

from linescan.errors import InputError

from .options import command


@command(
    "linescan demo", "linescan demo --out /tmp/demo", "linescan demo --dense", "linescan demo --points",
    "linescan demo --pixels",
)  # fmt: skip
def demo(
    to: Annotated[
        Optional[Path],
        typer.Option("--out", "-o", help="Where everything goes; default: runs/demo, runs/demo-dense, ..."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Another seed, another network.")] = 0,
    dense: Annotated[
        bool, typer.Option("--dense", help="Segment and detect digits in scenes instead; needs OpenMMLab.")
    ] = False,
    points: Annotated[
        bool, typer.Option("--points", help="Name digits as clouds of points instead, and find their strokes.")
    ] = False,
    pixels: Annotated[
        bool, typer.Option("--pixels", help="Restore photographs instead: networks whose answers are images.")
    ] = False,
):
    """Train a small Vim on handwritten digits, try it on some it has not seen, and draw all of it.

    With --dense, a UPerNet (mmseg) and a Mask R-CNN (mmdet) instead, on digits in scenes. With --points, a PointMamba
    and a Mamba3D on digits as clouds of points. With --pixels, two small MambaIRv2, which denoise and enlarge
    photographs, against plain filters; a MambaAD that finds what does not belong; and a Sigma, which reads two images.
    """
    from linescan.extras import require

    if dense + points + pixels > 1:
        raise InputError("--dense, --points and --pixels are demos of their own: one at a time")
    for package in ("matplotlib", "sklearn"):
        require(package, "demo")
    if dense:
        from linescan.demos.scenes import demo_dense

        demo_dense(to or "runs/demo-dense", seed=seed)
        return
    if pixels:
        from linescan.demos.pixels import demo_pixels

        require("skimage", "demo")
        demo_pixels(to or "runs/demo-pixels", seed=seed)
        return
    from dataclasses import replace

    if points:
        from linescan.demos.points import TRAININGS, demo_points

        trainings = {name: replace(recipe, seed=seed) for name, recipe in TRAININGS.items()}
        demo_points(to or "runs/demo-points", trainings)
        return
    from linescan.demos.digits import RECIPE
    from linescan.demos.digits import demo as run

    run(to or "runs/demo", replace(RECIPE, seed=seed))
