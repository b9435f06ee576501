"""Boxes in scans: the layouts of KITTI and nuScenes, their metrics, training, scores, and files in, boxes out."""

import json
import math
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from linescan.cli import app
from linescan.engine.box_scores import BoxScores, Found, Objects, average_precision, kitti_precision, nuscenes_scores
from linescan.engine.cards import read_card, restore
from linescan.engine.metrics import read_metrics
from linescan.engine.processes import Processes
from linescan.engine.scene_objects import Labelled, ObjectBank
from linescan.engine.scene_sets import (
    ATTRIBUTES,
    DigitStreet,
    KittiScenes,
    NuScenes,
    SceneAugment,
    SceneSamples,
    in_image,
    kitti_level,
    open_scenes,
    turned,
)
from linescan.engine.scores import Totals, evaluate
from linescan.errors import InputError
from linescan.layers.boxes import Boxes, iou_3d, overlap_bev, points_in_boxes
from linescan.media.clouds import ScanPreprocess
from linescan.media.points import PointCloud
from linescan.tasks.clouds import OpenedCloud
from linescan.tasks.point_detect import BoxDetector, FoundBoxes, ScanDetectionTask
from linescan.tasks.recipes import ScanDetectionRecipe

from ..runs import contents, finish, kill_and_resume, same, train_as_two

pytestmark = pytest.mark.usefixtures("one_thread")

CALIBRATION = """P2: 700 0 600 45 0 700 180 0.2 0 0 1 0.003
R0_rect: 1 0 0 0 1 0 0 0 1
Tr_velo_to_cam: 0 -1 0 0 0 0 -1 -0.1 1 0 0 -0.3
"""
TINY = {
    "low": [0, -12.8, -1], "high": [25.6, 12.8, 3], "cells": [64, 64, 4],
    "backbone": {"dim": 16, "groups": [128], "windows": [[4, 5, 5]], "scales": [[2, 2, 2]], "drop_path_rate": 0.0},
    "neck": {"depths": [1], "strides": [1], "widths": [32], "scales": [1], "out_widths": [32]},
}  # fmt: skip


def cars(seed, count=3):
    """Points on a ground and in boxes, (N, 4); boxes (count, 7)."""
    dice = np.random.default_rng(seed)
    boxes, parts = [], [np.column_stack([dice.uniform(0, 25, 500), dice.uniform(-12, 12, 500), np.zeros(500)])]
    for i in range(count):
        box = np.array([6 + 6 * i, (i + 1) * dice.uniform(-3, 3), 0.8, 3.9, 1.6, 1.56, dice.uniform(-3, 3)])
        local = (dice.random((150, 3)) - 0.5) * box[3:6]
        cos, sin = math.cos(box[6]), math.sin(box[6])
        x, y = local[:, 0] * cos - local[:, 1] * sin, local[:, 0] * sin + local[:, 1] * cos
        parts.append(np.column_stack([x, y, local[:, 2]]) + box[:3])
        boxes.append(box)
    points = np.concatenate(parts)
    return np.column_stack([points, dice.random(len(points))]).astype(np.float32), np.array(boxes)


@pytest.fixture(scope="module")
def kitti(tmp_path_factory):
    """KITTI's folder with eight scans of cars, whose labels also have a van and what nobody is to care about."""
    root = tmp_path_factory.mktemp("data") / "kitti"
    for name in ("velodyne", "label_2", "calib"):
        (root / "training" / name).mkdir(parents=True)
    for i in range(8):
        points, boxes = cars(i)
        points.tofile(root / "training" / "velodyne" / f"{i:06}.bin")
        (root / "training" / "calib" / f"{i:06}.txt").write_text(CALIBRATION)
        lines = ["DontCare -1 -1 -10 0 0 10 10 -1 -1 -1 -1000 -1000 -1000 -10"]
        for k, (x, y, z, length, width, height, angle) in enumerate(boxes):
            # From the scanner's axes to the camera's, by CALIBRATION; KITTI's place is the middle of the bottom.
            place = (-y, -(z - height / 2) - 0.1, x - 0.3)
            turn = -angle - math.pi / 2
            kind = "Van" if k == 2 else "Car"
            numbers = (0.0, 0, 0.0, 500, 150, 600, 200, height, width, length, *place, turn)
            lines.append(" ".join([kind, *map(str, numbers)]))
        (root / "training" / "label_2" / f"{i:06}.txt").write_text("\n".join(lines) + "\n\n")
    (root / "ImageSets").mkdir()
    (root / "ImageSets" / "train.txt").write_text("".join(f"{i:06}\n" for i in range(6)))
    (root / "ImageSets" / "val.txt").write_text("000006\n000007\n")
    return root


def quaternion(angle):
    return [math.cos(angle / 2), 0.0, 0.0, math.sin(angle / 2)]


