"""What every recurrence promises, tested with inputs that its declared layout makes.

A recurrence is tested by being registered: every test here runs over all public functions of `linescan.scans`.
"""

import asyncio
import re
from math import isfinite
from threading import Thread

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from linescan.scans import chunks
from linescan.scans.recurrence import backend, recurrences

from .tools import CASES, CAUSAL, FORMS, RECURRENT, ROUTES, bits, case, error, gather, results, same, scatter, table

every = pytest.mark.parametrize("case", RECURRENT, ids=str)
operators = pytest.mark.parametrize("case", {c.recurrence.name: c for c in RECURRENT[::-1]}.values(), ids=str)
causal = pytest.mark.parametrize("case", CAUSAL, ids=str)
forms = pytest.mark.parametrize("name", FORMS)
kinds = pytest.mark.parametrize("kind", ROUTES)
seeds = st.integers(0, 2**16)


def quick(examples: int):
    return settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))


def floats(inputs):
    return {key: x for key, x in inputs.items() if x.is_floating_point()}


# -- routes -----------------------------------------------------------------------------------------------------------


# A token of zeros decays the state or adds to it, a padding token does not.
GATES_OF_THEIR_OWN = ("retention", "hgrn2", "rg_lru", "based", "hedgehog", "hedgehog_window", "ttt_linear_fla")


