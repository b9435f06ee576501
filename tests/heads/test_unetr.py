"""Mamba-ND with UNETR's decoder: shapes, the published files, and what no output reads."""

import pytest
import torch
from torch import nn

import linescan
from linescan.heads.unetr import MambaNDUNETR, ResidualConv
from linescan.zoo import list_models

SMALL = dict(img_size=32, num_classes=3, embed_dim=16, depth=12, feature_size=4)


def volumes(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def shaken(model, seed=3):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def official(model):
    """The authors' keys, with a layer behind the last."""
    state = {}
    for key, value in model.state_dict().items():
        if key.startswith("encoder."):
            continue
        for number in "2345":
            key = key.replace(f"encoder{number}.0.", f"encoder{number}.transp_conv_init.conv.")
            for i in (1, 2):
                key = key.replace(f"encoder{number}.{i}.", f"encoder{number}.blocks.{i - 1}.conv.")
        key = key.replace(".up.0.", ".transp_conv.conv.").replace("out.", "out.conv.conv.")
        if key.startswith("encoder1."):
            key = key.replace("encoder1.", "encoder1.layer.")
        for i in (1, 2, 3):
            key = key.replace(f".conv{i}.", f".conv{i}.conv.")
        state[key.replace(".conv.conv1", ".conv_block.conv1").replace(".conv.conv2", ".conv_block.conv2")
              .replace(".conv.conv3", ".conv_block.conv3")] = value  # fmt: skip
    names = {
        "conv_weight": "conv1d.weight", "conv_bias": "conv1d.bias", "x_proj": "x_proj.weight",
        "dt_proj": "dt_proj.weight", "dt_bias": "dt_proj.bias", "A_log": "A_log", "D": "D",
    }  # fmt: skip
    layers = [*model.encoder.blocks, model.encoder.blocks[0]]
    for i, block in enumerate(layers):
        for key, value in block.state_dict().items():
            part = key.removeprefix("mixer.")
            if part in names:
                value = value[0][:, None] if part == "conv_weight" else value[0]
                key = f"mixer.{names[part]}"
            state[f"vit.layers.{i}.{key.replace('norm1', 'norm')}"] = value
    state |= {f"vit.patch_embed.projection.{k}": v for k, v in model.encoder.patch_embed.state_dict().items()}
    return state | {"vit.pos_embed": model.encoder.volume_pos_embed.flatten(1, 3)}


def test_every_voxel_gets_logits_at_any_size():
    model = shaken(MambaNDUNETR(**SMALL)).eval()
    x = volumes(2, 1, 32, 32, 32)
    with torch.no_grad():
        both = model(x)
        assert both.shape == (2, 3, 32, 32, 32)
        assert torch.allclose(both[1:], model(x[1:]), atol=1e-4)
        odd = volumes(1, 1, 20, 32, 17)
        padded = nn.functional.pad(odd, (0, 15, 0, 0, 0, 12))
        assert torch.equal(model(odd), model(padded)[:, :, :20, :, :17])
    for wrong in (volumes(1, 2, 32, 32, 32), volumes(1, 32, 32, 32)):
        with pytest.raises(ValueError, match=r"expects volumes \(B, 1, D, H, W\), got shape"):
            model(wrong)
    with pytest.raises(ValueError, match="depth is a multiple of 4 from 12 on, not 8"):
        MambaNDUNETR(depth=8)


def test_features_are_of_the_quarters_and_the_last_but_one():
    model = shaken(MambaNDUNETR(**SMALL)).eval()
    assert model.taps == [3, 6, 9, 10] and MambaNDUNETR(depth=24, embed_dim=16, feature_size=4).taps == [6, 12, 18, 22]
    x, seen = volumes(1, 1, 32, 32, 32), {}
    for name in ("encoder2", "encoder3", "encoder4", "decoder5"):
        getattr(model, name).register_forward_pre_hook(lambda module, args, name=name: seen.__setitem__(name, args[0]))
    with torch.no_grad():
        model(x)
        maps = model.encoder.forward_intermediates(x, intermediates_only=True)
    for name, layer in {"encoder2": 3, "encoder3": 6, "encoder4": 9, "decoder5": 10}.items():
        assert torch.equal(seen[name], maps[layer]), name


def test_a_residual_block_by_hand():
    block, x = ResidualConv(2, 3).double(), volumes(2, 2, 4, 5, 6).double()

    def norm(y):
        mean, var = y.mean((2, 3, 4), keepdim=True), y.var((2, 3, 4), keepdim=True, correction=0)
        return (y - mean) / (var + 1e-5).sqrt()

    act = nn.LeakyReLU(0.01)
    want = act(norm(block.conv2(act(norm(block.conv1(x))))) + norm(block.conv3(x)))
    assert torch.allclose(block(x), want)
    same = ResidualConv(3, 3)
    assert same.conv3 is None


def test_published_files_load_strictly_but_for_the_layer_that_is_not_read(tmp_path):
    model = shaken(MambaNDUNETR(**SMALL)).eval()
    state = official(model)
    assert sum(key.startswith("vit.layers.11.") for key in state) > 5
    torch.save({"state_dict": state, "epoch": 1}, tmp_path / "official.pt")
    other = linescan.load_checkpoint(MambaNDUNETR(**SMALL), tmp_path / "official.pt").eval()
    x = volumes(1, 1, 32, 32, 32)
    with torch.no_grad():
        assert torch.equal(model(x), other(x))
    torch.save(model.state_dict(), tmp_path / "own.pt")
    larger = linescan.load_checkpoint(MambaNDUNETR(**SMALL | {"img_size": (32, 48, 64)}), tmp_path / "own.pt")
    assert larger.encoder.volume_pos_embed.shape == (1, 2, 3, 4, 16)
    for broken, message in (
        ({**state, "extra": torch.zeros(1)}, "unexpected"),
        (dict(list(state.items())[1:]), "missing"),
    ):
        torch.save({"state_dict": broken}, tmp_path / "broken.pt")
        with pytest.raises(linescan.CheckpointError, match=message):
            linescan.load_checkpoint(MambaNDUNETR(**SMALL), tmp_path / "broken.pt")


def test_every_parameter_trains_with_checkpointing_in_bfloat16():
    model = MambaNDUNETR(**SMALL, drop_path_rate=0.1).train()
    model.set_grad_checkpointing()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(volumes(1, 1, 32, 32, 32)).float().square().mean()
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_models_of_the_zoo():
    names = list_models(task="volume-segmentation")
    assert names == [f"mamband_unetr_{size}" for size in ("base_32", "base_64", "small", "small_plus")]
    with torch.device("meta"):
        model = linescan.create_model("mamband_unetr_base_64.btcv")
    assert model.decoder2.conv.conv1.weight.shape[0] == 64 and len(model.encoder.blocks) == 23


@pytest.mark.slow
def test_it_exports():
    model, x = shaken(MambaNDUNETR(**SMALL)).eval(), volumes(1, 1, 32, 32, 32)
    with torch.no_grad():
        assert torch.allclose(torch.export.export(model, (x,)).module()(x), model(x), atol=1e-5)
