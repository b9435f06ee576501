"""Videos as clips: which frames are used, how they are cropped, and how they are read.

A video is a file of any format that FFmpeg knows (read by PyAV, the `video` extra), or a folder of images.
Only the frames that are used are ever kept, and those as the model's crops: memory does not grow with the video.
"""

import errno
import math
import os
import random
import re
import warnings
from abc import ABC, abstractmethod
from array import array
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any, Callable, Iterator, NamedTuple, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import BrokenImage, BrokenVideo, DamagedVideo, InputError
from .find import find_videos
from .formats import CONTAINERS, is_hidden, is_image, is_video
from .images import read_image
from .pixels import to_mode
from .preprocess import Preprocess, normalise
from .vips import WHOLE

__all__ = ["Views", "segments", "random_segments", "crop_boxes", "find_videos", "is_video", "open_video", "Clips"]


class Views(NamedTuple):
    """Number of views of a video: `clips` in time, each a little later, times `crops` in space."""

    clips: int = 1
    crops: int = 1

    @property
    def count(self) -> int:
        """Of all views."""
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


def random_segments(length: int, frames: int) -> list[int]:
    """The frames of a clip for training: of each of `frames` equal segments a random one, by Python's generator.

    Segment i runs from round(s i) to round(s (i + 1)), both included, with s = (length - 1) / frames.
    """
    step = (length - 1) / frames
    return [random.randint(round(step * i), round(step * (i + 1))) for i in range(frames)]


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


def open_video(path: str | Path, strict: bool = False) -> "FrameFolder | VideoFile":
    """The video at `path`: a file, or a folder of frames.

    A video that is cut short or damaged is read as far as it can be decoded, and a `DamagedVideo` warning says how many
    frames that are.

    Args:
        strict: refuse such a video.

    Raises:
        BrokenVideo: it cannot be read, holds no frame, or, if `strict`, fewer frames than it promises.
        InputError: PyAV is needed and not installed.
    """
    return FrameFolder(path, strict) if Path(path).is_dir() else VideoFile(path, strict)


class _Video(ABC):
    """Frames that are read one after the other; memory does not grow with their number.

    Attributes:
        path: of the file or folder.
        rate: frames in a second, on average; None where that is not known.
    """

    rate: Fraction | None = None

    def __init__(self, path: str | Path, strict: bool):
        self.path, self.strict = path, strict

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def _read(self, indices: Sequence[int], channels: int) -> Iterator[tuple[int, Any]]:
        """Frames with their numbers, in order: for each index those from some place before it on, up to it."""

    def _show(self, frame: Any, channels: int) -> Image.Image:
        return frame

    def images(self, indices: Sequence[int], channels: int) -> Iterator[Image.Image]:
        """The frames with these indices (ascending), upright, with so many channels (see `to_mode`).

        In place of a frame that cannot be read comes the one before it, or else the one after it; at the end a
        `DamagedVideo` warning says how many frames could be read.

        Raises:
            BrokenVideo, BrokenImage: no frame can be read; or, of a `strict` video, one cannot.
        """
        with _one_line(self.path):
            frames = self._read(indices, channels)
            number, frame, ahead, missing = -1, None, None, 0
            for at, i in enumerate(indices):
                while number < i:
                    ahead = ahead or next(frames, None)
                    if ahead is None or ahead[0] > i:
                        break
                    (number, frame), ahead = ahead, None
                if frame is None and ahead is None:
                    raise BrokenVideo("no frame can be decoded")
                missing += number != i
                if missing and (self.strict or at == len(indices) - 1):
                    self._report(f"{len(indices) - missing} of {len(indices)} frames could be decoded")
                yield self._show(ahead[1] if frame is None else frame, channels)

    def _report(self, damage: str) -> None:
        if self.strict:
            raise BrokenVideo(f"{self.path}: {damage}")
        warnings.warn(DamagedVideo(f"{self.path}: {damage}"), stacklevel=3)


class FrameFolder(_Video):
    """The images in a folder, in the order of their names; numbers in names count as numbers."""

    def __init__(self, path: str | Path, strict: bool = False):
        super().__init__(path, strict)

        def by_number(name: str) -> list:
            return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", name)]

        with _one_line(path):
            names = sorted(
                (e.name for e in os.scandir(path) if is_image(e.name) and not is_hidden(e.name)), key=by_number
            )
            self.files = [Path(path) / name for name in names if (Path(path) / name).is_file()]
        if not self.files:
            raise BrokenVideo(f"{path}: a folder without images")

    def __len__(self) -> int:
        return len(self.files)

    def _read(self, indices: Sequence[int], channels: int) -> Iterator[tuple[int, Image.Image]]:
        none_yet = None
        for i in indices:
            try:
                yield i, read_image(self.files[i], channels)
                none_yet = False
            except BrokenImage as error:
                none_yet = error if none_yet is None else none_yet
        if none_yet:
            raise none_yet


