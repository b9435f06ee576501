"""Packages: a network in one file for another runtime; a classifier's says its preprocessing and its classes, too.

    onnx                standard operators of ONNX; runs in ONNX Runtime and others, without linescan and torch, and in
                        ONNX Runtime with linescan's kernels
    pt2                 compiled ahead of time by AOTInductor for this machine's processor; runs in torch
    torchscript-trace   recorded by torch.jit.trace; runs in torch

Batches may have any size, images have the size of the export. The last two call linescan's operators: a program that
loads them imports linescan first. Both are programs, and are opened only where the user says that they are trusted.

`write_network` and `read_network` take any network; `export_package` and `open_package` are of classifiers.
"""

import copy
import errno
import io
import json
import os
import shutil
import tempfile
import warnings
import zipfile
import zlib
from contextlib import contextmanager
from inspect import Parameter, signature
from itertools import islice
from math import inf, isnan
from pathlib import Path
from typing import Any, Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from .. import zoo
from .._compat import quick_onnx_export
from ..checkpoint import CARD, CheckpointError
from ..errors import InputError, known, one_line
from ..extras import require
from ..scans.exported import DOMAIN, Functions, functions
from ..scans.kernels import cpu
from .atomic import atomic, atomic_path
from .cards import ModelCard

__all__ = [
    "FORMATS", "Halved", "Package", "SideBySide", "difference", "expect_format", "export_package", "is_package",
    "open_package", "read_network", "tensors", "write_network",
]  # fmt: skip

FORMATS = {"onnx": ".onnx", "pt2": ".pt2", "torchscript-trace": ".ts"}
"""The suffix of each format; a file is taken for what its suffix says."""

OPSET = 20  # of ONNX
LONGEST_CARD = 2**24  # bytes
_FULL = errno.ENOSPC, errno.EDQUOT, errno.EFBIG
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2}  # of a package's answers, in shares of the largest


class Package(nn.Module):
    """A package that was opened, called as the network that was exported: images (B, C, H, W) -> logits.

    Args:
        run: the function behind it.
        card: of the network.
    """

    def __init__(self, run: Callable[[Tensor], Tensor], card: ModelCard):
        super().__init__()
        self.run, self.num_classes, self.num_frames = run, len(card.classes), _frames(card)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)


def _frames(card: ModelCard) -> int:
    """Of a clip that the model reads; 0 for a model of images."""
    entry = zoo.find(card.model) if zoo.is_model(card.model) else None
    if entry is None or len(entry.inputs[0]) != 4:
        return 0
    return {**entry.args, **card.args}.get("num_frames", entry.inputs[0][1])


def is_package(path: str | Path | None) -> bool:
    """Whether a path has the suffix of a package."""
    return path is not None and Path(path).suffix.lower() in FORMATS.values()


def _format_of(path: Path) -> str:
    return next(key for key, suffix in FORMATS.items() if suffix == path.suffix.lower())


def expect_format(path: Path, format: str, dtype: torch.dtype) -> None:
    """Raises InputError: the path has not the suffix of the format, which does not take the dtype, or needs a package
    or a compiler that is not there."""
    suffix = FORMATS[known("format", format, FORMATS)]
    if path.suffix.lower() != suffix:
        raise InputError(f"a package of the format {format} is a file *{suffix}, not {path.name}")
    if dtype not in TOLERANCE or dtype == torch.float16 and format != "onnx":
        raise InputError(
            f"packages are float32, or float16 as onnx, not {str(dtype).removeprefix('torch.')} as {format}"
        )
    _expect_tools(format)


def _expect_tools(format: str) -> None:
    """Raises InputError: a package that writes the format is not installed, or there is no compiler."""
    for package in ("onnx", "onnxscript", "onnxruntime") if format == "onnx" else ():
        require(package, "onnx")
    if format == "pt2" and not (shutil.which("g++") or shutil.which("clang++")):
        raise InputError("the format pt2 is compiled: it needs a C++ compiler (g++ or clang++)")


# -- writing ----------------------------------------------------------------------------------------------------------


class Halved(nn.Module):
    """A network in float16 that takes and gives float32; the states of recurrences are float32."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network.half()

    def forward(self, *inputs: Tensor) -> Any:
        return _plain(self.network(*(x.half() for x in inputs)), lambda x: x.float() if x.is_floating_point() else x)


class _Plain(nn.Module):
    """A network whose answers have no classes of their own: a program in a file cannot name them."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, *inputs: Tensor) -> Any:
        return _plain(self.network(*inputs))


