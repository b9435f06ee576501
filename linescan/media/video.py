"""Videos as clips: which frames are looked at, how they are cropped, and how they are read.

A video is a file of any format that FFmpeg knows (read by PyAV, the `video` extra), or a folder of pictures.
Only the frames that are looked at are ever kept, and those as the model's crops: memory does not grow with the video.
"""

import re
from bisect import bisect_left, bisect_right
from pathlib import Path
from typing import Callable, Iterator, NamedTuple, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import BrokenVideo, InputError
from .images import find_images, read_image, to_mode
from .preprocess import Preprocess

__all__ = ["Views", "segments", "crop_boxes", "find_videos", "is_video", "open_video", "Clips"]

_SUFFIXES = frozenset(
    ".mp4 .m4v .mov .avi .mkv .webm .mpg .mpeg .ts .m2ts .mts .wmv .flv .ogv .3gp .mxf .vob .y4m".split()
)


class Views(NamedTuple):
    """How often a video is looked at: `clips` times, each a little later, in `crops` places each."""

    clips: int = 1
    crops: int = 1

    @property
    def count(self) -> int:
        """All in all."""
        return self.clips * self.crops

    @classmethod
    def parse(cls, text: str) -> "Views":
        """ "4x3" -> four clips, three crops. Raises InputError for anything else."""
        if not re.fullmatch(r"[1-9]\d{0,2}x[1-9]\d{0,2}", text):
            raise InputError(f"--views is CLIPSxCROPS, as in 4x3, not {text!r}")
        return cls(*map(int, text.split("x")))


def segments(length: int, frames: int, clips: int = 1) -> list[list[int]]:
    """The frames of each clip, (clips, frames) indices into a video of `length` frames.

    The video is cut into `frames` equal segments, and each clip has one frame from every segment: a single clip that in
    the middle, several clips those that divide the segment evenly. A video that is too short shows frames repeatedly.
    This is the sparse sampling of the paper's evaluation: round(s i) + floor(s (c + 1) / (clips + 1)) with
    s = (length - 1) / frames.
    """
    step = (length - 1) / frames
    return [
        [min(round(step * i) + int(step / (clips + 1) * (clip + 1)), length - 1) for i in range(frames)]
        for clip in range(clips)
    ]


def crop_boxes(size: tuple[int, int], target: tuple[int, int], crops: int = 1, crop_pct: float = 1.0) -> list[tuple]:
    """What each crop shows of a frame: boxes (left, top, right, bottom) of the target's shape, in pixels of the frame.

    They are as large as fits (times `crop_pct`), and stand evenly along the axis that has room, from end to end; a
    single one stands in the centre.

    Args:
        size: (width, height) of the frame.
        target: (height, width) that the model sees.
    """
    scale = min(size[0] / target[1], size[1] / target[0]) * crop_pct
    box = np.array([target[1], target[0]]) * scale
    room = np.maximum(np.array(size) - box, 0)
    long = room.argmax()
    boxes = []
    for i in range(crops):
        corner = room / 2
        if crops > 1:
            corner[long] = room[long] * i / (crops - 1)
        boxes.append((*corner.tolist(), *np.minimum(corner + box, size).tolist()))
    return boxes


# -- reading ----------------------------------------------------------------------------------------------------------


def is_video(path: str | Path) -> bool:
    """Whether the name of a file is that of a video."""
    return Path(path).suffix.lower() in _SUFFIXES


def find_videos(folder: str | Path) -> list[Path]:
    """Every video file in `folder` and below it, and every folder there (or `folder` itself) that holds pictures."""
    files = [p for p in Path(folder).rglob("*") if is_video(p) and p.is_file()]
    return sorted(files + list({p.parent for p in find_images(folder)}))


def open_video(path: str | Path) -> "FrameFolder | VideoFile":
    """The video at `path`: a file, or a folder of frames.

    Raises:
        BrokenVideo: it cannot be read, or holds no frame.
        InputError: PyAV is needed and not installed.
    """
    return FrameFolder(path) if Path(path).is_dir() else VideoFile(path)


class FrameFolder:
    """The pictures of a folder, in the order of their names; numbers in names count as numbers."""

    def __init__(self, path: str | Path):
        def by_number(file: Path) -> list:
            return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", file.name)]

        self.files = sorted((p for p in find_images(path) if p.parent == Path(path)), key=by_number)
        if not self.files:
            raise BrokenVideo(f"{path}: a folder without pictures")

    def __len__(self) -> int:
        return len(self.files)

    def pictures(self, indices: Sequence[int], channels: int) -> Iterator[Image.Image]:
        """The frames with these indices. Raises BrokenImage."""
        for i in indices:
            yield read_image(self.files[i], channels)


