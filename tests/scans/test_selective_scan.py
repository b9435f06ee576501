"""S6: golden data of Mamba, the promises of every recurrence, and its own groups, options, chunks and memory."""

import pytest
import torch
import torch.nn.functional as F
from contract import Contract, form, noise
from golden import cases, check
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from linescan.scans import selective_scan
from linescan.scans.ops import selective_scan as module


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", cases("mixer__mamba1_s6"), ids=str)
@pytest.mark.parametrize("name", ["reference", "chunked", "picked"])
def test_golden(name, case, dtype):
    def run(u, dt, A, Bm, Cm, D, z, dt_bias):
        u, dt, Bm, Cm, z = (x.unsqueeze(1) for x in (u, dt, Bm, Cm, z))
        A, D, dt_bias = (x.unsqueeze(0) for x in (A, D, dt_bias))
        y, state = selective_scan(u, dt, A, Bm, Cm, D, z, dt_bias, True, return_final_state=True)
        return y.squeeze(1), state.squeeze(1)

    with form(name):
        check(case, run, dtype)


class TestSelectiveScan(Contract):
    recurrence, function = module._selective_scan, selective_scan
    tokens = ("u", "delta", "B", "C", "z")
    options = {"delta_softplus": True}

    def inputs(self, batch, routes, length, channels=4, d_state=3, groups=2):
        return {
            "u": noise(batch, routes, length, channels),
            "delta": noise(batch, routes, length, channels, offset=-2),
            "A": -torch.exp(noise(routes, channels, d_state)),
            "B": noise(batch, routes, length, groups, d_state),
            "C": noise(batch, routes, length, groups, d_state),
            "D": noise(routes, channels),
            "z": noise(batch, routes, length, channels),
            "delta_bias": noise(routes, channels),
            "initial_state": noise(batch, routes, channels, d_state),
        }

    def resize_chunks(self, monkeypatch, size):
        monkeypatch.setattr(module, "numbers_at_a_time", lambda device: 1)
        monkeypatch.setattr(module, "_STEPS", size)

    @pytest.mark.parametrize("d_state", [1, 5])
    @pytest.mark.parametrize("without", ["D", "z", "delta_bias", "initial_state", "all"])
    def test_optional_inputs(self, without, d_state):
        torch.manual_seed(0)
        inputs = self.inputs(2, 2, 19, d_state=d_state)
        optional = ("D", "z", "delta_bias", "initial_state")
        neutral = {key: torch.zeros_like(inputs[key]) for key in optional}
        absent = optional if without == "all" else (without,)
        given = {key: x for key, x in inputs.items() if key not in absent}
        got, want = self.gradients("chunked", given), self.gradients("reference", given)
        self.same(got, want, 1e-9)
        # leaving an input out is giving its neutral value (for a gate: dividing by silu of it)
        full = inputs | {key: neutral[key] for key in absent if key != "z"}
        output, state = self.call(full)
        if "z" in absent:
            output = output / F.silu(inputs["z"])
        torch.testing.assert_close(got.output, output)
        torch.testing.assert_close(got.state, state)

    def test_groups_share_rows(self):
        inputs = self.make(length=9)
        rows = inputs | {key: inputs[key].repeat_interleave(2, -2) for key in "BC"}  # a row for every channel
        torch.testing.assert_close(self.call(inputs), self.call(rows))
        one = inputs | {key: inputs[key][..., :1, :] for key in "BC"}
        flat = inputs | {key: inputs[key][..., 0, :] for key in "BC"}  # (B, K, L, N)
        torch.testing.assert_close(self.call(one), self.call(flat))
        torch.testing.assert_close(self.call(one), self.call(one | {"C": flat["C"]}))
        with pytest.raises(ValueError, match="4 channels do not divide into the 3 groups"):
            self.call(inputs | {key: noise(2, 2, 9, 3, 3) for key in "BC"})

    def test_softplus_is_linear_above_20(self):
        inputs = self.make()
        inputs |= {"delta": torch.linspace(0, 30, inputs["delta"].numel()).double().view_as(inputs["delta"])}
        inputs |= {"delta_bias": torch.zeros_like(inputs["delta_bias"]), "A": inputs["A"] / 100}
        self.same(self.gradients("chunked", inputs), self.gradients("reference", inputs), 1e-9)
        large = inputs | {"delta": inputs["delta"] + 20.5}
        for name in ("reference", "chunked"):
            with form(name):
                torch.testing.assert_close(self.call(large)[0], selective_scan(**large), rtol=0, atol=0)

    def test_counts_flops(self):
        with FlopCounterMode(display=False) as counter:
            self.call(self.make(length=9), self.route("none"))
        assert counter.get_total_flops() == 9 * (2 * 2 * 9 * 4 * 3)

    @pytest.mark.parametrize("name", ["reference", "chunked"])
    def test_strong_decay_is_finite(self, name):
        """exp(delta A) underflows: the state is the last input, and no gradient is lost to inf or nan."""
        inputs = {key: x.float() for key, x in self.make(length=64).items()}
        inputs |= {"A": inputs["A"] - 200, "delta": inputs["delta"] + 10}
        got = self.gradients(name, inputs)
        assert all(x.isfinite().all() for x in (got.output, got.state, *got.grads.values()))

    def test_samples_do_not_depend_on_the_blocks_of_the_batch(self, monkeypatch):
        inputs = self.make(batch=5, length=40)
        want = self.gradients("chunked", inputs)
        monkeypatch.setattr(module, "numbers_at_a_time", lambda device: 2 * 24 * 16)  # two samples, one left over
        assert [b.stop - b.start for b in module._blocks(inputs["A"], 5)[0]] == [2, 2, 2]
        self.same(self.gradients("chunked", inputs), want, 1e-12)

    def test_memory_stays_below_the_states_of_all_steps(self):
        """The largest tensor of forward and backward is a small part of (B, K, L, D, N)."""
        torch.manual_seed(0)
        inputs = {key: x.float() for key, x in self.inputs(1, 2, 2048, 64, 16, 1).items()}
        everything = 2 * 2048 * 64 * 16
        grad, state = torch.randn(1, 2, 2048, 64), torch.randn(1, 2, 64, 16)
        arguments = [*inputs.values()]
        arguments.insert(8, True)
        arguments.append(None)

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


