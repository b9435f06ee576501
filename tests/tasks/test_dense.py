"""Segmenting: windows, memory, files and videos, with SegMAN, which needs no OpenMMLab."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torchvision.ops import box_area, box_iou

from linescan import create_model
from linescan.errors import InputError
from linescan.media.draw import SMALLEST
from linescan.media.large import Pixels
from linescan.tasks import Segmenter, results
from linescan.tasks.detect import distinct
from linescan.tasks.results import Detections, run_lengths
from linescan.tasks.windows import enlarge, positions, slide, thin

from ..conftest import ENVIRONMENT
from ..runs import python
from .test_classify import Bomb

CLASSES = ["sky", "sea", "sand"]
PALETTE = [[200, 220, 255], [0, 60, 120], [240, 200, 120]]
SMALL = {"backbone": {"depths": [1, 1, 1, 1], "dims": [8, 16, 16, 16], "num_heads": [1, 1, 1, 1]}, "channels": 8,
         "feat_proj_dim": 8}  # fmt: skip
SMALL_ARGS = [part for key, value in SMALL.items() for part in ("--model-arg", f"{key}={json.dumps(value)}")]


def photo(height, width, seed=0):
    """Smooth colours, (height, width, 3) bytes."""
    coarse = torch.from_numpy(np.random.default_rng(seed).uniform(0, 255, (1, 3, 5, 6)))
    fine = F.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 255)
    return fine[0].movedim(0, -1).byte().numpy()


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A small SegMAN's, with the names of its classes beside them, as mmseg writes them."""
    torch.manual_seed(0)
    model = create_model("segman_seg_tiny", num_classes=len(CLASSES), **SMALL)
    nn.init.normal_(model.decode_head.conv_seg.weight, std=0.5)
    path = tmp_path_factory.mktemp("weights") / "segman.pth"
    meta = {"dataset_meta": {"classes": tuple(CLASSES), "palette": PALETTE}}
    torch.save({"meta": meta, "state_dict": model.state_dict()}, path)
    return path


@pytest.fixture(scope="module")
def seg(weights):
    return Segmenter("segman_seg_tiny", weights, device="cpu", **SMALL)


# -- windows ----------------------------------------------------------------------------------------------------------