@pytest.fixture(scope="module")
def nuscenes(tmp_path_factory):
    """nuScenes' folder: two scenes of two key frames with a scan between them; the car drives and turns."""
    root = tmp_path_factory.mktemp("data") / "nuscenes"
    tables: dict[str, list] = {name: [] for name in (
        "ego_pose", "calibrated_sensor", "category", "instance", "sample", "sample_data", "scene", "sample_annotation",
        "attribute",
    )}  # fmt: skip
    (root / "samples" / "LIDAR_TOP").mkdir(parents=True)
    (root / "sweeps" / "LIDAR_TOP").mkdir(parents=True)
    (root / "v1.0-mini").mkdir()
    sensor = {"token": "s", "translation": [0.9, 0.0, 1.8], "rotation": quaternion(-math.pi / 2)}
    tables["calibrated_sensor"].append(sensor)
    tables["category"].append({"token": "c0", "name": "vehicle.car"})
    tables["category"].append({"token": "c1", "name": "static_object.bicycle_rack"})
    tables["attribute"] += [{"token": "t0", "name": "vehicle.moving"}, {"token": "t1", "name": "vehicle.parked"}]
    for scene in range(2):
        tables["scene"].append({"token": f"scene{scene}", "name": f"scene-{scene:04}"})
        points, boxes = cars(20 + scene)
        for k in range(len(boxes)):
            kind = "c1" if k == 2 else "c0"
            tables["instance"].append({"token": f"i{scene}{k}", "category_token": kind})
        for step in range(3):
            key, token = step != 1, f"d{scene}{step}"
            ego = {
                "token": f"e{scene}{step}",
                "translation": [100.0 + step, 50.0, 0.0],
                "rotation": quaternion(0.1 * step),
            }
            tables["ego_pose"].append(ego)
            folder = "samples" if key else "sweeps"
            name = f"{folder}/LIDAR_TOP/{token}.pcd.bin"
            # The world stands still but for the first car, which drives 5 m/s along x; 0.25 s between scans.
            world = points[:, :3].copy()
            moved = points_in_boxes(torch.from_numpy(world), torch.from_numpy(boxes[:1]).float())[0].numpy()
            world[moved, 0] += 1.25 * step
            world += (100, 50, 0)
            scan = (world - ego["translation"]) @ turned(ego["rotation"])
            scan = (scan - sensor["translation"]) @ turned(sensor["rotation"])
            np.column_stack([scan, 255 * points[:, 3:], np.zeros(len(scan))]).astype(np.float32).tofile(root / name)
            stamp = 10**6 * (1 + scene) * 100 + 250_000 * step
            tables["sample_data"].append({
                "token": token, "filename": name, "is_key_frame": key, "sample_token": f"k{scene}{step // 2}",
                "ego_pose_token": ego["token"], "calibrated_sensor_token": "s", "timestamp": stamp,
                "prev": f"d{scene}{step - 1}" if step else "",
            })  # fmt: skip
            if not key:
                continue
            sample = f"k{scene}{step // 2}"
            tables["sample"].append({"token": sample, "scene_token": f"scene{scene}", "timestamp": stamp})
            for k, (x, y, z, length, width, height, angle) in enumerate(boxes):
                x = x + 1.25 * step if k == 0 else x
                tables["sample_annotation"].append({
                    "token": f"a{scene}{step}{k}", "sample_token": sample, "instance_token": f"i{scene}{k}",
                    "translation": [x + 100, y + 50, z], "size": [width, length, height], "rotation": quaternion(angle),
                    "prev": f"a{scene}0{k}" if step and k < 2 else "",
                    "next": "" if step or k == 2 else f"a{scene}2{k}",
                    "num_lidar_pts": 0 if k == 1 else 9, "num_radar_pts": 0,
                    "attribute_tokens": [f"t{k}"] if k < 2 else [],
                })  # fmt: skip
    for name, rows in tables.items():
        (root / "v1.0-mini" / f"{name}.json").write_text(json.dumps(rows))
    return root


# -- layouts -----------------------------------------------------------------------------------------------------------


def test_kitti_is_read(kitti):
    train, held_out = open_scenes(str(kitti))
    assert (len(train), len(held_out)) == (6, 2) and train.classes == ("Car", "Pedestrian", "Cyclist")
    scene = train.scene(2)
    points, boxes = cars(2)
    np.testing.assert_allclose(scene.boxes[:, :6], boxes[:, :6], atol=1e-4)
    np.testing.assert_allclose(np.cos(scene.boxes[:, 6] - boxes[:, 6]), 1, atol=1e-6)
    assert scene.labels.tolist() == [0, 0, -2] and scene.levels.tolist() == [0, 0, 0]
    assert 0 < len(scene.cloud) < len(points)  # what the camera does not see is left out
    inside = points_in_boxes(torch.from_numpy(scene.cloud.points), torch.from_numpy(scene.boxes))
    assert (inside.sum(1) > 100).all()
    easy = [(45, 0, 0), (40, 0, 0.15)]
    moderate = [(30, 1, 0.2), (39, 0, 0), (45, 1, 0), (45, 0, 0.16), (25, 1, 0.3)]
    hard = [(30, 2, 0.4), (45, 2, 0), (45, 0, 0.31), (25, 2, 0.5)]
    never = [(20, 0, 0), (24.9, 0, 0), (45, 3, 0), (45, 0, 0.6)]
    for level, boxes in enumerate((easy, moderate, hard, never)):
        assert {kitti_level(*box) for box in boxes} == {level}