class VideoFile(_Video):
    """A file that FFmpeg can read. Frames are counted, never estimated from a rate, which need not be constant.

    When it is opened, all packets are read and no frame is decoded. Only if a packet is damaged, or if there are fewer
    of them than the file promises, all frames are decoded once, to count them.
    """

    def __init__(self, path: str | Path, strict: bool = False):
        super().__init__(path, strict)
        with _reading(path) as (container, stream):
            self.rate = stream.average_rate or None
            packets = _Packets(container, stream)
        self._length = len(packets.times)
        if not self._length:
            raise BrokenVideo(f"{path}: the video holds no frames")
        # Where all times are known and true, frames can be reached from the keyframe before them.
        times = np.sort(packets.times)
        known = packets.ordered and not packets.damage and bool((np.diff(times) > 0).all())
        self._times, self._keys = (times, np.sort(packets.keys)) if known else (times[:0], times[:0])
        self._threads = "SLICE" if packets.damage else "AUTO"  # among frames, one that is damaged takes others along
        if packets.damage:
            self._count(packets)

    def _count(self, packets: "_Packets") -> None:
        with _reading(self.path, self._threads) as (container, stream):
            self._length = sum(1 for _ in _decode(container, stream))
        if not self._length:
            raise BrokenVideo(f"{self.path}: none of {packets.promised} frames can be decoded")
        if self._length < packets.promised:
            promised = f"{'about ' if packets.uneven else ''}{packets.promised}"
            self._report(f"{self._length} of {promised} frames can be decoded; {packets.damage}")
        elif packets.ends_early:
            self._report(f"{self._length} frames can be decoded; {packets.damage}")

    def __len__(self) -> int:
        return self._length

    def _show(self, frame, channels: int) -> Image.Image:
        transparent = any(component.is_alpha for component in frame.format.components)
        image = Image.fromarray(frame.to_ndarray(format="rgba")) if transparent else frame.to_image()
        return to_mode(image.rotate(frame.rotation, expand=True), channels)

    def _read(self, indices: Sequence[int], channels: int) -> Iterator[tuple[int, Any]]:
        with _reading(self.path, self._threads) as (container, stream):
            frames, number = _decode(container, stream), -1
            for at, i in enumerate(indices):
                if number >= i:
                    continue
                passed = np.searchsorted(self._keys, self._times[i], "right") if len(self._keys) else 0
                if passed and self._place(self._keys[passed - 1]) > number + 1:
                    container.seek(int(self._keys[passed - 1]), stream=stream)
                    frames = _decode(container, stream)
                    frame = next(frames, None)
                    number = None if frame is None else self._place(frame.pts)
                    if number is None or number > i:  # the file lands elsewhere: from the start, one by one
                        self._keys = self._keys[:0]
                        yield from self._read(indices[at:], channels)
                        return
                    yield number, frame
                while number < i and (frame := next(frames, None)):
                    place = self._place(frame.pts)
                    number = number + 1 if place is None else place
                    yield number, frame

    def _place(self, time: int | None) -> int | None:
        """The number of the frame of this time; None where times are not known."""
        at = len(self._times) if time is None else int(np.searchsorted(self._times, time))
        return at if at < len(self._times) and self._times[at] == time else None


_TIMED = {"matroska", "flv", "asf", "mxf", "mov"}  # containers that state their duration; others derive it


