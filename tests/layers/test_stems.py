"""Convolutions of images: torch's own, whichever way they are computed."""

import pytest
import torch

from linescan.layers.stems import PatchConv2d, PatchConv3d

CONVOLUTIONS = {
    "patches": lambda: PatchConv2d(3, 7, 16, 16),
    "patches that overlap": lambda: PatchConv2d(3, 7, (8, 12), (4, 6), bias=False),
    "small": lambda: PatchConv2d(3, 7, 3, 2, 1),
    "padded": lambda: PatchConv2d(3, 7, 9, 4, 2),
    "of videos": lambda: PatchConv3d(3, 7, (2, 8, 8), (1, 8, 8)),
}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_is_torchs_convolution_in_half_precision(name, autocast):
    torch.manual_seed(0)
    ours = CONVOLUTIONS[name]()
    volume = isinstance(ours, torch.nn.Conv3d)
    theirs = (torch.nn.Conv3d if volume else torch.nn.Conv2d)(
        3, 7, ours.kernel_size, ours.stride, ours.padding, bias=ours.bias is not None
    )
    theirs.load_state_dict(ours.state_dict())
    shape = (2, 3, 4, 32, 40) if volume else (2, 3, 37, 50)  # the last patches do not fill the image
    x = torch.rand(shape).bfloat16().float()
    if not autocast:
        ours.bfloat16()
        theirs.load_state_dict(ours.state_dict())
    half = x if autocast else x.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = ours(half)
    expected = theirs(x)
    assert y.shape == expected.shape and y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected, rtol=2**-6, atol=2**-7)
    weight = torch.randn_like(expected).bfloat16()
    y.backward(weight)
    expected.backward(weight.float())
    of_ours, of_theirs = ours.weight.grad.float(), theirs.weight.grad
    torch.testing.assert_close(of_ours, of_theirs, rtol=2**-6, atol=2**-6 * of_theirs.abs().max().item())


def test_large_patches_are_one_product():
    conv = PatchConv2d(3, 7, 16, 16).bfloat16()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        conv(torch.rand(1, 3, 32, 32).bfloat16())
    names = {event.key for event in profile.key_averages()}
    assert "aten::linear" in names and not any("convolution" in name for name in names)


def test_float32_and_exported_graphs_keep_the_convolution():
    conv, x = PatchConv2d(3, 7, 16, 16), torch.rand(1, 3, 32, 32)
    torch.testing.assert_close(conv(x), torch.nn.Conv2d.forward(conv, x), rtol=0, atol=0)
    graph = torch.export.export(conv.bfloat16(), (x.bfloat16(),)).graph
    assert any("conv2d" in str(node.target) for node in graph.nodes)