def test_nuscenes_is_read(nuscenes):
    train, held_out = open_scenes(str(nuscenes), fraction=0.5, sweeps=2)
    assert (len(train), len(held_out)) == (2, 2)
    scene = train.scene(1)
    assert scene.labels.tolist() == [0, 0, -1] and scene.levels.tolist() == [0, 3, 0]
    assert set(np.round(scene.age, 3)) == {0.0, 0.25}
    rows, boxes = torch.from_numpy(scene.cloud.points), torch.from_numpy(scene.boxes)
    now = points_in_boxes(rows[scene.age == 0], boxes)
    assert (now.sum(1) >= 140).all()  # boxes stand where the points are
    older = points_in_boxes(rows[scene.age > 0], boxes)
    assert (older.sum(1)[1:] >= 140).all() and older.sum(1)[0] < 140  # what stands, and what has moved
    speed = np.hypot(*scene.boxes[:, 7:].T)
    np.testing.assert_allclose(speed, [5, 0, np.nan], atol=1e-4)  # the last one is seen once
    assert scene.attributes.tolist() == [5, 6, -1] and scene.ego == pytest.approx([0, -0.9])
    np.testing.assert_allclose(scene.racks[0, 3:6], [3.9, 1.6, 1.56], rtol=1e-5)
    item = SceneSamples(train, ScanPreprocess(("intensity", "time")))[1]
    assert item["points"].shape[1] == 5 and item["points"][:, 4].max() == pytest.approx(0.25)
    trained = SceneSamples(train, ScanPreprocess(("intensity", "time")), "none")[1]
    assert len(trained["boxes"]) == 1 and trained["boxes"].isfinite().all()  # not that without a point


def test_wrong_folders_have_one_line(tmp_path, kitti):
    with pytest.raises(InputError, match="KITTI has training/velodyne"):
        open_scenes(str(tmp_path))
    (tmp_path / "v1.0-mini").mkdir()
    with pytest.raises(InputError, match="scene.json: not a table of nuScenes"):
        open_scenes(str(tmp_path))
    folder = tmp_path / "training"
    (folder / "velodyne").mkdir(parents=True)
    (folder / "velodyne" / "000001.bin").write_bytes(b"")
    with pytest.raises(InputError, match="frames to train on and"):
        open_scenes(str(tmp_path))
    with pytest.raises(InputError, match="unknown augmentation 'spin' of scenes"):
        SceneAugment("spin")


def test_only_what_the_image_shows_is_read(tmp_path, kitti):
    folder = Path(shutil.copytree(kitti / "training", tmp_path / "training"))
    scenes = KittiScenes(folder, ["000001"])
    whole = scenes.scene(0)
    (folder / "image_2").mkdir()
    Image.new("L", (640, 200)).save(folder / "image_2" / "000001.png")
    part = scenes.scene(0)
    seen = in_image(whole.cloud.points, whole.camera, (640, 200))
    assert 0 < len(part.cloud) < len(whole.cloud) and np.array_equal(part.cloud.points, whole.cloud.points[seen])
    assert np.array_equal(part.cloud.intensity, whole.cloud.intensity[seen])


def test_boxes_in_a_map_stand_where_the_map_says():
    cloud = PointCloud(np.zeros((1, 3), np.float32), origin=np.array([5e5, -2e5, 100.0]))
    found = Boxes(torch.tensor([[1.0, 2, 3, 4, 5, 6, 0.5, 7, 8]]), torch.ones(1), torch.zeros(1, dtype=torch.long))
    answer = FoundBoxes(found, ["car"], OpenedCloud(cloud, torch.zeros(1, 4)))
    (row,) = answer.as_json()
    assert row["centre"] == [500001, -199998, 103] and row["size"] == [4, 5, 6] and row["velocity"] == [7, 8]
    assert answer.view.boxes.tolist() == [[1, 2, 3, 4, 5, 6, 0.5]]  # as its points are


