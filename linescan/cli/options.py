"""The `linescan` application, and what several of its commands share: options, and how they are read.

Command modules import torch, and what imports it, inside their functions only: help and completion start at once.
"""

import inspect
import json
from dataclasses import MISSING, fields
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Callable, Optional, Sequence, get_args, get_type_hints

import typer
from typer.core import TyperCommand

from linescan import __version__
from linescan.engine.recipe import flag
from linescan.errors import InputError

from .names import complete_models

# pretty_exceptions: a traceback is for whoever debugs linescan, and a plain one can be pasted.
app = typer.Typer(
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Linear-time vision models: see, try, train and measure them.",
    epilog="Start with  [bold]linescan demo[/], then  [bold]linescan list[/].",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"linescan {__version__}")
        raise typer.Exit()


@app.callback()
def _linescan(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
):
    pass


def epilog_of(examples: Sequence[str]) -> str:
    """What stands below the help of a command."""
    return "\n\n".join(["Examples:", *(f"  [cyan]{line}[/]" for line in examples)])


def command(*examples: str, name: str | None = None, of: typer.Typer = app) -> Callable:
    """Makes a function a command of `linescan`, or of one of its groups, with `examples` below its help."""
    return of.command(name, epilog=epilog_of(examples))


def group(name: str, about: str) -> typer.Typer:
    """A group of commands: `linescan NAME COMMAND`."""
    made = typer.Typer(help=about, rich_markup_mode="rich", no_args_is_help=True,
                       context_settings=app.info.context_settings)  # fmt: skip
    app.add_typer(made, name=name)
    return made


def command_by_task(
    name: str,
    tasks: Sequence[str],
    make: Callable[[str], TyperCommand],
    about: str,
    expand: Callable[[list[str]], list[str]] = list,
) -> None:
    """A command whose options depend on the `--task` among its arguments.

    Args:
        name: of the command.
        tasks: that there are; the first is meant where none is named.
        make: task -> the command with its options, as `made_command` gives it.
        about: one line for the list of commands.
        expand: arguments -> those that they stand for.
    """

    class ByTask(TyperCommand):
        def make_context(self, info_name, args, parent=None, **extra):
            args = expand(args)
            return make(named_task(args, tasks)).make_context(info_name, args, parent, **extra)

    app.command(name, cls=ByTask, help=about)(lambda: None)


def named_task(args: Sequence[str], tasks: Sequence[str]) -> str:
    """The `--task` among arguments; the first of `tasks` where none is named."""
    task = word_after(args, "--task") or tasks[0]
    if task not in tasks:
        raise InputError(f"--task must be one of {', '.join(tasks)}, not {task!r}")
    return task


def word_after(args: Sequence[str], option: str) -> str | None:
    """The value of an option among arguments, as `OPTION VALUE` or `OPTION=VALUE`; the last one; None without one."""
    found = None
    for i, arg in enumerate(args):
        if arg == option and i + 1 < len(args):
            found = args[i + 1]
        elif arg.startswith(f"{option}="):
            found = arg.partition("=")[2]
    return found


def words_of(values: dict[str, Any]) -> list[str]:
    """Fields of a recipe and their values as arguments of the command line; None is left out."""
    words = []
    for name, value in values.items():
        if isinstance(value, dict):
            words += [word for key, one in value.items() for word in (flag(name), f"{key}={json.dumps(one)}")]
        elif value is not None and value is not False:
            each = [] if value is True else value if isinstance(value, (list, tuple)) else [value]
            words += [flag(name), *map(str, each)]
    return words


def made_command(name: str, function: Callable, parameters: Sequence[inspect.Parameter], about: str, examples):
    """The command of a function whose parameters are made; `about` is its help, in paragraphs."""

    def run(**options):
        return function(**options)

    run.__doc__ = "\n\n".join(" ".join(paragraph.split()) for paragraph in inspect.cleandoc(about).split("\n\n"))
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    single = typer.Typer(
        add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False,
        context_settings=app.info.context_settings,
    )  # fmt: skip
    single.command(name, epilog=epilog_of(examples))(run)
    return typer.main.get_command(single)


def parameter(name: str, annotation: Any, default: Any = None) -> inspect.Parameter:
    """A parameter of a made command."""
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


# -- options ----------------------------------------------------------------------------------------------------------

