#!/usr/bin/env python
"""The tables of docs/deploy.md: what each family gives in each format, how exact it is, and how fast.

    python tools/deploy.py                                          # all cells that are not there yet
    python tools/deploy.py --model 'vim*' --format onnx --again     # some of them, anew
    python tools/deploy.py --prepare                                # what takes minutes before a first call
    python tools/deploy.py --time                                   # milliseconds; on a quiet machine

A cell is one model in one format, in a process of its own with a limit of time. Its result is kept in
runs/deploy/NAME.FORMAT.json before the next one begins, and the page is written after each: a run that was ended goes
on where it was. What works stays on the page until it is computed anew; times, which are of one machine, do not.
Models are the smallest form of each family, with random weights: only their numbers count.
"""

import copy
import json
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Callable, Sequence

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import timm  # noqa: E402
import torch  # noqa: E402
import typer  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import linescan  # noqa: E402
from linescan.engine import packages  # noqa: E402
from linescan.engine.atomic import atomic  # noqa: E402
from linescan.engine.benchmark import machine  # noqa: E402
from linescan.errors import one_line  # noqa: E402
from linescan.quantise import Recipe, quantise  # noqa: E402

PAGE = Path(__file__).resolve().parents[1] / "docs" / "deploy.md"
SIZES = (64, 96), (64, 64)
LARGE = (224, 256), (224, 224)  # for windows of 11 on a map of an eighth of the side


@dataclass(frozen=True)
class Small:
    """The smallest form of a model.

    Attributes:
        args: of `linescan.create_model`.
        shapes: of the inputs of one sample; "HW" stands for height and width.
        sizes: two pairs of height and width.
        sized: the argument that has the size, where the model is built for one.
    """

    args: dict[str, Any] = field(default_factory=dict)
    shapes: tuple[tuple, ...] = ((3, "HW"),)
    sizes: Sequence[tuple[int, int]] = SIZES
    sized: str | None = None

    def model(self, name: str, size: tuple[int, int]) -> nn.Module:
        """With random weights, the same at every call."""
        torch.manual_seed(0)
        model = linescan.create_model(name, **self.args, **({self.sized: size} if self.sized else {})).eval()
        for module in model.modules():  # a block that begins as nothing, or as a constant, would say nothing
            for weight in module.parameters(recurse=False):
                if weight.numel() > 1 and weight.std() == 0:
                    nn.init.normal_(weight, weight.mean().item(), 0.2)
        return model

    def inputs(self, batch: int, size: tuple[int, int], seed: int = 0) -> tuple[Tensor, ...]:
        """A batch."""
        shapes = [[n for side in shape for n in (size if side == "HW" else (side,))] for shape in self.shapes]
        generator = torch.Generator().manual_seed(seed)
        return tuple(torch.rand(batch, *shape, generator=generator) for shape in shapes)


