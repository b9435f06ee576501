"""Tasks on point clouds: data in the layouts that there are, training, scores, and files in, answers out."""

import json
import shutil

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from typer.testing import CliRunner

import linescan
from linescan.engine.cards import ModelCard, read_card, restore, save_model
from linescan.engine.cloud_sets import (
    DigitClouds,
    Parts,
    cloud_classes,
    every_cloud,
    few_shot,
    open_clouds,
)
from linescan.engine.data import evaluation_batches, training_batches
from linescan.engine.metrics import read_metrics
from linescan.engine.processes import Processes
from linescan.engine.recipe import Run
from linescan.engine.scores import Totals, evaluate
from linescan.engine.training import Training
from linescan.errors import CheckpointError, InputError
from linescan.media.clouds import PointAugment, PointPreprocess
from linescan.media.points import PointCloud, read_points, write_ply
from linescan.tasks.classify import Classifier
from linescan.tasks.point_parts import PartIoU, PartSegmenter, PartsTask
from linescan.tasks.points import PointClassificationTask, PointClassifier
from linescan.tasks.recipes import PartsRecipe, PointClassificationRecipe, PointPretrainingRecipe

from ..runs import contents, finish, kill_and_resume, same

pytestmark = pytest.mark.usefixtures("one_thread")

ALONE = Processes(0, 1, torch.device("cpu"))
TINY = dict(embed_dim=24, depth=1, groups=12, group_size=8, patch_widths=[8, 16, 24])
POINTS = dict(model="pointmamba_modelnet40", model_args={**TINY, "drop_rate": 0}, points=128)
PARTS = dict(model_args=dict(backbone_args=TINY, taps=[0], widths=[32, 24, 16, 16], drop_rate=0), points=128)
MASKED = dict(model_args=dict(backbone_args=TINY), decoder_depth=1, points=128)
SHAPES = ("ball", "box", "stick")


