#!/usr/bin/env python3
"""Installs OpenMMLab (the maintained onedl forks) into the Python that runs this, beside the torch that is there.

    python tools/install_openmmlab.py

onedl-mmcv comes as source and has to be compiled against that torch (about ten minutes on two cores). The wheel is kept
in the user's cache folder, by the versions of torch and Python, and every later installation takes it from there.
"""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MMCV = "onedl-mmcv==2.3.6"
PACKAGES = ("onedl-mmengine==0.10.12", "onedl-mmdetection==3.5.1", "onedl-mmsegmentation==1.4.2")
UPSTREAM = ("mmcv", "mmcv-lite", "mmcv-full", "mmengine", "mmdet", "mmsegmentation")  # the same import names
CONSTRAINTS = Path(__file__).resolve().parent.parent / "constraints.txt"
VERIFY = "import cv2, mmcv.ops, mmdet.apis, mmseg.apis; print('OpenMMLab is there: mmcv', mmcv.__version__)"


def say(line: str) -> None:
    print(f"openmmlab: {line}", flush=True)


def version(package: str) -> str | None:
    """Of an installed distribution, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def pip(*args: str) -> None:
    """One pip command of this Python, with the pinned versions where they are; ends the program where it fails."""
    pinned = ["-c", str(CONSTRAINTS)] if args[0] == "install" and CONSTRAINTS.exists() else []
    status = subprocess.run([sys.executable, "-m", "pip", *args, "-q", *pinned]).returncode
    if status:
        sys.exit(f"openmmlab: `pip {' '.join(args)}` failed with status {status}")


def works() -> bool:
    """Whether a fresh Python can import everything."""
    return not subprocess.run([sys.executable, "-W", "ignore", "-c", VERIFY], capture_output=True).returncode


def wheel_folder() -> Path:
    """Where the wheel for this torch and this Python is kept."""
    torch = version("torch")
    if torch is None:
        sys.exit("openmmlab: install torch first, then run this again: mmcv is compiled against it")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "linescan" / "wheels"
    return cache / f"torch-{torch.partition('+')[0]}-cp{sys.version_info.major}{sys.version_info.minor}"


def build_wheel(folder: Path) -> None:
    """Compiles mmcv with its CPU operators, and its CUDA ones where there are a GPU and a compiler for it."""
    pip("install", "setuptools", "wheel", "packaging", "ninja", "psutil")
    say(f"compiling {MMCV} against torch {version('torch')}, once on this machine (about ten minutes on two cores)")
    folder.mkdir(parents=True, exist_ok=True)
    environment = dict(os.environ)
    if not shutil.which("nvcc") and not environment.get("CUDA_HOME"):
        environment["CUDA_VISIBLE_DEVICES"] = ""  # mmcv's setup would take a GPU for a promise of nvcc
    started = time.monotonic()
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        # Neither pip's cache, which knows nothing of torch's version, nor an isolated build, which has no torch.
        command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-build-isolation", "--no-deps", "--no-cache-dir"]
        command += ["--no-binary", "onedl-mmcv", "--wheel-dir", scratch, MMCV]
        output = []
        with subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        ) as process:
            shown = 0.0
            for line in process.stdout:
                output.append(line)
                step = re.search(r"\[(\d+)/(\d+)\]", line)
                if step and time.monotonic() - shown > 15:
                    shown = time.monotonic()
                    say(f"  file {step[1]} of {step[2]}, {(shown - started) / 60:.1f} minutes")
        wheels = [w for w in Path(scratch).glob("*.whl") if "none-any" not in w.name]
        if process.returncode or not wheels:
            sys.stderr.writelines(output[-40:])
            sys.exit("openmmlab: compiling onedl-mmcv failed; the end of its output is above")
        os.replace(wheels[0], folder / wheels[0].name)
    say(f"compiled in {(time.monotonic() - started) / 60:.1f} minutes; kept as {folder / wheels[0].name}")


def main() -> None:
    wanted = dict(package.split("==") for package in (MMCV, *PACKAGES))
    if all(version(name) == number for name, number in wanted.items()) and works():
        say("is there already")
        return
    clashing = [name for name in UPSTREAM if version(name)]
    if clashing:
        sys.exit(f"openmmlab: the forks cannot stand beside upstream; first: pip uninstall {' '.join(clashing)}")
    folder = wheel_folder()
    pattern = f"onedl_mmcv-{wanted['onedl-mmcv']}-*.whl"
    if not list(folder.glob(pattern)):
        build_wheel(folder)
    (wheel,) = folder.glob(pattern)
    say(f"installing {wheel.name}, {', '.join(PACKAGES)}")
    pip("install", "setuptools", "wheel")
    pip("install", "--no-build-isolation", str(wheel), *PACKAGES)
    # Two distributions of OpenCV are asked for, which share their files: the one that needs no display goes last.
    pip("install", "--force-reinstall", "--no-deps", f"opencv-python-headless=={version('opencv-python-headless')}")
    if not works():
        subprocess.run([sys.executable, "-W", "ignore", "-c", VERIFY])
        sys.exit(f"openmmlab: installed, but not importable (above); if {wheel} is of another torch, delete it")
    say("installed, imported, ready")


if __name__ == "__main__":
    main()
