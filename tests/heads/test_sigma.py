"""Sigma: sizes, batches, training, files; its outputs are golden data's (tests/parity)."""

import pytest
import torch

import linescan
from linescan.errors import InputError
from linescan.heads.sigma import ConcatMamba, CrossMamba, Sigma

SMALL = {"depths": (1, 1, 1, 1), "dim": 32, "num_classes": 3, "decoder_depths": (1, 1, 1)}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Sigma(**SMALL).eval()


def images(*size):
    return torch.randn(2, *size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_any_size_alone_or_in_a_batch(model):
    for height, width in ((45, 70), (32, 36)):
        x = images(2, 3, height, width)
        y = model(*x)
        assert y.shape == (2, 3, height, width)
        for i in range(2):
            torch.testing.assert_close(model(*x[:, i : i + 1]), y[i : i + 1], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(model(x[1], x[0]), y, atol=1e-2)  # which image is which matters
    with pytest.raises(InputError, match="both images are of one size"):
        model(x[0], x[1, :1])


@torch.no_grad()
def test_scans_of_two_maps_exchange_their_last_projection():
    torch.manual_seed(0)
    block, x, e = CrossMamba(16).double(), *images(1, 3, 4, 16).double()
    u = [torch.nn.functional.silu(block.conv(p(m))).flatten(1, 2)[:, None] for p, m in zip(block.in_proj, (x, e))]
    (dt, B, _), (_, _, C) = block.ssm[0].project(u[0]), block.ssm[1].project(u[1])
    ssm = block.ssm[0]
    steps = torch.nn.functional.softplus(dt @ ssm.dt_proj.mT + ssm.dt_bias[:, None])
    state, outputs = torch.zeros(1, 32, 4).double(), []
    for t in range(12):
        step, now = steps[:, 0, t, :, None], u[0][:, 0, t, :, None]
        state = torch.exp(-step * ssm.A_log[0].exp()) * state + step * now * B[:, 0, t, None]
        outputs.append((state * C[:, 0, t, None]).sum(-1) + ssm.D[0] * now[..., 0])
    y = block.out_proj[0](block.out_norm[0](torch.stack(outputs, 1)))
    torch.testing.assert_close(block(x, e)[0], x + y.view_as(x))


@torch.no_grad()
def test_the_scan_of_both_maps_goes_from_the_first_to_the_second_and_back():
    torch.manual_seed(0)
    block, (x, e) = ConcatMamba(16).double(), images(1, 3, 4, 16).double()
    before = block(x, e)
    for first, second in ((x.clone(), e), (x, e.clone())):
        changed = first if first is not x else second
        changed[:, 1, 1] += 1
        assert ((block(first, second) - before).abs().amax(-1) > 1e-9).all()


def test_every_parameter_takes_part_in_training_and_checkpointing_changes_nothing():
    torch.manual_seed(0)
    model, x = Sigma(**SMALL, drop_path_rate=0.0).train(), images(2, 3, 64, 64)
    for name, parameter in model.named_parameters():
        if "fc" in name:  # the gates' single hidden channel is to be on
            torch.nn.init.normal_(parameter)
    grads = []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        torch.manual_seed(1)
        model.zero_grad()
        torch.nn.functional.cross_entropy(model(*x), torch.arange(2 * 64 * 64).view(2, 64, 64) % 3).backward()
        assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*grads))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(*x).float().square().mean()
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters())


def test_own_files_load_and_a_key_too_many_is_an_error(model, tmp_path):
    torch.save({"model": {f"module.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "own.pth")
    torch.manual_seed(2)
    other = linescan.load_checkpoint(Sigma(**SMALL), tmp_path / "own.pth")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))
    torch.save({"model": model.state_dict() | {"decode_head.more": torch.zeros(1)}}, tmp_path / "more.pth")
    with pytest.raises(linescan.CheckpointError, match="1 unexpected .first: decode_head.more"):
        linescan.load_checkpoint(other, tmp_path / "more.pth")
