"""Real videos, whole and broken: which frames are seen, how they are cropped, what is said of them."""

import json
import struct
import sys
import warnings
from fractions import Fraction

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from linescan.engine.cards import ModelCard, class_names, preprocess_of, save_model
from linescan.errors import BrokenVideo, DamagedVideo, InputError
from linescan.media import video as video_module
from linescan.media.preprocess import Preprocess
from linescan.media.video import Clips, Views, crop_boxes, find_videos, open_video, segments
from linescan.tasks import Classifier

av = pytest.importorskip("av")

MODEL = "videomamba_video_tiny_patch16_224"
ARGS = dict(img_size=32, num_frames=4, depth=1, embed_dim=24, num_classes=3)
STEP = 6  # in brightness, from frame to frame: more than any codec here blurs


def write_video(path, frames, codec="mpeg4", times=None, container=None, **options):
    """Writes images (T, H, W, 3), or grey frames of the brightness given; `times` in milliseconds."""
    frames = [np.full((48, 64, 3), f, np.uint8) if np.isscalar(f) else f for f in frames]
    base = Fraction(1, 1000) if times else Fraction(1, 30)
    with av.open(str(path), "w", options=container or {}) as container:
        stream = container.add_stream(codec, rate=30, options=options)
        stream.height, stream.width = frames[0].shape[:2]
        stream.bit_rate = 8_000_000
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.codec_context.time_base = base
        for i, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = times[i] if times else i, base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def numbers(images) -> list[int]:
    """Which frames these are, told from their brightness."""
    return [round(np.asarray(image).mean() / STEP) for image in images]


GREYS = [STEP * i for i in range(40)]

FORMATS = {
    "x264.mp4": dict(codec="libx264"),
    "x264.ts": dict(codec="libx264", g="12"),
    "open_gop.mp4": {"codec": "libx264", "x264-params": "open-gop=1:keyint=8"},
    "mpeg4.mov": dict(codec="mpeg4", bf="2"),
    "mpeg4.avi": dict(codec="mpeg4", bf="2"),
    "mpeg2.mpg": dict(codec="mpeg2video", g="12", bf="2"),
    "mjpeg.avi": dict(codec="mjpeg"),
    "vp8.webm": dict(codec="libvpx"),
    "variable_rate.mkv": dict(codec="libx264", g="10", times=[i * i for i in range(40)]),
}


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A file of a small video model that knows three classes."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("video") / "model.safetensors"
    network = timm.create_model(MODEL, **ARGS)
    save_model(path, network, ModelCard(MODEL, ARGS, ["jump", "run", "sit"], preprocess_of(network, 3, 32)))
    return path


def test_segments():
    assert segments(33, 4) == [[4, 12, 20, 28]]  # the middle of 0..8, 8..16, ...
    assert segments(33, 4, clips=3) == [[2, 10, 18, 26], [4, 12, 20, 28], [6, 14, 22, 30]]
    assert segments(300, 8, 1)[0] == [18, 55, 93, 130, 168, 205, 242, 280]  # 299 / 8 = 37.375 to a segment
    assert segments(3, 8, 2) == [[0, 0, 0, 1, 1, 1, 2, 2]] * 2
    assert segments(1, 4) == [[0, 0, 0, 0]]
    for length in range(1, 60):
        for clip in segments(length, 16, 4):
            assert clip == sorted(clip) and clip[0] >= 0 and clip[-1] < length


def test_crop_boxes():
    assert crop_boxes((400, 200), (100, 100)) == [(100, 0, 300, 200)]
    assert crop_boxes((400, 200), (100, 100), 3) == [(0, 0, 200, 200), (100, 0, 300, 200), (200, 0, 400, 200)]
    assert [box[:2] for box in crop_boxes((200, 500), (64, 64), 4)] == [(0, 0), (0, 100), (0, 200), (0, 300)]
    assert crop_boxes((100, 100), (50, 50), 2) == [(0, 0, 100, 100)] * 2
    assert crop_boxes((400, 200), (224, 224), 2, crop_pct=0.5) == [(0, 50, 100, 150), (300, 50, 400, 150)]
    assert crop_boxes((200, 200), (50, 100)) == [(0, 50, 200, 150)]


@pytest.mark.parametrize("name", FORMATS)
def test_every_frame_of_every_format_is_reached(tmp_path, name):
    video = open_video(write_video(tmp_path / name, GREYS, **FORMATS[name]))
    assert len(video) == 40
    for indices in ([0, 1, 17, 18, 39], [25], [39], range(40)):
        assert numbers(video.images(indices, 3)) == list(indices)


