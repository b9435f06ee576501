"""Whatever the machine does: one line, a status, and nothing half-written; names are names; help is quick."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import linescan
from linescan.cli.names import registered
from linescan.engine.progress import show_table, styled
from linescan.errors import visible

from ..conftest import ENVIRONMENT, REPOSITORY, command
from ..runs import Forked, be_linescan, python

linux = pytest.mark.skipif(sys.platform != "linux", reason="needs /dev/full")


def start(*args, **options):
    options = {"env": ENVIRONMENT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "timeout": 300, **options}
    return subprocess.run(command(*args), text=True, **options)


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "image.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16), np.uint8)).save(path)
    return path


@pytest.fixture
def checkpoint(trained):
    return trained / "model.safetensors"


def is_one_line(done, *said):
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("linescan: ") and done.stderr.count("\n") == 1, done.stderr
    assert all(word in done.stderr for word in said), done.stderr


# -- standard output ---------------------------------------------------------------------------------------------------


@linux
@pytest.mark.parametrize("args", [["--help"], ["--version"]], ids=" ".join)
def test_a_full_disk_behind_standard_output(args):
    with open("/dev/full", "w") as full:
        is_one_line(start(*args, stdout=full), "No space left")


def _into_a_full_disk(*args: str) -> None:
    sys.stdout = open("/dev/full", "w")
    be_linescan(*args)


@linux
def test_a_full_disk_behind_the_answers(image, checkpoint, tmp_path):
    args = "classify", str(image), "-c", str(checkpoint), "--json"
    is_one_line(Forked(tmp_path, _into_a_full_disk, *args).end(), "No space left")


def _into_a_pipe_that_closes(*args: str) -> None:
    """As by `| head -1`."""
    read, write = os.pipe()
    os.close(read)
    sys.stdout = open(write, "w")
    be_linescan(*args)


def test_a_pipe_that_closes(tmp_path):
    is_one_line(Forked(tmp_path, _into_a_pipe_that_closes, "list", "--json").end(), "closed")
    read, write = os.pipe()
    os.close(read)
    done = start("--version", stdout=write)
    os.close(write)
    is_one_line(done, "closed")


def test_no_standard_output_at_all():
    shell = " ".join(command("--version")) + " >&-"
    done = subprocess.run(shell, shell=True, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True, timeout=300)
    is_one_line(done, "closed")


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["a file", "below a file", "a long name"])
@pytest.mark.parametrize(
    "args",
    [["routes", "row", "-o", "OUT.png"], ["classify", "IMAGE", "-c", "CHECKPOINT", "-o", "OUT"],
     ["directions", "SEARCH", "-o", "OUT.json", "-m", "local_vim_tiny_search", "--model-arg", "depth=2"]],
    ids=lambda args: args[0],
)  # fmt: skip
def test_outputs_that_cannot_be_written(linescan_here, image, checkpoint, tmp_path, kind, args):
    if args[0] == "directions":
        import timm
        import torch

        torch.save(timm.create_model("local_vim_tiny_search", depth=2).state_dict(), tmp_path / "search.pth")
    if args[0] == "directions" and kind != "below a file":
        pytest.skip("what `routes` shows already")
    (tmp_path / "file").write_text("kept")
    out = {"a file": tmp_path / "file", "below a file": tmp_path / "file" / "x", "a long name": tmp_path / ("n" * 300)}[
        kind
    ]
    if kind == "a file" and args[0] == "routes":
        out = tmp_path / "folder"
        (tmp_path / "folder.png").mkdir()
    before = sorted(tmp_path.rglob("*"))
    names = {"IMAGE": image, "CHECKPOINT": checkpoint, "SEARCH": tmp_path / "search.pth"}
    status, _, stderr = linescan_here(*[names.get(a, str(a).replace("OUT", str(out))) for a in args])
    assert status == 2 and stderr.startswith("linescan: ") and stderr.count("\n") == 1, stderr
    assert sorted(tmp_path.rglob("*")) == before and (tmp_path / "file").read_text() == "kept"


def _limited(*args: str) -> None:
    """No file may grow beyond 2 kB: as on a full disk, the write that would exceed it fails."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048))
    be_linescan(*args)


def test_a_disk_that_is_full_in_the_middle(image, checkpoint, tmp_path):
    out = tmp_path / "out"
    done = Forked(tmp_path, _limited, "classify", str(image), "-c", str(checkpoint), "--out", str(out)).end()
    is_one_line(done, "File too large", "image.jpg")
    assert not [p for p in out.rglob("*") if p.is_file()]
    done = Forked(tmp_path, _limited, "routes", "row", "-o", str(tmp_path / "routes.png")).end()
    is_one_line(done, "File too large")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["image.png", "out"]


# -- names -------------------------------------------------------------------------------------------------------------

NAMES = ["photo [old].png", "[bold red]x.png", "a]b[.png", "*.png", "x\\[red].png", "-.png", "ü 日本.png", ":ok:.png"]