def _plain(answer: Any, change: Callable[[Tensor], Tensor] = lambda x: x) -> Any:
    """An answer in plain tuples and dictionaries, its tensors changed."""
    if isinstance(answer, dict):
        return {key: _plain(part, change) for key, part in answer.items()}
    if isinstance(answer, (tuple, list)):
        return tuple(_plain(part, change) for part in answer)
    return change(answer) if isinstance(answer, Tensor) else answer


def write_network(
    network: nn.Module, inputs: tuple[Tensor, ...], path: str | Path, note: str = "", plain: bool = False
) -> None:
    """Writes a network of any task, in the format that the path's suffix names.

        write_network(linescan.create_model("segman_seg_tiny").eval(), (torch.rand(2, 3, 512, 512),), "segman.onnx")

    Args:
        network: on the CPU, in evaluation mode.
        inputs: an example of each, of a batch of two or more: batches may then have any size, all else is as here.
        path: `*.onnx`, `*.pt2` or `*.ts`.
        note: a text that the file carries.
        plain: whether an ONNX graph has no functions. Else recurrences are functions of the domain "linescan": ONNX
            Runtime runs linescan's kernels in their place where the library is registered, as `read_network` does.

    Raises:
        InputError: the suffix is no format's; a package that the format needs, or a compiler, is missing; the network
            cannot be exported.
        OSError: the file cannot be written.
    """
    path = Path(path)
    if not is_package(path):
        raise InputError(f"a package is a file *{', *'.join(FORMATS.values())}, not {path.name}")
    format = _format_of(path)
    if plain and format != "onnx":
        raise InputError(f"{format} has no functions that could be left out: `plain` is for onnx")
    _expect_tools(format)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporters' own, of their insides
        try:
            with torch.no_grad():
                _WRITERS[format](network, inputs, note, path, **({"plain": True} if plain else {}))
        except (InputError, OSError):
            raise
        except Exception as error:  # an exporter may raise anything at all
            reason = one_line(error.__cause__ or error, 300)
            raise InputError(f"cannot be exported as {format}: {reason}") from error


def export_package(
    network: nn.Module,
    card: ModelCard,
    path: str | Path,
    format: str,
    dtype: torch.dtype = torch.float32,
    shapes: Sequence[Sequence[int]] | None = None,
    plain: bool = False,
) -> float:
    """Writes a package, after its answers for a batch of one and of three samples were held against the network's.

    Args:
        network: of images or clips.
        card: what the package says of itself.
        path: the file, with the suffix of the format.
        format: a key of `FORMATS`.
        dtype: torch.float32; or torch.float16 for ONNX, whose graph then takes and gives float32, and keeps the states
            of recurrences in it.
        shapes: of each input of one sample; by default of one image of `card.preprocess.size`, or of a clip of them.
        plain: as of `write_network`.

    Returns:
        The largest difference between the answers, as a share of the largest one.

    Raises:
        InputError: the suffix is another one's; a package that the format needs, or a compiler, is missing; the network
            cannot be exported, or the package answers something else.
        OSError: the file cannot be written; `filename` is `path`.
    """
    path = Path(path)
    expect_format(path, format, dtype)
    if shapes is None:
        size, frames = card.preprocess.size, getattr(network, "num_frames", 0)
        shapes = [(size[0], frames, *size[1:]) if frames else size]
    exact = network.cpu().float().eval()
    generator = torch.Generator().manual_seed(0)
    samples = [torch.randn(3, *shape, generator=generator) for shape in shapes]
    ready = Halved(copy.deepcopy(exact)) if dtype == torch.float16 else exact
    with _beside(path) as made:
        try:
            note = json.dumps(card.as_dict(), allow_nan=False)
            write_network(ready, tuple(x[:2] for x in samples), made, note, plain)
        except InputError as error:
            raise InputError(f"{card.model}: {error}") from error
        run = read_network(made)
        with torch.no_grad():
            batches = [[x[:n] for x in samples] for n in (1, 3)]
            error = max(difference(exact(*batch), run(*batch)) for batch in batches)
        if not error <= TOLERANCE[dtype]:
            raise InputError(f"{card.model} as {format} answers something else: it is off by {error:.1e}")
        with open(made, "rb") as source, atomic(path) as file:
            shutil.copyfileobj(source, file, 2**20)
    return error


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A file of the same suffix in a folder that is removed; what cannot be written there is said of `path`."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".export-") as folder:
            yield Path(folder) / f"model{path.suffix.lower()}"
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise


