"""The page of `linescan evaluate`: numbers against scikit-learn's, tables, mistakes that can be seen."""

import csv
import json
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import balanced_accuracy_score, confusion_matrix, precision_recall_fscore_support

from linescan.engine.image_sets import Digits
from linescan.tasks.report import PAIRS, Report


def answers(classes: int, count: int = 200) -> Report:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, max(classes - 1, 2), count)  # the last class has no samples
    logits = rng.normal(size=(count, classes)) + 1.5 * np.eye(classes)[labels]
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    names = [f"class <{i}>" for i in range(classes)]
    return Report(names, [f"a/{i}.png" for i in range(count)], labels, probabilities)


def test_the_numbers_are_scikit_learns():
    found = answers(5)
    truth, guesses, every = found.labels, found.guesses, range(5)
    assert (found.confusion == confusion_matrix(truth, guesses, labels=every)).all()
    wanted = precision_recall_fscore_support(truth, guesses, labels=every, zero_division=0)
    for i, one in enumerate(found.by_class):
        for name, values in zip(("precision", "recall", "f1", "samples"), wanted):
            assert (one[name] or 0) == pytest.approx(values[i])
    assert found.by_class[4]["recall"] is None and found.by_class[4]["samples"] == 0
    assert found.scores["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(truth, guesses))
    assert found.scores["macro_f1"] == pytest.approx(wanted[2][:4].mean()), "of the classes that have samples"
    assert found.scores["accuracy"] == (truth == guesses).mean()


def test_calibration():
    """Right three times in four, and sure of 0.9: wrong by 0.15."""
    probabilities = np.array([[0.9, 0.1]] * 8)
    found = Report(["a", "b"], ["x"] * 8, np.array([0, 0, 0, 1] * 2), probabilities)
    assert found.scores["calibration_error"] == pytest.approx(0.15)
    assert [b["samples"] for b in found.calibration if b["samples"]] == [8]
    sure = Report(["a", "b"], ["x"] * 2, np.array([0, 1]), np.eye(2))
    assert sure.scores["calibration_error"] == 0 and sure.calibration[-1]["samples"] == 2


class Reader(HTMLParser):
    """Whether all tags are closed, and what the page loads."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.sources = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.sources += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.mark.parametrize("classes", [3, 80])
def test_the_files(tmp_path, classes):
    found = answers(classes)
    files = found.write(tmp_path / "deep" / "folder", "vim on <b>", lambda i: Image.new("L", (8, 8), i))
    names = ["report.html", "scores.json", "classes.csv", "confusion.csv", "predictions.csv"]
    assert [path.name for path in files] == names
    text = files[0].read_text()
    page = Reader(text)
    assert not page.open and page.sources and all(s.startswith("data:image/jpeg") for s in page.sources)
    assert "<b>" not in text.split("</h1>")[0] and "class &lt;0&gt;" in text and "class <0>" not in text
    assert json.loads(files[1].read_text()) == found.as_dict()
    with open(files[4], newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["guess"] for row in rows] == [found.classes[i] for i in found.guesses]
    worst = found.worst
    assert (found.guesses[worst] != found.labels[worst]).all() and (np.diff(found.sure[worst]) <= 0).all()
    assert len(found.confused) <= PAIRS and found.confused == sorted(found.confused, key=lambda pair: -pair[2])


def test_evaluate_writes_it(linescan_here, trained, tmp_path):
    """The samples of the page are those of the folder, broken ones left out; scores are not lost with the page."""
    data, held_out = tmp_path / "val", Digits(held_out=True)
    for i in range(40):
        (data / held_out.classes[held_out.labels[i]]).mkdir(parents=True, exist_ok=True)
        held_out.image(i, channels=1).save(data / held_out.classes[held_out.labels[i]] / f"{i}.png")
    (data / "3" / "broken.png").write_bytes(b"no image at all, but longer than a head")
    args = ("evaluate", "-d", data, "-c", trained / "model.safetensors", "--workers", 0, "--json")
    status, stdout, stderr = linescan_here(*args, "--out", tmp_path / "page")
    found = json.loads(stdout)
    assert status == 1 and "broken.png" in stderr and found["accuracy"] == pytest.approx(found["top1"] / 100)
    with open(tmp_path / "page" / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == found["samples"] and all(f"/{row['class']}/" in row["sample"] for row in rows)
    assert np.mean([row["class"] == row["guess"] for row in rows]) == pytest.approx(found["accuracy"])
    (tmp_path / "file").write_text("")
    status, stdout, stderr = linescan_here(*args, "--out", tmp_path / "file")
    assert status == 2 and stderr.count("\n") == 1 and not stdout, "before anything is computed"
    (tmp_path / "other" / "predictions.csv").mkdir(parents=True)
    status, stdout, stderr = linescan_here(*args, "--out", tmp_path / "other")
    assert status == 2 and stderr.count("\n") == 2 and json.loads(stdout)["samples"] == found["samples"]
