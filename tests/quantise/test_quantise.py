"""Grids, integers, whole models of fewer bits: what rounding does, and that files bring it back."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import linescan
from linescan._compat import has_int8_products
from linescan.engine.cards import ModelCard, read_card, restore, save_model
from linescan.errors import CheckpointError, InputError
from linescan.media.preprocess import Preprocess
from linescan.quantise import METHODS, Recipe, arithmetic, quantise
from linescan.quantise.convert import convert, freeze, layer_errors, transform
from linescan.quantise.layers import QuantisedLinear, QuantisedScan, StatesTimesC, become, integer_product
from linescan.quantise.quantisers import MinMax, MovingPercentile, Percentile, Quantiser, Weight, fit_grid
from linescan.quantise.transforms import ClassRows
from linescan.scans import routes, selective_scan

SMALL = {
    "vim_tiny_patch16_224": {"img_size": 32, "embed_dim": 48, "depth": 2},
    "local_vim_tiny": {"img_size": 32, "embed_dim": 48, "depth": 2},
    "mamband_small_patch8_224": {"img_size": 32, "dims": 48, "depths": (1, 1)},
    "vmamba_tiny_0220": {"dims": (24, 48), "depths": (1, 1)},
    "rsmamba_base": {"img_size": 32, "embed_dim": 48, "depth": 1},
}


PREPROCESS = Preprocess((3, 32, 32), (0.5,) * 3, (0.5,) * 3)


def small(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = linescan.create_model(name, num_classes=10, **SMALL[name]).eval()
    nn.init.normal_(model.head.weight)
    return model


# -- grids and integers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 5, 8])
def test_a_grid_is_nowhere_further_than_half_a_step(bits, symmetric):
    x = torch.linspace(-1.3, 0.7, 1001, dtype=torch.float64)
    grid = fit_grid(x.min(), x.max(), bits, symmetric)
    codes = grid.codes(x)
    assert codes.min() >= grid.low and codes.max() <= grid.high and codes.unique().numel() <= 2**bits
    assert (grid(x) - x).abs().max() <= grid.scale / 2 * (1 + 1e-9) or not symmetric
    assert (grid(x) - x).abs().max() <= grid.scale * (1 + 1e-9)  # the rounded zero may cost another half
    assert grid(torch.zeros(1, dtype=torch.float64)) == 0


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("axes, group", [(0, 0), (1, 0), (1, 8)])
def test_weights_are_the_same_from_their_integers(bits, symmetric, axes, group):
    value = torch.randn(5, 3, 24) if group == 0 else torch.randn(15, 24)
    weight = Weight(value, bits, axes, symmetric, group)
    assert torch.equal(weight(), value)
    weight.freeze()
    codes, scale, zero = weight.integers()
    parts = value.numel() // (group or value[(0,) * axes].numel())
    assert codes.dtype == torch.int8 and codes.shape[0] == len(scale) == parts
    steps = scale.expand(codes.shape).reshape(value.shape)
    assert ((weight() - value).abs() <= steps * 1.001).all()
    stored = weight.codes.numel() * weight.codes.element_size()
    assert stored == (-(-value.numel() // 2) if bits <= 4 else value.numel())
    tiny = Weight(value / 1024, bits, axes, symmetric, group)
    tiny.freeze()
    assert not symmetric or torch.equal(tiny() * 1024, weight()), "a symmetric grid has no smallest step"


def test_observers():
    x, outlier = torch.randn(4, 1000), torch.tensor([100.0])
    for observer, reach in ((MinMax(), 100), (Percentile(0.99), 4), (MovingPercentile(0.99), 4)):
        assert observer.range() is None
        observer.update(torch.cat([x.flatten(), outlier]))
        least, most = observer.range()
        assert least < 0 < most and most <= reach
    moving = MovingPercentile(1.0)
    moving.update(torch.tensor([1.0]))
    moving.update(torch.tensor([2.0]))
    assert moving.range()[1] == pytest.approx(1.01)  # a hundredth of the way
    growing = Percentile(1.0)
    growing.update(torch.tensor([-1.0, 1.0]))
    growing.update(torch.tensor([-5.0, 3.0]))
    assert growing.range()[0] == pytest.approx(-5, abs=1e-3) and growing.range()[1] == pytest.approx(3, abs=1e-3)


@pytest.mark.parametrize(
    "method, clipped", [("mambaquant", {"linear", "scan"}), ("quamba", {"scan"}), ("naive", set())]
)
def test_methods_leave_out_a_rare_outlier_where_the_page_says(method, clipped):
    """One number in 1.4 million of its side: beyond both percentiles, and the whole of a largest magnitude."""
    model = convert(small("vim_tiny_patch16_224"), Recipe(method))
    scan = model.blocks[0].mixer.acts
    for place, act in (("linear", model.head.acts["x"]), ("scan", scan["u"] if method == "quamba" else scan["x"])):
        x = torch.linspace(-1, 1, 2_880_000).view(1, -1, 48).clone()
        x[0, 7, 3] = 1000
        act.mode = "observe"
        act(x)
        act.settle()
        assert (act.grid(x).scale < 0.02) == (place in clipped), place


def test_class_tokens_have_a_scale_of_their_own():
    act = Quantiser(8, apart=ClassRows("middle", 1))
    x = torch.randn(2, 9, 4)
    x[:, 4] *= 100
    act.mode = "observe"
    assert act(x) is x
    act.settle()
    act.mode = "on"
    error = (act(x) - x).abs()
    assert error[:, 4].max() > 0.05 and error[:, [0, 1, 2, 3, 5, 6, 7, 8]].max() < 0.03


@pytest.mark.skipif(not has_int8_products(), reason="this CPU has no instructions for int8 products")
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("scales", ["static", "token", "apart"])
@pytest.mark.parametrize("bits", [8, 4])
def test_int8_products_are_those_of_the_simulation(scales, symmetric, bits):
    torch.manual_seed(bits)
    layer = nn.Linear(40, 24)
    apart = ClassRows("head", 1) if scales == "apart" else None
    act = Quantiser(8, symmetric, "static" if apart else scales, apart=apart)
    weight = Weight(layer.weight, bits, 1, symmetric)
    become(layer, QuantisedLinear, {"weight": weight}, {"x": act, "y": nn.Identity()})
    x = torch.randn(3, 7, 40) + 0.5
    act.mode = "observe"
    layer(x)
    act.settle()
    act.mode = "on"
    weight.freeze()
    fast = integer_product(x, act, weight)
    slow = F.linear(act(x).double(), weight().double())
    assert (fast - slow).abs().max() < 1e-5
    assert torch.equal(layer(x), fast + layer.bias)
    assert isinstance(layer, nn.Linear)
    assert integer_product(x.double(), act, weight) is None


# -- models ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", SMALL)
def test_files_bring_back_the_same_model(method, name, tmp_path):
    model, x = small(name), torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        before = model(x)
    recipe = Recipe(method, "w4a8" if name.startswith("vim") else "w8a8")
    errors = quantise(model, recipe, [x[:2], x[2:]])
    assert {e.layer for e in errors} >= {"head"} and all(0 < e.output < 0.7 for e in errors)
    with torch.no_grad():
        after = model(x)
    noise = ((after - before).norm() / before.norm()).item()
    assert 0 < noise < (0.6 if recipe.weight_bits == 4 else 0.2)
    large = {k for k, v in model.state_dict().items() if v.is_floating_point() and v.numel() > 7000}
    assert method == "dynamic" or all(key.startswith("patch_embed") for key in large)

    how = {"method": method, "bits": recipe.bits, "arithmetic": arithmetic(model)}
    args = {"num_classes": 10, **SMALL[name]}
    card = ModelCard(name, args, list("0123456789"), PREPROCESS, quantised=how)
    save_model(tmp_path / "small.safetensors", model, card)
    again, found = restore(checkpoint=tmp_path / "small.safetensors")
    assert found.quantised == how == read_card(tmp_path / "small.safetensors").quantised
    with torch.no_grad():
        assert torch.equal(again.eval()(x), after)
    copied = copy.deepcopy(again)
    with torch.no_grad():
        assert torch.equal(copied(x), after)


def test_transforms_help_where_channels_differ():
    """Outliers in the scan's output channels: rotations and smoothing leave less noise than one scale alone."""
    torch.manual_seed(0)
    model, x = small("vim_tiny_patch16_224"), torch.randn(8, 3, 32, 32)
    for block in model.blocks:
        block.mixer.D.data[:, ::17] *= 30
    with torch.no_grad():
        before = model(x)
    noise = {}
    for method in ("naive", "mambaquant", "quamba"):
        rounded = copy.deepcopy(model)
        quantise(rounded, Recipe(method, "w8a8"), [x])
        with torch.no_grad():
            noise[method] = ((rounded(x) - before).norm() / before.norm()).item()
    assert max(noise["mambaquant"], noise["quamba"]) < 0.7 * noise["naive"], noise