PLAIN = Small({"depth": 1, "embed_dim": 32, "num_classes": 5}, sized="img_size")
HEADS = Small({"depth": 1, "num_classes": 5}, sized="img_size")  # whose width is that of their heads
STAGES = Small({"depths": (1, 1, 1, 1), "num_classes": 5})
TWO = Small({"depths": (1, 1), "dims": (16, 32), "num_classes": 5})
CLIP = Small({**HEADS.args, "num_frames": 2}, ((3, 2, "HW"),), sized="img_size")
PAIR = (3, "HW"), (3, "HW")
V2 = {"embed_dim": 24, "depths": (1,), "d_state": 4, "num_heads": 2, "window_size": 4, "num_tokens": 8, "inner_rank": 6}
MODELS: dict[str, dict[str, Small]] = {
    "Images and clips": {
        "vim_tiny_patch16_224": PLAIN,
        "local_vim_tiny": PLAIN,
        "local_vim_tiny_middle_cls_token": PLAIN,
        "local_vssm_tiny": TWO,
        "vmamba_tiny_s1l8": TWO,
        "vmamba_vanilla_tiny": TWO,
        "vig_tiny": HEADS,
        "vig_h_tiny": STAGES,
        "vrwkv_tiny": HEADS,
        "vrwkv6_tiny": HEADS,
        "mambavision_tiny": STAGES,
        "mamband_small_patch16_224": Small({"depths": (1,), "num_classes": 5}, sized="img_size"),
        "mamband_video_small_patch16_224": CLIP,
        "videomamba_tiny_patch16_224": HEADS,
        "videomamba_video_tiny_patch16_224": CLIP,
        "rsmamba_base": PLAIN,
        "rwkvsam_tiny": STAGES,
        "segman_tiny": Small(STAGES.args, sizes=LARGE),
        "van_b0": STAGES,
        "care_s0": STAGES,
        "inline_deit_tiny": HEADS,
        "inline_pvt_tiny": Small(STAGES.args, sized="img_size"),
        "inline_swin_tiny": STAGES,
        "inline_cswin_tiny": STAGES,
        "scan_tiny": HEADS,
        "scanh_tiny": STAGES,
    },
    "Whole networks": {
        "segman_seg_tiny": Small({"backbone": {"depths": (1, 1, 1, 1)}, "num_classes": 5}, sizes=LARGE),
        "sigma_tiny": Small({"depths": (1, 1, 1, 1), "dim": 32, "num_classes": 3, "decoder_depths": (1, 1, 1)}, PAIR),
        "mhsvm_vmunet_3h": Small({"dims": (16, 32, 64, 128), "depths": (1, 1, 1, 1), "depths_decoder": (1, 1, 1, 1)}),
        "mambafcs_base": Small({"depths": (1, 1, 1, 1), "dims": 16}, PAIR),
        "rwkvsam_small_prompt": Small({"depths": (1, 1, 1), "dims": (16, 32, 32), "dim": 32}, ((3, "HW"), (2, 2))),
        "mambaad_resnet34": Small({"teacher": "resnet18", "depths": (1, 2, 1, 1), "d_state": 2, "directions": 2}),
        "mamba_yolo_world_small": Small(
            {"width": 0.125, "last_chans": 256, "text_dim": 32, "d_state": 8, "head_dim": 16, "num_classes": 8},
            ((3, "HW"), (8, 32)),
        ),
        "mamband_unetr_small": Small(
            {"embed_dim": 16, "depth": 12, "feature_size": 4, "num_classes": 3}, ((1, 32, "HW"),), ((32, 32), (32, 48))
        ),
        "mambair_light_x2": Small({"embed_dim": 32, "depths": (1,), "d_state": 4}, sizes=((16, 24), (20, 20))),
        "mambair_unet_dn": Small({"dim": 32, "depths": (1, 1, 1, 1), "refinement": 1}, sizes=((16, 24), (32, 16))),
        "mambair_v2_light_x2": Small(V2, sizes=((16, 24), (20, 20))),
    },
}  # fmt: skip
FORMATS = {
    "onnx": "ONNX",
    "onnx-fp16": "ONNX, float16",
    "pt2": "AOTInductor",
    "torchscript-trace": "trace",
    "compile": "torch.compile",
    "export": "torch.export",
    "int8": "int8",
}
"""The columns, by their names in files."""


class Unfit(Exception):
    """The reason why a cell is empty."""


# -- one cell ---------------------------------------------------------------------------------------------------------


def packed(small: Small, name: str, format: str, count: int) -> str:
    """A package, made with a batch of two, gives the answers for batches of one and of three; ONNX at `count` sizes.

    ONNX Runtime runs a graph with linescan's kernels, and once more without.
    """
    half, worst = format == "onnx-fp16", 0.0
    sizes = small.sizes[: count if "onnx" in format else 1]
    with tempfile.TemporaryDirectory() as folder:
        for i, size in enumerate(sizes):
            model = small.model(name, size)
            ready = packages.Halved(copy.deepcopy(model)) if half else model
            path = Path(folder) / f"{i}{packages.FORMATS[format.removesuffix('-fp16')]}"
            packages.write_network(ready, small.inputs(2, size), path)
            runs = [packages.read_network(path, kernels=on) for on in ((True, False) if "onnx" in format else (True,))]
            for batch in (1, 3):
                inputs = small.inputs(batch, size, seed=batch)
                with torch.no_grad():
                    want = model(*inputs)
                worst = max(worst, *(packages.difference(want, run(*inputs)) for run in runs))
    return exactness(worst, 2e-2 if half else 1e-4)


def exactness(error: float, most: float = 1e-4) -> str:
    """A number for the table; more than `most` is a failure."""
    if not error <= most:
        raise Unfit(f"off by {error:.0e}")
    return f"{error:.0e}"


