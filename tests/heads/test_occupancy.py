"""OccRWKV: batches, gradients, losses and their targets. Golden data: tests/parity."""

import pytest
import torch
import torch.nn.functional as F

from linescan.errors import InputError
from linescan.heads.points.occupancy import (
    IGNORED,
    GroundUNet,
    OccRWKV,
    both_losses,
    class_weights,
    coarser,
    commonest,
    from_above,
    lovasz_softmax,
)
from linescan.layers.sparse import Sites, SparseTensor


def tiny(**args):
    torch.manual_seed(0)
    args = {"num_classes": 4, "low": (0, -3.2, -0.8), "high": (3.2, 3.2, 0.8), "cells": (16, 32, 8)} | args
    return OccRWKV(**args)


def scan(count=200, seed=0):
    rows = torch.rand(count, 4, generator=torch.Generator().manual_seed(seed))
    return rows * torch.tensor([3.2, 6.4, 1.6, 1]) + torch.tensor([0, -3.2, -0.8, 0])


def test_a_scan_is_answered_as_if_it_were_alone_and_by_what_is_hit():
    model = tiny().eval()
    scans = [scan(seed=1), scan(150, seed=2)]
    scans[1][:30] += torch.tensor([9.0, 0, 0, 0])  # outside
    with torch.no_grad():
        both = model(torch.cat(scans), [200, 150])
        alone = [model(s[None]) for s in scans]
        padded = model(torch.nn.utils.rnn.pad_sequence(scans, batch_first=True), [200, 150])
        full = model(scans[0][None], occupancy=torch.ones(1, 16, 32, 8))
    assert both.logits.shape == (2, 4, 16, 32, 8)
    for i in range(2):
        torch.testing.assert_close(both.logits[i], alone[i].logits[0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(padded.logits[i], alone[i].logits[0], atol=1e-5, rtol=1e-4)
    assert both.inside.sum() == 320 and not torch.allclose(full.logits[0], alone[0].logits[0], atol=1e-3)
    hit = torch.zeros(1, 16, 32, 8)
    x, y, z = ((scans[0][:, :3] - torch.tensor([0, -3.2, -0.8])) / 0.2).long().unbind(1)
    hit[0, x, y, z] = 1
    with torch.no_grad():
        torch.testing.assert_close(model(scans[0][None], occupancy=hit).logits, alone[0].logits)


def test_every_parameter_learns():
    model = tiny()
    points, labels = torch.cat([scan(seed=3), scan(seed=4)]), torch.randint(0, 4, (400,))
    target = torch.randint(0, 4, (2, 16, 32, 8))
    target[:, :2] = IGNORED
    found = model(points, [200, 200])
    parts = model.losses(found, target, labels, weights=class_weights((9, 1, 1, 1), (1, 1, 1)))
    parts["loss"].backward()
    assert parts["loss"].item() == pytest.approx(
        3 * parts["volume"].item() + parts["semantic"].item() + parts["occupied"].item(), rel=1e-5
    )
    assert not [name for name, p in model.named_parameters() if p.grad is None]


def test_lovasz_of_certain_answers_is_the_jaccard_loss():
    target = torch.tensor([0, 0, 1, 1, 1, 2])
    said = torch.tensor([0, 1, 1, 1, 0, 2])
    ious = [1 / 3, 2 / 4, 1.0]
    loss = lovasz_softmax(F.one_hot(said, 4).double(), target)
    assert loss.item() == pytest.approx(1 - sum(ious) / 3)
    logits = torch.randn(1, 4, 6, dtype=torch.float64, requires_grad=True)
    unknown = torch.full((1, 6), IGNORED)
    assert both_losses(logits, unknown).item() == 0
    assert torch.autograd.gradcheck(lambda x: both_losses(x, target[None].clone()), logits)


def test_targets():
    labels = torch.tensor([1, 1, 2, 0, 3, 3, 2])
    index = torch.tensor([0, 0, 0, 1, 2, 2, 2])
    assert commonest(labels, index, 3, 4).tolist() == [1, 0, 3]
    target = torch.zeros(1, 4, 4, 4, dtype=torch.long)
    target[0, 0, 0, 0], target[0, 0, 0, 1] = 3, IGNORED
    target[0, 3, 3, 3] = IGNORED
    assert coarser(target, 2)[0, 0, 0, 0] == 1 and coarser(target, 2)[0, 1, 1, 1] == IGNORED
    assert coarser(target, 2).sum() == 1 + IGNORED


def test_maps_from_above_have_the_largest_of_each_column():
    coords = torch.tensor([[0, 0, 1, 2], [0, 3, 1, 2], [1, 2, 0, 0]])
    features = torch.tensor([[1.0, -5.0], [-2.0, -3.0], [7.0, 7.0]])
    maps = from_above(SparseTensor(features, Sites(coords, (4, 2, 3), 2)))
    assert maps.shape == (2, 2, 2, 3) and maps[0, :, 1, 2].tolist() == [1, -3] and maps[1, :, 0, 0].tolist() == [7, 7]
    assert maps.count_nonzero() == 4


def test_half_precision_and_scans_with_nothing_in_the_space():
    model, far = tiny(), scan(3) + 99
    target = torch.randint(0, 4, (2, 16, 32, 8))
    points, lengths = torch.cat([scan(), far]), [200, 3]
    with torch.autocast("cpu", torch.bfloat16):
        found = model(points, lengths)
    assert found.logits.dtype == torch.bfloat16
    labels = torch.randint(0, 4, (203,))
    losses = model.losses(found, target, labels, weights=class_weights((9, 99, 999, 9999), (9, 99, 999)))
    losses["loss"].backward()
    assert all(loss.isfinite() and loss.dtype == torch.float32 for loss in losses.values())
    for points_of_one in (far, scan(1)):  # in no voxel, in a single one
        model.zero_grad()
        model.losses(model(points_of_one[None]), target[:1], labels[: len(points_of_one)])["loss"].backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.eval()
    with torch.no_grad():
        alone = model(far[None]).logits
        torch.testing.assert_close(alone, model(points, lengths).logits[1:])
        high = torch.tensor([[3.2, 3.2, 0.8, 0]]).nextafter(torch.tensor(0.0))  # in the last cells, or in none
        assert model(torch.cat([scan(), high])[None]).logits.isfinite().all()
        assert model.bfloat16()(scan()[None]).logits.isfinite().all()


def test_volumes_and_maps_that_do_not_fit():
    with pytest.raises(InputError, match="16 divides"):
        tiny(cells=(24, 32, 8))
    with pytest.raises(InputError, match="is empty"):
        tiny(low=(5, -3.2, -0.8))
    with pytest.raises(InputError, match=r"occupancy is \(1, 2, 2, 2\)"):
        tiny()(scan()[None], occupancy=torch.zeros(1, 2, 2, 2))
    with pytest.raises(InputError, match="expects clouds"):
        tiny()(torch.zeros(1, 5, 3))
    net = GroundUNet(8, 4, ((64, 128, 256),) * 2, True, 0.0).eval()
    maps = [[torch.zeros(1, c, 16 // s, 16 // s) for c, s in ((64, 2), (128, 4), (256, 8))] for _ in range(2)]
    seen, hooks = {}, []
    for name, part in (("stem", net.stem), *((f"fused{i}", part) for i, part in enumerate(net.fusions))):
        hooks.append(part.register_forward_hook(lambda m, x, y, n=name: seen.update({n: y})))
    for i, part in enumerate(net.ups):
        hooks.append(part.register_forward_pre_hook(lambda m, x, n=i: seen.update({n: x[0]})))
    assert net(torch.randn(1, 8, 16, 16), *maps).shape == (1, 4, 16, 16)
    for i, skip in enumerate(("fused2", "fused1", "fused0", "stem")):  # on the way up, the fused maps come again
        assert torch.equal(seen[i][:, : seen[skip].shape[1]], seen[skip])