class _Packets:
    """What the packets of a stream tell before any is decoded.

    Attributes:
        times: (packets,) int64, of the frames in the order of the packets.
        keys: of the frames that can be decoded without others.
        ordered: whether all times are known, and run through the whole file.
        promised: how many frames there should be: at least those of which there is a packet.
        uneven: whether frames are not evenly spaced, and `promised` is no more than likely.
        damage: why perhaps not all of them can be decoded, or "".
        ends_early: whether the file is cut short, and what should have followed is not known.
    """

    def __init__(self, container, stream):
        kind = set(container.format.name.split(","))
        self.ordered = not container.format.flags & _av().format.Flags.ts_discont.value  # MPEG streams: no
        times, keys, seen, corrupt = array("q"), array("q"), 0, False
        end, without = -math.inf, -math.inf  # of all packets, and of those that do not say how long they last
        for packet in _demux(container):
            if packet is None:  # the file cannot be read on
                corrupt = True
                break
            time = packet.dts if packet.pts is None else packet.pts
            if time is not None and packet.time_base:
                end = max(end, float((time + (packet.duration or 0)) * packet.time_base))
                if not packet.duration and packet.stream is stream:
                    without = max(without, float(time * packet.time_base))
            if packet.stream is not stream or (time is None and not packet.size):  # the last one of a stream is empty
                continue
            seen += 1
            corrupt |= packet.is_corrupt
            if packet.size and not packet.is_discard:
                self.ordered &= packet.pts is not None
                times.append(time or 0)
                if packet.is_keyframe:
                    keys.append(time or 0)
        self.times, self.keys = (np.frombuffer(v, np.int64) if v else np.zeros(0, np.int64) for v in (times, keys))
        self.promised, self.uneven = len(times) + max(_indexed(stream, kind) - seen, 0), False
        if self.promised == len(times) and kind & _TIMED and container.duration:
            start, duration = (v / _av().time_base for v in (container.start_time or 0, container.duration))
            gap, self.uneven = self._gap(stream)
            missing = duration - (max(end, without + gap) - start)
            if missing > (1.5 if self.uneven else 0.5) * gap:
                self.promised = max(round(duration / gap), len(times) + 1)
        ends_early = {"mpegts": _ends_in_a_packet, "asf": _is_smaller_than_it_says}
        self.ends_early = any(found(_path(container.name)) for name, found in ends_early.items() if name in kind)
        self.damage = "the file is damaged" if corrupt else ""
        if self.promised > len(times) or self.ends_early:
            self.damage = "the file is cut short"

    def _gap(self, stream) -> tuple[float, bool]:
        """Seconds from frame to frame, and whether many frames are spaced otherwise."""
        gaps = np.diff(np.sort(self.times)) * float(stream.time_base)
        gaps = gaps[gaps > 0]
        if not len(gaps):
            return float(1 / (stream.average_rate or 25)), False
        usual = np.median(gaps)
        uneven = np.mean(abs(gaps - usual) > usual / 2) > 0.2
        return float(gaps.mean() if uneven else usual), bool(uneven)


def _indexed(stream, kind: set[str]) -> int:
    """How many packets of a stream the container lists, 0 where it has no list."""
    if "mov" in kind:
        return len(stream.index_entries)  # without those that an edit list leaves out
    if "mxf" in kind and stream.average_rate and stream.time_base * stream.average_rate == 1:
        return stream.duration or 0  # in frames
    return stream.frames if "avi" in kind else 0


def _path(url: str) -> str:
    return url.removeprefix("file:")


def _ends_in_a_packet(path: str) -> bool:
    """Whether an MPEG transport stream ends within one of its packets, which are all of one length."""
    with open(path, "rb") as file:
        head = file.read(1024)
    for length, before in ((188, 0), (192, 4), (204, 0)):  # 192: with a time before each
        if all(head[before + i * length : before + i * length + 1] == b"G" for i in range(4)):
            return Path(path).stat().st_size % length != 0
    return False


_ASF_FACTS = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")  # what stands in front of the facts about the file


def _is_smaller_than_it_says(path: str) -> bool:
    """Whether an ASF (WMV) file is shorter than its header says."""
    with open(path, "rb") as file:
        head = file.read(2**16)
    at = head.find(_ASF_FACTS)
    return at >= 0 and int.from_bytes(head[at + 40 : at + 48], "little") > Path(path).stat().st_size


def _demux(container, *streams) -> Iterator:
    """The packets of a file, of all streams or of some; None in the end if it could not be read to its end."""
    packets = container.demux(*streams)
    while True:
        try:
            packet = next(packets, None)
        except _av().FFmpegError:
            yield None
            return
        if packet is None:
            return
        yield packet


def _decode(container, stream) -> Iterator:
    """The frames of a stream from where it stands on; what cannot be decoded, or only in part, is left out."""
    broadcast = container.format.flags & _av().format.Flags.ts_discont.value  # there, marks are no more than suspicions
    for packet in _demux(container, stream):
        if packet is not None and packet.is_corrupt and not broadcast:
            continue  # only a part of it is in the file
        try:
            frames = packet.decode() if packet is not None else stream.decode(None)
        except _av().FFmpegError:
            continue
        yield from (frame for frame in frames if not frame.is_corrupt)


