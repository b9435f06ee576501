"""Damaged and hostile images and videos."""

import io
import random
import shutil
import struct
import tempfile
import warnings
import zlib
from contextlib import suppress
from pathlib import Path

import av
import numpy as np
import timm
from PIL import Image, ImageCms

from linescan.engine.cards import ModelCard, preprocess_of, save_model
from linescan.errors import BrokenImage, BrokenVideo, DamagedVideo, InputError
from linescan.media.arrays import read_array
from linescan.media.large import open_pixels
from linescan.media.video import open_video
from linescan.tasks.classify import Classifier

from . import Kind, damage

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