@every
@kinds
def test_a_route_is_permute_scan_unpermute(case, kind):
    inputs, route = case.make(), table(kind, 2, 2, 7)
    if case.public.name in GATES_OF_THEIR_OWN and route is not None:
        route = torch.where(route == -1, -2, route)
    with backend("reference"):
        output, *states = case(inputs, route)
        order = torch.arange(7).expand(2, -1) if route is None else route
        ordered = {key: gather(x, order, 2) if key in case.tokens else x for key, x in inputs.items()}
        want, *want_states = case(ordered)
    torch.testing.assert_close(output, scatter(want, order, 7), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(states, want_states, rtol=1e-12, atol=1e-12)


@every
@forms
def test_unvisited_tokens_have_no_part_in_anything(case, name):
    """Output 0 and gradient 0; what is read but not written has a gradient."""
    inputs = case.make(routes=1)
    route = torch.tensor([[4, -1, 0, -(3 + 2), 6, 1, -1]])
    got = results(case, name, inputs, route)
    assert not got["output"][:, :, [2, 3, 5]].any() and got["output"][:, :, [0, 1, 4, 6]].any()
    for key in case.float_tokens:
        grad = got[f"gradient of {key}"]
        assert not grad[:, :, [2, 5]].any()
    assert any(got[f"gradient of {key}"][:, :, 3].any() for key in case.float_tokens)


@every
@forms
def test_merge_adds_the_routes(case, name):
    inputs, route = case.make(), table("repeated", 2, 2, 7)
    with backend(name):
        torch.testing.assert_close(case(inputs, route, "sum")[0], case(inputs, route)[0].sum(1))
        with pytest.raises(ValueError, match="merge is None .* or 'sum', got 'mean'"):
            case(inputs, route, "mean")


@every
def test_shared_tokens_are_expanded_tokens(case):
    """One route's tokens for all of them, all token inputs at once and each alone; also without a table."""
    full = case.make()
    for shared in (case.tokens, *([key] for key in case.tokens if key in full)):
        for route in (table("repeated", 2, 2, 7), None):
            if route is None and len(shared) == len(case.tokens):
                continue  # nothing says that there are two routes
            given = {key: x[:, :1] if key in shared else x for key, x in full.items()}
            expanded = {key: x.expand(-1, 2, *x.shape[2:]) if key in shared else x for key, x in given.items()}
            want = results(case, "chunked", expanded, route)
            for key in set(shared) & set(case.float_tokens):
                want[f"gradient of {key}"] = want[f"gradient of {key}"].sum(1, keepdim=True)
            for name in FORMS:
                same(results(case, name, given, route), want, 1e-9)


# -- forms ------------------------------------------------------------------------------------------------------------


@every
@kinds
def test_chunked_is_the_definition(case, kind):
    inputs, route = case.make(), table(kind, 2, 2, 7)
    for of in (
        (("output",), ("state",), ("output", "state")) if kind in ("none", "repeated") else (("output", "state"),)
    ):
        same(results(case, "chunked", inputs, route, of=of), results(case, "reference", inputs, route, of=of), 1e-9)


@every
@quick(6)
@given(seed=seeds, length=st.integers(1, 80), kind=st.sampled_from(ROUTES))
def test_chunked_is_the_definition_at_any_length(case, seed, length, kind):
    inputs, route = case.make(length=length, seed=seed), table(kind, 2, 2, length, seed)
    same(*(results(case, name, inputs, route, "sum") for name in ("chunked", "reference")), 1e-9)


@every
@pytest.mark.parametrize("kind", ["none", "repeated", "per_sample"])
def test_what_users_get_is_the_definition(case, kind):
    """float32, which kernels may serve."""
    inputs, route = case.make(length=23), table(kind, 2, 2, 23)
    same(
        results(case, "picked", bits(inputs, torch.float32), route, "sum"),
        results(case, "reference", inputs, route, "sum"),
        1e-4,
    )


@every
def test_chunks_and_pieces_of_any_size(case, monkeypatch):
    inputs = case.make(length=70)
    want = results(case, "chunked", inputs)
    for size in (1, 8, 128):
        monkeypatch.setattr(chunks, "CHUNK", size)
        same(results(case, "chunked", inputs), want, 1e-9)
    monkeypatch.setattr(chunks, "numbers_at_a_time", lambda device: 1)
    same(results(case, "chunked", inputs), want, 1e-9)


@causal
@quick(5)
@given(seed=seeds, first=st.integers(1, 40), second=st.integers(1, 40))
def test_a_split_sequence_is_the_whole(case, seed, first, second):
    whole = case.make(length=first + second, seed=seed)
    left, right = ({key: x[:, :, part] if key in case.tokens else x for key, x in whole.items()}
                   for part in (slice(first), slice(first, None)))  # fmt: skip
    for name in FORMS:
        with backend(name):
            output, *states = case(whole)
            y_left, *carried = case(left)
            y_right, *last = case(right | dict(zip(case.states, carried)), **case.resumed(first))
        torch.testing.assert_close(torch.cat((y_left, y_right), 2), output, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(last, states, rtol=1e-9, atol=1e-9)


@every
def test_optional_inputs(case):
    """Each of them left out, and all of them."""
    optional = [key for key, argument in case.layout.arguments.items() if argument.optional]
    optional = [key for key in optional if key not in (*case.without, *case.states)]
    for without in ([], [*optional, *case.states], case.states, *([key] for key in optional)):
        inputs = case.make(length=19, without=without)
        same(results(case, "chunked", inputs), results(case, "reference", inputs), 1e-9)


# -- derivatives ------------------------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("kind, merge", [("none", None), ("per_sample", "sum")])
def test_gradcheck(case, kind, merge):
    """Of the chunked form; test_chunked_is_the_definition holds the definition's gradients to be the same."""
    inputs, route = case.make(batch=1 if kind == "none" else 2, length=5), table(kind, 2, 2, 5)
    leaves = {key: x.requires_grad_() for key, x in floats(inputs).items()}

    def function(*tensors):
        return case(inputs | dict(zip(leaves, tensors)), route, merge)

    with backend("chunked"):
        assert torch.autograd.gradcheck(function, tuple(leaves.values()), fast_mode=True)


@operators
def test_second_derivative_of_the_reference(case):
    """Along routes that leave tokens out, read one again, and take a step of padding."""
    inputs, route = case.make(batch=1, length=4), torch.tensor([[2, -1, 0, -3], [1, 3, -2, -1]])
    leaves = {key: x.requires_grad_() for key, x in floats(inputs).items()}

    def function(*tensors):
        return case(inputs | dict(zip(leaves, tensors)), route)

    with backend("reference"):
        assert torch.autograd.gradgradcheck(function, tuple(leaves.values()), fast_mode=True)


@every
@pytest.mark.parametrize("dispatcher", [False, True])
def test_no_second_derivative_of_fast_forms(case, dispatcher):
    inputs = case.make()
    leaves = [x.requires_grad_() for x in floats(inputs).values()]
    with backend("chunked", dispatcher=dispatcher):
        loss = sum(x.sum() for x in case(inputs))
        grads = torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True)
        with pytest.raises(RuntimeError, match="no second derivative.*backend\\('reference'\\)"):
            sum(g.sum() for g in grads if g is not None).backward()


@every
def test_transforms_of_torch_func(case):
    """Forward mode, vmap, grad and grad under vmap give what the definition gives, whatever is forced."""
    inputs, route = case.make(length=5), table("repeated", 2, 2, 5)
    key = case.tokens[0]

    def function(x):
        return sum([(y * y).sum() for y in case(inputs | {key: x}, route)])

    x, direction = inputs[key], torch.randn_like(inputs[key])
    with backend("reference"):
        leaf = x.clone().requires_grad_()
        grad = torch.autograd.grad(function(leaf), leaf)[0]
    many = torch.stack((x, direction, 2 * x))
    for name in ("", "chunked"):
        with backend(name):
            value, tangent = torch.func.jvp(function, (x,), (direction,))
            torch.testing.assert_close(value, function(x))
            torch.testing.assert_close(tangent, (grad * direction).sum())
            torch.testing.assert_close(torch.func.grad(function)(x), grad)
            torch.testing.assert_close(torch.vmap(function)(many), torch.stack([function(y) for y in many]))
    per_sample = torch.vmap(torch.func.grad(function))(many)
    torch.testing.assert_close(per_sample[0], grad)
    with torch.autograd.forward_ad.dual_level():
        dual = function(torch.autograd.forward_ad.make_dual(x, direction))
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(dual).tangent, tangent)