def _av():
    try:
        import av
    except ImportError:
        raise InputError("reading videos takes PyAV; `pip install 'linescan[video]'` installs it") from None
    return av


@contextmanager
def _reading(path: str | Path, threads: str = "AUTO") -> Iterator[tuple]:
    """An open file and its stream of images; what goes wrong in the block becomes a line that names the file."""
    av = _av()
    # torchvision 0.25 has FFmpeg's messages passed to Python. A decoder's threads then wait for Python to take them,
    # and Python, where it frees the decoder, for its threads.
    av.logging.set_level(None)
    with _one_line(path):
        if not Path(path).is_file():
            raise BrokenVideo("not a file" if Path(path).exists() else "No such file")
        # Files only, and no playlists: a file that calls itself a video must not make FFmpeg open anything else.
        options = {"protocol_whitelist": "file", "format_whitelist": CONTAINERS}
        with av.open(f"file:{path}", container_options=options, metadata_errors="replace") as container:
            stream = container.streams.best("video")
            if stream is not None and stream.codec_context is None:
                raise BrokenVideo("not a video, or damaged")
            if stream is None or stream.disposition & av.stream.Disposition.attached_pic:
                sound = container.streams.audio
                raise BrokenVideo("only sound, no images" if sound else "not a video, or damaged")
            if stream.width * stream.height > WHOLE:
                raise BrokenVideo(f"frames of {stream.width}x{stream.height} pixels; {WHOLE // 10**6} million at most")
            stream.thread_type = threads
            yield container, stream


@contextmanager
def _one_line(path: str | Path) -> Iterator[None]:
    """Whatever goes wrong with a video in the block becomes a `BrokenVideo` of one line that names it."""
    try:
        yield
    except InputError as error:
        named = not isinstance(error, BrokenVideo) or str(error).startswith(f"{path}: ")
        raise error if named else BrokenVideo(f"{path}: {error}") from None
    except MemoryError:
        raise BrokenVideo(f"{path}: there is not enough memory to read it") from None
    except Exception as error:
        empty = Path(path).is_file() and not Path(path).stat().st_size
        damaged = type(error).__name__ in ("InvalidDataError", "EOFError", "ArgumentError")
        # Of PyAV's, this one means that the file ends in its header.
        damaged |= type(error).__module__.startswith("av.") and getattr(error, "errno", None) == errno.EIO
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        reason = "the file is empty" if empty else "not a video, or damaged" if damaged else reason.splitlines()[0]
        raise BrokenVideo(f"{path}: {reason}") from None


# -- clips ------------------------------------------------------------------------------------------------------------


class Clips:
    """The views of videos, as a model wants them.

    Args:
        frames: of a clip.
        preprocess: how the model wants its images.
        views: how many clips are taken of each video, and how many crops of each clip.
        strict: refuse videos that are cut short or damaged; see `open_video`.
    """

    def __init__(self, frames: int, preprocess: Preprocess, views: Views = Views(), strict: bool = False):
        self.frames, self.preprocess, self.looks, self.strict = frames, preprocess, Views(*views), strict

    def views(self, path: str | Path, progress: Callable[[float], None] = lambda share: None) -> Iterator[Tensor]:
        """All views of a video, (C, T, H, W) each: of every clip all crops. `progress` gets shares of the reading.

        Raises:
            BrokenVideo, BrokenImage: the video, or one of its frames in a folder, cannot be read.
        """
        channels, *target = self.preprocess.size
        resample = Image.Resampling[self.preprocess.interpolation.upper()]
        mean, std = ([255 * v for v in values] for values in (self.preprocess.mean, self.preprocess.std))
        video = open_video(path, self.strict)
        clips = segments(len(video), self.frames, self.looks.clips)
        indices = sorted({i for clip in clips for i in clip})
        kept = {}  # index of a frame -> its crops, bytes (H, W, C)
        for i, image in zip(indices, video.images(indices, channels)):
            boxes = crop_boxes(image.size, target, self.looks.crops, self.preprocess.crop_pct)
            kept[i] = [np.asarray(image.resize(target[::-1], resample, box)).reshape(*target, -1) for box in boxes]
            progress(1 / len(indices))
        for clip in clips:
            for crop in range(self.looks.crops):
                view = torch.from_numpy(np.stack([kept[i][crop] for i in clip])).movedim(-1, 1)
                yield normalise(view, mean, std).movedim(1, 0)
