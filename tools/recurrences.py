#!/usr/bin/env python
"""Writes the list of recurrences in docs/recurrences.md from their declarations and docstrings.

python tools/recurrences.py
"""

import inspect
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from linescan.scans.recurrence import Public, functions  # noqa: E402

PAGE = ROOT / "docs" / "recurrences.md"
BEGIN = "<!-- From here on written by tools/recurrences.py. -->\n"
FORMS = ("reference", "chunked", "cpu", "triton")


def parts(function: Public) -> tuple[str, str, str]:
    """(what it is, in one line; its equation; where it is from) out of the docstring."""
    title, equation, source = inspect.getdoc(function.function).split("\n\n")[:3]
    return title, inspect.cleandoc(equation), source


def arguments(function: Public) -> list[str]:
    """One line per group of tensors with the same axes, then the output and the states."""
    layout = function.layout
    groups: dict[str, list[str]] = {}
    for name, argument in layout.arguments.items():
        groups.setdefault(str(argument), []).append(f"`{name}`" + " (optional)" * argument.optional)
    rows = [f"| {', '.join(names)} | `{axes}` |" for axes, names in groups.items()]
    whole = layout if layout.output is not None or function.recurrence is None else function.recurrence.layout
    if whole.output is not None:
        rows.append(f"| output | `{str(whole.output).replace('K or 1', 'K')}` |")
    for name, state in layout.states.items():
        rows.append(f"| final {'state' if name == 'initial_state' else name} | `{state}` |")
    return rows


def entry(function: Public) -> str:
    title, equation, source = parts(function)
    op = function.recurrence
    if op is None:
        runs = "Plain torch operations; the order of tokens has no part in it, so there is no route."
    else:
        runs = f"Operator `linescan::{op.name}`"
        runs += "" if op.name == function.name else f", on inputs that `{function.name}` makes"
        runs += f"; forms: {', '.join(form for form in FORMS if form in op.implementations)}."
    lines = [
        f"### {function.name}", "", title, "", "```text", equation, "```", "", source, "",
        "| tensors | axes |", "|---|---|", *arguments(function), "", runs, "",
    ]  # fmt: skip
    return "\n".join(lines)


def table() -> str:
    rows = ["| function | |" + "".join(f" {form} |" for form in FORMS), "|---|---|" + "---|" * len(FORMS)]
    for function in sorted(functions().values(), key=lambda f: f.name):
        title = re.split(r"[:.,](?:\s|$)", parts(function)[0])[0]
        there = {} if function.recurrence is None else function.recurrence.implementations
        marks = "".join(f" {'x' * (form in there)} |" for form in FORMS)
        rows.append(f"| [`{function.name}`](#{function.name}) | {title} |{marks}")
    return "\n".join(rows) + "\n"


def page() -> str:
    """The whole page, its first part as it is."""
    prose = PAGE.read_text().partition(BEGIN)[0]
    entries = "\n".join(entry(f) for f in sorted(functions().values(), key=lambda f: f.name))
    return f"{prose}{BEGIN}\n## The recurrences\n\n{table()}\n{entries}"


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"{len(functions())} recurrences in {PAGE}")
