"""Which samples each step sees, and how; what happens to samples that cannot be read."""

from collections import namedtuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import Dataset

from linescan.engine.data import BatchReader, Steps, evaluation_batches, seed_all, steps_of, to_device, training_batches
from linescan.engine.image_sets import Digits
from linescan.engine.samples import Samples, reader
from linescan.errors import BrokenImage, InputError
from linescan.media.preprocess import Preprocess

PREPROCESS = Preprocess((1, 16, 16), (0.5,), (0.25,))

some_steps = st.builds(
    Steps, st.integers(1, 50), st.integers(1, 8), st.integers(1, 3), st.integers(1, 3), st.integers(0, 9)
)


@given(some_steps, st.integers(0, 3))
@settings(max_examples=50, deadline=None)
def test_an_epoch_shows_every_sample(steps, epoch):
    start, stop = epoch * steps.per_epoch, (epoch + 1) * steps.per_epoch
    keys = [k for rank in range(steps.processes) for batch in steps.batches(rank, start, stop) for k in batch]
    assert {e for e, _, _ in keys} == {epoch}
    assert {i for _, _, i in keys} == set(range(steps.samples))
    assert sorted(place for _, place, _ in keys) == list(range(steps.per_epoch * steps.per_step))


@given(some_steps, st.data())
@settings(max_examples=50, deadline=None)
def test_starting_late_shows_what_would_have_come(steps, data):
    stop = 2 * steps.per_epoch
    start = data.draw(st.integers(0, stop))
    whole = list(steps.batches(0, 0, stop))
    assert list(steps.batches(0, start, stop)) == whole[start * steps.accumulate :]


@given(st.integers(1, 40), st.integers(0, 9))
@settings(max_examples=30, deadline=None)
def test_a_step_sees_the_same_samples_however_it_is_cut(samples, seed):
    def seen(batch, accumulate, processes):
        steps = Steps(samples, batch, accumulate, processes, seed)
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

    keys = [(0, "step", 1, 0, 0), (0, "step", 1, 0), (0, "train", 1, 0), (1, "step", 1, 0, 0), (0, "step", 0, 1, 0)]
    draws = [draw(*key) for key in keys]
    assert len({str(d) for d in draws}) == len(keys)
    assert [draw(*key) for key in keys] == draws


def digits(augment=None, repeats=1, **options) -> Samples:
    return Samples(Digits(True), reader(PREPROCESS, augment=augment, **options), repeats)


@pytest.mark.parametrize("workers", [1, 2])
def test_loader_processes_change_nothing(workers):
    def batches(workers):
        data = digits("standard", erasing=0.5)
        return [b.content for b in training_batches(data, steps_of(data, 16, 1, 1, 3), 0, 20, 26, workers)]

    for one, other in zip(batches(0), batches(workers), strict=True):
        assert torch.equal(one["input"], other["input"]) and torch.equal(one["label"], other["label"])


def test_augmentation_changes_with_the_epoch_and_the_place_and_evaluation_does_not():
    train = BatchReader(digits("light", erasing=0.9), 0, "train")

    def image(*key):
        return train.__getitems__([key]).content["input"]

    assert torch.equal(image(0, 3, 5), image(0, 3, 5))
    assert not torch.equal(image(0, 3, 5), image(1, 3, 5)) and not torch.equal(image(0, 3, 5), image(0, 4, 5))
    plain = [next(iter(evaluation_batches(digits(), 4))).content["input"] for _ in range(2)]
    assert torch.equal(*plain)


def test_repeated_augmentation():
    """Each of a third of the samples three times in a row, each time changed otherwise; the epoch as long as before."""
    data = digits("light", repeats=3)
    steps = steps_of(data, 9, 1, 1, 0)
    assert steps.samples == len(data) == 359
    [keys] = steps.batches(0, 0, 1)
    indices = [index for _, _, index in keys]
    assert indices[::3] == indices[1::3] == indices[2::3] and len(set(indices)) == 3
    first, second, *_ = BatchReader(data, 0, "train").__getitems__(keys).content["input"]
    assert not torch.equal(first, second)
    seen = {index for epoch in range(9) for _, _, index in steps.order(epoch).tolist()}
    assert len(seen) > 340


