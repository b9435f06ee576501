"""Names of models and tasks for shell completion, which cannot wait for the models' modules: these import torch.

They are read from the source: every family registers its models in a table, `register(CLASS, models={NAME: ...})`, in
which the names are written out.
"""

import ast
from pathlib import Path
from typing import Iterator

__all__ = ["complete_models", "complete_tasks", "registered"]

_ROOMS = ("backbones", "heads")  # of `linescan.zoo.PACKAGES`
_TASK = "classification"  # of a table that states none


def complete_models(incomplete: str) -> list[str]:
    """The models whose names start so."""
    return sorted(name for name, _ in registered() if name.startswith(incomplete))


def complete_tasks(incomplete: str) -> list[str]:
    """The tasks that start so."""
    return sorted({task for _, task in registered() if task.startswith(incomplete)})


def registered() -> Iterator[tuple[str, str]]:
    """(name, task) of each model."""
    for room in _ROOMS:
        for path in (Path(__file__).parents[1] / room).rglob("*.py"):
            source = path.read_text(encoding="utf-8")
            _, call, tables = source.partition("\nregister(")  # what stands before need not be parsed
            for statement in ast.parse(call + tables).body if call else ():
                yield from _names(statement)


def _names(statement: ast.stmt) -> Iterator[tuple[str, str]]:
    """The names in a call of `register`."""
    call = getattr(statement, "value", None)
    if not (isinstance(call, ast.Call) and ast.unparse(call.func) in ("register", "zoo.register")):
        return
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    models = given.get("models", call.args[1] if len(call.args) > 1 else None)
    task = getattr(given.get("task"), "value", _TASK)
    for key in getattr(models, "keys", ()):
        yield key.value, task