Model = Annotated[
    Optional[str],
    typer.Option("--model", "-m", help="A name of `linescan list`, or of timm.", autocompletion=complete_models),
]
Checkpoint = Annotated[
    Optional[Path],
    typer.Option(
        "--checkpoint", "-c", help="A file of weights (.safetensors, .pth). One of linescan's names its model."
    ),
]
ModelArgs = Annotated[
    Optional[list[str]],
    typer.Option("--model-arg", metavar="KEY=VALUE", help="An argument for timm.create_model; may be repeated."),
]


def _known_device(name: Optional[str], context: typer.Context) -> Optional[str]:
    """The device's name. Raises InputError: there is none of that name, which is said before anything is opened."""
    if name is not None and not context.resilient_parsing:  # as completion parses
        from linescan.engine.processes import pick_device

        pick_device(name)
    return name


Device = Annotated[
    Optional[str],
    typer.Option(help="cpu, cuda, cuda:1, ...; default: CUDA where there is one.", callback=_known_device),
]
Batch = Annotated[int, typer.Option("--batch", "-b", min=1, help="Images (or frames) in one forward pass.")]
Workers = Annotated[
    Optional[int], typer.Option(min=0, help="Processes that load images; default: 4 for files, none for the digits.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


class Floats(str, Enum):
    """Names of floating-point types."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"

    @property
    def dtype(self):
        """As torch calls it."""
        import torch

        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.value]


Precision = Annotated[Floats, typer.Option("--precision", help="Compute in this precision.")]


# -- reading them, and printing ---------------------------------------------------------------------------------------


def model_args(pairs: list[str] | None, option: str = "--model-arg") -> dict:
    """["depth=4", "rope=true", "class_token=head"] -> {"depth": 4, "rope": True, "class_token": "head"}."""
    args = {}
    for pair in pairs or ():
        key, equals, value = pair.partition("=")
        if not key.isidentifier() or not equals:
            raise InputError(f"{option} takes KEY=VALUE, not {pair!r}")
        try:
            args[key] = json.loads({"True": "true", "False": "false", "None": "null"}.get(value, value))
        except json.JSONDecodeError:
            args[key] = value
    return args


def parameters_of(recipe: type, scoring: bool = False) -> list[inspect.Parameter]:
    """The fields of a recipe (see `linescan.engine.recipe.option`) as parameters of a command.

    Args:
        recipe: the class.
        scoring: only the fields that count when a finished model is scored.
    """
    hints, parameters = get_type_hints(recipe), []
    for f in fields(recipe):
        if scoring and not f.metadata["scoring"]:
            continue
        facts, kind = f.metadata, hints[f.name]
        default = None if f.default is MISSING else f.default
        if kind is dict:  # KEY=VALUE, several times
            kind = list[str]
        names = [flag(f.name), *([facts["short"]] if facts["short"] else [])]
        metavar = facts["metavar"] or (facts["choices"] and "|".join(facts["choices"]))
        shown = {"help": facts["help"].format(recipe=recipe), "rich_help_panel": facts["panel"], "metavar": metavar}
        complete = complete_models if f.name in ("model", "teacher") else None
        option = typer.Option(*names, **shown, autocompletion=complete)
        kind = Annotated[kind if default is not None or type(None) in get_args(kind) else Optional[kind], option]
        parameters.append(parameter(f.name, kind, default))
    return parameters


def side_lengths(text: str) -> list[int]:
    """ "224,512" -> [224, 512], ascending."""
    try:
        sides = sorted({int(side) for side in text.split(",")})
    except ValueError:
        sides = []
    if not sides or sides[0] < 1:
        raise InputError(f"--sizes is numbers with commas between, as in 224,512, not {text!r}")
    return sides


def worker_count(workers: int | None, data: str) -> int:
    """The number of processes that load images from `data`."""
    import os

    return (0 if data == "digits" else min(4, os.cpu_count() or 1)) if workers is None else workers


def number(value: float | None, pattern: str) -> str:
    """A table's cell: the number, or a dash where there is none."""
    return "-" if value is None else format(value, pattern)


def show_json(value: Any) -> None:
    """Prints a value as JSON."""
    print(json.dumps(value, indent=2))


def pixels(text: str | None, option: str) -> tuple[int, int] | None:
    """ "512x1024" -> (512, 1024), "512" -> (512, 512)."""
    if text is None:
        return None
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) for side in sides):
        raise InputError(f"{option} is a size in pixels, as in 512 or 512x1024 (height x width), not {text!r}")
    return int(sides[0]), int(sides[-1])
