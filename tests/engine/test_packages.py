"""linescan export and packages: another runtime gives the model's answers, and nothing from outside is trusted."""

import json
import resource
import shutil
import zipfile
from typing import NamedTuple

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from torch import nn
from torch._inductor import config as inductor
from torch.utils._pytree import treespec_dumps, treespec_loads

import linescan
from linescan import Classifier, extras
from linescan.engine import packages
from linescan.engine.cards import restore
from linescan.engine.packages import difference, export_package, open_package, read_network, tensors, write_network
from linescan.errors import CheckpointError, InputError
from linescan.scans import hgrn
from linescan.scans.kernels import cpu
from linescan.scans.recurrence import Recurrence


@pytest.fixture(scope="module")
def packed(trained, tmp_path_factory):
    """The digits' model, its card, and a package of ONNX."""
    network, card = restore(None, trained / "model.safetensors")
    path = tmp_path_factory.mktemp("packages") / "digits.onnx"
    assert export_package(network, card, path, "onnx") < 1e-5
    assert [file.name for file in path.parent.iterdir()] == [path.name], "nothing else is left"
    return network, card, path


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "eight [x].png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 9), np.uint8)).save(path)
    return path


def test_a_package_classifies_as_its_model_does(linescan_here, trained, packed, image, tmp_path):
    _, card, path = packed
    want = Classifier(checkpoint=trained / "model.safetensors", device="cpu")(image)
    status, out, _ = linescan_here("classify", path, image, "--json", "--topk", 10)
    assert status == 0
    [answer] = json.loads(out)
    assert [guess["label"] for guess in answer["answer"]] == [guess.label for guess in want] or len(want) == 5
    tool = Classifier(checkpoint=path)
    torch.testing.assert_close(tool(image).probabilities, want.probabilities, rtol=1e-4, atol=1e-5)
    assert tool.card == card and tool.classes == card.classes and "parameters" not in tool.facts()
    for given in (dict(device="cuda"), dict(model="vim_tiny_patch16_224"), dict(dtype=torch.float16), dict(depth=3)):
        with pytest.raises(InputError, match="as it was exported"):
            Classifier(checkpoint=path, **given)
    assert linescan_here("classify", path)[0] == 2


class Recurrent(nn.Module):
    """Three recurrences along routes, two of them alike."""

    def __init__(self):
        super().__init__()
        self.register_buffer("route", torch.tensor([[0, 1, 2, 3, 4], [4, 3, -1, 1, 0]]))

    def forward(self, x):
        for _ in range(2):
            x = hgrn(x, -x.abs(), route=self.route)
        return hgrn(x, -x.abs(), route=self.route, merge="sum")


def test_a_kernel_takes_the_place_of_a_function(tmp_path, monkeypatch):
    torch.manual_seed(0)
    network, path = Recurrent().eval(), tmp_path / "routes.onnx"
    write_network(network, (torch.randn(2, 2, 5, 4),), path)
    model = onnx.load(path)
    onnx.checker.check_model(model)
    calls = [(node.op_type, node.overload) for node in model.graph.node if node.domain == "linescan"]
    assert [name for name, _ in calls] == ["vector_scan"] * 3 and calls[0] == calls[1] != calls[2]
    assert len(model.functions) == 2, "calls that are alike share a body"
    assert {(body.name, body.overload) for body in model.functions} == set(calls)
    assert {node.domain for body in model.functions for node in body.node} == {""}
    for body in model.functions:
        last = next(node for node in body.node if body.output[0] in node.output)
        last.output[list(last.output).index(body.output[0])] = "right"
        body.node.append(onnx.helper.make_node("Neg", ["right"], [body.output[0]]))
    onnx.save(model, tmp_path / "wrong.onnx")
    x = torch.randn(5, 2, 5, 4)
    with torch.no_grad():
        want = network(x)
    if cpu.missing() is None and b"RegisterCustomOps" in cpu.LIBRARY.read_bytes():
        assert difference(want, read_network(tmp_path / "wrong.onnx")(x)) < 1e-5
    assert difference(want, read_network(path, kernels=False)(x)) < 1e-5
    monkeypatch.setattr(cpu, "_missing", "turned off")
    assert difference(want, read_network(tmp_path / "wrong.onnx")(x)) > 0.1


class Twice(nn.Module):
    def forward(self, x):
        return hgrn(hgrn(x, -x.abs()), -x.abs())


