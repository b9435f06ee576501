"""Models of point clouds applied to files."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from .options import Checkpoint, Device, Floats, Json, Model, ModelArgs, Precision, command, group, model_args
from .predict import answer_files

if TYPE_CHECKING:
    from linescan.tasks.tool import Tool, Writer

points = group("points", "Point clouds: what they show, what each point is of, where things are, and what is around.")

Scans = Annotated[
    list[str],
    typer.Argument(
        metavar="SCAN...",
        help="Clouds (.ply .pcd .las .laz .npy .npz .txt .xyz .pts .asc .csv .bin) and meshes (.off .obj .stl .ply), "
        "folders of them, patterns with * and **; - for a list on standard input.",
        show_default=False,
    ),
]
Clouds = Annotated[int, typer.Option("--batch", "-b", min=1, help="Clouds in one forward pass.")]
Limit = Annotated[
    int, typer.Option(min=1, help="Most points that are kept of a file; of larger ones they are drawn at random.")
]
Columns = Annotated[
    Optional[str],
    typer.Option(help="Names for the columns of files without, as in 'x y z intensity - label' (-: not used).")
]  # fmt: skip
Pages = Annotated[bool, typer.Option("--pages/--no-pages", help="Write a page that turns under the mouse for each.")]
Overlays = Annotated[bool, typer.Option("--overlays/--no-overlays", help="Draw each cloud from four sides.")]


@command(
    "linescan points classify chair.ply --checkpoint runs/scans/best.safetensors",
    "linescan points classify 'scans/**/*.pcd' --model pointmamba_scanobjectnn --votes 10 --out runs/named",
    "linescan points classify scans --checkpoint best.safetensors --json > names.json",
    of=points,
)
def classify(
    paths: Scans,
    model: Model = None,
    checkpoint: Checkpoint = None,
    to: Annotated[
        Optional[Path], typer.Option("--out", "-o", help="The folder that pages and drawings are written to.")
    ] = None,
    topk: Annotated[int, typer.Option("--topk", "-k", min=1, help="How many classes for each cloud.")] = 5,
    votes: Annotated[
        int, typer.Option(min=0, help="So many random draws of points, whose mean is the answer; 0: the same always.")
    ] = 0,
    limit: Limit = 2_000_000,
    columns: Columns = None,
    pages: Pages = True,
    overlays: Overlays = True,
    device: Device = None,
    precision: Precision = Floats.fp32,
    batch: Clouds = 16,
    model_arg: ModelArgs = None,
    as_json: Json = False,
):
    """Name what point clouds show.

    Of each cloud the model reads as many points as it was trained with. A file that cannot be read is named and
    skipped; the exit status is then 1.
    """

    def open_tool() -> tuple["Tool", "Writer"]:
        from linescan.tasks.points import CloudLabels, PointClassifier

        args = {"device": device, "dtype": precision.dtype, "batch": batch, "limit": limit, "columns": columns}
        tool = PointClassifier(model, checkpoint, topk=topk, votes=votes, **args, **model_args(model_arg))
        return tool, CloudLabels(to, pages)

    answer_files(open_tool, paths, to, overlays and to is not None, as_json, "classifying", kinds=("cloud",))


@command(
    "linescan points segment chairs --checkpoint runs/parts/best.safetensors --category chair",
    "linescan points segment scans/chair scans/lamp --checkpoint runs/parts/best.safetensors -o runs/segmented",
    of=points,
)
def segment(
    paths: Scans,
    model: Model = None,
    checkpoint: Checkpoint = None,
    to: Annotated[Path, typer.Option("--out", "-o", help="The folder that everything is written to.")] = Path(
        "runs/points-segment"
    ),
    category: Annotated[
        Optional[str],
        typer.Option(help="The kind of object that all files show; default: what the folder of each is called."),
    ] = None,
    limit: Limit = 2_000_000,
    columns: Columns = None,
    pages: Pages = True,
    overlays: Overlays = True,
    device: Device = None,
    precision: Precision = Floats.fp32,
    batch: Clouds = 16,
    model_arg: ModelArgs = None,
    as_json: Json = False,
):
    """Say what each point of a cloud belongs to: OUT/labels/NAME.ply with a class and a colour for every point.

    The model reads as many points as it was trained with; all others get what their nearest three have. A file that
    cannot be read is named and skipped; the exit status is then 1.
    """

    def open_tool() -> tuple["Tool", "Writer"]:
        from linescan.tasks.point_parts import PartLabels, PartSegmenter

        args = {"device": device, "dtype": precision.dtype, "batch": batch, "limit": limit, "columns": columns}
        tool = PartSegmenter(model, checkpoint, category=category, **args, **model_args(model_arg))
        return tool, PartLabels(to, tool.classes, pages)

    answer_files(open_tool, paths, to, overlays, as_json, "segmenting", kinds=("cloud",))


@command(
    "linescan points detect 000042.bin --checkpoint runs/kitti/best.safetensors",
    "linescan points detect 'sweeps/*.pcd.bin' --model lion_mamba_nuscenes --checkpoint lion.pth --threshold 0.5",
    "linescan points detect scans --checkpoint best.safetensors --json > boxes.json",
    of=points,
)
def detect(
    paths: Scans,
    model: Model = None,
    checkpoint: Checkpoint = None,
    to: Annotated[Path, typer.Option("--out", "-o", help="The folder that everything is written to.")] = Path(
        "runs/points-detect"
    ),
    threshold: Annotated[float, typer.Option(min=0, max=1, help="Boxes with a lower score are left out.")] = 0.3,
    limit: Limit = 2_000_000,
    columns: Columns = None,
    pages: Pages = True,
    overlays: Overlays = True,
    device: Device = None,
    precision: Precision = Floats.fp32,
    batch: Clouds = 1,
    model_arg: ModelArgs = None,
    as_json: Json = False,
):
    """Find objects in LiDAR scans, as boxes: OUT/boxes/NAME.json.

    A box has a class, a score, its centre, its length, width and height in metres, and its angle about the z axis in
    radians. A file that cannot be read is named and skipped; the exit status is then 1.
    """

    def open_tool() -> tuple["Tool", "Writer"]:
        from linescan.tasks.point_detect import BoxDetector, BoxTable

        args = {"device": device, "dtype": precision.dtype, "batch": batch, "limit": limit, "columns": columns}
        tool = BoxDetector(model, checkpoint, threshold=threshold, **args, **model_args(model_arg))
        return tool, BoxTable(to, pages)

    answer_files(open_tool, paths, to, overlays, as_json, "detecting", kinds=("cloud",))


@command(
    "linescan points occupancy 000000.bin --checkpoint runs/occupancy/best.safetensors",
    "linescan points occupancy sequences/08/velodyne --model occrwkv_semantickitti --checkpoint weights.pth -o runs/08",
    of=points,
)
def occupancy(
    paths: Scans,
    model: Model = None,
    checkpoint: Checkpoint = None,
    to: Annotated[Path, typer.Option("--out", "-o", help="The folder that everything is written to.")] = Path(
        "runs/points-occupancy"
    ),
    limit: Limit = 2_000_000,
    columns: Columns = None,
    pages: Pages = True,
    overlays: Overlays = True,
    device: Device = None,
    precision: Precision = Floats.fp32,
    batch: Clouds = 1,
    model_arg: ModelArgs = None,
    as_json: Json = False,
):
    """Say what every cell around a scanner is, seen or not: OUT/volumes/NAME.npy, OUT/cells/NAME.ply.

    The volume lies in front of the scanner: 51.2 m long and wide, 6.4 m high, in cells of 0.2 m, as the published model
    has it. A file that cannot be read is named and skipped; the exit status is then 1.
    """

    def open_tool() -> tuple["Tool", "Writer"]:
        from linescan.tasks.point_occupancy import SceneCompleter, VolumeTable

        args = {"device": device, "dtype": precision.dtype, "batch": batch, "limit": limit, "columns": columns}
        tool = SceneCompleter(model, checkpoint, **args, **model_args(model_arg))
        return tool, VolumeTable(to, tool.classes, pages)

    answer_files(open_tool, paths, to, overlays, as_json, "completing", kinds=("cloud",))