def test_names_are_names(linescan_here, image, checkpoint, tmp_path):
    folder = tmp_path / "in [1]"
    folder.mkdir()
    for name in NAMES:
        (folder / name).write_bytes(image.read_bytes())
    (folder / "broken [x].png").write_bytes(b"")
    out = tmp_path / "c[/red]"
    status, stdout, stderr = linescan_here("classify", folder, "-c", checkpoint, "-o", out)
    assert status == 1
    assert {line.rpartition(".png:")[0] + ".png" for line in stdout.splitlines()} == {str(folder / n) for n in NAMES}
    assert "broken [x].png" in stderr and f"8 of 9 done, in {out}" in stderr
    assert {p.stem for p in (out / "overlays").iterdir()} == {Path(n).stem for n in NAMES}
    for name in NAMES:
        status, stdout, stderr = linescan_here("classify", folder / name, "-c", checkpoint)
        assert status == 0 and stdout.startswith(f"{folder / name}: "), stderr
    status, stdout, _ = linescan_here("classify", tmp_path / "in [1]" / "ph*", "-c", checkpoint, "--json")
    assert status == 0 and json.loads(stdout)[0]["source"].endswith("photo [old].png")
    status, _, stderr = linescan_here("classify", "gone [x].png", "-c", checkpoint)
    assert status == 2 and stderr == "linescan: no file matches gone [x].png\n"
    status, stdout, _ = linescan_here("routes", "row", "-o", tmp_path / "r[/red].png")
    assert status == 0 and stdout.strip() == str(tmp_path / "r[/red].png")


ODD = {
    "esc\x1b[31mred.png": r"esc\x1b[31mred.png",
    "new\nline.png": r"new\nline.png",
    "\u202egnp.png": r"\u202egnp.png",
}


def test_control_characters_are_shown_as_escapes(linescan_here, image, checkpoint, tmp_path):
    for name in ODD:
        (tmp_path / name).write_bytes(image.read_bytes())
    (tmp_path / "broken\r.png").write_bytes(b"x")
    status, stdout, stderr = linescan_here("classify", tmp_path, "-c", checkpoint)
    assert status == 1 and r"broken\r.png" in stderr
    for shown in ODD.values():
        assert f"{tmp_path}/{shown}: " in stdout
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", stdout + stderr)
    status, _, stderr = linescan_here("classify", "\x1b]0;title\x07.png", "-c", checkpoint)
    assert status == 2 and r"\x1b]0;title\x07.png does not exist" in stderr


def _on_a_terminal_of_ascii(*args: str) -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="ascii", errors="strict")
    be_linescan(*args)


def test_names_that_are_no_text(image, checkpoint, tmp_path):
    """Bytes that are not UTF-8, on a terminal that knows ASCII only."""
    os.write(fd := os.open(os.fsencode(tmp_path) + b"/caf\xe9.png", os.O_CREAT | os.O_WRONLY), image.read_bytes())
    os.close(fd)
    (tmp_path / "ü.png").write_bytes(image.read_bytes())
    done = Forked(tmp_path, _on_a_terminal_of_ascii, "classify", str(tmp_path), "-c", str(checkpoint)).end()
    assert done.returncode == 0, done.stderr
    assert r"caf\xe9.png: " in done.stdout and r"\xfc.png: " in done.stdout


def test_no_text_is_read_as_markup_anywhere(capsys):
    """There is one place that prints, and it cannot."""
    assert styled("[bold]x[/]", ("[/]", "red")).plain == "[bold]x[/][/]"
    assert visible("a\tb\x9bc\u2028d\udce9") == r"a\tb\x9bc\u2028d\xe9" and visible("日本 [é]") == "日本 [é]"
    for path in (REPOSITORY / "linescan").rglob("*.py"):
        code = path.read_text()
        if path.name != "progress.py":
            assert not re.search(r"\bConsole\(|from_markup|rich\.markup|rich import print", code), path
    from rich.table import Table

    table = Table("model")
    table.add_row("[red]x[/red]" + "y" * 300)
    show_table(table)
    assert "[red]x[/red]" + "y" * 300 in capsys.readouterr().out, "a cell is neither read nor cut"


# -- starting ----------------------------------------------------------------------------------------------------------


