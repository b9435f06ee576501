"""Laws that every recurrence obeys, as checks of a `Mixer`; a test file declares its mixers and runs `LAWS` over them.

MIXERS = [Mixer(gla, "gla", lambda make: dict(q=make(H, 4), k=make(H, 4), v=make(H, 3), g=gate(make(H, 4))))]

@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("mixer", MIXERS, ids=str)
def test_law(mixer, law):
    law(mixer)
"""

from dataclasses import dataclass
from typing import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from linescan.scans.recurrence import backend, recurrences

FORMS = ("reference", "chunked")


@dataclass
class Mixer:
    """A recurrence under test.

    Attributes:
        function: the public function, of its tokens by name and initial_state, route, merge, return_final_state.
        op: the operator's name.
        tokens: make -> token inputs by name, where make(*axes) is noise (B, K, L, *axes).
        resume: (state, tokens before) -> keywords that continue from a state.
        name: what tests call it.
    """

    function: Callable
    op: str
    tokens: Callable
    resume: Callable = lambda state, before: {"initial_state": state}
    name: str = ""

    def __str__(self):
        return self.name or self.op

    def inputs(self, B=2, K=1, L=37, dtype=torch.float64, seed=0) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        tokens = self.tokens(lambda *axes: torch.randn(B, K, L, *axes, dtype=torch.float64, generator=generator))
        return {name: x.to(dtype) for name, x in tokens.items()}

    def __call__(self, tokens, state=None, before=0, **options):
        resumed = {} if state is None else self.resume(state, before)
        return self.function(**tokens, **resumed, return_final_state=True, **options)


def gate(x: Tensor) -> Tensor:
    return F.logsigmoid(2 * x)


def close(got, want, tolerance=1e-9):
    assert len(got) == len(want)
    for a, b in zip(got, want):
        assert a.shape == b.shape
        assert torch.isfinite(a).all()
        gap = (a.double() - b.double()).abs().max() / b.double().abs().max().clamp_min(1)
        assert gap <= tolerance, f"differs by {gap.item():.1e}"


def results(mixer, tokens, form, state=None, before=0, **options) -> list[Tensor]:
    """Output, final state, and the gradients of a mixed loss of both with respect to all inputs."""
    leaves = {name: x.detach().requires_grad_() for name, x in tokens.items()}
    inputs = [*leaves.values()]
    if state is not None:
        state = state.detach().requires_grad_()
        inputs.append(state)
    with backend(form):
        output, final = mixer(leaves, state, before, **options)
        weight = torch.cos(torch.arange(output.numel())).reshape(output.shape)
        loss = (output.double() * weight).sum() + final.double().square().sum() / 2
        return [output, final, *torch.autograd.grad(loss, inputs)]


def forms_agree(mixer):
    """The chunked form computes the definition, from a state or from none, at any length."""
    for length, before in ((1, 0), (2, 5), (37, 0), (64, 3), (150, 21)):
        state = None
        if before:
            state = mixer(mixer.inputs(L=before, seed=1))[1]
        tokens = mixer.inputs(L=length)
        close(*(results(mixer, tokens, form, state, before) for form in FORMS))


def state_carries(mixer):
    """Two halves with the state carried over are the whole."""
    tokens, cut = mixer.inputs(L=45), 19
    for form in FORMS:
        with backend(form):
            whole, final = mixer(tokens)
            first, state = mixer({name: x[:, :, :cut] for name, x in tokens.items()})
            rest, last = mixer({name: x[:, :, cut:] for name, x in tokens.items()}, state, cut)
        close((torch.cat((first, rest), 2), last), (whole, final))


