#!/usr/bin/env python
"""Makes damaged and hostile files, seeded, and checks that each is answered or refused in one line, within bounds.

    python tools/fuzz.py images --count 1000
    python tools/fuzz.py videos --count 1000 --seed 3
    python tools/fuzz.py images --only 417               # one case again; its file is kept

Every case runs in a process of its own with a limit of time and of memory. It passes where the file is used, or where
the kind's error is raised with one line that names the file. A crash, another error, or running out of a limit is
a failure; the script then names the cases and ends with status 1.
"""

import io
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import warnings
import zlib
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Callable

import av
import numpy as np
import timm
import torch
import typer
from PIL import Image, ImageCms

from linescan.engine.cards import ModelCard, preprocess_of, save_model
from linescan.errors import BrokenImage, BrokenVideo, DamagedVideo, InputError
from linescan.media.arrays import read_array
from linescan.media.large import open_pixels
from linescan.media.video import open_video
from linescan.tasks.classify import Classifier

SECONDS = 20  # for one case
MEMORY = 2**31  # that one case may take beside what the script has


@dataclass
class Kind:
    """One kind of file.

    Attributes:
        make: (random numbers, folder) -> a file in the folder.
        use: what a user would do with it.
        errors: the errors that refuse a file.
    """

    make: Callable[[random.Random, Path], Path]
    use: Callable[[Path], None]
    errors: tuple[type[Exception], ...]


# -- running ----------------------------------------------------------------------------------------------------------


def judge(kind: Kind, path: Path) -> str:
    """What becomes of a file: "used", "refused", or what went wrong."""
    try:
        kind.use(path)
    except kind.errors as error:
        line = str(error)
        if "\n" in line or not 10 < len(line) < 1000:
            return f"not one line: {line[:300]!r}"
        return "refused" if path.name in line else f"does not name the file: {line[:300]!r}"
    except BaseException as error:  # whatever a file can cause
        return f"{type(error).__name__}: {str(error)[:300]!r}"
    return "used"


