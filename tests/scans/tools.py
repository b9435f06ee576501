"""What tests of the recurrences share: cases from declared layouts, route tables of every kind, comparisons."""

from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from linescan.scans.recurrence import Public, backend, functions

from .example import EXAMPLE

ROUTES = ["none", "permutation", "padded", "repeated", "per_sample"]
FORMS = ["reference", "chunked"]

# How functions are called beside their defaults, where something would not be tested otherwise.
VARIANTS = {
    "causal_conv1d": [{}, dict(activation="silu")],
    "based": [dict(normalize=True), dict(normalize=False)],
    "example": [{}, dict(without=("reset", "taps"))],
    "hedgehog": [{}, dict(joint=True, without=("q_bias", "k_bias"))],
    "hedgehog_window": [dict(window=4)],
    "hgrn2": [dict(lower_bound=0.25)],
    "linear_attention": [{}, dict(normalize=True)],
    "selective_scan": [dict(delta_softplus=True), dict(delta_softplus=True, without=("delta_weight",))],
    "ssd": [dict(dt_softplus=True)],
    "vittt_conv": [dict(grid=(7, 1))],
    "titans_memory": [dict(chunk=2, per_batch=2), dict(chunk=3, hidden=3, clip=0.5)],
    "ttt_linear_fla": [dict(mini_batch=3)],
}


@dataclass(frozen=True)
class Case:
    """A public function under test, with some of its options.

    Attributes:
        public: the function with its layout.
        options: what else it is called with.
        without: optional tensors that are left out.
    """

    public: Public
    options: dict = field(default_factory=dict)
    without: tuple = ()

    def __str__(self) -> str:
        parts = [self.public.name, *(f"{key}={value}" for key, value in self.options.items())]
        return "-".join([*parts, *(f"no {name}" for name in self.without)])

    @property
    def layout(self):
        return self.public.layout

    @property
    def recurrence(self):
        return self.public.recurrence

    @property
    def tokens(self) -> list[str]:
        return self.layout.tokens

    @property
    def float_tokens(self) -> list[str]:
        """Those that have a gradient."""
        there = [name for name in self.tokens if name not in self.without]
        return [name for name in there if self.layout.arguments[name].kind == "float"]

    @property
    def states(self) -> list[str]:
        return list(self.layout.states)

    def make(self, batch=2, routes=2, length=7, seed=0, without=(), **options) -> dict[str, Tensor]:
        """All tensor inputs by name, float64 unless a dtype is named."""
        generator = torch.Generator().manual_seed(seed)
        options = (
            dict(extra=1) | {key: value for key, value in self.options.items() if type(value) in (bool, int)} | options
        )
        without = (*self.without, *without)
        return self.layout.example(batch, routes, length, generator=generator, without=without, **options)

    def __call__(self, inputs, route=None, merge=None, **options) -> tuple[Tensor, ...]:
        """(output, *final states)."""
        if self.recurrence is not None:
            options |= dict(route=route, merge=merge)
        if self.states:
            options["return_final_state"] = True
            if len(self.states) > 1:
                given = tuple([inputs[name] for name in self.states if name in inputs])
                inputs = {key: x for key, x in inputs.items() if key not in self.states}
                inputs |= {"initial_state": given or None}
        results = self.public.function(**inputs, **self.options | options)
        if not self.states:
            return (results,)
        output, state = results
        return (output, *state) if isinstance(state, tuple) else (output, state)

    def resumed(self, before: int) -> dict:
        """Options of a call that continues after `before` tokens."""
        return dict(position=before) if "position" in self.layout.parameters else {}


CASES = [
    Case(public, {key: value for key, value in options.items() if key != "without"}, options.get("without", ()))
    for name, public in [*functions().items(), ("example", EXAMPLE)]
    for options in VARIANTS.get(name, [{}])
]
RECURRENT = [case for case in CASES if case.recurrence is not None]
CAUSAL = [case for case in RECURRENT if case.states]


def case(name: str) -> Case:
    """The first case of a function."""
    return next(case for case in CASES if case.public.name == name)