def test_only_what_is_needed_is_decoded(tmp_path, monkeypatch):
    """From the keyframe before a frame to the frame, and no more."""
    video = open_video(write_video(tmp_path / "x.mp4", GREYS, "libx264", g="8", bf="0"))
    decoded = []
    decode = video_module._decode

    def counting(*args):
        for frame in decode(*args):
            decoded.append(frame.pts)
            yield frame

    monkeypatch.setattr(video_module, "_decode", counting)
    assert numbers(video.images([18, 34], 3)) == [18, 34]
    assert len(decoded) == 6  # 16, 17, 18 and 32, 33, 34


def test_a_folder_of_frames(tmp_path):
    for i, grey in enumerate(GREYS[:12]):
        Image.new("L", (30, 20), grey).save(tmp_path / f"frame{i + 1}.png")  # frame10 comes after frame9
    (tmp_path / "notes.txt").write_text("not a frame")
    video = open_video(tmp_path)
    assert len(video) == 12 and numbers(video.images(range(12), 3)) == list(range(12))
    assert find_videos(tmp_path) == [tmp_path]


def test_a_video_is_turned_as_it_says(tmp_path):
    half = np.zeros((48, 96, 3), np.uint8)
    half[:, :48] = 255  # the left half is white
    path = write_video(tmp_path / "x.mp4", [half] * 4)
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 4 + 40  # after version, flags, times, track, duration, layer, volume
    assert struct.unpack(">9i", data[matrix : matrix + 36])[0] == 1 << 16
    data[matrix : matrix + 36] = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)  # clockwise
    path.write_bytes(data)
    [picture] = open_video(path).images([0], 3)
    pixels = np.asarray(picture)
    assert pixels.shape == (96, 48, 3) and pixels[:40].min() > 200 and pixels[56:].max() < 50


def test_views(tmp_path):
    """Four frames of two clips, the left, middle and right of each: what is where is told by the colours."""
    wide = np.zeros((40, 31, 97, 3), np.uint8)  # of odd size
    wide[..., 0] = np.array(GREYS)[:, None, None]  # red: the number of the frame
    wide[..., 1] = np.linspace(0, 240, 97)  # green: from left to right
    folder = tmp_path / "frames"
    folder.mkdir()
    for i, pixels in enumerate(wide):
        Image.fromarray(pixels).save(folder / f"{i:02}.png")
    clips = Clips(4, Preprocess((3, 16, 16), (0.5,) * 3, (0.25,) * 3, "bilinear"), Views(2, 3))
    shares = []
    views = list(clips.views(folder, shares.append))
    assert len(views) == 6 and all(view.shape == (3, 4, 16, 16) for view in views)
    assert sum(shares) == pytest.approx(1)
    red, green = [(torch.stack(views)[:, c].mean((2, 3)) * 0.25 + 0.5) * 255 for c in (0, 1)]
    assert (red / STEP).round().int().tolist() == [clip for clip in segments(40, 4, 2) for _ in range(3)]
    left, middle, right = green[:3, 0].tolist()
    assert left == pytest.approx(240 * 15 / 96, abs=2) and middle == pytest.approx(120, abs=2)
    assert right == pytest.approx(240 * 81 / 96, abs=2)


@pytest.mark.parametrize("channels", [1, 3])
def test_short_and_small_videos_fill_the_clip(tmp_path, channels):
    path = write_video(tmp_path / "x.avi", [np.full((4, 6, 3), 120, np.uint8)] * 2, "ffv1")
    clips = Clips(8, Preprocess((channels, 32, 32), (0.0,) * channels, (1.0,) * channels))
    [view] = clips.views(path)
    assert view.shape == (channels, 8, 32, 32) and view.std() < 0.01


def test_three_lines(model, tmp_path):
    """The answer is the mean of the probabilities over the views, for each video by itself."""
    random = np.random.default_rng(0)
    paths = [write_video(tmp_path / f"{i}.mp4", random.integers(0, 255, (9, 40, 80, 3), np.uint8)) for i in range(2)]
    classify = Classifier(checkpoint=model, views=(2, 3), batch=4)  # one clip of four frames in a forward pass
    guesses = classify(paths[0], topk=3)
    assert {guess.label for guess in guesses} == {"jump", "run", "sit"}
    assert sum(guess.probability for guess in guesses) == pytest.approx(1)

    both = Classifier(checkpoint=model, views=(2, 3)).probabilities(paths)
    for path, row in zip(paths, both):
        views = torch.stack(list(classify.clips.views(path)))
        with torch.no_grad():
            torch.testing.assert_close(row, classify.model(views).softmax(-1).mean(0))
    assert (both[0] - both[1]).abs().max() > 1e-6
    with pytest.raises(BrokenVideo, match="nothing.mp4: No such file"):
        classify("nothing.mp4")


