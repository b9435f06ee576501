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
        all_grads: by input, of the sum over all outputs x of sum(x * noise), where there are several states.
        largest: by array, the largest absolute value of the whole where a sample is kept.
    """

    stem: str
    name: str
    dims: dict[str, int]
    salt: int
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    grads: dict[str, Tensor]
    state_grads: dict[str, Tensor]
    all_grads: dict[str, Tensor]
    largest: dict[str, float]

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
        grads = [starting(f"{name}.{kind}_") for kind in ("grad", "gradh", "gradall")]
        largest = entry.get("largest", {})
        found.append(Case(stem, name, entry["dims"], entry["salt"], inputs, outputs, *grads, largest))
    return found


def gap(got: Tensor, want: Tensor, largest: float | None = None) -> float:
    """Largest difference relative to the largest value of `want`; inf where `got` is not finite.

    `want` may be a sample of the flattened array, at even strides, of which `largest` is the largest value.
    """
    got, want = got.detach().double(), want.double()
    if not got.isfinite().all():
        return float("inf")
    if want.ndim == 1 and got.shape != want.shape:
        got = got.flatten()[:: -(-got.numel() // len(want))]
    assert got.shape == want.shape, f"shape {tuple(got.shape)}, golden {tuple(want.shape)}"
    return (got - want).abs().max().item() / max(largest or want.abs().max().item(), 1e-30)


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
    inputs = {
        key: x.to(dtype).requires_grad_(gradients) if x.is_floating_point() else x for key, x in case.inputs.items()
    }
    results = function(**inputs)
    results = (results,) if isinstance(results, Tensor) else results
    named = dict(zip(case.outputs, results))
    errors = {key: gap(got, case.outputs[key], case.largest.get(key)) for key, got in named.items()}
    failed = {key: error for key, error in errors.items() if not error <= (1e-9 if exact else 1e-4)}
    assert not failed, f"{case}: outputs differ: {failed}"
    if not gradients:
        return
    losses = [(x * case.noise(f"d{key}", x.shape).to(dtype)).sum() for key, x in named.items()]
    kinds = ("grad", 1, case.grads), ("gradh", 2, case.state_grads), ("gradall", len(case.outputs), case.all_grads)
    for kind, n, grads in kinds:
        if not grads or len(losses) < n:
            continue
        got = torch.autograd.grad(sum(losses[:n]), [inputs[key] for key in grads], retain_graph=True)
        largest = [case.largest.get(f"{kind}_{key}") for key in grads]
        errors = {key: gap(*pair) for key, *pair in zip(grads, got, grads.values(), largest)}
        failed = {key: error for key, error in errors.items() if not error <= (1e-6 if exact else 1e-4)}
        assert not failed, f"{case}: gradients of {', '.join(list(named)[:n])} differ: {failed}"
