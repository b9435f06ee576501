"""Compiles the CPU kernels. Everything else about the package stands in pyproject.toml.

The kernels need a C++17 compiler (g++ or clang++), and nothing of torch or Python: they find libtorch's stable C
interface when they are loaded. One library therefore serves every Python, every torch >= 2.10 and every ONNX Runtime,
and an isolated build does not have to download torch. Where they do not compile, the package is installed without them.
"""

import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

KERNELS = "linescan.scans.kernels._cpu"
FOLDER = "linescan/scans/kernels/cpu"


class BuildKernels(build_ext):
    """A plain shared library: no module to import, no version of Python in its name."""

    def get_ext_filename(self, fullname):
        return f"{fullname.replace('.', '/')}.so"

    def get_export_symbols(self, ext):
        return []

    def build_extension(self, ext):
        try:
            super().build_extension(ext)
        except Exception as error:
            self.warn(f"the CPU kernels do not compile, the slower torch form will serve: {error}")
            raise


class Wheel(bdist_wheel):
    """For every Python of a platform; for every platform where it came out without the kernels.

    On Windows, where there are none, too: cibuildwheel takes no wheel that is for every platform.
    """

    def get_tag(self):
        platform = super().get_tag()[2]
        if sys.platform != "win32" and not Path(self.bdist_dir, *KERNELS.split(".")).with_suffix(".so").exists():
            self.root_is_pure = True
            platform = "any"
        return "py3", "none", platform


kernels = Extension(
    KERNELS,
    sources=[f"{FOLDER}/{name}.cpp" for name in ("ops", "points", "onnx_runtime", "avx512", "avx2", "baseline")],
    depends=[
        f"{FOLDER}/{name}.h"
        for name in (
            "calls",
            "kernels",
            "instruction_set",
            "vector",
            "selective_scan",
            "matrix_scan",
            "vector_scan",
            "causal_conv",
            "neighborhood",
            "merge",
            "blend",
            "gates",
            "stable",
            "onnx_runtime",
        )
    ],
    language="c++",
    # No trapping: comparisons may become minima and maxima. -Wno-psabi: no vector crosses a library's border.
    extra_compile_args=[
        "-O3",
        "-g0",
        "-std=c++17",
        "-fno-math-errno",
        "-fno-trapping-math",
        "-fvisibility=hidden",
        "-Wno-psabi",
    ],
    extra_link_args=["-s"] if sys.platform == "linux" else [],
    libraries=["dl"] if sys.platform == "linux" else [],
    optional=True,
)

setup(
    # The vectors are an extension of GCC and clang; with another compiler the torch form serves.
    ext_modules=[] if sys.platform == "win32" else [kernels],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": Wheel},
)