class VideoFile:
    """A file that FFmpeg can read. Frames are counted, never estimated from a rate, which need not be constant."""

    def __init__(self, path: str | Path):
        try:
            import av
        except ImportError:
            raise InputError("reading videos takes PyAV; `pip install 'linescan[video]'` installs it") from None
        self._av, self.path = av, path
        times, keys = [], []
        with _Reading(av, path) as (container, stream):
            continuous = not container.format.flags & av.format.Flags.ts_discont.value  # MPEG streams: no
            for packet in container.demux(stream):
                if packet.is_corrupt:
                    raise BrokenVideo(f"{path}: the file ends in the middle of the video")
                if packet.size and not packet.is_discard:
                    times.append(packet.pts)
                    if packet.is_keyframe:
                        keys.append(packet.pts)
        if not times:
            raise BrokenVideo(f"{path}: the video holds no frames")
        self._length = len(times)
        # Where all times are known and true, frames can be reached from the keyframe before them.
        known = continuous and None not in times and len(set(times)) == len(times)
        self._times = sorted(times) if known else []
        self._keys = sorted(keys) if known else []

    def __len__(self) -> int:
        return self._length

    def pictures(self, indices: Sequence[int], channels: int) -> Iterator[Image.Image]:
        """The frames with these indices (ascending), upright. Raises BrokenVideo."""
        for frame in self._frames(indices):
            yield to_mode(frame.to_image().rotate(frame.rotation, expand=True), channels)

    def _frames(self, indices: Sequence[int]) -> Iterator:
        with _Reading(self._av, self.path) as (container, stream):
            stream.thread_type = "AUTO"
            number, frame = -1, None  # the last decoded
            decoded = container.decode(stream)
            for at, i in enumerate(indices):
                passed = bisect_right(self._keys, self._times[i]) if self._keys else 0
                if passed and bisect_left(self._times, self._keys[passed - 1]) > number + 1:
                    container.seek(self._keys[passed - 1], stream=stream)
                    decoded = container.decode(stream)
                    frame = next(decoded, None)
                    number = bisect_left(self._times, frame.pts) if frame and frame.pts in self._times else i + 1
                    if number > i:  # the file lands elsewhere: from the start, one by one
                        self._keys = []
                        yield from self._frames(indices[at:])
                        return
                while number < i and (following := next(decoded, None)):
                    frame, number = following, number + 1
                if frame is None:
                    raise BrokenVideo(f"{self.path}: no frame can be decoded")
                yield frame  # the last one again, where some packets held no frame


class _Reading:
    """An open file and its stream of pictures; what FFmpeg says of a damaged one becomes a line that names it."""

    def __init__(self, av, path: str | Path):
        self.av, self.path = av, path

    def __enter__(self):
        try:
            # Files only: a playlist that calls itself a video must not make FFmpeg fetch anything.
            self.container = self.av.open(f"file:{self.path}", options={"protocol_whitelist": "file"})
        except (self.av.FFmpegError, OSError) as error:
            raise self._broken(error) from None
        stream = self.container.streams.best("video")
        if stream is None:
            self.container.close()
            raise BrokenVideo(f"{self.path}: no pictures in it, only sound")
        return self.container, stream

    def __exit__(self, kind, error, trace):
        self.container.close()
        if isinstance(error, (self.av.FFmpegError, OSError)):
            raise self._broken(error) from None

    def _broken(self, error: Exception) -> BrokenVideo:
        if Path(self.path).is_file() and not Path(self.path).stat().st_size:
            return BrokenVideo(f"{self.path}: the file is empty")
        if isinstance(error, self.av.error.InvalidDataError):
            return BrokenVideo(f"{self.path}: not a video, or damaged")
        return BrokenVideo(f"{self.path}: {error.strerror or error}")


# -- clips ------------------------------------------------------------------------------------------------------------


class Clips:
    """The views of videos, as a model wants them.

    Args:
        frames: of a clip.
        preprocess: how the model wants its pictures.
        views: how often, and in how many places, each video is looked at.
    """

    def __init__(self, frames: int, preprocess: Preprocess, views: Views = Views()):
        self.frames, self.preprocess, self.looks = frames, preprocess, Views(*views)

    def views(self, path: str | Path, progress: Callable[[float], None] = lambda share: None) -> Iterator[Tensor]:
        """All views of a video, (C, T, H, W) each: of every clip all crops. `progress` gets shares of the reading.

        Raises:
            BrokenVideo, BrokenImage: the video, or one of its frames in a folder, cannot be read.
        """
        channels, *target = self.preprocess.size
        resample = Image.Resampling[self.preprocess.interpolation.upper()]
        mean, std = torch.tensor(self.preprocess.mean), torch.tensor(self.preprocess.std)
        video = open_video(path)
        clips = segments(len(video), self.frames, self.looks.clips)
        indices = sorted({i for clip in clips for i in clip})
        kept = {}  # index of a frame -> its crops, bytes (H, W, C)
        for i, image in zip(indices, video.pictures(indices, channels)):
            boxes = crop_boxes(image.size, target, self.looks.crops, self.preprocess.crop_pct)
            kept[i] = [np.asarray(image.resize(target[::-1], resample, box)).reshape(*target, -1) for box in boxes]
            progress(1 / len(indices))
        for clip in clips:
            for crop in range(self.looks.crops):
                view = torch.from_numpy(np.stack([kept[i][crop] for i in clip]))
                yield ((view / 255 - mean) / std).movedim(-1, 0)