# -- dtypes and devices -----------------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_inputs_keep_a_float_state(case, dtype):
    inputs = bits(case.make(length=37), dtype)
    exact = results(case, "reference", bits(inputs, torch.float64))
    for name in FORMS:
        for key, x in results(case, name, inputs).items():
            assert x.dtype == (torch.float32 if key.startswith("final") else dtype), (name, key)
            # rounding of the inputs aside, nothing is computed in half
            limit = 1e-5 if key.startswith("final") else 2 * torch.finfo(dtype).eps if key == "output" else 2e-2
            assert error(x, exact[key]) < limit, (name, key)


@every
@pytest.mark.parametrize("name", [*FORMS, "picked"])
def test_autocast_changes_nothing(case, name):
    length = 7 if name == "reference" else 40  # which takes steps one at a time; the others, chunks
    inputs, route = bits(case.make(length=length), torch.float32), table("repeated", 2, 2, length)
    want = results(case, name, inputs, route)
    with torch.autocast("cpu", torch.bfloat16):
        got = results(case, name, inputs, route)
    assert got["output"].dtype == torch.float32
    same(got, want, 0)
    if name == "reference":  # which also serves the transforms of torch.func
        key = case.tokens[0]
        x = inputs[key]

        def value(x):
            return case(inputs | {key: x}, route)[0]

        def transformed():
            tangents = torch.func.jvp(value, (x,), (x,))[1]
            return torch.vmap(value)(x[None])[0], tangents, torch.func.grad(lambda x: value(x).sum())(x)

        want = transformed()
        with torch.autocast("cpu", torch.bfloat16):
            assert all(map(torch.equal, transformed(), want))


@every
def test_a_double_among_floats_makes_the_state_double(case):
    inputs = bits(case.make(without=case.states), torch.float32)
    inputs[case.float_tokens[-1]] = inputs[case.float_tokens[-1]].double()
    for name in FORMS:
        with backend(name):
            output, *states = case(inputs)
        assert output.dtype == inputs[case.tokens[0]].dtype
        assert all(state.dtype == torch.float64 for state in states)


@every
def test_meta_tensors_have_shapes(case):
    inputs = case.make()
    meta = {key: x.to("meta") for key, x in inputs.items()}
    leaves = [x.requires_grad_() for x in floats(meta).values()]
    route = table("repeated", 2, 2, 7)
    for place in (None, route.to("meta")):
        for merge in (None, "sum"):
            got, want = case(meta, place, merge), case(inputs, None if place is None else route, merge)
            assert [x.shape for x in got] == [x.shape for x in want] and all(x.is_meta for x in got)
    torch.autograd.grad(got[0].sum(), leaves, allow_unused=True)