def network():
    """Sees its surroundings, so that the borders of windows matter."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 7, padding=3), nn.ReLU(), nn.Conv2d(8, 5, 7, padding=3)).eval()


def all_at_once(net, image, window, stride):
    """What `slide` is to give, with sums as large as the image."""
    height, width = image.shape[:2]
    high, wide = min(window[0], height), min(window[1], width)
    total, count = torch.zeros(5, height, width), torch.zeros(height, width)
    for y in positions(height, high, stride[0]):
        for x in positions(width, wide, stride[1]):
            crop = torch.from_numpy(image[y : y + high, x : x + wide]).movedim(-1, 0).float()
            total[:, y : y + high, x : x + wide] += net(crop[None] / 255)[0]
            count[y : y + high, x : x + wide] += 1
    return total / count


@pytest.mark.parametrize("memory", [2**30, 5 * 32 * 4 * 60, 1])
@pytest.mark.parametrize(
    "size, window, stride",
    [((100, 131), (32, 48), (21, 32)), ((64, 64), (32, 32), (32, 32)), ((33, 200), (32, 32), (7, 32)),
     ((20, 90), (32, 48), (16, 16)), ((50, 40), (64, 64), (42, 42))],
)  # fmt: skip
@torch.no_grad()
def test_slide_is_the_mean_over_windows(size, window, stride, memory):
    net, image = network(), photo(*size)
    shares, seen, largest = [], np.zeros(size, int), 0

    def forward(windows):
        assert len(windows) <= 3
        return net(torch.from_numpy(windows).movedim(-1, 1).float() / 255)

    whole = torch.full((5, *size), torch.nan)
    blocks = slide(
        Pixels(image), forward, 5, window, stride, batch=3, memory=memory, progress=shares.append
    )  # fmt: skip
    for top, bottom, left, right, logits in blocks:
        seen[top:bottom, left:right] += 1
        largest = max(largest, right - left)
        whole[:, top:bottom, left:right] = logits
    assert (seen == 1).all() and sum(shares) == pytest.approx(1)
    torch.testing.assert_close(whole, all_at_once(net, image, window, stride), rtol=1e-5, atol=1e-5)
    wide, high = min(window[1], size[1]), min(window[0], size[0])
    assert largest <= max(wide, memory // (5 * high * 4)) and (memory < 2**30 or largest == size[1])


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("small, large", [((7, 9), (40, 33)), ((40, 30), (17, 90)), ((1, 1), (3, 4)), ((8, 8), (8, 8)),
                                          ((64, 32), (900, 1))])  # fmt: skip
def test_enlarge_is_interpolate(small, large, align_corners):
    logits, widest = torch.randn(3, *small), max(large[1], small[1])  # a column is enlarged from wider logits
    expected = F.interpolate(logits[None], large, mode="bilinear", align_corners=align_corners)[0]
    for memory in (2**30, 4 * 3 * widest * 4 * 5, 1):
        strips = list(enlarge(logits, large, align_corners, memory))
        assert all((s.bottom - s.top) * 4 * 3 * widest * 4 <= memory or s.bottom - s.top == 1 for s in strips)
        torch.testing.assert_close(torch.cat([s.logits for s in strips], 1), expected, rtol=1e-4, atol=1e-5)
        assert [s.top for s in strips[1:]] == [s.bottom for s in strips[:-1]]


MEASURE = """
import resource, sys
import numpy as np, torch
from linescan.tasks import segment
from linescan.tasks.segment import Segmenter
torch.set_num_threads(1)
class Net:
    window = stride = None; images = 1
    channels = {channels}; classes = ["c"] * {channels}; palette = [(0, 0, 0)] * {channels}
    resizes, align_corners = False, False
    module = torch.nn.Conv2d(3, {channels}, 1)
    def encode(self, windows): return windows
    def logits(self, x): return self.module(x.float() / 255)
    def decide(self, logits): return logits.max(0).indices
segment.open_model = lambda task, model, checkpoint: Net()
torch.manual_seed(0)
seg = Segmenter("net", device="cpu", window=512, stride=512, memory={memory})
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
mask = seg(sys.argv[1])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
sample = np.random.default_rng(0).integers(0, min(mask.shape), (50, 2))
from PIL import Image
Image.MAX_IMAGE_PIXELS = None
pixels = np.asarray(Image.open(sys.argv[1]))[tuple(sample.T)]
with torch.no_grad():
    expected = Net.module(torch.from_numpy(pixels).float()[:, :, None, None] / 255).argmax(1).flatten().numpy()
assert (mask[tuple(sample.T)] == expected).all()
print(mask.shape)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_image(tmp_path):
    """17 megapixels and 16 classes: all logits would take 1.1 GB, and the image alone 50 MB."""
    height, width, channels = 2100, 8200, 16
    rows = np.random.default_rng(0).integers(0, 255, (1, width, 3), np.uint8)
    Image.fromarray(np.broadcast_to(rows, (height, width, 3)).copy()).save(tmp_path / "large.png", compress_level=1)
    done = python(tmp_path, MEASURE.format(channels=channels, memory=2**26), tmp_path / "large.png")
    assert done.returncode == 0, done.stderr
    grown, shape = done.stdout.splitlines()
    assert shape == f"({height}, {width})"
    # A strip of sums and its half that is moved up (64 + 32 MB), a window and its logits (20 MB), the argmax (16 MB),
    # the mapped mask (17 MB), rows of the image (13 MB), and what the allocator keeps.
    assert float(grown) < 300, grown


# -- Segmenter --------------------------------------------------------------------------------------------------------


