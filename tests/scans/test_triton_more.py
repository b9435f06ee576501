"""The Triton forms with plain torch around their kernels: in Triton's interpreter against the float64 definition, and
compiled for GPUs that are not there."""

import pytest
import torch

from .test_triton_forms import TOLERANCE, small
from .tools import bits, case, results, same, table
from .triton_tools import in_interpreter, no_stray_access  # noqa: F401  (a fixture)

PADDED = "per_sample", "sum", torch.float32, True  # route, merge, dtype, whether routes share their tokens
PLAIN = "none", None, torch.bfloat16, False
CALLS = [  # lengths of several chunks, the last of them full or not
    ("mlstm", 18, *PADDED),
    ("mlstm", 18, *PLAIN),
    ("mamba3", 18, *PLAIN),
    ("mamba3_mimo", 12, *PADDED),
    ("log_linear_attention", 44, *PADDED),
    ("log_linear_attention", 32, *PLAIN),
    ("log_linear_gated_delta_rule", 28, *PADDED),
    ("log_linear_gated_delta_rule", 32, *PLAIN),
]


@in_interpreter
@pytest.mark.parametrize("name, length, kind, merge, dtype, shared", CALLS, ids=str)
def test_is_the_definition(monkeypatch, name, length, kind, merge, dtype, shared):
    small(monkeypatch)
    form, route = case(name), table(kind, 1, 2, length)
    inputs = bits(form.make(1, length=length, H=1 if "log" in name else 2, G=1), dtype)
    if shared:
        inputs = {key: x[:, :1] if key in form.tokens else x for key, x in inputs.items()}
    want = results(form, "reference", bits(inputs, torch.float64), route, merge)
    got = results(form, "triton", inputs, route, merge)
    assert got["output"].dtype == dtype and all(got[f"final {name}"].dtype == torch.float32 for name in form.states)
    same(got, want, TOLERANCE[dtype])


# -- compiled for GPUs that are not there -----------------------------------------------------------------------------


def launches():
    """For `tools/kernels.py`: kernels of `gla` and `dplr` as these forms need them, which tests of those compile."""
    for form in map(case, ("mlstm", "log_linear_gated_delta_rule")):
        inputs = form.make(1, 2, 130, H=2, dk=64, dv=64)
        results(form, "triton", bits(inputs, torch.bfloat16), table("permutation", 1, 2, 130), "sum")