def test_quamba_scans_what_it_has_rounded():
    model, x = small("vim_tiny_patch16_224"), torch.randn(2, 3, 32, 32)
    quantise(model, Recipe("quamba"), [x])
    scan = model.blocks[0].mixer
    seen = []
    scan.along.register_forward_pre_hook(lambda module, args: seen.append(args))
    with torch.no_grad():
        model(x)
    u, delta, _, B, C, D, *_ = seen[0]
    for tensor, act in ((u, "u"), (delta, "delta"), (B, "dbc"), (C, "dbc")):
        codes = tensor / scan.acts[act].scale
        assert (codes - codes.round()).abs().max() < 1e-3 and tensor.unique().numel() <= 256
    assert D.unique().numel() <= 256
    assert not isinstance(scan.along.recurrence, StatesTimesC)


def test_states_are_rounded_per_token_and_passed_on():
    """The scan in two steps takes states and gives them back, as the one that it stands for."""
    model, x = small("vim_tiny_patch16_224"), torch.randn(2, 3, 32, 32)
    plain = copy.deepcopy(model).blocks[0].mixer
    transform(model, Recipe(), [x])
    scan = model.blocks[0].mixer
    tokens = torch.randn(2, 12, 48)
    plain.in_proj.weight.data = scan.in_proj.weight.data.clone()
    with torch.no_grad():
        whole = scan(tokens)
        first, state = scan(tokens[:, :12], return_final_state=True)
        again = scan(tokens, initial_state=state)
    assert torch.allclose(first, whole) and not torch.allclose(again, whole)
    assert state[1].shape == (2, 2, 96, 16)
    scan.along.recurrence.NUMBERS = 1  # one sample after the other
    with torch.no_grad():
        alone, last = scan(tokens, initial_state=state, return_final_state=True)
    assert torch.allclose(alone, again) and last[1].shape == state[1].shape
    freeze(model, Recipe())
    errors = {e.layer: e for e in layer_errors(model, [x])}
    assert errors["blocks.0.mixer"].kind == "mixer" and errors["blocks.0.mixer.in_proj"].kind == "linear"
    assert errors["blocks.0.mixer.in_proj"].largest > 0
    assert all(m.mode == "on" for m in model.modules() if isinstance(m, (Quantiser, Weight)))