def bits(inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The floating-point ones in another dtype."""
    return {key: x.to(dtype) if x.is_floating_point() else x for key, x in inputs.items()}


def form(name: str):
    """The implementation `name`, or with "picked" the one that a user gets."""
    return nullcontext() if name == "picked" else backend(name)


def noise(*shape, scale: float = 1.0, offset: float = 0.0) -> Tensor:
    return offset + scale * torch.randn(*shape, dtype=torch.float64)


# -- route tables -----------------------------------------------------------------------------------------------------


def table(kind: str, batch: int, routes: int, length: int, seed: int = 0) -> Tensor | None:
    """A random route table.

    none; permutation (K, L); padded: three more steps of padding anywhere; repeated: some tokens read more than once,
    others never written, with padding too; per_sample: as repeated, (B, K, S).
    """
    generator = torch.Generator().manual_seed(seed)

    def one():
        order = torch.randperm(length, generator=generator)
        if kind == "permutation":
            return order
        extra = torch.full((3,), -1)
        if kind != "padded":
            extra = torch.cat((extra, -2 - torch.randint(length, (3,), generator=generator)))
            order = torch.where(torch.rand(length, generator=generator) < 0.2, -2 - order, order)
        order = torch.cat((order, extra))
        return order[torch.randperm(len(order), generator=generator)]

    if kind == "none":
        return None
    if kind == "per_sample":
        return torch.stack([torch.stack([one() for _ in range(routes)]) for _ in range(batch)]).int()
    return torch.stack([one() for _ in range(routes)]).int()


def steps_of(route: Tensor, b: int, k: int) -> list[int]:
    return (route[b, k] if route.ndim == 3 else route[k]).tolist()


def gather(x: Tensor, route: Tensor, routes: int) -> Tensor:
    """x (B, K or 1, L, ...) in the order of the route, token by token."""
    rows = []
    for b in range(len(x)):
        for k in range(routes):
            source = x[b, k if x.shape[1] > 1 else 0]
            rows.append(
                torch.stack([source[t] if t >= 0 else torch.zeros_like(source[0]) if t == -1 else source[-t - 2]
                             for t in steps_of(route, b, k)])
            )  # fmt: skip
    return torch.stack(rows).unflatten(0, (len(x), routes))


def scatter(y: Tensor, route: Tensor, length: int) -> Tensor:
    """The inverse: y (B, K, S, ...) -> (B, K, L, ...), zeros where no step writes."""
    out = y.new_zeros(*y.shape[:2], length, *y.shape[3:])
    for b in range(y.shape[0]):
        for k in range(y.shape[1]):
            for t, token in enumerate(steps_of(route, b, k)):
                if token >= 0:
                    out[b, k, token] = y[b, k, t]
    return out


# -- comparisons ------------------------------------------------------------------------------------------------------


def results(case, name: str, inputs, route=None, merge=None, of=("output", "state"), **options) -> dict[str, Tensor]:
    """Output, states and the gradients of all inputs under the implementation `name`.

    Args:
        of: of what the gradients are: the output, the states or both, each times noise.
    """
    inputs = {key: x.detach().clone().requires_grad_() if x.is_floating_point() else x for key, x in inputs.items()}
    leaves = {key: x for key, x in inputs.items() if x.requires_grad}
    with form(name):
        output, *states = case(inputs, route, merge, **options)
        generator = torch.Generator().manual_seed(1)
        loss = 0
        for key, x in (("output", output), *(("state", state) for state in states)):
            noise = torch.randn(x.shape, dtype=torch.float64, generator=generator).to(x.dtype)
            if key in of or not states:
                loss = loss + (x * noise).sum()
        grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    named = {"output": output} | {f"final {name}": x for name, x in zip(case.states, states)}
    return named | {f"gradient of {key}": grad for key, grad in zip(leaves, grads)}


def error(got: Tensor, want: Tensor, floor: float = 1e-3) -> float:
    """Largest difference relative to the largest value; what is zero in exact arithmetic has no scale of its own."""
    assert got.shape == want.shape, f"shape {tuple(got.shape)}, not {tuple(want.shape)}"
    if not want.numel():
        return 0.0
    return ((got.double() - want.double()).abs().max() / want.double().abs().max().clamp_min(floor)).item()


def same(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float, floor: float = 1e-3) -> None:
    """Every result is finite and has at most that error."""
    assert got.keys() == want.keys()
    errors = {key: error(got[key], want[key], floor) for key in want}
    bad = {key: value for key, value in errors.items() if not value <= tolerance}
    assert not bad, bad