# -- empty ------------------------------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("name", [*FORMS, "picked"])
@pytest.mark.parametrize("batch, length, route", [
    (0, 7, None), (0, 7, "table"), (2, 0, None), (2, 5, torch.zeros(2, 0, dtype=torch.int32)),
    (2, 0, torch.zeros(2, 0, dtype=torch.int32)), (0, 0, None),
], ids=["no sample", "no sample, route", "no token", "no step", "no token, no step", "nothing"])  # fmt: skip
def test_nothing_to_do(case, name, batch, length, route):
    inputs = case.make(batch=batch, length=length)
    route = table("repeated", 2, 2, length) if isinstance(route, str) else route
    for merge in (None, "sum"):
        got = results(case, name, inputs, route, merge)
        routes = () if merge else (2,)
        assert got["output"].shape[: 2 + len(routes)] == (batch, *routes, length) and not got["output"].any()
        for key in case.states:
            kept = inputs[key]
            if got[f"final {key}"].shape == kept.shape:
                torch.testing.assert_close(got[f"final {key}"], kept)
        for key, x in floats(inputs).items():
            assert got[f"gradient of {key}"].shape == x.shape


@every
@forms
def test_padding_alone_takes_steps(case, name):
    """Padding of a sequence without tokens is padding of one whose tokens are not visited."""
    route = torch.full((2, 3), -1)
    empty, full = case.make(length=0), case.make(length=4)
    empty |= {key: x for key, x in full.items() if key not in case.tokens}
    with backend(name):
        (output, *states), (_, *want) = case(empty, route), case(full, route)
    assert output.shape[2] == 0
    torch.testing.assert_close(states, want)


# -- graphs -----------------------------------------------------------------------------------------------------------


OPCHECKS = ("test_aot_dispatch_dynamic", "test_autograd_registration", "test_faketensor", "test_schema")