@pytest.mark.parametrize("numbers", [1, 2**24])
def test_a_scan_in_two_steps_is_the_scan(numbers):
    def rand(*shape):
        return torch.randn(*shape, dtype=torch.float64)

    product = StatesTimesC(6, nn.Identity(), nn.Identity()).double()
    product.NUMBERS, product.turned_channels = numbers, True
    inputs = rand(2, 1, 5, 6), rand(2, 2, 5, 6), -rand(2, 6, 4).exp(), rand(2, 2, 5, 4), rand(2, 2, 5, 4), rand(2, 6)
    z, bias, state = rand(2, 1, 5, 6), rand(2, 6), rand(2, 2, 6, 4)
    options = {"route": routes.table("row, -row", (1, 5)), "merge": "sum", "delta_softplus": True}
    options |= {"initial_state": state, "return_final_state": True}
    for ours, theirs in zip(product(*inputs, z, bias, **options), selective_scan(*inputs, z, bias, **options)):
        assert torch.allclose(ours, theirs, atol=1e-12)


def test_what_cannot_be_quantised():
    with pytest.raises(InputError, match="the method is one of 'mambaquant', 'quamba', 'dynamic', 'naive', not 'best'"):
        Recipe("best")
    with pytest.raises(InputError, match="2 to 8 each, as in w8a8 or w4a8, not 'w8'"):
        Recipe("naive", "w8")
    with pytest.raises(InputError, match="mambaquant is calibrated on images"):
        quantise(small("vim_tiny_patch16_224"), Recipe())
    with pytest.raises(InputError, match="no Linear layer"):
        quantise(nn.Sequential(nn.ReLU()), Recipe("dynamic"))
    model = small("vim_tiny_patch16_224")
    quantise(model, Recipe("dynamic"))
    assert not any(isinstance(m, QuantisedScan) for m in model.modules())
    with pytest.raises(InputError, match="quantised already"):
        quantise(model, Recipe("dynamic"))


@pytest.mark.parametrize("values, message", [
    ({"method": "best", "bits": "w8a8"}, "the method is one of"),
    ({"method": "naive", "bits": 8}, "2 to 8 each"),
    ({"method": "naive"}, "quantised has no bits"),
    ({"method": "naive", "bits": "w8a8", "changes": {}}, "which is unknown"),
    ([], "quantised is a table"),
])  # fmt: skip
def test_cards_of_anyone_are_checked(values, message):
    card = ModelCard("vim_tiny_patch16_224", {}, [], PREPROCESS).as_dict()
    assert "quantised" not in card
    with pytest.raises(ValueError, match=message):
        ModelCard.from_dict({**card, "quantised": values})


def test_a_file_of_other_bits_is_refused(tmp_path):
    name = "vim_tiny_patch16_224"
    model, path = small(name), tmp_path / "other.safetensors"
    quantise(model, Recipe("dynamic", "w8a8"))
    card = ModelCard(name, {"num_classes": 10, **SMALL[name]}, list("0123456789"), PREPROCESS,
                     quantised={"method": "dynamic", "bits": "w4a8"})  # fmt: skip
    save_model(path, model, card)
    with pytest.raises(CheckpointError, match="of another shape"):
        restore(checkpoint=path)
