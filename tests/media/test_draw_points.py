"""Drawings of clouds: what is where, in which colour; and pages that hold every point and load nothing."""

import base64
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from linescan.media.draw import PAPER
from linescan.media.draw_points import GREY, PointView, draw_points, points_page


def cube(count=4000, seed=0):
    """Points on the faces of a cube of side 2, and which face each is on: 0, 1 along x, 2, 3 along y, 4, 5 along z."""
    random = np.random.default_rng(seed)
    points = random.uniform(-1, 1, (count, 3))
    face = random.integers(0, 6, count)
    points[np.arange(count), face // 2] = face % 2 * 2 - 1
    return points, face


FACES = ["-x", "+x", "-y", "+y", "-z", "+z"]
COLOURS = [(250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 0), (250, 0, 250), (0, 250, 250)]


def share(pixels, colour):
    """Share of the pixels that are of about this colour: of these lights, whatever their shade."""
    lit = pixels / np.maximum(pixels.max(-1, keepdims=True), 1)
    painted = pixels.min(-1) < 200
    return (painted & (np.abs(lit - np.array(colour) / max(colour)) < 0.25).all(-1)).mean()


def test_each_view_shows_the_faces_that_turn_towards_it():
    points, face = cube(60_000)
    image = draw_points(PointView(points, labels=face, classes=FACES, palette=COLOURS), size=400)
    pixels = np.asarray(image).astype(int)
    views = [pixels[y : y + 190, x : x + 190] for y in (0, 200) for x in (0, 200)]
    seen = [{FACES[i] for i in range(6) if share(view, COLOURS[i]) > 0.1} for view in views]
    assert seen == [{"-y", "+x", "+z"}, {"+z"}, {"-y"}, {"+x"}]
    assert (pixels[2, 2] == PAPER).all()


def test_of_points_behind_each_other_the_nearest_is_seen():
    column = np.stack((np.zeros(50), np.zeros(50), np.arange(50)), 1)
    corners = [[-9, -9, 0], [9, -9, 0], [-9, 9, 0], [9, 9, 0]]
    for order in (slice(None), slice(None, None, -1)):
        points = np.concatenate((column[order], corners))
        labels = np.where(points[:, 2] == 49, 1, 0)
        view = PointView(points, labels=labels, classes=["below", "top"], palette=[(250, 0, 0), (0, 0, 250)])
        pixels = np.asarray(draw_points(view, size=400)).astype(int)
        from_the_top = pixels[80:120, 280:320]
        assert share(from_the_top, (0, 0, 250)) > 0 and share(from_the_top, (250, 0, 0)) == 0


def test_the_legend_counts_classes_and_grey_is_for_none():
    points, face = cube(1000)
    view = PointView(points, labels=np.where(face < 3, face, 255 - face % 2 * 300), classes=["a", "b", "c", "d"])
    colours, legend = view.paint()
    assert (colours[face >= 3] == GREY).all() and (colours[face == 1] == view.palette[1]).all()
    counts = np.bincount(face)[:3]
    assert [word.split()[0] for _, word in legend] == ["abc"[i] for i in np.argsort(-counts, kind="stable")]
    assert [colour for colour, _ in legend] == [view.palette[i] for i in np.argsort(-counts, kind="stable")]


def test_values_run_from_dark_to_bright():
    points = np.random.default_rng(0).normal(size=(500, 3))
    values = np.arange(500.0)
    values[3] = np.nan
    colours, legend = PointView(points, values=values, value_name="time").paint()
    light = colours.astype(int).sum(1)
    assert light[499] > light[250] > light[4]
    assert [word for _, word in legend] == ["time 6", "128", "250", "372", "494"]
    heights, legend = PointView(points).paint()
    assert heights[points[:, 2].argmax()].sum() > heights[points[:, 2].argmin()].sum()
    assert legend[0][1].startswith("height -")
    own = np.random.default_rng(1).integers(0, 256, (500, 3))
    assert (
        np.array_equal(PointView(points, colours=own).paint()[0], own)
        and PointView(points, colours=own).paint()[1] == []
    )


def test_y_can_point_upwards():
    points, face = cube(60_000)
    view = PointView(points, labels=face, classes=FACES, palette=COLOURS, up="y")
    pixels = np.asarray(draw_points(view, size=400)).astype(int)
    for part, front in ((pixels[:190, 200:390], "+y"), (pixels[200:390, :190], "+z")):  # from the top, from the front
        assert FACES[np.argmax([share(part, colour) for colour in COLOURS])] == front


def test_boxes_stand_where_they_are_and_show_their_front():
    view = PointView(np.zeros((0, 3)), boxes=[[10, 5, 1, 4, 2, 2, np.pi / 2]])
    (corners,) = view.corners()
    assert np.allclose(corners[:8].min(0), [9, 3, 0]) and np.allclose(corners[:8].max(0), [11, 7, 2])
    assert np.allclose(corners[8:], [[10, 5, 0], [10, 7, 0]])  # its front looks along y
    for edge in corners[[0, 4]] - corners[[1, 5]]:
        assert np.isclose(np.linalg.norm(edge), 4)  # corners 0 and 1 lie along its length
    pixels = np.asarray(draw_points(view, size=400)).astype(int)
    assert share(pixels, view.box_colour(0)) > 0.005
    cos, sin = np.cos(0.5), np.sin(0.5)
    (turned,) = PointView(np.zeros((0, 3)), boxes=[[0, 0, 0, 4, 2, 2, 0.5]]).corners()
    assert np.allclose(turned[0], [2 * cos - sin, 2 * sin + cos, -1])


def test_boxes_are_named_coloured_and_counted():
    boxes = np.array([[0, 0, 0, 1, 1, 1, 0], [3, 0, 0, 1, 1, 1, 0], [6, 0, 0, 1, 1, 1, 0]])
    view = PointView(
        np.random.default_rng(0).normal(size=(50, 3)),
        classes=["car", "bus"],
        boxes=boxes,
        box_labels=[1, 0, 1],
        box_scores=[0.5, 1, 0.25],
    )
    assert [view.box_name(i) for i in range(3)] == ["bus 0.50", "car 1.00", "bus 0.25"]
    assert view.box_colour(0) == view.palette[1]
    assert [word for _, word in view.paint()[1]][-2:] == ["car ×1", "bus ×2"]
    assert PointView(boxes[:, :3], boxes=boxes).box_name(1) == ""
    draw_points(view, size=300)


def test_the_picture_is_as_high_as_the_cloud_needs():
    flat = np.random.default_rng(0).uniform(0, 1, (2000, 3)) * (100, 50, 1)
    wide, square = (draw_points(PointView(p), size=600) for p in (flat, flat * (1, 2, 100)))
    assert wide.width == square.width == 600 and wide.height < 0.8 * square.height
    assert draw_points(PointView(flat, title="words"), size=600).height > wide.height


def test_a_point_far_away_does_not_make_the_others_small():
    points, _ = cube(5000)
    far = np.concatenate((points, [[1e4, 0, 0]]))
    near_pixels, far_pixels = (np.asarray(draw_points(PointView(p), size=400)).astype(int) for p in (points, far))
    painted = [(np.abs(pixels - PAPER).sum(-1) > 60).mean() for pixels in (near_pixels, far_pixels)]
    assert painted[1] > 0.8 * painted[0]


@pytest.mark.parametrize(
    "points", [np.zeros((0, 3)), np.zeros((1, 3)), np.full((3, 3), np.nan), np.ones((5, 3)) * 1e-30]
)
def test_hardly_anything_to_see(points):
    assert draw_points(PointView(points, title="nothing"), size=200).width == 200
    assert "points" in points_page(PointView(points))


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(points=np.zeros((4, 2))), r"points are \(N, 3\), got \(4, 2\)"),
        (dict(labels=np.zeros(3)), r"labels of 4 points are \(4,\), got \(3,\)"),
        (dict(values=np.zeros((4, 1))), r"values of 4 points are \(4,\)"),
        (dict(colours=np.zeros(4)), r"colours of 4 points are \(4, 3\)"),
        (dict(boxes=np.zeros((2, 7)), box_labels=[1]), r"box_labels of 2 boxes are \(2,\), got \(1,\)"),
        (dict(up="x"), "up is z, or y"),
        (dict(up="y", boxes=np.zeros((2, 7))), "where there are no boxes"),
        (dict(classes=["a", "b"], palette=[(1, 2, 3)]), "a palette of 1 colours for 2 classes"),
    ],
)
def test_what_does_not_fit_is_said(options, words):
    with pytest.raises(ValueError, match=words):
        PointView(**{"points": np.zeros((4, 3)), **options})