def test_a_plain_graph_has_standard_operators_alone_and_traces_loops_that_are_alike_once(tmp_path, monkeypatch):
    traced, form = [], Recurrence.in_standard_operators
    monkeypatch.setattr(Recurrence, "in_standard_operators", lambda op, *x: traced.append(op.name) or form(op, *x))
    write_network(Twice(), (torch.randn(2, 1, 4, 2),), tmp_path / "plain.onnx", plain=True)
    model, x = onnx.load(tmp_path / "plain.onnx"), torch.randn(5, 1, 4, 2)
    assert [opset.domain for opset in model.opset_import] == [""] and not model.functions
    assert [node.op_type for node in model.graph.node].count("Scan") == 2 and traced == ["hgrn"]
    assert difference(Twice()(x), read_network(tmp_path / "plain.onnx")(x)) < 1e-5


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_export_is_a_command(linescan_here, trained, image, tmp_path):
    out = tmp_path / "deep" / "digits.ts"
    args = ("export", "-c", trained / "model.safetensors", "--format", "torchscript-trace", "--out", out)
    status, _, said = linescan_here(*args)
    assert status == 0 and "its answers differ" in said
    folder = tmp_path / "folder.ts"
    folder.mkdir()
    status, _, said = linescan_here("classify", out, image)
    assert status == 2 and "--trust" in said and len(said.splitlines()) == 1
    assert linescan_here("classify", out, image, "--trust")[0] == 0
    for wrong, says in (
        (("export",), "name a model"),
        ((*args[:-1], tmp_path / "digits.onnx"), "*.ts"),
        (("export", "vim_tiny_patch16_224", "--out", tmp_path / "vim.ts"), "*.onnx"),  # before weights are fetched
        (("export", "vim_tiny_patch16_224", "--out", image / "vim.onnx"), "is a file; --out needs a folder there"),
        (("export", "pointmamba_modelnet40", "--out", tmp_path / "points.onnx"), "reads point clouds"),
        (("export", "vim_tiny_patch16_224", *args[3:], "--precision", "fp16"), "not float16 as torchscript-trace"),
        ((*args, "--size", "64"), "img_size=[64,64]"),
        ((*args, "--plain"), "--plain is for onnx"),
        ((*args[:-1], folder), "is a folder"),
        ((*args[:-3], "onnx", "--out", tmp_path / "b.onnx", "--precision", "bf16"), "not bfloat16 as onnx"),
    ):
        status, _, said = linescan_here(*wrong)
        assert status == 2 and says in said


@pytest.mark.parametrize("missing", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named_before_weights_are_fetched(linescan_here, packed, image, missing, monkeypatch):
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name == missing else True)
    commands = [("export", "vim_tiny_patch16_224")]
    if missing == "onnxruntime":
        commands.append(("classify", packed[2], image))
    for command in commands:
        status, _, said = linescan_here(*command)
        assert status == 2 and f"this needs {missing}; `pip install 'linescan[onnx]'` installs it" in said
        assert len(said.splitlines()) == 1


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_full_disk_leaves_the_old_package(linescan_here, trained, tmp_path):
    out = tmp_path / "old.ts"
    out.write_bytes(b"before")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**13, hard))
    try:
        status, _, said = linescan_here(
            "export", "-c", trained / "model.safetensors", "--format", "torchscript-trace", "--out", out
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert status == 2 and f"{out}: File too large" in said and len(said.splitlines()) == 1, said
    assert out.read_bytes() == b"before" and len(list(tmp_path.iterdir())) == 1


def test_a_full_disk_is_named_while_a_program_is_compiled(tmp_path, monkeypatch):
    def compiled(says, size):
        def write(program, package_path, **options):
            if says:
                raise RuntimeError(f"C++ compile error\nOutput:\nmain.o: {says}\n")
            package_path.write(bytes(size))

        monkeypatch.setattr("torch._inductor.aoti_compile_and_package", write)
        monkeypatch.setattr("shutil.which", lambda name: name)
        write_network(nn.Linear(2, 2), (torch.rand(2, 2),), tmp_path / "a.pt2")

    with pytest.raises(InputError, match="^.*, where torch compiles: No space left on device; TORCHINDUCTOR_CACHE_DIR"):
        compiled("No space left on device", 0)
    with pytest.raises(InputError, match="exported as pt2: .*undefined reference"):
        compiled("undefined reference", 0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**13, hard))
    try:
        with pytest.raises(OSError) as full:
            compiled("", 2**14)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert full.value.filename == str(tmp_path / "a.pt2") and not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_networks_of_other_tasks_are_exported_for_a_size(linescan_here, tmp_path):
    sizes = {"embed_dim": 16, "depths": (1,), "d_state": 2}
    network = linescan.create_model("mambair_light_x2", **sizes).eval()
    torch.save(network.state_dict(), tmp_path / "own.pth")
    args = ["export", "mambair_light_x2", "-c", tmp_path / "own.pth", "--model-arg", "embed_dim=16"]
    args += ["--model-arg", "depths=[1]", "--model-arg", "d_state=2", "--format", "torchscript-trace"]
    status, _, said = linescan_here(*args, "--size", "8x12", "--out", tmp_path / "x2.ts")
    assert status == 0 and "its answers differ" in said
    run, x = read_network(tmp_path / "x2.ts"), torch.rand(5, 3, 8, 12)
    with torch.no_grad():
        assert difference(network(x), run(x)) < 1e-4
    status, _, said = linescan_here("classify", tmp_path / "x2.ts", tmp_path / "own.pth", "--trust")
    assert status == 2 and "a package for restoration" in said
    status, _, said = linescan_here(*args, "--size", "8x", "--out", tmp_path / "x2.ts")
    assert status == 2 and "512x1024" in said


