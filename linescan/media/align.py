"""Whether two images of a place lie on each other."""

import numpy as np

__all__ = ["shift_between"]

CERTAIN = 0.1  # height of a peak, of 1 for images that are the same but for a shift
SMALLEST = 32


def shift_between(before: np.ndarray, after: np.ndarray) -> tuple[int, int] | None:
    """By how many pixels (down, right) the second image lies beside the first; None where that cannot be told.

    The highest peak of the phase correlation (Kuglin and Hines, 1975), if it is high, and at least three times what is
    found without a shift.

    Args:
        before, after: (H, W, C), of one size.
    """
    if min(before.shape[:2]) < SMALLEST:
        return None
    window = np.outer(*(np.hanning(side) for side in before.shape[:2]))
    first, second = ((x.mean(-1) - x.mean()) * window for x in (before, after))
    cross = np.fft.fft2(second) * np.conj(np.fft.fft2(first))
    strength = np.abs(cross)
    if not strength.max():  # one of them is even
        return None
    peaks = np.fft.ifft2(cross / np.maximum(strength, 1e-9 * strength.max())).real
    row, column = np.unravel_index(peaks.argmax(), peaks.shape)
    down, right = (int(at) - (side if at > side // 2 else 0) for at, side in zip((row, column), peaks.shape))
    if peaks[row, column] < CERTAIN:
        return None
    if max(abs(down), abs(right)) <= 1:
        return 0, 0
    in_place = np.roll(peaks, (1, 1), (0, 1))[:3, :3].max()
    return (down, right) if peaks[row, column] >= 3 * in_place else None