def tensors(answer: Any) -> list[Tensor]:
    """The floating-point tensors of an answer, in order: it is one, or tuples, lists and tables of them."""
    if isinstance(answer, Tensor):
        return [answer] if answer.is_floating_point() else []
    parts = answer.values() if isinstance(answer, dict) else answer if isinstance(answer, (tuple, list)) else ()
    return [tensor for part in parts for tensor in tensors(part)]


def difference(want: Any, got: Any) -> float:
    """The largest difference between two answers, as a share of the largest number (at least 1) of the tensor at hand.

    Infinity where a shape differs, or a number is none.
    """
    pairs = list(zip(tensors(want), tensors(got)))
    if [x.shape for x in tensors(want)] != [x.shape for x in tensors(got)]:
        return inf
    worst = [((b.float() - a).abs().max() / a.abs().max().clamp_min(1)).item() for a, b in pairs if a.numel()]
    return max((inf if isnan(share) else share for share in worst), default=0.0)


def _write_onnx(network: nn.Module, inputs: tuple[Tensor, ...], note: str, path: Path, plain: bool = False) -> None:
    names = ["images"] if len(inputs) == 1 else [f"input{i}" for i in range(len(inputs))]
    plain = plain or cpu.missing() is not None
    with functions(kernels=not plain) as found:
        program = _to_onnx(network, inputs, names, _any_batch(network, inputs))
    if found.bodies:
        _add_functions(program.model, found)
    if plain:
        _inline(program.model)
    if note:
        program.model.metadata_props[CARD] = note
    with atomic_path(path) as partial:
        program.save(partial)


def _to_onnx(network: nn.Module, inputs: tuple[Tensor, ...], names: Sequence[str], dynamic: tuple, **options):
    with quick_onnx_export():
        return torch.onnx.export(
            network, inputs, dynamo=True, opset_version=OPSET, verbose=False, input_names=names, dynamic_shapes=dynamic,
            custom_translation_table={
                torch.ops.aten.conv3d.default: _convolve_volumes, torch.ops.aten.to.dtype: _cast,
            }, **options,
        )  # fmt: skip


def _cast(x, dtype, non_blocking=False, copy=False, memory_format=None):
    """torch has none of its own: it would trace each by itself, and most change nothing."""
    from onnxscript import opset20

    return opset20.Identity(x) if x.dtype == dtype else opset20.Cast(x, to=dtype)


def _convolve_volumes(
    x, weight, bias=None, stride=(1, 1, 1), padding=(0, 0, 0), dilation=(1, 1, 1), groups: int = 1
):  # fmt: skip
    """torch's own translation makes a bias of another shape where there is none."""
    from onnxscript import opset20

    pads = [*padding, *padding]
    return opset20.Conv(x, weight, bias, strides=list(stride), pads=pads, dilations=list(dilation), group=groups)


class SideBySide(nn.Module):
    """Networks of different inputs as one, which is exported faster than each by itself.

    Args:
        networks: any.
        counts: how many inputs each has.
    """

    def __init__(self, networks: Sequence[nn.Module], counts: Sequence[int]):
        super().__init__()
        self.networks, self.counts = nn.ModuleList(networks), counts

    def forward(self, *inputs: Tensor) -> list:
        rest = iter(inputs)
        return [run(*islice(rest, count)) for run, count in zip(self.networks, self.counts)]