def test_evaluation_shows_every_sample_once():
    batches = [b for rank in range(3) for b in evaluation_batches(digits(), 50, rank, 3)]
    assert sum(b.size for b in batches) == 359
    labels = torch.cat([b.content["label"] for b in batches])
    assert sorted(labels.tolist()) == sorted(Digits(True).labels)


class Numbers(Dataset):
    """Samples that say which they are and when they were read; some cannot be read."""

    def __init__(self, count, broken=()):
        self.count, self.broken = count, set(broken)

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index in self.broken:
            raise BrokenImage(f"{index}: broken")
        return {"index": index, "pair": (torch.tensor([index]), self.epoch)}


def test_broken_samples_are_replaced_in_training_and_left_out_in_evaluation():
    data = Numbers(6, broken=[1, 2])
    keys = [(7, place, index) for place, index in enumerate((0, 1, 2, 3))]
    batch = BatchReader(data, 0, "train").__getitems__(keys)
    assert batch.content["index"].tolist() == [0, 0, 3, 3] and batch.size == 4
    assert batch.broken == ["1: broken", "2: broken"] and batch.content["pair"][1].tolist() == [7] * 4
    batch = BatchReader(data, 0, "evaluate").__getitems__(keys)
    assert batch.content["index"].tolist() == [0, 3] and batch.size == 2 and len(batch.broken) == 2


def test_a_batch_of_broken_samples_takes_the_next_that_is_not():
    batch = BatchReader(Numbers(6, broken=[1, 2]), 0, "train").__getitems__([(0, 0, 1)])
    assert batch.content["index"].tolist() == [3] and batch.size == 1
    assert BatchReader(Numbers(6, broken=[1, 2]), 0, "evaluate").__getitems__([(0, 0, 1)])[:2] == (None, 0)
    nothing = BatchReader(Numbers(3, broken=range(3)), 0, "train").__getitems__([(0, 0, 1), (0, 1, 2)])
    assert nothing.content is None and nothing.size == 0 and len(set(nothing.broken)) == 3


def test_only_what_is_wrong_with_a_sample_is_forgiven():
    class Faulty(Numbers):
        def __getitem__(self, index):
            raise KeyError("a bug")

    with pytest.raises(KeyError):
        BatchReader(Faulty(2), 0, "train").__getitems__([(0, 0, 1)])


def test_a_data_set_of_its_own_order_and_collation():
    class Own(Numbers):
        def order(self, generator):
            return generator.integers(0, 3, 10)  # only the first three, ten per epoch

        def collate(self, samples):
            return [s["index"] for s in samples]

    steps = steps_of(Own(50), 5, 1, 1, 0)
    assert steps.samples == 10 and steps.per_epoch == 2
    batches = [b.content for b in training_batches(Own(50), steps, 0, 0, 4)]
    assert all(isinstance(b, list) and len(b) == 5 and set(b) <= {0, 1, 2} for b in batches)
    assert batches[:2] != batches[2:]


def test_batches_of_any_structure_reach_the_device():
    Pair = namedtuple("Pair", "left right")
    batch = {"a": (torch.zeros(1), [torch.ones(2), "word"]), "b": Pair(torch.zeros(3), 7)}
    moved = to_device(batch, torch.device("meta"))
    assert moved["a"][0].is_meta and moved["a"][1][0].is_meta and moved["a"][1][1] == "word"
    assert isinstance(moved["b"], Pair) and moved["b"].left.is_meta and moved["b"].right == 7


def test_unknown_augmentation():
    rgb = Preprocess((3, 16, 16), (0.5,) * 3, (0.25,) * 3)
    rgb.transform("rand-m9-mstd0.5-inc1")
    with pytest.raises(InputError, match="unknown augmentation 'rnd'"):
        rgb.transform("rnd")
    with pytest.raises(InputError, match="for RGB"):
        PREPROCESS.transform("rand-m9-mstd0.5-inc1")