def test_a_mask_is_what_the_model_says(seg, weights):
    image = photo(150, 220)
    resized = torch.from_numpy(seg.model.prepare(image))
    assert resized.shape == (512, 768, 3)  # 512 x 751, and up to the next multiple of 32
    x = (resized.movedim(-1, 0)[None].float() - torch.tensor([123.675, 116.28, 103.53])[:, None, None]) / torch.tensor(
        [58.395, 57.12, 57.375]
    )[:, None, None]
    with torch.no_grad():
        logits = F.interpolate(seg.model.module(x), (150, 220), mode="bilinear")
    mask = seg(image)
    assert mask.shape == (150, 220) and mask.dtype == np.uint8
    assert len(np.unique(mask)) > 1, "a constant answer proves nothing"
    assert (mask == logits[0].argmax(0).numpy()).mean() > 0.999
    assert seg.classes == CLASSES and [list(c) for c in seg.palette] == PALETTE


def test_an_image_is_an_image_and_batches_do_not_matter(seg, weights, tmp_path):
    image = photo(100, 100)
    Image.fromarray(image).save(tmp_path / "x.png")
    path, tensor = tmp_path / "x.png", torch.from_numpy(image).movedim(-1, 0)
    same = [path, str(path), Image.fromarray(image), image, tensor]
    masks = Segmenter("segman_seg_tiny", weights, device="cpu", batch=3, **SMALL)([*same, photo(60, 120)])
    for mask in masks[:5]:
        assert (mask == masks[0]).mean() > 0.999
    assert masks[5].shape == (60, 120)
    assert (masks[5] == seg(photo(60, 120))).mean() > 0.999


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(seg, weights, dtype):
    half = Segmenter("segman_seg_tiny", weights, device="cpu", dtype=dtype, window=224, **SMALL)
    full = Segmenter("segman_seg_tiny", weights, device="cpu", window=224, **SMALL)
    image = photo(224, 300)
    assert (half(image) == full(image)).mean() > 0.95


def test_windows_over_the_image_as_it_is(weights):
    tool = Segmenter("segman_seg_tiny", weights, device="cpu", window=(224, 256), **SMALL)
    assert tool.stride == (149, 170)
    image = photo(300, 300)
    inside = Segmenter("segman_seg_tiny", weights, device="cpu", window=(300, 300), **SMALL)
    assert (tool(image) != inside(image)).any()
    image = photo(100, 120)  # smaller than a window, and than the model's smallest
    assert tool(image).shape == (100, 120)