def _add_functions(model, found: Functions) -> None:
    """Adds the bodies of the functions that a model calls."""
    import onnx_ir as ir

    calls = [node for node in model.graph.all_nodes() if node.domain == DOMAIN]
    for node in calls:
        node.overload = node.attributes.pop("body").as_string()
    bodies = {node.overload: found.bodies[node.overload] for node in calls}
    inputs = {f"{name}.{key}": example for name, body in bodies.items() for key, example in body.examples.items()}
    counts = {node.overload: len(node.outputs) for node in calls}
    outputs = [f"{name}:{i}" for name in bodies for i in range(counts[name])]
    whole = _to_onnx(
        SideBySide([body.module for body in bodies.values()], [len(body.examples) for body in bodies.values()]),
        tuple(torch.zeros(shape, dtype=dtype) for shape, dtype in inputs.values()), list(inputs),
        (tuple(dict.fromkeys(axes, torch.export.Dim.DYNAMIC) for body in bodies.values() for axes in body.dynamic),),
        output_names=outputs,
    ).model.graph  # fmt: skip
    for name, body in bodies.items():
        graph = ir.convenience.extract(
            whole,
            [key for key in inputs if key.startswith(f"{name}.")],
            [key for key in outputs if key.startswith(f"{name}:")],
        )
        for constant in list(graph.initializers.values()):  # functions have none
            node = ir.node("Constant", [], {"value": constant.const_value})
            graph.insert_before(graph[0], node)
            del graph.initializers[constant.name]
            constant.replace_all_uses_with(node.outputs[0])
        given = {x.name: x for x in graph.inputs}
        graph.inputs[:] = [given.get(f"{name}.{key}") or ir.val(f"no_{key}") for key in body.arguments]
        attributes = [ir.Attr(key, ir.AttributeType.UNDEFINED, None) for key in body.attributes]
        function = ir.Function(DOMAIN, body.operator, name, graph=graph, attributes=attributes)
        model.functions[function.identifier()] = function
    model.graph.opset_imports[DOMAIN] = 1


def _inline(model) -> None:
    """Puts bodies in the place of calls: a deep network traces each loop once all the same."""
    from onnx_ir.passes import common

    common.InlinePass()(model)
    model.opset_imports.pop(DOMAIN, None)


def _any_batch(network: nn.Module, inputs: tuple[Tensor, ...]) -> tuple:
    batch = torch.export.Dim("batch", min=1)
    axes = tuple({0: batch} for _ in inputs)
    kinds = {parameter.kind for parameter in signature(network.forward).parameters.values()}
    return (axes,) if Parameter.VAR_POSITIONAL in kinds else axes  # forward(*inputs) has one argument


def _to_program(network: nn.Module, inputs: tuple[Tensor, ...]) -> torch.export.ExportedProgram:
    plain = _Plain(network)
    return torch.export.export(plain, inputs, dynamic_shapes=_any_batch(plain, inputs))


def _write_pt2(network: nn.Module, inputs: tuple[Tensor, ...], note: str, path: Path) -> None:
    options = {
        "aot_inductor.precompile_headers": False,  # which takes longer than the two files that would use them
        "cpp.dynamic_threads": True,  # it runs in as many as the program that opens it has,
        "cpp.threads": os.cpu_count(),  # and loops are cut for those that there may be
    }
    program, written = _to_program(network, inputs), io.BytesIO()
    try:
        torch._inductor.aoti_compile_and_package(program, package_path=written, inductor_configs=options)
    except Exception as error:
        full = next((reason for reason in map(os.strerror, _FULL) if reason in str(error)), None)
        if full is None:
            raise
        from torch._inductor.runtime.cache_dir_utils import cache_dir

        raise InputError(
            f"{cache_dir()}, where torch compiles: {full}; TORCHINDUCTOR_CACHE_DIR names another folder"
        ) from error
    if note:
        with zipfile.ZipFile(written, "a") as archive:
            top = archive.namelist()[0].partition("/")[0]
            archive.writestr(f"{top}/extra/{CARD}", note)
    _write(path, written)


def _write_trace(network: nn.Module, inputs: tuple[Tensor, ...], note: str, path: Path) -> None:
    traced = torch.jit.trace(network, inputs, check_trace=False)
    written = io.BytesIO()
    torch.jit.save(traced, written, _extra_files={CARD: note} if note else {})
    _write(path, written)


def _write(path: Path, written: io.BytesIO) -> None:
    """What torch has written in memory: its own files do not say that a disk is full."""
    with atomic(path) as file:
        file.write(written.getbuffer())


_WRITERS: dict[str, Callable[..., None]] = {"onnx": _write_onnx, "pt2": _write_pt2, "torchscript-trace": _write_trace}


# -- reading ----------------------------------------------------------------------------------------------------------