def completed(words: str, process: list[str] | None = None) -> subprocess.CompletedProcess:
    position = len(words.split()) - (not words.endswith(" "))
    env = {**ENVIRONMENT, "_LINESCAN_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(position)}
    return subprocess.run(process or command(), env=env, capture_output=True, text=True, timeout=300)


HEAVY = ("torch", "numpy", "timm", "PIL", "matplotlib", "sklearn", "torchvision")


@pytest.mark.parametrize(
    "args", [["--help"], ["--version"], *([name, "--help"] for name in ("classify", "segment", "detect", "train",
             "evaluate", "list", "info", "doctor", "routes", "benchmark", "directions", "demo"))],
    ids=lambda args: " ".join(args),
)  # fmt: skip
def test_help_needs_no_torch(args):
    code = f"import sys; sys.argv = ['linescan', *{args}]\nfrom linescan.cli import main\n" \
        "try: main()\nexcept SystemExit as exit: assert not exit.code\n" \
        f"assert not set({HEAVY}) & set(sys.modules), set({HEAVY}) & set(sys.modules)"  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("words", ["linescan info vim_", "linescan list --task ", "linescan tr"])
def test_completion_needs_no_torch(words):
    code = f"import atexit, sys; sys.argv = ['linescan']\nfrom linescan.cli import main\n" \
        f"atexit.register(lambda: print(sorted(set({HEAVY}) & set(sys.modules)), file=sys.stderr))\nmain()"  # fmt: skip
    done = completed(words, [sys.executable, "-c", code])
    assert done.stdout and done.stderr == "[]\n", done.stderr


def test_version():
    done = start("--version")
    assert done.returncode == 0 and done.stdout == f"linescan {linescan.__version__}\n"


def test_completion():
    from linescan import zoo

    assert dict(registered()) == {entry.name: entry.task for entry in zoo.entries()}, "names stand in the tables"
    assert completed("linescan cl").stdout.split() == ["classify"]
    assert "vim_tiny_patch16_224" in completed("linescan info vim_t").stdout.split()
    assert completed("linescan classify x.png --model vmamba_tiny_s1").stdout.split() == ["vmamba_tiny_s1l8"]
    assert "segmentation" in completed("linescan list --task ").stdout.split()
    script = start(
        "--show-completion", "bash", env={**ENVIRONMENT, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    )
    assert "_LINESCAN_COMPLETE" in script.stdout


def test_importing_linescan_imports_no_front_end():
    code = (
        "import sys, linescan, importlib.util\n"
        f"assert not {{'typer', 'rich', *{HEAVY}}} & set(sys.modules)\n"
        "assert importlib.util.find_spec('timm') and 'torch' not in sys.modules, 'looked for, not imported'\n"
        "linescan.scans.routes\n"
        "import timm\n"
        "assert timm.is_model('vim_tiny_patch16_224') and len(linescan.list_models()) > 50\n"
        "assert not {'typer', 'rich', 'matplotlib', 'sklearn'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


# -- packages that are not there ---------------------------------------------------------------------------------------

ABSENT = """
import sys
from importlib.machinery import PathFinder
for name in [name for name in sys.modules if name.partition('.')[0] in {packages}]:
    del sys.modules[name]
find = PathFinder.find_spec.__func__
PathFinder.find_spec = classmethod(
    lambda cls, name, *args: None if name.partition('.')[0] in {packages} else find(cls, name, *args)
)
sys.argv = ['linescan', *sys.argv[1:]]
from linescan.cli import main
main()
"""


@pytest.mark.parametrize(
    "package, extra, args",
    [("matplotlib", "plot", ["routes", "row"]), ("matplotlib", "demo", ["demo"]), ("sklearn", "demo", ["demo"]),
     ("sklearn", "demo", ["evaluate", "-d", "digits", "-c", "CHECKPOINT"]), ("av", "video", ["classify", "x.mp4"])],
)  # fmt: skip
def test_what_to_install(package, extra, args, checkpoint, tmp_path):
    (tmp_path / "x.mp4").write_bytes(b"x")
    code = ABSENT.format(packages=[package])
    args = [str(checkpoint) if a == "CHECKPOINT" else a for a in args]
    if package == "av":
        args += ["-c", str(checkpoint)]
    done = python(tmp_path, code, *args)
    assert done.returncode == (1 if package == "av" else 2) and "Traceback" not in done.stderr, done.stderr
    assert f"pip install 'linescan[{extra}]'" in done.stderr


# -- interruptions -----------------------------------------------------------------------------------------------------


def _slow_at(waits: Path, now: Path, *args: str) -> None:
    """`linescan ARGS`; at the file `waits` it makes the file `now`, and takes long."""
    from linescan.tasks.classify import Classifier

    plain = Classifier.open

    def slow(self, given):
        if str(given) == str(waits):
            now.touch()
            time.sleep(600)
        return plain(self, given)

    Classifier.open = slow
    be_linescan(*args)


def test_an_interrupted_run_keeps_what_is_answered(image, checkpoint, tmp_path):
    """Ctrl-C half-way: the JSON on standard output is complete, and nothing is half-written."""
    waits, now = tmp_path / "waits.png", tmp_path / "now"
    files = [*(tmp_path / f"{i}.png" for i in range(3)), waits]
    for file in files:
        file.write_bytes(image.read_bytes())
    args = map(str, ["classify", *files, "-c", checkpoint, "--json", "--batch", "1"])
    run = Forked(tmp_path, _slow_at, waits, now, *args)
    while not now.exists():
        assert run.process.is_alive()
        time.sleep(0.1)
    os.kill(run.process.pid, signal.SIGINT)
    done = run.end(60)
    assert done.returncode == 130 and done.stderr == ""
    assert [Path(one["source"]).name for one in json.loads(done.stdout)] == ["0.png", "1.png", "2.png"]
