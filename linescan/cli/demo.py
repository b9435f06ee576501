"""The demos."""

from pathlib import Path
from typing import Annotated, Optional

import typer

from .options import command


@command("linescan demo", "linescan demo --out /tmp/demo", "linescan demo --dense")
def demo(
    to: Annotated[
        Optional[Path],
        typer.Option("--out", "-o", help="Where everything goes; default: runs/demo, or runs/demo-dense."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Another seed, another network.")] = 0,
    dense: Annotated[
        bool, typer.Option("--dense", help="Segment and detect digits in scenes instead; needs OpenMMLab.")
    ] = False,
):
    """Train a small Vim on handwritten digits, try it on some it has not seen, and draw all of it.

    With --dense, a UPerNet (mmseg) and a Mask R-CNN (mmdet) instead, on digits in scenes.
    """
    from linescan.extras import require

    for package in ("matplotlib", "sklearn"):
        require(package, "demo")
    if dense:
        from linescan.demos.scenes import demo_dense

        demo_dense(to or "runs/demo-dense", seed=seed)
        return
    from dataclasses import replace

    from linescan.demos.digits import RECIPE
    from linescan.demos.digits import demo as run

    run(to or "runs/demo", replace(RECIPE, seed=seed))