def test_overlay_of_a_mask(seg):
    image = photo(100, 130)
    mask = np.zeros((100, 130), np.uint8)
    mask[:, 60:] = 1
    drawn = np.asarray(seg.draw(image, mask)).astype(int)
    factor = -(-SMALLEST // 130)
    assert drawn.shape[1] == 130 * factor and drawn.shape[0] > 100 * factor
    centre = np.asarray(Image.fromarray(image).resize((130 * factor, 100 * factor), 3)).astype(int)
    for y, x, label in ((50, 20, 0), (50, 100, 1)):
        expected = (centre[y * factor, x * factor] + np.array(PALETTE[label])) / 2
        assert abs(drawn[y * factor, x * factor] - expected).max() <= 1


@pytest.mark.parametrize(
    "options, said",
    [({"stride": 10}, "window"), ({"window": 32, "stride": 64}, "gaps"), ({"window": (1, 2, 3)}, "height, width"),
     ({"window": 0}, "height, width"), ({"device": "cuda:99"}, "cuda:99"), ({"dtype": torch.int8}, "int8"),
     ({"depth": 3}, "depth")],
)  # fmt: skip
def test_wrong_options_get_one_line(weights, options, said):
    with pytest.raises(InputError, match=said):
        Segmenter("segman_seg_tiny", weights, **SMALL | options)


def test_the_tool_shows_itself(seg):
    assert repr(seg) == "Segmenter(segman_seg_tiny, 0.04 M parameters, cpu, float32, 3 classes)"
    assert "<caption>Segmenter</caption>" in seg._repr_html_()


def test_images_of_any_shape(seg):
    for size in ((1, 4000), (4000, 1), (1, 1), (3, 200)):
        mask = seg(photo(*size))
        assert mask.shape == size
        assert min(seg.draw(photo(*size), mask).size) >= 1


def test_weights_that_are_none(weights, tmp_path):
    with pytest.raises(InputError, match="checkpoint"):
        Segmenter("segman_seg_tiny")
    torch.save({"state_dict": {"x": torch.ones(1)}, "bomb": Bomb(tmp_path / "fired")}, tmp_path / "bomb.pth")
    torch.save({"state_dict": {"x": torch.ones(1)}}, tmp_path / "other.pth")
    for name, said in (("bomb.pth", "refused"), ("other.pth", "has no decode_head"), ("none.pth", "does not exist")):
        with pytest.raises(RuntimeError, match=said):
            Segmenter("segman_seg_tiny", tmp_path / name, **SMALL)
    assert not (tmp_path / "fired").exists()


def test_nan_is_not_an_answer(weights, tmp_path):
    content = torch.load(weights, weights_only=True)
    content["state_dict"]["decode_head.conv_seg.bias"][:] = torch.nan
    torch.save(content, tmp_path / "nan.pth")
    with pytest.raises(InputError, match="NaN"):
        Segmenter("segman_seg_tiny", tmp_path / "nan.pth", device="cpu", **SMALL)(photo(64, 64))


# -- detections -------------------------------------------------------------------------------------------------------


def detections(size, count, seed=0):
    random = np.random.default_rng(seed)
    boxes, patches = [], []
    for _ in range(count):
        top, left = random.integers(0, size[0] - 3), random.integers(0, size[1] - 3)
        high, wide = random.integers(2, size[0] - top + 1), random.integers(2, size[1] - left + 1)
        boxes.append((left, top, left + wide, top + high))
        patches.append((int(top), int(left), random.random((high, wide)) < 0.6))
    scores = np.sort(random.random(count).astype(np.float32))[::-1]
    return Detections(size, np.array(boxes, np.float32), scores, random.integers(0, 3, count), patches)


def test_coco_results_are_the_masks():
    coco = pytest.importorskip("pycocotools.mask")
    full = (5, 6, np.ones((31, 20), bool)), (0, 0, np.ones((40, 50), bool)), (3, 4, np.zeros((0, 0), bool))
    found = detections((40, 50), 30)
    found.patches[:3] = full
    masks = found.masks
    assert masks.shape == (30, 40, 50) and masks[0, 5:36, 6:26].all() and masks[0].sum() == 31 * 20
    results = found.coco(7, [90, 1, 18])
    for mask, box, result in zip(masks, found.boxes, results):
        np.testing.assert_array_equal(coco.decode(result["segmentation"]), mask)
        assert result["segmentation"] == {
            "size": [40, 50], "counts": coco.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()
        }  # fmt: skip
        assert result["bbox"] == [box[0], box[1], box[2] - box[0], box[3] - box[1]]
    assert {r["category_id"] for r in results} == {90, 1, 18} and results[0]["image_id"] == 7
    assert json.loads(json.dumps(results)) == results


def test_small_masks_are_every_nth_pixel():
    found = detections((40, 50), 20)
    for factor in (1, 2, 3, 7):
        small = found.masks[:, thin(40, factor), thin(50, factor)]
        np.testing.assert_array_equal(np.array([*found.each_mask(factor)]), small)


def test_what_several_windows_find_is_kept_once():
    boxes = [
        (0, 0, 40, 40), (2, 2, 40, 40),         # the same thing twice
        (60, 0, 100, 40), (80, 0, 100, 40),     # a whole one, and its half that a border cuts
        (10, 10, 20, 20),                       # a small one within a large one, whole: another thing
        (1, 1, 40, 40),                         # the first again, as another class
    ]  # fmt: skip
    found = Detections((100, 100), np.array(boxes, np.float32), np.array([0.9, 0.8, 0.5, 0.95, 0.3, 0.4], np.float32),
                       np.array([0, 0, 0, 0, 0, 1]))  # fmt: skip
    cut = np.array([False, False, False, True, False, False])
    assert distinct(found, cut).tolist() == [0, 2, 5, 4]


def one_by_one(found, cut):
    """What `distinct` does, in a loop over all pairs."""
    order = np.lexsort((-found.scores, cut))
    boxes = torch.from_numpy(found.boxes)
    areas = box_area(boxes).clamp(min=1e-6)
    kept = []
    for i in order.tolist():
        rivals = [k for k in kept if found.labels[k] == found.labels[i]]
        if rivals:
            joint = box_iou(boxes[i : i + 1], boxes[rivals])[0]
            shared = joint / (1 + joint) * (areas[i] + areas[rivals])
            if (joint > 0.5).any() or (cut[i] and (shared > 0.5 * areas[i]).any()):
                continue
        kept.append(i)
    return sorted(kept, key=lambda i: -found.scores[i])


@pytest.mark.parametrize("seed", range(4))
def test_windows_are_merged_as_pair_by_pair(seed):
    random = np.random.default_rng(seed)
    corners = random.uniform(0, 150, (500, 2))
    boxes = np.concatenate([corners, corners + random.uniform(5, 60, (500, 2))], 1).astype(np.float32)
    scores = random.permutation(500).astype(np.float32) / 500
    found = Detections((220, 220), boxes, scores, random.integers(0, 3, 500))
    for share in (0, 0.3, 1):
        cut = random.random(500) < share
        assert distinct(found, cut).tolist() == one_by_one(found, cut)
    assert distinct(found.pick(found.scores < 0), np.zeros(0, bool)).tolist() == []


def test_many_instances_of_many_windows():
    """A loop over all pairs would take minutes, and a matrix of all pairs 400 MB."""
    random = np.random.default_rng(0)
    corners = random.uniform(0, 5000, (10_000, 2))
    boxes = np.concatenate([corners, corners + random.uniform(5, 60, (10_000, 2))], 1).astype(np.float32)
    found = Detections((5100, 5100), boxes, random.random(10_000).astype(np.float32), random.integers(0, 9, 10_000))
    cut = random.random(10_000) < 0.1
    assert 5000 < len(distinct(found, cut)) < 10_000


def test_masks_of_large_images_are_written_alike(monkeypatch):
    found = detections((40, 50), 25)
    found.patches[:3] = (5, 6, np.ones((35, 20), bool)), (0, 0, np.ones((40, 50), bool)), (3, 4, np.zeros((0, 0), bool))
    by_encoding = [run_lengths(patch, found.size) for patch in found.patches]
    monkeypatch.setattr(results, "LARGE", 10)
    assert [run_lengths(patch, found.size) for patch in found.patches] == by_encoding


def test_detections_show_themselves():
    found = detections((40, 50), 3)
    assert found.names == [f"class {i}" for i in found.labels] and found._repr_html_().count("<tr>") == 4
    named = replace(found, classes=["<b>", "c", "d"])
    assert set(named.names) <= {"<b>", "c", "d"} and named.above(0).pick([0]).classes == ["<b>", "c", "d"]
    assert "<b>" not in named._repr_html_()


# -- files ------------------------------------------------------------------------------------------------------------


def write_video(path, frames, size=(96, 64)):
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for i in range(frames):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(photo(size[1], size[0], i), format="rgb24")))
        container.mux(stream.encode())