def test_damaged_tables_have_one_line(tmp_path, kitti, nuscenes):
    root = Path(shutil.copytree(nuscenes, tmp_path / "nuscenes"))
    path = root / "v1.0-mini" / "sample_data.json"
    rows = json.loads(path.read_text())
    for key in ("filename", "ego_pose_token"):
        path.write_text(json.dumps([{name: value for name, value in row.items() if name != key} for row in rows]))
        with pytest.raises(InputError, match=rf"v1.0-mini: not the tables of nuScenes \(no '{key}'\)"):
            open_scenes(str(root))[0].scene(0)
    path.write_text(json.dumps(rows))
    (root / "train.txt").write_text("scene-0000")
    (root / "val.txt").write_text("scene-0009")
    with pytest.raises(InputError, match="v1.0-mini: no key frame of the scenes scene-0009"):
        open_scenes(str(root))
    folder = Path(shutil.copytree(kitti / "training", tmp_path / "training"))
    scenes = KittiScenes(folder, ["000001"])
    label = folder / "label_2" / "000001.txt"
    label.write_bytes(b"\xff" + label.read_bytes().replace(b"500", b"nan"))
    with pytest.raises(InputError, match="label_2/000001.txt, line 2: not 15 fields"):
        scenes.scene(0)
    (folder / "calib" / "000001.txt").write_text(CALIBRATION.replace("R0_rect: 1", "R0_rect: 0"))
    with pytest.raises(InputError, match=r"calib/000001.txt: not a calibration of KITTI \(Singular"):
        scenes.scene(0)


def test_augmented_boxes_stay_around_their_points():
    samples = SceneSamples(DigitStreet(False, 3), ScanPreprocess())
    plain = samples[0]
    before = points_in_boxes(plain["points"], plain["boxes"]).sum(1)
    moving = torch.cat([plain["boxes"], torch.stack([plain["boxes"][:, 6].cos(), plain["boxes"][:, 6].sin()], 1)], 1)
    augment = SceneAugment("flip+rotate+scale+shift")
    for seed in range(4):
        torch.manual_seed(seed)
        rows, boxes = augment(plain["points"], moving)
        after = points_in_boxes(rows, boxes).sum(1)
        assert ((after - before).abs() <= 2).all() and not torch.equal(rows, plain["points"])
        speed = boxes[:, 7:].norm(dim=1, keepdim=True)  # velocities point where boxes point
        torch.testing.assert_close(boxes[:, 7:] / speed, torch.stack([boxes[:, 6].cos(), boxes[:, 6].sin()], 1))
        torch.testing.assert_close(speed[:, 0], boxes[:, 3] / moving[:, 3])  # and grow with them


def test_a_camera_does_not_see_what_is_behind_it():
    camera = np.array([[100.0, 0, 50, 0], [0, 100, 30, 0], [0, 0, 1, 0]])
    points = np.array([[0.0, 0, 5], [0, 0, -5], [2.4, 1.4, 5], [2.5, 0, 5], [0, 1.5, 5], [-2.6, 0, 5]])
    assert in_image(points, camera, (100, 60)).tolist() == [True, False, True, False, False, False]


# -- metrics -----------------------------------------------------------------------------------------------------------


def scan(overlaps, scores, truth=None, small=None):
    overlaps = np.array(overlaps, float)
    truth = np.zeros(overlaps.shape[1], int) if truth is None else np.array(truth)
    small = np.zeros(len(scores), bool) if small is None else np.array(small)
    return Found(overlaps, np.array(scores, float), truth, small)


def test_kittis_average_precision():
    right = [scan(np.eye(2) * 0.9, (0.9, 0.8)) for _ in range(20)]
    assert kitti_precision(right, 0.7) == pytest.approx(100)
    assert math.isnan(kitti_precision([scan(np.zeros((1, 0)), (0.5,))], 0.7))
    half = right + [scan(np.zeros((0, 2)), ()) for _ in range(20)]
    assert kitti_precision(half, 0.7) == pytest.approx(50, abs=2.5)  # half of the positions of recall are reached
    few = right[:3] + [scan([[0.9, 0]], (0.7,))] + [scan(np.zeros((0, 2)), ())] * 16
    assert kitti_precision(few, 0.7) == pytest.approx(100 * 7 / 40)  # 7 of 40 positions, without that of recall 0
    wrong = [scan(np.vstack([np.eye(2) * 0.9, np.zeros((2, 2))]), (0.9, 0.8, 0.95, 0.94)) for _ in range(20)]
    assert kitti_precision(wrong, 0.7) == pytest.approx(50)
    small = [scan(s.overlaps, s.scores, small=(False, False, True, True)) for s in wrong]
    assert kitti_precision(small, 0.7) == pytest.approx(100)
    vans = [scan([[0.9, 0], [0, 0.9]], (0.9, 0.95), truth=(0, 1)) for _ in range(20)]
    assert kitti_precision(vans, 0.7) == pytest.approx(100)
    vans = [scan([[0.9, 0], [0, 0.9], [0, 0]], (0.9, 0.95, 0.97), truth=(0, 1)) for _ in range(20)]
    assert kitti_precision(vans, 0.7) == pytest.approx(50)  # a van that is found is not right either
    twice = [scan([[0.9], [0.8]], (0.9, 0.95)) for _ in range(20)]  # of two on one object the surer one is right
    assert kitti_precision(twice, 0.7) == pytest.approx(100)
    late = [scan([[0.9, 0], [0.8, 0], [0, 0.9]], (0.9, 0.95, 0.5)) for _ in range(20)]
    assert kitti_precision(late, 0.7) == pytest.approx(100 * (20 + 20 * 2 / 3) / 40)  # and the other one wrong
    assert kitti_precision(right, 0.95) == 0
    edge = [scan([[0.9, 0], [0, 0.7]], (0.9, 0.95)) for _ in range(20)]  # an overlap of the threshold is none
    assert kitti_precision(edge, 0.7) == pytest.approx(100 * (20 / 2) / 40)
    faint = [scan([[0.9, 0], [0, 0.9], [0, 0]], (0.9, 0.5, 0.6), small=(False, True, False)) for _ in range(20)]
    assert kitti_precision(faint, 0.7) == pytest.approx(50)  # what is too small is no hit at whose score one counts


