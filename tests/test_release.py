"""The wheels, installed where nothing of the repository is: with the kernels, and from a machine without a compiler."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import tomllib

import linescan
from linescan.scans.kernels import cpu

from .conftest import REPOSITORY

USE = """
import linescan
from linescan.scans.kernels import backend_info
from pathlib import Path
print(linescan.__file__)
print(len(linescan.list_models()), len(list(Path(linescan.__file__).parent.glob("configs/*/*.[pt]*"))))
print(backend_info()["cpu"])
"""


def git(*args) -> str:
    return subprocess.run(("git", *args), cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """A copy of what git knows, and of the compiled kernels, which are taken as they are."""
    if not (REPOSITORY / ".git").exists():
        pytest.skip("the sources are those that git lists")
    root = tmp_path_factory.mktemp("sources")
    for name in git("ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")[:-1]:
        if (REPOSITORY / name).is_file():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, root / name)
    return root


def wheel(sources: Path, to: Path, *options: str, **environment) -> Path:
    command = (sys.executable, "-m", "build", *options, "--no-isolation", "--outdir", to, sources)
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    [path] = to.glob("*.whl")
    return path


def installed(path: Path, to: Path) -> tuple[Path, dict]:
    """The Python of an environment that has the wheel, and the packages of this one but linescan."""
    subprocess.run((sys.executable, "-m", "venv", "--without-pip", to), check=True)
    python = to / "bin" / "python"
    site = Path(sysconfig.get_path("purelib", "venv", {"base": to, "platbase": to}))
    with zipfile.ZipFile(path) as archive:
        archive.extractall(site)
    # Folders that a .pth file names are searched after the environment's own, and their .pth files are not read.
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    return python, environment


def use(path: Path, trained: Path, images: Path, folder: Path) -> str:
    """Lists models and configs and classifies an image with what is installed; returns the state of the kernels."""
    python, environment = installed(path, folder / "env")

    def run(*args) -> str:
        done = subprocess.run((python, *args), cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    file, counts, kernels = run("-c", USE).splitlines()
    assert Path(file).is_relative_to(folder / "env")
    configs = len(list((REPOSITORY / "linescan" / "configs").glob("*/*.[pt]*")))
    assert counts == f"{len(linescan.list_models())} {configs}"
    image = sorted(images.glob("*/*.png"))[0]
    assert "%" in run("-m", "linescan", "classify", image, "-c", trained / "model.safetensors", "--device", "cpu")
    return kernels


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or not cpu.LIBRARY.exists(), reason="needs the kernels, and auditwheel")
def test_the_wheel_of_a_platform(sources, trained, images, tmp_path):
    built = sources / "build" / f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    (built / "linescan/scans/kernels").mkdir(parents=True)
    shutil.copy(cpu.LIBRARY, built / "linescan/scans/kernels/_cpu.so")  # newer than its sources: not compiled again
    path = wheel(sources, tmp_path / "dist", "--wheel")
    assert re.fullmatch(rf"linescan-{re.escape(linescan.__version__)}-py3-none-linux_\w+\.whl", path.name)
    command = ("auditwheel", "repair", "-w", tmp_path / "repaired", path)
    report = subprocess.run(command, capture_output=True, text=True, env=_with_scripts())
    assert report.returncode == 0, report.stdout + report.stderr
    [repaired] = (tmp_path / "repaired").glob("*.whl")
    assert re.search(r"-py3-none-manylinux_2_\d+_\w+", repaired.name)
    with zipfile.ZipFile(repaired) as archive:
        libraries = [name for name in archive.namelist() if re.search(r"\.so(\.\d+)*$", name)]
    assert libraries == ["linescan/scans/kernels/_cpu.so"], "nothing of torch is in the wheel"
    assert use(repaired, trained, images, tmp_path).startswith("C++")


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="the environment's layout is that of POSIX")
def test_the_wheel_of_a_machine_without_a_compiler(sources, trained, images, tmp_path):
    shutil.rmtree(sources / "build", ignore_errors=True)
    path = wheel(sources, tmp_path / "dist", CC="/no/compiler", CXX="/no/compiler")  # from the sdist that it makes
    assert (path.parent / f"linescan-{linescan.__version__}.tar.gz").exists()
    assert path.name == f"linescan-{linescan.__version__}-py3-none-any.whl"
    assert "not compiled" in use(path, trained, images, tmp_path)


def test_the_version_stands_once():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    assert project["project"]["dynamic"] == ["version"] and "version" not in project["project"]
    named = git("grep", "-lF", f'"{linescan.__version__}"', "--", "*.py", "*.toml", "*.cfg").split()
    assert named == ["linescan/__init__.py"]


def _with_scripts() -> dict:
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
