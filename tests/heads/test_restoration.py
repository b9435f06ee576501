"""Restoration networks: any size, batches, training, routing, files; their outputs are golden data's (tests/parity)."""

import numpy as np
import pytest
import torch

import linescan
from linescan.errors import InputError
from linescan.heads.restoration.frame import HEADS, RestorationFrame
from linescan.heads.restoration.mambair import MambaIR, MambaIRUNet
from linescan.heads.restoration.mambair_v2 import MambaIRv2, fixed_gumbel
from linescan.layers.stems import mirror

V2 = dict(embed_dim=24, depths=(2,), d_state=4, num_heads=2, window_size=4, num_tokens=8, inner_rank=6)
MODELS = {
    "light": lambda: MambaIR(upscale=3, upsampler="pixelshuffledirect", embed_dim=32, depths=(2,), d_state=4),
    "classic": lambda: MambaIR(upscale=4, upsampler="pixelshuffle", embed_dim=32, depths=(1, 1), d_state=4),
    "grey": lambda: MambaIR(1, embed_dim=32, depths=(1,), d_state=4, resi_connection="3conv"),
    "unet": lambda: MambaIRUNet(dim=32, depths=(1, 1, 1, 1), refinement=1),
    "v2": lambda: MambaIRv2(upscale=4, upsampler="nearest+conv", **V2),
    "v2_light": lambda: MambaIRv2(upscale=2, upsampler="pixelshuffledirect", light=True, mlp_ratio=1.0, **V2),
    "v2_residual": lambda: MambaIRv2(**V2),
}


@pytest.fixture(params=MODELS)
def model(request):
    torch.manual_seed(0)
    return MODELS[request.param]()


def images(model, *size):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(size[0], model.in_chans, *size[1:], generator=generator)


def test_any_size_alone_or_in_a_batch(model):
    model.eval()
    with torch.no_grad():
        for height, width in ((13, 18), (1, 3)):
            x = images(model, 2, height, width)
            y = model(x)
            assert y.shape == (2, model.in_chans, height * model.upscale, width * model.upscale)
            for i in range(2):
                assert torch.allclose(model(x[i : i + 1]), y[i : i + 1], atol=1e-5)


def test_every_parameter_takes_part_in_training_and_checkpointing_changes_nothing(model):
    x = images(model, 2, 9, 12)
    for name, parameter in model.named_parameters():
        if "scale" in name:
            torch.nn.init.normal_(parameter)
    grads = []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        torch.manual_seed(1)
        model.zero_grad()
        model.train()(x).square().mean().backward()
        assert not [n for n, p in model.named_parameters() if p.grad is None]
        # The gates' single hidden channel may be off for all images.
        assert not [n for n, p in model.named_parameters() if ".fc" not in n and not p.grad.abs().sum() > 0]
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*grads))


def test_bfloat16_training_step(model):
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.train()(images(model, 1, 8, 8)).float().square().mean()
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters())


def test_files_of_our_own_and_of_the_authors_load(model, tmp_path):
    from linescan.engine.cards import measure_inputs

    name = {MambaIR: "mambair_light_x2", MambaIRv2: "mambair_v2_light_x2", MambaIRUNet: "mambair_unet_dn"}[type(model)]
    assert linescan.zoo.find(name).task == "restoration"
    torch.save({"params": {f"module.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "own.pth")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    linescan.load_checkpoint(model, tmp_path / "own.pth")
    again = torch.load(tmp_path / "own.pth")["params"]
    assert all(torch.equal(again[f"module.{k}"], v) for k, v in model.state_dict().items())
    again["module.more"] = torch.zeros(3)
    torch.save({"params": again}, tmp_path / "more.pth")
    with pytest.raises(linescan.CheckpointError, match="1 unexpected .first: more"):
        linescan.load_checkpoint(model, tmp_path / "more.pth")
    count, macs = measure_inputs(model.to("meta"), [(model.in_chans, 16, 16)])
    assert count == sum(p.numel() for p in model.parameters()) and macs > 0


def test_export_is_of_any_batch():
    torch.manual_seed(0)
    model = MODELS["v2_light"]().eval()
    x = images(model, 2, 8, 12)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    with torch.no_grad():
        x = images(model, 3, 8, 12)
        assert torch.allclose(program.module()(x), model(x), atol=1e-5)


def test_routing():
    torch.manual_seed(0)
    model = MODELS["v2_residual"]()
    for parameter in model.parameters():
        if parameter.ndim < 2:
            torch.nn.init.normal_(parameter, 1, 0.1)
    x = images(model, 1, 12, 12)

    def answers(routing, training):
        for scan in (m for m in model.modules() if hasattr(m, "routing")):
            scan.routing = routing
        model.train(training)
        with torch.no_grad():
            return model(x), model(x)

    first, second = answers("sample", False)
    assert torch.equal(first, second), "an image is always restored alike"
    assert not torch.equal(*answers("sample", True))
    argmax, again = answers("argmax", True)
    assert torch.equal(argmax, again) and not torch.equal(argmax, first)
    given, _ = answers(lambda number, scores: torch.zeros_like(scores), False)
    assert torch.equal(given, argmax)
    model.groups[0].blocks[0].semantic.mixer.routing = lambda number, scores: 1e3 * torch.arange(8.0) * (number == 0)
    assert not torch.equal(model(x), argmax)
    with pytest.raises(InputError, match="routing is one of 'sample', 'argmax', not 'hard'"):
        MambaIRv2(**V2, routing="hard")


def test_fixed_noise_is_gumbels_and_a_function_of_its_place():
    noise = fixed_gumbel(3, 4096, 64)
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.01) and noise.var().item() == pytest.approx(
        1.645, abs=0.02
    )
    assert torch.equal(fixed_gumbel(3, 100, 64), noise[:100])
    other = fixed_gumbel(4, 4096, 64)
    for a, b in ((noise, other), (noise[:-1], noise[1:]), (noise[:, :-1], noise[:, 1:])):
        assert abs(np.corrcoef(a.flatten(), b.flatten())[0, 1]) < 0.01


def test_mirrors_as_numpy_does():
    x = torch.arange(6.0).view(1, 1, 2, 3)
    for top, bottom, left, right in ((0, 1, 0, 2), (2, 2, 3, 3), (0, 7, 5, 0)):
        want = np.pad(x[0, 0].numpy(), ((top, bottom), (left, right)), "symmetric")
        assert np.array_equal(mirror(x, top, bottom, left, right)[0, 0], want)


def test_what_is_no_model_is_one_line():
    for kwargs, message in (
        (dict(upscale=2), "enlarges 2 times needs an upsampler: pixelshuffle"),
        (dict(upsampler="nearest+conv", upscale=2), "upscale is one of 4, not 2"),
        (dict(upsampler="bilinear"), "upsampler is one of"),
        (dict(resi_connection="2conv"), "resi_connection is one of '1conv', '3conv'"),
    ):
        with pytest.raises(InputError, match=message):
            MambaIRv2(**{**V2, **kwargs})
    assert set(HEADS) == {"", "pixelshuffle", "pixelshuffledirect", "nearest+conv"} and RestorationFrame.names == ()
