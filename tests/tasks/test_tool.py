"""Tools and writers of any task: one input's error is its own, and a run ends with all that could be answered."""

import errno
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from linescan.errors import CommandError, InputError
from linescan.media.find import Source, find, pair
from linescan.media.images import read_image
from linescan.tasks.tool import Outcome, Tool, Writer, run

from .test_dense import write_video


class Brightness(Tool):
    """The mean of an image, by a network of one weight. Images of one pixel make it raise what `trouble` is."""

    trouble: BaseException = ValueError("one pixel is no image")

    def __init__(self, batch=3):
        super().__init__("brightness", nn.Linear(1, 1), "cpu", torch.float32, batch)
        nn.init.ones_(self.module.weight)
        nn.init.zeros_(self.module.bias)
        self.sizes = []

    def open(self, given):
        return given if isinstance(given, Image.Image) else read_image(given, 1)

    def answer(self, opened, progress):
        self.sizes.append(len(opened))
        if any(image.size == (1, 1) for image in opened):
            raise self.trouble
        means = [np.asarray(image.convert("L"), np.float32).mean() for image in opened]
        return self.module(torch.tensor(means)[:, None])[:, 0].tolist()

    def draw(self, opened, answer, frame=False):
        return Image.new("RGB", (64, 48), (round(answer),) * 3)


class Lines(Writer):
    """A text file for each answer."""

    def __init__(self, out):
        self.out, self.closed = out, False

    def save(self, source, answer, frame=None):
        path = self.out / f"{source.name}{'' if frame is None else f'-{frame}'}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{answer:.0f}")
        return [path]

    def describe(self, answer):
        return f"brightness {answer:.0f}"

    def as_json(self, answer):
        return {"brightness": answer}

    def close(self):
        self.closed = True


@pytest.fixture
def folder(tmp_path):
    """Seven images of brightness 0, 10, ..., and of these the third of one pixel."""
    for i in range(7):
        Image.new("L", (1, 1) if i == 2 else (8, 8), 10 * i).save(tmp_path / f"{i}.png")
    return tmp_path


def test_what_is_wrong_with_every_input_ends_the_run(folder):
    tool, writer = Brightness(), Lines(folder / "out")
    tool.trouble = CommandError("no image is bright enough")
    done = []
    with pytest.raises(CommandError, match="bright enough"):
        done.extend(run(tool, writer, find([folder])))
    assert tool.sizes == [3] and writer.closed, "the others were not tried"
    tool.expect(["a.png", "b.png"])
    with pytest.raises(InputError, match="brightness reads one file at a time, not 2 together"):
        tool.expect([("a.png", "b.png")])


TROUBLE = [
    InputError("no"), OSError(errno.EIO, "broken"), KeyError("shape"), MemoryError(), RecursionError("deep"),
    UnicodeDecodeError("utf-8", b"\xe9", 0, 1, "invalid"), torch.OutOfMemoryError("CUDA out of memory\nsecond line"),
    AssertionError(),
]  # fmt: skip