def run_apart(kind: Kind, path: Path) -> str:
    """`judge` in a process of its own, within limits."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(reader)
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
            signal.alarm(SECONDS)
            os.write(writer, judge(kind, path).encode(errors="replace")[:1000])
            status = 0
        finally:
            os._exit(status)
    os.close(writer)
    with open(reader, "rb") as pipe:
        said = pipe.read().decode(errors="replace")
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        name = signal.Signals(os.WTERMSIG(status)).name
        return f"more than {SECONDS} s" if name == "SIGALRM" else f"ended by {name}"
    return said or "ended without an answer"


def fuzz(name: str, count: int, seed: int, only: int | None, seconds: float) -> int:
    """Runs the cases of a kind; returns how many failed."""
    from rich.progress import track

    torch.set_num_threads(1)  # a forked process has none of its parent's threads
    kind, outcomes, failed = KINDS[name], Counter(), []
    stop = time.monotonic() + seconds if seconds else float("inf")
    for case in track([only] if only is not None else range(count), name, disable=not sys.stderr.isatty()):
        if time.monotonic() > stop:
            break
        folder = Path(tempfile.mkdtemp(prefix=f"fuzz-{name}-{case}-"))
        path = kind.make(random.Random(f"{name} {seed} {case}"), folder)
        outcome = run_apart(kind, path)
        outcomes[outcome if outcome in ("used", "refused") else "failed"] += 1
        if outcome not in ("used", "refused"):
            failed.append(case)
            print(f"{name} {case}: {outcome}", flush=True)
        if only is not None:
            print(f"{path}: {outcome}")
        else:
            shutil.rmtree(folder)
    print(f"{name}: " + ", ".join(f"{n} {what}" for what, n in sorted(outcomes.items())), flush=True)
    return len(failed)


# -- bytes ------------------------------------------------------------------------------------------------------------


def damage(data: bytes, chance: random.Random) -> bytes:
    """One to twenty changes: bytes replaced, cut out, put in, repeated, zeroed; or the end missing."""
    data = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 5, 20))):
        at = chance.randrange(len(data) + 1)
        size = chance.choice((1, 1, 2, 4, 8, 64, 1000))
        match chance.randrange(7):
            case 0 | 1:
                data[at : at + 1] = bytes([chance.randrange(256)])
            case 2:
                del data[at : at + size]
            case 3:
                data[at:at] = chance.randbytes(size)
            case 4:
                data[at:at] = data[at : at + size]
            case 5:
                data[at : at + size] = bytes(len(data[at : at + size]))
            case 6:
                if chance.random() < 0.3:
                    del data[at:]
                else:  # a number becomes a large one
                    data[at : at + 8] = struct.pack("<Q", chance.choice((2**31, 2**40, 2**63, 2**64 - 1)))
        if not data:
            break
    return bytes(data)


# -- images -----------------------------------------------------------------------------------------------------------


def image_bases() -> dict[str, bytes]:
    """Whole images of every format and kind that Pillow writes."""
    x, y = np.meshgrid(np.arange(37), np.arange(23))
    colours = Image.fromarray(np.stack([6 * x, 9 * y, 4 * (x + y), 255 - 6 * x], 2).astype(np.uint8), "RGBA")
    grey = np.asarray(colours.convert("L"))
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "a camera"
    frames = [colours.convert("RGB"), colours.convert("RGB").rotate(90), colours.convert("RGB").rotate(180)]
    rgb, grey_image, floats = frames[0], colours.convert("L"), Image.fromarray(grey / np.float32(255))
    several = {"save_all": True, "append_images": frames[1:]}
    wanted = [
        ("grey.png", grey_image, {}),
        ("alpha.png", colours, {"exif": exif}),
        ("bits.png", colours.convert("1"), {}),
        ("palette.png", rgb.convert("P"), {"transparency": bytes(range(256))}),
        ("deep.png", deep, {}),
        ("colours.png", rgb, {"transparency": (0, 0, 0), "icc_profile": SRGB}),
        ("animated.png", rgb, several),
        ("x.jpg", rgb, {"exif": exif, "icc_profile": SRGB}),
        ("progressive.jpg", rgb, {"progressive": True}),
        ("cmyk.jpg", colours.convert("CMYK"), {}),
        ("grey.jpg", grey_image, {}),
        ("x.gif", rgb, {}),
        ("animated.gif", rgb, several),
        ("x.bmp", rgb, {}),
        ("palette.bmp", rgb.convert("P"), {}),
        ("x.webp", rgb, {}),
        ("lossless.webp", colours, {"lossless": True}),
        ("animated.webp", rgb, several),
        ("raw.tif", rgb, {}),
        ("lzw.tif", colours, {"compression": "tiff_lzw"}),
        ("float.tif", floats, {}),
        ("int.tif", Image.fromarray(grey.astype(np.int32)), {}),
        ("deep.tif", deep, {"compression": "tiff_adobe_deflate"}),
        ("jpeg.tif", rgb, {"compression": "jpeg"}),
        ("bits.tif", colours.convert("1"), {"compression": "group4"}),
        ("lab.tif", rgb.convert("LAB"), {}),
        ("pages.tif", rgb, several),
        ("x.jp2", rgb, {}),
        ("x.j2k", colours, {}),
        ("x.avif", rgb, {}),
        ("x.ico", colours, {}),
        ("x.icns", colours.resize((32, 32)), {}),
        ("x.tga", colours, {"compression": "tga_rle"}),
        ("x.ppm", rgb, {}),
        ("x.pgm", deep, {}),
        ("x.pfm", floats, {}),
        ("x.pcx", rgb, {}),
        ("x.dds", colours, {}),
        ("x.sgi", rgb, {}),
        ("x.qoi", colours, {}),
        ("x.im", rgb, {}),
        ("x.xbm", colours.convert("1"), {}),
        ("x.msp", colours.convert("1"), {}),
        ("x.spider", floats, {}),
        ("x.blp", rgb.convert("P"), {}),
    ]
    files = {}
    for name, image, options in wanted:
        file = io.BytesIO()
        suffix = Path(name).suffix
        image.save(file, Image.registered_extensions().get(suffix, suffix[1:].upper()), **options)
        files[name] = file.getvalue()
    return files


def damage_png(data: bytes, chance: random.Random) -> bytes:
    """The content of its chunks is damaged, their checksums are right: decoders read on."""
    chunks, at = [], 8
    while at + 8 <= len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    for _ in range(chance.choice((1, 1, 2))):
        i = chance.randrange(len(chunks))
        kind, content = chunks[i]
        match chance.randrange(6):
            case 0:
                chunks.insert(i, chunks[chance.randrange(len(chunks))])
            case 1:
                del chunks[i]
                if not chunks:
                    break
            case 2 if kind == b"IHDR":  # sizes, depth, colour type, interlacing
                sides = struct.pack(">II", *chance.choices((0, 1, 37, 10**4, 10**5, 2**31 - 1, 2**32 - 1), k=2))
                rest = bytes(chance.choices((0, 1, 2, 3, 4, 6, 8, 16), k=5))
                chunks[i] = kind, sides + chance.choice((content[8:], rest))
            case 3 if kind == b"IDAT":
                with suppress(zlib.error):  # damaged before
                    chunks[i] = kind, zlib.compress(damage(zlib.decompress(content), chance))
            case 4:  # a text or a profile that grows when it is unpacked
                bomb = b"k\0\0" + zlib.compress(bytes(chance.choice((10**4, 10**8))), 9)
                chunks.insert(1, (chance.choice((b"zTXt", b"iCCP", b"eXIf")), bomb))
            case _:
                chunks[i] = kind, damage(content, chance)
    packed = (struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in chunks)
    return data[:8] + b"".join(packed)


def long_image(chance: random.Random) -> bytes:
    """A whole image of an extreme shape or size."""
    sizes = (1, 65_500), (65_500, 1), (1, 1), (3, 30_000), (20_000, 7), (7, 20_000), (9, 8), (34_000, 1000)
    size = chance.choice(sizes)
    file = io.BytesIO()
    image = Image.new(chance.choice(("L", "RGB", "1", "P")), size)
    if chance.random() < 0.4:
        image.convert("RGB").save(file, "JPEG")
    else:
        image.save(file, chance.choice(("PNG", "TIFF")))
    return file.getvalue()


def make_image(chance: random.Random, folder: Path) -> Path:
    name, data = chance.choice(list(IMAGES.items()))
    way = chance.random()
    if way < 0.15:
        name, data = chance.choice([(n, d) for n, d in IMAGES.items() if n.endswith(".png")])
        data = damage_png(data, chance)
    elif way < 0.75:
        data = damage(data, chance)
    elif way < 0.82:
        head = chance.randrange(200)
        data = damage(data[:head], chance) + data[head:]
    elif way < 0.87:
        data = data[: chance.randrange(len(data))]
    elif way < 0.92:
        other = chance.choice(list(IMAGES.values()))
        data = data[: chance.randrange(len(data))] + other[chance.randrange(len(other)) :]
    elif way < 0.96:
        name, data = "x" + chance.choice((".png", ".jpg", ".tif")), long_image(chance)
    else:
        name = chance.choice(list(IMAGES))  # the format is told by the content
    (folder / "whole.png").write_bytes(IMAGES["alpha.png"])
    (folder / name).write_bytes(data)
    return folder / name


def use_image(path: Path) -> None:
    """What commands do with it; the whole files of the same batch are answered, whatever becomes of it."""
    whole = path.with_name("whole.png")
    first, answer, last = (answer for _, answer in CLASSIFIERS["images"].each([whole, path, whole]))
    assert not any(isinstance(other, InputError) for other in (first, last)), "a whole file is refused"
    if isinstance(answer, InputError):
        raise answer
    pixels = open_pixels(path)
    assert pixels.reduced(-(-max(pixels.size) // 256)).dtype == np.uint8
    assert read_array(path)[0].ndim == 3


# -- videos -----------------------------------------------------------------------------------------------------------


def video_bases() -> dict[str, bytes]:
    """Small whole videos in many containers and codecs."""
    x, y = np.meshgrid(np.arange(64), np.arange(48))
    frames = [np.stack([4 * x, 5 * y, 3 * (x + y) + 9 * i], 2).astype(np.uint8) for i in range(12)]
    wanted = [
        ("x.mp4", "libx264", "yuv420p", {"movflags": "faststart"}),
        ("tail.mp4", "libx264", "yuv420p", {}),
        ("fragmented.mp4", "libx264", "yuv420p", {"movflags": "frag_keyframe+empty_moov"}),
        ("x.mov", "png", "rgba", {}),
        ("x.mkv", "libx264", "yuv444p10le", {}),
        ("lossless.mkv", "ffv1", "gray16le", {}),
        ("x.webm", "libvpx", "yuv420p", {}),
        ("nine.webm", "libvpx-vp9", "yuva420p", {}),
        ("x.avi", "mjpeg", "yuvj420p", {}),
        ("four.avi", "mpeg4", "yuv420p", {}),
        ("x.flv", "flv", "yuv420p", {}),
        ("x.ts", "libx264", "yuv420p", {}),
        ("two.ts", "mpeg2video", "yuv420p", {}),
        ("x.mpg", "mpeg2video", "yuv420p", {}),
        ("x.wmv", "wmv2", "yuv420p", {}),
        ("x.mxf", "mpeg2video", "yuv420p", {}),
        ("x.y4m", "wrapped_avframe", "yuv420p", {}),
        ("x.3gp", "mpeg4", "yuv420p", {}),
    ]
    files, folder = {}, Path(tempfile.mkdtemp(prefix="fuzz-videos-"))
    for name, codec, pixels, options in wanted:
        with av.open(str(folder / name), "w", options=options) as container:
            container.metadata["title"] = "a title of some length"
            stream = container.add_stream(codec, rate=25)
            stream.width, stream.height, stream.pix_fmt = 64, 48, pixels
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format=pixels)))
            container.mux(stream.encode())
        files[name] = (folder / name).read_bytes()
    shutil.rmtree(folder)
    return files


def make_video(chance: random.Random, folder: Path) -> Path:
    name, data = chance.choice(list(VIDEOS.items()))
    way = chance.random()
    if way < 0.55:
        data = damage(data, chance)
    elif way < 0.75:  # the head or the index rather than the frames
        at = chance.choice((0, max(len(data) - 1500, 0)))
        data = data[:at] + damage(data[at : at + 1500], chance) + data[at + 1500 :]
    elif way < 0.85:
        data = data[: chance.randrange(len(data))]
    elif way < 0.9:
        data = data + data
    elif way < 0.95:
        other = chance.choice(list(VIDEOS.values()))
        data = data[: chance.randrange(len(data))] + other[chance.randrange(len(other)) :]
    elif way < 0.98:
        data = data.replace(b"a title of", chance.randbytes(10))
    else:
        name = chance.choice(list(VIDEOS))
    (folder / "whole.mp4").write_bytes(VIDEOS["x.mp4"])
    (folder / name).write_bytes(data)
    return folder / name


def use_video(path: Path) -> None:
    """A clip of it, and its first frames; the whole files of the same batch are answered, whatever becomes of it."""
    whole = path.with_name("whole.mp4")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        first, answer, last = (answer for _, answer in CLASSIFIERS["videos"].each([whole, path, whole]))
        assert not any(isinstance(other, InputError) for other in (first, last)), "a whole file is refused"
        if isinstance(answer, InputError):
            raise answer
        video = open_video(path)
        shown = range(min(len(video), 100))
        assert len(list(video.images(shown, 3))) == len(shown)
    assert all(isinstance(w.message, DamagedVideo) and str(path) in str(w.message) for w in seen), seen[0].message


def classifiers() -> dict[str, Classifier]:
    """Small models of images and of videos, with weights in files as training leaves them."""
    tools = {}
    for kind, name, args in (
        ("images", "vim_tiny_patch16_224", {}),
        ("videos", "videomamba_video_tiny_patch16_224", {"num_frames": 4}),
    ):
        args = dict(img_size=32, depth=1, embed_dim=24, num_classes=3) | args
        model = timm.create_model(name, **args)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.safetensors"
            save_model(path, model, ModelCard(name, args, ["cat", "dog", "cow"], preprocess_of(model, 3, 32)))
            tools[kind] = Classifier(checkpoint=path, device="cpu")
    return tools


SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
IMAGES, VIDEOS = image_bases(), video_bases()
CLASSIFIERS = classifiers()
KINDS = {
    "images": Kind(make_image, use_image, (BrokenImage,)),
    "videos": Kind(make_video, use_video, (BrokenVideo,)),
}


def main(
    kinds: Annotated[list[str], typer.Argument(help=f"What to make: {', '.join(KINDS)}.")],
    count: Annotated[int, typer.Option(min=1, help="Cases of each kind.")] = 1000,
    seed: Annotated[int, typer.Option(help="Of the random numbers; a case depends on seed and number alone.")] = 0,
    only: Annotated[int | None, typer.Option(help="Run one case, and keep its file.")] = None,
    seconds: Annotated[float, typer.Option(help="Stop after this time per kind; 0: never.")] = 0,
):
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise SystemExit(f"unknown kind {unknown[0]!r}; there are: {', '.join(KINDS)}")
    raise SystemExit(1 if sum(fuzz(kind, count, seed, only, seconds) for kind in kinds) else 0)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