def shape(kind: str, dice: np.random.Generator, count: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """A solid, and for each point whether it is in its upper half."""
    points = dice.normal(size=(count, 3))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    if kind == "box":
        points = np.clip(points, -0.45, 0.45)
    if kind == "stick":
        points *= (0.1, 0.1, 1)
    return points.astype(np.float32), (points[:, 2] > 0).astype(np.int64)


def write_shapes(root, each=9, kinds=SHAPES, seed=0):
    """ROOT/KIND/N.*: files of several formats; labels in all that can have them."""
    dice = np.random.default_rng(seed)
    for kind in kinds:
        (root / kind).mkdir(parents=True)
        for i in range(each):
            points, labels = shape(kind, dice)
            table, path = np.column_stack([points, labels]), root / kind / f"{i}"
            if i % 3 == 0:
                np.savez(path.with_suffix(".npz"), points=points, labels=labels)
            elif i % 3 == 1:
                text = "\n".join(" ".join(f"{v:.5f}" for v in row) for row in table)
                path.with_suffix(".txt").write_text("x y z label\n" + text)
            else:
                with open(path.with_suffix(".ply"), "wb") as file:
                    write_ply(file, PointCloud(points), labels, np.zeros((len(points), 3), np.uint8))
    return root


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return write_shapes(tmp_path_factory.mktemp("shapes") / "shapes")


def start(out, recipe, data, **options) -> tuple[Training, object]:
    options = {"epochs": 2, "batch": 6, "warmup": 0.0, **options}
    training = Training(recipe(str(data), **options), out, ALONE, Run(workers=0))
    return training, iter(training_batches(training.task.data, training.steps, 0, 0, training.last))


# -- how clouds are read ----------------------------------------------------------------------------------------------


def test_clouds_are_fitted_chosen_and_changed(monkeypatch):
    torch.manual_seed(0)
    dice = np.random.default_rng(0)
    points = (5 * dice.normal(size=(300, 3)) + 7).astype(np.float32)
    normals = F.normalize(torch.randn(300, 3), dim=1).numpy()
    colours = dice.integers(0, 256, (300, 3)).astype(np.uint8)
    cloud = PointCloud(points, normals=normals, colours=colours)
    rows = PointPreprocess(64, ("colours", "normals")).rows(cloud)
    assert rows.shape == (300, 9) and rows.dtype == torch.float32
    assert rows[:, :3].mean(0).abs().max() < 1e-6 and rows[:, :3].norm(dim=1).max() == pytest.approx(1)
    assert torch.equal(rows[:, 3:6], torch.from_numpy(colours).float() / 255)
    assert torch.equal(PointPreprocess(64, normalise=False).rows(cloud), torch.from_numpy(points))
    with pytest.raises(InputError, match="no intensity, which the model reads"):
        PointPreprocess(64, ("intensity",)).rows(cloud)

    how = PointPreprocess(64, ("normals",), up="z")
    rows = how.rows(cloud)
    chosen = how.choose(rows)
    assert torch.equal(chosen, how.choose(rows)) and len(set(chosen.tolist())) == 64
    apart = torch.cdist(rows[chosen, :3], rows[chosen, :3]) + 9 * torch.eye(64)
    drawn = how.choose(rows, random=True)
    near = torch.cdist(rows[drawn, :3], rows[drawn, :3]) + 9 * torch.eye(64)
    assert len(set(drawn.tolist())) == 64 and not torch.equal(drawn, how.choose(rows, random=True))
    assert apart.min() > 0.1 and near.min() > 0.08  # far from each other, too
    outlier = torch.cat([rows, 9 * torch.ones(1, 6)])
    assert 300 in how.choose(outlier)
    assert 21000 in how.choose(torch.cat([rows.repeat(70, 1), outlier[300:]]))  # of a large cloud to its end
    draws = [300 in how.choose(outlier, random=True) for _ in range(60)]
    assert 30 < sum(draws) < 60  # any of 1.17 times as many: the farthest, too, can be left out
    few = how.choose(rows[:10])
    assert len(few) == 64 and set(few.tolist()) == set(range(10))
    turned = PointAugment("rotate", how)(rows)
    torch.testing.assert_close(turned[:, [2, 5]], rows[:, [2, 5]])
    assert not torch.allclose(turned, rows, atol=0.05)
    for words in ("rotate", "turn"):
        turned = PointAugment(words, how)(rows)
        torch.testing.assert_close(turned[:, :3] @ turned[:, 3:].T, rows[:, :3] @ rows[:, 3:].T, atol=1e-4, rtol=0)
        bases = torch.stack([PointAugment(words, PointPreprocess(3))(torch.eye(3)) for _ in range(20)])
        torch.testing.assert_close(torch.linalg.det(bases), torch.ones(20))  # never mirrored
    other = PointAugment("scale+shift+jitter", how)(rows)
    assert torch.equal(other[:, 3:], rows[:, 3:]) and not torch.allclose(other[:, :3], rows[:, :3], atol=0.01)
    dropped = PointAugment("drop", how)(rows)
    assert len(dropped.unique(dim=0)) < 300 and (dropped[:, None] == rows).all(-1).any(1).all()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randn", lambda *shape: 9 * torch.ones(shape))  # of a deviation of 0.01
        torch.testing.assert_close(PointAugment("jitter", how)(rows)[:, :3], rows[:, :3] + 0.05)
    assert torch.equal(PointAugment("none", how)(rows), rows)
    with pytest.raises(InputError, match="unknown augmentation 'flip'"):
        PointAugment("rotate+flip", how)


def test_digits_are_clouds():
    train, held_out = open_clouds("digits")
    assert (len(train), len(held_out)) == (1438, 359) and cloud_classes("digits") == list("0123456789")
    cloud, again = held_out.cloud(3), DigitClouds(True).cloud(3)
    assert np.array_equal(cloud.points, again.points) and cloud.points.shape == (1024, 3)
    assert 0.7 < cloud.labels.mean() < 0.8
    points, labels = DigitClouds.extrude(held_out.pixels[3], 2000, np.random.default_rng(0))
    assert np.abs(points[labels == 0, 1]).max() < 0.15
    assert points[labels == 1, 1].mean() == pytest.approx(-0.2, abs=0.02)
    drawn, _, _ = np.histogram2d(-points[labels == 1, 2], points[labels == 1, 0], bins=8, range=[[-1, 1]] * 2)
    dark = held_out.pixels[3].astype(float) ** 3
    assert np.corrcoef(drawn.flatten(), dark.flatten())[0, 1] > 0.95  # upright, and as dark as written


def test_layouts_of_public_data_sets(tmp_path):
    """train/ in each class (ModelNet40), lists of names (resampled ModelNet40), numbers for names (ShapeNetPart)."""
    inside = tmp_path / "inside"
    for part in ("train", "test"):
        write_shapes(tmp_path / part, each=2 if part == "train" else 1, kinds=("a", "b"), seed=len(part))
        for kind in "ab":
            shutil.copytree(tmp_path / part / kind, inside / kind / part)
    train, held_out = open_clouds(str(inside))
    assert train.classes == ["a", "b"] and train.labels == [0, 0, 1, 1] and held_out.labels == [0, 1]
    assert all("/test/" in name for name in held_out.names)
    assert every_cloud(str(inside), ["a", "b"]).names == held_out.names
    whole = tmp_path / "whole"
    for part in ("train", "test"):
        shutil.move(tmp_path / part, whole / part)
    assert [len(c) for c in open_clouds(str(whole))] == [4, 2] == [len(train), len(held_out)]
    assert every_cloud(str(whole), ["a", "b"]).names == open_clouds(str(whole))[1].names

    lists = write_shapes(tmp_path / "lists", each=3, kinds=("a", "b"))
    (lists / "modelnet2_train.txt").write_text("0\n1\n")
    (lists / "modelnet2_test.txt").write_text("2\n")
    (lists / "modelnet1_test.txt").write_text("0")  # the smaller data set in the same folder
    train, held_out = open_clouds(str(lists))
    assert train.labels == [0, 0, 1, 1] and {name[-5:] for name in held_out.names} == {"2.ply"}

    numbers = write_shapes(tmp_path / "numbers", each=3, kinds=("02691156", "02954340"))
    (numbers / "synsetoffset2category.txt").write_text("Airplane\t02691156\nCap\t02954340\n")
    (numbers / "train_test_split").mkdir()
    for part, name in (("train", "0"), ("val", "1"), ("test", "2")):
        names = [f"shape_data/{kind}/{name}" for kind in ("02691156", "02954340")]
        (numbers / "train_test_split" / f"shuffled_{part}_file_list.json").write_text(json.dumps(names))
    train, held_out = open_clouds(str(numbers))
    assert cloud_classes(str(numbers)) == ["Airplane", "Cap"] and len(train) == 4 and len(held_out) == 2
    parts = Parts.of(str(numbers), train)
    assert len(parts.names) == 50 and parts.categories[2] == "Cap" and parts.members[2] == [6, 7]
    assert parts.number(np.array([6, 7, 6]), "Cap").tolist() == [6, 7, 6]  # as published: numbered through
    assert parts.number(np.array([0, 3]), "Airplane").tolist() == [0, 3]
    single = write_shapes(tmp_path / "single", each=1, kinds=("a", "b"))
    with pytest.raises(InputError, match="the single sample of a cannot be split"):
        open_clouds(str(single))
    lists = numbers / "train_test_split"
    (lists / "shuffled_val_file_list.json").write_text("{")
    with pytest.raises(InputError, match="shuffled_val_file_list.json: not a list of names"):
        open_clouds(str(numbers))


def test_parts_are_named_by_their_labels_or_a_list(shapes, tmp_path):
    train, _ = open_clouds(str(shapes))
    parts = Parts.of(str(shapes), train)
    assert parts.names == ["ball/0", "ball/1", "box/0", "box/1", "stick/0", "stick/1"]
    assert parts.number(np.array([1, 0, -1]), "box").tolist() == [3, 2, -1]
    with pytest.raises(InputError, match="label 9, and there are 6 parts"):
        parts.number(np.array([9]), "box")
    named = shutil.copytree(shapes, tmp_path / "named")
    (named / "parts.txt").write_text("lower\nupper\n")
    assert Parts.of(str(named), train).members == [[0, 1]]
    for path in (named / "box").iterdir():
        path.unlink()
    (named / "parts.txt").write_text("a\na\n")
    with pytest.raises(InputError, match="one twice"):
        Parts.of(str(named), train)
    with pytest.raises(InputError, match="holds no point clouds"):
        open_clouds(str(named / "box"), labelled=False)


def test_few_shots():
    train, held_out = open_clouds("digits")
    few, queries = few_shot(train, held_out, 5, 10, fold=0)
    assert (
        len(few) == 50 and len(set(few.labels)) == 5 and len(queries) == 100 and set(queries.labels) == set(few.labels)
    )
    assert np.array_equal(few.cloud(7).points, train.cloud(few.chosen[7]).points) and few.names[7].startswith("digit")
    assert few_shot(train, held_out, 5, 10, fold=0)[0].chosen == few.chosen
    assert few_shot(train, held_out, 5, 10, fold=1)[0].chosen != few.chosen
    with pytest.raises(InputError, match="11 classes are wanted"):
        few_shot(train, held_out, 11, 10, fold=0)
    with pytest.raises(InputError, match="999 clouds of . are wanted"):
        few_shot(train, held_out, 2, 999, fold=0)
    with pytest.raises(InputError, match="--few-shot must be as in 5x10"):
        PointClassificationRecipe("digits", few_shot="5")


# -- training ---------------------------------------------------------------------------------------------------------


def test_classifies_shapes_after_a_short_training(shapes, tmp_path):
    recipe = PointClassificationRecipe(
        str(shapes), **POINTS, epochs=36, batch=6, lr=4e-3, warmup=1, holdout=0.3, up="z", augment="rotate+jitter",
        ema=0.9, evaluate_every=36,
    )  # fmt: skip
    scores = Training(recipe, tmp_path / "run", ALONE, Run(workers=0)).run()
    assert scores["top1"] == 100
    path = tmp_path / "run" / "model.safetensors"
    card = read_card(path)
    assert card.classes == list(SHAPES) and card.preprocess == PointPreprocess(128, up="z")
    model, card = restore(None, path)
    for votes in (0, 3):
        judged = PointClassificationTask.judge(
            PointClassificationRecipe(str(shapes), votes=votes, batch=6), model, card
        )
        assert judged.batch == (6 if not votes else 2)
        result = evaluate(judged, model, ALONE)
        assert result.scores["top1"] > 90 and result.samples == 27
        assert evaluate(judged, model, ALONE).scores == result.scores  # votes are always the same
    judged.report(result.totals, tmp_path / "report", "shapes")
    assert "ball" in (tmp_path / "report" / "report.html").read_text()
    classify = PointClassifier(checkpoint=path)
    answer = classify(str(shapes / "box" / "2.ply"))
    assert answer[0].label == "box" and answer.view.up == "z"
    assert classify(read_points(shapes / "box" / "2.ply").points)[0].label == "box"

    # another run starts from it: the same clouds, other classes
    tuned, _ = start(tmp_path / "tuned", PointClassificationRecipe, "digits", checkpoint=str(path))
    assert tuned.task.preprocess == card.preprocess and tuned.task.model.num_classes == 10
    theirs = model.state_dict()
    assert all(torch.equal(v, theirs[k]) for k, v in tuned.bare.state_dict().items() if not k.startswith("head."))


def test_votes_do_not_depend_on_other_files(shapes, named):
    classify = PointClassifier(checkpoint=named, votes=2, batch=3, augment="rotate")
    paths = [shapes / "box" / name for name in ("0.npz", "1.txt", "2.ply")]
    together = {str(path): [g.probability for g in answer] for path, answer in zip(paths, classify(paths))}
    for path in paths:
        assert [g.probability for g in classify(path)] == pytest.approx(together[str(path)], abs=1e-6)
    model, rows = classify.module, classify.open(paths[0]).rows
    with torch.no_grad():
        first = model(classify.drawn(rows, 0)[None])
        classify.module = lambda x: 1000 * (model(x) - first)  # votes that differ
        logits = torch.stack([classify.module(classify.drawn(rows, vote)[None])[0] for vote in range(2)])
    expected = logits.mean(0).softmax(-1)
    torch.testing.assert_close(classify(paths[0]).probabilities, expected, atol=1e-3, rtol=0)
    assert (logits.softmax(-1).mean(0) - expected).abs().max() > 0.01


def test_votes_are_the_mean_of_logits(shapes):
    training, _ = start("unused", PointClassificationRecipe, shapes, **POINTS, votes=3, augment="rotate")
    model = training.bare.eval()
    batch = next(iter(evaluation_batches(training.task.evaluator.data, 2))).content
    assert batch["input"].shape == (2, 3, 128, 3) and not torch.equal(batch["input"][:, 0], batch["input"][:, 1])
    with torch.no_grad():
        expected = torch.stack([model(one) for one in batch["input"].unbind(1)]).mean(0)
        torch.testing.assert_close(
            training.task.evaluator.answer(model, batch["input"]), expected, atol=1e-5, rtol=1e-4
        )


@pytest.mark.parametrize("name", ["pointmamba_modelnet40", "mamba3d_modelnet40", "pointmamba_old_modelnet40"])
def test_steps_move_every_parameter(tmp_path, shapes, name):
    """Once as they are, once in bfloat16 with stochastic depth, decay by layer and recomputation."""
    plain = dict(POINTS, model=name)
    for i, options in enumerate(
        ({}, dict(bf16=True, drop_path=0.1, layer_decay=0.8, grad_checkpointing=True, smoothing=0.1))
    ):
        training, batches = start(tmp_path / str(i), PointClassificationRecipe, shapes, **plain, lr=1e-2, **options)
        assert training.task.augment == "scale+shift"  # as for models of objects
        before = {k: v.clone() for k, v in training.bare.named_parameters()}
        training.take_step(batches)
        training.take_step(batches)
        still = [k for k, v in training.bare.named_parameters() if torch.equal(v, before[k])]
        assert not still and training.losses.isfinite().all()


def test_segments_shapes_after_a_short_training(shapes, tmp_path):
    recipe = PartsRecipe(
        str(shapes), **PARTS, epochs=15, batch=5, lr=1e-2, warmup=1, holdout=0.3, up="z", augment="rotate",
        evaluate_every=24,
    )  # fmt: skip
    training = Training(recipe, tmp_path / "run", ALONE, Run(workers=0))
    assert training.task.describe() == "6 parts of 3 categories, 18 clouds to train on, 9 held out"
    scores = training.run()
    assert scores["instance_miou"] > 80 and scores["accuracy"] > 90
    path = tmp_path / "run" / "best.safetensors"
    model, card = restore(None, path)
    assert card.classes[2:4] == ["box/0", "box/1"]
    judged = PartsTask.judge(PartsRecipe(str(shapes)), model, card)
    assert evaluate(judged, model, ALONE).scores["instance_miou"] > 80
    answer = PartSegmenter(checkpoint=path)(str(shapes / "box" / "2.ply"))
    assert len(answer.labels) == 200 and set(answer.labels.tolist()) <= {2, 3}
    true = read_points(shapes / "box" / "2.ply").labels + 2
    assert (answer.labels == true).mean() > 0.85
    told = PartSegmenter(checkpoint=path, category="stick")
    assert set(told(read_points(shapes / "box" / "2.ply").points).labels.tolist()) <= {4, 5}
    with pytest.raises(InputError, match="what kind of object is it"):
        PartSegmenter(checkpoint=path)(np.zeros((9, 3)))
    with pytest.raises(InputError, match="no category 'lamp'; there are: ball, box, stick"):
        PartSegmenter(checkpoint=path, category="lamp")


def test_part_scores_are_the_formula():
    parts = Parts(["a/0", "a/1", "b/0", "b/1", "b/2"])

    class Model(torch.nn.Module):
        def forward(self, x, category):
            return x

    score = torch.zeros(3, 4, 5)
    score[0, [0, 1, 2, 3], [0, 0, 1, 1]] = 1
    score[1, [0, 1, 2, 3], [4, 2, 2, 2]] = 1
    score[2, :, 3] = 1  # of another category: not considered
    truth = torch.tensor([[0, 1, 1, -1], [2, 2, 2, 2], [0, 0, 0, 0]])

    class Items(list):
        pass

    items = Items({"input": s, "points": t, "label": c} for s, t, c in zip(score, truth, (0, 1, 0)))
    result = evaluate(PartIoU(items, parts, 2), Model(), ALONE).scores
    first, second, third = (1 / 2 + 1 / 2) / 2, (3 / 4 + 1 + 0) / 3, (1 + 1) / 2
    assert result["instance_miou"] == pytest.approx(100 * (first + second + third) / 3)
    assert result["class_miou"] == pytest.approx(100 * ((first + third) / 2 + second) / 2)
    assert result["accuracy"] == pytest.approx(100 * (2 + 3 + 4) / 11)
    flat = F.cross_entropy(score.flatten(0, 1), truth.flatten(), ignore_index=-1)
    assert result["loss"] == pytest.approx(flat.item())
    batch = next(iter(evaluation_batches(items, 3))).content
    with torch.device("meta"):  # as on a GPU: what is made for the scores is made where the model is
        PartIoU(items, parts).measure(Model(), batch, Totals())


def test_digits_have_parts_without_categories(tmp_path):
    training, batches = start(tmp_path, PartsRecipe, "digits", **PARTS)
    assert training.task.parts.names == ["board", "stroke"] and training.bare.category is None
    assert training.task.preprocess.up == "z" and training.task.augment == "scale+jitter"
    training.take_step(batches)
    assert training.losses.isfinite().all()


def test_pre_trains_and_fine_tunes(tmp_path, shapes):
    recipe = PointPretrainingRecipe(
        str(shapes), **MASKED, epochs=12, batch=6, lr=5e-3, warmup=1, evaluate_every=6, up="z"
    )
    training = Training(recipe, tmp_path / "masked", ALONE, Run(workers=0))
    assert training.task.augment == "rotate"
    first = training.evaluate()["loss"]
    assert training.evaluate()["loss"] == first  # noise, curve and all
    last = training.run()["loss"]
    assert last < 0.5 * first
    torch.save({"model": training.bare.state_dict()}, tmp_path / "whole.pth")  # as published: with the decoder
    more, _ = start(tmp_path / "more", PointPretrainingRecipe, shapes, **MASKED, checkpoint=str(tmp_path / "whole.pth"))
    assert same(more.bare.state_dict(), training.bare.state_dict())
    path = tmp_path / "masked" / "model.safetensors"
    card = read_card(path)
    assert card.model == "pointmamba_modelnet40" and card.args["num_classes"] == 0 and card.preprocess.points == 128
    model, _ = restore(None, path)
    theirs = model.state_dict()
    assert not any(key.startswith("head") for key in theirs)
    for recipe_of, prefix, options in (
        (PointClassificationRecipe, "", {}),
        (PartsRecipe, "trunk.", dict(model_args=dict(taps=[0], widths=[8, 8, 8, 8]))),
    ):
        tuned, batches = start(tmp_path / recipe_of.task, recipe_of, shapes, checkpoint=str(path), **options)
        own = tuned.bare.state_dict()
        assert all(torch.equal(own[prefix + key], value) for key, value in theirs.items())
        assert tuned.task.preprocess == card.preprocess
        tuned.take_step(batches)


def test_what_does_not_fit_is_one_line(tmp_path, shapes):
    for recipe, options, said in (
        (PointClassificationRecipe, dict(model="vim_tiny_patch16_224"), "vim_tiny_patch16_224 reads no point clouds"),
        (PointClassificationRecipe, dict(model="pointmamba_mae"), "is no classifier|cannot build"),
        (PointClassificationRecipe, dict(POINTS, batch=1), "--batch must be at least 2"),
        (PointClassificationRecipe, dict(POINTS, features="weight"), "features of points are"),
        (PointClassificationRecipe, dict(POINTS, augment="spin"), "unknown augmentation 'spin'"),
        (PartsRecipe, dict(model="mamba3d_modelnet40"), "mamba3d_modelnet40 segments no points"),
        (PointPretrainingRecipe, dict(MASKED, mask_ratio=0.01), "hides 0 of 12 patches"),
        (PointPretrainingRecipe, dict(model="pointmamba_modelnet40"), "cannot build|is not pre-trained"),
    ):
        with pytest.raises(InputError, match=said):
            start(tmp_path, recipe, shapes, **options)
    with pytest.raises(InputError, match="none of the .* held-out samples can be read.*has no normals"):
        start(tmp_path, PointClassificationRecipe, shapes, **POINTS, features="normals")
    with pytest.raises(InputError, match="has 10 classes, the model 3"):
        every_cloud("digits", SHAPES)
    path = tmp_path / "m.safetensors"
    card = ModelCard("pointmamba_modelnet40", {**TINY, "num_classes": 3}, list(SHAPES), PointPreprocess(64))
    model = linescan.create_model(card.model, **card.args)
    save_model(path, model, card)
    with pytest.raises(
        InputError,
        match="is of pointmamba_modelnet40, which classifies no .* for `linescan points classify`",
    ):
        Classifier(checkpoint=path)
    with pytest.raises(InputError, match="which segments no points"):
        PartSegmenter(checkpoint=path)
    with pytest.raises(InputError, match="which names no point clouds.*is for `linescan classify`"):
        PointClassifier(checkpoint=image_model(tmp_path))
    with pytest.raises(InputError, match="unknown column 'smell'"):  # once, not of each file
        PointClassifier(checkpoint=path, columns="x y z smell")
    for bad in ({"points": 0}, {"up": "x"}, {"features": ["smell"]}, {"normalise": 1}, {"points": 10**9}, {"more": 1}):
        values = card.as_dict()
        values["preprocess"] = {**values["preprocess"], **bad}
        with pytest.raises(ValueError, match="preprocess"):
            ModelCard.from_dict(values)
    save_model(path, model, ModelCard(card.model, {**card.args, "groups": 0}, card.classes, card.preprocess))
    with pytest.raises(CheckpointError, match="groups is at least 1, not 0"):
        restore(None, path)


def image_model(folder):
    from linescan.media.preprocess import Preprocess

    args = dict(img_size=32, patch_size=16, depth=1, embed_dim=16, num_classes=2)
    card = ModelCard("vim_tiny_patch16_224", args, ["a", "b"], Preprocess((3, 32, 32), (0.5,) * 3, (0.5,) * 3))
    save_model(folder / "image.safetensors", linescan.create_model(card.model, **args), card)
    return folder / "image.safetensors"


# -- the command line -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def named(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "named.safetensors"
    torch.manual_seed(0)
    card = ModelCard("pointmamba_modelnet40", {**TINY, "num_classes": 3}, list(SHAPES), PointPreprocess(64, up="z"))
    save_model(path, linescan.create_model(card.model, **card.args), card)
    return path


@pytest.fixture(scope="module")
def segmented(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "segmented.safetensors"
    torch.manual_seed(0)
    names = [f"{kind}/{part}" for kind in SHAPES for part in ("lower", "upper")]
    args = dict(num_classes=6, num_categories=3, **PARTS["model_args"])
    card = ModelCard("pointmamba_old_shapenetpart", args, names, PointPreprocess(64, up="z"))
    save_model(path, linescan.create_model(card.model, **args), card)
    return path


@pytest.fixture
def scans(shapes, tmp_path):
    """Good files, and broken ones of every kind."""
    folder = shutil.copytree(shapes / "box", tmp_path / "box")
    for path in folder.glob("[678].*"):
        path.unlink()
    (folder / "a_empty.ply").write_bytes(b"")
    (folder / "b_cut.ply").write_bytes((folder / "2.ply").read_bytes()[:-900])
    np.save(folder / "c_nan.npy", np.full((50, 3), np.nan))
    table = np.random.default_rng(0).normal(size=(100, 3))
    table[:40] = np.inf
    np.save(folder / "d_half.npy", table)
    (folder / "e_words.txt").write_text("these are no numbers\n")
    np.save(folder / "f_one.npy", np.ones((1, 3)))
    return folder


def linescan_cli(*args, status=0):
    from linescan.cli import app

    result = CliRunner().invoke(app, list(map(str, args)))
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == status, result.output
    return result


def test_files_in_names_out(scans, named, tmp_path):
    out = tmp_path / "out"
    common = ("points", "classify", scans, "--checkpoint", named, "--json", "--topk", 2, "--batch", 4)
    result = linescan_cli(*common, "--out", out, "--no-overlays", status=1)
    answers = {a["source"].rpartition("/")[2]: a for a in json.loads(result.stdout)}
    assert len(answers) == 12
    good = {"0.npz", "1.txt", "2.ply", "3.npz", "4.txt", "5.ply", "d_half.npy", "f_one.npy"}
    assert {name for name, a in answers.items() if "answer" in a} == good
    for name in answers.keys() - good:
        assert name in answers[name]["error"]
    half = answers["d_half.npy"]["answer"]
    assert half["points"] == 60 and half["of"] == 100 and "40 points without finite" in half["notes"][0]
    assert len(half["classes"]) == 2 and half["classes"][0]["label"] in SHAPES
    assert {p.name for p in (out / "pages").iterdir()} == {p.replace(".", " ").split()[0] + ".html" for p in good}
    assert not (out / "overlays").exists()
    assert "box" in (out / "pages" / "2.html").read_text()
    # alone and in a batch a cloud has the same answer; a subset of a huge file is said
    alone = json.loads(linescan_cli(*common[:2], scans / "2.ply", *common[3:], "--out", out).stdout)[0]
    assert [path.rpartition("/")[2] for path in alone["files"]] == ["2.html", "2.jpg"]
    alone = alone["answer"]
    whole = answers["2.ply"]["answer"]["classes"]
    assert [c["label"] for c in alone["classes"]] == [c["label"] for c in whole]
    assert alone["classes"][0]["probability"] == pytest.approx(whole[0]["probability"], abs=1e-5)
    few = json.loads(linescan_cli(*common[:2], scans / "2.ply", *common[3:], "--limit", 90, "--votes", 2).stdout)
    assert few[0]["answer"]["points"] == 90 and "90 of 200 points, drawn at random" in few[0]["answer"]["notes"][0]


def test_mates_do_not_matter_even_where_published(scans, tmp_path):
    args = {**TINY, "num_classes": 3}
    card = ModelCard("mamba3d_modelnet40", args, list(SHAPES), PointPreprocess(64, up="z"))
    save_model(tmp_path / "m.safetensors", linescan.create_model(card.model, **args), card)
    paths = [str(scans / name) for name in ("0.npz", "2.ply", "4.txt")]
    together = PointClassifier(checkpoint=tmp_path / "m.safetensors")(paths)
    alone = [PointClassifier(checkpoint=tmp_path / "m.safetensors", batch=1)(path) for path in paths]
    for a, b in zip(together, alone):
        torch.testing.assert_close(a.probabilities, b.probabilities)


def test_files_in_parts_out(scans, segmented, tmp_path):
    out = tmp_path / "out"
    common = ("--checkpoint", segmented, "-o", out)
    result = linescan_cli("points", "segment", scans, *common, "--json", "--no-overlays", status=1)
    answers = {a["source"].rpartition("/")[2]: a for a in json.loads(result.stdout)}
    assert sum("answer" in a for a in answers.values()) == 8
    assert set(answers["2.ply"]["answer"]["parts"]) <= {"box/lower", "box/upper"}  # by the folder's name
    written = read_points(out / "labels" / "2.ply")
    before = read_points(scans / "2.ply")
    assert np.array_equal(written.points, before.points) and set(written.labels.tolist()) <= {2, 3}
    assert (out / "parts.txt").read_text().splitlines()[2] == "box/lower"
    assert "box/" in (out / "pages" / "2.html").read_text()
    told = linescan_cli(
        "points", "segment", scans / "2.ply", "--checkpoint", segmented, "-o", out, "--category", "ball"
    )
    assert "ball/" in told.stdout
    with pytest.raises(InputError, match="what kind of object is it"):  # of all files together
        linescan_cli("points", "segment", named_otherwise := shutil.copytree(scans, tmp_path / "what"), *common)
    PartSegmenter(checkpoint=segmented).expect([scans / "2.ply", named_otherwise / "2.ply"])
    far = PointCloud(np.zeros((2, 3), np.float32), origin=np.array([5e6, 0, 0]))
    with open(tmp_path / "far.ply", "wb") as file:
        write_ply(file, far, np.zeros(2, int), np.zeros((2, 3)))
    assert read_points(tmp_path / "far.ply").origin[0] == 5e6


def test_other_points_get_what_their_three_nearest_say(scans, segmented):
    segment = PartSegmenter(checkpoint=segmented, category="box")
    rows, model = segment.open(scans / "2.ply").rows, segment.module
    read = rows[segment.card.preprocess.choose(rows)]

    def module(x, told):
        scores = model(x, told)
        return 1000 * (scores - scores.mean(1, keepdim=True))  # as different as a trained model's

    with torch.no_grad():
        likely = module(read[None], torch.tensor([1]))[0, :, 2:4].softmax(-1)
    away, near = torch.cdist(rows.double(), read.double()).topk(3, largest=False)
    weight = 1 / (away.square() + 1e-8)
    expected = (likely[near] * (weight / weight.sum(1, keepdim=True))[..., None]).sum(1).argmax(-1) + 2
    segment.module = module
    found = torch.from_numpy(segment(scans / "2.ply").labels)
    assert (found == expected).float().mean() > 0.99
    assert (found != likely[near[:, 0]].argmax(-1) + 2).float().mean() > 0.02  # not what the nearest one says


def test_published_models_know_their_classes():
    from linescan.engine.cards import class_names, points_of
    from linescan.zoo import find

    with torch.device("meta"):
        for name, count, some in (
            ("pointmamba_modelnet40", 40, "airplane"), ("mamba3d_scanobjectnn", 15, "bag"),
            ("pointmamba_old_shapenetpart", 50, "Airplane/0"),
        ):  # fmt: skip
            names = class_names(linescan.create_model(name), name)
            assert len(names) == count and names[0] == some
    assert points_of(find("mamba3d_scanobjectnn")) == PointPreprocess(2048, normalise=False)
    assert points_of(find("mamba3d_modelnet40_8k")).points == 8192


def test_models_of_clouds_are_shown():
    said = linescan_cli("info", "pointmamba_modelnet40").stdout
    assert "point-classification" in said and "at 1024 x 3" in said
    assert "mamba3d_scanobjectnn" in linescan_cli("list", "--task", "point-classification").stdout
    assert "--few-shot" in linescan_cli("train", "--task", "points", "--help").stdout


@pytest.mark.slow
@pytest.mark.parametrize("task", ["points", "point-parts", "point-pretrain"])
def test_killed_and_resumed(tmp_path, shapes, task):
    model = {"points": POINTS, "point-parts": PARTS, "point-pretrain": MASKED}[task]
    names = [f"--model-arg={k}={json.dumps(v)}" for k, v in model["model_args"].items()]
    args = (
        "train", "--task", task, "-d", shapes, "-e", 4, "-b", 4, "--points", 128, "--warmup", 1, "--ema", 0.9,
        "--drop-path", 0.2, "--save-every", 1, "--log-every", 1, "--device", "cpu", "--workers", 1, *names,
    )  # fmt: skip
    args += ("-m", model["model"]) if "model" in model else ()
    args += ("--decoder-depth", 1) if task == "point-pretrain" else ()
    finish(tmp_path, args, "whole")
    kill_and_resume(tmp_path, args, "killed", times=1, rows=8)
    assert same(contents(tmp_path / "killed"), contents(tmp_path / "whole"))
    assert len(read_metrics(tmp_path / "whole" / "metrics.csv")) > 8