@pytest.mark.parametrize(
    "level, height, wrong", [(0, 39, 0), (0, 40, 1), (1, 24, 0), (1, 25, 1), (2, 24, 0), (2, 25, 1)]
)
def test_wrong_boxes_that_are_too_small_for_a_level_do_not_count(kitti, level, height, wrong):
    evaluator = BoxScores(SceneSamples(open_scenes(str(kitti), 0.5)[1], ScanPreprocess(("intensity",))))
    boxes = torch.tensor([[10.0, 0, 0, 4, 2, 1.5, 0], [20, 0, 0, 4, 2, 1.5, 0]])
    zeros, none = torch.zeros(2), torch.full((2,), -1)
    found = evaluator.rows(0, boxes, zeros, torch.tensor([0.9, 0.95]), torch.tensor([100, height]), none)
    there = evaluator.rows(0, boxes[:1], zeros[:1], zeros[:1], zeros[:1], none[:1])
    assert evaluator.precision([(found, there)], 0, level) == pytest.approx(100 / (1 + wrong))


def objects(boxes, labels, scores=0.9, attributes=-1):
    full = np.full(len(boxes), 0)
    return Objects(np.array(boxes, float), np.array(labels) + full, full + attributes, full + scores)


def test_nuscenes_scores():
    truth = [
        objects([[x, 0, 0, 4, 2, 1.5, 0.3, 1, 0], [x, 9, 0, 4, 2, 1.5, 0.3, 1, 0.0]], 0, 1 / x * np.array([1, 0.9]))
        for x in (5.0, 10, 60)
    ]
    classes = ("car",)
    scores = nuscenes_scores(truth, truth, classes)
    assert scores["map"] == pytest.approx(100) and scores["maae"] == 1 and scores["nds"] == pytest.approx(90)
    moved = [s._replace(boxes=s.boxes + np.array([0.7, 0, 0, 0, 0, 0, 0.2, 0, 0.5])) for s in truth]
    scores = nuscenes_scores(moved, truth, classes)
    assert scores["map"] == pytest.approx(75)  # 0.7 m is too far for the first of four distances
    assert scores["mate"] == pytest.approx(0.7) and scores["maoe"] == pytest.approx(0.2)
    assert scores["mave"] == pytest.approx(0.5) and scores["mase"] == pytest.approx(0, abs=1e-9)
    unknown = [s._replace(boxes=s.boxes + np.array([[0] * 9, [0] * 7 + [np.nan] * 2])) for s in truth]
    assert nuscenes_scores(moved, unknown, classes)["mave"] == pytest.approx(0.5)
    smaller = [s._replace(boxes=s.boxes * np.array([1, 1, 1, 0.5, 1, 1, 1, 1, 1])) for s in truth]
    assert nuscenes_scores(smaller, truth, classes)["mase"] == pytest.approx(0.5)
    named = [s._replace(attributes=np.array([5, 6])) for s in truth]
    half = [s._replace(attributes=np.array([5, 5])) for s in truth]
    assert nuscenes_scores(half, named, classes)["maae"] == pytest.approx(0.5, abs=0.2)
    few = [s._replace(boxes=s.boxes + 99.0 * (s.boxes[:, :1] > 0)) for s in truth * 4]
    few[0] = moved[0]
    assert nuscenes_scores(few, truth * 4, classes)["mate"] == 1  # less than a tenth is found
    nothing = [objects(np.zeros((0, 9)), 0)] * 3
    assert nuscenes_scores(nothing, truth, classes)["nds"] == 0
    assert nuscenes_scores(truth, truth, ("car", "bus"))["map"] == pytest.approx(50)  # as its devkit has it
    row = objects([[10 * i, 0, 0, 4, 2, 1.5, 0, 0, 0] for i in range(5)], 0, 1 - np.arange(5) / 10)
    away = np.array([0.0, 0.1, 0.3, 0.2, 1.4])  # the mean error up to each recall, from 0.11 to 1
    found = row._replace(boxes=row.boxes + away[:, None] * (np.arange(9) == 1))
    running = np.interp(np.arange(11, 101) / 100, np.arange(1, 6) / 5, away.cumsum() / np.arange(1, 6))
    assert nuscenes_scores([found], [row], classes)["mate"] == pytest.approx(running.mean())
    both = objects([truth[0].boxes[0], truth[0].boxes[0] + 7], 0)
    one = [truth[0].only(slice(1))]
    ties = [nuscenes_scores([both._replace(scores=np.array(s))], one, classes)["map"]
            for s in ((0.9, 0.9), (0.9, 0.91), (0.91, 0.9))]  # fmt: skip
    assert ties[0] == ties[1] < ties[2]  # of equal scores the last comes first
    ap, curve = average_precision(np.array([True, False, True, True]), 4)
    assert curve[0] == 1 and ap == pytest.approx(0.5, abs=0.02) and average_precision(np.array([False]), 4)[0] == 0


