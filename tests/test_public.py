"""What linescan exports is there, and importing any of it takes the core's packages alone."""

import ast
import subprocess
import sys
from importlib import import_module

import pytest
import tomllib

import linescan

from .conftest import ENVIRONMENT, REPOSITORY

ROOT = REPOSITORY / "linescan"
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
# Names under which the packages of the extras are imported, where they are not those of the distributions.
IMPORTED = {
    "scikit-learn": "sklearn",
    "pyvips-binary": "_libvips",
    "pytest-xdist": "xdist",
    "myst-parser": "myst_parser",
    "open-clip-torch": "open_clip",
}
OPENMMLAB = {"mmengine", "mmcv", "mmseg", "mmdet"}


def modules() -> list[str]:
    """All modules of linescan that can be imported without the package of their folder."""
    names = []
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(REPOSITORY).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if "configs" not in parts and parts[-1] != "__main__" and not name.startswith("linescan.scans.kernels.triton"):
            names.append(name)
    return names


def needs_openmmlab(name: str) -> bool:
    return name.startswith("linescan.openmmlab") or name == "linescan.demos.scenes"


def optional_packages() -> set[str]:
    """What the extras name, as it is imported; what the core needs is left out."""
    names = {
        requirement.replace("[", " ").replace(">", " ").replace(";", " ").replace("=", " ").split()[0]
        for extra in PROJECT["optional-dependencies"].values()
        for requirement in extra
    }
    names = {name for name in names if not name.startswith(("linescan", "onedl", "ruff", "mypy"))}
    return {IMPORTED.get(name, name) for name in names} | OPENMMLAB | {"triton", "lazrs"}


def test_names_of_the_package():
    for name in linescan.__all__:
        assert getattr(linescan, name) is not None
    assert linescan.__all__ == sorted(linescan.__all__) and set(linescan.__all__) <= set(dir(linescan))
    tree = ast.parse((ROOT / "__init__.py").read_text())
    typed = [
        f"{node.module}.{alias.name}"
        for block in tree.body
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in block.body
        for alias in node.names
    ]
    assert sorted(typed) == sorted(f"{home}.{name}" for name, home in linescan._HOMES.items())
    with pytest.raises(AttributeError, match="nothing"):
        linescan.nothing
    assert (ROOT / "py.typed").exists()


@pytest.mark.parametrize("name", [name for name in modules() if not needs_openmmlab(name)])
def test_names_of_modules(name):
    module = import_module(name)
    exported = getattr(module, "__all__", [])
    assert len(set(exported)) == len(exported)
    for export in exported:
        assert getattr(module, export) is not None and not export.startswith("_")


def test_imports_need_the_core_alone():
    """Any module but the demos, where nothing else is installed; `import linescan` itself needs not even torch."""
    names = [name for name in modules() if not name.startswith(("linescan.openmmlab", "linescan.demos"))]
    code = f"""
import sys
from importlib import import_module

import linescan

early = {{"torch", "timm", "numpy", "PIL"}} & set(sys.modules)
assert not early, f"import linescan imports {{early}}"

sys.modules.update(dict.fromkeys({optional_packages()!r}))  # None: there is no such package
for name in {names!r}:
    import_module(name)
linescan.create_model("vim_tiny_patch16_224", depth=1)
"""
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_packages_of_the_extras_are_the_ones_that_are_held_back():
    assert {"matplotlib", "sklearn", "av", "pyvips", "scipy", "laspy", "mmengine"} <= optional_packages()
    assert not optional_packages() & {"torch", "torchvision", "timm", "numpy", "PIL", "safetensors", "typer", "rich"}
