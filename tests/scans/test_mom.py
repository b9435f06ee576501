"""Mixture of memories: golden data, and what a memory is."""

import pytest
import torch

from linescan.scans import gated_delta_rule, gla, mom_gated_delta_rule, mom_gla
from linescan.scans.recurrence import backend

from .golden import cases, check
from .tools import FORMS, case


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("golden", [*cases("mixer__mom_gated_delta_rule"), *cases("mixer__mom_gla")], ids=str)
def test_golden(golden, form):
    def run(logits, q, k, v, g, h0, beta=None, ks=None, vs=None, gs=None, betas=None, h0s=None):
        if beta is None:
            tokens = (x.unsqueeze(1) for x in (q, logits, k, v, g))
            o, state = mom_gla(*tokens, golden.dims["N"], initial_state=h0.unsqueeze(1), return_final_state=True)
            return o.squeeze(1), state.squeeze(1)
        own, shared = (k, v, g, beta), (ks, vs, gs, betas)
        tokens = [torch.cat((x, y.unsqueeze(2)), 2).unsqueeze(1) for x, y in zip(own, shared)]
        state = torch.cat((h0, h0s.unsqueeze(1)), 1).unsqueeze(1)
        o, state = mom_gated_delta_rule(
            q.unsqueeze(1), logits.unsqueeze(1), *tokens, golden.dims["N"], initial_state=state, return_final_state=True
        )
        return o.squeeze(1), state[:, 0, :-1], state[:, 0, -1]

    with backend(form):
        check(golden, run)
        check(golden, run, torch.float32)


@pytest.mark.parametrize("name, core", [("mom_gla", gla), ("mom_gated_delta_rule", gated_delta_rule)])
def test_memories_that_all_get_every_token_are_heads(name, core):
    """With equal logits and every memory chosen: the mean of as many recurrences, and the shared one."""
    inputs = case(name).make(length=12)
    inputs["logits"] = torch.zeros_like(inputs["logits"])
    state = inputs.pop("initial_state")
    o, last = case(name).public.function(**inputs, top=3, initial_state=state, return_final_state=True)
    outputs = []
    for e in range(4):
        own = {key: inputs[key][:, :, :, e] for key in inputs if key not in ("q", "logits")}
        y, end = core(inputs["q"], **own, initial_state=state[:, :, e], return_final_state=True)
        torch.testing.assert_close(last[:, :, e], end)
        outputs.append(y)
    torch.testing.assert_close(o, sum(outputs[:3]) / 3 + outputs[3])


def test_a_memory_without_tokens_stays():
    """It neither decays nor changes, and still is among the final states."""
    inputs = case("mom_gla").make(length=12)
    inputs["logits"][..., 1] = -100
    _, state = mom_gla(**inputs, return_final_state=True)
    torch.testing.assert_close(state[:, :, 1], inputs["initial_state"][:, :, 1])
    assert (state != inputs["initial_state"])[:, :, [0, 2, 3]].all()


def test_impossible_mixtures_are_refused():
    inputs = case("mom_gla").make(length=5)
    with pytest.raises(ValueError, match="top is 1 to 3, the number of memories, got 4"):
        mom_gla(**inputs, top=4)
    with pytest.raises(ValueError, match="k has 4 memories, logits 2: give as many, or one more"):
        mom_gla(**inputs | {"logits": inputs["logits"][..., :2]})