class TestLowRankSteps(Contract):
    """Step sizes made of R = 2 numbers a token."""

    recurrence, function = module._selective_scan, selective_scan
    tokens, options = TestSelectiveScan.tokens, TestSelectiveScan.options
    resize_chunks = TestSelectiveScan.resize_chunks

    def inputs(self, batch, routes, length, channels=4):
        full = TestSelectiveScan.inputs(self, batch, routes, length, channels)
        return full | {"delta": noise(batch, routes, length, 2), "delta_weight": noise(routes, channels, 2)}

    @pytest.mark.parametrize("weights", [1, 2])
    @pytest.mark.parametrize("steps", [1, 2])
    @pytest.mark.parametrize("name", ["reference", "chunked", "picked"])
    def test_are_the_product(self, name, steps, weights):
        """One weight for all routes or one a route, numbers that the routes share or not; gradients too."""
        inputs = self.make(length=23)
        inputs |= {"delta": inputs["delta"][:, :steps], "delta_weight": inputs["delta_weight"][:weights]}
        leaves = {key: x.float().requires_grad_() for key, x in inputs.items()}
        given = {key: x for key, x in leaves.items() if key != "delta_weight"}
        full = (leaves["delta"] @ leaves["delta_weight"].mT).expand(-1, 2, -1, -1)
        with form(name):
            got, want = self.call(leaves)[0], self.call(given | {"delta": full})[0]
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        grads = [torch.autograd.grad(y.square().sum(), list(leaves.values()), retain_graph=True) for y in (got, want)]
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-3)

    def test_are_not_stored(self):
        """What the forward keeps for the backward is as narrow as what it was given."""
        inputs = {key: x.float().requires_grad_() for key, x in self.inputs(2, 4, 64, channels=32).items()}
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x):
            self.call(inputs)
        assert kept.count((2, 4, 64, 32)) == 2  # u and z

    def test_counts_flops(self):
        with FlopCounterMode(display=False) as counter:
            self.call(self.make(length=9))
        assert counter.get_total_flops() == 9 * (2 * 2 * 9 * 4 * 3) + 2 * (2 * 2 * 9 * 4 * 2)
