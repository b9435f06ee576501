"""Files in, files out: what `linescan segment` and `linescan detect` do with pictures, folders and videos.

OUT/overlays/NAME.jpg           what was found, drawn into the picture; NAME.mp4 for a video
OUT/masks/NAME.png              segment: the class of each pixel, with a palette; of a video NAME/000000.png, ...
OUT/classes.json                segment: names and colours of the classes
OUT/detections.json             detect: COCO's result format, masks as RLE
OUT/images.json                 detect: the pictures and categories that it speaks of, as a COCO dataset
"""

import json
import os
from fractions import Fraction
from glob import glob
from itertools import groupby
from pathlib import Path
from typing import Callable, Iterator, NamedTuple, Sequence

import numpy as np
from PIL import Image

from ..engine.atomic import atomic
from ..errors import BrokenVideo, InputError
from ..media.images import find_images
from ..media.large import write_mask
from ..media.video import is_video, open_video
from .detect import Detector
from .results import Detections
from .segment import Segmenter

__all__ = ["Instances", "Masks", "Source", "find_sources", "run"]

LEGEND_ROWS = 2  # under the frames of a video, which are all of one size


class Source(NamedTuple):
    """A picture or video file, and the name of what is written about it: a path without suffix."""

    path: Path
    name: str


def find_sources(arguments: Sequence[str | Path], out: Path) -> list[Source]:
    """The files that are meant by paths of files and folders, and by patterns such as `photos/**/*.jpg`.

    What lies in `out` is passed over. Names are those below a folder, else the file's; where two agree, they keep
    their suffixes.

    Raises:
        InputError: nothing is there.
    """
    found: dict[Path, str] = {}
    for argument in map(str, arguments):
        path = Path(argument)
        if path.is_dir():
            inside = sorted(find_images(path) + [p for p in path.rglob("*") if is_video(p) and p.is_file()])
            files = {p: str(p.relative_to(path)) for p in inside if out.resolve() not in p.resolve().parents}
            if not files:
                raise InputError(f"{path} holds no pictures or videos")
        elif path.exists():
            files = {path: path.name}
        else:
            files = {p: p.name for p in map(Path, sorted(glob(argument, recursive=True))) if p.is_file()}
            if not files:
                raise InputError(f"{path} does not exist" if "*" not in argument else f"no file matches {argument}")
        found |= {path: name for path, name in files.items() if path not in found}
    stems = [str(Path(name).with_suffix("")) for name in found.values()]
    names, taken = [], set()
    for stem, full in zip(stems, found.values()):
        name = full if stems.count(stem) > 1 else stem
        number = 2
        while name in taken:
            name, number = f"{full}-{number}", number + 1
        taken.add(name)
        names.append(name)
    return [Source(*pair) for pair in zip(found, names)]


class Masks:
    """Masks as PNG files, their names in classes.json."""

    def __init__(self, tool: Segmenter, out: Path):
        self.tool, self.out = tool, out
        classes = [
            {"id": i, "name": name, "color": colour} for i, (name, colour) in enumerate(zip(tool.classes, tool.palette))
        ]
        with atomic(out / "classes.json") as file:
            file.write(json.dumps(classes, indent=1).encode())

    def save(self, source: Source, mask: np.ndarray, frame: int | None = None) -> None:
        """Writes the mask of a picture, or of a frame of a video."""
        path = self.out / "masks" / (source.name + (".png" if frame is None else f"/{frame:06}.png"))
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic(path) as file:
            write_mask(file, mask, self.tool.palette)

    def draw(self, pixels, mask: np.ndarray, legend_rows: int | None = None) -> Image.Image:
        """The overlay."""
        return self.tool.draw(pixels, mask, legend_rows)

    def describe(self, mask: np.ndarray) -> str:
        """The largest classes, in words."""
        counts = sum(np.bincount(rows.ravel(), minlength=len(self.tool.classes)) for rows in np.array_split(mask, 16))
        best = [i for i in np.argsort(-counts)[:3] if counts[i]]
        return ", ".join(f"{self.tool.classes[i]} {100 * counts[i] / mask.size:.0f} %" for i in best)

    def close(self) -> None:
        """Nothing is left to write."""


