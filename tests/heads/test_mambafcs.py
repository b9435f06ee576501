"""Mamba-FCS: sizes, batches, training, files; its outputs are golden data's (tests/parity)."""

import copy

import pytest
import torch

import linescan
from linescan.errors import InputError
from linescan.heads.mambafcs import Changes, ChannelGate, MambaFCS

SMALL = {"depths": (1, 1, 1, 1), "dims": 16}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return MambaFCS(4, **SMALL).eval()


def images(*size):
    return torch.randn(2, *size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_any_size_alone_or_in_a_batch(model):
    for height, width in ((45, 70), (32, 36)):
        x = images(2, 3, height, width)
        y = model(*x)
        assert [tuple(z.shape) for z in y] == [(2, classes, height, width) for classes in (2, 4, 4)]
        for i in range(2):
            for alone, both in zip(model(*x[:, i : i + 1]), y):
                torch.testing.assert_close(alone, both[i : i + 1], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(model(x[1], x[0]).change, y.change, atol=1e-3)  # which image is which matters
    with pytest.raises(InputError, match="both images are of one size"):
        model(x[0], x[1, :1])


@torch.no_grad()
def test_a_model_of_changes_alone_and_arguments_that_are_none():
    model = MambaFCS(0, **SMALL).eval()
    x = images(1, 3, 32, 32)
    y = model(*x)
    assert y.change.shape == (1, 2, 32, 32) and y.before is None and y.after is None
    changed, before, after = y.decide()
    assert torch.equal(changed, before) and torch.equal(changed, after)
    for bad in ({"num_classes": 1}, {"dims": 8}):
        with pytest.raises(InputError, match="num_classes counts|dims is 16 or more"):
            MambaFCS(**SMALL | bad)


def test_what_has_not_changed_is_of_class_0():
    change = torch.tensor([[1.0, 0.0], [0.0, 1.0]])[None, :, None]  # unchanged, changed
    before, after = (torch.eye(4)[[number, number]].mT[None, :, None] for number in (2, 3))
    changed, first, second = Changes(change, before, after).decide()
    assert changed.tolist() == [[[0, 1]]] and first.tolist() == [[[0, 2]]] and second.tolist() == [[[0, 3]]]


@torch.no_grad()
def test_changes_gate_what_the_dates_show(model):
    dates = model.encode(*images(1, 3, 64, 64))
    nothing = [torch.full_like(x, -1e4) for x in dates[0]]
    assert torch.equal(model.decode_semantics(0, dates[0], nothing), model.decode_semantics(0, dates[1], nothing))
    assert not torch.equal(model.decode_semantics(0, dates[0], nothing), model.decode_semantics(1, dates[0], nothing))


def test_a_gate_without_room_for_its_mlp_has_a_bias_left():
    gate, x = ChannelGate(6), torch.randn(2, 6, 3, 3)
    assert [name for name, _ in gate.named_parameters()] == ["bias"]
    torch.testing.assert_close(gate(x), x)  # 2 sigmoid(0)
    torch.nn.init.constant_(gate.bias, 3.0)
    torch.testing.assert_close(gate(x), x * 2 * torch.tensor(3.0).sigmoid())


def test_every_parameter_takes_part_in_training_and_checkpointing_changes_nothing():
    torch.manual_seed(0)
    model, x = MambaFCS(6, **SMALL, drop_path_rate=0.0, decoder_drop_path=0.0).train(), images(2, 3, 64, 64)
    for name, parameter in model.named_parameters():
        if ".fc1." in name:  # the gates' few hidden channels are to be on
            torch.nn.init.normal_(parameter)
    grads = []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        model.zero_grad()
        y = model(*x)
        sum((z.softmax(1) * torch.linspace(0, 1, z.shape[1])[:, None, None]).square().sum() for z in y).backward()
        assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
        grads.append([p.grad.clone() for p in model.parameters()])
    still = [n for (n, _), g in zip(model.named_parameters(), grads[0]) if not g.abs().sum() > 0]
    assert not [n for n in still if ".fc1." not in n and ".fc2.weight" not in n], still
    assert all(torch.allclose(a, b, atol=1e-4 * float(a.abs().max()) + 1e-7) for a, b in zip(*grads))
    with torch.autocast("cpu", torch.bfloat16):
        loss = sum(y.float().square().mean() for y in model(*x))
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters())


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_weights_of_half_precision(model, dtype):
    x = images(1, 3, 32, 36)
    for exact, half in zip(model(*x), copy.deepcopy(model).to(dtype)(*x.to(dtype))):
        assert (half.float() - exact).abs().max() < 0.05 * exact.abs().max()


def test_own_files_load_and_other_classes_leave_the_head(model, tmp_path):
    torch.save({"model": {f"module.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "own.pth")
    torch.manual_seed(2)
    other = linescan.load_checkpoint(MambaFCS(4, **SMALL), tmp_path / "own.pth")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))
    torch.save(model.state_dict() | {"aux_clf.more": torch.zeros(1)}, tmp_path / "more.pth")
    with pytest.raises(linescan.CheckpointError, match="1 unexpected .first: semantic_head.more"):
        linescan.load_checkpoint(other, tmp_path / "more.pth")


@torch.no_grad()
def test_export_and_the_meta_device(model):
    x = images(1, 3, 64, 48)
    exported = torch.export.export(model, tuple(x)).module()
    for ours, theirs in zip(exported(*x), model(*x)):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    with torch.device("meta"):
        assert MambaFCS(4, **SMALL).eval()(*torch.randn(2, 1, 3, 32, 32)).after.shape == (1, 4, 32, 32)