@pytest.mark.parametrize("trouble", TROUBLE, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("where", ["open", "answer"])
def test_the_error_of_one_input_is_its_own(folder, trouble, where, monkeypatch):
    tool = Brightness()
    tool.trouble = trouble
    if where == "open":
        plain = tool.open

        def broken(given):
            if str(given).endswith("2.png"):
                raise trouble
            return plain(given)

        monkeypatch.setattr(tool, "open", broken)
    answers = [answer for _, answer in tool.each(sorted(folder.glob("*.png")))]
    assert [a for a in answers if not isinstance(a, InputError)] == [0, 10, 30, 40, 50, 60]
    assert isinstance(answers[2], InputError) and "\n" not in str(answers[2])
    if where == "answer":
        assert tool.sizes == [3, 1, 1, 1, 3, 1], "only the batch that failed is tried again one by one"
    [outcome] = [o for o in run(tool, Lines(folder / "out"), find([folder], exclude=[folder / "out"])) if o.error]
    assert outcome.source.name == "2" and str(folder / "2.png") in str(outcome.error)
    if not isinstance(trouble, (InputError, MemoryError)):
        assert outcome.error.__cause__ is trouble, "what went wrong can be looked up"


def test_an_interruption_is_none_of_an_input(folder):
    tool, writer = Brightness(batch=1), Lines(folder / "out")
    tool.trouble = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        list(run(tool, writer, find([folder / f"{i}.png" for i in range(7)])))
    assert writer.closed and (folder / "out" / "1.txt").exists() and not (folder / "out" / "3.txt").exists()


def test_calling_a_tool(folder):
    tool = Brightness()
    assert tool(folder / "1.png") == 10 and tool(Image.new("L", (9, 9), 7)) == 7
    assert tool([folder / "1.png", folder / "3.png"]) == [10, 30] and tool([]) == []
    with pytest.raises(InputError, match="one pixel"):
        tool(folder / "2.png")
    assert repr(tool) == "Brightness(brightness, 0.00 M parameters, cpu, float32)"
    assert "<td>brightness</td>" in tool._repr_html_()
    with pytest.raises(InputError, match="batch"):
        Brightness(batch=0)


def test_inputs_may_be_endless():
    def endless():
        while True:
            yield Image.new("L", (4, 4), 5)

    answers = Brightness(batch=2).each(endless())
    assert [next(answers)[1] for _ in range(5)] == [5] * 5


def test_a_run_saves_draws_and_reports(folder):
    write_video(folder / "clip.mp4", 5)
    (folder / "half.mp4").write_bytes((folder / "clip.mp4").read_bytes()[:700])
    out, shares = folder / "out", []
    writer = Lines(out)
    sources = find([folder, folder / "absent.png"], exclude=[out])
    outcomes = list(run(Brightness(), writer, sources, out / "overlays", shares.append))
    assert [o.source for o in outcomes] == sources and sum(shares) == pytest.approx(len(sources)) and writer.closed
    by_name = {o.source.name: o for o in outcomes}
    assert {name for name, o in by_name.items() if o.error} == {"2", "half", "absent"}
    one = by_name["3"]
    assert one.said == "brightness 30" and (out / "3.txt").read_text() == "30"
    assert one.as_dict() == {
        "source": str(folder / "3.png"), "answer": {"brightness": 30},
        "files": [str(out / "3.txt"), str(out / "overlays" / "3.jpg")],
    }  # fmt: skip
    clip = by_name["clip"].as_dict()
    assert by_name["clip"].said == "5 frames" and len(clip["frames"]) == 5 and len(clip["files"]) == 6
    assert by_name["absent"].as_dict().keys() == {"source", "error"}
    assert json.loads(json.dumps([o.as_dict() for o in outcomes]))
    with Image.open(out / "overlays" / "3.jpg") as drawn:
        assert drawn.size == (64, 48)


def test_the_frames_before_a_broken_one_stay(folder):
    write_video(folder / "clip.mp4", 6)

    class Stops(Brightness):
        def answer(self, opened, progress):
            self.sizes += opened
            if len(self.sizes) > 4:
                raise ValueError("enough")
            return super().answer(opened, progress)

    [outcome] = run(Stops(batch=1), Lines(folder / "out"), find([folder / "clip.mp4"]), folder / "overlays")
    assert str(outcome.error) == f"{folder / 'clip.mp4'}: enough (after 2 frames)" and len(outcome.answer) == 2
    assert (folder / "overlays" / "clip.mp4").stat().st_size and not list(folder.rglob("*.partial"))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT])
def test_a_full_disk_ends_the_run_and_keeps_what_there_is(folder, code, monkeypatch):
    writer = Lines(folder / "out")
    save = writer.save

    def full(source, answer, frame=None):
        if source.name == "4":
            raise OSError(code, "the disk", str(source.path))
        return save(source, answer, frame)

    monkeypatch.setattr(writer, "save", full)
    outcomes = []
    with pytest.raises(OSError, match="the disk"):
        for outcome in run(Brightness(), writer, find([folder])):
            outcomes.append(outcome)
    assert len(outcomes) == 4 and writer.closed and (folder / "out" / "3.txt").exists()


def test_a_name_that_is_too_long_is_an_error_of_its_source(folder):
    image = Image.new("L", (8, 8), 99)
    long = folder / ("n" * 250 + ".png")  # NAME.text is longer than 255
    image.save(long)

    class Longer(Lines):
        def save(self, source, answer, frame=None):
            path = self.out / f"{source.name}.brightness"
            path.parent.mkdir(exist_ok=True)
            path.write_text("x")
            return [path]

    outcomes = list(run(Brightness(), Longer(folder / "out"), find([long, folder / "0.png"])))
    assert "too long" in str(outcomes[0].error) and outcomes[1].error is None


