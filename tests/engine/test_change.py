"""Losses and scores of changes, by hand; the published ones are golden data's (tests/parity)."""

import math

import pytest
import torch
from torch.nn.functional import one_hot

from linescan.engine.change_losses import lovasz_softmax, sek_loss, similarity_loss
from linescan.engine.change_scores import confusion, kappa_of, semantic_scores, two_class_scores


def logits_of(labels, classes, strength=20.0):
    return strength * one_hot(labels, classes).movedim(-1, 1).double()


def test_scores_of_a_table_by_hand():
    found = torch.tensor([0, 0, 1, 1, 2, 2, 0, 1, 2, 0])
    there = torch.tensor([0, 0, 1, 2, 2, 2, 1, 0, 2, 255])
    table = confusion(found, there, 3)
    assert table.tolist() == [[2, 1, 0], [1, 1, 1], [0, 0, 3]]
    scores = semantic_scores(table)
    assert scores["oa"] == pytest.approx(6 / 9)
    precision, recall = 4 / 6, 4 / 6  # 4 of the 6 pixels found to have changed, and of the 6 that have, are right
    assert scores["f_scd"] == pytest.approx(2 * precision * recall / (precision + recall))
    changed, unchanged = 5 / 7, 2 / 4
    assert scores["miou"] == pytest.approx((changed + unchanged) / 2)
    agreed, by_chance = 4 / 7, (1 * 1 + 3 * 2 + 3 * 4) / 49
    assert scores["sek"] == pytest.approx((agreed - by_chance) / (1 - by_chance) * math.exp(changed) / math.e)


def test_scores_where_all_is_right_or_nothing_is_there():
    everything = semantic_scores(torch.diag(torch.tensor([5, 3, 2])))
    assert everything == pytest.approx({"oa": 1, "f_scd": 1, "miou": 1, "sek": 1})
    nothing = semantic_scores(torch.tensor([[9, 0], [0, 0]]))
    assert nothing["oa"] == 1 and math.isnan(nothing["f_scd"]) and math.isnan(nothing["miou"])
    assert kappa_of(torch.zeros(2, 2)) == 0 and kappa_of(torch.tensor([[4.0, 0], [0, 0]])) == 0
    assert two_class_scores(torch.tensor([[5, 1], [2, 4]])) == pytest.approx(
        {"oa": 9 / 12, "f1": 8 / 11, "iou": 4 / 7, "miou": (4 / 7 + 5 / 8) / 2}
    )


@pytest.fixture
def labels():
    torch.manual_seed(0)
    return torch.randint(1, 4, (2, 2, 4, 5))  # of both dates


def test_what_is_right_costs_nothing(labels):
    right, changed = [logits_of(x, 4) for x in labels], torch.ones(2, 4, 5, dtype=torch.bool)
    assert sek_loss(*right, labels.unbind(), changed) < 1e-5
    assert lovasz_softmax(right[0], labels[0]) < 1e-5
    assert similarity_loss(*right, torch.zeros_like(changed)) == 0
    assert similarity_loss(*right, changed) == pytest.approx(
        2 * (labels[0] != labels[1]).double().mean().item() / 4, abs=1e-5
    )
    wrong = logits_of(labels[0] % 3 + 1, 4)
    assert 0.99 < lovasz_softmax(wrong, labels[0]) < 1 + 1e-6
    assert 10 < sek_loss(wrong, wrong, labels.unbind(), changed) < math.inf  # kappa is negative
    rare = labels[0].clone()
    rare[0], rare[0, 0, 0], rare[1] = 1, 3, 2
    missed, common = rare.clone(), rare.clone()
    missed[0, 0, 0], common[0, 0, 1] = 1, 3
    costs = [sek_loss(logits_of(x, 4), logits_of(x, 4), (rare, rare), changed) for x in (common, missed)]
    assert costs[1] > costs[0]  # a mistake at a rare class weighs more


def test_pixels_without_a_class_do_not_count(labels):
    torch.manual_seed(1)
    x, changed = torch.randn(2, 4, 4, 5).double(), torch.ones(2, 4, 5, dtype=torch.bool)
    other, some = x.clone(), labels[0].clone()
    some[:, 2:] = 255
    other[:, :, 2:] = torch.randn(2, 4, 2, 5).double()
    for loss in (
        lambda y: lovasz_softmax(y, some),
        lambda y: sek_loss(y, y, (some, some), changed),
        lambda y: sek_loss(y, y, labels.unbind(), some != 255),
    ):
        assert loss(x) == loss(other) > 0
    none = torch.full_like(some, 255)
    for loss in (lovasz_softmax(x, none), sek_loss(x, x, (none, none), none != 255)):
        assert loss == 0
    assert sek_loss(x, x, (none, none), changed).isfinite()


def test_gradients(labels):
    torch.manual_seed(2)
    x, y = (logits_of(own, 4, 2.0) + 0.3 * torch.randn(2, 4, 4, 5).double() for own in labels)
    changed = torch.rand(2, 4, 5) < 0.8
    inputs = (x.requires_grad_(), y.requires_grad_())
    assert torch.autograd.gradcheck(lambda a, b: sek_loss(a, b, labels.unbind(), changed), inputs)
    assert torch.autograd.gradcheck(lambda a, b: similarity_loss(a, b, changed), inputs)
    assert torch.autograd.gradcheck(lambda a: lovasz_softmax(a, labels[0]), (inputs[0],))
    half = x.detach().bfloat16().requires_grad_()
    sek_loss(half, half, labels.unbind(), changed).backward()
    assert half.grad.isfinite().all()
