"""Layouts: what they say, what they refuse, and what is remembered of a call."""

import pytest
import torch

from linescan.scans import gla, selective_scan
from linescan.scans.layout import Layout
from linescan.scans.recurrence import functions

from .example import example
from .tools import case

LAYOUT = functions()["gla"].layout


def test_axes_as_messages_show_them():
    arguments = {name: str(argument) for name, argument in case("example").layout.arguments.items()}
    assert arguments == {
        "k": "(B, K or 1, L, H, d)",
        "v": "(B, K or 1, L, H) or (B, K or 1, L, G, H)",
        "reset": "(B, K or 1, L)",
        "decay": "(H,) or (K, H)",
        "taps": "(extra+1,)",
        "memory": "(B, K, H, d)",
        "count": "(B, K)",
    }


@pytest.mark.parametrize("changed, message", [
    (dict(k=torch.zeros(2, 1, 5, 2, 3)), "gla: k is (B, K or 1, L, H, dk) with dk = 4, got (2, 1, 5, 2, 3)"),
    (dict(g=torch.zeros(2, 1, 5, 2)), "gla: g is (B, K or 1, L, H, dk), got 4 axes (2, 1, 5, 2)"),
    (dict(g=torch.zeros(2, 3, 5, 2, 4), v=torch.zeros(2, 2, 5, 2, 3)),
     "gla: v is (B, K or 1, L, H, dv) with K = 3, got (2, 2, 5, 2, 3)"),
    (dict(initial_state=torch.zeros(2, 2, 2, 4, 3)),
     "gla: initial_state is (B, K, H, dk, dv) with K = 1, got (2, 2, 2, 4, 3)"),
    (dict(q=None), "gla: q is (B, K or 1, L, H, dk), got None"),
    (dict(q=3.0), "gla: q is (B, K or 1, L, H, dk), got float"),
    (dict(q=torch.zeros(2, 1, 5, 2, 4).numpy()), "gla: q is (B, K or 1, L, H, dk), got ndarray"),
])  # fmt: skip
def test_messages(changed, message):
    good = {key: x.float() for key, x in LAYOUT.example(routes=1, length=5, without=["initial_state"]).items()}
    gla(**good)
    with pytest.raises(ValueError) as refused:
        gla(**good | changed)
    assert str(refused.value) == message


def test_sizes_that_follow_from_others():
    inputs = case("example").make()
    assert example(**inputs_of(inputs)).shape == (2, 2, 7, 2, 4)
    with pytest.raises(ValueError, match=r"taps is \(extra\+1,\) with extra\+1 = 4, got \(2,\)"):
        example(**inputs_of(inputs), extra=3)
    inputs = case("example").make(extra=3)
    assert example(**inputs_of(inputs), extra=3).shape == (2, 2, 7, 2, 6)
    with pytest.raises(ValueError, match=r"memory is \(B, K, H, d\) with d = 3, got \(2, 2, 2, 5\)"):
        example(**inputs_of(inputs | {"memory": torch.zeros(2, 2, 2, 5, dtype=torch.float64)}), extra=3)
    with pytest.raises(ValueError, match="example: d is at most 64"):
        example(**inputs_of(case("example").make(d=65)))


def inputs_of(inputs):
    """Named inputs with the states in one."""
    states = inputs["memory"], inputs["count"]
    return {key: x for key, x in inputs.items() if key not in ("memory", "count")} | {"initial_state": states}


def test_what_was_right_before_must_not_count_for_another_dtype_or_option():
    inputs = LAYOUT.example(without=["initial_state"])
    gla(**inputs)
    with pytest.raises(ValueError, match="k holds floating-point numbers, got torch.int64"):
        gla(**inputs | {"k": inputs["k"].long()})
    with pytest.raises(ValueError, match="integer table"):
        gla(**inputs, route=torch.zeros(2, 7))
    gla(**inputs, route=torch.arange(7).expand(2, 7))
    with pytest.raises(ValueError, match="scale is a plain value, not a tensor"):
        gla(**inputs, scale=torch.tensor(0.5))


def test_shapes_are_remembered_and_bounded(monkeypatch):
    layout = Layout("test", ["x", "scale"], "x: B K L D", "B K L D", scale=lambda D: D**-0.5)
    checked = layout.check((torch.zeros(1, 1, 4, 16), None), None)
    assert checked.sizes["D"] == 16 and checked.fill((0, None)) == [0, 0.25] and checked.fill((0, None))[1] == 0.25
    assert layout.check((torch.ones(1, 1, 4, 16), None), None) is checked
    assert layout.check((torch.ones(1, 1, 4, 16), 2.0), None).fill((0, 2.0)) == (0, 2.0)
    for length in range(5000):
        layout.check((torch.zeros(1, 1, length, 1), 1.0), None)
    assert len(layout._checked) <= 4097


def test_a_layout_for_an_argument_that_is_missing_is_a_mistake():
    with pytest.raises(TypeError, match="test has a layout for g, but no such arguments"):
        Layout("test", ["x"], "x g: B K L D", "B K L D")


def test_examples():
    layout = functions()["selective_scan"].layout
    inputs = layout.example(3, 2, 5, shared=["u", "delta_weight"], without=["z", "initial_state"], D=6, rank=1)
    assert inputs["u"].shape == (3, 1, 5, 6) and inputs["delta"].shape == (3, 2, 5, 1)
    assert inputs["delta_weight"].shape == (1, 6, 1) and not {"z", "initial_state"} & set(inputs)
    assert (inputs["A"] < 0).all()
    selective_scan(**inputs)
    full = layout.example(3, 2, 5, without=["delta_weight"], dtype=torch.bfloat16)
    assert full["delta"].shape == full["u"].shape and full["u"].dtype == torch.bfloat16
    one, two = (layout.example(generator=torch.Generator().manual_seed(3))["u"] for _ in range(2))
    assert torch.equal(one, two)
    flags = case("example").make()["reset"]
    assert flags.dtype == torch.bool and flags.any() and not flags.all()
