"""What every recurrence promises, as a class of tests: subclass `Contract` in a test file and say how to make inputs.

class TestSSD(Contract):
    recurrence, function = _ssd, ssd
    tokens = ("x", "dt", "B", "C", "z")

    def inputs(self, batch, routes, length): ...
"""

from contextlib import nullcontext
from dataclasses import dataclass

import pytest
import torch
from golden import gap
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from linescan.scans.recurrence import backend

ROUTES = ["none", "permutation", "padded", "repeated", "per_sample"]
quick = settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))


def form(name: str):
    """The implementation `name`, or with "picked" the one that a user gets."""
    return nullcontext() if name == "picked" else backend(name)


def noise(*shape, scale: float = 1.0, offset: float = 0.0) -> Tensor:
    return offset + scale * torch.randn(*shape, dtype=torch.float64)


def table(kind: str, batch: int, routes: int, length: int) -> Tensor | None:
    """A random route table, seeded by torch's generator.

    none; permutation (K, L); padded: three more steps of padding anywhere; repeated: some tokens read more than once,
    others never written, with padding too; per_sample: as repeated, (B, K, S).
    """
    if kind == "none":
        return None

    def one():
        order = torch.randperm(length)
        if kind == "permutation":
            return order
        extra = torch.full((3,), -1)
        if kind != "padded":
            extra = torch.cat((extra, -2 - torch.randint(length, (3,))))
            order = torch.where(torch.rand(length) < 0.2, -2 - order, order)
        order = torch.cat((order, extra))
        return order[torch.randperm(len(order))]

    if kind == "per_sample":
        return torch.stack([torch.stack([one() for _ in range(routes)]) for _ in range(batch)]).int()
    return torch.stack([one() for _ in range(routes)]).int()


def gather(x: Tensor, route: Tensor, routes: int) -> Tensor:
    """x (B, K or 1, L, ...) in the order of the route, token by token."""
    rows = []
    for b in range(len(x)):
        for k in range(routes):
            steps = route[b, k] if route.ndim == 3 else route[k]
            source = x[b, k if x.shape[1] > 1 else 0]
            rows.append(
                torch.stack([source[t] if t >= 0 else torch.zeros_like(source[0]) if t == -1 else source[-t - 2]
                             for t in steps.tolist()])
            )  # fmt: skip
    return torch.stack(rows).unflatten(0, (len(x), routes))


def scatter(y: Tensor, route: Tensor, length: int) -> Tensor:
    """The inverse: y (B, K, S, ...) -> (B, K, L, ...), zeros where no step writes."""
    out = y.new_zeros(*y.shape[:2], length, *y.shape[3:])
    for b in range(y.shape[0]):
        for k in range(y.shape[1]):
            for t, token in enumerate((route[b, k] if route.ndim == 3 else route[k]).tolist()):
                if token >= 0:
                    out[b, k, token] = y[b, k, t]
    return out


class Wrapped(torch.nn.Module):
    """A recurrence as a module of positional tensors, for torch.export."""

    def __init__(self, call, names):
        super().__init__()
        self.call, self.names = call, names

    def forward(self, *tensors):
        return self.call(dict(zip(self.names, tensors)))


@dataclass
class Gradients:
    output: Tensor
    state: Tensor
    grads: dict[str, Tensor]


