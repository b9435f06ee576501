"""Packages: a model, how it wants its images and what its classes are called, in one file for another runtime.

    onnx                standard operators of ONNX; runs in ONNX Runtime and others, without linescan and torch
    pt2                 compiled ahead of time by AOTInductor for this machine's processor; runs in torch
    torchscript-trace   recorded by torch.jit.trace; runs in torch

Batches may have any size, images have the size of the export. The last two call linescan's operators: a program that
loads them imports linescan first. Both are programs, and are opened only where the user says that they are trusted.
"""

import json
import shutil
import tempfile
import warnings
import zipfile
from pathlib import Path
from typing import Callable, Sequence

import torch
from torch import Tensor, nn

from .. import zoo
from ..checkpoint import CARD, CheckpointError
from ..errors import InputError, known, one_line
from ..extras import require
from .atomic import atomic
from .cards import ModelCard

__all__ = ["FORMATS", "Package", "expect_suffix", "export_package", "is_package", "open_package"]

FORMATS = {"onnx": ".onnx", "pt2": ".pt2", "torchscript-trace": ".ts"}
"""The suffix of each format; a file is taken for what its suffix says."""

OPSET = 20  # of ONNX
LONGEST_CARD = 2**24  # bytes
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


def expect_suffix(path: Path, format: str) -> str:
    """The suffix of a format; raises InputError where the path has another."""
    suffix = FORMATS[known("format", format, FORMATS)]
    if path.suffix.lower() != suffix:
        raise InputError(f"a package of the format {format} is a file *{suffix}, not {path.name}")
    return suffix


# -- writing ----------------------------------------------------------------------------------------------------------


