"""timm's contract, held against every registered linescan model.

Models are built at their registered width with one or two blocks a stage (`small`), so that all of them fit a test run;
the full-size models are held against golden data in tests/parity.
"""

import math

import pytest
import timm
import timm.optim
import torch

from linescan.zoo import list_models

MODELS = list_models(task="classification")
FAMILIES = sorted({timm.model_entrypoint(m).__module__.rpartition(".")[2] for m in MODELS})


def family(name):
    return timm.model_entrypoint(name).__module__.rpartition(".")[2]


def one_of_each_kind():
    """The narrowest model of each class of each family: what slow tests run."""
    kinds = {}
    for name in MODELS:
        model = small(name, device="meta")
        size = sum(p.numel() for p in model.parameters())
        key = family(name), type(model).__name__, name.split("_")[0]
        kinds[key] = min(kinds.get(key, (size, name)), (size, name))
    return sorted(name for _, name in kinds.values())


def small(name, device="cpu", **kwargs):
    """A shallow copy of a registered model, its width as registered; clips have two frames."""
    torch.manual_seed(0)
    if "_video_" in name:
        kwargs["num_frames"] = 2
    with torch.device(device):
        for shallow in ({"depth": 2}, {"depths": (1, 1, 1, 1)}):
            try:
                return timm.create_model(name, **shallow, **kwargs)
            except TypeError as error:
                if "depth" not in str(error):
                    raise
    raise AssertionError(f"{name} takes neither depth nor depths")


def image(model, *size, channels=3, batch=1):
    """Images, or clips of as many frames as the model is built for; larger ones where 64 pixels are too few for it."""
    model = getattr(model, "model", model)
    frames = getattr(model, "num_frames", 0)
    size = [math.ceil(n * max(1, model.min_size / 64)) for n in size]
    shape = (batch, channels, frames, *size) if frames else (batch, channels, *size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", MODELS)
def test_classifies_at_two_sizes(name):
    model = small(name).eval()
    for size in ((64, 64), (96, 80)):
        with torch.no_grad():
            x = image(model, *size, batch=2)
            logits = model(x)
            assert logits.shape == (2, model.num_classes) and logits.isfinite().all()
            assert torch.allclose(logits, model.forward_head(model.forward_features(x)), atol=1e-5)
            assert not torch.allclose(logits[0], logits[1])
    assert model.get_classifier().weight.shape[0] == model.num_classes >= 10
    assert model.pretrained_cfg["input_size"][0] == 3 and model.pretrained_cfg["mean"]


@pytest.mark.parametrize("name", MODELS)
def test_features_classifier_and_channels(name):
    model = small(name, features_only=True).eval()
    images = image(model, 64, 96)
    maps = model(images)
    assert len(maps) == len(model.feature_info.channels())
    for x, channels, reduction in zip(maps, model.feature_info.channels(), model.feature_info.reduction()):
        assert x.shape[1] == channels
        assert all(abs(have - whole / reduction) <= 1 for have, whole in zip(x.shape[-2:], images.shape[-2:]))
    del model

    model = small(name, in_chans=1, num_classes=7).eval()
    x = image(model, 64, 64, channels=1)
    assert model(x).shape == (1, 7)
    model.reset_classifier(3)
    assert model(x).shape == (1, 3) and model.num_classes == 3
    model.reset_classifier(0)
    pooled = model(x)
    assert pooled.shape == (1, model.num_features)
    assert torch.equal(pooled, model.forward_head(model.forward_features(x), pre_logits=True))


@pytest.mark.parametrize("name", MODELS)
def test_checkpointed_training_step_in_bfloat16(name):
    model = small(name, drop_path_rate=0.1, num_classes=10).train()
    model.set_grad_checkpointing()
    with torch.autocast("cpu", torch.bfloat16):
        loss = torch.nn.functional.cross_entropy(model(image(model, 64, 64, batch=2)).float(), torch.tensor([1, 2]))
    loss.backward()
    assert loss.isfinite()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{key} takes no part"
        assert parameter.grad.isfinite().all(), key


@pytest.mark.parametrize("name", MODELS)
def test_parameter_groups(name):
    model = small(name, device="meta")
    names = dict(model.named_parameters())
    assert model.no_weight_decay() <= set(names)
    groups = timm.optim.param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.5)
    scales = {group["lr_scale"] for group in groups}
    assert len(scales) >= 3, "stem, blocks and head learn at different rates"
    assert sum(len(group["params"]) for group in groups) == len(names)


@pytest.mark.parametrize("name", MODELS)
def test_bad_inputs_give_one_clear_line(name):
    model = small(name)
    for bad, message in (
        (image(model, 64, 64, channels=4), "expects 3 input channels, got 4"),
        (torch.randn(3, 64, 64), r"expects (images|clips)"),
        (image(model, 1, 1), "at least"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            model(bad)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", one_of_each_kind())
def test_intermediates(name):
    model = small(name).eval()
    x = image(model, 64, 64)
    count = len(model.feature_info)
    with torch.no_grad():
        final, every = model.forward_intermediates(x)
        assert len(every) == count and torch.allclose(final, model.forward_features(x), atol=1e-5)
        last = model.forward_intermediates(x, indices=[-1], intermediates_only=True, stop_early=True)
        assert torch.equal(last[0], every[-1])
        first = model.forward_intermediates(x, indices=[0], intermediates_only=True, stop_early=True)
        assert torch.equal(first[0], every[0])
        with pytest.raises(ValueError, match="out of range"):
            model.forward_intermediates(x, indices=[count])
        model.prune_intermediate_layers([0])
        pruned = model.forward_intermediates(x, indices=[0], intermediates_only=True)
        assert torch.equal(pruned[0], every[0])


@pytest.mark.parametrize("name", one_of_each_kind())
def test_saves_and_loads(name, tmp_path):
    from safetensors.torch import save_model

    import linescan

    model = small(name, num_classes=5).eval()
    save_model(model, tmp_path / "model.safetensors")
    other = small(name, num_classes=5)
    torch.manual_seed(7)
    for parameter in other.parameters():
        torch.nn.init.normal_(parameter)
    linescan.load_checkpoint(other, tmp_path / "model.safetensors")
    x = image(model, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(x), other.eval()(x))


@pytest.mark.parametrize("name", one_of_each_kind())
def test_double_precision_end_to_end(name):
    model = small(name, num_classes=5).eval()
    x = image(model, 64, 64)
    with torch.no_grad():
        single, double = model(x), model.double()(x.double())
    assert double.dtype == torch.float64
    assert torch.allclose(single.double(), double, atol=1e-4 * double.abs().max().item())


@pytest.mark.slow
@pytest.mark.parametrize("name", one_of_each_kind())
def test_compiles_and_exports(name):
    model = small(name, num_classes=5).eval()
    x = image(model, 64, 64, batch=2)
    with torch.no_grad():
        eager = model(x)
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
        exported = torch.export.export(model, (x,)).module()(x)
    scale = eager.abs().max().item()
    assert torch.allclose(eager, compiled, atol=1e-5 * scale)
    assert torch.allclose(eager, exported, atol=1e-5 * scale)
