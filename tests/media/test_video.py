"""Real videos, whole and broken: which frames are seen, how they are cropped, what is said of them."""

import json
import struct
import sys
from fractions import Fraction

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from linescan.engine import BrokenVideo, Classifier, InputError
from linescan.engine.cards import ModelCard, class_names, preprocess_of, save_model
from linescan.media.preprocess import Preprocess
from linescan.media.video import Clips, Views, crop_boxes, find_videos, open_video, segments

av = pytest.importorskip("av")

MODEL = "videomamba_video_tiny_patch16_224"
ARGS = dict(img_size=32, num_frames=4, depth=1, embed_dim=24, num_classes=3)
STEP = 6  # in brightness, from frame to frame: more than any codec here blurs


def write_video(path, frames, codec="mpeg4", times=None, **options):
    """Writes pictures (T, H, W, 3), or grey frames of the brightness given; `times` in milliseconds."""
    frames = [np.full((48, 64, 3), f, np.uint8) if np.isscalar(f) else f for f in frames]
    base = Fraction(1, 1000) if times else Fraction(1, 30)
    with av.open(str(path), "w") as container:
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


def numbers(pictures) -> list[int]:
    """Which frames these are, told from their brightness."""
    return [round(np.asarray(picture).mean() / STEP) for picture in pictures]


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
        assert numbers(video.pictures(indices, 3)) == list(indices)


def test_only_what_is_needed_is_decoded(tmp_path, monkeypatch):
    """From the keyframe before a frame to the frame, and no more."""
    video = open_video(write_video(tmp_path / "x.mp4", GREYS, "libx264", g="8", bf="0"))
    decoded = []
    decode = av.container.InputContainer.decode

    class Counting:
        def __init__(self, *args, **kwargs):
            self.container = av_open(*args, **kwargs)

        def __getattr__(self, name):
            return getattr(self.container, name)

        def decode(self, stream):
            for frame in decode(self.container, stream):
                decoded.append(frame.pts)
                yield frame

    av_open = av.open
    monkeypatch.setattr(av, "open", Counting)
    assert numbers(video.pictures([18, 34], 3)) == [18, 34]
    assert len(decoded) == 6  # 16, 17, 18 and 32, 33, 34


def test_a_folder_of_frames(tmp_path):
    for i, grey in enumerate(GREYS[:12]):
        Image.new("L", (30, 20), grey).save(tmp_path / f"frame{i + 1}.png")  # frame10 comes after frame9
    (tmp_path / "notes.txt").write_text("not a frame")
    video = open_video(tmp_path)
    assert len(video) == 12 and numbers(video.pictures(range(12), 3)) == list(range(12))
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
    [picture] = open_video(path).pictures([0], 3)
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


def broken_videos(folder) -> dict[str, str]:
    """Writes damaged files; returns what should be said of each."""
    whole = write_video(folder / "whole.mp4", GREYS).read_bytes()
    mjpeg = write_video(folder / "whole.avi", GREYS, "mjpeg").read_bytes()
    (folder / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "cut.avi").write_bytes(mjpeg[: len(mjpeg) // 2])
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "text.mp4").write_bytes(b"not a video\n" * 50)
    (folder / "playlist.mp4").write_text("#EXTM3U\n#EXTINF:10,\nhttp://localhost:9/x.ts\n#EXT-X-ENDLIST\n")
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
        "cut.avi": "ends in the middle",
        "empty.mp4": "the file is empty",
        "text.mp4": "not a video, or damaged",
        "playlist.mp4": "not a video, or damaged",
        "sound.mp4": "only sound",
        "frames": "0.png: ",
    }


def test_broken_videos_are_named_and_skipped(linescan_here, model, tmp_path):
    said = broken_videos(tmp_path)
    status, stdout, stderr = linescan_here("classify", tmp_path, "-c", model, "--views", "2x1", "-k", 2)
    assert status == 1
    lines = stdout.splitlines()
    assert [line.split(": ")[0] for line in lines] == [f"{tmp_path}/whole.avi", f"{tmp_path}/whole.mp4"]
    assert all(line.count("%") == 2 for line in lines)
    skipped = stderr.splitlines()
    assert len(skipped) == len(said)
    for name, reason in said.items():
        [line] = [line for line in skipped if f"/{name}" in line]
        assert line.startswith("skipped ") and reason in line

    status, stdout, _ = linescan_here("classify", tmp_path / "whole.mp4", tmp_path / "cut.mp4", "-c", model, "--json")
    whole, cut = json.loads(stdout)
    assert status == 1 and whole["guesses"][0].keys() == {"label", "probability", "index"}
    assert whole["video"].endswith("whole.mp4") and "damaged" in cut["error"]


def test_what_cannot_be(linescan_here, model, trained, tmp_path):
    video = write_video(tmp_path / "x.mp4", GREYS[:4])
    pictures = trained / "model.safetensors"
    (tmp_path / "nothing").mkdir()
    for args, line in (
        ((video, "-c", model, "--views", "4"), "--views is CLIPSxCROPS, as in 4x3, not '4'"),
        ((video, "-c", model, "--views", "0x1"), "not '0x1'"),
        ((video, "-c", pictures), "x.mp4 is a video, and vit_tiny_patch16_224 reads pictures"),
        ((video, "-c", pictures, "--views", "4x3"), "views are taken of videos; vit_tiny_patch16_224 reads pictures"),
        ((tmp_path / "nothing", "-c", model), "nothing holds no videos"),
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