class Instances:
    """All instances in one file of COCO's result format, and the pictures and categories beside it.

    Args:
        tool, out: the detector, and where the files go.
        score: instances of at least this score are drawn and counted; the file has all.
        annotations: a COCO dataset, whose ids of pictures (by file name) and categories (by name) are used, so that
            the results can be evaluated with it.

    Raises:
        InputError: `annotations` is no such file, or lacks a category.
    """

    def __init__(self, tool: Detector, out: Path, score: float = 0.3, annotations: Path | None = None):
        self.tool, self.out, self.score = tool, out, score
        self.images: list[dict] = []
        self.results: list[dict] = []
        self.ids: dict[str, int] | None = None
        self.categories = [{"id": i, "name": name} for i, name in enumerate(tool.classes, 1)]
        if annotations:
            self.ids, known = _read_annotations(annotations)
            if strange := [name for name in tool.classes if name not in known]:
                raise InputError(f"{annotations} has no category {strange[0]!r}, which the model knows")
            self.categories = [{"id": known[name], "name": name} for name in tool.classes]

    def save(self, source: Source, found: Detections, frame: int | None = None) -> None:
        """Keeps the instances of a picture, or of a frame of a video."""
        image_id = len(self.images) + 1
        if self.ids is not None:
            if source.path.name not in self.ids:
                raise InputError(f"{source.path} is not among the pictures of the annotations")
            image_id = self.ids[source.path.name]
        image = {"id": image_id, "file_name": str(source.path), "height": found.size[0], "width": found.size[1]}
        self.images.append(image | ({} if frame is None else {"frame": frame}))
        self.results += found.coco(image_id, [category["id"] for category in self.categories])

    def draw(self, pixels, found: Detections, legend_rows: int | None = None) -> Image.Image:
        """The overlay."""
        return self.tool.draw(pixels, found, self.score, legend_rows)

    def describe(self, found: Detections) -> str:
        """How many there are of each class, in words."""
        counts = np.bincount(found.above(self.score).labels, minlength=len(self.tool.classes))
        return ", ".join(f"{counts[i]} {self.tool.classes[i]}" for i in np.argsort(-counts) if counts[i]) or "nothing"

    def close(self) -> None:
        """Writes the files."""
        dataset = {"images": self.images, "annotations": [], "categories": self.categories}
        for name, content in (("images.json", dataset), ("detections.json", self.results)):
            with atomic(self.out / name) as file:
                file.write(json.dumps(content).encode())


def _read_annotations(path: Path) -> tuple[dict[str, int], dict[str, int]]:
    try:
        content = json.loads(Path(path).read_text())
        images = {Path(image["file_name"]).name: image["id"] for image in content["images"]}
        return images, {category["name"]: category["id"] for category in content["categories"]}
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{path} is not a COCO dataset (images and categories in JSON)") from None


def run(
    sources: Sequence[Source],
    results: Masks | Instances,
    overlays: bool = True,
    progress: Callable[[float], None] = lambda share: None,
) -> Iterator[tuple[Source, str | InputError]]:
    """Answers and writes one source after the other; yields what was found, in words, or why it was skipped.

    `progress` gets shares of the work, 1 for each source.
    """
    try:
        for moving, group in groupby(sources, lambda source: is_video(source.path)):
            if moving:
                for source in group:
                    yield source, _video(source, results, overlays, progress)
                continue
            group = list(group)
            for source, (pixels, answer) in zip(group, results.tool.each([s.path for s in group], progress)):
                if not isinstance(answer, InputError):
                    results.save(source, answer)
                    if overlays:
                        path = _overlay_path(results.out, source, ".jpg")
                        with atomic(path) as file:
                            results.draw(pixels, answer).save(file, "JPEG", quality=92)
                    answer = results.describe(answer)
                yield source, answer
    finally:
        results.close()


def _overlay_path(out: Path, source: Source, suffix: str) -> Path:
    path = out / "overlays" / (source.name + suffix)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _video(source: Source, results: Masks | Instances, overlays: bool, progress: Callable) -> str | InputError:
    """Frame by frame; what precedes a damaged place is kept."""
    writer = None
    done = 0
    try:
        video = open_video(source.path)
        frames = video.pictures(range(len(video)), 3)
        writer = _VideoWriter(_overlay_path(results.out, source, ".mp4"), source.path) if overlays else None
        shares = len(video)
        for pixels, answer in results.tool.each(frames, lambda share: progress(share / shares)):
            results.save(source, answer, done)
            if writer:
                writer.add(results.draw(pixels, answer, LEGEND_ROWS))
            done += 1
    except BrokenVideo as error:
        return BrokenVideo(f"{error} (after {done} frames)" if done else str(error))
    finally:
        if writer:
            writer.close()
    return f"{done} frames"


class _VideoWriter:
    """An MP4 file, of H.264 where that can be had, with the frame rate of another video."""

    def __init__(self, path: Path, like: Path):
        import av

        self.av, self.path = av, path
        self.partial = path.with_name(f".{path.stem}.partial.mp4")
        with av.open(str(like)) as container:
            rate = container.streams.video[0].average_rate
        self.rate = Fraction(rate or 25).limit_denominator(65535)
        self.container = self.stream = None

    def add(self, picture: Image.Image) -> None:
        """One more frame; all are of the size of the first."""
        size = picture.width // 2 * 2, picture.height // 2 * 2  # H.264 wants even sides
        if self.stream is None:
            self.container = self.av.open(str(self.partial), "w", format="mp4")
            codec = "libx264" if "libx264" in self.av.codecs_available else "mpeg4"
            self.stream = self.container.add_stream(codec, rate=self.rate)
            self.stream.width, self.stream.height = size
            self.stream.pix_fmt = "yuv420p"
            if codec == "mpeg4":
                self.stream.bit_rate = size[0] * size[1] * 8
        target = self.stream.width, self.stream.height
        frame = self.av.VideoFrame.from_image(picture.crop((0, 0, *target)))
        self.container.mux(self.stream.encode(frame))

    def close(self) -> None:
        """Ends the file, which only then takes its name."""
        if self.stream is not None:
            self.container.mux(self.stream.encode())
            self.container.close()
            os.replace(self.partial, self.path)