def compiled(small: Small, name: str, *_: Any) -> str:
    """Traced forward and backward at three sizes and batches in one process, without breaks; kernels are eager's."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    height, width = first = small.sizes[0]
    worst, calls = 0.0, [(2, first), (3, (width, height)), (4, (height + width, height + width))]
    if len(small.sizes) == 1:  # of one size alone
        calls = [(batch, first) for batch, _ in calls]
    model = small.model(name, first).train()
    for module in model.modules():
        if isinstance(module, (nn.Dropout, timm.layers.DropPath)):
            module.eval()
    fast = torch.compile(model, fullgraph=True, backend=counter)
    for batch, size in calls:
        inputs = small.inputs(batch, size)
        eager, made = trained(model, model, inputs), trained(fast, model, inputs)
        if packages.difference(eager, made) > 1e-3:  # rounding decides at the corner of a ReLU: float64 is the judge
            exact = copy.deepcopy(model).double()
            eager = trained(exact, exact, [x.double() for x in inputs])
        worst = max(worst, packages.difference(eager, made))
    return f"{exactness(worst, 1e-3)}, {counter.frame_count} graphs"


def trained(run: Callable, model: nn.Module, inputs: Sequence[Tensor]) -> tuple[Any, list[Tensor]]:
    """The answers in training, and the gradients of the mean of their squares; buffers stay as they were."""
    state = copy.deepcopy(model.state_dict())
    torch.manual_seed(0)  # of routes that are drawn
    answer = run(*inputs)
    model.zero_grad()
    sum(part.square().mean() for part in packages.tensors(answer) if part.requires_grad).backward()
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.load_state_dict(state)
    return answer, grads


def exported(small: Small, name: str, *_: Any) -> str:
    """`torch.export`, with as many dynamic axes as the network allows: the program runs at others.

    The example has not the size that the model is built for, where position tables are taken as they are.
    """
    (height, width), example = small.sizes[0], small.sizes[-1]
    model, inputs = small.model(name, (height, width)), small.inputs(2, example)
    spatial = [[1 + i for i, side in enumerate(shape) if side == "HW"] for shape in small.shapes]
    for free in (True, False) if len(small.sizes) > 1 else (False,):
        sides = [
            {at[0]: torch.export.Dim.AUTO, at[0] + 1: torch.export.Dim.AUTO} if free and at else {} for at in spatial
        ]
        axes = tuple({0: torch.export.Dim.DYNAMIC, **side} for side in sides)
        try:
            with torch.no_grad():
                program = torch.export.export(model, inputs, dynamic_shapes=axes).module()
                batches = [small.inputs(batch, (width, height) if free else example, seed=batch) for batch in (1, 3)]
                worst = max(packages.difference(model(*batch), program(*batch)) for batch in batches)
            return f"{exactness(worst)}, {'any size' if free else 'any batch'}"
        except Exception as error:
            if not free:
                raise
            print(f"no dynamic sides: {error}")
    raise AssertionError("one of the two returns or raises")


def integers(small: Small, name: str, *_: Any) -> str:
    """What 8 bits change: int8 linear layers alone, and, where one input calibrates them, MambaQuant."""
    inputs, found = small.inputs(3, small.sizes[0]), []
    with torch.no_grad():
        for method in ("dynamic", "mambaquant") if len(inputs) == 1 else ("dynamic",):
            model = small.model(name, small.sizes[0])
            want = model(*inputs)
            quantise(model, Recipe(method, "w8a8"), inputs if len(inputs) == 1 else ())
            found.append(exactness(packages.difference(want, model(*inputs)), 0.5))
    return ", ".join(found)


CELLS: dict[str, Callable[[Small, str, str, int], str]] = {
    "compile": compiled, "export": exported, "int8": integers,
    **dict.fromkeys(("onnx", "onnx-fp16", "pt2", "torchscript-trace"), packed),
}  # fmt: skip


def limited(seconds: int, *args: Any) -> None:
    """A cell that may compute for so long."""
    resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + seconds, resource.RLIM_INFINITY))
    cell(*args)


def cell(compute: Callable[..., str], args: Sequence, to: Path) -> None:
    """Computes a cell into a file; what the exporters print goes beside it."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with open(to.with_suffix(".log"), "w") as log, redirect_stdout(log), redirect_stderr(log):
        try:
            result = {"says": compute(*args)}
        except Exception as error:  # of an exporter, which may raise anything
            traceback.print_exc(file=log)
            result = {"fails": one_line(error, 200)}
    keep(to, result)


def keep(to: Path, result: dict) -> None:
    """Writes a result, whole or not at all."""
    with atomic(to) as file:
        file.write(json.dumps(result).encode())


def in_a_process(compute: Callable[..., str], args: Sequence, to: Path, limit: int) -> dict:
    """Runs a cell; one that takes more than `limit` seconds of the processor, or ten times that in all, is ended."""
    to.unlink(missing_ok=True)
    process = multiprocessing.get_context("fork").Process(target=limited, args=(limit, compute, args, to))
    process.start()
    process.join(10 * limit)
    if process.is_alive() or process.exitcode == -signal.SIGXCPU:
        process.kill()
        process.join()
        keep(to, {"fails": f"takes more than {limit} seconds"})
    elif not to.exists():
        keep(to, {"fails": f"the process ended with {process.exitcode}"})
    return json.loads(to.read_text())


