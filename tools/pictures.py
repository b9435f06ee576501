#!/usr/bin/env python
"""Draws the routes that README.md and docs/routes.md show, into docs/images/. Needs matplotlib."""

from io import BytesIO
from pathlib import Path

from PIL import Image

from linescan.scans.routes.draw import draw_routes

FOLDER = Path(__file__).parents[1] / "docs" / "images"
PICTURES = {
    "routes.png": "row, col, snake, zigzag, hilbert, -hilbert, w4, cls(row, at=middle, stored=head)",
    "all_routes.png": "row, col, snake, diagonal, zigzag, spiral, hilbert, zorder, -row, T:snake, rot90:zigzag, "
    "fliplr:hilbert, w4, window(4, inside=col), window(4, between=snake), cls(row, at=middle, stored=head)",
}


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, spec in PICTURES.items():
        drawn = BytesIO()
        draw_routes(spec, (8, 8)).savefig(drawn, format="png", dpi=100, bbox_inches="tight")
        # 96 colours are enough for lines, and a third of the bytes.
        Image.open(drawn).convert("RGB").quantize(96).save(FOLDER / name, optimize=True)
        print(FOLDER / name)


if __name__ == "__main__":
    main()
