"""docs/recurrences.md and docstrings say what the declarations say."""

import importlib.util
import inspect
import re

import pytest

from linescan.scans.recurrence import functions

from ..conftest import REPOSITORY

NAMES = list(functions())


def test_the_list_of_recurrences_is_up_to_date():
    spec = importlib.util.spec_from_file_location("tool", REPOSITORY / "tools" / "recurrences.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    assert tool.page() == tool.PAGE.read_text(), "run python tools/recurrences.py"


@pytest.mark.parametrize("name", NAMES)
def test_docstrings(name):
    """What it is, its equation, where it is from; every tensor with its axes, there or in what it points to."""
    text = inspect.getdoc(functions()[name].function)
    title, equation, source = text.split("\n\n")[:3]
    assert "\n" not in title and title.endswith(".")
    assert all(line.startswith("    ") for line in equation.splitlines()) and "=" in equation
    assert re.search(r"arXiv[ \n]\d{4}\.\d{5}", source)
    told = text + "".join(inspect.getdoc(functions()[other].function) for other in re.findall(r"as of `(\w+)`", text))
    told = re.sub(r"\s+", " ", told)
    for key, argument in functions()[name].layout.arguments.items():
        assert re.search(rf"\b{key}\b[\w, ]*: ", told), key
        for axes in str(argument).split(" or ("):
            assert axes.lstrip("(") in told or " if " in axes, f"{key}: {axes}"
