"""`linescan prompt` and its tool: what prompts mean, what is filtered, and what becomes of odd images."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import linescan
from linescan import Prompter
from linescan.engine.cards import ModelCard, preprocess_of, save_model
from linescan.errors import InputError
from linescan.tasks.prompt import Everything, Prompt

SMALL = dict(img_size=64, dims=(8, 16, 32), depths=(1, 1, 2), dim=32)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A small model with random weights, whose masks are neither empty nor full."""
    torch.manual_seed(3)
    model = linescan.create_model("rwkvsam_small_prompt", **SMALL)
    path = tmp_path_factory.mktemp("prompt") / "model.safetensors"
    save_model(path, model, ModelCard("rwkvsam_small_prompt", SMALL, [], preprocess_of(model, img_size=64)))
    return path


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (75, 200, 3), np.uint8)).save(path)
    return path


def test_an_image_is_encoded_once_for_many_prompts(weights, photo, monkeypatch):
    prompter = Prompter(checkpoint=weights)
    encode, calls = prompter.module.encode, []
    monkeypatch.setattr(prompter.module, "encode", lambda x: calls.append(x.shape) or encode(x))
    with pytest.raises(InputError, match="no image"):
        prompter.predict(Prompt([(5, 5)]))
    prompter.set_image(photo)
    prompts = [
        Prompt([(5, 5)]), Prompt([(150, 40)], [(20, 20)]), Prompt(box=(10, 10, 190, 70)), Prompt([(199.5, 74.9)]),
        Prompt([(30, 30)], box=(0, 0, 200, 75)),
    ]  # fmt: skip
    together = prompter.predict(*prompts)
    alone = [prompter.predict(prompt) for prompt in prompts]
    assert calls == [(1, 3, 64, 64)]
    assert together.masks.shape == (5, 75, 200) and together.areas.tolist() == together.masks.sum((1, 2)).tolist()
    for i, one in enumerate(alone):
        assert np.allclose(one.scores, together.scores[i], atol=1e-5)
        assert (one.masks[0] == together.masks[i]).mean() > 0.999
    assert len({mask.tobytes() for mask in together.masks}) == 5
    for mask, box in zip(together.masks, together.boxes.astype(int)):
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        assert box.tolist() == [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
    with pytest.raises(InputError, match="stands alone"):
        prompter.predict(Everything(), Prompt([(1, 1)]))


def test_where_prompts_and_masks_lie_in_the_network(weights, photo, monkeypatch):
    """200 x 75 pixels become 64 x 24 of the network's 64 x 64; a mask of the logits comes back to the same place."""
    prompter = Prompter(checkpoint=weights)
    given = []

    def decode(features, **prompts):
        given.append(prompts)
        logits = torch.full((1, 1, 16, 16), -9.0)
        logits[..., :3, 8:] = 9  # of the network's pixels the rows 0 to 12, the columns from 32 on
        return logits, torch.tensor([[1.25]])

    monkeypatch.setattr(prompter.module, "decode", decode)
    prompter.set_image(photo)
    found = prompter.predict(Prompt([(100, 50)], [(0, 25)], (50, 0, 200, 75)))
    assert torch.allclose(given[0]["points"], torch.tensor([[[32.0, 16], [0, 8]]]))
    assert given[0]["labels"].tolist() == [[1, 0]]
    assert torch.allclose(given[0]["boxes"], torch.tensor([[16.0, 0, 64, 24]]))
    assert found.scores.tolist() == [1.0] and found.stability.tolist() == [1.0]
    left, top, right, bottom = found.boxes[0]
    assert abs(left - 100) <= 2 and top == 0 and right == 200 and abs(bottom - 37.5) <= 2
    prompter.set_image(np.zeros((10, 200, 3), np.uint8))  # 64 x 3: rounding makes other scales across and down
    prompter.predict(Prompt([(100, 5)], box=(0, 5, 200, 10)))
    assert torch.allclose(given[1]["points"], torch.tensor([[[32, 1.5]]]))
    assert torch.allclose(given[1]["boxes"], torch.tensor([[0, 1.5, 64, 3]]))


@pytest.mark.parametrize("side, first", [(64, 10), (128, 21)])
def test_masks_begin_at_the_pixel_whose_middle_lies_on_the_object(weights, monkeypatch, side, first):
    """Logits that rise evenly across the image are 0 at 10.35 of the network's 64 pixels."""
    prompter = Prompter(checkpoint=weights)
    ramp = 0.02 * (4 * (torch.arange(16) + 0.5) - 10.35)
    monkeypatch.setattr(
        prompter.module, "decode", lambda features, **prompts: (ramp.expand(1, 1, 16, 16), torch.ones(1, 1))
    )
    prompter.set_image(np.zeros((side, side, 3), np.uint8))
    (mask,) = prompter.predict(Prompt([(1, 1)])).masks
    assert mask[:, first:].all() and not mask[:, :first].any()


class Squares(nn.Module):
    """A network whose masks are the cells of a grid in which points lie, with scores and edges that differ."""

    def __init__(self, cells: int):
        super().__init__()
        self.prompt_encoder = nn.Linear(1, 1)
        self.cells = cells

    def encode(self, x):
        return Features(x)

    def decode(self, features, points, labels):
        logits = torch.full((len(points), 1, 16, 16), -9.0)
        side, scores = 16 // self.cells, []
        for mask, point in zip(logits[:, 0], points[:, 0]):
            column, row = (point / 4 / side).int().tolist()
            mask[row * side : (row + 1) * side, column * side : (column + 1) * side] = 9
            scores.append([0.9 + 0.01 * float(point.sum()) / 128])
            if (row, column) == (0, 0):
                scores[-1] = [0.5]
            if (row, column) == (0, 1):
                mask.clamp_(-0.5, 1.5)  # firm inside, but its surroundings are not
            if (row, column) == (1, 0):
                mask.fill_(-9)
            if (row, column) == (3, 3):
                mask[12, 12:] = 0.5  # of 16 pixels 4 are not sure: stability 12/16
                mask[13, 12:], mask[11, 12:] = 1.5, -1.5  # but these are, on both sides
        return logits, torch.tensor(scores)


class Features(tuple):
    def __new__(cls, *parts):
        return super().__new__(cls, parts)


def test_everything_keeps_what_is_good_steady_and_distinct(weights):
    prompter = Prompter(checkpoint=weights)
    prompter.module = Squares(4)
    prompter.set_image(np.zeros((128, 128, 3), np.uint8))
    found = prompter.predict(Everything(side=8))  # four points in each of 16 cells
    assert len(found) == 12 and (np.diff(found.scores) <= 0).all() and (found.areas >= 1000).all()  # corners are round
    assert not found.masks[:, :32, :64].any() and not found.masks[:, 32:64, :32].any()
    assert found.masks.sum(0).max() == 1 and np.allclose(found.scores[0], 0.9 + 0.01 * 104 / 128)
    assert len(prompter.predict(Everything(8, iou=0.4))) == 13
    assert len(prompter.predict(Everything(8, stability=0.75))) == 13
    assert len(prompter.predict(Everything(8, stability=0.76))) == 12
    assert len(prompter.predict(Everything(8, stability=0))) == 14
    assert len(prompter.predict(Everything(8, overlap=1))) == 12 * 4
    assert len(prompter.predict(Everything(8, iou=1))) == 0


@pytest.mark.parametrize("shape", [(1, 1, 3), (1, 300, 3), (640, 3, 4), (31, 17), (4500, 20, 3)])
def test_images_of_every_shape(weights, shape):
    image = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    prompter = Prompter(checkpoint=weights, prompts=[Prompt([(0, 0)]), Prompt(box=(0, 0, 1, 1))])
    [(opened, found)] = prompter.each([image])
    assert found.masks.shape == (2, *shape[:2])
    assert prompter.draw(opened, found).mode == "RGB"


@pytest.mark.parametrize(
    "prompt, said",
    [
        (dict(negatives=[(1, 1)]), "needs a point"),
        (dict(points=[(1, 2, 3)]), "x,y"),
        (dict(points=[(1, float("nan"))]), "2 numbers"),
        (dict(box=(5, 5, 5, 9)), "x0 < x1"),
        (dict(box=(1, 2, 3)), "4 numbers"),
    ],
)
def test_prompts_that_are_none(prompt, said):
    with pytest.raises(InputError, match=said):
        Prompt(**prompt)


def test_prompts_at_the_border_of_the_image():
    for inside in (dict(points=[(9.99, 4.99)]), dict(points=[(0, 0)]), dict(box=(0, 0, 10, 5))):
        Prompt(**inside).expect_inside((5, 10))
    for outside in (dict(points=[(10, 1)]), dict(points=[(1, 5)]), dict(points=[(1, 1)], negatives=[(10, 1)]),
                    dict(box=(0, 0, 10, 5.1)), dict(box=(0, 0, 10.1, 5))):  # fmt: skip
        with pytest.raises(InputError, match="10 pixels wide and 5 high"):
            Prompt(**outside).expect_inside((5, 10))
    for outside in (dict(points=[(1, -1)]), dict(points=[(1, 1)], negatives=[(-1, 1)]), dict(box=(-1, 0, 5, 5))):
        with pytest.raises(InputError, match="pixels are counted from 0 on, .*-1.* lies outside of every image"):
            Prompt(**outside)


def test_the_command(weights, photo, tmp_path, linescan_here):
    small, broken, out = tmp_path / "small.png", tmp_path / "broken.png", tmp_path / "out"
    Image.new("1", (20, 20)).save(small)
    broken.write_bytes(b"no image")
    status, text, said = linescan_here(
        "prompt", photo, small, broken, "-c", weights, "--each", "--point", "120,60", "--box", "0,0,15,15", "--json",
        "-o", out, "-b", 2,
    )  # fmt: skip
    assert status == 1 and "broken.png" in said
    assert "small.png: the point 120,60 is outside of the image, which is 20 pixels wide and 20 high" in said
    first, *others = json.loads(text)
    assert len(first["answer"]) == 2 and len(first["files"]) == 3 and all("error" in other for other in others)
    masks = [np.asarray(Image.open(out / f"masks/photo/00{i}.png")) for i in range(2)]
    rows = list(csv.DictReader((out / "scores.csv").read_text().splitlines()))
    for mask, answer, row in zip(masks, first["answer"], rows, strict=True):
        assert mask.shape == (75, 200) and set(np.unique(mask)) <= {0, 255}
        assert (mask > 0).sum() == answer["area"] == int(row["area"])
    drawn = np.asarray(Image.open(out / "overlays/photo.jpg"))
    assert drawn.shape == (150, 400, 3) and abs(drawn[120 + 1, 240 + 1].astype(int) - (38, 166, 91)).max() < 40

    (out / "masks/photo/notes.png").write_bytes(b"of somebody else")
    status, text, _ = linescan_here("prompt", photo, "-c", weights, "--everything", "--grid", 1, "--iou", 1, "-o", out)
    assert status == 0 and "no objects with as high an --iou and --stability" in text
    status, _, _ = linescan_here("prompt", photo, "-c", weights, "--point", "120,60", "-o", out, "--no-overlays")
    assert status == 0 and {path.name for path in (out / "masks/photo").iterdir()} == {"000.png", "notes.png"}


@pytest.mark.parametrize(
    "args, said",
    [
        ((), "say what to cut out"),
        (("--point", "5"), "--point is x,y in pixels, as in 120,80, not '5'"),
        (("--box", "1,2,3"), "--box is x0,y0,x1,y1 in pixels, as in 120,80,300,240, not '1,2,3'"),
        (("--box", "1,2,3,4", "--box", "1,2,3,4"), "--each"),
        (("--everything", "--point", "1,1"), "by itself"),
        (("--point", "1,1", "--stability", "0"), "--stability is for --everything"),
        (("--point", "1,1", "--model", "vim_tiny_patch16_224"), "vim_tiny_patch16_224 takes no prompts"),
        (("--point", "1,1", "--model", "vit_tiny_patch16_224"), "vit_tiny_patch16_224 takes no prompts"),
    ],
)
def test_commands_that_are_refused_in_one_line(args, said, weights, photo, linescan_here):
    status, _, error = linescan_here("prompt", photo, "-c", weights, *args)
    assert status == 2 and said in error and error.count("\n") == 1
