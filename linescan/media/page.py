"""Pages of HTML that hold all they show: one file, no script, nothing fetched."""

import base64
import io
from html import escape
from typing import Iterable, Sequence

from PIL import Image

from ..errors import visible

__all__ = ["bars", "figure", "figures", "page", "shade", "table"]

_STYLE = """
  body { margin: 2em auto; max-width: 72em; padding: 0 1em; background: #fafaf8; color: #18181c;
         font: 15px/1.45 system-ui, sans-serif; }
  h1 { font-size: 1.5em; margin-bottom: 0; } h2 { font-size: 1.1em; margin: 2em 0 0.5em; } p { color: #555; }
  table { border-collapse: collapse; font-size: 13px; } td, th { padding: 2px 8px; text-align: right; }
  th { font-weight: 600; } td:first-child, th:first-child { text-align: left; }
  tr + tr td { border-top: 1px solid #eee; }
  .scroll { overflow-x: auto; } .many { display: flex; flex-wrap: wrap; gap: 14px; }
  figure { margin: 0; width: 168px; } figure img { width: 100%; image-rendering: auto; border-radius: 4px; }
  figcaption { font-size: 12px; overflow-wrap: anywhere; } figcaption b { color: #c8553d; }
  svg text { font: 11px system-ui, sans-serif; fill: #666; }
"""


def page(title: str, note: str, sections: Iterable[tuple[str, str, str]]) -> bytes:
    """A whole page.

    Args:
        title, note: what it is about; texts.
        sections: (heading, explanation, body): two texts and HTML.
    """
    body = "".join(
        f"<h2>{_text(heading)}</h2>\n<p>{_text(said)}</p>\n{content}\n" for heading, said, content in sections
    )
    return (
        '<!doctype html>\n<html lang="en"><meta charset="utf-8">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">\n"
        f"<title>{_text(title)}</title>\n<style>{_STYLE}</style>\n"
        f"<h1>{_text(title)}</h1>\n<p>{_text(note)}</p>\n{body}</html>\n"
    ).encode()


def _text(text: object) -> str:
    return escape(visible(str(text)))


def table(head: Sequence[str], rows: Iterable[Sequence], colours: Iterable[Sequence[str]] | None = None) -> str:
    """A table of texts; `colours` of the backgrounds of its cells, row by row ("" for none)."""
    lines = ["<tr>" + "".join(f"<th>{_text(cell)}</th>" for cell in head) + "</tr>"]
    for row, colour in zip(rows, colours or iter(lambda: [""] * len(head), None)):
        cells = (f'<td style="background:{c}">' if c else "<td>" for c in colour)
        lines.append("<tr>" + "".join(f"{cell}{_text(value)}</td>" for cell, value in zip(cells, row)) + "</tr>")
    return '<div class="scroll"><table>' + "\n".join(lines) + "</table></div>"


def shade(share: float, hue: tuple[int, int, int] = (42, 157, 143)) -> str:
    """A colour between white (0) and `hue` (1)."""
    return "rgb({},{},{})".format(*(round(255 - (255 - c) * min(max(share, 0), 1)) for c in hue))


def figure(image: Image.Image, caption: str, emphasis: str = "", side: int = 336) -> str:
    """An image of at most `side` pixels, with a caption whose end is set off."""
    small = image.convert("RGB")
    small.thumbnail((side, side))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=85)
    data = base64.b64encode(buffer.getvalue()).decode()
    bold = f" <b>{_text(emphasis)}</b>" if emphasis else ""
    said = f"<figcaption>{_text(caption)}{bold}</figcaption>"
    return f'<figure><img src="data:image/jpeg;base64,{data}" alt="">{said}</figure>'


def figures(made: Iterable[str]) -> str:
    """What `figure` made, side by side."""
    return f'<div class="many">{"".join(made)}</div>'


def bars(heights: Sequence[float | None], widths: Sequence[float], across: str, up: str) -> str:
    """Bars over 0..1, each from 0 to its height, opaque by its width; the diagonal is drawn in. None: no bar."""
    step, side, most = 1 / len(heights), 260, max(widths, default=0) or 1
    shapes = "".join(
        f'<rect x="{40 + side * i * step:.1f}" y="{10 + side * (1 - height):.1f}" width="{side * step - 2:.1f}" '
        f'height="{side * height:.1f}" fill="#2a9d8f" opacity="{0.2 + 0.8 * width / most:.2f}"/>'
        for i, (height, width) in enumerate(zip(heights, widths))
        if height is not None
    )
    ticks = "".join(
        f'<text x="{40 + side * v:.0f}" y="{side + 24}" text-anchor="middle">{v:g}</text>'
        f'<text x="34" y="{14 + side * (1 - v):.0f}" text-anchor="end">{v:g}</text>'
        for v in (0, 0.25, 0.5, 0.75, 1)
    )
    return (
        f'<svg width="{side + 60}" height="{side + 46}">{shapes}'
        f'<path d="M40 {side + 10} L{side + 40} 10" stroke="#c8553d" stroke-dasharray="4 4"/>'
        f'<path d="M40 10 V{side + 10} H{side + 40}" fill="none" stroke="#bbb"/>{ticks}'
        f'<text x="{40 + side / 2}" y="{side + 42}" text-anchor="middle">{_text(across)}</text>'
        f'<text x="46" y="22">{_text(up)}</text></svg>'
    )