def test_nuscenes_scores_are_those_of_its_devkit():
    """The random boxes of nuscenes-devkit's own test, and the NDS that it states for them."""
    kinds = {"pedestrian": (0, 3), "motorcycle": (3, 2), "bicycle": (3, 2), "traffic_cone": (-1, 0), "barrier": (-1, 0)}
    names = ("car", "truck", "bus", "trailer", "construction_vehicle", *kinds)
    dice, chance = np.random.RandomState(42), random.Random(42)
    sides = [[[] for _ in range(30)] for _ in "tf"]
    for label, name in enumerate(names):
        first, count = kinds.get(name, (5, 3))
        for side, (boxes, reach) in zip(sides, ((3, 15), (25, 10))):
            for scan in side:
                for _ in range(boxes):
                    place, size, turn = dice.rand(2) * reach, dice.rand(3) * 4, turned(dice.rand(4))
                    speed, score = dice.rand(3)[:2] * 4, chance.random()
                    attribute = first + (dice.randint(0, count) if count else 0)
                    chance.random()
                    box = (*place, 0, *size, math.atan2(turn[1, 0], turn[0, 0]), *speed)
                    scan.append((box, label, attribute, score))
    truth, found = ([Objects(*map(np.array, zip(*scan))) for scan in side] for side in sides)
    scores = nuscenes_scores(found, truth, names, distances=(2, 2, 2, 2))
    assert scores["nds"] / 100 == pytest.approx(0.08606662159639042, abs=1e-14)
    wanted = {"mate": 1.307616585704357, "mase": 0.8349830962574011, "maoe": 0.7255479846417405,
              "mave": 2.1003983950915357, "maae": 0.608533883112375}  # fmt: skip
    assert {name: scores[name] for name in wanted} == pytest.approx(wanted, abs=1e-12)


def test_the_evaluator_counts_what_the_layout_says(kitti, nuscenes):
    class Oracle(torch.nn.Module):
        """Finds all boxes that there are; vans, too, if it is told so."""

        def __init__(self, samples, vans):
            super().__init__()
            self.samples, self.vans, self.next = samples, vans, 0

        def detect(self, points, lengths):
            found = []
            for _ in lengths:
                item = self.samples[self.next]
                self.next += 1
                known = (item["labels"] >= 0) | (item["labels"] == -2) & self.vans
                labels = item["labels"][known].clamp_min(0)
                found.append(Boxes(item["boxes"][known], torch.full((len(labels),), 0.9), labels))
            return found

    for folder, how, want in ((kitti, ("intensity",), 100.0), (nuscenes, ("intensity", "time"), None)):
        samples = SceneSamples(open_scenes(str(folder), 0.5)[1], ScanPreprocess(how))
        for vans in (True, False):
            evaluator, totals = BoxScores(samples), Totals()
            evaluator.measure(Oracle(samples, vans), samples.collate([samples[0], samples[1]]), totals)
            scores = evaluator.scores(totals)
            assert tuple(scores) == evaluator.names
            if want:
                assert scores["map"] == scores["ap_Car"] == want and scores["ap_Cyclist"] == 0
                continue
            # The car without a point does not count, and is found nevertheless; of nine classes there is nothing.
            assert 2.5 < scores["map"] < 10 and scores["mate"] == pytest.approx(0.9)
            assert scores["maae"] == pytest.approx(7 / 8)  # that one drives at 5 m/s: its attribute is told


