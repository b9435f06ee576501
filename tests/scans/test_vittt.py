"""ViT^3: golden data, and steps that are those of autograd."""

import pytest
import torch
import torch.nn.functional as F

from linescan.scans import vittt_conv, vittt_glu

from .golden import cases, check
from .tools import bits, case


@pytest.mark.parametrize("golden", cases("mixer__vittt_glu"), ids=str)
def test_golden_glu(golden):
    def run(q, k, v, w1, w2):
        o, weights = vittt_glu(*(x.unsqueeze(1) for x in (q, k, v)), w1, w2, return_weights=True)
        return o.squeeze(1), *(w.squeeze(1) for w in weights)

    check(golden, run)
    check(golden, run, torch.float32)


@pytest.mark.parametrize("golden", cases("mixer__vittt_conv"), ids=str)
def test_golden_conv(golden):
    def run(q, k, v, w):
        tokens = (x.flatten(2).mT.unsqueeze(1) for x in (q, k, v))
        o, kernels = vittt_conv(*tokens, w.squeeze(1), q.shape[2:], return_weights=True)
        return o.squeeze(1).mT.unflatten(-1, q.shape[2:]), kernels.squeeze(1)

    check(golden, run)
    check(golden, run, torch.float32)


def test_the_convolution_is_that_of_torch():
    """With values 0 there is no step."""
    inputs = case("vittt_conv").make(1, 1, 20)
    inputs["v"] = torch.zeros_like(inputs["v"])
    got = vittt_conv(**inputs, grid=(4, 5))
    want = F.conv2d(inputs["q"][0].mT.unflatten(-1, (4, 5)), inputs["w"].unsqueeze(1), padding=1, groups=4)
    torch.testing.assert_close(got[0].mT.unflatten(-1, (4, 5)), want)


@pytest.mark.parametrize("name", ["vittt_glu", "vittt_conv"])
def test_half_precision_steps_in_float32(name):
    options = dict(grid=(7, 1)) if name == "vittt_conv" else {}
    inputs = bits(case(name).make(), torch.bfloat16)
    want = case(name).public.function(**bits(inputs, torch.float64), **options)
    with torch.autocast("cpu", torch.bfloat16):
        got = case(name).public.function(**inputs, **options)
    assert got.dtype == torch.bfloat16
    assert (got.double() - want).abs().max() < 1e-2 * want.abs().max()


def test_a_grid_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"vittt_conv: the grid \(2, 3\) is not that of 7 tokens"):
        vittt_conv(**case("vittt_conv").make(), grid=(2, 3))