def test_answers_are_compared_part_by_part():
    one, two = torch.tensor([4.0, 2.0]), torch.tensor([100.0])
    assert difference((one, {"a": two, "b": None}), [one + 1, two + 1]) == pytest.approx(0.25)
    assert difference(one / 100, one / 100 + 1e-3) == pytest.approx(1e-3), "small answers are held against 1"
    for wrong in ((one,), (one, two, two), (one, one), (one, two.log() * torch.nan)):
        assert difference((one, two), wrong) == float("inf")


def test_float16_graphs_take_and_give_float32(packed, tmp_path):
    network, card, _ = packed
    error = export_package(network, card, tmp_path / "half.onnx", "onnx", torch.float16, plain=True)
    assert 0 < error < 2e-2
    model = onnx.load(tmp_path / "half.onnx")
    assert onnx.TensorProto.FLOAT16 in {tensor.data_type for tensor in model.graph.initializer}
    assert not model.functions and {node.domain for node in model.graph.node} == {""}


def test_files_from_outside_are_refused_in_one_line(packed, tmp_path):
    _, _, path = packed
    (tmp_path / "broken.onnx").write_bytes(path.read_bytes()[:1000])
    (tmp_path / "empty.onnx").write_bytes(b"")
    plain = onnx.load(path)
    del plain.metadata_props[:]
    onnx.save(plain, tmp_path / "plain.onnx")
    entry = plain.metadata_props.add()
    entry.key, entry.value = "linescan", '{"model": "../../etc", "args": {}, "classes": [], "preprocess": {}}'
    onnx.save(plain, tmp_path / "evil.onnx")
    entry.value = "[" * 100_000
    onnx.save(plain, tmp_path / "deep.onnx")
    (tmp_path / "broken.pt2").write_bytes(b"PK not a zip")
    with zipfile.ZipFile(tmp_path / "other.ts", "w") as archive:
        archive.writestr("other/data.pkl", b"cos\nsystem\n(S'false'\ntR.")
    with zipfile.ZipFile(tmp_path / "torn.ts", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("torn/extra/linescan", "{" * 500)
    torn = (tmp_path / "torn.ts").read_bytes()
    start = torn.index(b"linescan") + len(b"linescan")
    (tmp_path / "torn.ts").write_bytes(torn[:start] + b"\xff\xff" + torn[start + 2 :])
    flags = torn.index(b"PK\x01\x02") + 8  # of encryption, in the list of what is there
    (tmp_path / "locked.ts").write_bytes(torn[:flags] + b"\x01" + torn[flags + 1 :])
    files = (
        "broken.onnx",
        "empty.onnx",
        "torn.ts",
        "locked.ts",
        "plain.onnx",
        "evil.onnx",
        "deep.onnx",
        "broken.pt2",
        "other.ts",
        "no.ts",
    )
    for name in files:
        with pytest.raises(CheckpointError) as error:
            open_package(tmp_path / name, trust=True)
        assert name in str(error.value) and len(str(error.value).splitlines()) == 1, name
    with pytest.raises(InputError, match="--trust"):
        open_package(tmp_path / "other.ts")


class Named(NamedTuple):
    first: torch.Tensor
    rest: dict


class Answers(nn.Module):
    def forward(self, x, y):
        return Named(x + y, {"b": [x, None], "a": y.half()})


def test_programs_name_no_class_of_an_answer():
    x, y = torch.rand(2, 3), torch.rand(2, 3)
    program = packages._to_program(Answers(), (x, y))
    assert treespec_loads(treespec_dumps(program.call_spec.out_spec)) == program.call_spec.out_spec
    x, y = torch.rand(5, 3), torch.rand(5, 3)
    assert difference(Answers()(x, y), program.module()(x, y)) == 0
    assert {part.dtype for part in tensors(packages.Halved(Answers())(x, y))} == {torch.float32}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor compiles C++")
def test_a_compiled_package_classifies_as_its_model_does(packed, image, tmp_path, monkeypatch):
    monkeypatch.setattr("torch._inductor.codecache._precompile_header", None)  # headers are not compiled by themselves
    network, card, path = packed
    with inductor.patch({"cpp.vec_isa_ok": False}):  # else it compiles ten files to see what the compiler knows
        assert export_package(network, card, tmp_path / "digits.pt2", "pt2") < 1e-4
    with zipfile.ZipFile(tmp_path / "digits.pt2") as archive:
        source = b"".join(archive.read(name) for name in archive.namelist() if name.endswith(".cpp"))
    assert b"#pragma omp parallel" in source and b"parallel num_threads" not in source, "threads are the reader's"
    with pytest.raises(InputError, match="--trust"):
        Classifier(checkpoint=tmp_path / "digits.pt2")
    got = Classifier(checkpoint=tmp_path / "digits.pt2", trust=True)(image).probabilities
    torch.testing.assert_close(got, Classifier(checkpoint=path)(image).probabilities, rtol=1e-4, atol=1e-5)