@operators
def test_opcheck(case):
    """Schema, fake form, autograd registration and compilation with symbolic sizes."""
    operator, seen = case.recurrence.operator, []
    for route, merge in ((None, None), (table("repeated", 2, 2, 5), "sum")):

        class Record(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                if function is operator._opoverload:
                    seen.append(args)
                return function(*args, **kwargs or {})

        with Record():
            case(case.make(length=5), route, merge)
        args = [x.requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in seen[-1]]
        skipped = {"test_aot_dispatch_dynamic"} if route is None else set()  # which takes long
        torch.library.opcheck(operator, args, test_utils=sorted(set(OPCHECKS) - skipped))


@operators
def test_compile(case):
    """In float32, which kernels take."""
    torch._dynamo.reset()
    inputs, route = bits(case.make(), torch.float32), table("repeated", 2, 2, 7)
    leaves = [x.requires_grad_() for x in floats(inputs).values()]

    def function(inputs, route):
        return sum([x.sum() for x in case(inputs, route, "sum")]) * 2

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    got, want = compiled(inputs, route), function(inputs, route)
    torch.testing.assert_close(got, want)
    grads = [torch.autograd.grad(y, leaves, allow_unused=True, materialize_grads=True) for y in (got, want)]
    torch.testing.assert_close(*grads)


class Wrapped(torch.nn.Module):
    """A function as a module of positional tensors."""

    def __init__(self, case, names, route):
        super().__init__()
        self.case, self.names = case, names
        self.register_buffer("route", route)

    def forward(self, *tensors):
        return self.case(dict(zip(self.names, tensors)), self.route, "sum")


@every
def test_export(case):
    inputs = case.make()
    module = Wrapped(case, list(inputs), table("repeated", 2, 2, 7))
    exported = torch.export.export(module, tuple(inputs.values()))
    nodes = [node for node in exported.graph.nodes if "linescan" in str(node.target)]
    assert len(nodes) == 1
    assert not [x for x in nodes[0].args if isinstance(x, float) and not isfinite(x)], "of which a file has no number"
    torch.testing.assert_close(exported.module()(*inputs.values()), module(*inputs.values()))
    with pytest.raises(Exception, match="shape|size|dim"):
        exported.module()(*case.make(length=9).values())


@operators
@pytest.mark.parametrize("name", ["", "reference"])
@pytest.mark.parametrize("how", ["jit", "make_fx"])
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("error::torch.jit.TracerWarning")
def test_a_graph_traced_at_one_size_fails_at_another(case, how, name):
    inputs = case.make(length=2, without=case.states)
    module = Wrapped(case, list(inputs), torch.tensor([[1, 0], [0, 1]]))
    tensors = tuple(inputs.values())
    with backend(name):
        traced = torch.jit.trace(module, tensors, check_trace=False) if how == "jit" else make_fx(module)(*tensors)
    torch.testing.assert_close(list(traced(*tensors)), list(module(*tensors)))
    with pytest.raises((RuntimeError, ValueError)):
        traced(*case.make(length=3, without=case.states).values())


# -- refusals ---------------------------------------------------------------------------------------------------------

BAD_ROUTES = {
    "floats": (torch.zeros(2, 7), "a route is an integer table"),
    "booleans": (torch.zeros(2, 7, dtype=torch.bool), "a route is an integer table"),
    "one axis": (torch.zeros(7, dtype=torch.int32), "a route is an integer table"),
    "a list": ([[0, 1]], "a route is an integer table .* got list"),
    "three routes": (torch.arange(7).expand(3, -1), "has 2 routes on axis 1, the route table has 3"),
    "three samples": (torch.arange(7).expand(3, 2, -1), "route table for 3 samples, the inputs have 2"),
    "a token too many": (torch.tensor([[0, 1, 2], [1, 7, 0]]), "entry 7 of the route table is none of the 7 tokens"),
    "before the first": (torch.tensor([[0, 1, 2], [1, -9, 0]]), "entry -9 of the route table is none of the 7"),
    "twice": (torch.tensor([[0, 1, 2], [4, 3, 4]]), r"visits token 4 twice on one route.*here -6"),
    "twice in a sample": (torch.tensor([[[0, 1], [2, 3]], [[1, 0], [5, 5]]]), "visits token 5 twice on one route"),
}


@every
@pytest.mark.parametrize("fault", BAD_ROUTES)
def test_a_bad_route_is_refused_by_every_form(case, fault):
    route, message = BAD_ROUTES[fault]
    inputs = case.make()
    for dispatcher in (False, True):
        for name in ("", *case.recurrence.implementations):
            for dtype in (torch.float64, torch.float32):
                with backend(name, dispatcher=dispatcher), pytest.raises(ValueError, match=message):
                    case(bits(inputs, dtype), route)


@every
def test_a_bad_route_is_refused_in_graphs(case):
    """Its entries are only known when the graph runs."""
    good, bad = table("permutation", 2, 2, 7), torch.tensor([[0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 5, 5]])
    inputs = case.make()
    traced = make_fx(lambda route: case(inputs, route))(good)
    traced(good)
    with pytest.raises(ValueError, match="visits token 5 twice"):
        traced(bad)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_bad_argument_is_named(case):
    inputs = case.make()
    # Sizes that stand in more than one place; the others are free.
    given = [case.layout.arguments[key] for key in inputs]
    axes = [word for argument in given for axis in argument.axes for word in re.findall(r"[A-Za-z_]\w*", axis.text)]
    for key, x in inputs.items():
        argument = case.layout.arguments[key]
        required = [] if argument.optional else [(None, "got None")]
        kind = {"float": "floating-point numbers", "bool": "booleans", "int": "integers"}[argument.kind]
        other = x.long() if argument.kind != "int" else x.double()
        for wrong, message in [
            (x[..., None], rf"\b{key} is {re.escape(str(argument))}, got {x.ndim + 1} axes"),
            (other, f"{key} holds {kind}, got {other.dtype}"),
            (x.to(torch.complex64), f"{key} holds {kind}, got torch.complex64"),
            (x.tolist(), "got list"),
            *required,
        ]:
            with pytest.raises(ValueError, match=message):
                case(inputs | {key: wrong})
        for axis, named in enumerate(argument.axes):
            if axes.count(named.text) > 1 or not named.text.isidentifier():
                with pytest.raises(ValueError, match=f"^{case.public.name}: "):
                    case(inputs | {key: torch.cat((x, x.narrow(axis, 0, 1)), axis)})


@every
def test_tensors_stand_on_one_device(case):
    inputs = bits(case.make(), torch.float32)
    key = list(inputs)[1]
    for name in ("", *FORMS):
        with backend(name), pytest.raises(ValueError, match=rf"one device, got .*{key} on meta"):
            case(inputs | {key: inputs[key].to("meta")})


@every
def test_a_learned_scale_is_refused(case):
    """A tensor would get no gradient."""
    if "scale" in case.layout.parameters:
        with pytest.raises(ValueError, match="scale is a plain value, not a tensor"):
            case(case.make(), scale=torch.tensor(1.0, requires_grad=True))


# -- backends ---------------------------------------------------------------------------------------------------------


@every
def test_a_form_that_is_missing_is_named(case):
    for name in {i for op in recurrences().values() for i in op.implementations} - set(case.recurrence.implementations):
        with (
            backend(name),
            pytest.raises(ValueError, match=f"{case.recurrence.name} has no form '{name}'; it has: ref"),
        ):
            case(case.make())


def test_an_unknown_backend_is_named():
    with pytest.raises(ValueError, match="unknown scan backend 'cuda'; there are: chunked, cpu, reference, triton"):
        with backend("cuda"):
            pass


def test_a_backend_is_forced_in_its_own_thread():
    inputs, seen = bits(case("gla").make(), torch.float32), []
    op = case("gla").recurrence

    def watch(name, *call):
        seen.append(name)
        return type(op).pick(op, name, *call)

    with pytest.MonkeyPatch.context() as patch, backend("chunked"):
        patch.setattr(op, "pick", watch)
        thread = Thread(target=lambda: case("gla")(inputs))
        thread.start()
        thread.join()
        case("gla")(inputs)
        with backend("reference"):
            case("gla")(inputs)
        case("gla")(inputs)
    assert seen == ["", "chunked", "reference", "chunked"]


def test_a_backend_is_forced_in_its_own_task():
    inputs, seen, op = bits(case("gla").make(), torch.float32), [], case("gla").recurrence

    def watch(name, *call):
        seen.append(name)
        return type(op).pick(op, name, *call)

    async def task(name, mine, other):
        with backend(name):
            mine.set()
            await other.wait()  # both are inside their blocks
            case("gla")(inputs)

    async def both():
        one, two = asyncio.Event(), asyncio.Event()
        await asyncio.gather(task("chunked", one, two), task("reference", two, one))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(op, "pick", watch)
        asyncio.run(both())
        case("gla")(inputs)
    assert sorted(seen) == ["", "chunked", "reference"]


def test_a_compiled_function_follows_the_backend():
    torch._dynamo.reset()
    inputs = bits(case("gla").make(), torch.float32)
    seen, op = [], case("gla").recurrence

    def watch(name, *call):
        seen.append(name)
        return type(op).pick(op, name, *call)

    compiled = torch.compile(lambda inputs: case("gla")(inputs)[0] + 1, fullgraph=True, backend="aot_eager")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(op, "pick", watch)
        compiled(inputs)
        with backend("chunked"):
            compiled(inputs)
        compiled(inputs)
    assert seen == ["", "chunked", ""]


# -- FLOPs ------------------------------------------------------------------------------------------------------------

COUNTED = {"mul": 1, "add": 1, "sub": 1, "div": 1, "addcmul": 2}  # per element


class Count(TorchDispatchMode):
    """Counts floating-point operations as they are carried out."""

    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        name = function.overloadpacket.__name__.rstrip("_")
        if name in COUNTED and out.is_floating_point():
            self.total += COUNTED[name] * out.numel()
        elif name == "sum":
            self.total += args[0].numel()
        elif name in ("mm", "bmm"):
            self.total += 2 * out.numel() * args[0].shape[-1]
        return out


SIZES = dict(H=2, G=2, d=24, dk=24, dv=24, gates=24, D=24, N=24, P=24, W=24, rank=24)


# A query of log-linear attention reads the buckets that are full, half of them; the definitions compute with all.
@pytest.mark.parametrize("name", sorted(name for name in recurrences() if not name.startswith("log_linear")))
@pytest.mark.parametrize("kind", ["none", "padded"])
def test_flops_are_those_of_the_definition(name, kind):
    """Counted at sizes where what is not proportional to a state's size weighs little."""
    op = recurrences()[name]
    options = [0.5 if key == "scale" else op.layout.sizes.get(key, 0) for key in op.layout.options]
    tensors = op.layout.example(2, 2, 32, dtype=torch.float32, **SIZES)
    values = dict(zip(op.layout.options, options)) | tensors
    inputs = [values.get(key) for key in op.parameters]
    route = table(kind, 2, 2, 32)
    with FlopCounterMode(display=False) as counter:
        op(*inputs, route=route)
    with backend("reference"), Count() as count:
        op(*inputs, route=route)
    assert 0.75 < count.total / counter.get_total_flops() < 1.2