def routes_permute(mixer):
    """A scan along routes is permute, scan, unpermute; with one table for all samples or one each, merged or not."""
    B, K, L = 2, 3, 21
    generator = torch.Generator().manual_seed(0)
    own = torch.stack([torch.stack([torch.randperm(L, generator=generator) for _ in range(K)]) for _ in range(B)])
    for route in (own[0], own):
        for shared in (True, False):
            tokens = mixer.inputs(B=B, K=1 if shared else K, L=L)
            got = {form: results(mixer, tokens, form, route=route.int()) for form in FORMS}
            close(got["chunked"], got["reference"])
            output, state = got["reference"][:2]
            for b in range(B):
                for k in range(K):
                    order = route[b, k] if route.ndim == 3 else route[k]
                    one = {name: x[b : b + 1, [0 if shared else k]][:, :, order] for name, x in tokens.items()}
                    want, last = mixer(one)
                    close((output[b, k, order], state[b, k]), (want[0, 0], last[0, 0]))
            merged = results(mixer, tokens, "chunked", route=route.int(), merge="sum")[0]
            close([merged], [output.sum(1)])


def padding_steps(mixer):
    """-1 is a zero token whose output is dropped, -(i + 2) reads token i without writing; the unvisited stay zero."""
    tokens = mixer.inputs(L=6)
    route = torch.tensor([[4, -1, 0, -(3 + 2), 3, 1, -1]])
    steps = {name: F.pad(x, [0, 0] * (x.ndim - 3) + [0, 1])[:, :, [4, 6, 0, 3, 3, 1, 6]] for name, x in tokens.items()}
    written, state = mixer(steps)
    for form in FORMS:
        got = results(mixer, tokens, form, route=route)
        output = torch.zeros_like(got[0])
        output[:, :, [4, 0, 3, 1]] = written[:, :, [0, 2, 4, 5]]
        close(got[:2], (output, state))
        for gradient in got[2:]:
            assert not gradient[:, :, [2, 5]].any()
            assert gradient[:, :, [4, 0, 3]].any()


def gradients_hold(mixer):
    """Finite differences agree, once in every form and twice in the definition."""
    tokens = mixer.inputs(B=1, L=6)
    state = mixer(mixer.inputs(B=1, L=3, seed=1))[1]
    names = list(tokens)
    inputs = [x.requires_grad_() for x in (*tokens.values(), state)]

    def function(*inputs):
        return mixer(dict(zip(names, inputs)), inputs[-1], 3)

    for form in FORMS:
        with backend(form):
            assert torch.autograd.gradcheck(function, inputs)
    with backend("reference"):
        assert torch.autograd.gradgradcheck(function, inputs)


def half_precision(mixer):
    """bfloat16 inputs give bfloat16 outputs, a float32 state, and the numbers of the same inputs in float32."""
    tokens = mixer.inputs(L=70, dtype=torch.bfloat16)
    for form in FORMS:
        got = results(mixer, tokens, form)
        assert got[1].dtype == torch.float32 and all(x.dtype == torch.bfloat16 for x in (got[0], *got[2:]))
        wide = results(mixer, {name: x.float() for name, x in tokens.items()}, form)
        close(got[1:2], wide[1:2], 1e-5)
        close(got[:1], [wide[0].bfloat16()], 1e-2)
        close(got[2:], wide[2:], 2e-2)


def operator_is_sound(mixer):
    """Schema, fake form, autograd registration and compilation."""
    calls = []
    op = recurrences()[mixer.op]
    registered = op.operator
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(op, "operator", lambda *args: calls.append(args) or registered(*args))
        patch.setattr("linescan.scans.recurrence.is_plain", lambda inputs: False)  # through the dispatcher
        tokens = {name: x.requires_grad_() for name, x in mixer.inputs(L=5).items()}
        mixer(tokens, route=torch.tensor([[4, 3, 2, 1, 0]]))
    torch.library.opcheck(registered, calls[0])
    tokens = mixer.inputs(L=9, dtype=torch.float32)
    torch.compiler.reset()  # or the mixers before count as recompilations of this one
    compiled = torch.compile(lambda tokens: mixer(tokens), backend="aot_eager", fullgraph=True)
    close(compiled(tokens), mixer(tokens), 1e-6)


LAWS = [
    forms_agree,
    state_carries,
    routes_permute,
    padding_steps,
    gradients_hold,
    half_precision,
    operator_is_sound,
]
