"""Imports only go down: what stands on a floor knows the floors below it, and nothing above."""

import ast
from pathlib import Path

import linescan

ROOT = Path(linescan.__file__).parent
FLOORS = [
    {"errors", "arguments", "_compat", "extras", "notices", "tensorfile"},
    {"scans"},
    {"checkpoint", "flops"},
    {"layers"},
    {"zoo"},
    {"backbones"},
    {"heads"},
    {"quantise"},
    {"media"},
    {"engine"},
    {"tasks"},
    {"openmmlab"},
    {"demos"},
    {"cli"},
    {"__init__", "__main__"},
]
FLOOR = {name: i for i, names in enumerate(FLOORS) for name in names}
ROOT_NAMES = {"__init__", "__version__"}  # importing the package itself registers its models
KNOWN = {
    "tasks/open.py imports openmmlab.models",  # opens the models of configs
    "media/write.py imports engine.atomic",
}


def imports(path: Path):
    """Modules of linescan that a file imports, as paths from the root of the package."""
    package = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = [*package[: len(package) - node.level + 1], *base.split(".")]
            elif base.split(".")[0] == "linescan":
                parts = base.split(".")[1:]
            else:
                continue
            parts = [part for part in parts if part]
            yield from [parts] if parts else [[alias.name] for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from (a.name.split(".")[1:] or ["__init__"] for a in node.names if a.name.split(".")[0] == "linescan")


def test_imports_only_go_down():
    up = []
    for path in sorted(ROOT.rglob("*.py")):
        own = path.relative_to(ROOT).with_suffix("").parts[0]
        if own == "configs":
            continue
        for parts in imports(path):
            if parts[0] not in ROOT_NAMES and FLOOR[parts[0]] > FLOOR[own]:
                up.append(f"{path.relative_to(ROOT)} imports {'.'.join(parts)}")
    assert set(up) <= KNOWN, "\n".join(set(up) - KNOWN)