class Contract:
    """Tests of one recurrence.

    Attributes:
        recurrence: the registered operator, such as `_ssd`.
        function: the public function, such as `ssd`.
        tokens: names of the token inputs.
        options: what else `function` is called with.
        batch, routes, length: sizes of most tests.
    """

    recurrence = function = None
    tokens = ()
    options = {}
    batch, routes, length = 2, 2, 7

    def inputs(self, batch: int, routes: int, length: int) -> dict[str, Tensor]:
        """All tensor inputs of `function` by name, float64, `initial_state` among them."""
        raise NotImplementedError

    def resize_chunks(self, monkeypatch, size: int) -> None:
        """Makes the chunked form use chunks of `size` steps."""
        raise NotImplementedError

    # -- tools --------------------------------------------------------------------------------------------------

    def call(self, inputs, route=None, merge=None):
        """(output, final state)."""
        return type(self).function(**inputs, **self.options, route=route, merge=merge, return_final_state=True)

    def make(self, seed=0, **sizes) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        return self.inputs(*({"batch": self.batch, "routes": self.routes, "length": self.length} | sizes).values())

    def route(self, kind: str) -> Tensor | None:
        return table(kind, self.batch, self.routes, self.length)

    def gradients(self, name, inputs, route=None, merge=None, of=("output", "state")) -> Gradients:
        inputs = {key: x.detach().clone().requires_grad_() for key, x in inputs.items()}
        with form(name):
            results = dict(zip(("output", "state"), self.call(inputs, route, merge)))
            torch.manual_seed(1)
            noises = {key: torch.randn(x.shape, dtype=torch.float64).to(x.dtype) for key, x in results.items()}
            loss = sum((results[key] * noises[key]).sum() for key in of)
            grads = torch.autograd.grad(loss, list(inputs.values()), allow_unused=True, materialize_grads=True)
        return Gradients(results["output"], results["state"], dict(zip(inputs, grads)))

    @staticmethod
    def same(got: Gradients, want: Gradients, tolerance: float) -> None:
        pairs = {"output": (got.output, want.output), "state": (got.state, want.state)}
        pairs |= {f"gradient of {key}": (got.grads[key], want.grads[key]) for key in want.grads}
        # a gradient that is zero in exact arithmetic has no scale of its own
        errors = {k: ((a.double() - b.double()).abs().max() / b.abs().max().clamp_min(1e-3)).item()
                  for k, (a, b) in pairs.items() if b.numel()}  # fmt: skip
        bad = {key: error for key, error in errors.items() if not error <= tolerance}
        assert not bad, bad

    # -- the promises -------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("kind", ROUTES)
    def test_a_route_is_permute_scan_unpermute(self, kind):
        inputs, route = self.make(), self.route(kind)
        with backend("reference"):
            output, state = self.call(inputs, route)
            if route is None:
                route = torch.arange(self.length).expand(self.routes, -1)
            ordered = {key: gather(x, route, self.routes) if key in self.tokens else x for key, x in inputs.items()}
            want, want_state = self.call(ordered)
        torch.testing.assert_close(output, scatter(want, route, self.length), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(state, want_state, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("merge", [None, "sum"])
    @pytest.mark.parametrize("kind", ROUTES)
    @pytest.mark.parametrize("name", ["reference", "chunked"])
    def test_gradcheck(self, name, kind, merge):
        inputs, route = self.make(), self.route(kind)
        tensors = [x.requires_grad_() for x in inputs.values()]
        with backend(name):
            assert torch.autograd.gradcheck(
                lambda *x: self.call(dict(zip(inputs, x)), route, merge), tensors, fast_mode=True
            )

    @pytest.mark.parametrize("kind", ["none", "per_sample"])
    def test_second_derivative_of_the_reference(self, kind):
        inputs, route = self.make(batch=2, routes=2, length=4), table(kind, 2, 2, 4)
        tensors = [x.requires_grad_() for x in inputs.values()]
        with backend("reference"):
            assert torch.autograd.gradgradcheck(
                lambda *x: self.call(dict(zip(inputs, x)), route), tensors, fast_mode=True
            )

    def test_no_second_derivative_of_fast_forms(self):
        inputs = {key: x.requires_grad_() for key, x in self.make().items()}
        with backend("chunked"):
            grads = torch.autograd.grad(self.call(inputs)[0].sum(), list(inputs.values()), create_graph=True)
            with pytest.raises(RuntimeError, match="no second derivative.*backend\\('reference'\\)"):
                sum(g.sum() for g in grads).backward()

    @pytest.mark.parametrize("of", [("output",), ("state",), ("output", "state")], ids="+".join)
    @pytest.mark.parametrize("kind", ROUTES)
    def test_chunked_is_the_definition(self, kind, of):
        inputs, route = self.make(length=self.length), self.route(kind)
        want = self.gradients("reference", inputs, route, of=of)
        self.same(self.gradients("chunked", inputs, route, of=of), want, 1e-9)

    @pytest.mark.parametrize("of", [("output",), ("output", "state")], ids="+".join)
    @pytest.mark.parametrize("kind", ROUTES)
    def test_what_users_get_is_the_definition(self, kind, of):
        """float32, which kernels may serve."""
        inputs, route = self.make(length=self.length), self.route(kind)
        want = self.gradients("reference", inputs, route, "sum", of=of)
        self.same(self.gradients("picked", {k: x.float() for k, x in inputs.items()}, route, "sum", of=of), want, 1e-4)

    @given(seed=st.integers(0, 2**16), length=st.integers(1, 90), kind=st.sampled_from(ROUTES))
    @quick
    def test_chunked_is_the_definition_at_any_length(self, seed, length, kind):
        inputs, route = self.make(seed, length=length), table(kind, self.batch, self.routes, length)
        want = self.gradients("reference", inputs, route, "sum")
        self.same(self.gradients("chunked", inputs, route, "sum"), want, 1e-9)

    @pytest.mark.parametrize("size", [1, 2, 5, 16, 64])
    def test_chunk_size_does_not_matter(self, size, monkeypatch):
        inputs = self.make(length=37)
        want = self.gradients("chunked", inputs)
        self.resize_chunks(monkeypatch, size)
        self.same(self.gradients("chunked", inputs), want, 1e-9)

    @given(seed=st.integers(0, 2**16), first=st.integers(1, 30), second=st.integers(1, 30))
    @quick
    def test_a_split_sequence_is_the_whole(self, seed, first, second):
        whole = self.make(seed, length=first + second)
        left, right = ({k: x[:, :, part] if k in self.tokens else x for k, x in whole.items()}
                       for part in (slice(first), slice(first, None)))  # fmt: skip
        for name in ("reference", "chunked"):
            with backend(name):
                output, state = self.call(whole)
                y_left, carried = self.call(left)
                y_right, last = self.call(right | {"initial_state": carried})
            torch.testing.assert_close(torch.cat((y_left, y_right), 2), output, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(last, state, rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize("name", ["reference", "chunked"])
    def test_shared_tokens_are_expanded_tokens(self, name):
        inputs, route = self.make(), self.route("repeated")
        shared = {key: x[:, :1] if key in self.tokens else x for key, x in inputs.items()}
        expanded = {k: x.expand(-1, self.routes, *x.shape[2:]) if k in self.tokens else x for k, x in shared.items()}
        got, want = self.gradients(name, shared, route), self.gradients("reference", expanded, route)
        want.grads |= {key: want.grads[key].sum(1, keepdim=True) for key in self.tokens}
        self.same(got, want, 1e-9)

    @pytest.mark.parametrize("name", ["reference", "chunked"])
    def test_merge_adds_the_routes(self, name):
        inputs, route = self.make(), self.route("repeated")
        with backend(name):
            torch.testing.assert_close(self.call(inputs, route, "sum")[0], self.call(inputs, route)[0].sum(1))
        with pytest.raises(ValueError, match="merge is None .* or 'sum', got 'mean'"):
            self.call(inputs, route, "mean")

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("name", ["reference", "chunked"])
    def test_half_inputs_keep_a_float_state(self, name, dtype):
        inputs = {key: x.to(dtype) for key, x in self.make(length=37).items()}
        exact = self.gradients("reference", {key: x.double() for key, x in inputs.items()})
        got = self.gradients(name, inputs)
        assert got.output.dtype == dtype and got.state.dtype == torch.float32
        assert all(g.dtype == dtype for g in got.grads.values())
        assert gap(got.state, exact.state) < 1e-5  # rounding of the inputs aside, nothing is computed in half
        assert gap(got.output, exact.output) < 2 * torch.finfo(dtype).eps

    @pytest.mark.parametrize("name", ["reference", "chunked"])
    def test_autocast_changes_nothing(self, name):
        inputs = {key: x.float() for key, x in self.make().items()}
        route = self.route("repeated")
        want = self.gradients(name, inputs, route)
        with torch.autocast("cpu", torch.bfloat16):
            got = self.gradients(name, inputs, route)
        assert got.output.dtype == torch.float32
        self.same(got, want, 0)

    def test_opcheck(self):
        for route, merge in ((None, None), (self.route("repeated"), "sum")):
            seen = []
            with pytest.MonkeyPatch.context() as patch:
                operator = self.recurrence.operator
                patch.setattr("linescan.scans.recurrence.is_plain", lambda inputs: False)  # through the dispatcher
                patch.setattr(self.recurrence, "operator", lambda *args: seen.append(args) or operator(*args))
                self.call({key: x.requires_grad_() for key, x in self.make().items()}, route, merge)
            torch.library.opcheck(operator, seen[0])

    def test_compile(self):
        torch._dynamo.reset()
        inputs, route = self.make(), self.route("repeated")
        inputs = {key: x.requires_grad_() for key, x in inputs.items()}
        compiled = torch.compile(lambda x: self.call(x, route, "sum")[0] * 2, fullgraph=True, backend="aot_eager")
        want = self.call(inputs, route, "sum")[0] * 2
        got = compiled(inputs)
        torch.testing.assert_close(got, want)
        grads = [torch.autograd.grad(y.sum(), list(inputs.values()), allow_unused=True) for y in (got, want)]
        torch.testing.assert_close(*grads)

    def test_export(self):
        inputs, route = self.make(), self.route("repeated")
        module = Wrapped(lambda x: self.call(x, route, "sum"), list(inputs))
        exported = torch.export.export(module, tuple(inputs.values()))
        nodes = [node for node in exported.graph.nodes if "linescan" in str(node.target)]
        assert len(nodes) == 1
        torch.testing.assert_close(exported.module()(*inputs.values()), module(*inputs.values()))

    @pytest.mark.parametrize("route, message", [
        (torch.zeros(2, 7), "integer table"),
        (torch.zeros(7, dtype=torch.int32), "integer table"),
        (torch.zeros(3, 7, dtype=torch.int32), "with K = 3, got"),
        (torch.zeros(3, 2, 7, dtype=torch.int32), "3 samples"),
    ], ids=["float", "1d", "routes", "samples"])  # fmt: skip
    def test_a_bad_route_is_named(self, route, message):
        with pytest.raises(ValueError, match=message):
            self.call(self.make(), route)

    def test_a_bad_shape_is_named(self):
        for key, x in self.make().items():
            with pytest.raises(ValueError, match=rf"\b{key} is \("):
                self.call(self.make() | {key: x[..., None]})