# -- times ------------------------------------------------------------------------------------------------------------

TIMED = (
    "vim_tiny_patch16_224", "local_vim_tiny", "vmamba_tiny_s1l8", "vig_tiny", "vrwkv_tiny", "mambavision_tiny",
    "scan_tiny", "deit_tiny_patch16_224", "swin_tiny_patch4_window7_224",
)  # fmt: skip
RUNTIMES = {
    "eager": "eager torch", "compile": "torch.compile", "pt2": "AOTInductor", "onnx": "ONNX Runtime",
    "openvino": "OpenVINO, float32", "openvino-free": "OpenVINO, its own precision",
}  # fmt: skip


def prepared(*args: Any) -> str:
    """Writes packages, and fills torch's cache of what it compiles: the times then need a quiet machine for seconds."""
    milliseconds(*args, calls=1)
    return "ready"


def milliseconds(name: str, side: int, runtime: str, threads: Sequence[int], files: Path, calls: int = 5) -> str:
    """For each number of threads the least of some calls with one image, after one that does not count."""
    create = linescan.create_model if linescan.zoo.is_model(name) else timm.create_model
    torch.manual_seed(0)
    model, image, best = create(name, img_size=side).eval(), torch.randn(1, 3, side, side), []
    for count in threads:
        torch.set_num_threads(count)
        torch._dynamo.reset()  # what is compiled for one thread stays with it
        run = in_runtime(model, image, runtime, files / f"{name}.{side}", count)
        with torch.inference_mode():
            run()
            times = []
            for _ in range(calls):
                start = time.perf_counter()
                run()
                times.append(time.perf_counter() - start)
        best.append(1e3 * min(times))
    return " / ".join(f"{took:.{0 if took > 30 else 1}f}" for took in best)


def in_runtime(model: nn.Module, image: Tensor, runtime: str, stem: Path, threads: int) -> Callable[[], Any]:
    """A call of the model in a runtime; `stem`: the name of its package, which is written once."""
    if runtime == "eager":
        return lambda: model(image)
    if runtime == "compile":
        fast = torch.compile(model, fullgraph=True)
        return lambda: fast(image)
    plain = runtime.startswith("openvino")  # which reads no functions
    path = Path(f"{stem}.pt2" if runtime == "pt2" else f"{stem}.plain.onnx" if plain else f"{stem}.onnx")
    if not path.exists():
        packages.write_network(model, (torch.cat([image, image]),), path, plain=plain)
    if not plain:
        network = packages.read_network(path)
        return lambda: network(image)
    import openvino

    options = {"INFERENCE_NUM_THREADS": threads}
    if runtime == "openvino":
        options["INFERENCE_PRECISION_HINT"] = "f32"  # else bfloat16, where the processor has it
    request = openvino.compile_model(str(path), "CPU", options).create_infer_request()
    return lambda: request.infer([image.numpy()])


# -- the page ---------------------------------------------------------------------------------------------------------


def grid(columns: Sequence[str], rows: dict[str, list[Path]], before: dict[str, dict]) -> list[str]:
    """A table in Markdown, from the cells of each row; then what does not work, and why.

    A cell that has not been computed is as it was `before`, by row and column, or empty.
    """
    lines, notes = [f"| {' | '.join(columns)} |", "| --- |" + " --- |" * (len(columns) - 1)], []
    for title, cells in rows.items():
        names = [f"{title}, {column}" for column in columns[1:]]
        found = [
            json.loads(path.read_text()) if path.exists() else before.get(name) for name, path in zip(names, cells)
        ]
        if not any(found):
            continue
        lines.append(f"| {title} | {' | '.join(result.get('says', 'no') if result else '' for result in found)} |")
        notes += [f"- {name}: {result['fails']}" for name, result in zip(names, found) if result and "fails" in result]
    return [*lines, "", *([*notes, ""] if notes else [])]


def gridded(lines: Sequence[str]) -> dict[str, dict]:
    """The results that stand in such tables, by row and column."""
    found, columns = {}, []
    for line in lines:
        title, *cells = line.strip("| ").split(" | ")
        if line.startswith("- "):
            name, _, reason = line.removeprefix("- ").partition(": ")
            found[name] = {"fails": reason}
        elif line.startswith("| `"):
            found |= {f"{title}, {column}": {"says": text} for column, text in zip(columns, cells) if text}
        elif not line.startswith("| ---"):
            columns = cells
    return found


