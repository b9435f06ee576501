"""Values over an image as colours."""

import numpy as np
from PIL import Image

__all__ = ["draw_heat"]

_RAMP = np.array([(13, 8, 60), (114, 24, 109), (211, 67, 67), (250, 155, 40), (252, 248, 170)], np.float64)


def draw_heat(
    values: np.ndarray,
    image: Image.Image,
    opacity: float = 0.55,
    mark: tuple[float, float] | None = None,
    span: tuple[float, float] | None = None,
) -> Image.Image:
    """`image`, RGB, under colours from dark (the lowest value) to light (the highest).

    Args:
        values: (h, w), finite; stretched over the image, smoothly.
        image: of any size; one whose longer side is below 384 pixels is enlarged by a whole factor.
        opacity: of the colours, 0 to 1.
        mark: a place that is marked by a cross, as shares of the width and the height.
        span: the values of the darkest and of the lightest colour; by default the lowest and the highest.
    """
    canvas = image.convert("RGB")
    factor = -(-384 // max(canvas.size))
    canvas = canvas.resize((canvas.width * factor, canvas.height * factor), Image.Resampling.NEAREST)
    low, high = span or (float(values.min()), float(values.max()))
    shares = (values - low).clip(0, high - low) / (high - low) if high > low else np.zeros_like(values)
    smooth = Image.fromarray(shares.astype(np.float32)).resize(canvas.size, Image.Resampling.BILINEAR)
    places = np.asarray(smooth).clip(0, 1)[..., None] * (len(_RAMP) - 1)
    below = places.astype(int).clip(max=len(_RAMP) - 2)
    colours = _RAMP[below[..., 0]] * (1 - places + below) + _RAMP[below[..., 0] + 1] * (places - below)
    pixels = np.rint(np.asarray(canvas) * (1 - opacity) + colours * opacity).astype(np.uint8)
    if mark:
        x, y = (min(int(share * side), side - 1) for share, side in zip(mark, canvas.size))
        arm = max(max(canvas.size) // 40, 3)
        pixels[max(y - arm, 0) : y + arm + 1, max(x - 1, 0) : x + 2] = 255
        pixels[max(y - 1, 0) : y + 2, max(x - arm, 0) : x + arm + 1] = 255
    return Image.fromarray(pixels)