def open_package(path: str | Path, trust: bool = False) -> tuple[Package, ModelCard]:
    """Opens a package.

    A package of ONNX is data. The others are programs, which could do anything: they are opened with `trust` only.

    Raises:
        InputError: a program that is not trusted; ONNX Runtime is missing.
        CheckpointError: the file is damaged, no package, or one that does not say what its classes are.
    """
    path = Path(path)
    format = _format_of(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: {'a folder' if path.is_dir() else 'no such file'}")
    if format != "onnx" and not trust:
        raise InputError(f"{path} is a program ({format}) and could do anything: --trust opens it; onnx is data alone")
    run = None
    if format == "onnx":  # its card stands in the model itself
        run = _OnnxSession(path)
        text = run.metadata.get(CARD)
    else:
        text = _zipped_card(path)
    if text is None:
        raise CheckpointError(f"{path}: not a package of linescan: it says nothing of its classes and preprocessing")
    try:
        card = ModelCard.from_dict(json.loads(text))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: its card is damaged: {one_line(error)}") from None
    task = zoo.find(card.model).task if zoo.is_model(card.model) else "classification"
    if task != "classification":
        raise CheckpointError(f"{path}: a package for {task}; what runs here is classifiers")
    if isinstance(run, _OnnxSession):
        run.expect_classifier()
    return Package(run or read_network(path), card), card


def read_network(path: str | Path, kernels: bool = True) -> Callable[..., Any]:
    """What `write_network` wrote, as a function of tensors; answers are tensors, or plain sequences and dictionaries.

    A .pt2 or .ts file is a program: only those from a trusted place may be opened.

    Args:
        path: the file.
        kernels: whether ONNX Runtime may run linescan's kernels in place of the functions of an ONNX file.

    Raises:
        CheckpointError: the file is damaged, or was made for another torch.
    """
    path = Path(path)
    return _OnnxSession(path, kernels) if _format_of(path) == "onnx" else _PROGRAMS[path.suffix.lower()](path)


def _zipped_card(path: Path) -> str | None:
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                if entry.filename.endswith(f"/extra/{CARD}") and entry.file_size <= LONGEST_CARD:
                    return archive.read(entry).decode("utf-8")
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, OSError, RuntimeError) as error:
        raise CheckpointError(f"{path}: damaged, or no package: {one_line(error)}") from None
    return None


class _OnnxSession:
    """A model in ONNX Runtime on the CPU, in as many threads as torch has."""

    def __init__(self, path: Path, kernels: bool = True):
        require("onnxruntime", "onnx")
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3  # errors alone, which are raised too
        if kernels:
            _register_kernels(options)
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # of many classes, all ONNX Runtime's own
            raise CheckpointError(f"{path}: damaged, or no ONNX model: {one_line(error)}") from None
        inputs, outputs = self.session.get_inputs(), self.session.get_outputs()
        self.path, self.inputs, self.answers = path, inputs, len(outputs)
        self.metadata = self.session.get_modelmeta().custom_metadata_map

    def expect_classifier(self) -> None:
        """Raises CheckpointError unless there is one input, and one answer."""
        if len(self.inputs) != 1 or self.answers != 1 or self.inputs[0].type != "tensor(float)":
            raise CheckpointError(f"{self.path}: a package has one input and one answer in float32")

    def __call__(self, *inputs: Tensor) -> Tensor | list[Tensor]:
        named = {given.name: x.detach().cpu().numpy() for given, x in zip(self.inputs, inputs, strict=True)}
        answers = [torch.from_numpy(answer) for answer in self.session.run(None, named)]
        return answers if len(answers) > 1 else answers[0]


def _register_kernels(options) -> None:
    """Lets a session run linescan's kernels; where they are missing, it runs the functions that stand in the file."""
    if cpu.missing() is None:
        try:
            options.register_custom_ops_library(str(cpu.LIBRARY))
        except Exception:  # of many classes: a library or an ONNX Runtime from before there were such kernels
            return


def _in_torch(load: Callable[[str], Callable]) -> Callable[[Path], Callable]:
    def read(path: Path) -> Callable[..., Any]:
        try:
            run = load(str(path))
        except Exception as error:
            raise CheckpointError(f"{path}: damaged, or made for another torch: {one_line(error)}") from None

        def call(*inputs: Tensor) -> Any:
            answer = run(*inputs)
            return answer[0] if isinstance(answer, Sequence) and len(answer) == 1 else answer

        return call

    return read


_PROGRAMS: dict[str, Callable] = {
    FORMATS["pt2"]: _in_torch(lambda path: torch._inductor.aoti_load_package(path)),
    FORMATS["torchscript-trace"]: _in_torch(lambda path: torch.jit.load(path, map_location="cpu")),
}