def test_segment_command(linescan_here, weights, tmp_path):
    folder, out = tmp_path / "in", tmp_path / "out"
    (folder / "deep").mkdir(parents=True)
    Image.fromarray(photo(80, 120)).save(folder / "one.png")
    Image.fromarray(photo(90, 60, 1)).save(folder / "deep" / "two.jpg")
    (folder / "cut.png").write_bytes((folder / "one.png").read_bytes()[:200])
    write_video(folder / "clip.mp4", 5)
    (folder / "half.mp4").write_bytes((folder / "clip.mp4").read_bytes()[:900])
    options = ("-m", "segman_seg_tiny", "-c", weights, "-o", out, "--device", "cpu", "--batch", 2, *SMALL_ARGS)
    status, stdout, stderr = linescan_here("segment", folder, "--window", "224", *options)
    assert status == 1, "two files are broken"
    assert stderr.count("skipped") == 2 and "cut.png" in stderr and "half.mp4" in stderr and "3 of 5 done" in stderr
    assert "Traceback" not in stderr
    lines = stdout.splitlines()
    assert len(lines) == 3 and any("clip.mp4: 5 frames" in line for line in lines)
    assert json.loads((out / "classes.json").read_text())[1] == {"id": 1, "name": "sea", "color": PALETTE[1]}
    tool = Segmenter("segman_seg_tiny", weights, device="cpu", window=224, **SMALL)
    for name, size in (("one", (80, 120)), ("deep/two", (90, 60))):
        with Image.open(out / "masks" / f"{name}.png") as mask:
            assert mask.mode == "P" and mask.getpalette()[:9] == sum(PALETTE, [])
            source = folder / (name + (".png" if name == "one" else ".jpg"))
            assert (np.asarray(mask) == tool(source)).mean() > 0.999 and mask.size == size[::-1]
        with Image.open(out / "overlays" / f"{name}.jpg") as overlay:
            assert max(overlay.size) >= SMALLEST
    assert not (out / "overlays" / "cut.jpg").exists() and not list(out.rglob("*.partial*"))
    assert sorted(p.name for p in (out / "masks" / "clip").iterdir()) == [f"{i:06}.png" for i in range(5)]

    import av

    with av.open(str(out / "overlays" / "clip.mp4")) as container:
        video = container.streams.video[0]
        assert video.average_rate == 10 and len(list(container.decode(video))) == 5
        assert video.width == 384 and video.height > 256

    status, stdout, stderr = linescan_here("segment", folder / "*.png", "--no-overlays", *options[:-1])
    assert status == 2, "a --model-arg without its value"
    (folder / "cut.png").unlink()
    status, _, _ = linescan_here("segment", folder / "o*.png", "--no-overlays", *options, "-o", tmp_path / "again")
    assert status == 0 and not (tmp_path / "again" / "overlays").exists()