def measured_on() -> list[str]:
    """What the milliseconds are of."""
    facts = machine()
    tools = [("torch", "torch"), ("onnxruntime", "ONNX Runtime"), ("openvino", "OpenVINO")]
    with_versions = ", ".join(f"{name} {metadata.version(tool)}" for tool, name in tools if find_spec(tool))
    return [
        "Milliseconds for one image, the least of five calls, in float32 but for the last column. Processor:",
        f"{facts['processor']}, {facts['cores']} cores; {with_versions}.", "",
    ]  # fmt: skip


def split(page: Path, mark: str) -> tuple[str, str, str]:
    """A page before its mark and with it, between its two marks, and from the second one on."""
    begin, end = f"<!-- {mark} -->", f"<!-- end of {mark} -->"
    before, _, rest = page.read_text().partition(begin)
    between, _, after = rest.partition(end)
    return before + begin, between, end + after


def write_page(page: Path, lines: list[str], mark: str) -> None:
    """Replaces what stands between the page's marks."""
    before, _, after = split(page, mark)
    with atomic(page) as file:
        file.write("\n".join([before, "", *lines, after]).encode())


def named(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def deploy(
    model: Annotated[list[str], typer.Option(help="Only models of these names; * and ? stand for anything.")] = ["*"],
    format: Annotated[list[str], typer.Option(help=f"Only some of {', '.join(FORMATS)}.")] = ["*"],
    times: Annotated[bool, typer.Option("--time", help="Milliseconds instead: of whole models.")] = False,
    prepare: Annotated[bool, typer.Option("--prepare", help="Only what --time needs: packages and caches.")] = False,
    runtime: Annotated[list[str], typer.Option(help=f"Of --time: only some of {', '.join(RUNTIMES)}.")] = ["*"],
    side: Annotated[list[int], typer.Option(help="Of --time: pixels of an image's side.")] = [224, 512, 1024],
    threads: Annotated[list[int], typer.Option(help="Of --time.")] = [1, 2],
    sizes: Annotated[int, typer.Option(min=1, max=2, help="Sizes of images at which ONNX is tried.")] = 2,
    again: Annotated[bool, typer.Option("--again", help="Also cells that are there already.")] = False,
    limit: Annotated[int, typer.Option(help="Seconds of the processor for one cell.")] = 300,
    results: Annotated[Path, typer.Option(help="The folder for the results.")] = Path("runs/deploy"),
    page: Annotated[Path, typer.Option(help="The page that holds the tables.")] = PAGE,
):
    """Compute what is missing of the tables of docs/deploy.md."""
    times, files = times or prepare, results / "packages"
    files.mkdir(parents=True, exist_ok=True)

    def path(*parts: Any) -> Path:
        return results / f"{'.'.join(map(str, parts))}.json"

    lines: Callable[[], list[str]]
    if times:
        wanted = [(prepared if prepare else milliseconds, (name, pixels, kind, threads, files)) for pixels in side
                  for name in TIMED if named(name, model)
                  for kind in RUNTIMES if named(kind, runtime)]  # fmt: skip

        def lines() -> list[str]:
            return measured_on() + grid(
                [f"ms on {' / '.join(map(str, threads))} threads", *RUNTIMES.values()],
                {f"`{name}`, {pixels}": [path(name, pixels, kind) for kind in RUNTIMES]
                 for pixels in side for name in TIMED},
                {},
            )  # fmt: skip
    else:
        before = gridded(split(page, "cells")[1].splitlines())
        wanted = [(CELLS[kind], (small, name, kind, sizes)) for models in MODELS.values()
                  for name, small in models.items() if named(name, model)
                  for kind in FORMATS if named(kind, format)]  # fmt: skip

        def lines() -> list[str]:
            return [line for title, models in MODELS.items() for line in grid(
                [title, *FORMATS.values()],
                {f"`{name}`": [path(name, kind) for kind in FORMATS] for name in models},
                before,
            )]  # fmt: skip

    mark = "times" if times else "cells"
    for compute, args in wanted:
        to = path(*(args[:3] if times else args[1:3]))
        to = files / to.name if prepare else to
        if again or not to.exists():
            start = time.monotonic()
            found = in_a_process(compute, args, to, limit)
            print(f"{to.stem}: {' '.join(map(str, found.values()))} ({time.monotonic() - start:.0f} s)", flush=True)
            write_page(page, lines(), mark)
    write_page(page, lines(), mark)


if __name__ == "__main__":
    typer.run(deploy)