def test_nuscenes_counts_what_is_near_the_car_and_in_no_rack(nuscenes):
    evaluator = BoxScores(SceneSamples(open_scenes(str(nuscenes), 0.5)[1], ScanPreprocess(("intensity", "time"))))
    labels = torch.tensor([evaluator.classes.index(name) for name in ("car", "car", "bicycle", "bicycle", "car")])
    boxes = torch.zeros(5, 9)
    boxes[:, 0] = torch.tensor([50.5, 51.5, 20, 30, 20])
    racks = torch.tensor([[19.0, 1, 0, 4, 3, 2, 0.3]])
    near = evaluator.counts(boxes, labels, torch.tensor([1.0, 0]), racks)
    assert near.tolist() == [True, False, False, True, True]  # the one in the rack, and no car for that
    boxes[:, 7] = torch.tensor([0.3, 0.1, 0.3, 0.1, 0])
    told = evaluator.attributes(Boxes(boxes, torch.ones(5), labels))
    assert [ATTRIBUTES[i].partition(".")[2] for i in told] == [
        "moving", "parked", "with_rider", "without_rider", "parked"
    ]  # fmt: skip


# -- objects of other scans --------------------------------------------------------------------------------------------


def test_objects_are_pasted_where_there_is_room(kitti, tmp_path):
    root = tmp_path / "kitti"
    shutil.copytree(kitti, root)
    train, _ = open_scenes(str(root))
    samples = SceneSamples(train, ScanPreprocess(), "paste", pasting=2)
    assert len(samples.bank) == 12 and len(list((root / "linescan").iterdir())) == 2  # no vans
    again = SceneSamples(train, ScanPreprocess(), "paste", pasting=2)
    assert isinstance(again.bank.points, np.memmap)
    plain = SceneSamples(train, ScanPreprocess(), "none")
    more = 0
    for i in range(len(train)):
        torch.manual_seed(i)
        item, before = samples[i], plain[i]
        torch.manual_seed(i)
        assert torch.equal(again[i]["points"], item["points"])
        boxes = item["boxes"]
        more += len(boxes) - len(before["boxes"])
        assert len(boxes) == len(item["labels"]) and torch.equal(boxes[: len(before["boxes"])], before["boxes"])
        inside = points_in_boxes(item["points"], boxes)
        assert (overlap_bev(boxes, boxes) > 0).sum() == len(boxes)
        assert (inside.sum(1) > 100).all()
        where = [(train.scene(n).boxes[:, :3] == box[:3].numpy()).all(1).any() for box in boxes for n in range(6)]
        assert sum(where) == len(boxes)  # at its own place, of one of the six scans
    assert more > 0
    bank = ObjectBank(np.array([[5.0, 0, 0, 2, 2, 2, 0]]), np.array([1]), np.array([0, 3]), np.full((3, 4), 5.0))
    scan = torch.tensor([[5.0, 0.5, 0, 1], [5, 3, 0, 2]], dtype=torch.float64)
    nothing = torch.zeros(0, 7, dtype=torch.float64), *torch.zeros(2, 0, dtype=torch.long)
    pasted = bank.paste(Labelled(scan, *nothing), {0: 3, 1: 1})
    assert pasted.rows[:, 3].tolist() == [2, 5, 5, 5] and pasted.labels.tolist() == [1]  # in its place was a point
    samples.epoch = 2
    assert len(samples[0]["boxes"]) == len(plain[0]["boxes"])
    paths = sorted((root / "linescan").iterdir())
    paths[0].write_bytes(paths[0].read_bytes()[:-40])
    with pytest.raises(InputError, match="is damaged, delete both"):
        SceneSamples(train, ScanPreprocess(), "paste")
    label = root / "training" / "label_2" / "000000.txt"  # labels that have changed have other objects
    label.write_text(label.read_text().replace("\nCar", "\nVan", 1))
    assert len(SceneSamples(train, ScanPreprocess(), "paste").bank) == 11


def test_only_what_is_around_is_mirrored_along_its_way():
    """A scan of what is in front stays in front."""
    assert "mirror" in KittiScenes.augment and "flip" not in KittiScenes.augment.split("+")
    points, boxes = (torch.from_numpy(x).float() for x in cars(0))
    seen = set()
    for seed in range(8):
        torch.manual_seed(seed)
        rows, found = SceneAugment("mirror")(points, boxes)
        assert torch.equal(rows[:, [0, 2]], points[:, [0, 2]]) and torch.equal(found[:, 0], boxes[:, 0])
        seen.add(bool(torch.equal(rows[:, 1], -points[:, 1])))
        before, after = (points_in_boxes(*pair).sum(1) for pair in ((points, boxes), (rows, found)))
        assert torch.equal(before, after)
    assert seen == {True, False}
    street = SceneAugment("scale+shift", NuScenes.scaling, NuScenes.shifting)
    sizes = torch.stack([street(points, boxes)[1][0, 3] / boxes[0, 3] for _ in range(60)])
    assert sizes.min() < 0.95 and sizes.max() > 1.05


