"""Which pictures each step sees, and how."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from linescan.engine.data import Samples, Steps, evaluation_batches, seed_all, training_batches
from linescan.engine.image_sets import Digits
from linescan.errors import InputError
from linescan.media.preprocess import Preprocess

PREPROCESS = Preprocess((1, 16, 16), (0.5,), (0.25,))

some_steps = st.builds(
    Steps, st.integers(1, 50), st.integers(1, 8), st.integers(1, 3), st.integers(1, 3), st.integers(0, 9)
)


@given(some_steps, st.integers(0, 3))
@settings(max_examples=50, deadline=None)
def test_an_epoch_shows_every_picture(steps, epoch):
    start, stop = epoch * steps.per_epoch, (epoch + 1) * steps.per_epoch
    keys = [k for rank in range(steps.processes) for batch in steps.batches(rank, start, stop) for k in batch]
    assert {e for e, _ in keys} == {epoch}
    assert {i for _, i in keys} == set(range(steps.pictures))
    assert len(keys) == steps.per_epoch * steps.per_step


@given(some_steps, st.data())
@settings(max_examples=50, deadline=None)
def test_starting_late_shows_what_would_have_come(steps, data):
    stop = 2 * steps.per_epoch
    start = data.draw(st.integers(0, stop))
    whole = list(steps.batches(0, 0, stop))
    assert list(steps.batches(0, start, stop)) == whole[start * steps.accumulate :]


@given(st.integers(1, 40), st.integers(0, 9))
@settings(max_examples=30, deadline=None)
def test_a_step_sees_the_same_pictures_however_it_is_cut(pictures, seed):
    def seen(batch, accumulate, processes):
        steps = Steps(pictures, batch, accumulate, processes, seed)
        streams = [list(steps.batches(rank, 0, steps.per_epoch)) for rank in range(processes)]
        return [
            sorted(k for s in streams for batch in s[step * accumulate : (step + 1) * accumulate] for k in batch)
            for step in range(steps.per_epoch)
        ]

    assert seen(8, 1, 1) == seen(2, 4, 1) == seen(4, 1, 2) == seen(2, 2, 2)


def test_seeds_differ_and_repeat():
    def draw(*key):
        seed_all(*key)
        return torch.rand(2).tolist(), np.random.rand(2).tolist()

    keys = [(0, "step", 1, 0, 0), (0, "step", 1, 0), (0, "picture", 1, 0), (1, "step", 1, 0, 0), (0, "step", 0, 1, 0)]
    draws = [draw(*key) for key in keys]
    assert len({str(d) for d in draws}) == len(keys)
    assert [draw(*key) for key in keys] == draws


@pytest.mark.parametrize("workers", [1, 2])
def test_loader_processes_change_nothing(workers):
    def batches(workers):
        transform = PREPROCESS.transform("standard", erasing=0.5)
        samples = Samples(Digits(True), PREPROCESS, transform, seed=3)
        return list(training_batches(samples, Steps(len(samples), 16, 1, 1, 3), 0, 20, 26, workers))

    for (x, y, i), (other_x, other_y, other_i) in zip(batches(0), batches(workers), strict=True):
        assert torch.equal(x, other_x) and torch.equal(y, other_y) and torch.equal(i, other_i)


def test_augmentation_changes_with_the_epoch_and_evaluation_does_not():
    samples = Samples(Digits(True), PREPROCESS, PREPROCESS.transform("light", erasing=0.9), seed=0)
    assert torch.equal(samples[0, 5][0], samples[0, 5][0])
    assert not torch.equal(samples[0, 5][0], samples[1, 5][0])
    plain = Samples(Digits(True), PREPROCESS, PREPROCESS.transform())
    assert torch.equal(plain[0, 5][0], plain[1, 5][0])


def test_evaluation_shows_every_picture_once():
    samples = Samples(Digits(True), PREPROCESS, PREPROCESS.transform())
    seen = [i for rank in range(3) for _, _, index in evaluation_batches(samples, 50, rank, 3) for i in index.tolist()]
    assert sorted(seen) == list(range(len(samples)))


def test_unknown_augmentation():
    rgb = Preprocess((3, 16, 16), (0.5,) * 3, (0.25,) * 3)
    rgb.transform("rand-m9-mstd0.5-inc1")
    with pytest.raises(InputError, match="unknown augmentation 'rnd'"):
        rgb.transform("rnd")
    with pytest.raises(InputError, match="for RGB images"):
        PREPROCESS.transform("rand-m9-mstd0.5-inc1")
