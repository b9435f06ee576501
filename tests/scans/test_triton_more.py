"""The Triton forms with plain torch around their kernels: in Triton's interpreter against the float64 definition, and
compiled for GPUs that are not there."""

from importlib.util import module_from_spec, spec_from_file_location

import pytest
import torch

from .test_triton_forms import TOLERANCE, small
from .tools import bits, case, results, same, table
from .triton_tools import HERE, compiled, in_interpreter, no_stray_access, outside_interpreter  # noqa: F401  (a fixture)

PADDED = "per_sample", "sum", torch.float32, True  # route, merge, dtype, whether routes share their tokens
PLAIN = "none", None, torch.bfloat16, False
CALLS = [  # lengths of several chunks, the last of them full or not
    ("mlstm", 18, *PADDED),
    ("mlstm", 18, "permutation", *PLAIN[1:]),
    ("mamba3", 18, *PLAIN),
    ("mamba3_mimo", 12, *PADDED),
    ("log_linear_attention", 44, *PADDED),
    ("log_linear_attention", 32, *PLAIN),
    ("log_linear_gated_delta_rule", 28, *PADDED),
    ("log_linear_gated_delta_rule", 32, *PLAIN),
    ("ttt_linear", 7, *PADDED),
    ("ttt_linear_fla", 18, *PLAIN),
]


@in_interpreter
@pytest.mark.parametrize("name, length, kind, merge, dtype, shared", CALLS, ids=str)
def test_is_the_definition(monkeypatch, name, length, kind, merge, dtype, shared):
    small(monkeypatch)
    form, route = case(name), table(kind, 1, 2, length)
    inputs = bits(form.make(1, length=length, H=1 if "log" in name else 2, G=1), dtype)
    if shared:
        inputs = {key: x[:, :1] if key in form.tokens else x for key, x in inputs.items()}
    if "log" in name:  # so that states of many chunks ago still count
        inputs["g"] = inputs["g"] / 16
    options = dict(position=4) if "ttt" in name else {}  # inside a mini-batch
    want = results(form, "reference", bits(inputs, torch.float64), route, merge, **options)
    got = results(form, "triton", inputs, route, merge, **options)
    assert got["output"].dtype == dtype and all(got[f"final {name}"].dtype == torch.float32 for name in form.states)
    same(got, want, TOLERANCE[dtype])


# -- compiled for GPUs that are not there -----------------------------------------------------------------------------


def launches():
    """The kernels of TTT-Linear."""
    inputs = case("ttt_linear").make(1, 2, 130, H=2, D=64, mini_batch=16)
    results(case("ttt_linear"), "triton", bits(inputs, torch.bfloat16), table("permutation", 1, 2, 130), "sum")


def other_launches():
    """For `tools/kernels.py`: kernels of `gla` and `dplr` as these forms need them, which tests of those compile."""
    for form in map(case, ("mlstm", "log_linear_gated_delta_rule")):
        inputs = form.make(1, 2, 130, H=2, dk=64, dv=64)
        results(form, "triton", bits(inputs, torch.bfloat16), table("permutation", 1, 2, 130), "sum")


@outside_interpreter
@pytest.mark.slow
def test_compiles():
    for _, kernels in compiled("tests.scans.test_triton_more:launches"):
        assert {kernel["name"] for kernel in kernels} == {"_forward", "_backward"}


# -- tools/traffic.py -------------------------------------------------------------------------------------------------

PTX = """
.visible .entry copy(.param .u64 copy_param_0, .param .u32 copy_param_1, .param .u64 copy_param_2)
.reqntid 64
{
	ld.param.b64 	%rd1, [copy_param_0];
	ld.param.b32 	%r1, [copy_param_1];
	mov.u32 	%r2, %ctaid.x;
	mov.u32 	%r3, %tid.x;
	shl.b32 	%r4, %r3, 2;                  // threads 32 apart read the same 16 bytes
	and.b32 	%r4, %r4, 127;
	mul.wide.s32 	%rd2, %r4, 4;
	add.s64 	%rd3, %rd1, %rd2;
	mov.b32 	%r5, 0;
$L__BB0_1:
	setp.lt.s32 	%p1, %r3, 32;
	@%p1 ld.global.v4.b32 { %r6, %r7, %r8, %r9 }, [ %rd3 + 0 ];
	ld.global.b32 { %r10 }, [ %rd1 + 0 ];
	add.s32 	%r11, %r10, %r6;
	setp.gt.s32 	%p2, %r10, 0;
	mul.wide.s32 	%rd4, %r10, 4;
	@%p2 st.global.b16 [ %rd4 + 0 ], { %rs1 };
	setp.eq.b32 	%p3, %r2, 1;
	selp.b32 	%r12, 16, 0, %p3;
	cp.async.cg.shared.global [ %r13 + 0 ], [ %rd3 + 0 ], 0x10, %r12;
	add.s32 	%r5, %r5, 1;
	setp.lt.s32 	%p4, %r5, %r1;
	@%p4 bra 	$L__BB0_1;
	ret;
}
"""


@outside_interpreter
def test_bytes_that_a_kernel_asks_for():
    """Loops and masks are followed; threads that ask for the same count once, unless only data says what they ask."""
    spec = spec_from_file_location("traffic", HERE.parents[1] / "tools" / "traffic.py")
    tool = module_from_spec(spec)
    spec.loader.exec_module(tool)
    loops = 3
    each = loops * (32 * 16 + 4)
    second = loops * 32 * 16  # the asynchronous copy, of program 1 alone
    assert tool.traffic(PTX, [1 << 40, loops, 0], (1,)) == (each, loops * 64 * 2)
    assert tool.traffic(PTX, [1 << 40, loops, 0], (2,)) == (2 * each + second, 2 * loops * 64 * 2)