# -- training, scores, files ------------------------------------------------------------------------------------------


def arguments(data, **options):
    words = ["train", "--task", "point-detect", "--data", str(data), "--seed", "0", "--epochs", "3", "--batch", "2",
             "--warmup", "0", "--workers", "0", "--device", "cpu"]  # fmt: skip
    for name, value in options.items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    for name, value in TINY.items():
        words += ["--model-arg", f"{name}={json.dumps(value)}"]
    return tuple(words)


@pytest.mark.slow
def test_kitti_trains_is_killed_resumes_and_is_scored(kitti, tmp_path):
    args = arguments(kitti, holdout=0.2)
    finish(tmp_path, args, "whole")
    kill_and_resume(tmp_path, args, "torn", times=1, rows=5)
    assert same(contents(tmp_path / "whole"), contents(tmp_path / "torn"))
    card = read_card(tmp_path / "whole" / "best.safetensors")
    assert card.classes == ["Car", "Pedestrian", "Cyclist"] and card.preprocess == ScanPreprocess(("intensity",))

    scans = [str(kitti / "training" / "velodyne" / f"00000{i}.bin") for i in (6, 7)]
    broken = tmp_path / "broken.bin"
    broken.write_bytes(b"123")
    runner = CliRunner()
    weights = str(tmp_path / "whole" / "best.safetensors")
    result = runner.invoke(app, ["points", "detect", *scans, str(broken), "-c", weights, "-o", str(tmp_path / "found"),
                                 "--threshold", "0", "--device", "cpu"])  # fmt: skip
    assert result.exit_code == 1 and "broken.bin" in result.output
    for path in map(Path, scans):
        rows = json.loads((tmp_path / "found" / "boxes" / f"{path.stem}.json").read_text())
        assert {"class", "score", "centre", "size", "angle"} <= set(rows[0]) if rows else True
        assert (tmp_path / "found" / "pages" / f"{path.stem}.html").is_file()
    detect = BoxDetector(checkpoint=weights, threshold=0, device="cpu")
    alone = detect(scans[0])
    assert alone.as_json() == json.loads((tmp_path / "found" / "boxes" / "000006.json").read_text())
    scored = runner.invoke(app, ["evaluate", "--task", "point-detect", "--data", str(kitti), "-c", weights, "--json",
                                 "--device", "cpu", "--workers", "0"])  # fmt: skip
    assert scored.exit_code == 0 and "ap_Car" in scored.output


PROPOSALS = {"proposals": 8, "dim": 16, "num_heads": 2, "hidden": 16, "reach": 2}


def nuscenes_arguments(data, **options):
    args = arguments(data, holdout=0.5, model="lion_mamba_nuscenes", **options)
    return (*args, "--model-arg", f"head_args={json.dumps(PROPOSALS)}", "--model-arg", "stride=1")


def test_nuscenes_trains_in_two_processes(nuscenes, tmp_path):
    """Scans are mirrored, now and then all of a process out of what is searched; the other must not wait for it."""
    train_as_two(tmp_path, *nuscenes_arguments(nuscenes), "-o", "run")
    (*_, last) = read_metrics(tmp_path / "run" / "metrics.csv")
    model, card = restore(checkpoint=tmp_path / "run" / "model.safetensors")
    judge = ScanDetectionTask.judge(ScanDetectionRecipe(str(nuscenes), holdout=0.5), model, card)
    alone = evaluate(judge, model, Processes(0, 1, torch.device("cpu"))).scores
    assert set(alone) == {"map", "nds", "mate", "mase", "maoe", "mave", "maae"}
    assert {name: last[f"val_{name}"] for name in alone} == pytest.approx(alone, abs=1e-3)


@pytest.mark.slow
def test_nuscenes_is_killed_while_it_pastes_and_resumes(nuscenes, tmp_path):
    args = nuscenes_arguments(nuscenes, unpasted=1)
    finish(tmp_path, args, "whole")
    kill_and_resume(tmp_path, args, "torn", times=1, rows=2)
    assert same(contents(tmp_path / "whole"), contents(tmp_path / "torn"))


def test_a_street_is_made_as_it_says():
    street = DigitStreet(True, 5)
    scene = street.scene(1)
    inside = points_in_boxes(torch.from_numpy(scene.cloud.points), torch.from_numpy(scene.boxes))
    assert (inside.sum(1) >= 140).all() and 1 <= len(scene.boxes) <= 6
    assert (iou_3d(torch.from_numpy(scene.boxes), torch.from_numpy(scene.boxes)) > 0.01).sum() == len(scene.boxes)
    assert np.array_equal(DigitStreet(True, 5).scene(1).cloud.points, scene.cloud.points)
    assert not np.array_equal(DigitStreet(False, 5).scene(1).cloud.points, scene.cloud.points)
