"""Explanations: each map against what it is by definition, for models of all kinds, and as pictures."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from linescan.engine.cards import ModelCard, save_model
from linescan.errors import InputError
from linescan.media.heat import draw_heat
from linescan.media.preprocess import Preprocess
from linescan.scans.recurrence import recurrences
from linescan.tasks.explain import Explainer, _positions, _Record, activation_map, attention_of, receptive_field

MODELS = {  # with the number of places along a side of their last features
    "vim_tiny_patch16_224": (dict(img_size=64, depth=2, patch_size=8), 8),
    "vmamba_tiny_s1l8": (dict(depths=(1, 1, 1, 1), dims=16), 2),
    "vig_tiny": (dict(img_size=64, depth=2), 4),
    "vrwkv_tiny": (dict(img_size=64, depth=2), 4),
    "vrwkv6_tiny": (dict(img_size=64, depth=2), 4),
    "segman_tiny": ({}, 7),
    "scan_tiny": (dict(img_size=64), 4),
    "resnet18": ({}, 2),
    "deit_tiny_patch16_224": (dict(img_size=64, depth=3), 4),
    "swin_tiny_patch4_window7_224": (dict(img_size=64, depths=(1, 1, 1, 1)), 2),
}


def build(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3, **MODELS[name][0]).eval()
    torch.nn.init.normal_(model.get_classifier().weight)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_every_model_has_its_maps(name):
    model, side = build(name), MODELS[name][1]
    size = 224 if name == "segman_tiny" else 64
    x = torch.randn(1, 3, size, size)
    activation, field = activation_map(model, x, 1), receptive_field(model, x, (0.9, 0.1))
    assert activation.shape == (side, side) and (activation >= 0).all() and np.isfinite(activation).all()
    assert field.shape == (size, size) and (field >= 0).all() and field.max() > 0
    attention = attention_of(model, x, (0.9, 0.1))
    if name in ("resnet18", "deit_tiny_patch16_224", "swin_tiny_patch4_window7_224"):
        assert attention is None
    else:
        assert attention.ndim == 2 and attention.max() > 0 and np.isfinite(attention).all()
    assert all(p.grad is None for p in model.parameters()) and not model.training, "the model is left as it was"


def test_the_activation_map_finds_what_was_planted():
    """A head that counts how bright a channel is: the map lies where the bright square is."""
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=2).eval()
    kept = []
    model.layer4.register_forward_hook(lambda module, inputs, output: kept.append(output))
    x = torch.zeros(1, 3, 128, 128)
    x[..., 80:112, 16:48] = 5
    model(x)
    features = kept[0][0]
    channel = int((features.amax((1, 2)) / features.mean((1, 2)).clamp(min=1e-6)).argmax())
    with torch.no_grad():
        model.fc.weight.zero_()
        model.fc.weight[1, channel] = 1
    found = activation_map(model, x, 1)
    np.testing.assert_allclose(found / found.max(), (features[channel] / features[channel].max()).detach(), atol=1e-5)


@pytest.mark.parametrize("name", ["vim_tiny_patch16_224", "vmamba_tiny_s1l8", "vrwkv6_tiny", "vrwkv_tiny"])
def test_attention_is_what_one_token_gives_to_another(name):
    """A recurrence is linear in its values: with a single token of ones, its output for another token is the weight."""
    model, x, place = build(name), torch.randn(1, 3, 64, 64), (0.6, 0.3)
    found = attention_of(model, x, place)
    record = _Record()
    with torch.no_grad(), record:
        model(x)
    called, operator, args = record.calls[-1]
    layout = recurrences()[called].layout
    value = next(v for v in ("u", "v") if v in layout.tokens)
    at = recurrences()[called].parameters.index(value)
    positions = _positions(model, args[at].shape[2], x)
    rows, columns = positions.shape
    token = positions[int(0.3 * rows), int(0.6 * columns)]
    for row, column in ((0, 0), (rows - 1, 1), (int(0.3 * rows), int(0.6 * columns))):
        alone = torch.zeros_like(args[at])
        alone[:, :, positions[row, column]] = 1
        output = operator(*args[:at], alone, *args[at + 1 :])
        output = output[0] if isinstance(output, tuple) else output
        assert found[row, column] == pytest.approx(float(output[0, token].detach().abs().sum()), rel=1e-3, abs=1e-6)


def test_receptive_fields_end_where_convolutions_end():
    model = timm.create_model("resnet18", num_classes=2, output_stride=8).eval()
    model.layer2, model.layer3, model.layer4 = (torch.nn.Identity() for _ in range(3))
    model.feature_info = [dict(num_chs=64, reduction=4, module="layer1")]
    model.fc = torch.nn.Linear(64, 2)
    field = receptive_field(model, torch.randn(1, 3, 128, 128), (0.5, 0.5))
    rows, columns = np.nonzero(field)
    # conv 7 and pool 3, of stride 2 each, then four convs 3: (3 + 4 * 2 - 1) * 2 + ... = 43 pixels
    assert rows.max() - rows.min() + 1 <= 43 and columns.max() - columns.min() + 1 <= 43
    assert rows.min() <= 64 <= rows.max()


def test_heat_is_dark_and_light_where_it_should_be():
    values = np.zeros((2, 2))
    values[0, 1] = 3
    drawn = np.asarray(draw_heat(values, Image.new("L", (10, 10)), opacity=1.0)).sum(-1)
    assert drawn.shape == (390, 390) and drawn[20, -20] > drawn[20, 20] and drawn[20, -20] == drawn.max()
    marked = np.asarray(draw_heat(np.ones((2, 2)), Image.new("RGB", (400, 200)), mark=(1.0, 0.0)))
    assert marked.shape == (200, 400, 3) and (marked[0, -1] == 255).all() and not (marked[100, 200] == 255).all()


def test_the_command(linescan_here, tmp_path):
    torch.manual_seed(0)
    args = dict(img_size=16, patch_size=4, depth=2, in_chans=1, num_classes=3)
    network = timm.create_model("vim_tiny_patch16_224", **args)
    card = ModelCard("vim_tiny_patch16_224", args, ["5", "6", "7"], Preprocess((1, 16, 16), (0.5,), (0.5,)))
    save_model(tmp_path / "model.safetensors", network, card)
    Image.new("L", (12, 12), 90).save(tmp_path / "a [b].png")
    (tmp_path / "broken.png").write_bytes(b"no image, but of some length")
    args = ("explain", tmp_path, "--checkpoint", tmp_path / "model.safetensors", "--out", tmp_path / "why")
    status, stdout, stderr = linescan_here(*args, "--class", "7", "--at", "0.2,0.8", "--layer", 0, "--json")
    assert status == 1 and "broken.png" in stderr and '"label": "7"' in stdout
    names = {path.name for path in (tmp_path / "why").rglob("*.png")}
    assert names == {"receptive-field.png"} | {f"a [b]-{kind}.png" for kind in ("activation", "field", "attention")}
    for more, said in (
        (("--class", "seven"), "no class 'seven'"), (("--at", "0.5"), "--at is two shares"),
        (("--at", "2,0"), "0 to 1"), (("--at", "nan,0"), "0 to 1"), (("--layer", "99"), "the layer is 99"),
    ):  # fmt: skip
        status, _, stderr = linescan_here(*args, *more)
        assert status in (1, 2) and said in stderr and "Traceback" not in stderr


def test_in_three_lines(trained):
    explain = Explainer(checkpoint=trained / "model.safetensors", device="cpu")
    [one, other] = explain([Image.new("L", (12, 12)), Image.new("L", (12, 12), 200)])
    assert set(one.pictures()) == {"activation", "field"} and one.label in explain.classes, "a ViT has no recurrence"
    with pytest.raises(InputError, match="has no class 10"):
        Explainer(checkpoint=trained / "model.safetensors", label=10)