# -- damaged and odd files --------------------------------------------------------------------------------------------


def read_all(path, **options):
    """The frames' numbers, and what is warned of."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        video = open_video(path, **options)
        found = numbers(video.images(range(len(video)), 3))
    assert all(isinstance(w.message, DamagedVideo) and str(w.message).startswith(f"{path}: ") for w in seen)
    assert all("\n" not in str(w.message) for w in seen)
    return found, [str(w.message).split(": ", 1)[1] for w in seen]


NOISE = np.random.default_rng(0).integers(-5, 6, (40, 48, 64, 3))
NOISY = [(NOISE[i] + STEP * i).clip(0, 255).astype(np.uint8) for i in range(40)]  # packets of some size

CUT = {  # what is known of a file that is cut: the number of its frames, its duration, or only that it is cut
    "x.mkv": dict(codec="libx264", bf="0"),
    "x.webm": dict(codec="libvpx"),
    "x.avi": dict(codec="mjpeg"),
    "x.flv": dict(codec="flv1"),
    "x.mxf": dict(codec="mpeg2video"),
    "x.mp4": dict(codec="libx264", bf="0", container={"movflags": "faststart"}),
    "fragmented.mp4": dict(codec="libx264", bf="0", g="5", container={"movflags": "frag_keyframe+empty_moov"}),
    "x.ts": dict(codec="libx264", bf="0"),
    "x.mpg": dict(codec="mpeg2video"),
}


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("name", CUT)
def test_a_file_that_is_cut_short_is_read_as_far_as_it_goes(tmp_path, name, share):
    path = write_video(tmp_path / name, NOISY, **CUT[name])
    assert read_all(path) == (list(range(40)), [])
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data)) // 188 * 188 + 100])
    try:
        found, said = read_all(path)
    except BrokenVideo as error:  # nothing of it can be decoded
        assert name in ("fragmented.mp4", "x.mp4") and "\n" not in str(error) and str(error).startswith(f"{path}: ")
        return
    assert 0 < len(found) < 40 or name == "x.mpg"
    assert abs(np.subtract(found, range(len(found)))).max() <= 1  # of mpeg2, frames that refer to lost ones
    if name == "x.mpg" and not said:
        return  # neither a number of frames nor packets of one length: there is nothing to tell by
    [said] = said
    if name in ("x.ts", "x.mpg"):  # which promise no number of frames
        assert said.startswith(f"{len(found)} ") and ("cut short" in said or f"of {len(found) + 1} frames" in said)
    elif name == "fragmented.mp4":
        assert f"{len(found)} of " in said
    else:
        assert said == f"{len(found)} of 40 frames can be decoded; the file is cut short"
    with pytest.raises(BrokenVideo, match=r"^[^ ]*: \d+ .*frames can be decoded; the file is"):
        open_video(path, strict=True)


@pytest.mark.parametrize("name", ["x.mkv", "x.webm", "x.mxf", "x.flv", "x.wmv"])
def test_a_few_frames_are_missed(tmp_path, name):
    path = write_video(tmp_path / name, NOISY, **CUT.get(name, dict(codec="wmv2")))
    assert read_all(path, strict=True) == (list(range(40)), [])
    with av.open(str(path)) as container:
        last = [packet.pos for packet in container.demux(video=0) if packet.size][-1]
    path.write_bytes(path.read_bytes()[:last])
    found, [said] = read_all(path)
    if name == "x.wmv":  # its packets hold several frames, its header the length of the file
        assert 30 < len(found) < 40 and said == f"{len(found)} frames can be decoded; the file is cut short"
    else:
        assert len(found) == 39 and said == "39 of 40 frames can be decoded; the file is cut short"


@pytest.mark.parametrize("name", ["x.mkv", "x.mov", "x.webm"])
def test_a_header_that_is_cut_is_told_in_one_way(tmp_path, name):
    path = write_video(tmp_path / name, GREYS, CUT.get(name, dict(codec="mpeg4"))["codec"])
    data = path.read_bytes()
    for length in (20, 60, 150, 300, len(data) * 6 // 10 if name == "x.mov" else 400):
        path.write_bytes(data[:length])
        with warnings.catch_warnings(), pytest.raises(BrokenVideo) as refusal:
            warnings.simplefilter("ignore", DamagedVideo)
            open_video(path)
        said = str(refusal.value).removeprefix(f"{path}: ")
        assert said in ("not a video, or damaged", "the video holds no frames") or "frames can be decoded" in said


def test_transport_streams_may_be_joined(tmp_path):
    parts = [write_video(tmp_path / f"{i}.ts", GREYS[10 * i : 10 * i + 10], "libx264").read_bytes() for i in (0, 1)]
    (tmp_path / "joined.ts").write_bytes(b"".join(parts))
    assert read_all(tmp_path / "joined.ts", strict=True) == (list(range(20)), [])


def test_what_an_edit_list_leaves_out_is_not_missed(tmp_path):
    path = write_video(tmp_path / "x.mp4", GREYS, "libx264", g="8", bf="0")
    data = bytearray(path.read_bytes())
    at = data.index(b"elst") + 12
    duration = struct.unpack(">I", data[at : at + 4])[0]
    data[at : at + 4] = struct.pack(">I", duration // 2)
    path.write_bytes(data)
    found, said = read_all(path, strict=True)
    assert found == list(range(len(found))) and 19 <= len(found) <= 21 and said == []


def test_sound_that_is_longer_than_the_images_is_no_damage(tmp_path):
    for name in ("x.mkv", "x.mp4", "x.avi"):
        with av.open(str(tmp_path / name), "w") as container:
            video, sound = container.add_stream("mpeg4", rate=30), container.add_stream("ac3", rate=44100)
            video.width, video.height, video.pix_fmt, video.bit_rate = 64, 48, "yuv420p", 8_000_000
            for grey in GREYS[:12]:
                pixels = np.full((48, 64, 3), grey, np.uint8)
                container.mux(video.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(video.encode())
            for _ in range(40):
                silence = av.AudioFrame.from_ndarray(np.zeros((1, 1536), np.float32), format="fltp", layout="mono")
                silence.rate = 44100
                container.mux(sound.encode(silence))
            container.mux(sound.encode())
        assert read_all(tmp_path / name, strict=True) == (list(range(12)), [])


@pytest.mark.parametrize(
    "name, options", [("x.mkv", dict(codec="mjpeg")), ("x.mp4", dict(codec="libx264", g="5", bf="0"))]
)
def test_frames_that_are_damaged_in_the_middle(tmp_path, name, options):
    """The number of each frame stays what it is: the frame before stands in for those that cannot be decoded."""
    path = write_video(tmp_path / name, NOISY, **options)
    data = path.read_bytes()
    with av.open(str(path)) as container:
        packets = [p for p in container.demux(video=0) if p.size]
    for i in (21, 22):
        content = bytes(packets[i])
        assert data.count(content) == 1
        data = data.replace(content, b"\0" * len(content))
    path.write_bytes(data)
    av.logging.set_level(av.logging.ERROR)  # as torchvision 0.25 does when it is imported
    found, [said] = read_all(path)
    assert av.logging.get_level() is None, "decoders that tell Python what is wrong may wait for it for ever"
    assert len(found) == 40 and found[:21] == list(range(21)) and found[25:] == list(range(25, 40))
    assert found[21:23] == [20, 20] and said.split(" of ")[1] == "40 frames could be decoded"
    assert numbers(open_video(path).images([30], 3)) == [30], "what is whole is not complained of"
    with pytest.raises(BrokenVideo, match="of 40 frames could be decoded"):
        list(open_video(path, strict=True).images(range(40), 3))


def test_frames_that_are_decoded_in_part_are_not_shown(tmp_path):
    large = [np.asarray(Image.fromarray(pixels).resize((256, 192))) for pixels in NOISY]
    path = write_video(tmp_path / "x.mkv", large, "mpeg4")
    data = path.read_bytes()
    with av.open(str(path)) as container:
        content = [bytes(p) for p in container.demux(video=0) if p.size][21]
    path.write_bytes(data.replace(content, content[: len(content) // 2].ljust(len(content), b"\0")))
    found, said = read_all(path)
    assert found[20:22] == [20, 20] and said == ["39 of 40 frames could be decoded"]


def test_a_folder_with_a_broken_frame(tmp_path):
    for i, grey in enumerate(GREYS[:9]):
        Image.new("L", (30, 20), grey).save(tmp_path / f"{i}.png")
    for i in (0, 4):
        (tmp_path / f"{i}.png").write_bytes(b"")
    assert read_all(tmp_path) == ([1, 1, 2, 3, 3, 5, 6, 7, 8], ["7 of 9 frames could be decoded"])
    with pytest.raises(BrokenVideo, match="frames could be decoded"):
        read_all(tmp_path, strict=True)


@pytest.mark.parametrize("title", [b"Caf\xe9", b"\xff\xfe\x00", b"\xed\xa0\x80"])
def test_metadata_that_are_no_unicode(tmp_path, title):
    for name, codec in (("x.avi", "mpeg4"), ("x.mkv", "mpeg4"), ("x.mp4", "mpeg4"), ("x.flv", "flv1")):
        path = tmp_path / name
        with av.open(str(path), "w") as container:
            container.metadata["title"] = "T" * 40
            stream = container.add_stream(codec, rate=30)
            stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 64, 48, "yuv420p", 8_000_000
            for grey in GREYS[:4]:
                pixels = np.full((48, 64, 3), grey, np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(stream.encode())
        path.write_bytes(path.read_bytes().replace(b"T" * 40, title.ljust(40, b".")))
        assert title in path.read_bytes()
        assert read_all(path, strict=True)[0] == [0, 1, 2, 3]


PIXELS = {
    "gray": ("ffv1", "x.mkv"), "gray10le": ("ffv1", "x.mkv"), "gray16le": ("ffv1", "x.mkv"),
    "yuv444p": ("libx264", "x.mp4"), "yuv420p10le": ("libx264", "x.mp4"), "yuvj422p": ("mjpeg", "x.avi"),
    "rgb24": ("png", "x.mov"), "gbrp10le": ("ffv1", "x.mkv"), "bgr0": ("ffv1", "x.mkv"),
    "yuv411p": ("ffv1", "x.mkv"), "monob": ("png", "x.mov"),
}  # fmt: skip


@pytest.mark.parametrize("pixels", PIXELS)
def test_pixel_formats(tmp_path, pixels):
    codec, name = PIXELS[pixels]
    with av.open(str(tmp_path / name), "w") as container:
        stream = container.add_stream(codec, rate=30)
        stream.width, stream.height, stream.pix_fmt = 64, 48, pixels
        for grey in (0, 255):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), grey, np.uint8), format="rgb24")
            container.mux(stream.encode(frame.reformat(format=pixels)))
        container.mux(stream.encode())
    images = [np.asarray(image) for image in open_video(tmp_path / name, strict=True).images([0, 1], 3)]
    assert [image.shape for image in images] == [(48, 64, 3)] * 2
    assert images[0].max() <= 3 and images[1].min() >= 252


def test_transparent_videos_are_composited_on_white(tmp_path):
    pixels = np.zeros((48, 64, 4), np.uint8)
    pixels[:, 32:] = (200, 100, 50, 255)
    pixels[:, :32] = (200, 100, 50, 0)
    with av.open(str(tmp_path / "x.mov"), "w") as container:
        stream = container.add_stream("png", rate=30)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "rgba"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgba")))
        container.mux(stream.encode())
    [image] = open_video(tmp_path / "x.mov").images([0], 3)
    assert image.getpixel((0, 0)) == (255, 255, 255) and image.getpixel((40, 0)) == (200, 100, 50)
    [image] = open_video(tmp_path / "x.mov").images([0], 4)
    assert image.getpixel((0, 0))[3] == 0


def test_frames_that_are_too_large(tmp_path, monkeypatch):
    path = write_video(tmp_path / "x.avi", NOISY, "mjpeg")
    monkeypatch.setattr(video_module, "WHOLE", 1000)
    with pytest.raises(BrokenVideo, match="frames of 64x48 pixels"):
        open_video(path)


def broken_videos(folder) -> dict[str, str]:
    """Writes files that are no videos; returns what should be said of each."""
    whole = write_video(folder / "whole.mp4", GREYS).read_bytes()
    mjpeg = write_video(folder / "whole.avi", GREYS, "mjpeg").read_bytes()
    (folder / "half.avi").write_bytes(mjpeg[: len(mjpeg) // 2])
    (folder / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "text.mp4").write_bytes(b"not a video\n" * 50)
    (folder / "playlist.mp4").write_text("#EXTM3U\n#EXTINF:10,\nhttp://localhost:9/x.ts\n#EXT-X-ENDLIST\n")
    (folder / "local.mp4").write_text("#EXTM3U\n#EXTINF:10,\nwhole.mp4\n#EXT-X-ENDLIST\n")
    (folder / "concat.mp4").write_text("ffconcat version 1.0\nfile whole.mp4\n")
    with av.open(str(folder / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
        silence.rate = 44100
        container.mux(stream.encode(silence))
        container.mux(stream.encode())
    (folder / "frames").mkdir()
    (folder / "frames" / "0.png").write_bytes(b"")
    return {
        "cut.mp4": "not a video, or damaged",
        "empty.mp4": "the file is empty",
        "text.mp4": "not a video, or damaged",
        "playlist.mp4": "not a video, or damaged",
        "local.mp4": "not a video, or damaged",
        "concat.mp4": "not a video, or damaged",
        "sound.mp4": "only sound",
        "frames": "0.png: ",
    }


def test_broken_videos_are_named_and_skipped(linescan_here, model, tmp_path):
    said = broken_videos(tmp_path)
    status, stdout, stderr = linescan_here("classify", tmp_path, "-c", model, "--views", "2x1", "-k", 2)
    assert status == 1
    lines = stdout.splitlines()
    names = "half.avi", "whole.avi", "whole.mp4"
    assert [line.split(": ")[0] for line in lines] == [f"{tmp_path}/{name}" for name in names]
    assert f"damaged {tmp_path}/half.avi: 15 of 40 frames can be decoded; the file is cut short\n" in stderr
    assert all(line.count("%") == 2 for line in lines)
    skipped = [line for line in stderr.splitlines() if line.startswith("skipped ")]
    assert len(skipped) == len(said)
    for name, reason in said.items():
        [line] = [line for line in skipped if f"/{name}" in line]
        assert reason in line

    status, stdout, _ = linescan_here("classify", tmp_path / "whole.mp4", tmp_path / "cut.mp4", "-c", model, "--json")
    whole, cut = json.loads(stdout)
    assert status == 1 and whole["answer"][0].keys() == {"label", "probability", "index"}
    assert whole["source"].endswith("whole.mp4") and "damaged" in cut["error"]


def test_what_cannot_be(linescan_here, model, trained, tmp_path):
    video = write_video(tmp_path / "x.mp4", GREYS[:4])
    of_images = trained / "model.safetensors"
    (tmp_path / "nothing").mkdir()
    Image.new("RGB", (40, 40)).save(tmp_path / "lone.png")
    for args, line in (
        ((video, "-c", model, "--views", "4"), "--views is CLIPSxCROPS, as in 4x3, not '4'"),
        ((video, "-c", model, "--views", "0x1"), "not '0x1'"),
        ((video, "-c", of_images, "--views", "4x3"), "views are taken of videos; vit_tiny_patch16_224 reads images"),
        ((tmp_path / "nothing", "-c", model), "nothing holds no images or videos"),
        ((tmp_path / "lone.png", "-c", model), "lone.png is an image; only videos or folders of frames are read here"),
    ):
        status, stdout, stderr = linescan_here("classify", *args)
        assert status == 2 and stdout == "" and line in stderr and len(stderr.splitlines()) == 1


def test_without_pyav(model, tmp_path, monkeypatch):
    video = write_video(tmp_path / "x.mp4", GREYS[:4])
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(InputError, match=r"pip install 'linescan\[video\]'"):
        Classifier(checkpoint=model)(video)
    Image.new("RGB", (40, 40)).save(tmp_path / "0.png")
    assert len(Classifier(checkpoint=model)(tmp_path)) == 3  # a folder of frames needs no PyAV


def test_kinetics_names():
    with torch.device("meta"):
        names = class_names(timm.create_model(MODEL))
        assert class_names(timm.create_model(MODEL, num_classes=174)) == [str(i) for i in range(174)]
    assert len(names) == 400 and names[0] == "abseiling" and names[-1] == "zumba"


def test_published_models_are_evaluated_as_published():
    """Short side to the model's, no border cut off."""
    for tag, side in (("k400_f8", 224), ("k400_f64_res384", 384), ("ssv2_f16_res288", 288)):
        cfg = timm.get_pretrained_cfg(f"{MODEL}.{tag}")
        assert cfg.crop_pct == 1 and cfg.interpolation == "bilinear" and cfg.input_size == (3, side, side)
