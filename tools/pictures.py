#!/usr/bin/env python
"""Draws what README.md and the pages show into docs/images/: routes, for which it needs matplotlib.

With a promptable segmentor that was trained on scenes of digits (`tools/pictures.py best.safetensors`) it draws masks
of clicks instead.
"""

import sys
from io import BytesIO
from pathlib import Path

from PIL import Image

from linescan.engine.instance_sets import DigitScenes, centre
from linescan.scans.routes.draw import draw_routes
from linescan.tasks.prompt import Prompt, Prompter

FOLDER = Path(__file__).parents[1] / "docs" / "images"
PICTURES = {
    "routes.png": "row, col, snake, zigzag, hilbert, -hilbert, w4, cls(row, at=middle, stored=head)",
    "all_routes.png": "row, col, snake, diagonal, zigzag, spiral, hilbert, zorder, -row, T:snake, rot90:zigzag, "
    "fliplr:hilbert, w4, window(4, inside=col), window(4, between=snake), cls(row, at=middle, stored=head)",
}


def draw_prompts(checkpoint: str, columns: int = 4, side: int = 288) -> Image.Image:
    """Held-out scenes with two digits or more, of which one is clicked; below them another, of the same scenes."""
    scenes, prompter = DigitScenes(True, 100), Prompter(checkpoint=checkpoint)
    chosen = [i for i in range(len(scenes)) if len(scenes.masks(i)) > 1][:columns]
    sheet = Image.new("RGB", ((side + 8) * columns - 8, 2 * side + 8), "white")
    for column, index in enumerate(chosen):
        image = scenes.image(index, 3)
        for row, mask in enumerate(scenes.masks(index)[:2]):
            prompter.prompts = [Prompt([centre(mask)])]
            [(opened, found)] = prompter.each([image])
            drawn = prompter.draw(opened, found).resize((side, side), Image.Resampling.LANCZOS)
            sheet.paste(drawn, ((side + 8) * column, (side + 8) * row))
    return sheet


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    if len(sys.argv) > 1:
        draw_prompts(sys.argv[1]).save(FOLDER / "clicks.jpg", quality=88, optimize=True)
        print(FOLDER / "clicks.jpg")
        return
    for name, spec in PICTURES.items():
        drawn = BytesIO()
        draw_routes(spec, (8, 8)).savefig(drawn, format="png", dpi=100, bbox_inches="tight")
        # 96 colours are enough for lines, and a third of the bytes.
        Image.open(drawn).convert("RGB").quantize(96).save(FOLDER / name, optimize=True)
        print(FOLDER / name)


if __name__ == "__main__":
    main()
