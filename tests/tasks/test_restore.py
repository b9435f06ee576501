"""Restoration: pairs, training with resume, scores, and photos of all kinds restored with what belongs to them."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from linescan.engine.cards import ModelCard, plain_preprocess, save_model
from linescan.engine.metrics import read_metrics
from linescan.engine.pairs import Pairs, find_pairs, open_pairs, symmetry
from linescan.errors import CheckpointError, InputError
from linescan.heads.restoration.mambair_v2 import MambaIRv2
from linescan.media.arrays import read_array
from linescan.media.degrade import Degradation
from linescan.media.quality import luma, psnr, ssim, to_8_bits
from linescan.media.resize import enlarge_bicubic
from linescan.tasks.recipes import RestorationRecipe
from linescan.tasks.restore import Photo, Quality, RestorationTask, Restorer, ensemble, whole
from linescan.tasks.windows import parts

from ..media.test_quality import photo
from ..runs import contents, finish, kill_and_resume, same, train_as_two

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = dict(depths=[1], embed_dim=12, num_heads=2, window_size=4, d_state=2, num_tokens=4, inner_rank=4)
ARGS = [f"--model-arg={key}={json.dumps(value).replace(' ', '')}" for key, value in SMALL.items()]


def save(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((255 * image).round().byte().permute(1, 2, 0).numpy()).save(path)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    root = tmp_path_factory.mktemp("photos") / "photos"
    for i in range(6):
        save(root / f"{i}.png", photo(3, 40 + i, 52, seed=i))
    return root


@pytest.fixture(scope="module")
def x2(tmp_path_factory):
    """A file of a small model that doubles images; its head is made so that it is not far from the nearest pixel."""
    path = tmp_path_factory.mktemp("x2") / "x2.safetensors"
    torch.manual_seed(0)
    model = MambaIRv2(upscale=2, upsampler="pixelshuffledirect", light=True, mlp_ratio=1.0, **SMALL)
    with torch.no_grad():
        model.head[0].weight.mul_(0.3)
    save_model(path, model, ModelCard("mambair_v2_light_x2", SMALL, [], plain_preprocess(3)))
    return path


# -- pairs ------------------------------------------------------------------------------------------------------------


def test_pairs_are_found_by_name_and_size(tmp_path):
    root = tmp_path / "pairs"
    for i in range(3):
        image = photo(3, 25, 30, seed=i)
        save(root / "high" / "a" / f"{i}.png", image)
        save(root / "low" / "a" / f"{i}x3.png", image[:, :8, :10])
    high, low = find_pairs(root, 3)
    data = Pairs(high, low, 3, 3)
    item = data[1]
    assert item["low"].shape == (3, 8, 10) and item["high"].shape == (3, 24, 30)
    assert torch.equal(item["high"], photo(3, 25, 30, seed=1)[:, :24].float())
    train, held_out = open_pairs(str(root), None, 0.3, 3)
    assert len(train[0]) == len(train[1]) == 2 and len(held_out[0]) == 1
    assert {p.stem for p in train[0] + held_out[0]} == {"0", "1", "2"}
    with pytest.raises(InputError, match="has 8 x 10 pixels, .* 25 x 30, which is not 2 times it"):
        Pairs(high, low, 3, 2)[0]
    (root / "low" / "a" / "0x3.png").unlink()
    with pytest.raises(InputError, match="do not hold the same images: a/0 is in one alone"):
        find_pairs(root, 3)
    with pytest.raises(InputError, match="25 x 30 pixels are less than a patch of 26"):
        Pairs(high, None, 3, 1, lambda x: x, patch=26)[0]


def test_noise_of_a_held_out_image_is_always_the_same_and_of_a_patch_never(photos):
    files = sorted(photos.iterdir())
    held_out, patches = (Pairs(files, None, 3, 1, Degradation("noise 25"), patch=patch) for patch in (None, 16))
    assert torch.equal(held_out[0]["low"], held_out[0]["low"])
    noise = [item["low"] - item["high"] for item in (patches[0], patches[0])]
    assert not torch.equal(*noise) and 15 < 255 * noise[0].std() < 35


def test_patches_of_a_pair_are_of_one_place():
    """Of images whose pixels are their own places, degraded by leaving out every second one."""
    data = Pairs(["high"], ["low"], 1, 2, patch=5, repeats=3)
    low = torch.arange(9 * 14, dtype=torch.uint8).view(1, 9, 14)
    data._cache = {"high": low.repeat_interleave(2, 1).repeat_interleave(2, 2), "low": low}
    seen = set()
    for seed in range(60):
        np.random.seed(seed), torch.manual_seed(seed)
        __import__("random").seed(seed)
        item = data[0]
        assert torch.equal(item["low"].repeat_interleave(2, 1).repeat_interleave(2, 2), item["high"])
        first = (255 * item["low"]).round().int()[0]
        seen.add((int(first[0, 1] - first[0, 0]), int(first[1, 0] - first[0, 0])))
    assert seen == {(1, 14), (-1, 14), (1, -14), (-1, -14), (14, 1), (14, -1), (-14, 1), (-14, -1)}
    assert sorted(data.order(np.random.default_rng(0))) == [0, 0, 0]
    x = torch.rand(2, 3, 4, 6)
    for i in range(8):
        assert torch.equal(symmetry(symmetry(x, i), i, inverse=True), x)


# -- training and scores ----------------------------------------------------------------------------------------------


def test_scores_are_those_of_the_field(photos, x2):
    tool = Restorer(checkpoint=x2, device="cpu")
    recipe = RestorationRecipe(str(photos))
    judge = RestorationTask.judge(recipe, tool.module, ModelCard("mambair_v2_light_x2", {}, [], plain_preprocess(3)))
    assert (judge.on, judge.crop) == ("y", 2)
    from linescan.engine.processes import Processes
    from linescan.engine.scores import evaluate

    scores = evaluate(judge, tool.module, Processes(0, 1, torch.device("cpu"))).scores
    want = []
    for item in (judge.data[i] for i in range(6)):
        with torch.inference_mode():
            restored = to_8_bits(tool.module(item["low"][None]))[0]
        pair = luma(restored), luma(item["high"])
        want.append((psnr(*pair, 2), ssim(*pair, 2)))
    assert [scores["psnr"], scores["ssim"]] == pytest.approx(np.mean(want, 0).tolist(), abs=1e-4)

    def of(degrade, scale, **options):
        data = Pairs([], None, 3, scale, degrade and Degradation(degrade, scale))
        quality = Quality.of(RestorationRecipe("x", **options), data)
        return quality.on, quality.crop

    assert of("noise 25", 1) == ("rgb", 0) and of("jpeg 10", 1) == ("y", 0) and of(None, 1) == ("rgb", 0)
    assert of("bicubic, noise 5", 4) == ("y", 4) and of("noise 25", 1, measure="y", crop=3) == ("y", 3)


@pytest.mark.slow
def test_training_learns_and_survives_kill_9(photos, tmp_path, linescan_here):
    (tmp_path / "photos").symlink_to(photos)
    args = (
        "train", "--task", "restoration", "--data", "photos", "--degrade", "noise 40", "--model", "mambair_v2_color_dn",
        *ARGS, "--patch", "16", "--batch", "4", "--repeats", "4", "--steps", "60", "--lr", "5e-3", "--ema", "0.9",
        "--loss", "charbonnier", "--save-every", "7", "--evaluate-every", "20", "--log-every", "1", "--workers", "0",
    )  # fmt: skip
    finish(tmp_path, args, "whole")
    kill_and_resume(tmp_path, args, "killed", times=2, rows=20)
    assert same(contents(tmp_path / "whole"), contents(tmp_path / "killed"))
    rows = [row for row in read_metrics(tmp_path / "whole" / "metrics.csv") if "val_psnr" in row]
    assert rows[-1]["val_psnr"] > 18.5  # of the noise alone: 16.1 dB
    judged = ("evaluate", "--task", "restoration", "--data", photos, "-c", tmp_path / "whole" / "model.safetensors")
    assert json.loads(linescan_here(*judged, "--degrade", "noise 40", "--json")[1])["psnr"] > 18.5
    status, _, error = linescan_here(*judged)
    assert status == 2 and error.startswith(f"linescan: {photos} holds no pairs")
    train_as_two(tmp_path, *args, "--val", "photos", "--steps", "6", "--evaluate-every", "6", "-o", "two")
    [row] = [row for row in read_metrics(tmp_path / "two" / "metrics.csv") if "val_psnr" in row]
    alone = ("evaluate", "--task", "restoration", "--data", photos, "-c", tmp_path / "two" / "model.safetensors")
    said = json.loads(linescan_here(*alone, "--degrade", "noise 40", "--json")[1])
    assert row["step"] == 6 and said["psnr"] == pytest.approx(row["val_psnr"], abs=1e-3)


def test_patches_grow_in_stages_and_are_mixed(photos, monkeypatch):
    recipe = RestorationRecipe(
        str(photos), model="mambair_v2_light_x2", model_args=SMALL, patch=20, batch=6, stages="8x6:2, 12x3:1, 20x1:5"
    )
    task, seen = RestorationTask(recipe), []
    low = torch.rand(6, 3, 20, 20)
    batch = {"low": low, "high": low.repeat_interleave(2, -1).repeat_interleave(2, -2)}

    def network(images):
        seen.append(images)
        return images.repeat_interleave(2, -1).repeat_interleave(2, -2)

    for step in (0, 1, 2, 3, 7, 9):
        task.step = step
        assert task(network, batch)["loss"] == 0, "of both images the same place"
    assert [(len(x), x.shape[-1]) for x in seen] == [(6, 8), (6, 8), (3, 12), (1, 20), (1, 20), (1, 20)]
    task.recipe = replace(recipe, stages=None, mixup=1.2)
    seen.clear()
    losses = [task(network, batch)["loss"].item() for _ in range(12)]
    mixed = [not torch.equal(x, low) for x in seen]
    assert max(losses) < 1e-6 and 0 < sum(mixed) < 12
    for stages, said in (("8:2", "--stages is side x batch : steps"), ("24x6:2", "--stages has 6 patches of 24"),
                         ("8x7:2", "--stages has 7 patches of 8"), ("8x0:2", "--stages is side x batch")):  # fmt: skip
        with pytest.raises(InputError, match=said):
            replace(recipe, stages=stages)


def test_what_was_held_out_is_scored(photos, x2, tmp_path):
    """Of a folder with train/ and val/ the images of val/ alone, as in training."""
    for part, count in (("train", 4), ("val", 2)):
        for i in range(count):
            save(tmp_path / "sharp" / part / f"{i}.png", photo(3, 40, 30, seed=i))
            save(tmp_path / "both" / part / "high" / f"{i}.png", photo(3, 40, 30, seed=i))
            save(tmp_path / "both" / part / "low" / f"{i}.png", photo(3, 20, 15, seed=i))
    tool, card = Restorer(checkpoint=x2, device="cpu"), ModelCard("mambair_v2_light_x2", {}, [], plain_preprocess(3))
    for folder, low in ((tmp_path / "sharp", None), (tmp_path / "both", 2)):
        data = RestorationTask.judge(RestorationRecipe(str(folder)), tool.module, card).data
        assert len(data) == 2 and all("val" in path.parts for path in data.high) and (data.low and len(data.low)) == low
    assert len(RestorationTask.judge(RestorationRecipe(str(photos)), tool.module, card).data) == 6


def test_images_that_are_too_small_to_be_scored_are_named(x2, tmp_path, linescan_here):
    for name, sides in (("large", (40, 30)), ("thin", (40, 14)), ("pixel", (1, 1))):
        save(tmp_path / "photos" / f"{name}.png", photo(3, 40, 30)[:, : sides[0], : sides[1]])
    judged = ("evaluate", "--task", "restoration", "--data", tmp_path / "photos", "-c", x2)
    status, said, error = linescan_here(*judged, "--json")
    assert json.loads(said)["psnr"] > 10 and status == 1
    assert "thin.png: 40 x 14 pixels are too few, 15 x 15 are needed" in error and "pixel.png: 0 x 0" in error


def test_a_model_of_one_scale_starts_from_another(photos, x2, monkeypatch):
    import linescan.notices

    said = []
    linescan.notices.show_notices_with(lambda line, loud: said.append(line))
    recipe = RestorationTask.resolve(
        RestorationRecipe(str(photos), model="mambair_v2_light_x4", model_args=SMALL, checkpoint=str(x2), patch=8)
    )
    task = RestorationTask(recipe)
    task.load_weights()
    linescan.notices.show_notices_with(None)
    from safetensors.torch import load_file

    state = load_file(x2)
    own = task.model.state_dict()
    assert all(torch.equal(own[key], value) for key, value in state.items() if not key.startswith("head."))
    assert any("2 of the head's 2 tensors are of another shape" in line for line in said)
    again = RestorationTask.resolve(RestorationRecipe(str(photos), checkpoint=str(x2)))
    assert again.model == "mambair_v2_light_x2" and again.model_args == SMALL
    monkeypatch.setattr(linescan.zoo, "fetch", lambda entry: x2)
    task = RestorationTask(replace(recipe, model="mambair_v2_light_x2", checkpoint=None, pretrained=True))
    task.load_weights()
    assert same(task.model.state_dict(), state), "the published weights, as they are"
    with pytest.raises(InputError, match="vim_tiny_patch16_224 restores no images"):
        RestorationTask(RestorationRecipe(str(photos), model="vim_tiny_patch16_224"))
    with pytest.raises(InputError, match="holds no pairs"):
        RestorationTask(RestorationRecipe(str(photos), model="mambair_v2_color_dn", model_args=SMALL))


# -- photos -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 199, 200, 457, 601])
def test_parts_are_those_of_the_published_tests(length):
    """MambaIR's: L // 200 + 1 along a side that is mirrored at its end, each with a tenth beyond its inner borders."""
    count = length // 200 + 1
    step = -(-length // count)
    mirrored, places = np.pad(np.arange(length), (0, count * step - length), "reflect"), []
    for i, part in enumerate(every := list(parts((length, 30), 200, 2))):
        beyond = slice(max(i * step - step // 10, 0), (i + 1) * step + step // 10)
        assert part.rows.tolist() == mirrored[beyond].tolist() and part.columns.tolist() == [*range(30)]
        kept, place = part.rows.repeat(2)[part.kept[0]], np.arange(length).repeat(2)[part.place[0]]
        assert kept.tolist() == place.tolist() and part.kept[1] == part.place[1] == slice(0, 60)
        places += range(2 * length)[part.place[0]]
    assert len(every) == count and places == [*range(2 * length)]


def test_parts_and_symmetries_of_a_network_that_sees_three_pixels():
    def blur(x):
        return enlarge_bicubic(x, 2)

    torch.manual_seed(0)
    for size in ((230, 205), (199, 60), (450, 7)):
        x = torch.rand(2, 3, *size)
        restored, want = whole(blur, x, 2), blur(x)
        # But at the lower and right border, where parts are mirrored another way.
        assert torch.allclose(restored[..., :-8, :-8], want[..., :-8, :-8], atol=1e-5) and restored.shape == want.shape
    assert torch.allclose(ensemble(blur)(x), want, atol=1e-5)
    asked = []
    assert torch.allclose(ensemble(lambda x: asked.append(x) or x)(x), x)
    assert len(asked) == 8 and len({tuple(a[0, 0].flatten()[:2].tolist()) for a in asked}) == 8


def test_kinds_of_photos(x2, tmp_path, linescan_here):
    image = photo(3, 21, 34)
    bytes_ = (255 * image).round().byte().permute(1, 2, 0).numpy()
    alpha = np.tile(np.arange(34, dtype=np.uint8) * 7, (21, 1))
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a street"
    folder = tmp_path / "in"
    folder.mkdir()
    Image.fromarray(bytes_).save(folder / "turned.jpg", exif=exif, icc_profile=icc, quality=95, subsampling=0)
    Image.fromarray(np.dstack([bytes_, alpha])).save(folder / "alpha.png")
    Image.fromarray(bytes_[..., 0].astype(np.uint16) * 257).save(folder / "deep.png")
    Image.fromarray(bytes_[..., 0]).save(folder / "grey.png")
    Image.fromarray(bytes_[..., 0] / np.float32(255)).save(folder / "float.tif")
    (folder / "broken.png").write_bytes((folder / "grey.png").read_bytes()[:200])
    status, said, error = linescan_here("restore", folder, "-c", x2, "--compare", "--json", "-o", tmp_path / "out")
    assert status == 1 and "broken.png" in error
    answers = {a["source"].rpartition("/")[2]: a for a in json.loads(said)}
    assert len(answers) == 6 and "error" in answers.pop("broken.png")
    assert all(len(a["files"]) == 2 for a in answers.values())
    tool = Restorer(checkpoint=x2, device="cpu")

    def restored(name):
        return read_array(tmp_path / "out" / name)

    turned, facts = restored("turned.png")
    assert turned.shape == (68, 42, 3) and facts.icc == icc
    again = Image.Exif()
    again.load(facts.exif)
    assert again[0x010E] == "a street" and 0x0112 not in again
    with torch.inference_mode():
        want = tool.module(image.float()[None])[0]
        grey = tool.module(image[:1].float().expand(3, -1, -1)[None]).mean(1, keepdim=True)[0]
    got = restored("alpha.png")[0]
    assert abs(got[..., :3] - 255 * want.clamp(0, 1).permute(1, 2, 0).numpy()).max() < 0.51
    assert abs(got[5:-5, 5:-5, 3].astype(float) - (np.arange(5, 63) * 3.5 - 1.75)).max() < 1
    assert got.shape == (42, 68, 4)
    deep = restored("deep.png")[0]
    assert deep.dtype == np.uint16 and abs(deep - 65535 * grey.clamp(0, 1).permute(1, 2, 0).numpy()).max() < 1
    assert abs(restored("grey.png")[0] - 255 * grey.clamp(0, 1).permute(1, 2, 0).numpy()).max() < 0.51
    assert restored("float.tif")[0].dtype == np.float32
    with Image.open(tmp_path / "out" / "compare" / "turned.jpg") as drawn:
        assert drawn.size[0] > 2 * 42
    assert np.array_equal(tool(Image.fromarray(bytes_)).array, tool(Photo(bytes_)).array)
    small = Restorer(checkpoint=x2, device="cpu", window=16, batch=3)
    close = small(Photo(bytes_)).array.astype(int) - tool(Photo(bytes_)).array
    assert close.shape == (42, 68, 3) and 0 < abs(close).max() < 128
    for wrong, message in ((np.zeros((4, 4, 5), "u1"), "grey or RGB"), (np.zeros((4, 4), "i4"), "8 and 16 bits"),
                           (np.full((4, 4), 3, "f4"), "in 0..1")):  # fmt: skip
        with pytest.raises(InputError, match=message):
            tool(Photo(wrong if wrong.ndim == 3 else wrong[..., None]))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "I;16"])
def test_a_pil_image_is_restored_as_its_file(x2, tmp_path, mode):
    """Palettes are no grey, CMYK is no alpha; and it is turned as its EXIF data say."""
    image = Image.fromarray((255 * photo(3, 12, 17)).byte().permute(1, 2, 0).numpy())
    deep = Image.fromarray(np.asarray(image)[..., 0].astype(np.uint16) * 257)
    image = deep if mode == "I;16" else image.convert(mode)
    image.getexif()[0x0112] = 6
    path = tmp_path / ("x.png" if mode == "P" else "x.tif")
    image.save(path, exif=image.getexif())
    tool = Restorer(checkpoint=x2, device="cpu")
    assert np.array_equal(tool.open(image).array, tool.open(path).array)
    assert tool.open(image).array.shape[:2] == (17, 12)


def test_what_cannot_be_written_is_not_restored(x2, tmp_path, linescan_here, monkeypatch):
    """By format, and where the result would take the place of the photo."""
    monkeypatch.setattr(MambaIRv2, "forward", lambda *args: pytest.fail("restored in vain"))
    grey = np.zeros((9, 9), np.uint8)
    kinds = {"alpha": np.dstack([grey] * 4), "deep": grey.astype(np.uint16), "long": np.zeros((3, 9000), np.uint8)}
    for name, array in kinds.items():
        Image.fromarray(array).save(tmp_path / f"{name}.png")
    for name, format, message in (
        ("alpha", "jpeg", "JPEG files hold no alpha"), ("deep", "JPEG", "JPEG files do not hold uint16"),
        ("long", "webp", "WEBP files hold at most 16383 pixels a side, not 6 x 18000"),
        ("alpha", "png", f"{tmp_path / 'alpha.png'}: an output would replace this input"),
    ):  # fmt: skip
        before = (tmp_path / f"{name}.png").read_bytes()
        status, _, error = linescan_here(
            "restore", tmp_path / f"{name}.png", "-c", x2, "-o", tmp_path, "--format", format
        )
        assert status == 1 and message in error and error.count("\n") == 2, error
        assert (tmp_path / f"{name}.png").read_bytes() == before


def test_luma_alone_changes_where_the_model_is_grey():
    class Brighter(torch.nn.Module):
        in_chans, upscale = 1, 1

        def forward(self, x):
            return x + 0.1

    tool = Restorer.__new__(Restorer)
    tool.channels, tool.scale, tool.model_name, tool.module = 1, 1, "brighter", Brighter()
    tool.network = tool._run
    x = torch.rand(1, 4, 5, 6)
    got = tool._with_all_channels(x)
    assert torch.allclose(got[:, :3], x[:, :3] + 0.1, atol=1e-6) and torch.equal(got[:, 3:], x[:, 3:])


def test_what_cannot_restore_is_one_line(x2, tmp_path, linescan_here):
    for args, message in (
        (("--model", "vim_tiny_patch16_224", "--checkpoint", x2), "restores no images; `linescan list"),
        (("--checkpoint", x2, "--format", "bmp"), "format is one of 'png'"),
        (("--checkpoint", tmp_path / "none.pth"), "none.pth"),
    ):
        save(tmp_path / "a.png", photo(3, 12, 12))
        status, _, error = linescan_here("restore", tmp_path / "a.png", *args, "-o", tmp_path / "out")
        assert status == 2 and message in error and error.count("\n") == 1
    with pytest.raises((InputError, CheckpointError)):
        Restorer()
