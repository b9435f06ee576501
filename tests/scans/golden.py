"""Golden data of the recurrences: tests/parity/data/mixer__NAME.{json,npz}, made with the originals in float64.

from .golden import cases, check

@pytest.mark.parametrize("case", cases("mixer__gla"), ids=str)
def test_golden(case):
    def run(q, k, v, g, h0):  # the golden inputs by name, float64 and requiring gradients
        q, k, v, g = (x.unsqueeze(1) for x in (q, k, v, g))
        o, state = gla(q, k, v, g, initial_state=h0.unsqueeze(1), return_final_state=True)
        return o.squeeze(1), state.squeeze(1)
    check(case, run)
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.parity import recipe

PARITY = Path(__file__).resolve().parents[1] / "parity"

# The words of an input's `value`, as "-exp(0.5*noise)".
_FUNCTIONS = {
    "exp": torch.exp,
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
    "log_sigmoid": F.logsigmoid,
    "l2norm": lambda x: x.norm(dim=-1, keepdim=True),
}


@dataclass
class Case:
    """One golden case.

    Attributes:
        stem, name: "mixer__gla", "a".
        dims: sizes by letter (B T H K V).
        salt: of the noise that made inputs and output gradients.
        inputs: float64, in the original's layout (time first, no route axis).
        outputs: what the original gave, in the manifest's order: the output, then final states.
        grads: by input, of sum(output * noise).
        state_grads: by input, of sum(output * noise) + sum(final state * noise); empty where the original has none.
    """

    stem: str
    name: str
    dims: dict[str, int]
    salt: int
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    grads: dict[str, Tensor]
    state_grads: dict[str, Tensor]

    def __str__(self):
        return f"{self.stem}-{self.name}"

    def noise(self, key: str, shape) -> Tensor:
        return torch.from_numpy(recipe.noise(key, shape, self.salt))


def cases(stem: str) -> list[Case]:
    """The cases of tests/parity/data/STEM.json."""
    manifest = json.loads((PARITY / "data" / f"{stem}.json").read_text())
    with np.load(PARITY / "data" / manifest["npz"]) as arrays:
        stored = {key: torch.from_numpy(arrays[key]).double() for key in arrays}

    def starting(prefix: str) -> dict[str, Tensor]:
        return {key.removeprefix(prefix): value for key, value in stored.items() if key.startswith(prefix)}

    found = []
    for name, entry in manifest["cases"].items():
        inputs = {}
        for key, spec in entry["inputs"].items():
            noise = torch.from_numpy(recipe.noise(key, spec["shape"], entry["salt"]))
            inputs[key] = eval(spec["value"], {"__builtins__": {}}, {**_FUNCTIONS, "noise": noise})
        outputs = {key: stored[f"{name}.{key}"] for key in entry["outputs"]}
        grads = starting(f"{name}.grad_"), starting(f"{name}.gradh_")
        found.append(Case(stem, name, entry["dims"], entry["salt"], inputs, outputs, *grads))
    return found


def gap(got: Tensor, want: Tensor) -> float:
    """Largest difference relative to the largest value of `want`; inf where `got` is not finite."""
    assert got.shape == want.shape, f"shape {tuple(got.shape)}, golden {tuple(want.shape)}"
    got, want = got.detach().double(), want.double()
    if not got.isfinite().all():
        return float("inf")
    return ((got - want).abs().max() / want.abs().max().clamp_min(1e-30)).item()


def check(case: Case, function, dtype: torch.dtype = torch.float64, gradients: bool = True) -> None:
    """Holds `function` against a golden case: outputs, final states and the gradients of all inputs.

    Args:
        case: the golden case.
        function: (**inputs) -> output, or a tuple in the order of `case.outputs` (it may leave out trailing ones), in
            the golden layout.
        dtype: float64 must agree to 1e-9 (gradients, stored as float32: 1e-6), float32 to 1e-4.
        gradients: also compare gradients.
    """
    exact = dtype == torch.float64
    inputs = {key: x.to(dtype).requires_grad_(gradients) for key, x in case.inputs.items()}
    results = function(**inputs)
    results = (results,) if isinstance(results, Tensor) else results
    errors = {key: gap(got, want) for (key, want), got in zip(case.outputs.items(), results)}
    failed = {key: error for key, error in errors.items() if not error <= (1e-9 if exact else 1e-4)}
    assert not failed, f"{case}: outputs differ: {failed}"
    if not gradients:
        return
    noises = ["do", "dht"]
    losses = [(x * case.noise(key, x.shape).to(dtype)).sum() for key, x in zip(noises, results)]
    wanted = [case.grads]
    if len(losses) > 1 and case.state_grads:
        wanted.append(case.state_grads)
    for n, grads in enumerate(wanted, 1):
        got = torch.autograd.grad(sum(losses[:n]), [inputs[key] for key in grads], retain_graph=True)
        errors = {key: gap(g, want) for (key, want), g in zip(grads.items(), got)}
        failed = {key: error for key, error in errors.items() if not error <= (1e-6 if exact else 1e-4)}
        assert not failed, f"{case}: {'gradients with the final state' if n > 1 else 'gradients'} differ: {failed}"