@pytest.mark.parametrize(
    "arguments, said",
    [(["--window", "12by3"], "--window"), (["--batch", "0"], "--batch"),
     (["--window", "0x3"], "--window"), (["-m", "segman_huge"], "segman_huge"), (["-c", "none.pth"], "none.pth")],
)  # fmt: skip
def test_bad_input_is_one_line(linescan_here, weights, tmp_path, arguments, said):
    Image.fromarray(photo(8, 8)).save(tmp_path / "x.png")
    options = [tmp_path / "x.png", "-m", "segman_seg_tiny", "-c", weights, "-o", tmp_path / "out", *SMALL_ARGS]
    if "segman_huge" in arguments:
        options = options[:-6]
    status, _, stderr = linescan_here("segment", *options, *arguments)
    assert status == 2 and said in stderr and len(stderr.splitlines()) == 1, stderr


HIDDEN = """
import sys
sys.modules.update(dict.fromkeys(["mmengine", "mmcv", "mmseg", "mmdet"]))
from linescan.cli import main
for line in sys.stdin:
    sys.argv = ["linescan", *eval(line)]
    try:
        main()
    except SystemExit as exit:
        print(exit.code)
"""


@pytest.mark.slow
def test_without_openmmlab_one_line_says_what_to_install(weights, tmp_path):
    """A config, where the packages are missing; SegMAN by name works there."""
    Image.fromarray(photo(40, 40)).save(tmp_path / "x.png")
    (tmp_path / "config.py").write_text("model = dict()")
    config = ["x.png", "-m", "config.py", "-c", str(weights)]
    named = ["x.png", "-m", "segman_seg_tiny", "-c", str(weights), "--window", "224", *SMALL_ARGS]
    done = subprocess.run(
        [sys.executable, "-c", HIDDEN], input=f"{['segment', *config]}\n{['detect', *config]}\n{['segment', *named]}\n",
        env=ENVIRONMENT, cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    first, second, last = done.stderr.splitlines()
    assert done.stdout.splitlines()[:2] == ["2", "2"] and done.stdout.splitlines()[-1] == "0"
    for line in (first, second):
        assert "OpenMMLab" in line and "install" in line
    assert "1 of 1 done" in last


def test_three_lines(weights, tmp_path, monkeypatch):
    Image.fromarray(photo(40, 60)).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    from linescan.tasks import Segmenter

    seg = Segmenter("segman_seg_tiny", weights, **SMALL)  # fmt: skip
    mask = seg("photo.jpg")
    assert mask.shape == (40, 60)