class _Halved(nn.Module):
    """A network in float16 that takes and gives float32."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network.half()

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x.half()).float()


def export_package(
    network: nn.Module, card: ModelCard, path: str | Path, format: str, dtype: torch.dtype = torch.float32
) -> float:
    """Writes a package, after its answers for a batch of one and of three images were held against the network's.

    Args:
        network: of images or clips; its answer is one tensor.
        card: whose `preprocess.size` is the size of the images.
        path: the file, with the suffix of the format.
        format: a key of `FORMATS`.
        dtype: torch.float32; or torch.float16 for ONNX, whose graph then takes and gives float32, and keeps the states
            of recurrences in it.

    Returns:
        The largest difference between the answers, as a share of the largest answer.

    Raises:
        InputError: the suffix is another one's; a package that the format needs, or a compiler, is missing; the network
            cannot be exported, or the package answers something else.
    """
    path = Path(path)
    suffix = expect_suffix(path, format)
    if dtype not in TOLERANCE or dtype == torch.float16 and format != "onnx":
        raise InputError(f"packages are float32, or float16 as onnx, not {dtype} as {format}")
    size = card.preprocess.size
    frames = getattr(network, "num_frames", 0)
    shape = (size[0], frames, *size[1:]) if frames else tuple(size)
    exact = network.cpu().float().eval()
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(3, *shape, generator=generator)
    with torch.no_grad():
        want = exact(images)
    if not isinstance(want, Tensor):
        raise InputError(f"a package has one answer, {card.model} gives {type(want).__name__}")
    ready = _Halved(exact) if dtype == torch.float16 else exact
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".export-") as folder:
        made = Path(folder) / f"model{suffix}"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporters' own, of their insides
            try:
                with torch.no_grad():
                    _WRITERS[format](ready, images[:2], card, made)
            except InputError:
                raise
            except Exception as error:  # an exporter may raise anything at all
                reason = one_line(error.__cause__ or error, 300)
                raise InputError(f"{card.model} cannot be exported as {format}: {reason}") from error
        run = _READERS[format](made)
        with torch.no_grad():
            answers = torch.cat([run(images[:1]), run(images[1:])]) if format == "onnx" else run(images)
            one = run(images[:1])
        scale = want.abs().max().clamp_min(1)
        error = max(((got - of).abs().max() / scale).item() for got, of in ((answers, want), (one, want[:1])))
        if not error <= TOLERANCE[dtype]:
            raise InputError(f"{card.model} as {format} answers something else: it is off by {error:.1e}")
        with open(made, "rb") as source, atomic(path) as file:
            shutil.copyfileobj(source, file, 2**20)
    return error


def _card_text(card: ModelCard) -> str:
    return json.dumps(card.as_dict(), allow_nan=False)


def _write_onnx(network: nn.Module, images: Tensor, card: ModelCard, path: Path) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        require(package, "onnx")
    program = torch.onnx.export(
        network, (images,), dynamo=True, opset_version=OPSET, verbose=False, input_names=["images"],
        output_names=["answers"], dynamic_shapes=({0: torch.export.Dim("batch")},),
    )  # fmt: skip
    program.model.metadata_props[CARD] = _card_text(card)
    program.save(path)


def _write_pt2(network: nn.Module, images: Tensor, card: ModelCard, path: Path) -> None:
    if not (shutil.which("g++") or shutil.which("clang++")):
        raise InputError("the format pt2 is compiled: it needs a C++ compiler (g++ or clang++)")
    program = torch.export.export(network, (images,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    with zipfile.ZipFile(path, "a") as archive:
        top = archive.namelist()[0].partition("/")[0]
        archive.writestr(f"{top}/extra/{CARD}", _card_text(card))


def _write_trace(network: nn.Module, images: Tensor, card: ModelCard, path: Path) -> None:
    traced = torch.jit.trace(network, images, check_trace=False)
    torch.jit.save(traced, str(path), _extra_files={CARD: _card_text(card)})


_WRITERS = {"onnx": _write_onnx, "pt2": _write_pt2, "torchscript-trace": _write_trace}


# -- reading ----------------------------------------------------------------------------------------------------------


def open_package(path: str | Path, trust: bool = False) -> tuple[Package, ModelCard]:
    """Opens a package.

    A package of ONNX is data. The others are programs, which could do anything: they are opened with `trust` only.

    Raises:
        InputError: a program that is not trusted; ONNX Runtime is missing.
        CheckpointError: the file is damaged, no package, or one that does not say what its classes are.
    """
    path = Path(path)
    format = next(key for key, suffix in FORMATS.items() if suffix == path.suffix.lower())
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    if format != "onnx" and not trust:
        raise InputError(f"{path} is a program ({format}) and could do anything: --trust opens it; onnx is data alone")
    run = None
    if format == "onnx":  # its card stands in the model itself
        run = _READERS[format](path)
        text = run.metadata.get(CARD)
    else:
        text = _zipped_card(path)
    if text is None:
        raise CheckpointError(f"{path}: not a package of linescan: it says nothing of its classes and preprocessing")
    try:
        card = ModelCard.from_dict(json.loads(text))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: its card is damaged: {one_line(error)}") from None
    return Package(run or _READERS[format](path), card), card


def _zipped_card(path: Path) -> str | None:
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                if entry.filename.endswith(f"/extra/{CARD}") and entry.file_size <= LONGEST_CARD:
                    return archive.read(entry).decode("utf-8")
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError) as error:
        raise CheckpointError(f"{path}: damaged, or no package: {one_line(error)}") from None
    return None


class _OnnxSession:
    """A model in ONNX Runtime on the CPU, in as many threads as torch has."""

    def __init__(self, path: Path):
        require("onnxruntime", "onnx")
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3  # errors alone, which are raised too
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # of many classes, all ONNX Runtime's own
            raise CheckpointError(f"{path}: damaged, or no ONNX model: {one_line(error)}") from None
        inputs, outputs = self.session.get_inputs(), self.session.get_outputs()
        if len(inputs) != 1 or len(outputs) != 1 or inputs[0].type != "tensor(float)":
            raise CheckpointError(f"{path}: a package has one input and one answer in float32")
        self.input = inputs[0].name
        self.metadata = self.session.get_modelmeta().custom_metadata_map

    def __call__(self, x: Tensor) -> Tensor:
        [answer] = self.session.run(None, {self.input: x.detach().cpu().float().numpy()})
        return torch.from_numpy(answer)


def _in_torch(load: Callable[[str], Callable]) -> Callable[[Path], Callable]:
    def read(path: Path) -> Callable[[Tensor], Tensor]:
        try:
            run = load(str(path))
        except Exception as error:
            raise CheckpointError(f"{path}: damaged, or made for another torch: {one_line(error)}") from None

        def call(x: Tensor) -> Tensor:
            answer = run(x)
            return answer[0] if isinstance(answer, Sequence) else answer

        return call

    return read


_READERS: dict[str, Callable] = {
    "onnx": _OnnxSession,
    "pt2": _in_torch(lambda path: torch._inductor.aoti_load_package(path)),
    "torchscript-trace": _in_torch(lambda path: torch.jit.load(path, map_location="cpu")),
}