# -- the page ---------------------------------------------------------------------------------------------------------


def content(page):
    return json.loads(re.search(r"^const data = (.*);$", page, re.M)[1])


def test_a_page_holds_every_point():
    points, face = cube(1000)
    points = points * 20 + (100, 0, -7)
    view = PointView(
        points, labels=face, classes=FACES, title="a cube", boxes=[[100, 0, -7, 40, 40, 40, 0]], box_scores=[0.5]
    )
    data = content(points_page(view))
    places = np.frombuffer(base64.b64decode(data["places"]), "<i2").reshape(-1, 3)
    assert np.allclose(places / 32767 * 20 + (100, 0, -7), points, atol=0.01)
    colours = np.frombuffer(base64.b64decode(data["colours"]), np.uint8).reshape(-1, 3)
    assert np.array_equal(colours, view.paint()[0])
    labels = np.frombuffer(base64.b64decode(data["labels"]), np.uint8)
    assert np.array_equal(labels, face)
    assert [tuple(colour) for _, colour in data["classes"]] == view.palette
    assert data["note"] == "1,000 points" and data["boxes"][0]["name"] == "0.50"
    ends = np.array(data["boxes"][0]["lines"]).reshape(-1, 3)
    assert len(ends) == 26 and np.abs(ends).max() == pytest.approx(1)


def test_a_page_of_many_points_says_so():
    points, _ = cube(5000)
    page = points_page(PointView(points), limit=1000)
    assert content(page)["note"] == "1,000 of 5,000 points"
    assert len(base64.b64decode(content(page)["labels"])) == 1000
    assert page == points_page(PointView(points), limit=1000) != points_page(PointView(points), limit=1000, seed=1)


def test_a_page_loads_nothing_and_obeys_no_text():
    """Titles and classes come from outside."""
    evil = "</script><img src=x onerror=alert(1)>"
    page = points_page(PointView(np.ones((3, 3)), labels=np.zeros(3, int), classes=[evil], title=evil))

    class Reader(HTMLParser):
        tags, urls = [], []

        def handle_starttag(self, tag, attributes):
            self.tags.append(tag)
            self.urls += [value for name, value in attributes if name in ("src", "href", "action")]

    reader = Reader()
    reader.feed(page)
    assert "img" not in reader.tags and reader.tags.count("script") == 1 and reader.urls == []
    assert content(page)["title"] == evil
    assert not re.search(r"https?:|//[a-z]+\.|@import|url\(|fetch\(|innerHTML", page.replace("// ", ""))
    assert "default-src 'none'" in page
