"""S6: golden data of Mamba, and its own groups, low-rank steps, blocks and memory."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from linescan.scans import selective_scan
from linescan.scans.ops import selective_scan as module

from .golden import cases, check
from .tools import FORMS, RECURRENT, bits, form, results, same

LOW_RANK, FULL_RANK = (case for case in RECURRENT if case.public.name == "selective_scan")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("golden", cases("mixer__mamba1_s6"), ids=str)
@pytest.mark.parametrize("name", ["reference", "chunked", "picked"])
def test_golden(name, golden, dtype):
    def run(u, dt, A, Bm, Cm, D, z, dt_bias):
        u, dt, Bm, Cm, z = (x.unsqueeze(1) for x in (u, dt, Bm, Cm, z))
        A, D, dt_bias = (x.unsqueeze(0) for x in (A, D, dt_bias))
        y, state = selective_scan(u, dt, A, Bm, Cm, D, z, dt_bias, True, return_final_state=True)
        return y.squeeze(1), state.squeeze(1)

    with form(name):
        check(golden, run, dtype)


@pytest.mark.parametrize("d_state", [1, 5])
@pytest.mark.parametrize("without", [["D"], ["z"], ["delta_bias"], ["initial_state"], "all"], ids=str)
def test_leaving_an_input_out_is_giving_its_neutral_value(without, d_state):
    optional = ["D", "z", "delta_bias", "initial_state"]
    without = optional if without == "all" else without
    inputs = FULL_RANK.make(length=19, N=d_state)
    given = {key: x for key, x in inputs.items() if key not in without}
    same(results(FULL_RANK, "chunked", given), results(FULL_RANK, "reference", given), 1e-9)
    full = inputs | {key: torch.zeros_like(inputs[key]) for key in without if key != "z"}
    output, state = FULL_RANK(full)
    if "z" in without:
        output = output / F.silu(inputs["z"])
    torch.testing.assert_close(FULL_RANK(given), (output, state))


def test_groups_share_rows():
    inputs = FULL_RANK.make(length=9)
    rows = inputs | {key: inputs[key].repeat_interleave(2, -2) for key in "BC"}  # a row for every channel
    torch.testing.assert_close(FULL_RANK(inputs), FULL_RANK(rows))
    one = inputs | {key: inputs[key][..., :1, :] for key in "BC"}
    flat = inputs | {key: inputs[key][..., 0, :] for key in "BC"}  # (B, K, L, N)
    torch.testing.assert_close(FULL_RANK(one), FULL_RANK(flat))
    torch.testing.assert_close(FULL_RANK(one), FULL_RANK(one | {"C": flat["C"]}))
    with pytest.raises(ValueError, match="4 channels do not divide into the 3 groups"):
        FULL_RANK(inputs | {key: torch.zeros(2, 2, 9, 3, 3, dtype=torch.float64) for key in "BC"})


def test_softplus_is_linear_above_20():
    inputs = FULL_RANK.make()
    inputs |= {"delta": torch.linspace(0, 30, inputs["delta"].numel()).double().view_as(inputs["delta"])}
    inputs |= {"delta_bias": torch.zeros_like(inputs["delta_bias"]), "A": inputs["A"] / 100}
    same(results(FULL_RANK, "chunked", inputs), results(FULL_RANK, "reference", inputs), 1e-9)
    large = inputs | {"delta": inputs["delta"] + 20.5}
    for name in FORMS:
        with form(name):
            torch.testing.assert_close(FULL_RANK(large)[0], selective_scan(**large), rtol=0, atol=0)


@pytest.mark.parametrize("name", FORMS)
def test_strong_decay_is_finite(name):
    """exp(delta A) underflows: the state is the last input, and no gradient is lost to inf or nan."""
    inputs = bits(FULL_RANK.make(length=64), torch.float32)
    inputs |= {"A": inputs["A"] - 200, "delta": inputs["delta"] + 10}
    assert all(x.isfinite().all() for x in results(FULL_RANK, name, inputs).values())


@pytest.mark.parametrize("size", [1, 2, 5, 16, 64])
def test_chunks_of_any_size(size, monkeypatch):
    inputs = FULL_RANK.make(length=37)
    want = results(FULL_RANK, "chunked", inputs)
    monkeypatch.setattr(module, "numbers_at_a_time", lambda device: 1)
    monkeypatch.setattr(module, "_STEPS", size)
    same(results(FULL_RANK, "chunked", inputs), want, 1e-9)


def test_samples_do_not_depend_on_the_blocks_of_the_batch(monkeypatch):
    inputs = FULL_RANK.make(batch=5, length=40)
    want = results(FULL_RANK, "chunked", inputs)
    monkeypatch.setattr(module, "numbers_at_a_time", lambda device: 2 * 24 * 16)  # two samples, one left over
    assert [b.stop - b.start for b in module._blocks(inputs["A"], 5)[0]] == [2, 2, 2]
    same(results(FULL_RANK, "chunked", inputs), want, 1e-12)


def test_memory_stays_below_the_states_of_all_steps():
    """The largest tensor of forward and backward is a small part of (B, K, L, D, N)."""
    inputs = bits(FULL_RANK.make(1, 2, 2048, D=64, N=16, G=1), torch.float32)
    everything = 2 * 2048 * 64 * 16
    grad, state = torch.randn(1, 2, 2048, 64), torch.randn(1, 2, 64, 16)
    values = inputs | {"delta_softplus": True, "delta_weight": None}
    arguments = [values[key] for key in FULL_RANK.recurrence.parameters]

    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.numbers = max(self.numbers, out.untyped_storage().nbytes() // out.element_size())
            return out

    with Largest() as largest:
        module._chunked(*arguments)
        module._chunked_backward(grad, state, *arguments)
    assert largest.numbers <= everything / 8


# -- step sizes of low rank -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [1, 2])
@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("name", [*FORMS, "picked"])
def test_low_rank_steps_are_the_product(name, steps, weights):
    """One weight for all routes or one per route, numbers that the routes share or not; gradients too."""
    inputs = LOW_RANK.make(length=23)
    inputs |= {"delta": inputs["delta"][:, :steps], "delta_weight": inputs["delta_weight"][:weights]}
    leaves = {key: x.float().requires_grad_() for key, x in inputs.items()}
    given = {key: x for key, x in leaves.items() if key != "delta_weight"}
    full = (leaves["delta"] @ leaves["delta_weight"].mT).expand(-1, 2, -1, -1)
    with form(name):
        got, want = LOW_RANK(leaves)[0], LOW_RANK(given | {"delta": full})[0]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    grads = [torch.autograd.grad(y.square().sum(), list(leaves.values()), retain_graph=True) for y in (got, want)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-3)


def test_low_rank_steps_are_not_stored():
    """What the forward keeps for the backward is as narrow as what it was given."""
    inputs = {key: x.float().requires_grad_() for key, x in LOW_RANK.make(2, 4, 64, D=32).items()}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x):
        LOW_RANK(inputs)
    assert kept.count((2, 4, 64, 32)) == 2  # u and z


def test_a_delta_that_does_not_fit_says_what_would():
    with pytest.raises(ValueError, match="delta is .* = 2, got"):
        LOW_RANK(LOW_RANK.make() | {"delta": torch.zeros(2, 2, 7, 4, dtype=torch.float64)})
    with pytest.raises(ValueError, match="delta is .* = 4, got"):
        FULL_RANK(FULL_RANK.make() | {"delta": torch.zeros(2, 2, 7, 2, dtype=torch.float64)})
