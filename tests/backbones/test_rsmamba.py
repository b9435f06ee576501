"""RSMamba beyond the contract and the golden data: its shuffles, its merges, class tokens and initialisation."""

import pytest
import timm
import torch
from torch import nn

import linescan
from linescan.backbones.rsmamba import PathMixer, RSMamba
from linescan.scans.multi_route import PathActivation

SMALL = dict(img_size=32, patch_size=8, stride=4, embed_dim=16, depth=2, num_classes=5)


def images(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def test_shuffles_are_fixed_in_evaluation_and_drawn_in_training():
    torch.manual_seed(0)
    model, x = RSMamba(**SMALL).eval(), images(1, 3, 32, 32)
    assert torch.equal(model(x), model(x))
    specs = [block.mixer.along.routes[-1].spec for block in model.blocks]
    assert specs == ["shuffle(0)", "shuffle(1)"]
    model.train()
    assert not torch.equal(model(x), model(x))
    drawn = RSMamba(**SMALL, draw_in_eval=True).eval()
    drawn.load_state_dict(model.state_dict())
    torch.manual_seed(3)
    one = drawn(x)
    assert not torch.equal(drawn(x), one)
    torch.manual_seed(3)
    assert torch.equal(drawn(x), one) and torch.equal(model.eval()(x), model(x))


def test_the_activation_reads_the_projected_outputs():
    torch.manual_seed(0)
    mixer = PathMixer(8, "row, -row, shuffle(5)", "path_activation", d_state=4).double().eval()
    nn.init.normal_(mixer.activation.gate.weight)
    x = images(2, 12, 8).double()
    alone = PathMixer(8, 1, "mean", d_state=4).double().eval()
    own = {k: v for k, v in mixer.state_dict().items() if not k.startswith("activation")}
    alone.load_state_dict(own)
    paths = torch.stack([alone(x, route=row[None]) for row in mixer.along.table((1, 12))], 1)
    activation = PathActivation(8, 3).double()
    activation.load_state_dict(mixer.activation.state_dict())
    assert torch.allclose(mixer(x), activation(paths))
    y, state = mixer(x, return_final_state=True)
    assert torch.equal(y, mixer(x)) and state[1].shape == (2, 3, 16, 4)
    inputs = mixer.project(images(2, 3, 12, 16).double())
    scanned = mixer.scan(images(2, 3, 12, 16).double(), *inputs, grid=(1, 12))
    assert scanned.shape == (2, 12, 16)


@pytest.mark.parametrize("class_token", ["head", "middle", "tail", None])
@pytest.mark.parametrize("paths, merge", [
    ("row", "mean"), ("row, -row", "mean"), ("row, -row", "path_activation"), ("row, -row, shuffle", "mean"),
])  # fmt: skip
def test_variants_run_at_any_size_and_every_parameter_matters(class_token, paths, merge):
    torch.manual_seed(0)
    model = RSMamba(class_token=class_token, paths=paths, merge=merge, **SMALL)
    for size in ((32, 32), (45, 27)):
        logits = model(images(2, 3, *size))
        assert logits.shape == (2, 5)
    logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        behind = (name[:4], class_token, paths) == ("cls_", "tail", "row")
        if not behind:  # what no patch reads
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    assert "fc_norm.weight" in dict(model.named_parameters())
    if class_token:
        nn.init.normal_(model.cls_token)
        tokens = model.forward_features(images(1, 3, 32, 32))
        row = {"head": 0, "middle": 32, "tail": 64}[class_token]
        patches = torch.cat([tokens[:, :row], tokens[:, row + 1 :]], 1)
        pooled = model.forward_head(tokens, pre_logits=True)
        assert torch.allclose(pooled, model.fc_norm(patches.mean(1)), atol=1e-6), "class tokens are no part of the mean"
        model.reset_classifier(4, "token")
        assert isinstance(model.fc_norm, nn.Identity) and model(images(1, 3, 32, 32)).shape == (1, 4)
    with pytest.raises(ValueError, match="class_token is one of"):
        RSMamba(class_token="double", **SMALL)


def test_positions_that_are_not_learned():
    torch.manual_seed(0)
    sine, none = (RSMamba(pos_embed=kind, class_token="head", **SMALL) for kind in ("sine", None))
    assert not any("pos_embed" in name for model in (sine, none) for name, _ in model.named_parameters())
    none.load_state_dict(sine.state_dict())
    x = images(1, 3, 24, 40)  # 6 x 10 patches
    table = (sine.embed(x)[0] - none.embed(x)[0])[0]
    assert not table[0].any()  # the class token has none
    row, column = 3, 7
    angles = [place * 10000.0 ** (-i / 4) for place in (row, column) for i in range(4)]
    want = torch.tensor(angles).view(2, 1, 4)
    want = torch.cat([want.sin(), want.cos()], 1).flatten()
    assert torch.allclose(table[1 + row * 10 + column], want, atol=1e-5)
    with pytest.raises(ValueError, match="a multiple of 4 channels"):
        RSMamba(pos_embed="sine", **SMALL | {"embed_dim": 18})


def test_patches_are_padded_at_the_corner():
    model = RSMamba(embed_dim=16, depth=1)
    assert model.native_grid == (28, 28) and model.grid_of(225, 100) == (29, 13)
    x = images(1, 3, 50, 44)
    with torch.no_grad():
        nn.init.zeros_(model.pos_embed)
        stream, grid, _ = model.embed(x)
        padded = nn.functional.pad(x, (0, 12, 0, 14))  # 5 steps of 8 and a patch of 16 across, 6 down
        want = nn.functional.conv2d(padded, model.patch_embed.weight, stride=8)
    assert grid == (7, 6) == tuple(want.shape[2:])
    assert torch.allclose(stream, want.flatten(2).mT, atol=1e-6)


def test_published_initialisation():
    torch.manual_seed(0)
    mixer = timm.create_model("rsmamba_base", depth=2).blocks[0].mixer
    assert mixer.dt_proj.shape == (1, 384, 12) and mixer.dt_bias.abs().max() <= 12**-0.5
    assert 0.15 < mixer.dt_bias.std() < 0.18  # uniform, not the inverse softplus of small steps
    assert torch.allclose(mixer.A_log.exp(), torch.arange(1.0, 17).expand_as(mixer.A_log))


def test_files_of_mmengine_load_for_another_set(tmp_path):
    torch.manual_seed(0)
    model = RSMamba(**SMALL)
    state = {f"backbone.{k}": v for k, v in model.state_dict().items() if not k.startswith("head")}
    head = {"head.fc.weight": model.head.weight, "head.fc.bias": model.head.bias}
    torch.save({"state_dict": state | head, "meta": {"epoch": 3}}, tmp_path / "one.pth")
    other = linescan.load_checkpoint(RSMamba(**SMALL), tmp_path / "one.pth")
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in model.state_dict().items())
    finetuned = RSMamba(**SMALL | {"num_classes": 3, "img_size": 64})
    finetuned.load_pretrained(str(tmp_path / "one.pth"))
    assert torch.equal(finetuned.fc_norm.weight, model.fc_norm.weight) and finetuned.head.weight.shape == (3, 16)