def test_what_a_writer_refuses_is_an_error_of_its_source(folder):
    class Refuses(Lines):
        def save(self, source, answer, frame=None):
            if source.name == "3":
                raise InputError("not among the annotations")
            return super().save(source, answer, frame)

    outcomes = list(run(Brightness(), Refuses(folder / "out"), find([folder], exclude=[folder / "out"])))
    assert [o.source.name for o in outcomes if o.error] == ["2", "3"] and len(outcomes) == 7


def test_no_drawing_replaces_an_input(tmp_path):
    Image.new("L", (8, 8), 2).save(tmp_path / "a.jpg")
    before = (tmp_path / "a.jpg").read_bytes()
    [outcome] = run(Brightness(), Lines(tmp_path), find([tmp_path / "a.jpg"]), tmp_path)
    assert str(outcome.error).startswith(f"{tmp_path / 'a.jpg'}: an output would replace this input")
    assert (tmp_path / "a.jpg").read_bytes() == before


def test_what_a_writer_cannot_save_is_not_answered(folder):
    class Expects(Lines):
        def expect(self, source, opened):
            if source.name in ("0", "4"):
                raise InputError("too dark" if source.name == "0" else "too bright")

    tool = Brightness(batch=1)
    outcomes = list(run(tool, Expects(folder / "out"), find([folder], exclude=[folder / "out"])))
    assert [o.source.name for o in outcomes if o.error] == ["0", "2", "4"] and sum(tool.sizes) == 5


# -- other kinds of inputs --------------------------------------------------------------------------------------------


class Difference(Brightness):
    """Of two images that are read together."""

    def open(self, given):
        return [read_image(path, 1) for path in given]

    def answer(self, opened, progress):
        return [np.asarray(a, float).mean() - np.asarray(b, float).mean() for a, b in opened]


def test_two_files_that_are_one_input(tmp_path):
    for name, values in {"before": {"a": 9, "b": 50, "c": 1}, "after": {"a": 4, "b": 20, "d": 1}}.items():
        (tmp_path / name).mkdir()
        for stem, value in values.items():
            Image.new("L", (8, 8), value).save(tmp_path / name / f"{stem}.png")
    sources = pair(find([tmp_path / "before"]), find([tmp_path / "after"]))
    outcomes = {o.source.name: o for o in run(Difference(), Lines(tmp_path / "out"), sources)}
    assert outcomes["a"].answer == {"brightness": 5} and outcomes["b"].answer == {"brightness": 30}
    assert outcomes["a"].as_dict()["source"] == [str(tmp_path / "before/a.png"), str(tmp_path / "after/a.png")]
    assert "no partner" in str(outcomes["c"].error) and "no partner" in str(outcomes["d"].error)
    [alone] = pair(find([tmp_path / "before" / "c.png"]), find([tmp_path / "after" / "d.png"]))
    assert alone.given == (tmp_path / "before/c.png", tmp_path / "after/d.png") and not alone.error


class Cloud(Tool):
    """The number of points in a text file."""

    def __init__(self):
        super().__init__("cloud", nn.Identity(), "cpu", torch.float32, 2)

    def open(self, given):
        return np.loadtxt(given, ndmin=2)

    def answer(self, opened, progress):
        return [len(points) for points in opened]

    def draw(self, opened, answer, frame=False):
        return Image.new("RGB", (16, 16))


def test_sources_that_are_no_images(tmp_path):
    for i, text in enumerate(("1 2 3\n4 5 6\n", "not numbers", "7 8 9\n")):
        (tmp_path / f"{i}.xyz").write_text(text)
    sources = [Source(Path(tmp_path / f"{i}.xyz"), str(i)) for i in range(3)]
    outcomes = list(run(Cloud(), Lines(tmp_path / "out"), sources, tmp_path / "overlays"))
    assert [o.answer and o.answer["brightness"] for o in outcomes] == [2, None, 1]
    assert isinstance(outcomes[0], Outcome) and "1.xyz" in str(outcomes[1].error)
